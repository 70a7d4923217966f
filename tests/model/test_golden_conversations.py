"""Conversations as they are trained on, token by token: what stands there, and what of it is learned.

Every expected line is written by hand, from the rules of the encoding, for the sample's tokenizer: tokens in the
vocabulary's own spelling (a space is G with a dot, a line break C with one), with a + before those that are learned.
Capitals have no pairs in that vocabulary, so that each is a token.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers

from dsv4ckpt.errors import MissingFile
from dsv4model import trainer
from dsv4model.corpus import Corpus
from dsv4model.loading import surveyed
from dsv4model.messages import SPECIAL_TOKENS
from dsv4model.recipe import read_recipe

VOCAB = 600  # room for the special tokens that the sample lacks
TEMPLATE = (
    "T {dsml_token}{thinking_start_token}{thinking_end_token}\\n{tool_schemas}"  # as an encoding file has it
)


@pytest.fixture(scope="module")
def source(flash: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample with every special token of the encoding, and an encoding file of its own."""
    path = tiny.copy_of(flash, tmp_path_factory.mktemp("golden") / "source")
    document = json.loads((path / "tokenizer.json").read_bytes())
    known = {item["content"] for item in document["added_tokens"]}
    missing = [token for token in SPECIAL_TOKENS if token not in known]
    form, first = document["added_tokens"][0], max(document["model"]["vocab"].values()) + 1
    document["added_tokens"] += [
        {**form, "id": first + at, "content": token} for at, token in enumerate(missing)
    ]
    tiny.replace(path / "tokenizer.json", json.dumps(document))
    (path / "encoding").mkdir()
    (path / "encoding/encoding_dsv4.py").write_text(f'TOOLS_TEMPLATE = "{TEMPLATE}"\n')
    return path


def read(source: Path, data: Path, *changes: str) -> Corpus:
    text = f'[model]\nsource = "{source}"\n[train]\nrun = "run"\nsteps = 1\n[data]\nfiles = ["{data}"]\nkind = "chat"\n'
    found, config = surveyed(source)
    made, config = read_recipe(text.encode(), changes), dataclasses.replace(config, vocab=VOCAB)
    return trainer.read_data(made, found, config).corpus


def spelled(source: Path, corpus: Corpus) -> list[str]:
    """Tokens of each document; + before those that are learned."""
    names = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    return [
        " ".join(f"{'+' if learned else ''}{names.id_to_token(token)}"
                 for token, learned in zip(document.ids, document.counted, strict=True))
        for document in corpus.documents
    ]  # fmt: skip


def says(role: str, content: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def call(number: int, arguments: str = '{"A": 2}') -> dict[str, Any]:
    return {"id": f"c{number}", "type": "function", "function": {"name": "F", "arguments": arguments}}


B, E = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
U, A = "<｜User｜>", "<｜Assistant｜>"
THINK, END = "<think>", "</think>"
CHAT = [says("system", "S."), says("user", "U?"), says("assistant", "X", reasoning_content="R"),
        says("user", "V?"), says("assistant", "Y", reasoning_content="Q")]  # fmt: skip
# <DSML>tool_calls>, and in it <DSML>invoke name="F"> and <DSML>parameter name="A" string="false">2</DSML>parameter>
OPEN = "+< +｜DSML｜ +to +o +l +_ +c +al +l +s +> +Ċ"
INVOKE = '+< +｜DSML｜ +in +v +o +k +e +Ġn +a +me += +" +F +" +> +Ċ'
PARAMETER = (
    '+< +｜DSML｜ +p +ar +a +me +t +er +Ġn +a +me += +" +A +" +Ġ +st +r +in +g += +" +f +al +se +" +> +2'
    " +< +/ +｜DSML｜ +p +ar +a +me +t +er +> +Ċ"
)
END_INVOKE = "+< +/ +｜DSML｜ +in +v +o +k +e +> +Ċ"
CLOSE = "+< +/ +｜DSML｜ +to +o +l +_ +c +al +l +s +>"
ONE_CALL = f"+Ċ +Ċ {OPEN} {INVOKE} {PARAMETER} {END_INVOKE} {CLOSE}"
TWO_CALLS = f"+Ċ +Ċ {OPEN} {INVOKE} {PARAMETER} {END_INVOKE} {INVOKE} {PARAMETER} {END_INVOKE} {CLOSE}"
TOOL, END_TOOL = "< to o l _ re s u l t >", "< / to o l _ re s u l t >"
SCHEMA = {"type": "function", "function": {"name": "F"}}
TOOLS = f'Ċ Ċ T Ġ ｜DSML｜ {THINK} {END} Ċ {{ " n a me " : Ġ " F " }}'

GOLDEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "turns of a chat, without reasoning": (
        {"messages": CHAT}, "chat",
        f"{B} S . {U} U ? {A} {END} +X +{E} {U} V ? {A} {END} +Y +{E}",
    ),
    "thinking: reasoning of the last turn, old turns without": (
        {"messages": CHAT}, "thinking",
        f"{B} S . {U} U ? {A} {END} +X +{E} {U} V ? {A} {THINK} +Q +{END} +Y +{E}",
    ),
    "thinking about nothing": (
        {"messages": [says("user", "U"), says("assistant", "X")]}, "thinking",
        f"{B} {U} U {A} {THINK} +{END} +X +{E}",
    ),
    "a masked answer is read": (
        {"messages": [*CHAT[:2], {**CHAT[2], "mask": 0}, *CHAT[3:]]}, "chat",
        f"{B} S . {U} U ? {A} {END} X {E} {U} V ? {A} {END} +Y +{E}",
    ),
    "a masked answer is read with its reasoning": (
        {"messages": [CHAT[1], {**CHAT[2], "mask": 0}, *CHAT[3:]], "tools": [SCHEMA]}, "thinking",
        f"{B} {TOOLS} {U} U ? {A} {THINK} R {END} X {E} {U} V ? {A} {THINK} +Q +{END} +Y +{E}",
    ),
    "an answer that is to be gone on with has no end": (
        {"messages": [says("user", "U"), says("assistant", "X", wo_eos=True)]}, "chat",
        f"{B} {U} U {A} {END} +X",
    ),
    "a call is learned, its result is read": (
        {"messages": [says("user", "U"), says("assistant", "X", tool_calls=[call(0)]),
                      says("tool", "W", tool_call_id="c0"), says("assistant", "Y")]}, "chat",
        f"{B} {U} U {A} {END} +X {ONE_CALL} +{E} {U} {TOOL} W {END_TOOL} {A} {END} +Y +{E}",
    ),
    "thinking with calls: what was thought before a result is dropped": (
        {"messages": [says("user", "U"), says("assistant", None, reasoning_content="R", tool_calls=[call(0)]),
                      says("tool", "W", tool_call_id="c0"), says("assistant", "Y", reasoning_content="Q")]}, "thinking",
        f"{B} {U} U {A} {END} {ONE_CALL} +{E} {U} {TOOL} W {END_TOOL} {A} {THINK} +Q +{END} +Y +{E}",
    ),
    "results stand in the order of the calls, and what a person adds after them": (
        {"messages": [says("user", "U"), says("assistant", "", tool_calls=[call(0), call(1)]),
                      says("tool", "W", tool_call_id="c1"), says("tool", "V", tool_call_id="c0"),
                      says("user", "K"), says("assistant", "Y")]}, "chat",
        f"{B} {U} U {A} {END} {TWO_CALLS} +{E} {U} {TOOL} V {END_TOOL} Ċ Ċ {TOOL} W {END_TOOL} Ċ Ċ K {A} {END} +Y +{E}",
    ),
    "tools beside the messages: the checkpoint's own words, and all reasoning is kept": (
        {"messages": CHAT, "tools": [SCHEMA]}, "thinking",
        f"{B} S . {TOOLS} {U} U ? {A} {THINK} +R +{END} +X +{E} {U} V ? {A} {THINK} +Q +{END} +Y +{E}",
    ),
    "tools without a system message": (
        {"messages": CHAT[1:3], "tools": [SCHEMA]}, "chat",
        f"{B} {TOOLS} {U} U ? {A} {END} +X +{E}",
    ),
    "the answer to a task has no reasoning": (
        {"messages": [says("user", "U", task="domain"), says("assistant", "X", reasoning_content="R")]}, "thinking",
        f"{B} {U} U <｜domain｜> +X +{E}",
    ),
    "the task action follows the turn's opening": (
        {"messages": [says("user", "U", task="action"), says("assistant", "X", reasoning_content="R")]}, "thinking",
        f"{B} {U} U {A} {THINK} <｜action｜> +X +{E}",
    ),
    "a developer asks as a person does": (
        {"messages": [says("developer", "D"), says("assistant", "X")]}, "chat",
        f"{B} {U} D {A} {END} +X +{E}",
    ),
    "a token that is half a reminder's and half an answer's is not learned": (
        {"messages": [says("user", "U"), says("latest_reminder", "t"), says("assistant", "he")]}, "chat",
        f"{B} {U} U {A} {END} <｜latest_reminder｜> th +e +{E}",
    ),
    "bytes of a letter beyond ASCII": (
        {"messages": [says("user", "Ü"), says("assistant", "Ö")]}, "chat",
        f"{B} {U} Ã ľ {A} {END} +Ã +ĸ +{E}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", GOLDEN)
def test_golden_conversation_is_learned_token_by_token(what: str, source: Path, tmp_path: Path) -> None:
    line, mode, expected = GOLDEN[what]
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    corpus = read(source, tmp_path / "data.jsonl", f"data.thinking={mode}")
    assert spelled(source, corpus) == [expected]


def test_tools_without_an_encoding_file_are_refused_before_the_first_step(
    flash: Path, tmp_path: Path
) -> None:
    """What introduces them is the checkpoint's to say: a wording that is nearly right is wrong."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": CHAT, "tools": [SCHEMA]}))
    with pytest.raises(MissingFile) as told:
        read(flash, tmp_path / "data.jsonl")
    assert told.value.facts["file"] == "encoding" and "tools" in str(told.value.facts["do"])
