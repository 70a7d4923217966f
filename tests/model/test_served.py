"""What `dsv4 export` leaves is what its readers look for: by keys of config.json, names, dtypes and shapes.

transformers is asked itself.  vLLM and SGLang are not installed: what their loaders look for is written down below,
with the file that says so.  The names are built here, layer by layer, from the config.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from dsv4ckpt import run
from dsv4ckpt.stop import StopFlag
from dsv4model.exporting import planned
from dsv4model.recipe import read_recipe
from dsv4model.runs import RunDirectory
from dsv4model.trained import checkpoint_at
from dsv4model.trainer import Trainer, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.slow,
]

Exported = Callable[[str], Path]
Rows = Iterator[tuple[str, str, tuple[int, ...]]]  # name, dtype, shape
FORMATS = ("native", "fp8", "fp8-f32scale", "bf16")


@pytest.fixture(scope="module")
def exported(made: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """exported("fp8"): a run in which every weight but the router's and the indexers' learned, made once."""
    base, known = tmp_path_factory.mktemp("served"), dict[str, Path]()
    data = base / "tokens.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [10 + (seed + at) % 50 for at in range(140)]}) + "\n"
                            for seed in range(2)))  # fmt: skip
    text = f"""
        [model]\nsource = "{made("flash")}"
        [train]\nrun = "{base / "run"}"\nsteps = 1\nrows = 2\nmicro_rows = 2
        [data]\nfiles = ["{data}"]\nkind = "tokens"\nlength = 160
        [optimizer]\nlr = 0.05\nclip = 0
    """
    train(Trainer(read_recipe(text.encode())), StopFlag())

    def directory(to: str) -> Path:
        if to not in known:
            ended, known[to] = RunDirectory(str(base / "run")), base / to
            with planned(ended, checkpoint_at(ended, None), to=to, allow_lossy=True) as (made, shown):
                run.execute(made, shown, str(known[to]), num_workers=1, accept_changes=True)
        return known[to]

    return directory


def config_of(directory: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((directory / "config.json").read_bytes())
    return document


def tensors_of(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape, as headers have them."""
    found = {}
    for shard in directory.glob("*.safetensors"):
        for name, tensor in tiny.read_shard(shard, with_data=False).items():
            found[name] = (tensor.dtype, tuple(tensor.shape))
    return found


# ---- transformers

# Keys of a released config that DeepseekV4Config has under other names: what it makes of them.
FOLDED: dict[str, Callable[[dict[str, Any], Any], bool]] = {
    "compress_ratios": lambda made, read: read.layer_types == [
        {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}[ratio]
        for ratio in made["compress_ratios"][: made["num_hidden_layers"]]
    ],
    "num_hash_layers": lambda made, read: read.mlp_layer_types.count("hash_moe") == made["num_hash_layers"],
    "qk_rope_head_dim": lambda made, read: read.partial_rotary_factor == made["qk_rope_head_dim"] / made["head_dim"],
    "rope_scaling": lambda made, read: all(
        read.rope_parameters["compress"][{"type": "rope_type"}.get(key, key)] == value
        for key, value in made["rope_scaling"].items()
    ),
    "torch_dtype": lambda made, read: read.dtype == getattr(torch, made["torch_dtype"]),
    "quantization_config": lambda made, read: read.quantization_config
    == {**read.quantization_config, **made["quantization_config"]},
    "transformers_version": lambda made, read: True,  # of whoever reads
}  # fmt: skip
UNTYPED = {"expert_dtype", "model_type", "topk_method"}  # kept all the same, checked by nobody


@pytest.mark.parametrize("to", FORMATS)
def test_transformers_config_class_keeps_every_key_of_an_exported_config(to: str, exported: Exported) -> None:
    from transformers import AutoConfig, DeepseekV4Config

    made = config_of(exported(to))
    read = AutoConfig.from_pretrained(exported(to))
    assert type(read) is DeepseekV4Config  # a strict dataclass: a value of another type would have raised
    for key, value in made.items():
        if key in FOLDED:
            assert FOLDED[key](made, read), key
        else:
            assert getattr(read, key) == value, key
    declared = {field.name for field in dataclasses.fields(DeepseekV4Config)}
    assert made.keys() - declared - FOLDED.keys() <= UNTYPED


@pytest.mark.parametrize("to", FORMATS)
def test_transformers_model_takes_every_tensor_of_an_export_and_lacks_none(
    to: str, exported: Exported
) -> None:
    """MTP is no part of that model, and its class says so: mtp.* are the only names that it leaves."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    more = {} if to == "bf16" else {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    model, told = AutoModelForCausalLM.from_pretrained(
        exported(to), dtype=torch.bfloat16, output_loading_info=True, **more
    )
    assert not any(told.values()), told
    with torch.no_grad():
        assert bool(model(input_ids=torch.arange(5, 145)[None]).logits.isfinite().all())
    if to == "bf16":  # under the model's own names, so that nothing was renamed on the way
        stored = {name for name in tensors_of(exported(to)) if not name.startswith("mtp.")}
        assert stored == model.state_dict().keys()


# ---- vLLM and SGLang

# vLLM    vllm/models/deepseek_v4/quant_config.py (DeepseekV4FP8Config), nvidia/model.py (weights mapper, load_weights),
#         nvidia/mtp.py (load_weights)
# SGLang  python/sglang/srt/configs/deepseek_v4.py (try_detect_fp4_experts), models/deepseek_v4.py (load_weights)
#
# Both take the released names. vLLM goes by expert_dtype, which is "fp4" if it is not there: then experts' scales are
# bytes of E8M0 and so are those of linear layers; with "fp8" all are float32, and E8M0 of experts would be taken for
# numbers. SGLang looks at the dtype of an expert's weight, and reads E8M0 and float32 alike.
#         format          expert_dtype  experts: weight, scale   linear: weight, scale     who reads it
READERS = {
    "native":       ("fp4", "I8", "F8_E8M0", "F8_E4M3", "F8_E8M0"),  # both
    "fp8":          (None, "F8_E4M3", "F8_E8M0", "F8_E4M3", "F8_E8M0"),  # SGLang
    "fp8-f32scale": ("fp8", "F8_E4M3", "F32", "F8_E4M3", "F32"),  # vLLM
}  # fmt: skip
QUANTIZED = {
    "quant_method": "fp8",  # with model_type it picks vLLM's deepseek_v4_fp8
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


def expected_tensors(c: dict[str, Any], to: str) -> Rows:
    """Every name that the loaders look for in a checkpoint of this config, with dtype and shape."""
    _, expert, expert_scale, linear, linear_scale = READERS[to]
    hidden, heads, width, inner = (
        c["hidden_size"], c["num_attention_heads"], c["head_dim"], c["moe_intermediate_size"]
    )  # fmt: skip
    mixes = (2 + c["hc_mult"]) * c["hc_mult"]

    def matrix(name: str, rows: int, cols: int) -> Rows:
        yield f"{name}.weight", linear, (rows, cols)
        yield f"{name}.scale", linear_scale, (math.ceil(rows / 128), math.ceil(cols / 128))

    def routed(name: str, rows: int, cols: int) -> Rows:
        yield f"{name}.weight", expert, (rows, cols // 2 if expert == "I8" else cols)
        tile = (rows, cols // 32) if expert == "I8" else (math.ceil(rows / 128), math.ceil(cols / 128))
        yield f"{name}.scale", expert_scale, tile

    def compressor(name: str, ratio: int, size: int) -> Rows:
        size_of_both = size * (2 if ratio == 4 else 1)  # overlapping windows
        yield f"{name}.ape", "F32", (ratio, size_of_both)
        yield f"{name}.norm.weight", "BF16", (size,)
        yield f"{name}.wkv.weight", "BF16", (size_of_both, hidden)
        yield f"{name}.wgate.weight", "BF16", (size_of_both, hidden)

    def layer(at: str, ratio: int, *, hashes: bool) -> Rows:
        yield f"{at}.attn_norm.weight", "BF16", (hidden,)
        yield f"{at}.ffn_norm.weight", "BF16", (hidden,)
        for part in ("attn", "ffn"):
            yield f"{at}.hc_{part}_fn", "F32", (mixes, c["hc_mult"] * hidden)
            yield f"{at}.hc_{part}_base", "F32", (mixes,)
            yield f"{at}.hc_{part}_scale", "F32", (3,)
        yield f"{at}.attn.attn_sink", "F32", (heads,)
        yield f"{at}.attn.q_norm.weight", "BF16", (c["q_lora_rank"],)
        yield f"{at}.attn.kv_norm.weight", "BF16", (width,)
        yield from matrix(f"{at}.attn.wq_a", c["q_lora_rank"], hidden)
        yield from matrix(f"{at}.attn.wq_b", heads * width, c["q_lora_rank"])
        yield from matrix(f"{at}.attn.wkv", width, hidden)
        yield from matrix(f"{at}.attn.wo_a", c["o_groups"] * c["o_lora_rank"], heads * width // c["o_groups"])
        yield from matrix(f"{at}.attn.wo_b", hidden, c["o_groups"] * c["o_lora_rank"])
        if ratio:
            yield from compressor(f"{at}.attn.compressor", ratio, width)
        if ratio == 4:
            yield from matrix(
                f"{at}.attn.indexer.wq_b", c["index_n_heads"] * c["index_head_dim"], c["q_lora_rank"]
            )
            yield f"{at}.attn.indexer.weights_proj.weight", "BF16", (c["index_n_heads"], hidden)
            yield from compressor(f"{at}.attn.indexer.compressor", ratio, c["index_head_dim"])
        yield f"{at}.ffn.gate.weight", "BF16", (c["n_routed_experts"], hidden)
        if hashes:
            yield f"{at}.ffn.gate.tid2eid", "I64", (c["vocab_size"], c["num_experts_per_tok"])
        else:
            yield f"{at}.ffn.gate.bias", "F32", (c["n_routed_experts"],)
        for matrices, owner in (
            (matrix, f"{at}.ffn.shared_experts"),
            *((routed, f"{at}.ffn.experts.{number}") for number in range(c["n_routed_experts"])),
        ):
            yield from matrices(f"{owner}.w1", inner, hidden)
            yield from matrices(f"{owner}.w2", hidden, inner)
            yield from matrices(f"{owner}.w3", inner, hidden)

    def head(at: str) -> Rows:
        yield f"{at}norm.weight", "BF16", (hidden,)
        yield f"{at}hc_head_fn", "F32", (c["hc_mult"], c["hc_mult"] * hidden)
        yield f"{at}hc_head_base", "F32", (c["hc_mult"],)
        yield f"{at}hc_head_scale", "F32", (1,)

    yield "embed.weight", "BF16", (c["vocab_size"], hidden)
    yield "head.weight", "BF16", (c["vocab_size"], hidden)
    yield from head("")
    for number, ratio in enumerate(c["compress_ratios"][: c["num_hidden_layers"]]):
        yield from layer(f"layers.{number}", ratio, hashes=number < c["num_hash_layers"])
    for number in range(c["num_nextn_predict_layers"]):
        at = f"mtp.{number}"
        yield from layer(at, 0, hashes=False)
        yield from head(f"{at}.")
        for name in ("e_proj", "h_proj"):
            yield from matrix(f"{at}.{name}", hidden, hidden)
        for name in ("enorm", "hnorm"):
            yield f"{at}.{name}.weight", "BF16", (hidden,)


@pytest.mark.parametrize("to", READERS)
def test_vllm_and_sglang_find_every_tensor_by_its_name_dtype_and_shape(to: str, exported: Exported) -> None:
    config = config_of(exported(to))
    wanted = {name: (dtype, shape) for name, dtype, shape in expected_tensors(config, to)}
    assert tensors_of(exported(to)) == wanted
    index = json.loads((exported(to) / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"].keys() == wanted.keys()
    assert all((exported(to) / name).is_file() for name in index["weight_map"].values())


@pytest.mark.parametrize("to", READERS)
def test_vllm_and_sglang_are_told_what_the_experts_are(to: str, exported: Exported) -> None:
    config = config_of(exported(to))
    assert config["architectures"] == ["DeepseekV4ForCausalLM"] and config["model_type"] == "deepseek_v4"
    assert config["quantization_config"] == QUANTIZED
    assert config.get("expert_dtype") == READERS[to][0]
    if to != "fp8":  # vLLM: "fp4" means E8M0 everywhere, "fp8" float32
        is_e8m0 = config["expert_dtype"] == "fp4"
        scales = {entry for name, (entry, _) in tensors_of(exported(to)).items() if name.endswith(".scale")}
        assert scales == {"F8_E8M0" if is_e8m0 else "F32"}
