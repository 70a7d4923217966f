"""Defects that other converters have had, one test each, named after the symptom.

The numbers are those of the list they were collected in; what concerns writing quantized formats is tested with it.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsv4ckpt import codec, encode, plan, release, run, sample, source, survey
from dsv4ckpt.errors import MissingScale, NotConform, NotLossless, OrphanScale
from dsv4ckpt.formats import Block, Storage, Target
from dsv4ckpt.names import Namespace
from dsv4ckpt.plan import ConvertOptions

Sample = Callable[[str], Path]
Convert = Callable[..., run.Summary]
Tree = Callable[[Path], dict[str, str]]


def everything(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def reshard(src: Path, dst: Path, shard_of: Callable[[str], str]) -> Path:
    """The same checkpoint with other shards, by safetensors' own writer."""
    shutil.copytree(src, dst, ignore=shutil.ignore_patterns("*.safetensors"))
    shards: dict[str, dict[str, torch.Tensor]] = {}
    weight_map = {}
    for name, value in everything(src).items():
        shards.setdefault(shard_of(name), {})[name] = value
        weight_map[name] = shard_of(name)
    for file, tensors in shards.items():
        save_file(tensors, dst / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (dst / "model.safetensors.index.json").write_text(json.dumps(index))
    return dst


def only_weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value.view(-1).view(torch.uint8) for name, value in everything(directory).items()}


@pytest.mark.slow
def test_1_packed_int8_experts_are_not_read_as_fp8(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    """miles: every one-byte tensor was taken for FP8, which corrupts the experts."""
    convert(sample_of("flash"), tmp_path / "out")
    name = "layers.3.ffn.experts.5.w1.weight"
    stored, made = everything(sample_of("flash"))[name], everything(tmp_path / "out")[name]
    assert stored.dtype == torch.int8
    assert made.shape == (stored.shape[0], 2 * stored.shape[1])
    blocks = made.float().view(made.shape[0], -1, 32)
    nonzero = blocks.abs().amax(-1) > 0
    scale = everything(sample_of("flash"))[name.replace("weight", "scale")].float()
    assert set((blocks / scale[..., None])[nonzero].abs().unique().tolist()) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}


@pytest.mark.slow
def test_2_v41_tiles_of_32_are_not_read_as_128(sample_of: Sample, convert: Convert, tmp_path: Path) -> None:
    """llama.cpp, vLLM Quark: a hard-coded 128 gives fluent garbage."""
    convert(sample_of("v4.1-flash"), tmp_path / "out")
    stored, made = everything(sample_of("v4.1-flash")), everything(tmp_path / "out")
    weight, scale = stored["layers.1.attn.wq_b.weight"], stored["layers.1.attn.wq_b.scale"]
    assert scale.shape == (weight.shape[0] // 32, weight.shape[1] // 32)
    assert scale.view(torch.uint8).unique().numel() > 1
    wide = scale.float().repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(made["layers.1.attn.wq_b.weight"].float(), weight.float() * wide)


def test_3_e8m0_bytes_are_exponents_not_numbers() -> None:
    """vLLM#43416: byte 120 became 120.0 and lost a factor of 1e40."""
    one = torch.tensor([[0x38]], dtype=torch.uint8)  # E4M3 1.0
    scale = torch.tensor([[120]], dtype=torch.uint8)
    assert codec.decode_fp8(one, scale, release.QUANTS[Storage.FP8]["dense"].block).values.item() == 2.0**-7


@pytest.mark.slow
def test_4_tid2eid_never_passes_through_a_float(sample_of: Sample, convert: Convert, tmp_path: Path) -> None:
    """MaxText cast the hash table to BF16: ids above 256 would be rounded."""
    src = tmp_path / "src"
    shutil.copytree(sample_of("flash"), src)
    file = src / "model-00002-of-00007.safetensors"
    tensors = load_file(file)
    odd = 2**53 + 1  # no float holds it
    tensors["layers.0.ffn.gate.tid2eid"][3, 2] = odd
    save_file(tensors, file)
    convert(src, tmp_path / "out", namespace=Namespace.TRANSFORMERS)
    made = everything(tmp_path / "out")["model.layers.0.mlp.gate.tid2eid"]
    assert made.dtype == torch.int64
    assert made[3, 2] == odd


@pytest.mark.slow
def test_5_f32_tensors_stay_f32(sample_of: Sample, convert: Convert, tmp_path: Path) -> None:
    """MaxText, GPTQModel: sinks, ape, hyper-connections and the router bias were rounded to BF16."""
    convert(sample_of("flash-0731"), tmp_path / "out")
    stored, made = everything(sample_of("flash-0731")), everything(tmp_path / "out")
    f32 = [name for name, value in stored.items() if value.dtype == torch.float32]
    assert len(f32) > 60
    for name in f32:
        assert made[name].dtype == torch.float32
        assert torch.equal(made[name], stored[name])


def test_9_e8m0_byte_0_is_2_to_the_minus_127_not_0() -> None:
    """NeMo Automodel decoded byte 0 as 0.0."""
    codes = torch.tensor([[0x22]], dtype=torch.uint8)  # 1.0, 1.0
    scale = torch.tensor([[0]], dtype=torch.uint8)
    values = codec.decode_fp4(codes, scale, release.FP4_EXPERT.block).values
    assert values.double().tolist() == [[2.0**-127, 2.0**-127]]


@pytest.mark.slow
def test_6_negative_zeros_survive_every_format(sample_of: Sample, convert: Convert, tmp_path: Path) -> None:
    """Six peers lose them: tables with +0.0 at code 8, `x < 0` for the sign, modelopt's NVFP4 export."""
    name = "layers.1.ffn.experts.0.w1.weight"
    codes = everything(sample_of("flash"))[name].view(torch.uint8)
    expected = int(((codes & 15) == 8).sum() + ((codes >> 4) == 8).sum())
    assert expected > 100
    for target in (Target.BF16, Target.FP8, Target.FP8_F32SCALE, Target.NVFP4, Target.MXFP4_CT):
        convert(sample_of("flash"), tmp_path / target, target=target)
        convert(tmp_path / target, tmp_path / f"{target}-bf16", target=Target.BF16)
        values = everything(tmp_path / f"{target}-bf16")[name]
        assert int(((values == 0) & values.signbit()).sum()) == expected, target


def test_7_ties_go_to_even() -> None:
    """Megatron-Bridge and modelopt round them toward zero."""
    values = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4], dtype=torch.bfloat16)
    scale = torch.full((1, 1), 127, dtype=torch.uint8)
    codes = encode.encode_fp4(values, scale, release.FP4_EXPERT.block)
    decoded = codec.decode_fp4(codes, scale, release.FP4_EXPERT.block).values
    assert decoded[0, :8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]


def test_8_an_all_zero_block_gets_a_scale_and_stays_zero() -> None:
    """miles writes NaN there, others a scale of their own; DeepSeek's quantizer byte 1 for FP4 and 105 for FP8."""
    zeros = torch.zeros((128, 128), dtype=torch.bfloat16)
    fp4, fp8 = release.FP4_EXPERT.block, Block(128, 128)
    assert encode.fp4_fresh_scale(zeros, fp4).unique().tolist() == [1]
    assert encode.fp4_grid_scale(zeros, fp4).unique().tolist() == [1]
    assert encode.fp8_fresh_scale(zeros, fp8).tolist() == [[105]]
    assert not encode.encode_fp4(zeros, encode.fp4_fresh_scale(zeros, fp4), fp4).any()


def test_10_a_gap_beyond_14_is_never_silent(sample_of: Sample, convert: Convert, tmp_path: Path) -> None:
    """vLLM and DeepSeek's own script call the recast lossless and do not look; tests/ckpt/test_across.py has it all."""
    reshard(sample_of("flash"), tmp_path / "src", lambda name: "model.safetensors")
    stored = load_file(tmp_path / "src" / "model.safetensors")
    stored["layers.0.ffn.experts.1.w2.scale"].view(torch.uint8)[:, 0] = 90
    stored["layers.0.ffn.experts.1.w2.weight"].view(torch.uint8)[:] |= 1
    save_file(stored, tmp_path / "src" / "model.safetensors")
    with pytest.raises(NotLossless, match=r"layers\.0\.ffn\.experts\.1\.w2\.weight"):
        convert(tmp_path / "src", tmp_path / "out", target=Target.FP8)


@pytest.mark.slow
@pytest.mark.parametrize("target", Target)
def test_11_index_has_the_right_total_and_shards_say_format_pt(
    target: Target, sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    """miles counted elements of the first dimension; DeepSeek's V3 script forgot the metadata that loaders look for."""
    convert(sample_of("flash"), tmp_path / "out", target=target)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in everything(tmp_path / "out").values())
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash", "flash-base", "v4.1-flash"])
def test_12_bf16_config_claims_no_quantization(
    name: str, sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    """miles copied config.json as it was: loaders then look for scales that are not there."""
    convert(sample_of(name), tmp_path / "out")
    before = json.loads((sample_of(name) / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quant" not in json.dumps(after)
    assert "expert_dtype" not in json.dumps(after)
    assert after["torch_dtype"] == "bfloat16"
    assert {key: before[key] for key in before if key in after} == after
    assert set(before) - set(after) <= {"quantization_config", "expert_dtype"}


FOREIGN = {
    Target.FP8: ("expert_dtype", "moe_quant_algo", "config_groups"),
    Target.FP8_F32SCALE: ("moe_quant_algo", "config_groups"),
    Target.NATIVE: ("moe_quant_algo", "config_groups"),
    Target.MXFP4_CT: ("expert_dtype", "moe_quant_algo", "weight_block_size", "scale_fmt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", FOREIGN)
def test_12_no_key_of_another_format_is_left_in_a_config(
    target: Target, sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    """modelopt's and the repackaged configs are edited by hand in the field, and keep what they had."""
    convert(sample_of("flash"), tmp_path / "nvfp4", target=Target.NVFP4)
    convert(tmp_path / "nvfp4", tmp_path / "out", target=target)
    text = (tmp_path / "out" / "config.json").read_text()
    assert not [key for key in FOREIGN[target] if f'"{key}"' in text]
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


@pytest.mark.slow
def test_14_renaming_back_is_no_regex_that_hits_a_substring(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    """transformers saved self_attn.kv_norm as attn.norm, which no loader knows."""
    convert(sample_of("flash"), tmp_path / "there", target=Target.BF16, namespace=Namespace.TRANSFORMERS)
    convert(tmp_path / "there", tmp_path / "back", target=Target.NATIVE)
    assert everything(tmp_path / "back").keys() == everything(sample_of("flash")).keys()


@pytest.mark.slow
def test_13_hc_scales_are_parameters_not_block_scales(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    """Substring rules took hc_attn_scale for the scale of some weight."""
    convert(sample_of("flash"), tmp_path / "out")
    made = everything(tmp_path / "out")
    for name in ("hc_head_scale", "layers.0.hc_attn_scale", "layers.3.hc_ffn_scale", "mtp.0.hc_head_scale"):
        assert torch.equal(made[name], everything(sample_of("flash"))[name])
    assert not [name for name in made if name.endswith(".scale")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash", "flash-base", "flash-0731", "vision-exp", "v4.1-flash"])
def test_15_mtp_of_every_kind_is_kept(name: str, sample_of: Sample, convert: Convert, tmp_path: Path) -> None:
    """transformers, VeOmni and others drop mtp.* or start it at random."""
    convert(sample_of(name), tmp_path / "out")
    wanted = {
        key for key in everything(sample_of(name)) if key.startswith("mtp.") and not key.endswith(".scale")
    }
    assert len(wanted) > 40
    assert wanted == {key for key in everything(tmp_path / "out") if key.startswith("mtp.")}


@pytest.mark.slow
def test_16_a_shard_that_holds_only_scales_is_fine(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    """compressed-tensors raised ValueError."""

    def shard_of(name: str) -> str:
        return "scales.safetensors" if name.endswith(".scale") else "weights.safetensors"

    convert(sample_of("flash"), tmp_path / "usual")
    convert(reshard(sample_of("flash"), tmp_path / "src", shard_of), tmp_path / "out")
    usual, other = only_weights(tmp_path / "usual"), only_weights(tmp_path / "out")
    assert usual.keys() == other.keys()
    assert all(torch.equal(usual[name], other[name]) for name in usual)


@pytest.mark.slow
def test_17_weight_and_scale_in_different_shards_are_joined(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    """Converters that look for the scale in the weight's own shard fail or drop it."""

    def shard_of(name: str) -> str:
        return f"part-{sum(map(ord, name)) % 5}.safetensors"

    for kind in ("flash", "flash-base"):
        convert(sample_of(kind), tmp_path / f"usual-{kind}", namespace=Namespace.TRANSFORMERS)
        src = reshard(sample_of(kind), tmp_path / f"src-{kind}", shard_of)
        convert(src, tmp_path / f"out-{kind}", namespace=Namespace.TRANSFORMERS)
        usual, other = only_weights(tmp_path / f"usual-{kind}"), only_weights(tmp_path / f"out-{kind}")
        assert all(torch.equal(usual[name], other[name]) for name in usual)


@pytest.mark.slow
def test_18_a_name_with_weight_in_the_middle_finds_its_own_row(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    """name.replace(".weight", ...) hits `weights_proj.weight` twice."""
    convert(sample_of("flash"), tmp_path / "out", namespace=Namespace.TRANSFORMERS)
    made = everything(tmp_path / "out")[
        "model.layers.2.self_attn.compressor.indexer.scorer.weights_proj.weight"
    ]
    assert torch.equal(made, everything(sample_of("flash"))["layers.2.attn.indexer.weights_proj.weight"])


@pytest.mark.slow
def test_19_a_tensor_too_many_or_too_few_is_an_error(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    """Non-strict loads hide misses; mlx-vlm dropped five tensors and always answered with one token."""
    victims = {
        "norm.weight": NotConform,
        "hc_head_fn": NotConform,
        "layers.1.attn.wq_a.scale": MissingScale,
        "layers.1.ffn.experts.7.w3.weight": OrphanScale,
    }
    for number, (name, error) in enumerate(victims.items()):
        src = tmp_path / f"src{number}"
        tensors = everything(sample_of("flash"))
        shutil.copytree(
            sample_of("flash"), src, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json")
        )
        del tensors[name]
        save_file(tensors, src / "model.safetensors")
        with pytest.raises(error) as caught:
            convert(src, tmp_path / "out")
        assert name in str(caught.value)
        assert not (tmp_path / "out").exists()
    src = tmp_path / "more"
    shutil.copytree(sample_of("flash"), src, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file(
        everything(sample_of("flash")) | {"layers.0.attn.extra": torch.zeros(1)}, src / "model.safetensors"
    )
    with pytest.raises(NotConform, match=r"layers\.0\.attn\.extra"):
        convert(src, tmp_path / "out")


@pytest.mark.slow
def test_19_an_unscaled_fp8_weight_is_accepted_only_by_name(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    """miles#1640: raw codes were written where the scale was missing."""
    src, name = tmp_path / "src", "mtp.0.e_proj.weight"
    tensors = everything(sample_of("flash"))
    shutil.copytree(sample_of("flash"), src, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    del tensors["mtp.0.e_proj.scale"]
    save_file(tensors, src / "model.safetensors")
    with pytest.raises(MissingScale, match=r"--unit-scale mtp\.0\.e_proj\.weight"):
        convert(src, tmp_path / "out")
    convert(src, tmp_path / "out", unit_scales=frozenset({name}))
    assert torch.equal(everything(tmp_path / "out")[name].float(), tensors[name].float())


@pytest.mark.slow
def test_20_giant_tensors_pass_in_pieces(tmp_path: Path) -> None:
    """An Engram table of 91 GiB was materialised in F32 and the run was killed.

    A table larger than the bound goes through; the process may hold only slabs and chunks of it.
    """
    options = sample.SampleOptions(release="v4.1-flash", layers=2, experts=6)
    made = sample.plan_sample(options)
    made.document["text_config"]["engram_num_embeddings"] = [1_500_000]
    family = release.RELEASES["v4.1-flash"]
    layout = sample._layout(made.document, family)
    files = [
        sample.SampleFile(file.name, tuple(layout.stored.get(t.name, t) for t in file.tensors))
        for file in made.files
    ]
    sample.write_sample(sample.Sample(options, made.document, layout, tuple(files)), str(tmp_path / "src"))
    checkpoint = source.open_checkpoint(str(tmp_path / "src"))
    todo = plan.make_plan(survey.survey(checkpoint), ConvertOptions())
    table = next(t for f in todo.files for t in f.tensors if t.name == "layers.1.engram.embed.weight")
    assert table.shape == (1_500_000, 128)
    peak, running = [0], threading.Event()

    def watch() -> None:
        while not running.wait(0.002):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak[0] = max(peak[0], int(line.split()[1]) * 1024)

    watcher = threading.Thread(target=watch)
    run.execute(todo, checkpoint, str(tmp_path / "warm"), num_workers=2)  # tables built, buffers grown
    shutil.rmtree(tmp_path / "warm")
    watcher.start()
    before = int(next(
        line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
    )) * 1024  # fmt: skip
    run.execute(todo, checkpoint, str(tmp_path / "out"), num_workers=2)
    running.set()
    watcher.join()
    assert 2 * 1_500_000 * 128 == 384_000_000, "the table as BF16"
    assert peak[0] - before < 150_000_000


@pytest.mark.slow
def test_21_config_without_num_hash_layers_and_with_nested_text_config(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    """V4.1 nests its text config and has no num_hash_layers; loaders failed before the first tensor."""
    document = json.loads((sample_of("v4.1-flash") / "config.json").read_text())
    assert "num_hash_layers" not in json.dumps(document)
    assert "num_hidden_layers" in document["text_config"]
    convert(sample_of("v4.1-flash"), tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["text_config"] == document["text_config"]
    assert after["vision_config"] == document["vision_config"]


@pytest.mark.slow
def test_22_a_torn_file_is_not_taken_for_complete(
    sample_of: Sample, convert: Convert, tree_of: Tree, tmp_path: Path
) -> None:
    """Resuming by existence or size takes what a crash left behind for finished work."""
    convert(sample_of("flash"), tmp_path / "whole")
    checkpoint = source.open_checkpoint(str(sample_of("flash")))
    todo = plan.make_plan(survey.survey(checkpoint), ConvertOptions())
    stop = run.StopFlag()
    done: list[str] = []

    def halt(event: run.Event) -> None:
        if isinstance(event, run.FileDone):
            done.append(event.receipt.name)
            stop.signal_number = 15 if len(done) == 3 else 0

    with pytest.raises(Exception, match="stopped by a signal"):
        run.execute(todo, checkpoint, str(tmp_path / "out"), num_workers=1, on_event=halt, stop=stop)
    victim = tmp_path / "out" / done[1]
    victim.write_bytes(victim.read_bytes()[:-100])  # torn, as by a crash without fsync
    (tmp_path / "out" / ".dsv4" / f"{todo.files[5].name}.00000000.1.abcd.part").write_bytes(b"half a file")
    summary = convert(sample_of("flash"), tmp_path / "out")
    assert summary.num_resumed == 2
    whole, out = tree_of(tmp_path / "whole"), tree_of(tmp_path / "out")
    assert {name: sha for name, sha in out.items() if not name.startswith(".dsv4")} == whole
