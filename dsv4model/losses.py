"""What training minimises: sums over tokens, so that any division of a batch gives the same number.

Every loss here is a sum; the trainer divides by the counts of the global batch.  Knows no files and no ranks.
Source: paper sec. 4.2.1 (weights), DeepSeek-V3 eq. 17-20 (balance).  The indexer's loss: indexing.py.

    T tokens, H hidden, V vocabulary, E experts, K experts per token
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layers import wide

IGNORED = -100  # a target that does not count
_CHUNK_LOGITS = 16 * 1024 * 1024  # elements that are there at a time, 64 MB


def linear_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T) at the targets, without all logits at once.

    hidden_TH  floating; weight_VH of any floating dtype: products and softmax are float32 (float64 in float64)
    targets_T  int64; IGNORED counts nothing
    returns    float32 scalar: also of bfloat16, where a sum of thousands would lose its last digits
    memory     a chunk of logits, and the gradients of both arguments, which are made in the forward pass
    """
    out: Tensor = _LinearCrossEntropy.apply(hidden_TH, weight_VH, targets_T)
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is linear in what comes back, so that it is made once, while the logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
        chosen = (targets_T != IGNORED).nonzero()[:, 0]
        weight = wide(weight_VH)
        total = hidden_TH.new_zeros((), dtype=weight.dtype)
        of_hidden = torch.zeros_like(hidden_TH) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for rows in chosen.split(max(1, _CHUNK_LOGITS // len(weight))):
            x, target = wide(hidden_TH[rows]), targets_T[rows, None]
            logits = x @ weight.T
            total += (logits.logsumexp(-1) - logits.gather(1, target)[:, 0]).sum()
            if of_hidden is None and of_weight is None:
                continue
            slope = logits.softmax(-1)
            slope.scatter_add_(1, target, slope.new_full(target.shape, -1))
            if of_hidden is not None:
                of_hidden[rows] = (slope @ weight).to(of_hidden.dtype)
            if of_weight is not None:
                of_weight.addmm_(slope.T, x)
        ctx.dtype = weight_VH.dtype
        ctx.save_for_backward(of_hidden, of_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_hidden, of_weight = ctx.saved_tensors
        return (
            None if of_hidden is None else (of_hidden * grad).to(of_hidden.dtype),
            None if of_weight is None else (of_weight * grad).to(ctx.dtype),
            None,
        )


def balance(scores_TE: Tensor, ids_TK: Tensor, documents_T: Tensor) -> Tensor:
    """Sequence-wise balance loss: how often a document's tokens chose an expert, times its mean normalised affinity.

    Over all experts that is 1 for even routing, and more for uneven.

    scores_TE    affinities, float32, with gradient
    ids_TK       the chosen experts
    documents_T  numbers of the tokens' documents, of any values; a negative one does not count
    returns      float32 scalar: the sum over tokens of the value of their document
    """
    num_experts, per_token = scores_TE.shape[1], ids_TK.shape[1]
    counted = documents_T >= 0
    _, document_T = documents_T[counted].unique(return_inverse=True)
    num = int(document_T.max()) + 1 if len(document_T) else 0
    shares_TE = scores_TE[counted] / scores_TE[counted].sum(-1, keepdim=True)
    length_D = torch.bincount(document_T, minlength=num).to(scores_TE.dtype)
    mean_DE = scores_TE.new_zeros(num, num_experts).index_add(0, document_T, shares_TE) / length_D[:, None]
    picks_DE = scores_TE.new_zeros(num, num_experts)
    where = document_T[:, None] * num_experts + ids_TK[counted]
    picks_DE.view(-1).index_add_(0, where.flatten(), scores_TE.new_ones(where.numel()))
    load_DE = picks_DE * num_experts / (per_token * length_D[:, None])
    return ((load_DE * mean_DE).sum(-1) * length_D).sum()


@torch.no_grad()
def router_sums(scores_TE: Tensor, documents_T: Tensor) -> Tensor:
    """How large a router's logits are, and how even its affinities: to be looked at, not learned.

    scores_TE    affinities, float32: sqrt(softplus(logits)), from which the logits come back to 1e-6
    documents_T  a negative number: the token does not count
    returns      float32 [2], sums over tokens: logsumexp(logits) ** 2, and the entropy of the normalised affinities
    """
    scores = scores_TE[documents_T >= 0]
    softplus = scores.square()
    logits = softplus + torch.log(-torch.expm1(-softplus))  # of exp(softplus) - 1, which would overflow
    shares = scores / scores.sum(-1, keepdim=True)
    return torch.stack((logits.logsumexp(-1).square().sum(), torch.special.entr(shares).sum()))


def bias_steps(load_E: Tensor, step: float) -> Tensor:
    """How an aux-free selection bias moves: up for experts with less than the mean load, down for those with more.

    load_E   tokens of each expert, over the global batch
    returns  float32 [E], of -step, 0 or step
    """
    load = load_E.to(torch.float32)
    return (load.mean() - load).sign() * step
