"""The whole of DeepSeek-V4 in float64 numpy, by the released tensor names: the oracle that the model is held to.

Owns every formula once more, in the plainest spelling we know: one sequence at a time, a loop wherever a vectorised
line would hide what is summed.  Knows no torch, no dsv4model and no arithmetic of any release's kernels: neither the
quantization of activations nor that of keys is simulated, and nothing is rounded.
Source: the published description of the official reference (V4-Flash), and arXiv 2606.19348.

Letters: S tokens of one sequence, H hidden size, K residual streams, N heads, D head width, T compressed entries,
C compressor channels, A indexer heads, B indexer width, E experts, P picks, R rope pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from tiny_model import random_weights, tiny_document

# What the tests of the model use; the pieces below are for this module's own tests.
__all__ = ["forward", "margin", "random_weights", "tiny_document"]

Array = np.ndarray
Weights = Mapping[str, Array]
Document = dict[str, Any]
Shown = dict[str, Array]
OVERLAP = 4  # the ratio whose entries also pool the group before, and whose layers have an indexer


def forward(weights: Weights, document: Document, ids: Array, next_ids: Array | None = None) -> Shown:
    """Every named value of a forward pass, in the order of execution.

    weights   released name -> float64 (tid2eid: int64); mtp.0.* may be absent, then there is no mtp.0.* in the result
    document  the released config.json
    ids       integers [B, S]; every row is a sequence of its own that begins at position 0
    next_ids  integers [B, S], what the MTP block embeds; None: ids shifted left, then the end-of-sequence id
    returns   name -> float64 or int64 array [B, ...]. Beyond the names that the model shows:
              layers.L.attn.pick_gap [B, S], the indexer's score of the last entry picked less that of the first
              one left out, and layers.L.ffn.router_gap [B, S], the same for experts; inf where nothing was left out
    """
    ids = np.asarray(ids)
    if next_ids is None:
        end = np.full((len(ids), 1), document["eos_token_id"], ids.dtype)
        next_ids = np.concatenate([ids[:, 1:], end], axis=1)
    rows = [sequence(weights, document, *row) for row in zip(ids, np.asarray(next_ids), strict=True)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def margin(shown: Shown) -> float:
    """How clear the least clear choice was, of entries and of experts: 0 is a coin toss, and no input to test with."""
    return min(float(value.min()) for name, value in shown.items() if name.endswith("_gap"))


def sequence(weights: Weights, document: Document, ids_S: Array, next_S: Array) -> Shown:
    """What `forward` returns, of one sequence: the arrays lack their first axis."""
    shown: Shown = {}
    eps = document["rms_norm_eps"]
    embed_SH = shown["embed"] = weights["embed.weight"][ids_S]
    streams_SKH = np.stack([embed_SH] * document["hc_mult"], axis=1)
    for layer in range(document["num_hidden_layers"]):
        ratio = document["compress_ratios"][layer]
        values, streams_SKH = block(below(weights, f"layers.{layer}."), document, ratio, streams_SKH, ids_S)
        shown |= {f"layers.{layer}.{name}": value for name, value in values.items()}
    collapsed_SH = shown["final.collapsed"] = collapse(weights, document, streams_SKH)
    normed_SH = shown["final.norm"] = rms_norm(collapsed_SH, eps) * weights["norm.weight"]
    shown["logits"] = normed_SH @ weights["head.weight"].T
    if "mtp.0.e_proj.weight" in weights:
        embed_SH = weights["embed.weight"][next_S]
        values = mtp(below(weights, "mtp.0."), document, embed_SH, streams_SKH, ids_S)
        values["logits"] = values["norm"] @ weights["head.weight"].T
        shown |= {f"mtp.0.{name}": value for name, value in values.items()}
    return shown


def mtp(p: Weights, document: Document, next_SH: Array, streams_SKH: Array, ids_S: Array) -> Shown:
    """The draft block: reads the last layer's streams and the embedding of the token that follows."""
    eps = document["rms_norm_eps"]
    from_token_SH = (rms_norm(next_SH, eps) * p["enorm.weight"]) @ p["e_proj.weight"].T
    from_stream_SKH = (rms_norm(streams_SKH, eps) * p["hnorm.weight"]) @ p["h_proj.weight"].T
    shown = {"in": from_token_SH[:, None] + from_stream_SKH}
    values, streams_SKH = block(p, document, 0, shown["in"], ids_S)
    shown |= values
    shown["collapsed"] = collapse(p, document, streams_SKH)
    shown["norm"] = rms_norm(shown["collapsed"], eps) * p["norm.weight"]
    return shown


def block(
    p: Weights, document: Document, ratio: int, streams_SKH: Array, ids_S: Array
) -> tuple[Shown, Array]:
    """One layer: values by the names below it, and its streams [S, K, H]."""
    eps, shown = document["rms_norm_eps"], {}
    for part in ("attn", "ffn"):
        pre_SK, post_SK, comb_SKK = mixing(below(p, f"hc_{part}_"), document, streams_SKH)
        shown |= {f"{part}_hc.pre": pre_SK, f"{part}_hc.post": post_SK, f"{part}_hc.comb": comb_SKK}
        x_SH = rms_norm(np.einsum("sj,sjh->sh", pre_SK, streams_SKH), eps) * p[f"{part}_norm.weight"]
        shown[f"{part}.in"] = x_SH
        if part == "attn":
            values = attention(below(p, "attn."), document, ratio, x_SH)
        else:
            values = experts(below(p, "ffn."), document, x_SH, ids_S)
        shown |= {f"{part}.{name}": value for name, value in values.items()}
        mixed_SKH = np.einsum("sjk,sjh->skh", comb_SKK, streams_SKH)  # over the first index of comb
        streams_SKH = post_SK[:, :, None] * values["out"][:, None] + mixed_SKH
    shown["out"] = streams_SKH
    return shown, streams_SKH


# ---- hyper-connections and norms


def rms_norm(x: Array, eps: float) -> Array:
    """Over the last axis, without a weight."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def mixing(p: Weights, document: Document, streams_SKH: Array) -> tuple[Array, Array, Array]:
    """pre [S, K], post [S, K] and comb [S, K, K] of one sublayer."""
    S, K, _ = streams_SKH.shape
    m = rms_norm(streams_SKH.reshape(S, -1), document["rms_norm_eps"]) @ p["fn"].T
    scale, base = p["scale"], p["base"]
    pre_SK = sigmoid(m[:, :K] * scale[0] + base[:K]) + document["hc_eps"]
    post_SK = 2 * sigmoid(m[:, K : 2 * K] * scale[1] + base[K : 2 * K])
    logits_SKK = (m[:, 2 * K :] * scale[2] + base[2 * K :]).reshape(S, K, K)
    return pre_SK, post_SK, sinkhorn(logits_SKK, document["hc_sinkhorn_iters"], document["hc_eps"])


def sinkhorn(logits: Array, iters: int, eps: float) -> Array:
    """[..., j, k] -> nearly doubly stochastic: rows by a softmax, then columns; and both again, iters - 1 times."""
    C = softmax(logits, axis=-1) + eps
    C = C / (C.sum(axis=-2, keepdims=True) + eps)
    for _ in range(iters - 1):
        C = C / (C.sum(axis=-1, keepdims=True) + eps)
        C = C / (C.sum(axis=-2, keepdims=True) + eps)
    return C


def collapse(p: Weights, document: Document, streams_SKH: Array) -> Array:
    """The weighted sum of the streams before the final norm."""
    S = len(streams_SKH)
    m = rms_norm(streams_SKH.reshape(S, -1), document["rms_norm_eps"]) @ p["hc_head_fn"].T
    pre_SK = sigmoid(m * p["hc_head_scale"] + p["hc_head_base"]) + document["hc_eps"]
    return np.einsum("sj,sjh->sh", pre_SK, streams_SKH)


# ---- rotary positions


def frequencies(document: Document, ratio: int) -> Array:
    """Radians per position of every pair [R]: one base without compression, another with it, and YaRN only there."""
    width = document["qk_rope_head_dim"]
    theta = document["compress_rope_theta" if ratio else "rope_theta"]
    pairs_R = np.arange(width // 2)
    plain_R = float(theta) ** (-2.0 * pairs_R / width)
    yarn = document.get("rope_scaling")
    if not ratio or not yarn:
        return plain_R
    low, high = yarn_bounds(width, theta, yarn)
    keep_R = 1 - np.clip((pairs_R - low) / (high - low), 0, 1)
    return plain_R / yarn["factor"] * (1 - keep_R) + plain_R * keep_R


def yarn_bounds(width: int, theta: float, yarn: Document) -> tuple[float, float]:
    """Pairs up to the first keep their frequency, pairs from the second on are slowed by the whole factor."""

    def pair_that_turns(times: float) -> float:
        length = yarn["original_max_position_embeddings"]
        return width * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_that_turns(yarn["beta_slow"])), width - 1)
    return low, high if high != low else high + 0.001


def rope(x: Array, positions_S: Array, frequencies_R: Array, *, inverse: bool = False) -> Array:
    """Turn neighbouring pairs of the last dims of x [S, ..., D]; the dims before them stay."""
    R = len(frequencies_R)
    angles_SR = np.multiply.outer(positions_S, frequencies_R) * (-1 if inverse else 1)
    turns = np.exp(1j * angles_SR).reshape(len(x), *[1] * (x.ndim - 2), R)
    tail = x[..., -2 * R :]
    turned = (tail[..., 0::2] + 1j * tail[..., 1::2]) * turns
    y = x.copy()
    y[..., x.shape[-1] - 2 * R :: 2] = turned.real
    y[..., x.shape[-1] - 2 * R + 1 :: 2] = turned.imag
    return y


# ---- attention


def attention(p: Weights, document: Document, ratio: int, x_SH: Array) -> Shown:
    """Window and compressed keys under one softmax; one key, which is also the value, serves all heads."""
    S, N, D = len(x_SH), document["num_attention_heads"], document["head_dim"]
    eps, speed, positions_S = document["rms_norm_eps"], frequencies(document, ratio), np.arange(S)
    low_SQ = rms_norm(x_SH @ p["wq_a.weight"].T, eps) * p["q_norm.weight"]
    q_SND = rms_norm((low_SQ @ p["wq_b.weight"].T).reshape(S, N, D), eps)
    kv_SD = rms_norm(x_SH @ p["wkv.weight"].T, eps) * p["kv_norm.weight"]
    shown = {"q": rope(q_SND, positions_S, speed), "kv": rope(kv_SD, positions_S, speed)}
    entries_TD, visible = np.zeros((0, D)), [np.arange(0)] * S
    if ratio:
        entries_TD = shown["entries"] = compressed(below(p, "compressor."), document, ratio, x_SH)
        visible = [np.arange((t + 1) // ratio) for t in range(S)]
    if ratio == OVERLAP:
        chosen = indexer(below(p, "indexer."), document, x_SH, low_SQ)
        shown |= chosen
        visible = [picks[picks >= 0] for picks in chosen["picks"]]
    out_SND = np.zeros((S, N, D))
    for t in range(S):
        first = max(0, t + 1 - document["sliding_window"])
        keys = np.concatenate([shown["kv"][first : t + 1], entries_TD[visible[t]]])
        scores = np.column_stack([shown["q"][t] @ keys.T / math.sqrt(D), p["attn_sink"]])
        out_SND[t] = softmax(scores, axis=-1)[:, :-1] @ keys  # the sink takes its share and gives no value
    out_SND = rope(out_SND, positions_S, speed, inverse=True)
    shown["out"] = grouped(p, document["o_groups"], out_SND.reshape(S, -1)) @ p["wo_b.weight"].T
    return shown


def grouped(p: Weights, num_groups: int, heads_SX: Array) -> Array:
    """Every group of neighbouring heads through rows of its own of wo_a; the results side by side."""
    parts = np.split(heads_SX, num_groups, axis=1)
    matrices = np.split(p["wo_a.weight"], num_groups)
    return np.concatenate([part @ matrix.T for part, matrix in zip(parts, matrices, strict=True)], axis=1)


def compressed(p: Weights, document: Document, ratio: int, x_SH: Array) -> Array:
    """The entries [T, width of the norm]: one for every whole group of `ratio` tokens."""
    width, num_entries = len(p["norm.weight"]), len(x_SH) // ratio
    values_SC = x_SH @ p["wkv.weight"].T
    scores_SC = x_SH @ p["wgate.weight"].T + p["ape"][np.arange(len(x_SH)) % ratio]
    pooled = np.zeros((num_entries, width))
    for i in range(num_entries):
        own = slice(i * ratio, (i + 1) * ratio)
        values, scores = values_SC[own, -width:], scores_SC[own, -width:]
        if ratio == OVERLAP and i > 0:
            before = slice((i - 1) * ratio, i * ratio)
            values = np.concatenate([values_SC[before, :width], values])
            scores = np.concatenate([scores_SC[before, :width], scores])
        pooled[i] = np.sum(
            softmax(scores, axis=0) * values, axis=0
        )  # each channel weighs the tokens its own way
    normed = rms_norm(pooled, document["rms_norm_eps"]) * p["norm.weight"]
    return rope(normed, np.arange(num_entries) * ratio, frequencies(document, ratio))


def indexer(p: Weights, document: Document, x_SH: Array, low_SQ: Array) -> Shown:
    """picks int64 [S, P]: the entries that each token sees, ascending, then -1; and pick_gap [S]."""
    S, A, B = len(x_SH), document["index_n_heads"], document["index_head_dim"]
    q_SAB = (low_SQ @ p["wq_b.weight"].T).reshape(S, A, B)
    q_SAB = rope(q_SAB, np.arange(S), frequencies(document, OVERLAP))
    keys_TB = compressed(below(p, "compressor."), document, OVERLAP, x_SH)
    weights_SA = x_SH @ p["weights_proj.weight"].T / math.sqrt(B * A)
    most = min(document["index_topk"], len(keys_TB))
    picks_SP, gap_S = np.full((S, most), -1), np.full(S, np.inf)
    for t in range(S):
        keys = keys_TB[: (t + 1) // OVERLAP]
        scores = weights_SA[t] @ np.maximum(q_SAB[t] @ keys.T, 0)
        picks, gap_S[t] = best(scores, most)
        picks_SP[t, : len(picks)] = picks
    return {"picks": picks_SP, "pick_gap": gap_S}


# ---- experts


def experts(p: Weights, document: Document, x_SH: Array, ids_S: Array) -> Shown:
    """Routed experts, each with its weight, and the shared expert."""
    chosen = route(below(p, "gate."), document, x_SH, ids_S)
    each = [below(p, f"experts.{expert}.") for expert in range(document["n_routed_experts"])]
    routed_SH = np.zeros_like(x_SH)
    for t in range(len(x_SH)):
        for expert, weight in zip(chosen["router_ids"][t], chosen["router_weights"][t], strict=True):
            routed_SH[t] += swiglu(each[expert], document, x_SH[t], weight)
    shared_SH = swiglu(below(p, "shared_experts."), document, x_SH, 1.0)
    return {**chosen, "experts": routed_SH, "out": routed_SH + shared_SH}


def route(p: Weights, document: Document, x_SH: Array, ids_S: Array) -> Shown:
    """router_ids int64 [S, P] ascending, router_weights [S, P] in that order (scaled), router_gap [S].

    The bias helps to choose and never to weigh; where a table names the experts by token id, nothing is chosen.
    """
    affinity_SE = np.sqrt(np.logaddexp(0, x_SH @ p["weight"].T))
    gap_S = np.full(len(x_SH), np.inf)
    if "tid2eid" in p:
        ids_SP = np.sort(p["tid2eid"][ids_S], axis=1)
    else:
        chosen = [best(row + p["bias"], document["num_experts_per_tok"]) for row in affinity_SE]
        ids_SP, gap_S = np.stack([picks for picks, _ in chosen]), np.array([gap for _, gap in chosen])
    weights_SP = np.take_along_axis(affinity_SE, ids_SP, axis=1)
    weights_SP = weights_SP / weights_SP.sum(axis=1, keepdims=True) * document["routed_scaling_factor"]
    return {"router_ids": ids_SP, "router_weights": weights_SP, "router_gap": gap_S}


def swiglu(p: Weights, document: Document, x: Array, weight: float) -> Array:
    """One expert. The limit binds the gate from above only, the other branch on both sides; 0 means no limit."""
    gate, up = x @ p["w1.weight"].T, x @ p["w3.weight"].T
    if limit := document["swiglu_limit"]:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (weight * (gate * sigmoid(gate) * up)) @ p["w2.weight"].T


# ---- small parts


def below(weights: Weights, prefix: str) -> Weights:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def best(scores: Array, most: int) -> tuple[Array, float]:
    """Indices of the largest scores, ascending, the lower index first among equals; and how clear the choice was."""
    order = np.argsort(-scores, kind="stable")
    gap = scores[order[most - 1]] - scores[order[most]] if most < len(scores) else np.inf
    return np.sort(order[:most]), gap


def softmax(x: Array, axis: int) -> Array:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))
