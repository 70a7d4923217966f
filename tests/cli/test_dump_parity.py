"""dsv4 dump and dsv4 parity as a newcomer uses them, with the mistakes people make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from in_process import Dsv4
from in_process import dsv4 as dsv4
from torch import Tensor

from dsv4model import dumps, loading

IDS = [[5, 17, 200, 3, 44, 501, 7, 8, 9, 10, 300, 12]]
SIZES: dict[str, Any] = {"hidden": 128, "intermediate": 32, "experts": 6, "heads": 2, "vocab": 512}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, so that every kind of attention is there, and an MTP block."""
    return tiny.make_sample("flash", tmp_path_factory.mktemp("parity") / "flash", **SIZES)


@pytest.fixture(scope="module")
def ids(ckpt: Path) -> Path:
    path = ckpt.parent / "ids.json"
    path.write_text(json.dumps(IDS))
    return path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake is told before a model is loaded for nothing."""

    def fail(*arguments: Any, **named: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load", fail)


# ---- dump


@pytest.mark.slow
def test_dumps_of_both_implementations_agree(ckpt: Path, ids: Path, tmp_path: Path, dsv4: Dsv4) -> None:
    """A first round, with 150 tokens in two sequences: the last layer has a compressed entry."""
    rows = torch.randint(0, 512, (2, 150), generator=torch.Generator().manual_seed(1)).tolist()
    (tmp_path / "ids.json").write_text(json.dumps(rows))
    for impl in ("dsv4", "transformers"):
        done = dsv4("dump", ckpt, "--ids", tmp_path / "ids.json", "--out", tmp_path / impl, "--impl", impl)
        assert done.code == 0, done.err
        assert f"next: dsv4 parity {tmp_path / impl} OTHER" in done.out
    done = dsv4("parity", tmp_path / "dsv4", tmp_path / "transformers", "--json")
    assert done.code == 0, done.err
    found = done.document
    assert (found["within"], found["first_divergence"], found["only_in_b"]) == (True, None, [])
    assert len(found["tensors"]) == 71
    assert {name.split(".")[0] for name in found["only_in_a"]} == {"mtp"}
    scale = {row["name"]: row["max_rel"] for row in found["tensors"] if row["max_rel"] is not None}
    assert max(scale.values()) < 2e-5
    assert {row["verdict"] for row in found["tensors"]} == {"equal", "close"}


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["dsv4", "transformers"])
def test_bfloat16_dumps_lie_near_the_float32_ones(
    impl: str, ckpt: Path, ids: Path, tmp_path: Path, dsv4: Dsv4
) -> None:
    for dtype in ("float32", "bfloat16"):
        done = dsv4("dump", ckpt, "--ids", ids, "--out", tmp_path / dtype, "--impl", impl, "--dtype", dtype)
        assert done.code == 0, done.err
    found = dsv4("parity", tmp_path / "bfloat16", tmp_path / "float32", "--json").document
    logits = next(row for row in found["tensors"] if row["name"] == "logits")
    assert 0.99 < logits["cosine"] < 1 - 1e-7
    assert not found["within"]


@pytest.mark.slow
def test_the_same_dump_twice_is_the_same_bytes(ckpt: Path, ids: Path, tmp_path: Path, dsv4: Dsv4) -> None:
    elsewhere = tiny.copy_of(ckpt, tmp_path / "copy" / "ckpt")
    for source, out in ((ckpt, "a"), (elsewhere, "b")):
        assert dsv4("dump", source, "--ids", ids, "--out", tmp_path / out, "-q") == (0, "", "")
    assert tiny.tree_of(tmp_path / "a") == tiny.tree_of(tmp_path / "b")
    done = dsv4("parity", tmp_path / "a", tmp_path / "b")
    assert done.code == 0
    assert "all 91 tensors, 91 of them equal" in done.out


def test_dump_of_a_few_tensors_says_what_it_wrote(ckpt: Path, ids: Path, tmp_path: Path, dsv4: Dsv4) -> None:
    done = dsv4("dump", ckpt, "--ids", ids, "--out", tmp_path / "out", "--only", "layers.2.attn.*", "--only", "logits",
                "--json")  # fmt: skip
    assert done.code == 0
    assert "recorded" in done.err
    told = done.document
    assert told["tensors"] == 7
    assert told["ids"]["shape"] == [1, 12]
    assert told["checkpoint"]["release"] == "flash"
    with dumps.open_dump(str(tmp_path / "out")) as found:
        assert [name.rpartition(".")[2] for name in found] == [
            "in",
            "q",
            "kv",
            "entries",
            "picks",
            "out",
            "logits",
        ]
        assert found["logits"].shape == (1, 12, 512)
        assert told["bytes"] == sum(found.size_of(name) for name in found)


def test_dump_in_float64_is_wider(ckpt: Path, ids: Path, tmp_path: Path, dsv4: Dsv4) -> None:
    done = dsv4(
        "dump", ckpt, "--ids", ids, "--out", tmp_path / "out", "--only", "logits", "--dtype", "float64"
    )
    assert done.code == 0, done.err
    with dumps.open_dump(str(tmp_path / "out")) as found:
        assert (found["logits"].dtype, found.about.dtype) == (torch.float64, "float64")


@pytest.mark.parametrize(
    "text",
    ["[1, 2, 3]", "[[1, 2, 3]]", "1 2 3", "1\n2\t3\n", "  [1,\n 2, 3 ]\n"],
)
def test_ids_in_every_spelling_are_the_same_ids(text: str, ckpt: Path, tmp_path: Path, dsv4: Dsv4) -> None:
    (tmp_path / "ids").write_text(text)
    done = dsv4(
        "dump", ckpt, "--ids", tmp_path / "ids", "--out", tmp_path / "out", "--only", "embed", "--json"
    )
    assert done.document["ids"] == {"shape": [1, 3], "sha256": dumps.ids_sha256([[1, 2, 3]])}


def test_text_goes_through_the_checkpoints_tokenizer(ckpt: Path, tmp_path: Path, dsv4: Dsv4) -> None:
    import tokenizers

    expected = tokenizers.Tokenizer.from_file(str(ckpt / "tokenizer.json")).encode("Hello, you").ids
    done = dsv4("dump", ckpt, "--text", "Hello, you", "--out", tmp_path / "out", "--only", "embed", "--json")
    assert done.document["ids"]["sha256"] == dumps.ids_sha256([expected])


MISTAKES = [
    ("", [], 2, "either --ids FILE or --text TEXT"),
    ("[1]", ["--text", "x"], 2, "either --ids FILE or --text TEXT"),
    ('{"model_type": "deepseek_v4"}', [], 2, "'{\"model_type\":'"),
    ("[1, 2.5]", [], 2, "2.5 where only whole numbers may stand"),
    ("[1, -2]", [], 2, "-2 where only counts may stand"),
    ("1 -2", [], 2, "'-2'"),
    ("1, 2", [], 2, "'1,'"),
    ("[1, true]", [], 2, "[1, True]"),
    ("[[1, 2], [3]]", [], 2, "lists of 2 and 1 ids"),
    ("[[1, 2], 3]", [], 2, "found     3"),
    ("[1, [2]]", [], 2, "[1, [2]]"),
    ("[[[1]]]", [], 2, "[[1]]"),
    ("[1, 2", [], 2, "not JSON"),
    ("[" * 5000, [], 2, "nested too deeply"),
    ("\0", [], 2, r"'\x00'"),
    ("\u0661", [], 2, "'\u0661'"),  # a digit, but of another alphabet
    ("[]", [], 2, "no token ids"),
    ("[[]]", [], 2, "no token ids"),
    (" ", [], 2, "no token ids"),
    ("[1, 512]", [], 2, "512 at position 1 of sequence 0"),
    ("[[1, 2], [600, 2]]", [], 2, "600 at position 0 of sequence 1"),
    ("[1]", ["--only", "layers.9.*"], 2, "'layers.9.*'"),
    ("[1]", ["--impl", "transformers", "--only", "mtp.*"], 2, "transformers has no MTP block"),
    ("[1]", ["--impl", "transformers", "--dtype", "float64"], 2, "float32 or bfloat16"),
    ("[1]", ["--impl", "vllm"], 2, "transformers"),
    ("[1]", ["--dtype", "int8"], 2, "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "arguments", "code", "word"), MISTAKES, ids=lambda value: str(value)[:20])
@pytest.mark.usefixtures("no_model")
def test_mistake_with_ids_is_told_before_the_model_is_loaded(
    text: str, arguments: list[str], code: int, word: str, ckpt: Path, tmp_path: Path, dsv4: Dsv4
) -> None:
    out, ids = tmp_path / "out", tmp_path / "ids.json"
    ids.write_text(text)
    done = dsv4("dump", ckpt, "--out", out, *(["--ids", ids] if text else []), *arguments)
    assert done.code == code, done.err
    assert word in done.err
    assert "Traceback" not in done.err + done.out
    assert not out.exists()


@pytest.mark.usefixtures("no_model")
def test_binary_file_for_ids_is_refused(ckpt: Path, tmp_path: Path, dsv4: Dsv4) -> None:
    done = dsv4("dump", ckpt, "--ids", next(ckpt.glob("*.safetensors")), "--out", tmp_path / "out")
    assert done.code == 2
    assert "--ids is no list of token ids" in done.err


@pytest.mark.usefixtures("no_model")
def test_mistake_with_a_directory_is_told_before_the_model_is_loaded(
    ckpt: Path, ids: Path, tmp_path: Path, dsv4: Dsv4
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").touch()
    for source, out, code, word in (
        (ckpt, taken, 2, "'thesis.txt'"),
        (ckpt, ids, 2, "no directory"),
        (ckpt, ckpt, 2, "not empty"),
        (tmp_path / "nowhere", tmp_path / "out", 3, "no such file or directory"),
        (next(ckpt.glob("*.safetensors")), tmp_path / "out", 3, "config.json"),
        (ckpt / "config.json", tmp_path / "out", 3, "no safetensors file"),
    ):
        done = dsv4("dump", source, "--ids", ids, "--out", out)
        assert done.code == code, done.err
        assert word in done.err
    assert not (tmp_path / "out").exists()
    assert [file.name for file in taken.iterdir()] == ["thesis.txt"]


@pytest.mark.usefixtures("no_model")
def test_broken_checkpoint_is_refused(ckpt: Path, ids: Path, tmp_path: Path, dsv4: Dsv4) -> None:
    broken = tiny.copy_of(ckpt, tmp_path / "broken")
    tiny.edit_shard(
        tiny.shard_of(broken, "layers.0.attn.wkv.weight"), lambda t: t.pop("layers.0.attn.wkv.weight")
    )
    assert dsv4("dump", broken, "--ids", ids, "--out", tmp_path / "out").code == 3


# ---- parity


def some_pass() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    names = ("embed", "layers.0.attn.out", "layers.0.out", "layers.1.attn.out", "logits")
    tensors = {name: torch.randn(1, 12, 8, generator=random) for name in names}
    tensors["layers.0.ffn.router_ids"] = torch.arange(24).view(1, 12, 2)
    order = [
        "embed",
        "layers.0.attn.out",
        "layers.0.ffn.router_ids",
        "layers.0.out",
        "layers.1.attn.out",
        "logits",
    ]
    return {name: tensors[name] for name in order}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, tensors: dict[str, Tensor], *, ids: list[list[int]] = IDS) -> Path:
        dumps.write_dump(str(tmp_path / name), tensors, dumps.about(name, "float32", ids))
        return tmp_path / name

    return write


def test_parity_names_the_first_divergence(written: Callable[..., Path], dsv4: Dsv4) -> None:
    changed = some_pass()
    changed["layers.0.out"][0, 3, 5] += 1e-3
    changed["layers.1.attn.out"] += 1e-2
    changed["logits"] += 1e-2
    a, b = written("a", some_pass()), written("b", changed)
    done = dsv4("parity", a, b)
    assert done.code == 1
    last = done.out[done.out.index("first divergence: ") :].splitlines()
    was, now = (some["layers.0.out"][0, 3, 5].item() for some in (some_pass(), changed))
    assert last == [
        "first divergence: layers.0.out",
        "  DIFFERS: 1 of 96 values; the worst at [0, 3, 5]",
        f"  A  {was:.9g}",
        f"  B  {now:.9g}",
        "  3 tensors before it within the tolerance; 2 of the 2 after it are not",
    ]
    table = [line.split() for line in done.out.splitlines() if line.startswith("  ")]
    verdicts = {words[0]: words[-1] for words in table if words and words[0] in changed}
    assert [verdicts[name] for name in changed] == ["equal", "equal", "equal", "values", "values", "values"]


def test_parity_counts_rows_of_whole_numbers(written: Callable[..., Path], dsv4: Dsv4) -> None:
    changed = some_pass()
    changed["layers.0.ffn.router_ids"][0, 7, 1] = 99
    done = dsv4("parity", written("a", some_pass()), written("b", changed))
    assert done.code == 1
    assert "DIFFERS: 1 of 12 rows; the first at [0, 7]\n  A  14 15\n  B  14 99\n" in done.out


def test_parity_with_json_is_one_document(written: Callable[..., Path], dsv4: Dsv4) -> None:
    changed = some_pass()
    changed["layers.0.out"][0, 0, 0] = float("inf")
    changed["logits"][0, 1, 2] = float("nan")
    done = dsv4("parity", written("a", some_pass()), written("b", changed), "--json", "--rtol", "0")
    assert done.code == 1
    assert "first divergence" in done.err
    found = json.loads(done.out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert found["first_divergence"] == "layers.0.out"
    assert found["tolerance"] == {"atol": 2e-5, "rtol": 0.0, "max_ulp": 0}
    assert (found["a"]["impl"], found["b"]["ids"]["shape"]) == ("a", [1, 12])
    rows = {row["name"]: row for row in found["tensors"]}
    assert list(rows) == list(changed)
    assert rows["layers.0.out"]["max_abs"] is None
    assert rows["layers.0.out"]["values"][1] == "inf"
    assert (rows["logits"]["verdict"], rows["logits"]["at"]) == ("nan", [0, 1, 2])
    assert rows["layers.0.ffn.router_ids"]["unit"] == "row"


def test_parity_lists_what_only_one_has_and_passes(written: Callable[..., Path], dsv4: Dsv4) -> None:
    more, other = some_pass(), some_pass()
    more["mtp.0.out"] = more["embed"]
    del other["layers.0.out"]
    other["extra"] = other["embed"]
    done = dsv4("parity", written("a", more), written("b", other))
    assert done.code == 0
    assert "only in A, not compared: 2 tensors: layers.0.out, mtp.0.out\n" in done.out
    assert "only in B, not compared: 1 tensor: extra\n" in done.out


def test_parity_tolerance_is_as_told(written: Callable[..., Path], dsv4: Dsv4) -> None:
    a = written("a", {"x": torch.tensor([[100.0, 1.0]])})
    b = written("b", {"x": torch.tensor([[100.0, 1.0 + 2.0**-10]])})  # 0.000977 is 2**13 ulp
    for arguments, code in (
        ([], 1),
        (["--atol", "1e-3"], 0),
        (["--rtol", "1e-5"], 0),
        (["--atol", "0", "--rtol", "9e-6"], 1),
        (["--max-ulp", 2**13], 0),
        (["--max-ulp", 2**13 - 1], 1),
    ):
        assert dsv4("parity", a, b, *arguments).code == code, arguments


def test_parity_by_default_takes_the_librarys_tolerance(written: Callable[..., Path], dsv4: Dsv4) -> None:
    from dsv4model.parity import Tolerance

    a = written("a", some_pass())
    assert dsv4("parity", a, a, "--json").document["tolerance"] == vars(Tolerance())


def test_quiet_parity_says_nothing(written: Callable[..., Path], dsv4: Dsv4) -> None:
    a = written("a", some_pass())
    assert dsv4("parity", a, a, "-q") == (0, "", "")


def test_parity_notes_that_the_checkpoints_are_others(tmp_path: Path, dsv4: Dsv4) -> None:
    """A checkpoint and its conversion are meant to be compared; a port of one's own may not say what it ran on."""
    for name, checkpoint in (("a", {"sha256": "1"}), ("b", {"sha256": "2"}), ("c", None)):
        dumps.write_dump(str(tmp_path / name), some_pass(), dumps.about(name, "float32", IDS, checkpoint))
    for other, noted in (("a", False), ("b", True), ("c", False)):
        done = dsv4("parity", tmp_path / "a", tmp_path / other)
        assert done.code == 0
        assert ("the checkpoints are not the same files" in done.out) == noted


def test_parity_of_different_ids_is_refused(written: Callable[..., Path], dsv4: Dsv4) -> None:
    a, b = written("a", some_pass()), written("b", some_pass(), ids=[[1, 2]])
    done = dsv4("parity", a, b)
    assert done.code == 2
    assert "different token ids" in done.err
    assert "1 x 12 ids" in done.err
    assert "1 x 2 ids" in done.err
    assert "the same --ids" in done.err


def test_parity_of_another_shape_is_refused(written: Callable[..., Path], dsv4: Dsv4) -> None:
    other = some_pass()
    other["layers.0.out"] = other["layers.0.out"].transpose(1, 2).contiguous()
    done = dsv4("parity", written("a", some_pass()), written("b", other))
    assert done.code == 2
    assert "'layers.0.out'" in done.err
    assert "float32 [1, 8, 12]" in done.err


def test_parity_without_a_common_name_is_refused(written: Callable[..., Path], dsv4: Dsv4) -> None:
    done = dsv4("parity", written("a", {"x": torch.ones(1)}), written("b", {"y": torch.ones(1)}))
    assert done.code == 2
    assert "no tensor in common" in done.err


def test_parity_of_what_is_no_dump_says_so(
    written: Callable[..., Path], dsv4: Dsv4, ckpt: Path, tmp_path: Path
) -> None:
    a = written("a", some_pass())
    for other, word in ((ckpt, "no finished dump"), (tmp_path / "nowhere", "no such directory")):
        for pair in ((a, other), (other, a)):
            done = dsv4("parity", *pair)
            assert done.code == 3
            assert word in done.err


def test_parity_of_a_damaged_dump_exits_3(written: Callable[..., Path], dsv4: Dsv4) -> None:
    a, b = written("a", some_pass()), written("b", some_pass())
    file = b / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    done = dsv4("parity", a, b, "--json")
    assert done.code == 3
    assert done.document["error"]["class"] == "BadManifest"
    assert "'logits' is damaged" in done.err


@pytest.mark.parametrize("number", ["nan", "inf", "-1", "much"])
def test_tolerance_that_is_no_number_is_refused(
    number: str, written: Callable[..., Path], dsv4: Dsv4
) -> None:
    a = written("a", some_pass())
    done = dsv4("parity", a, a, f"--atol={number}")
    assert done.code == 2
    assert "2e-5" in done.err


def test_names_from_a_dump_are_harmless_on_a_terminal(written: Callable[..., Path], dsv4: Dsv4) -> None:
    a, b = written("a", some_pass()), written("b", some_pass())
    tiny.edit_json(
        b / "dump.json", lambda document: document.update(impl="a\x07b", checkpoint={"release": "\x07"})
    )
    done = dsv4("parity", a, b)
    assert done.code == 0
    assert tiny.is_plain(done.out)
