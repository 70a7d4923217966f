"""A checkpoint's own encoding file: what is run, what is only read, and what is refused.  The files are made here."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from dsv4ckpt import formats
from dsv4ckpt.errors import MissingFile, UnsafePath
from dsv4model import chat, trusted
from dsv4model.trusted import BadEncoding

HI: list[Any] = [{"role": "user", "content": "Hi"}]
RUNS = '''
"""An encoding file: a dataclass needs its module, a global keeps what it was asked."""
from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Kept:
    options: dict[str, str]

KEPT = Kept({})

def encode_messages(messages, thinking_mode, drop_thinking=True, reasoning_effort=None):
    assert thinking_mode != "chat", "no chat here"
    return f"{messages[0]['content']}|{thinking_mode}|{drop_thinking}|{reasoning_effort}"
'''
TOOLS = "## {dsml_token} {thinking_start_token} {thinking_end_token} {thinking_end_token}\n{tool_schemas}"
JULY = f'''
import json
response_format_template: str = ("# Format\\n"
    "{{schema}}")
REASONING_EFFORT_PROMPTS: dict[str, str] = {{"low": "", "high": ("Think " "hard."), "max": "Think harder."}}
TOOLS_TEMPLATE = """{TOOLS}"""
raise RuntimeError("nobody runs this")
'''


def checkpoint_with(at: Path, text: str | bytes, name: str = "encoding_dsv4.py") -> str:
    """A folder with one encoding file."""
    (at / "encoding").mkdir(exist_ok=True)
    (at / "encoding" / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(at)


# ---- running it


@pytest.mark.parametrize("name", ["encoding_dsv4.py", "encoding.py"])
def test_load_runs_the_file_and_encodes_with_it(tmp_path: Path, name: str) -> None:
    own = trusted.load(checkpoint_with(tmp_path, RUNS, name))
    assert own.file == f"encoding/{name}"
    assert own.sha256 == hashlib.sha256(RUNS.encode()).hexdigest()
    assert own.encode(HI, "thinking") == "Hi|thinking|True|None"
    assert own.encode(HI, "thinking", drop_thinking=False, reasoning_effort="max") == "Hi|thinking|False|max"


def test_load_leaves_no_module_and_no_file_behind(tmp_path: Path) -> None:
    directory = checkpoint_with(tmp_path, RUNS)
    trusted.load(directory)
    assert [name for name in sys.modules if "trusted_encoding" in name] == []
    assert [file.name for file in sorted(tmp_path.rglob("*"))] == ["encoding", "encoding_dsv4.py"]


def test_load_passes_only_options_that_differ_from_the_defaults(tmp_path: Path) -> None:
    text = "def encode_messages(messages, thinking_mode): return thinking_mode"
    assert trusted.load(checkpoint_with(tmp_path, text)).encode(HI, "chat") == "chat"


def test_load_ignores_other_files_of_the_folder(tmp_path: Path) -> None:
    directory = checkpoint_with(tmp_path, RUNS)
    for name in ("test_encoding_dsv4.py", "README.md", "encoding_dsv4.py.bak", "encoding_dsv4.pyc"):
        (tmp_path / "encoding" / name).write_text("raise SystemExit")
    assert trusted.load(directory).file == "encoding/encoding_dsv4.py"


def test_encode_what_the_file_refuses_tells_its_words(tmp_path: Path) -> None:
    own = trusted.load(checkpoint_with(tmp_path, RUNS))
    with pytest.raises(BadEncoding, match="refuses this conversation: AssertionError: 'no chat here'"):
        own.encode(HI, "chat")


def test_encode_that_gives_no_text_is_refused(tmp_path: Path) -> None:
    own = trusted.load(checkpoint_with(tmp_path, "def encode_messages(messages, thinking_mode): return [1]"))
    with pytest.raises(BadEncoding, match="gives no text but 'list'"):
        own.encode(HI)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def encode(messages): pass", "no function encode_messages"),
        ("encode_messages = 3", "no function encode_messages"),
        ("import no_such_module_anywhere", "does not run: ModuleNotFoundError"),
        ("1 / 0", "does not run: ZeroDivisionError"),
        ("def (", "does not run: SyntaxError"),
        ("x = '\0'", "does not run"),
        (b"x = '\xff'", "no UTF-8"),
        ("#" * (formats.MAX_CONFIG_BYTES + 1), "too large"),
    ],
)
def test_load_file_that_is_no_encoding_is_refused(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(BadEncoding, match=words) as refusal:
        trusted.load(checkpoint_with(tmp_path, text))
    assert refusal.value.facts["file"] == "encoding/encoding_dsv4.py"
    assert tiny.is_plain(str(refusal.value))


# ---- reading it


def test_read_texts_takes_constants_and_runs_nothing(tmp_path: Path) -> None:
    texts = trusted.read_texts(checkpoint_with(tmp_path, JULY))
    assert texts == chat.Texts(
        tools=TOOLS,
        response_format="# Format\n{schema}",
        efforts={"low": "", "high": "Think hard.", "max": "Think harder."},
    )


def test_read_texts_fill_our_own_encoding(tmp_path: Path) -> None:
    texts = trusted.read_texts(checkpoint_with(tmp_path, JULY))
    tool = {"type": "function", "function": {"name": "f"}}
    conversation: list[Any] = [{"role": "system", "tools": [tool]}, *HI]
    assert chat.encode(conversation, "thinking", reasoning_effort="high", texts=texts) == (
        "<｜begin▁of▁sentence｜>Think hard.\n\n## ｜DSML｜ <think> </think> </think>\n"
        '{"name": "f"}<｜User｜>Hi<｜Assistant｜><think>'
    )


def test_read_texts_of_the_april_form_high_writes_nothing(tmp_path: Path) -> None:
    texts = trusted.read_texts(checkpoint_with(tmp_path, 'REASONING_EFFORT_MAX = ("Think " "more.")'))
    assert texts == chat.Texts(efforts={"high": "", "max": "Think more."})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "TOOLS_TEMPLATE = open('x').read()",
        "TOOLS_TEMPLATE = 'a {schema}'.lower()",
        f"TOOLS_TEMPLATE = {TOOLS!r}\nTOOLS_TEMPLATE = {TOOLS!r}",
        f"if True:\n    TOOLS_TEMPLATE = {TOOLS!r}",
        "TOOLS_TEMPLATE: str",
    ],
)
def test_read_texts_what_is_no_plain_constant_is_not_known(tmp_path: Path, text: str) -> None:
    assert trusted.read_texts(checkpoint_with(tmp_path, text)) == chat.Texts()


@pytest.mark.parametrize(
    "text",
    [
        "TOOLS_TEMPLATE = 'no slots'",
        f"TOOLS_TEMPLATE = {TOOLS + '{more}'!r}",
        f"TOOLS_TEMPLATE = {TOOLS + '{tool_schemas.x}'!r}",
        f"TOOLS_TEMPLATE = {TOOLS + '{{}}'!r}",
        "TOOLS_TEMPLATE = 7",
        "response_format_template = '{schema} {0}'",
        "REASONING_EFFORT_PROMPTS = {'high': 3}",
        "REASONING_EFFORT_PROMPTS = ['high']",
        "def (",
        "(" * 5000,
    ],
)
def test_read_texts_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadEncoding):
        trusted.read_texts(checkpoint_with(tmp_path, text))


def test_read_texts_only_reads(tmp_path: Path) -> None:
    directory = checkpoint_with(tmp_path, JULY)
    with tiny.recorded_events() as events:
        trusted.read_texts(directory)
    assert [line for line in tiny.not_only_reading(events, tmp_path) if not line.startswith("compile")] == []


# ---- which file

BOTH = pytest.mark.parametrize("entry", [trusted.load, trusted.read_texts], ids=["load", "read_texts"])


@BOTH
def test_checkpoint_without_an_encoding_file_is_refused(tmp_path: Path, entry: Any) -> None:
    with pytest.raises(MissingFile, match="no encoding file of its own"):
        entry(str(tmp_path))
    (tmp_path / "encoding").mkdir()
    with pytest.raises(MissingFile, match=r"encoding_\*\.py or encoding\.py"):
        entry(str(tmp_path))


@BOTH
def test_checkpoint_with_two_encoding_files_is_refused(tmp_path: Path, entry: Any) -> None:
    checkpoint_with(tmp_path, RUNS, "encoding.py")
    with pytest.raises(MissingFile, match="several encoding files"):
        entry(checkpoint_with(tmp_path, RUNS))


@BOTH
def test_encoding_file_that_is_a_link_outside_is_refused(tmp_path: Path, entry: Any) -> None:
    checkpoint_with(tmp_path, RUNS)
    other = tmp_path / "other"
    (other / "encoding").mkdir(parents=True)
    (other / "encoding" / "encoding_dsv4.py").symlink_to(tmp_path / "encoding" / "encoding_dsv4.py")
    with pytest.raises(UnsafePath):
        entry(str(other))
    entry(str(other), follow_links=True)


@BOTH
def test_encoding_folder_that_is_a_link_is_refused(tmp_path: Path, entry: Any) -> None:
    checkpoint_with(tmp_path, RUNS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "encoding").symlink_to(tmp_path / "encoding")
    with pytest.raises(UnsafePath):
        entry(str(tmp_path / "other"), follow_links=True)


@BOTH
def test_encoding_file_that_is_a_fifo_or_a_folder_is_refused_at_once(tmp_path: Path, entry: Any) -> None:
    (tmp_path / "encoding").mkdir()
    os.mkfifo(tmp_path / "encoding" / "encoding_dsv4.py")
    with tiny.at_most(10), pytest.raises(UnsafePath):
        entry(str(tmp_path))
    os.unlink(tmp_path / "encoding" / "encoding_dsv4.py")
    (tmp_path / "encoding" / "encoding_dsv4.py").mkdir()
    with pytest.raises(UnsafePath):
        entry(str(tmp_path))


@BOTH
def test_encoding_file_in_a_hub_cache_is_a_link_to_a_blob(tmp_path: Path, entry: Any) -> None:
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "123").write_text(RUNS)
    folder = cache / "snapshots" / "rev" / "encoding"
    folder.mkdir(parents=True)
    (folder / "encoding_dsv4.py").symlink_to("../../../blobs/123")
    entry(str(cache / "snapshots" / "rev"))
