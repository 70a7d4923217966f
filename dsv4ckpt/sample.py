"""A small random checkpoint in a released layout: same names, dtypes, config keys and files, other sizes.

Owns the values and the small files; shapes come from the inventory.  Deterministic: a tensor's bytes depend on the seed
and its name alone.  The codes hold what real files hold: -0 in about a tenth of the packed bytes, blocks whose largest
value is 3, all-zero blocks, several scale exponents in a tile, odd FP8 subnormals, Engram blocks that reach 224 to 448.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from . import codec, formats, outdir, shard, strictjson
from . import config as configs
from .errors import Usage
from .formats import CONFIG_NAME, FP4_GRID, INDEX_NAME, Kind
from .inventory import Layout, Stored, lay_out, logical_tensors, shard_groups
from .names import Namespace
from .plan import index_bytes
from .release import RELEASES, Release, shipped_config
from .stop import StopFlag
from .threads import one_torch_thread
from .tokenizer import tokenizer_files

_PIECE_BYTES = 4 * 1024 * 1024
# Standard deviation of the codes' values, as the released rule makes it: the more values share a scale, the smaller.
_FP4_STD, _FP8_STD, _TABLE_STD = 1.9, 80.0, 150.0
_NORMAL = NormalDist()


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Sizes of a sample. None: the small default, or with release_dims the release's own."""

    release: str = "flash"
    layers: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    experts: int | None = None
    heads: int | None = None
    vocab: int | None = None
    release_dims: bool = False
    target_bytes: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class SampleFile:
    """One shard of the sample."""

    name: str
    tensors: tuple[Stored, ...]

    @functools.cached_property
    def header(self) -> bytes:
        return shard.encode_header((t.name, t.dtype, t.shape) for t in self.tensors)

    @functools.cached_property
    def size(self) -> int:
        return len(self.header) + sum(formats.stored_bytes(t.dtype, t.shape) for t in self.tensors)


@dataclass(frozen=True)
class Sample:
    """What will be written."""

    options: SampleOptions
    document: dict[str, Any]
    layout: Layout
    files: tuple[SampleFile, ...]

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def num_tensors(self) -> int:
        return sum(len(file.tensors) for file in self.files)


def plan_sample(options: SampleOptions) -> Sample:
    """Decide sizes and layout. raises Usage"""
    if options.release not in RELEASES:
        raise Usage(f"there is no release {options.release!r}", expected=", ".join(RELEASES))
    if options.target_bytes is None:
        return _planned(options)
    return _fitted(options, options.target_bytes)


def _planned(options: SampleOptions) -> Sample:
    release = RELEASES[options.release]
    document = _shrunk(shipped_config(release.name), options)
    layout = _layout(document, release)
    groups = _shards(shard_groups(layout), _vision(document) if release.family.vision else [], release)
    files = []
    for number, group in enumerate(groups, 1):
        ordered = sorted(group, key=lambda t: (-formats.DTYPE_BITS[t.dtype], t.dtype, t.name))
        files.append(SampleFile(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(ordered)))
    return Sample(options, document, layout, tuple(files))


def _shards(groups: list[list[Stored]], vision: list[Stored], release: Release) -> list[list[Stored]]:
    """Which tensors share a shard, as far as known: one layer each; in V4.1 vision and each Engram apart, at the end.

    Vision-Exp has as many shards as 0731, so its vision side stands in one of them.
    """
    if release.name == "vision-exp":
        return [groups[0] + vision, *groups[1:]]
    engrams = [[t for t in group if ".engram." in t.name] for group in groups]
    rest = [[t for t in group if ".engram." not in t.name] for group in groups]
    return [group for group in (*rest, vision, *engrams) if group]


def _layout(document: dict[str, Any], release: Release) -> Layout:
    logicals = list(logical_tensors(configs.read(document), release.family))
    return lay_out(logicals, release.family.table, release.storage, Namespace.DEEPSEEK)


def _fitted(options: SampleOptions, target: int) -> Sample:
    """Grow hidden size, then experts, then layers until the size is reached; what the user fixed stays."""
    text = _text(shipped_config(options.release))
    steps: list[dict[str, int]] = []
    for hidden in range(256, text["hidden_size"] + 1, 128):
        steps.append(
            {"layers": 4, "hidden": hidden, "intermediate": hidden // 256 * 128, "experts": hidden // 128 + 6}
        )
    widest = dict(steps[-1])
    for experts in range(widest["experts"], text["n_routed_experts"] + 1, 2):
        steps.append({**widest, "experts": experts})
    most = dict(steps[-1])
    steps += [{**most, "layers": layers} for layers in range(5, text["num_hidden_layers"] + 1)]
    fixed = {key: getattr(options, key) for key in steps[0] if getattr(options, key) is not None}

    def sized(step: dict[str, int]) -> Sample:
        return _planned(replace(options, **{**step, **fixed}))

    position = bisect.bisect_left(steps, target, key=lambda step: sized(step).total_bytes)
    near = [sized(step) for step in steps[max(0, position - 1) : position + 1]]
    if options.vocab is None and near[0].total_bytes < target:
        # the rest goes into the vocabulary, in which the size is linear
        step = steps[max(0, position - 1)]
        slope = (sized({**step, "vocab": 1024}).total_bytes - near[0].total_bytes) / 512
        vocab = min(text["vocab_size"], 512 + int((target - near[0].total_bytes) / slope))
        near.append(sized({**step, "vocab": vocab}))
    return min(near, key=lambda sample: abs(sample.total_bytes - target))


def _text(document: dict[str, Any]) -> dict[str, Any]:
    nested = document.get("text_config")
    return nested if isinstance(nested, dict) else document


def _shrunk(document: dict[str, Any], options: SampleOptions) -> dict[str, Any]:
    """A release's config with other sizes."""
    text = dict(_text(document))
    full = text["num_hidden_layers"]
    layers = options.layers or (full if options.release_dims and options.layers is None else 4)
    if not 1 <= layers <= full:
        raise Usage("the sample cannot have that many layers", expected=f"1 to {full}", found=str(layers))
    small = {} if options.release_dims else _small_sizes(options)
    text.update(small)
    if options.release_dims and options.experts:  # so that a few layers of true width fit into memory
        text["n_routed_experts"] = options.experts
    ratios = text["compress_ratios"]
    text["compress_ratios"] = ratios[:layers] + ratios[full:]
    text["num_hidden_layers"] = layers
    if "num_hash_layers" in text:
        text["num_hash_layers"] = min(text["num_hash_layers"], layers)
    if "dspark_block_size" in text:
        # always three taps, as in the releases; with fewer layers the first is tapped more than once
        text["dspark_target_layer_ids"] = [max(0, layer) for layer in range(layers - 3, layers)]
    if text["num_experts_per_tok"] > text["n_routed_experts"]:
        raise Usage("too few experts", expected=f"--experts {text['num_experts_per_tok']} or more")
    if document["model_type"] == configs.V41:
        _shrink_v41(text, layers, small=bool(small))
    if text is not document and "text_config" in document:
        vision = _small_vision() if small else document["vision_config"]
        image = {"image_token_id": min(document["image_token_id"], text["vocab_size"] - 1)}
        return {**document, **image, "text_config": text, "vision_config": vision}
    if "vision_config" in text and small:
        text["vision_config"] = _small_vision()
    return text


def _small_sizes(options: SampleOptions) -> dict[str, int]:
    hidden = options.hidden or 256
    heads = options.heads or 4
    vocab = options.vocab or 512
    for name, value, step in (("--hidden", hidden, 2), ("--heads", heads, 2)):
        if value < step or value % step:
            raise Usage(
                f"{name} must be a multiple of {step}",
                expected=f"{name} {max(step, value - value % -step)}",
                found=str(value),
            )
    if hidden <= 32 and (options.intermediate or 128) <= 32:
        raise Usage(
            "tiles of 32x32 and of 128x128 look alike in so small a model", expected="--hidden 34 or more"
        )
    if vocab < 512:
        raise Usage(
            "the sample's tokenizer has 512 entries", expected="--vocab 512 or more", found=str(vocab)
        )
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "head_dim": 128,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "index_n_heads": 4,
        "index_head_dim": 128,
        "index_topk": 64,
        "moe_intermediate_size": options.intermediate or 128,
        "n_routed_experts": options.experts or 8,
        "vocab_size": vocab,
    }


def _small_vision() -> dict[str, int]:
    return {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 14}


def _shrink_v41(text: dict[str, Any], layers: int, *, small: bool) -> None:
    for key in ("kv_source_layer_ids", "index_source_layer_ids"):
        text[key] = [layer for layer in text[key] if layer < layers]
    if text["candidate_source_layer_id"] >= layers:
        text["candidate_source_layer_id"] = -1
    rows = zip(text["engram_layer_ids"], text["engram_num_embeddings"], strict=True)
    tables = [(layer, 5003 if small else count) for layer, count in rows if layer < layers]
    text["engram_layer_ids"] = [layer for layer, _ in tables]
    text["engram_num_embeddings"] = [count for _, count in tables]
    if small:
        text.update(engram_n_heads=2, engram_head_dim=128, dspark_n_routed_experts=8)


def _vision(document: dict[str, Any]) -> list[Stored]:
    """The opaque side. Only its name pattern and its total are known; the inner names are plausible ones."""
    v, width = document["vision_config"], _text(document)["hidden_size"]
    dim, inner, patch = v["hidden_size"], v["intermediate_size"], 3 * v["patch_size"] ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "vision.patch_embed.weight": (dim, patch),
        "vision.patch_embed.bias": (dim,),
        "vision.norm.weight": (dim,),
        "aligner.w1.weight": (width, 9 * dim),
        "aligner.w1.bias": (width,),
        "aligner.w2.weight": (width, width),
        "aligner.w2.bias": (width,),
        "image_start": (width,),
        "image_end": (width,),
        "image_newline": (width,),
    }
    if "text_config" not in document:
        shapes["image_pad"] = (width,)
    for layer in range(v["depth"]):
        prefix = f"vision.blocks.{layer}."
        shapes |= {
            prefix + "norm1.weight": (dim,),
            prefix + "attn.qkv.weight": (3 * dim, dim),
            prefix + "attn.qkv.bias": (3 * dim,),
            prefix + "attn.proj.weight": (dim, dim),
            prefix + "attn.proj.bias": (dim,),
            prefix + "norm2.weight": (dim,),
            prefix + "mlp.w12.weight": (2 * inner, dim),
            prefix + "mlp.w3.weight": (dim, inner),
        }
    return [Stored(name, "BF16", shape, []) for name, shape in sorted(shapes.items())]


# ---- values


@functools.cache
def _normal_table() -> Tensor:
    """float64 [65536]: quantiles of the standard normal distribution, one for each 16-bit number."""
    return torch.tensor(
        [_NORMAL.inv_cdf((number + 0.5) / 65536) for number in range(65536)], dtype=torch.float64
    )


@functools.cache
def _fp4_table() -> Tensor:
    """uint8 [4 * 65536]: a packed byte for (class of block << 16 | two uniform bytes).

    Classes bound the block's largest value: 0, 3, 4, 6.
    """
    position = torch.arange(128, dtype=torch.float64)
    quantile = torch.tensor([_NORMAL.inv_cdf(0.5 + (float(p) + 0.5) / 256) for p in position]) * _FP4_STD
    grid = torch.tensor(FP4_GRID)
    magnitude = (quantile[:, None] - grid).abs().argmin(1)
    uniform = torch.arange(256)
    codes = []
    for largest in (0, 5, 6, 7):
        codes.append(magnitude[uniform & 127].clamp(max=largest) | (uniform >> 7) << 3)
    codes[0] = torch.zeros(256, dtype=torch.int64)
    pairs = torch.arange(65536)
    packed = [code[pairs & 255] | code[pairs >> 8] << 4 for code in codes]
    return torch.cat(packed).to(torch.uint8)


@functools.cache
def _fp8_table() -> Tensor:
    """uint8 [65536]: an E4M3 code for a 16-bit number: normal, and one in 128 a subnormal."""
    return _e4m3_codes(_normal_table() * _FP8_STD)


@functools.cache
def _row_table() -> Tensor:
    """uint8 [4 * 65536]: an E4M3 code for (class of block << 16 | 16-bit number), for blocks as small as a table's.

    Classes: zeros; at most 224; values beyond 432 mirrored at it, so that few blocks reach 448; at most 448.
    """
    draws = _normal_table() * _TABLE_STD
    mirrored = torch.where(draws.abs() > 432, draws.sign() * 864 - draws, draws)
    return torch.cat(
        [
            torch.zeros(65536, dtype=torch.uint8),
            *(_e4m3_codes(values) for values in (draws.clamp(-224, 224), mirrored, draws)),
        ]
    )


def _e4m3_codes(draws: Tensor) -> Tensor:
    """uint8 [65536]: the nearest E4M3 codes of 65536 numbers, with one in 128 replaced by a subnormal."""
    values = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    code = torch.bucketize(draws.abs(), (values[1:] + values[:-1]) / 2).clamp(max=0x7E)
    number = torch.arange(65536)
    code = torch.where(number % 128 == 0, number // 128 % 8, code)
    return (code | torch.where(draws < 0, 0x80, 0)).to(torch.uint8)


# Classes of FP4 blocks for a uniform byte: 1 of 256 is all zero, 28 are bounded by 3, 150 by 4, 77 by 6.  An eighth of
# the larger ones stays at 3 by chance, so that 22 % of all blocks do, as the released rule makes them.
_BLOCK_CLASSES = (0,) * 1 + (1,) * 28 + (2,) * 150 + (3,) * 77
# The same for table rows: DeepSeek's rule leaves log2(232 / 224) = 5 % of all blocks at 224 and as many at 448.
_ROW_CLASSES = (0,) * 1 + (1,) * 10 + (2,) * 140 + (3,) * 105


def _uniform(generator: torch.Generator, count: int) -> Tensor:
    """uint8 [count] from the whole 64-bit range of the generator."""
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return words.view(torch.uint8)[:count]


def _looked_up(table: Tensor, generator: torch.Generator, count: int) -> Tensor:
    number = _uniform(generator, 2 * count).view(torch.uint16).to(torch.int32)
    return torch.index_select(table, 0, number)


def _fp4_codes(generator: torch.Generator, count: int) -> Tensor:
    number = _uniform(generator, 2 * count).view(torch.uint16).to(torch.int32)
    chosen = torch.tensor(_BLOCK_CLASSES, dtype=torch.int32)[
        _uniform(generator, -(-count // 16)).to(torch.int32)
    ]
    number += (chosen << 16).repeat_interleave(16)[:count]
    return torch.index_select(_fp4_table(), 0, number)


def _row_codes(generator: torch.Generator, count: int) -> Tensor:
    number = _uniform(generator, 2 * count).view(torch.uint16).to(torch.int32)
    cols = formats.FP8_ROW_32.block.cols  # divides the widths of all tables, and the pieces
    chosen = torch.tensor(_ROW_CLASSES, dtype=torch.int32)[_uniform(generator, count // cols).to(torch.int32)]
    number.view(-1, cols).add_(chosen[:, None] << 16)
    return torch.index_select(_row_table(), 0, number)


def _scales(stored: Stored, generator: torch.Generator, count: int) -> Tensor:
    """Exponents around the one that gives values of variance 1 / fan-in; three neighbours of it occur."""
    assert stored.scale_of is not None
    fan_in = stored.parts[0].logical.shape[-1]
    fp8_std = _TABLE_STD if _is_table(stored) else _FP8_STD
    std = _FP4_STD if stored.scale_of.codes_per_element == 2 else fp8_std
    exponent = round(math.log2(fan_in**-0.5 / std))
    jitter = torch.tensor([-1, 0, 0, 1], dtype=torch.int32)[_uniform(generator, count).to(torch.int32) & 3]
    if stored.dtype == "F32":
        return torch.ldexp(torch.ones(count), jitter + exponent)
    return (jitter + exponent + formats.E8M0_BIAS).to(torch.uint8)


def _is_table(stored: Stored) -> bool:
    return bool(stored.parts) and stored.parts[0].logical.kind is Kind.TABLE


def _spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a plain tensor, such that activations stay near 1."""
    if name.endswith(("norm.weight", "q_weight", "k_weight")) or ".norm" in name:
        return 1.0, 0.1
    if name.endswith("_scale"):
        return 1.0, 0.25
    if name.endswith((".bias", ".bias_vl")):
        return 0.0, 0.05
    if name.endswith(("embed.weight", "tok_emb.weight", "markov_w1.weight", "attn_sink")) or len(shape) == 1:
        return 0.0, 1.0
    if name.endswith("ape") or name.startswith("image_"):
        return 0.0, 0.5
    return 0.0, float(shape[-1] ** -0.5)


def _maker(
    stored: Stored, config: configs.ModelConfig
) -> tuple[int, Callable[[torch.Generator, int], Tensor]]:
    """(bytes per element, function that draws the next elements) for one tensor."""
    if stored.scale_of is not None:
        return formats.DTYPE_BITS[stored.dtype] // 8, functools.partial(_scales, stored)
    if stored.dtype == "I8":
        return 1, _fp4_codes
    if stored.dtype == "F8_E4M3" and _is_table(stored):
        return 1, _row_codes
    if stored.dtype == "F8_E4M3":
        return 1, functools.partial(_looked_up, _fp8_table())
    if stored.parts and stored.parts[0].logical.kind is Kind.I64:
        return 8, functools.partial(_expert_ids, config)
    mean, std = _spread(stored.name, stored.shape)
    values = _normal_table() * std + mean
    if stored.dtype == "BF16":
        return 2, functools.partial(_looked_up, codec.bf16_bits(values).bits)
    return 4, functools.partial(_looked_up, values.to(torch.float32))


def _expert_ids(config: configs.ModelConfig, generator: torch.Generator, count: int) -> Tensor:
    """For every token as many different experts as it takes: a random start and a random small stride."""
    each, experts = config.experts_per_token, config.num_experts
    draws = _uniform(generator, 4 * (count // each)).view(torch.uint16).to(torch.int64).view(-1, 2)
    start, stride = draws[:, :1] % experts, 1 + draws[:, 1:] % max(1, (experts - 1) // each)
    return ((start + stride * torch.arange(each)) % experts).reshape(-1)


def _pieces(stored: Stored, config: configs.ModelConfig, seed: int) -> Iterator[Tensor]:
    """The bytes of one tensor, some at a time."""
    digest = hashlib.sha256(f"{seed} {stored.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    width, draw = _maker(stored, config)
    left = formats.num_elements(stored.shape)
    whole = 32 * config.experts_per_token  # pieces end between blocks, and between tokens
    while left:
        count = min(left, _PIECE_BYTES // width // whole * whole)
        yield draw(generator, count)
        left -= count


def write_sample(
    sample: Sample,
    path: str,
    on_bytes: Callable[[int], None] = lambda count: None,
    stop: StopFlag | None = None,
) -> None:
    """Write a sample, or continue one. raises NoSpace, ForeignOutput, Environment, Interrupted"""
    stop = stop or StopFlag()
    small = {
        CONFIG_NAME: strictjson.pretty(sample.document),
        INDEX_NAME: index_bytes((file.name, file.tensors) for file in sample.files),
        **tokenizer_files(),
        "generation_config.json": strictjson.pretty(
            {"bos_token_id": 0, "do_sample": True, "eos_token_id": 1, "temperature": 1.0, "top_p": 1.0}
        ),
        "inference/config.json": strictjson.pretty({"dtype": "fp8", "scale_fmt": "ue8m0"}),
        "LICENSE": b"MIT License\n\nRandom numbers; do with them what you like.\n",
    }
    key = hashlib.sha256(strictjson.canonical([repr(sample.options), sample.document])).hexdigest()
    smaller = "make room, choose another disk or a smaller sample"
    outdir.require_space(path, sample.total_bytes, what="sample", do=smaller)
    config = configs.read(sample.document)
    names = {file.name for file in sample.files} | set(small)
    with one_torch_thread(), outdir.open_outdir(path, key, names) as out:
        for file in sample.files:
            if file.name in out.finished:
                on_bytes(file.size)
                continue
            with out.new_file(file.name, file.size) as sink:
                sink.write(file.header)
                for stored in file.tensors:
                    for piece in _pieces(stored, config, sample.options.seed):
                        stop.check()
                        data = bytearray(piece.numel() * piece.element_size())
                        torch.frombuffer(data, dtype=piece.dtype).copy_(piece.reshape(-1))
                        sink.write(memoryview(data))
                        on_bytes(len(data))
        for name, content in small.items():
            out.publish_bytes(name, content)
        out.clean()
