"""The same intermediate tensors from the DeepSeek-V4 of transformers, an implementation that is not ours.

Owns the places where its modules are listened to (forward hooks; nothing in it is replaced).  What it does not hand
from module to module is computed from what the hooks see: `pre` from the streams, q and kv with the cos and sin that
the layer was given.  It has no MTP block.  Needs the package transformers, which this one does not depend on.
Source: transformers 5.23, models/deepseek_v4/modeling_deepseek_v4.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dsv4ckpt.errors import Environment, Usage

from .trace import Wanted, copy_of, everything, sorted_picks, sorted_routes

_MODELING = "transformers.models.deepseek_v4.modeling_deepseek_v4"
_KEY = "quantization_config"
DTYPES = (torch.float32, torch.bfloat16)  # its norms and angles are float32 in any case


def load(directory: str, document: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """A checkpoint as DeepseekV4ForCausalLM on the CPU, without its MTP block or DSpark stages.

    document  the object in its config.json
    dtype     float32: the values of bfloat16, computed in float32
    raises    Environment without transformers, or if it fails; Usage for a storage format that it does not read
    """
    if dtype not in DTYPES:
        raise Usage(
            f"transformers computes parts of the model in float32 even if the rest is {dtype}".replace(
                "torch.", ""
            ),
            expected="float32 or bfloat16",
            do="leave --dtype out",
        )
    quantized = _requires_dequantizing(document)
    package = _transformers()
    extra = {_KEY: package.FineGrainedFP8Config(dequantize=True)} if quantized else {}
    with _silenced(package), _failures_told():
        model: nn.Module = package.DeepseekV4ForCausalLM.from_pretrained(
            directory,
            dtype=torch.bfloat16,  # float32 at once would leave what is stored as BF16 behind
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
            **extra,
        )
    return model.to(dtype).eval() if dtype == torch.float32 else model.eval()


def _requires_dequantizing(document: dict[str, Any]) -> bool:
    """Whether a checkpoint holds codes that transformers decodes while loading; False: plain values. raises Usage"""
    found = document.get(_KEY)
    if not isinstance(found, dict):
        return False
    if found.get("quant_method") != "fp8" or found.get("quant_algo") is not None:
        raise Usage(
            "transformers does not read DeepSeek-V4 in this storage format",
            expected="BF16, the released FP4 and FP8, or FP8",
            found=f"quant_method {found.get('quant_method')!r}, quant_algo {found.get('quant_algo')!r}"[:100],
            do="convert it first: dsv4 convert CKPT DST --to bf16",
        )
    return True


@contextmanager
def _failures_told() -> Iterator[None]:
    """What its loader raises for reasons of its own is no mistake of ours."""
    try:
        yield
    except ImportError as error:
        raise Environment(
            "transformers lacks a package that it needs to load this checkpoint",
            found=_first_line(error),
            do="pip install accelerate",
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise Environment(
            "transformers cannot load this checkpoint",
            found=_first_line(error),
            do="try the version that this is written for (5.23), or a conversion: dsv4 convert CKPT DST --to bf16",
        ) from error


def _first_line(error: BaseException) -> str:
    return repr(str(error).strip().partition("\n")[0][:200])


def _transformers() -> Any:
    """The package. raises Environment"""
    try:
        package = importlib.import_module("transformers")
        importlib.import_module(_MODELING)
    except ImportError:
        raise Environment(
            "the package transformers, with DeepSeek-V4 in it, is not installed",
            expected="transformers 5.23 or newer",
            do="pip install 'transformers>=5.23' accelerate",
        ) from None
    return package


@contextmanager
def _silenced(package: Any) -> Iterator[None]:
    """It neither warns nor draws bars in the block: those who call say what is going on."""
    logging = package.utils.logging
    before, drew = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if drew:
            logging.enable_progress_bar()


@torch.no_grad()
def record(model: nn.Module, input_ids: Tensor, *, wanted: Wanted = everything) -> dict[str, Tensor]:
    """Run the model once and keep what its modules pass on; names, order and forms are those of trace.record.

    input_ids  int64 [B, S]
    raises     Environment without transformers
    """
    package = _transformers()
    kept: dict[str, Tensor] = {}

    def keep(name: str, value: Callable[[], Tensor]) -> None:
        if wanted(name):
            kept[name] = copy_of(value())

    ears = _Ears(model, keep)
    try:
        with _silenced(package):
            model(input_ids=input_ids, use_cache=False)
    finally:
        ears.close()
    return kept


_Keep = Callable[[str, Callable[[], Tensor]], None]


class _Ears:
    """The hooks on one model."""

    def __init__(self, model: Any, keep: _Keep) -> None:
        self._handles: list[Any] = []
        self._on(model.model.embed_tokens, lambda out: keep("embed", lambda: out))
        for number, layer in enumerate(model.model.layers):
            self._on_layer(layer, f"layers.{number}.", keep)
        self._on(model.model.hc_head, lambda out: keep("final.collapsed", lambda: out))
        self._on(model.model.norm, lambda out: keep("final.norm", lambda: out))
        self._on(model.lm_head, lambda out: keep("logits", lambda: out))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _on(self, module: nn.Module, heard: Callable[[Any], None]) -> None:
        self._handles.append(module.register_forward_hook(lambda module, inputs, out: heard(out)))

    def _on_layer(self, layer: Any, prefix: str, keep: _Keep) -> None:
        def said(name: str) -> Callable[[Any], None]:
            return lambda out: keep(prefix + name, lambda: out)

        self._on_mixes(layer.attn_hc, f"{prefix}attn_hc", keep)
        self._on(layer.input_layernorm, said("attn.in"))
        self._on_attention(layer.self_attn, f"{prefix}attn", keep)
        self._on_mixes(layer.ffn_hc, f"{prefix}ffn_hc", keep)
        self._on(layer.post_attention_layernorm, said("ffn.in"))
        self._on_experts(layer.mlp, f"{prefix}ffn", keep)
        self._on(layer, said("out"))

    def _on_mixes(self, module: Any, name: str, keep: _Keep) -> None:
        def heard(module: Any, inputs: tuple[Tensor, ...], out: tuple[Tensor, Tensor, Tensor]) -> None:
            keep(f"{name}.pre", lambda: _pre(module, inputs[0]))
            keep(f"{name}.post", lambda: out[0])
            keep(f"{name}.comb", lambda: out[1])

        self._handles.append(module.register_forward_hook(heard))

    def _on_attention(self, module: Any, name: str, keep: _Keep) -> None:
        angles: list[tuple[Tensor, Tensor]] = []
        picks: list[Tensor] = []

        def called(module: Any, _: tuple[Any, ...], named: dict[str, Any]) -> None:
            angles[:] = [named["position_embeddings"][module.rope_layer_type]]

        def compressed(out: tuple[Tensor, Any]) -> None:
            keep(f"{name}.entries", lambda: out[0].squeeze(1))
            if picks:
                keep(f"{name}.picks", lambda: sorted_picks(picks[0]))

        self._handles.append(module.register_forward_pre_hook(called, with_kwargs=True))
        self._on(
            module.q_b_norm, lambda out: keep(f"{name}.q", lambda: _rotated(out, angles[0]).transpose(1, 2))
        )
        self._on(
            module.kv_norm, lambda out: keep(f"{name}.kv", lambda: _rotated(out[:, None], angles[0])[:, 0])
        )
        if module.compressor is not None:
            if hasattr(module.compressor, "indexer"):  # it speaks before the compressor does
                self._on(module.compressor.indexer, lambda out: picks.__setitem__(slice(None), [out]))
            self._on(module.compressor, compressed)
        self._on(module, lambda out: keep(f"{name}.out", lambda: out[0]))

    def _on_experts(self, module: Any, name: str, keep: _Keep) -> None:
        shape: list[torch.Size] = []

        def called(_: Any, inputs: tuple[Tensor, ...]) -> None:
            shape[:] = [inputs[0].shape]

        def routed(out: tuple[Tensor, Tensor, Tensor]) -> None:
            _, weights, ids = (tensor.unflatten(0, shape[0][:2]) for tensor in out)
            keep(f"{name}.router_ids", lambda: sorted_routes(ids, weights)[0])
            keep(f"{name}.router_weights", lambda: sorted_routes(ids, weights)[1])

        self._handles.append(module.register_forward_pre_hook(called))
        self._on(module.gate, routed)
        self._on(module.experts, lambda out: keep(f"{name}.experts", lambda: out.view(shape[0])))
        self._on(module, lambda out: keep(f"{name}.out", lambda: out))


def _rotated(x_BNSD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    modeling = importlib.import_module(_MODELING)
    rotated: Tensor = modeling.apply_rotary_pos_emb(x_BNSD, *angles)
    return rotated


def _pre(module: Any, streams_BSJH: Tensor) -> Tensor:
    """The weights that collapse the streams [B, S, J]: the module uses them and keeps them to itself."""
    count = streams_BSJH.shape[2]
    mixes = module.input_norm(streams_BSJH.flatten(2).float()) @ module.fn[:count].float().T
    return torch.sigmoid(mixes * module.scale[0] + module.base[:count]) + module.hc_eps
