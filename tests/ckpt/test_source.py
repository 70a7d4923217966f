"""ONE checkpoint: reads are the file's bytes, a file that changes is noticed, small files are carried or named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from tiny import CONFIG, EMBED, FIRST_LAYER, INDEX, Tensor

from dsv4ckpt import formats, source
from dsv4ckpt.errors import BadIndex, Environment, MissingFile, SourceChanged

NORM = "layers.0.attn_norm.weight"


def opened(directory: Path) -> source.Checkpoint:
    return source.open_checkpoint(str(directory))


def test_open_checkpoint_finds_every_tensor_where_a_plain_reader_does(flash: Path) -> None:
    checkpoint = opened(flash)
    expected = {}
    for file in sorted(flash.glob("*.safetensors")):
        for name, tensor in tiny.read_shard(file, with_data=False).items():
            expected[name] = (file.name, tensor.dtype, tensor.shape, tensor.size)
    found = {
        name: (place.shard, place.entry.dtype, place.entry.shape, place.entry.end - place.entry.begin)
        for name, place in checkpoint.tensors.items()
    }
    assert found == expected
    assert checkpoint.total_size == checkpoint.index_total == sum(size for *_, size in expected.values())
    checkpoint.require_sound()


def test_reader_gives_the_bytes_of_every_tensor(flash: Path) -> None:
    checkpoint = opened(flash)
    with checkpoint.reader() as reader:
        for file in sorted(flash.glob("*.safetensors")):
            for name, tensor in tiny.read_shard(file).items():
                buffer = bytearray(tensor.size)
                reader.read_into(name, memoryview(buffer), 0)
                assert buffer == tensor.data


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (0, 1), (1, 7), (511, 1), (512, 0), (100, 412)])
def test_reader_gives_any_range_within_a_tensor(offset: int, size: int, flash: Path) -> None:
    whole = tiny.read_shard(flash / FIRST_LAYER)[NORM].data
    assert isinstance(whole, bytes)
    with opened(flash).reader() as reader:
        buffer = bytearray(size)
        reader.will_need(NORM, offset, size)
        reader.read_into(NORM, memoryview(buffer), offset)
    assert buffer == whole[offset : offset + size]


@pytest.mark.parametrize("least", [1, 1 << 40], ids=["past the cache", "through it"])
def test_landing_reads_give_every_tensor_and_any_range(
    least: int, flash: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges begin and end anywhere, also at the end of a file; the memory is used again."""
    monkeypatch.setattr(source, "_DIRECT_BYTES", least)
    landing = source.Landing()
    with opened(flash).reader() as reader:
        for file in sorted(flash.glob("*.safetensors")):
            for name, tensor in tiny.read_shard(file).items():
                assert isinstance(tensor.data, bytes)
                for begin, end in ((0, tensor.size), (1, tensor.size), (tensor.size // 3, tensor.size // 2)):
                    assert reader.read(name, begin, end - begin, landing) == tensor.data[begin:end], name


@pytest.mark.parametrize("least", [1, 1 << 40], ids=["past the cache", "through it"])
def test_landing_read_of_a_file_cut_off_meanwhile_is_an_error(
    least: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_DIRECT_BYTES", least)
    tiny.replace(checkpoint / FIRST_LAYER, (checkpoint / FIRST_LAYER).read_bytes())  # no longer a link
    found = opened(checkpoint)
    name, place = max(
        ((name, place) for name, place in found.tensors.items() if place.shard == FIRST_LAYER),
        key=lambda item: item[1].entry.end,
    )
    size = place.entry.end - place.entry.begin
    landing = source.Landing()
    with pytest.raises(SourceChanged), found.reader() as reader:
        reader.read(name, 0, size, landing)
        os.truncate(checkpoint / FIRST_LAYER, place.entry.end - size // 2)
        reader.read(name, 0, size, landing)


def test_reader_closes_its_files(flash: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with opened(flash).reader() as reader:
        reader.read_into(NORM, memoryview(bytearray(8)), 0)
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before


# ---- a source that changes under us


def grown(file: Path) -> None:
    tiny.replace(file, file.read_bytes() + b"x")


def touched(file: Path) -> None:
    os.utime(file, ns=(0, 0))


def rewritten(file: Path) -> None:
    """The same size and time, another file."""
    status, data = file.stat(), file.read_bytes()
    other = file.with_suffix(".new")
    other.write_bytes(data)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(file)


CHANGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: os.truncate(file, 100_000),
    "emptied": lambda file: os.truncate(file, 0),
    "grown": grown,
    "touched": touched,
    "rewritten": rewritten,
}


@pytest.fixture
def own(checkpoint: Path) -> Path:
    """A checkpoint whose first layer is a file of its own, not a link into the shared sample."""
    tiny.replace(checkpoint / FIRST_LAYER, (checkpoint / FIRST_LAYER).read_bytes())
    return checkpoint


@pytest.mark.parametrize("case", CHANGES)
def test_reader_of_a_file_changed_after_the_plan_raises_source_changed(case: str, own: Path) -> None:
    checkpoint = opened(own)
    CHANGES[case](own / FIRST_LAYER)
    with pytest.raises(SourceChanged) as raised, checkpoint.reader() as reader:
        reader.read_into(NORM, memoryview(bytearray(8)), 0)
    assert raised.value.facts["file"] == FIRST_LAYER


@pytest.mark.parametrize("case", ["truncated", "emptied", "touched"])
def test_reader_of_a_file_changed_while_it_is_open_raises_source_changed(case: str, own: Path) -> None:
    checkpoint = opened(own)
    with pytest.raises(SourceChanged), checkpoint.reader() as reader:
        reader.read_into(NORM, memoryview(bytearray(8)), 0)
        CHANGES[case](own / FIRST_LAYER)


def test_reader_of_a_file_truncated_while_it_is_open_raises_source_changed_not_a_signal(own: Path) -> None:
    checkpoint = opened(own)
    with checkpoint.reader() as reader, pytest.raises(SourceChanged, match="ended while it was read"):
        reader.read_into(NORM, memoryview(bytearray(8)), 0)
        os.truncate(own / FIRST_LAYER, 1000)
        try:
            reader.read_into(NORM, memoryview(bytearray(512)), 0)
        finally:
            reader.close()  # what the block's end would complain about as well


def test_reader_of_a_file_that_is_gone_is_an_environment_error(own: Path) -> None:
    checkpoint = opened(own)
    (own / FIRST_LAYER).unlink()
    with pytest.raises(Environment), checkpoint.reader() as reader:
        reader.read_into(NORM, memoryview(bytearray(8)), 0)


def test_reader_does_not_hide_the_error_of_its_block(own: Path) -> None:
    checkpoint = opened(own)
    with pytest.raises(KeyError), checkpoint.reader() as reader:
        reader.read_into(NORM, memoryview(bytearray(8)), 0)
        touched(own / FIRST_LAYER)
        raise KeyError


# ---- what is not a directory with an index


def test_open_checkpoint_of_a_single_file_has_its_tensors_and_no_config(flash: Path) -> None:
    checkpoint = opened(flash / EMBED)
    assert list(checkpoint.tensors) == ["embed.weight"]
    with pytest.raises(MissingFile, match="no config"):
        checkpoint.config()


def test_open_checkpoint_of_a_single_file_leaves_its_neighbours_closed(flash: Path) -> None:
    with tiny.recorded_opens() as seen:
        opened(flash / EMBED)
    assert {os.path.basename(path) for path, _ in seen} == {EMBED}


def test_open_checkpoint_of_an_empty_directory_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="no safetensors file"):
        opened(tmp_path)


@pytest.mark.parametrize("name", [CONFIG, INDEX])
def test_open_checkpoint_reads_config_and_index_once(name: str, flash: Path) -> None:
    with tiny.recorded_opens() as seen:
        opened(flash)
    assert [os.path.basename(path) for path, _ in seen].count(name) == 1


def test_require_sound_raises_the_first_problem(checkpoint: Path) -> None:
    tiny.write_shard(checkpoint / "z.safetensors", {"z": Tensor("U8", (1,), b"z")})
    with pytest.raises(BadIndex, match="does not know"):
        opened(checkpoint).require_sound()


def test_tensor_in_two_shards_is_a_problem_that_names_both(checkpoint: Path) -> None:
    tiny.edit_shard(
        checkpoint / EMBED,
        lambda tensors: tensors.update({NORM: tiny.read_shard(checkpoint / FIRST_LAYER)[NORM]}),
    )
    (problem,) = opened(checkpoint).problems
    assert NORM in problem.what
    assert {EMBED, FIRST_LAYER} <= {problem.facts["file"], problem.facts["found"].split()[-1]}


# ---- small files

CARRIED = (
    "LICENSE", "LICENSE.txt", "NOTICE", "README.md", "chat_template.jinja", "tokenizer.json", "x.TXT", "x.model",
    "x.tiktoken", "paper.pdf", "x.yaml", "encoding/a.py", "inference/b.py", "inference/deep/er/c.json",
)  # fmt: skip
LEFT = (
    ".gitattributes", ".x.json", "a.py", "modeling.py", "x.bin", "x.pt", "x.pkl", "x", "x.json.bak", "LICENSES/a",
    "assets/a.json", "encoding/x.bin", "inference/.x.json", "x.gguf",
)  # fmt: skip


@pytest.mark.parametrize("name", CARRIED)
def test_small_file_of_a_known_kind_is_carried(name: str, checkpoint: Path) -> None:
    (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
    tiny.replace(checkpoint / name, "12345")
    assert source.SmallFile(name, 5, None) in opened(checkpoint).small_files()
    assert opened(checkpoint).read_small(name) == b"12345"


@pytest.mark.parametrize("name", LEFT)
def test_small_file_of_another_kind_is_left_behind_with_a_reason(name: str, checkpoint: Path) -> None:
    (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
    tiny.replace(checkpoint / name, "12345")
    reasons = {item.name.rstrip("/"): item.left for item in opened(checkpoint).small_files()}
    assert reasons.get(name) or reasons.get(name.partition("/")[0])


@pytest.mark.parametrize(
    ("size", "carried"), [(formats.MAX_SMALL_FILE_BYTES, True), (formats.MAX_SMALL_FILE_BYTES + 1, False)]
)
def test_small_file_is_carried_up_to_its_limit(size: int, carried: bool, checkpoint: Path) -> None:
    with (checkpoint / "x.json").open("wb") as file:
        file.truncate(size)
    (item,) = [item for item in opened(checkpoint).small_files() if item.name == "x.json"]
    assert (item.left is None) == carried


def test_small_files_are_sorted_and_leave_out_what_is_made_anew(checkpoint: Path) -> None:
    for name in formats.OUR_NAMES:
        tiny.replace(checkpoint / name, "{}")
    names = [item.name for item in opened(checkpoint).small_files()]
    assert names == sorted(names)
    assert not {CONFIG, INDEX, *formats.OUR_NAMES} & set(names)
    assert not any(name.endswith(".safetensors") for name in names)


def test_checkpoint_read_from_any_working_directory_is_the_same(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny.plan_of(checkpoint).sha256
    monkeypatch.chdir(checkpoint)
    assert tiny.plan_of(Path()).sha256 == whole
    monkeypatch.chdir(checkpoint.parent)
    assert tiny.plan_of(Path("checkpoint")).sha256 == whole
    shutil.copytree(checkpoint, checkpoint.parent / "copy")
    assert tiny.plan_of(Path("copy")).sha256 == whole
