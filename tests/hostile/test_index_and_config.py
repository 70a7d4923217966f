"""Hostile index and config files: rules I1-I6 and C1-C3, through the functions that every command starts with.

Each case breaks one copy of the flash sample. `refusals` says what is asked of a refusal; here it comes from everything
that happens before the first byte is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import refusals
import tiny
from tiny import CONFIG, EMBED, FIRST_LAYER, INDEX, Tensor

from dsv4ckpt import formats, release, source
from dsv4ckpt.errors import (
    BadConfig,
    BadIndex,
    Dsv4Error,
    MissingFile,
    NotConform,
    UnknownRelease,
    UnsafePath,
)

Edit = Callable[[Path], object]
NORM = "layers.0.attn_norm.weight"


def conform(directory: Path) -> None:
    tiny.survey_of(directory).require_conform()


def refusal(directory: Path, kinds: refusals.Kinds) -> Dsv4Error:
    """The refusal of a checkpoint by everything before the first byte is written; nothing else may be raised."""

    def work() -> None:
        conform(directory)
        tiny.plan_of(directory)

    with tiny.at_most(20):
        return refusals.refusal(work, kinds, directory)


# ---- the index


def index_is(data: bytes | str) -> Edit:
    return lambda directory: tiny.replace(directory / INDEX, data)


def index_of(edit: Callable[[dict[str, Any]], object]) -> Edit:
    return lambda directory: tiny.edit_json(directory / INDEX, edit)


def weight_map(edit: Callable[[dict[str, Any]], object]) -> Edit:
    return lambda directory: tiny.edit_weight_map(directory, edit)


def mapped_to(name: object) -> Edit:
    """The index puts one tensor into this file."""
    return weight_map(lambda names: names.update({NORM: name}))


def shard_twice(directory: Path) -> None:
    """Another split's shard, in the index, holds a tensor that another shard holds too."""
    tensors = tiny.read_shard(directory / FIRST_LAYER)
    tiny.write_shard(directory / "extra.safetensors", {NORM: tensors[NORM], "x": Tensor("U8", (1,), b"x")})
    tiny.edit_weight_map(directory, lambda names: names.update({"x": "extra.safetensors"}))


def index_filled(before: str, unit: str, after: str) -> Edit:
    """An index as large as may be that repeats one piece of text."""

    def edit(directory: Path) -> None:
        count = (formats.MAX_INDEX_BYTES - len(before + after)) // len(unit)
        tiny.replace(directory / INDEX, before + unit * count + after)

    return edit


def without_index(directory: Path) -> None:
    (directory / INDEX).unlink()


def index_text(directory: Path) -> str:
    return (directory / INDEX).read_text()


BAD_INDEX: dict[str, tuple[Edit, type[Dsv4Error]]] = {
    "I1 empty file": (index_is(""), BadIndex),
    "I1 not JSON": (index_is("weight_map"), BadIndex),
    "I1 array": (index_is("[]"), BadIndex),
    "I1 string": (index_is('"weight_map"'), BadIndex),
    "I1 null": (index_is("null"), BadIndex),
    "I1 empty object": (index_is("{}"), BadIndex),
    "I1 byte order mark": (lambda d: tiny.replace(d / INDEX, "\ufeff" + index_text(d)), BadIndex),
    "I1 UTF-16": (lambda d: tiny.replace(d / INDEX, index_text(d).encode("utf-16")), BadIndex),
    "I1 not UTF-8": (lambda d: tiny.replace(d / INDEX, index_text(d).encode() + b"\xff"), BadIndex),
    "I1 truncated": (lambda d: tiny.replace(d / INDEX, index_text(d)[:-3]), BadIndex),
    "I1 trailing text": (lambda d: tiny.replace(d / INDEX, index_text(d) + "x"), BadIndex),
    "I1 trailing NUL": (lambda d: tiny.replace(d / INDEX, index_text(d) + "\0"), BadIndex),
    "I1 NaN": (index_of(lambda document: document["metadata"].update(total_size=float("nan"))), BadIndex),
    "I1 Infinity": (index_of(lambda document: document["metadata"].update(total_size=float("inf"))), BadIndex),
    "I1 number of 5,000 digits": (index_is('{"metadata":{"total_size":' + "9" * 5000 + '},"weight_map":{}}'), BadIndex),
    "I1 deep": (index_is("[" * 100_000), BadIndex),
    "I1 weight_map twice": (
        lambda d: tiny.replace(d / INDEX, index_text(d).rstrip()[:-1] + ',"weight_map":{}}'), BadIndex
    ),
    "I1 tensor twice": (
        lambda d: tiny.replace(d / INDEX, index_text(d).replace(f'"{NORM}":', f'"{NORM}":"{EMBED}","{NORM}":')),
        BadIndex,
    ),
    "I1 no weight_map": (index_of(lambda document: document.pop("weight_map")), BadIndex),
    "I1 weight_map empty": (weight_map(dict.clear), BadIndex),
    "I1 weight_map list": (index_of(lambda document: document.update(weight_map=list(document))), BadIndex),
    "I1 weight_map null": (index_of(lambda document: document.update(weight_map=None)), BadIndex),
    "I1 weight_map string": (index_of(lambda document: document.update(weight_map=EMBED)), BadIndex),
    "I1 too large": (lambda d: tiny.replace(d / INDEX, " " * formats.MAX_INDEX_BYTES + index_text(d)), BadIndex),
    "I1 metadata key twice": (
        lambda d: tiny.replace(d / INDEX, '{"x":{"a":1,"a":1},' + index_text(d).lstrip()[1:]), BadIndex
    ),
    "I1 single quotes": (lambda d: tiny.replace(d / INDEX, index_text(d).replace('"', "'")), BadIndex),
    "I1 trailing comma": (lambda d: tiny.replace(d / INDEX, index_text(d).rstrip()[:-1] + ",}"), BadIndex),
    "I1 second document": (lambda d: tiny.replace(d / INDEX, index_text(d) + "{}"), BadIndex),
    "I1 float overflow": (lambda d: tiny.replace(d / INDEX, '{"metadata":{"x":1e999},' + index_text(d)[1:]), BadIndex),
    "I1 lone surrogate as a tensor": (weight_map(lambda names: names.update({"\ud800": EMBED})), BadIndex),
    "I1 pickle": (index_is(b"\x80\x04K\x01."), BadIndex),
    "I1 deep within": (
        lambda d: tiny.replace(d / INDEX, '{"x":' + nested(100_000) + "," + index_text(d)[1:]), BadIndex
    ),
    "I1 30 MiB of zeros": (lambda d: sparse(d / INDEX, formats.MAX_INDEX_BYTES), BadIndex),
    "I1 10 GB, sparse": (lambda d: sparse(d / INDEX, 10**10), BadIndex),
    "I1 30 MiB of blanks": (index_filled('{"weight_map":{}', " ", "}"), BadIndex),
    "I1 30 MiB of escapes": (index_filled('{"weight_map":"', "\\u0061", '"}'), BadIndex),
    "I1 30 MiB of pairs": (index_filled('{"weight_map":"', "\\ud83d\\ude00", '"}'), BadIndex),
    "I1 30 MiB of one string": (index_filled('{"weight_map":"', "x", '"}'), BadIndex),
    "I1 30 MiB of open lists": (index_filled('{"weight_map":', "[", "}"), BadIndex),
    "I1 30 MiB of quotes": (index_filled("{", '"', "}"), BadIndex),
    "I1 30 MiB of lists": (index_filled('{"weight_map":[', "[],", "[]]}"), BadIndex),
    "I1 30 MiB of objects": (index_filled('{"weight_map":[', "{},", "{}]}"), BadIndex),
    "I1 30 MiB of empty tensors": (index_filled('{"weight_map":{', '"":"",', '"a":""}}'), BadIndex),
    "I1 30 MiB of numbers": (index_filled('{"weight_map":[', "1,", "1]}"), BadIndex),
    "I1 30 MiB of long numbers": (index_filled('{"weight_map":[', "9" * 4000 + ",", "1]}"), BadIndex),
    "I2 traversal": (mapped_to("../model.safetensors"), UnsafePath),
    "I2 long traversal": (mapped_to("../" * 12 + "etc/passwd"), UnsafePath),
    "I2 traversal within": (mapped_to("x/../" + EMBED), UnsafePath),
    "I2 subdirectory": (mapped_to("inference/" + EMBED), UnsafePath),
    "I2 dot and slash": (mapped_to("./" + EMBED), UnsafePath),
    "I2 absolute": (mapped_to("/etc/passwd"), UnsafePath),
    "I2 absolute with the ending": (mapped_to("/tmp/model.safetensors"), UnsafePath),
    "I2 dot dot": (mapped_to(".."), UnsafePath),
    "I2 dot": (mapped_to("."), UnsafePath),
    "I2 empty": (mapped_to(""), UnsafePath),
    "I2 backslash": (mapped_to("..\\model.safetensors"), UnsafePath),
    "I2 drive": (mapped_to("C:model.safetensors"), UnsafePath),
    "I2 NUL": (mapped_to(EMBED + "\0.safetensors"), UnsafePath),
    "I2 newline after": (mapped_to(EMBED + "\n"), UnsafePath),
    "I2 leading dot": (mapped_to(".model.safetensors"), UnsafePath),
    "I2 leading dash": (mapped_to("-rf.safetensors"), UnsafePath),
    "I2 only the ending": (mapped_to(".safetensors"), UnsafePath),
    "I2 blank": (mapped_to("a b.safetensors"), UnsafePath),
    "I2 escape codes": (mapped_to("\x1b[2J.safetensors"), UnsafePath),
    "I1 lone surrogate in a shard name": (mapped_to("\ud800.safetensors"), BadIndex),
    "I2 other script": (mapped_to("m\u043edel.safetensors"), UnsafePath),
    "I2 fullwidth slash": (mapped_to("..\uff0fmodel.safetensors"), UnsafePath),
    "I2 tilde": (mapped_to("~/model.safetensors"), UnsafePath),
    "I2 wildcard": (mapped_to("*.safetensors"), UnsafePath),
    "I2 URL": (mapped_to("https://example.org/model.safetensors"), UnsafePath),
    "I2 pickle": (mapped_to("pytorch_model.bin"), UnsafePath),
    "I2 config": (mapped_to(CONFIG), UnsafePath),
    "I2 capital ending": (mapped_to("model.SAFETENSORS"), UnsafePath),
    "I2 256 characters": (mapped_to("a" * 244 + ".safetensors"), UnsafePath),
    "I2 a million characters": (mapped_to("a" * 1_000_000 + ".safetensors"), UnsafePath),
    "I2 null": (mapped_to(None), UnsafePath),
    "I2 number": (mapped_to(1), UnsafePath),
    "I2 true": (mapped_to(True), UnsafePath),
    "I2 list": (mapped_to([EMBED]), UnsafePath),
    "I2 object": (mapped_to({"file": EMBED}), UnsafePath),
    "I2 leading blank": (mapped_to(" " + EMBED), UnsafePath),
    "I2 trailing blank": (mapped_to(EMBED + " "), UnsafePath),
    "I2 trailing dot": (mapped_to(EMBED + "."), UnsafePath),
    "I2 trailing slash": (mapped_to(EMBED + "/"), UnsafePath),
    "I2 double slash": (mapped_to("//etc/model.safetensors"), UnsafePath),
    "I2 tab": (mapped_to("a\t.safetensors"), UnsafePath),
    "I2 device": (mapped_to("/dev/zero"), UnsafePath),
    "I2 memory of the process": (mapped_to("/proc/self/mem"), UnsafePath),
    "I2 descriptor": (mapped_to("/dev/fd/0"), UnsafePath),
    "I2 percent-encoded": (mapped_to("..%2Fmodel.safetensors"), UnsafePath),
    "I2 variable": (mapped_to("$HOME.safetensors"), UnsafePath),
    "I2 file URL": (mapped_to("file:///etc/model.safetensors"), UnsafePath),
    "I2 network share": (mapped_to("\\\\host\\share\\model.safetensors"), UnsafePath),
    "I2 stream": (mapped_to("model.safetensors:x.safetensors"), UnsafePath),
    "I2 right-to-left override": (mapped_to("\u202esrotcnetefas.safetensors"), UnsafePath),
    "I2 zero width": (mapped_to("model\u200b.safetensors"), UnsafePath),
    "I2 code": (mapped_to("modeling.py"), UnsafePath),
    "I2 manifest": (mapped_to(formats.MANIFEST_NAME), UnsafePath),
    "I4 shard missing": (lambda d: (d / FIRST_LAYER).unlink(), MissingFile),
    "I4 all shards missing": (lambda d: [file.unlink() for file in d.glob("*.safetensors")], MissingFile),
    "I4 index names another shard": (mapped_to(EMBED), BadIndex),
    "I4 index names a tensor that is nowhere": (weight_map(lambda names: names.update(ghost=EMBED)), BadIndex),
    "I4 index names a tensor with escape codes": (weight_map(lambda m: m.update({"\x1b[2J\ud800": EMBED})), BadIndex),
    "I4 index names the empty tensor": (weight_map(lambda names: names.update({"": EMBED})), BadIndex),
    "I4 tensor that the index does not name": (weight_map(lambda names: names.pop(NORM)), BadIndex),
    "I4 tensor in two shards": (shard_twice, BadIndex),
    "I4 stray shard": (lambda d: tiny.write_shard(d / "z.safetensors", {"z": Tensor("U8", (1,), b"z")}), BadIndex),
    "I4 stray copy": (lambda d: tiny.replace(d / "copy.safetensors", (d / EMBED).read_bytes()), BadIndex),
    "I4 stray that is no safetensors file": (lambda d: tiny.replace(d / "z.safetensors", "z"), BadIndex),
    "I4 stray with escape codes in its name": (lambda d: tiny.replace(d / "\x1b[2J.safetensors", "z"), BadIndex),
    "I4 stray with a name that is no UTF-8": (lambda d: tiny.replace(d / "\udcff.safetensors", "z"), BadIndex),
    "I4 every line names one shard": (
        weight_map(lambda names: names.update(dict.fromkeys(names, EMBED))), BadIndex
    ),
    "I4 one line only": (weight_map(lambda names: [names.pop(name) for name in [*names] if name != NORM]), BadIndex),
    "I4 name in capitals": (weight_map(lambda names: names.update({NORM.upper(): names.pop(NORM)})), BadIndex),
    "I4 name with a blank": (weight_map(lambda names: names.update({NORM + " ": names.pop(NORM)})), BadIndex),
    "I4 name decomposed": (weight_map(lambda names: names.update({NORM + "\u0301": names.pop(NORM)})), BadIndex),
    "I4 shard in capitals is another file": (mapped_to("M" + EMBED[1:]), MissingFile),
    "I6 no index and many files": (without_index, BadIndex),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INDEX)
def test_index_that_is_hostile_is_refused_before_anything_is_planned(case: str, checkpoint: Path) -> None:
    edit, kinds = BAD_INDEX[case]
    edit(checkpoint)
    refusal(checkpoint, kinds)


def test_index_corpus_and_config_corpus_hold_at_least_40_files_each() -> None:
    assert len(BAD_INDEX) >= 40
    assert len(BAD_CONFIG) + sum(map(len, BAD_NUMBERS.values())) >= 40


def test_open_checkpoint_lists_every_disagreement_between_index_and_headers(checkpoint: Path) -> None:
    tiny.edit_weight_map(checkpoint, lambda names: names.update(ghost=EMBED, other=EMBED))
    tiny.edit_weight_map(checkpoint, lambda names: names.pop(NORM))
    tiny.write_shard(checkpoint / "stray.safetensors", {"z": Tensor("U8", (1,), b"z")})
    sentences = [problem.what for problem in source.open_checkpoint(str(checkpoint)).problems]
    assert len(sentences) == 4
    assert all(
        any(word in sentence for sentence in sentences) for word in ("ghost", "other", NORM, "directory")
    )


@pytest.mark.parametrize("total", [0, -1, 1.5, "many", None, 2**62])
def test_index_total_size_that_is_wrong_does_not_matter(total: object, checkpoint: Path) -> None:
    index_of(lambda document: document["metadata"].update(total_size=total))(checkpoint)
    conform(checkpoint)


@pytest.mark.parametrize("metadata", [None, [], "x", {}])
def test_index_metadata_of_another_type_does_not_matter(metadata: object, checkpoint: Path) -> None:
    index_of(lambda document: document.update(metadata=metadata))(checkpoint)
    conform(checkpoint)


def test_no_index_and_one_file_is_a_checkpoint(checkpoint: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= tiny.read_shard(file, with_data=False)
        file.unlink()
    without_index(checkpoint)
    tiny.write_shard(checkpoint / "model.safetensors", tensors)
    conform(checkpoint)


def test_no_index_and_no_shard_is_a_missing_file(tmp_path: Path) -> None:
    tiny.replace(tmp_path / CONFIG, "{}")
    with pytest.raises(MissingFile):
        source.open_checkpoint(str(tmp_path))


# ---- config.json


def config_is(data: bytes | str) -> Edit:
    return lambda directory: tiny.replace(directory / CONFIG, data)


def config_with(**values: object) -> Edit:
    return lambda directory: tiny.edit_json(directory / CONFIG, lambda document: document.update(values))


def config_text(old: str, new: str) -> Edit:
    """One piece of the file's text replaced, for what json.dumps would not write."""

    def edit(directory: Path) -> None:
        before = (directory / CONFIG).read_text()
        assert before.count(old) == 1
        tiny.replace(directory / CONFIG, before.replace(old, new))

    return edit


def config_of(name: str, **values: object) -> Edit:
    """A release's own config with other values, in its text_config if it has one."""

    def edit(directory: Path) -> None:
        document = json.loads(json.dumps(release.shipped_config(name)))
        document.get("text_config", document).update(values)
        tiny.replace(directory / CONFIG, json.dumps(document))

    return edit


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


BAD_CONFIG: dict[str, tuple[Edit, type[Dsv4Error]]] = {
    "C1 missing": (lambda d: (d / CONFIG).unlink(), MissingFile),
    "C1 empty file": (config_is(""), BadConfig),
    "C1 not JSON": (config_is("model_type: deepseek_v4"), BadConfig),
    "C1 not UTF-8": (config_is(b'{"model_type":"\xff"}'), BadConfig),
    "C1 byte order mark": (lambda d: tiny.replace(d / CONFIG, "\ufeff" + (d / CONFIG).read_text()), BadConfig),
    "C1 UTF-16": (lambda d: tiny.replace(d / CONFIG, (d / CONFIG).read_text().encode("utf-16")), BadConfig),
    "C1 list": (config_is("[]"), BadConfig),
    "C1 string": (config_is('"deepseek_v4"'), BadConfig),
    "C1 number": (config_is("4"), BadConfig),
    "C1 null": (config_is("null"), BadConfig),
    "C1 empty object": (config_is("{}"), BadConfig),
    "C1 truncated": (lambda d: tiny.replace(d / CONFIG, (d / CONFIG).read_text()[:-3]), BadConfig),
    "C1 trailing text": (lambda d: tiny.replace(d / CONFIG, (d / CONFIG).read_text() + "{}"), BadConfig),
    "C1 trailing NUL": (lambda d: tiny.replace(d / CONFIG, (d / CONFIG).read_text() + "\0"), BadConfig),
    "C1 key twice": (config_text('"hidden_size": 256', '"hidden_size": 256, "hidden_size": 256'), BadConfig),
    "C1 carried key twice": (config_text('"use_cache": true', '"use_cache": true, "use_cache": false'), BadConfig),
    "C1 nested key twice": (config_text('"beta_fast": 32', '"beta_fast": 32, "beta_fast": 1'), BadConfig),
    "C1 NaN": (config_text('"routed_scaling_factor": 1.5', '"routed_scaling_factor": NaN'), BadConfig),
    "C1 NaN in a carried key": (config_text('"initializer_range": 0.02', '"initializer_range": NaN'), BadConfig),
    "C1 Infinity": (config_text('"rms_norm_eps": 1e-06', '"rms_norm_eps": Infinity'), BadConfig),
    "C1 float overflow": (config_text('"routed_scaling_factor": 1.5', '"routed_scaling_factor": 1e999'), BadConfig),
    "C1 float overflow in a carried key": (
        config_text('"initializer_range": 0.02', '"initializer_range": 1e999'), BadConfig
    ),
    "C1 lone surrogate in a carried key": (config_with(hidden_act="\ud800"), BadConfig),
    "C1 lone surrogate as a key": (config_with(**{"\udfff": 1}), BadConfig),
    "C1 1 MiB and a byte": (
        lambda d: tiny.replace(d / CONFIG, (d / CONFIG).read_text().ljust(2**20 + 1)), BadConfig
    ),
    "C1 10 GB, sparse": (lambda d: sparse(d / CONFIG, 10**10), BadConfig),
    "C1 deep": (config_text('"hidden_act": "silu"', '"hidden_act": ' + nested(100_000)), BadConfig),
    "C1 open lists": (config_is("[" * 1_000_000), BadConfig),
    "C1 number of 5,000 digits": (config_text('"hidden_size": 256', '"hidden_size": ' + "9" * 5000), BadConfig),
    "C1 no model_type": (config_text('"model_type": "deepseek_v4",', ""), BadConfig),
    "C1 comment": (lambda d: tiny.replace(d / CONFIG, "// {}\n" + (d / CONFIG).read_text()), BadConfig),
    "C1 single quotes": (lambda d: tiny.replace(d / CONFIG, (d / CONFIG).read_text().replace('"', "'")), BadConfig),
    "C1 trailing comma": (lambda d: tiny.replace(d / CONFIG, (d / CONFIG).read_text().rstrip()[:-1] + ",}"), BadConfig),
    "C1 YAML tag": (config_is("!!python/object/apply:os.system ['true']"), BadConfig),
    "C1 pickle": (config_is(b"\x80\x04K\x01."), BadConfig),
    "C1 hexadecimal": (config_text('"hidden_size": 256', '"hidden_size": 0x100'), BadConfig),
    "C1 leading zero": (config_text('"hidden_size": 256', '"hidden_size": 0256'), BadConfig),
    "C1 control character in a string": (config_text('"hidden_act": "silu"', '"hidden_act": "si\x01lu"'), BadConfig),
    "C1 1 MiB of zeros": (lambda d: sparse(d / CONFIG, 2**20), BadConfig),
    "C1 key of a million characters": (config_is('{"' + "x" * (2**20 - 10) + '":1}'), BadConfig),
    "C1 model_type of V3": (config_with(model_type="deepseek_v3"), BadConfig),
    "C1 model_type in capitals": (config_with(model_type="DEEPSEEK_V4"), BadConfig),
    "C1 model_type null": (config_with(model_type=None), BadConfig),
    "C1 model_type list": (config_with(model_type=["deepseek_v4"]), BadConfig),
    "C1 model_type object": (config_with(model_type={"deepseek_v4": 1}), BadConfig),
    "C1 model_type with escape codes": (config_with(model_type="\x1b[2J"), BadConfig),
    "C1 model_type of 100,000 characters": (config_with(model_type="x" * 100_000), BadConfig),
    "C1 model_type of V4.1, keys of V4": (config_with(model_type="deepseek_v41"), BadConfig),
    "C2 ratios too few": (config_with(compress_ratios=[0, 0, 4]), BadConfig),
    "C2 ratios without a stage": (config_with(compress_ratios=[0, 0, 4, 128]), BadConfig),
    "C2 ratios for 9 stages": (config_with(compress_ratios=[0] * 13), BadConfig),
    "C2 ratios for a million layers": (config_with(compress_ratios=[0] * 300_000), BadConfig),
    "C2 ratios empty": (config_with(compress_ratios=[]), BadConfig),
    "C2 ratios empty, no stages": (config_with(compress_ratios=[], num_nextn_predict_layers=0), BadConfig),
    "C2 ratios too few, no stages": (config_with(compress_ratios=[0, 0], num_nextn_predict_layers=0), BadConfig),
    "C2 ratios null": (config_with(compress_ratios=None), BadConfig),
    "C2 ratios object": (config_with(compress_ratios={"0": 4}), BadConfig),
    "C2 ratios string": (config_with(compress_ratios="00440"), BadConfig),
    "C2 ratios number": (config_with(compress_ratios=4), BadConfig),
    "C2 ratio negative": (config_with(compress_ratios=[0, 0, -4, 128, 0]), BadConfig),
    "C2 ratio float": (config_with(compress_ratios=[0, 0, 4.0, 128, 0]), BadConfig),
    "C2 ratio true": (config_with(compress_ratios=[0, 0, True, 128, 0]), BadConfig),
    "C2 ratio string": (config_with(compress_ratios=[0, 0, "4", 128, 0]), BadConfig),
    "C2 ratio null": (config_with(compress_ratios=[0, 0, None, 128, 0]), BadConfig),
    "C2 ratio list": (config_with(compress_ratios=[0, 0, [4], 128, 0]), BadConfig),
    "C2 ratio huge": (config_with(compress_ratios=[0, 0, 2**40, 128, 0]), BadConfig),
    "C2 hash layers beyond layers": (config_with(num_hash_layers=5), BadConfig),
    "C2 stages 9": (config_with(num_nextn_predict_layers=9), BadConfig),
    "C2 stages negative": (config_with(num_nextn_predict_layers=-1), BadConfig),
    "C2 stages true": (config_with(num_nextn_predict_layers=True), BadConfig),
    "C2 o_groups does not divide": (config_with(o_groups=3), BadConfig),
    "C2 hidden odd": (config_with(hidden_size=257), BadConfig),
    "C2 expert width odd": (config_with(moe_intermediate_size=129), BadConfig),
    "C2 one layer too many": (config_with(num_hidden_layers=513, compress_ratios=[0] * 514), BadConfig),
    "C2 one expert too many": (config_with(n_routed_experts=4097), BadConfig),
    "C2 hidden a little too wide": (config_with(hidden_size=2**17 + 2), BadConfig),
    "C2 stages alone": (config_with(num_nextn_predict_layers=8, compress_ratios=[0] * 4), BadConfig),
    "C2 sizes whose product leaves 64 bits": (config_with(num_attention_heads=4096, head_dim=2**14 + 1), BadConfig),
    "C2 DSpark taps no layer": (config_of("flash-0731", dspark_target_layer_ids=[]), BadConfig),
    "C2 DSpark taps a layer beyond": (config_of("flash-0731", dspark_target_layer_ids=[99]), BadConfig),
    "C2 DSpark taps a negative layer": (config_of("flash-0731", dspark_target_layer_ids=[-1]), BadConfig),
    "C2 DSpark taps 9 layers": (config_of("flash-0731", dspark_target_layer_ids=list(range(9))), BadConfig),
    "C2 DSpark targets null": (config_of("flash-0731", dspark_target_layer_ids=None), BadConfig),
    "C2 DSpark rank huge": (config_of("flash-0731", dspark_markov_rank=2**40), BadConfig),
    "C2 DSpark rank null": (config_of("flash-0731", dspark_markov_rank=None), BadConfig),
    "C2 DSpark experts huge": (config_of("v4.1-flash", dspark_n_routed_experts=2**31), BadConfig),
    "C2 Engram lists of two lengths": (config_of("v4.1-flash", engram_num_embeddings=[]), BadConfig),
    "C2 Engram layer beyond": (config_of("v4.1-flash", engram_layer_ids=[1000]), BadConfig),
    "C2 Engram rows huge": (config_of("v4.1-flash", engram_layer_ids=[1], engram_num_embeddings=[2**60]), BadConfig),
    "C2 Engram rows negative": (config_of("v4.1-flash", engram_layer_ids=[1], engram_num_embeddings=[-1]), BadConfig),
    "C2 Engram order of hashes huge": (config_of("v4.1-flash", engram_max_ngram_size=10**6), BadConfig),
    "C2 key source layer beyond": (config_of("v4.1-flash", kv_source_layer_ids=[1000]), BadConfig),
    "C2 index source layer true": (config_of("v4.1-flash", index_source_layer_ids=[True]), BadConfig),
    "C2 other release's sizes": (config_of("pro"), UnknownRelease),
    "C2 layers that are not there": (config_with(num_hidden_layers=5, compress_ratios=[0] * 6), NotConform),
    "C2 ratio that the tensors do not have": (config_with(compress_ratios=[0, 0, 4, 64, 0]), NotConform),
    "C2 experts that are not there": (config_with(n_routed_experts=9), NotConform),
}  # fmt: skip

SIZES = (
    "num_hidden_layers",
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "hc_mult",
    "index_n_heads",
    "index_head_dim",
)
NO_SIZES: tuple[object, ...] = (
    -1,
    0,
    2**31,
    2**62,
    10**18,
    True,
    256.0,
    "256",
    None,
    [],
    [256],
    {},
    float("1e300"),
)
NO_NUMBERS: tuple[object, ...] = (True, "1.5", None, [], {})
BAD_NUMBERS: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(SIZES, NO_SIZES),
    "num_hash_layers": tuple(value for value in NO_SIZES if value is True or value != 0),
    **dict.fromkeys(("routed_scaling_factor", "rms_norm_eps"), NO_NUMBERS),
}


def sparse(path: Path, size: int) -> None:
    path.unlink()
    with path.open("wb") as file:
        file.truncate(size)


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_config_that_is_hostile_is_refused_before_anything_is_planned(case: str, checkpoint: Path) -> None:
    edit, kind = BAD_CONFIG[case]
    edit(checkpoint)
    refusal(checkpoint, kind)


@pytest.mark.parametrize("key", BAD_NUMBERS)
def test_config_size_of_the_wrong_kind_or_out_of_bounds_is_refused(key: str, checkpoint: Path) -> None:
    for value in BAD_NUMBERS[key]:
        config_with(**{key: value})(checkpoint)
        assert key in str(refusal(checkpoint, BadConfig)), value


@pytest.mark.parametrize("key", [*BAD_NUMBERS, "compress_ratios"])
def test_config_without_a_key_that_decides_tensors_is_refused(key: str, checkpoint: Path) -> None:
    tiny.edit_json(checkpoint / CONFIG, lambda document: document.pop(key))
    assert key in str(refusal(checkpoint, BadConfig))


@pytest.mark.parametrize("text", [None, [], "x", {}])
def test_config_of_v41_without_its_text_config_is_refused(text: object, checkpoint: Path) -> None:
    document = {**release.shipped_config("v4.1-flash"), "text_config": text}
    tiny.replace(checkpoint / CONFIG, json.dumps(document))
    refusal(checkpoint, BadConfig)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["hidden_act", "hidden_size", "compress_ratios", "model_type"])
def test_config_nested_to_any_depth_is_planned_or_refused(key: str, checkpoint: Path) -> None:
    before = json.loads((checkpoint / CONFIG).read_bytes())
    for depth in (10, 500, *range(880, 1000, 7), 2000):
        text = json.dumps({**before, key: "HERE"}).replace('"HERE"', nested(depth))
        tiny.replace(checkpoint / CONFIG, text)
        try:
            tiny.plan_of(checkpoint)
        except BadConfig:
            continue
        assert key == "hidden_act", depth


@pytest.mark.parametrize(
    ("layers", "experts", "kind"),
    [(4, 4096, NotConform), (511, 8, NotConform), (390, 255, NotConform), (511, 4096, BadConfig)],
    ids=["experts", "layers", "as many as may be", "both"],
)
def test_config_absurd_counts_are_refused_without_listing_what_is_missing(
    layers: int, experts: int, kind: type[Dsv4Error], checkpoint: Path
) -> None:
    config_with(num_hidden_layers=layers, n_routed_experts=experts, compress_ratios=[0] * (layers + 1))(
        checkpoint
    )
    refusal(checkpoint, kind)


def test_config_of_1_mib_is_read_at_once(checkpoint: Path) -> None:
    before = json.loads((checkpoint / CONFIG).read_bytes())
    tiny.replace(checkpoint / CONFIG, json.dumps({**before, "x": list(range(100_000))}))
    assert (checkpoint / CONFIG).stat().st_size < formats.MAX_CONFIG_BYTES
    started = time.process_time()
    tiny.plan_of(checkpoint)
    assert time.process_time() - started < 2


CODE = ("modeling.py", "pytorch_model.bin", "x.pt", "x.pkl", "x.ckpt", "x.so", ".hidden.json", "run.sh")


def test_config_code_files_are_never_carried(checkpoint: Path) -> None:
    for name in CODE:
        tiny.replace(checkpoint / name, "boom")
    made = tiny.plan_of(checkpoint)
    left = {item.name for item in made.left}
    assert {*CODE} <= left
    assert not left & {name for name, _, _ in made.copied}


def test_config_key_that_names_code_is_left_out_and_told(checkpoint: Path) -> None:
    config_with(auto_map={"AutoModel": "somebody/else--modeling.Model"})(checkpoint)
    made = tiny.plan_of(checkpoint)
    assert b"auto_map" not in made.written[CONFIG]
    assert "config.json: auto_map" in {item.name for item in made.left}


def test_dtypes_of_no_known_release_are_an_unknown_release(checkpoint: Path) -> None:
    def as_u8(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: t._replace(dtype="U8") for name, t in tensors.items() if t.dtype == "I8"})

    for file in checkpoint.glob("*.safetensors"):
        tiny.edit_shard(file, as_u8)
    refusal(checkpoint, UnknownRelease)
