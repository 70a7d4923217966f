"""dsv4 generate as a newcomer uses it, with the mistakes people make."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers
import torch
from dsv4cli import generate as verb
from in_process import Dsv4
from in_process import dsv4 as dsv4

from dsv4ckpt import plan, run
from dsv4ckpt.formats import Target
from dsv4ckpt.names import Namespace
from dsv4model import loading

SIZES: dict[str, Any] = {"hidden": 128, "intermediate": 32, "experts": 6, "heads": 2, "vocab": 512}
BOS, EOS, USER, ASSISTANT, THINK, END_THINK = 0, 1, 3, 4, 5, 6


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, so that every kind of attention is there, and an MTP block. Nobody writes into it."""
    return tiny.make_sample("flash", tmp_path_factory.mktemp("generate") / "flash", **SIZES)


@pytest.fixture
def copied(ckpt: Path, tmp_path: Path) -> Path:
    """The same, of the test's own."""
    return tiny.copy_of(ckpt, tmp_path / "copy")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake is told before a model is loaded for nothing."""

    def fail(*arguments: Any, **named: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load", fail)


def in_bytes(text: str) -> list[int]:
    """Ids of a text without any of the sample's pairs."""
    return [7 + byte for byte in text.encode()]


# ---- what it says


@pytest.mark.slow
def test_every_form_of_a_checkpoint_says_the_same(ckpt: Path, tmp_path: Path, dsv4: Dsv4) -> None:
    """As released, packed, and as BF16 in both namespaces: the values are the same, so in float32 the ids are."""
    forms: list[list[object]] = [[ckpt], [ckpt, "--experts", "packed"]]
    for space in Namespace:
        options = plan.ConvertOptions(target=Target.BF16, namespace=space)
        surveyed, out = tiny.survey_of(ckpt), tmp_path / space.value
        run.execute(plan.make_plan(surveyed, options), surveyed.checkpoint, str(out), num_workers=1)
        forms.append([out])
    asked = ["--text", "XYZ", "--dtype", "float32", "--max-new-tokens", "24", "--json"]
    told = []
    for form in forms:
        done = dsv4("generate", *form, *asked)
        assert done.code == 0, done.err
        told.append(done.document)
    assert told[0] == told[2] == told[3]
    assert told[1]["ids"] == told[0]["ids"]
    assert len(set(told[0]["ids"])) > 8


def test_document_holds_what_was_said(ckpt: Path, dsv4: Dsv4) -> None:
    done = dsv4("generate", ckpt, "--text", "XYZ", "--max-new-tokens", 6, "--json")
    told = done.document
    assert told["prompt_ids"] == [BOS, *in_bytes("XYZ")]
    assert (told["num_prompt_tokens"], told["num_new_tokens"], len(told["ids"])) == (4, 6, 6)
    assert told["stop"] == "max new tokens"
    assert list(told) == ["text", "stop", "ids", "prompt_ids", "num_prompt_tokens", "num_new_tokens"]
    vocabulary = json.loads((ckpt / "tokenizer.json").read_bytes())["model"]["vocab"]
    words = {number: token for token, number in vocabulary.items()}
    ascii_words = [words[number] for number in told["ids"] if words[number].isascii()]
    assert ascii_words == [word for word in ascii_words if word in told["text"]]
    assert "4 tokens in " in done.err
    assert "6 tokens, " in done.err
    assert "ended by max new tokens" in done.err


@pytest.mark.slow
def test_text_goes_to_stdout_and_facts_to_stderr(ckpt: Path, dsv4: Dsv4) -> None:
    asked = ["--text", "XYZ", "--max-new-tokens", 16]
    text = dsv4("generate", ckpt, *asked, "--json").document["text"]
    spoken = dsv4("generate", ckpt, *asked)
    assert (spoken.code, spoken.out) == (0, text + "\n")
    assert spoken.err.startswith("flash, stored as fp4+fp8\n")
    assert "tokens/s" in spoken.err
    quiet = dsv4("generate", ckpt, *asked, "-q")
    assert quiet == (0, text + "\n", "")


@pytest.mark.slow
def test_text_is_that_of_all_ids_also_where_it_ends_within_a_character(ckpt: Path, dsv4: Dsv4) -> None:
    """Sampled hot, so that bytes of all kinds come; decoded by the library itself."""
    theirs = tokenizers.Tokenizer.from_file(str(ckpt / "tokenizer.json"))
    ends = set()
    for seed in range(6):
        asked = ["--text", "X", "--temperature", 9, "--seed", seed, "--max-new-tokens", 5, "--json"]
        told = dsv4("generate", ckpt, *asked).document
        assert told["text"] == theirs.decode(told["ids"], skip_special_tokens=False)
        ends.add(told["text"].endswith("\ufffd"))
    assert ends == {True, False}


@pytest.mark.slow
def test_same_seed_says_the_same_and_another_one_something_else(ckpt: Path, dsv4: Dsv4) -> None:
    def ids(*options: object) -> Any:
        return dsv4("generate", ckpt, "--text", "X", "--max-new-tokens", 8, "--json", *options).document[
            "ids"
        ]

    assert ids("--temperature", 1, "--seed", 7) == ids("--temperature", 1, "--seed", 7)
    assert ids("--temperature", 1, "--seed", 7) != ids("--temperature", 1, "--seed", 8)
    assert ids("--temperature", 1, "--top-p", 1e-9) == ids() == ids("--seed", 8)


@pytest.mark.slow
def test_end_token_ends_it_and_is_not_shown(ckpt: Path, copied: Path, dsv4: Dsv4) -> None:
    """The end token of the config; here it is made one that comes third."""
    asked = ["--text", "XYZ", "--dtype", "float32", "--json"]
    free = dsv4("generate", ckpt, *asked, "--max-new-tokens", 5).document
    assert free["ids"][2] not in free["ids"][:2]
    tiny.edit_json(copied / "config.json", lambda document: document.update(eos_token_id=free["ids"][2]))
    done = dsv4("generate", copied, *asked)
    told = done.document
    assert told["ids"] == free["ids"][:3]
    assert told["stop"] == "end token"
    assert free["text"].startswith(told["text"].rstrip("\ufffd"))
    assert told["text"] == dsv4("generate", ckpt, *asked, "--max-new-tokens", 2).document["text"]
    assert "ended by end token" in done.err


@pytest.mark.slow
def test_tokens_that_the_tokenizer_does_not_have_are_never_drawn(tmp_path: Path, dsv4: Dsv4) -> None:
    """Of 2,000 rows 512 have a token; this hot, all rows are as likely."""
    wide = tiny.make_sample("flash", tmp_path / "wide", **SIZES | {"layers": 1, "vocab": 2000})
    done = dsv4("generate", wide, "--text", "X", "--temperature", 1e6, "--max-new-tokens", 40, "--json")
    assert done.code == 0, done.err
    assert max(done.document["ids"]) < 512
    assert len(set(done.document["ids"])) > 20


@pytest.mark.slow
def test_notes_say_what_is_left_out(tmp_path: Path, dsv4: Dsv4) -> None:
    for release, word in (
        ("flash-0731", "tensors of DSpark's stages are not used"),
        ("flash-base", "this is a base model"),
    ):
        path = tiny.make_sample(release, tmp_path / release, **SIZES | {"layers": 1})
        done = dsv4("generate", path, "--text", "Hi", "--chat", "--max-new-tokens", 1)
        assert done.code == 0, done.err
        assert word in done.err


# ---- prompts


PROMPTS: dict[str, tuple[list[object], list[int]]] = {
    "text": (["--text", "XYZ"], [BOS, *in_bytes("XYZ")]),
    "text that begins with the begin token": (
        ["--text", "<｜begin▁of▁sentence｜><｜User｜>XY"],
        [BOS, USER, *in_bytes("XY")],
    ),
    "file, last line end included": (["--file", "FILE"], [BOS, *in_bytes("\u00fc Y\n")]),
    "ids": (["--ids", "IDS"], [5, 17, 200]),
    "chat": (["--text", "Q?", "--chat"], [BOS, USER, *in_bytes("Q?"), ASSISTANT, END_THINK]),
    "thinking": (["--text", "Q?", "--chat", "--thinking"], [BOS, USER, *in_bytes("Q?"), ASSISTANT, THINK]),
    "system": (
        ["--file", "FILE", "--chat", "--system", "S!"],
        [BOS, *in_bytes("S!"), USER, *in_bytes("\u00fc Y\n"), ASSISTANT, END_THINK],
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_is_token_for_token(name: str, ckpt: Path, tmp_path: Path, dsv4: Dsv4) -> None:
    (tmp_path / "FILE").write_bytes("\u00fc Y\n".encode())
    (tmp_path / "IDS").write_text("[5, 17, 200]")
    arguments, wanted = PROMPTS[name]
    given = [tmp_path / str(word) if word in ("FILE", "IDS") else word for word in arguments]
    done = dsv4("generate", ckpt, *given, "--max-new-tokens", 1, "--json")
    assert done.code == 0, done.err
    assert done.document["prompt_ids"] == wanted


ENCODING = """
from pathlib import Path
Path({marker!r}).touch()

def encode_messages(messages, thinking_mode):
    return "<\uff5cUser\uff5c>" + thinking_mode[0] + "".join(message["role"][0] for message in messages)
"""


def test_encoding_file_of_the_checkpoint_runs_only_if_it_is_trusted(
    copied: Path, tmp_path: Path, dsv4: Dsv4
) -> None:
    (copied / "encoding").mkdir()
    marker = tmp_path / "it ran"
    (copied / "encoding" / "encoding_dsv4.py").write_text(ENCODING.format(marker=str(marker)))
    asked = ["--text", "Q?", "--system", "S!", "--chat", "--thinking", "--max-new-tokens", 1, "--json"]
    assert dsv4("generate", copied, *asked).document["prompt_ids"][-1] == THINK
    assert not marker.exists()
    trusted = dsv4("generate", copied, *asked, "--trust-encoding")
    assert trusted.document["prompt_ids"] == [USER, *in_bytes("tsu")]
    assert marker.exists()


# ---- mistakes


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["CKPT"], 2, "one of --text TEXT, --file FILE and --ids FILE"),
        (["CKPT", "--text", "a", "--ids", "IDS"], 2, "one of --text TEXT, --file FILE and --ids FILE"),
        (["CKPT", "--text", ""], 2, "the prompt is empty"),
        (["CKPT", "--text", "", "--chat"], 2, "the prompt is empty"),
        (["CKPT", "--file", "EMPTY"], 2, "the prompt is empty"),
        (["CKPT", "--ids", "NO_IDS"], 2, "the prompt is empty"),
        (["CKPT", "--ids", "ROWS"], 2, "2 lists of ids"),
        (["CKPT", "--ids", "FAR"], 2, "not in the vocabulary"),
        (["CKPT", "--ids", "LATIN"], 2, "no list of token ids"),
        (["CKPT", "--file", "LATIN"], 2, "not UTF-8"),
        (["CKPT", "--file", "NOWHERE"], 2, "does not exist"),
        (["CKPT", "--ids", "IDS", "--chat"], 2, "--chat makes a message of a text"),
        (["CKPT", "--text", "a", "--thinking"], 2, "add --chat"),
        (["CKPT", "--text", "a", "--system", "b"], 2, "add --chat"),
        (["CKPT", "--text", "a", "--system", ""], 2, "add --chat"),
        (["CKPT", "--text", "a", "--trust-encoding"], 2, "add --chat"),
        (["CKPT", "--text", "a<think>", "--chat"], 2, "a special token inside a text"),
        (["CKPT", "--text", "a\udcff"], 2, "half a character"),
        (["CKPT", "--text", "a\udcff", "--chat"], 2, "half a character"),
        (["CKPT", "--text", "a", "--chat", "--trust-encoding"], 3, "no encoding file of its own"),
        (["CKPT", "--text", "a", "--temperature", "-1"], 2, "no temperature"),
        (["CKPT", "--text", "a", "--temperature", "nan"], 2, "no temperature"),
        (["CKPT", "--text", "a", "--top-p", "0"], 2, "no top_p"),
        (["CKPT", "--text", "a", "--max-new-tokens", "0"], 2, "x>=1"),
        (["CKPT", "--text", "a", "--max-new-tokens", "2000000"], 2, "more than the model's positions"),
        (["CKPT", "--text", "a", "--seed", "-1"], 2, "0<=x"),
        (["CKPT", "--text", "a", "--dtype", "float16"], 2, "bfloat16"),
        (["CKPT", "--text", "a", "--device", "tpu"], 2, "cuda"),
        (["NOWHERE", "--text", "a"], 3, "no such file or directory"),
        (["SHARD", "--text", "a"], 3, "no config.json"),
    ],
)
def test_mistake_gets_its_exit_code_and_a_helpful_word(
    arguments: list[str], code: int, word: str, ckpt: Path, tmp_path: Path, dsv4: Dsv4
) -> None:
    files = {"IDS": "[1, 2]", "EMPTY": "", "NO_IDS": "[]", "ROWS": "[[1], [2]]", "FAR": "[1, 512]"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "LATIN").write_bytes(b"\xe9")
    places = {name: tmp_path / name for name in (*files, "LATIN", "NOWHERE")}
    places |= {"CKPT": ckpt, "SHARD": ckpt / tiny.EMBED}
    done = dsv4("generate", *(places.get(word, word) for word in arguments))
    assert (done.code, done.out) == (code, ""), done.err
    assert word in done.err
    assert "Traceback" not in done.err


@pytest.mark.usefixtures("no_model")
def test_long_prompt_is_refused_with_its_length(copied: Path, tmp_path: Path, dsv4: Dsv4) -> None:
    tiny.edit_json(copied / "config.json", lambda document: document.update(max_position_embeddings=300))
    (tmp_path / "long").write_text("X" * 300)
    done = dsv4("generate", copied, "--file", tmp_path / "long")
    assert done.code == 2
    assert "at most 300 together" in done.err
    assert "301 in the prompt, 64 new ones" in done.err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("source", ["--text", "--ids"])
def test_checkpoint_without_tokenizer_is_refused(
    source: str, copied: Path, tmp_path: Path, dsv4: Dsv4
) -> None:
    (tmp_path / "17").write_text("17")
    (copied / "tokenizer.json").unlink()
    done = dsv4("generate", copied, source, tmp_path / "17")
    assert done.code == 3
    assert "the checkpoint has no tokenizer" in done.err
    assert "do " in done.err


@pytest.mark.usefixtures("no_model")
def test_tokenizer_of_another_checkpoint_is_refused(copied: Path, dsv4: Dsv4) -> None:
    """An X of id 95 becomes one of id 95,000."""

    def move(document: Any) -> None:
        document["model"]["vocab"]["X"] = 95_000

    tiny.edit_json(copied / "tokenizer.json", move)
    done = dsv4("generate", copied, "--text", "X")
    assert done.code == 2
    assert "use the tokenizer that belongs to this checkpoint" in done.err


@pytest.mark.parametrize("release", ["v4.1-flash", "vision-exp"])
@pytest.mark.slow
def test_models_that_we_do_not_know_are_refused(release: str, tmp_path: Path, dsv4: Dsv4) -> None:
    path = tiny.make_sample(release, tmp_path / "other")
    done = dsv4("generate", path, "--text", "a", "--json")
    assert done.code == 3
    assert done.document["error"]["class"] == "BadConfig"
    assert "dsv4model knows the text models of V4 only" in done.err


@pytest.mark.slow
def test_packed_of_a_converted_checkpoint_is_refused(tmp_path: Path, ckpt: Path, dsv4: Dsv4) -> None:
    surveyed = tiny.survey_of(ckpt)
    run.execute(
        plan.make_plan(surveyed, plan.ConvertOptions(target=Target.BF16, layers=(0,))),
        surveyed.checkpoint,
        str(tmp_path / "bf16"),
        num_workers=1,
    )
    done = dsv4("generate", tmp_path / "bf16", "--text", "a", "--experts", "packed")
    assert done.code == 2
    assert 'experts="dense"' in done.err


def test_device_that_is_not_here_is_the_environments_fault(
    ckpt: Path, dsv4: Dsv4, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = dsv4("generate", ckpt, "--text", "a", "--device", "cuda")
    assert done.code == 4
    assert "no CUDA device" in done.err


# ---- terminals, pipes, signals


def test_terminal_gets_no_control_codes_and_a_pipe_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "\u00fc\n\t\x1b[2J\x07\u202e\r"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert verb._shown(said) == said
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert verb._shown(said) == "\u00fc\n\t\\x1b[2J\\x07\\u202e\\r"


@pytest.mark.slow
def test_text_is_utf8_whatever_the_terminal_is_set_to(ckpt: Path, dsv4: Dsv4) -> None:
    asked = ["generate", str(ckpt), "--text", "XYZ", "--max-new-tokens", "12"]
    text = dsv4(*asked, "--json").document["text"]
    assert not text.isascii()
    spoken = subprocess.run(
        [sys.executable, "-m", "dsv4cli", *asked, "-q"],
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"},
    )
    assert (spoken.returncode, spoken.stdout) == (0, f"{text}\n".encode())


@pytest.mark.slow
def test_help_imports_no_torch() -> None:
    program = (
        "import sys\n"
        "from dsv4cli import main as cli\n"
        "cli.dsv4.main(args=['generate', '--help'], standalone_mode=False)\n"
        "sys.exit(9 if 'torch' in sys.modules else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_it_at_once_after_what_was_said(number: int, code: int, ckpt: Path) -> None:
    """What has been said is out before the next token is computed: the first bytes come from a process at work."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dsv4cli", "generate", ckpt, "--text", "X", "--max-new-tokens", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    first = process.stdout.read1(1)  # type: ignore[attr-defined]
    assert first
    assert process.poll() is None
    process.send_signal(number)
    _, words = process.communicate(timeout=20)
    assert process.returncode == code
    assert words == b"flash, stored as fp4+fp8\n"
