"""The chat encoding against golden texts written by hand from the rules, one rule at a time.

Owns no second implementation: every expected text stands here in full.
"""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4ckpt.errors import Usage
from dsv4model import chat, messages
from dsv4model.chat import BadCompletion, Piece, Texts, encode, encode_with_spans, parse_completion

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TEXTS = Texts(
    tools="# Tools <{dsml_token}x> {thinking_start_token}{thinking_end_token}\n{tool_schemas}\nEnd.",
    response_format="# Format\n{schema}",
    efforts={"low": "", "high": "Think hard.\n\n", "max": "Think harder.\n\n"},
)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "town": "Köln"}},
}


def says(role: str, content: str | None = None, **fields: Any) -> Any:
    return {"role": role, "content": content, **fields}


def calls(*arguments: str, ids: bool = True, name: str = "weather") -> list[dict[str, Any]]:
    """Tool calls of these arguments with the ids c0, c1, ..."""
    made: list[dict[str, Any]] = []
    for index, text in enumerate(arguments):
        call_id = {"id": f"c{index}"} if ids else {}
        made.append({**call_id, "type": "function", "function": {"name": name, "arguments": text}})
    return made


USER, OLD = says("user", "Hi"), says("assistant", "Hello", reasoning_content="a greeting")
AGAIN = says("user", "Sum?")
BLOCK = (
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="town" string="true">Köln</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
ASKS = says("assistant", "Let me see.", tool_calls=calls('{"town": "Köln", "days": 2}'))


# ---- golden conversations

GOLDEN: dict[str, tuple[str, list[Any], str]] = {
    "a user message, chat": ("chat", [USER], "<｜User｜>Hi<｜Assistant｜></think>"),
    "a user message, thinking": ("thinking", [USER], "<｜User｜>Hi<｜Assistant｜><think>"),
    "a system text has no token": (
        "chat",
        [says("system", "Be brief."), USER],
        "Be brief.<｜User｜>Hi<｜Assistant｜></think>",
    ),
    "only a system text": ("thinking", [says("system", "Be brief.")], "Be brief."),
    "a system text between turns": (
        "chat",
        [USER, says("assistant", "Yes"), says("system", "Now shout."), AGAIN],
        f"<｜User｜>Hi<｜Assistant｜></think>Yes{EOS}Now shout.<｜User｜>Sum?<｜Assistant｜></think>",
    ),
    "chat leaves reasoning out": (
        "chat",
        [USER, OLD, AGAIN],
        f"<｜User｜>Hi<｜Assistant｜></think>Hello{EOS}<｜User｜>Sum?<｜Assistant｜></think>",
    ),
    "old reasoning is dropped": (
        "thinking",
        [USER, OLD, AGAIN],
        f"<｜User｜>Hi<｜Assistant｜></think>Hello{EOS}<｜User｜>Sum?<｜Assistant｜><think>",
    ),
    "the last reasoning stays": (
        "thinking",
        [USER, OLD],
        f"<｜User｜>Hi<｜Assistant｜><think>a greeting</think>Hello{EOS}",
    ),
    "no reasoning is an empty one": (
        "thinking",
        [USER, says("assistant", "Hello")],
        f"<｜User｜>Hi<｜Assistant｜><think></think>Hello{EOS}",
    ),
    "a developer text opens a user turn": (
        "thinking",
        [says("developer", "Search."), says("assistant", "ok")],
        f"<｜User｜>Search.<｜Assistant｜><think></think>ok{EOS}",
    ),
    "an old developer text is dropped": (
        "thinking",
        [says("system", "S."), says("developer", "Search."), OLD, AGAIN],
        f"S.Hello{EOS}<｜User｜>Sum?<｜Assistant｜><think>",
    ),
    "an old developer text stays in chat": (
        "chat",
        [says("developer", "Search."), OLD, AGAIN],
        f"<｜User｜>Search.<｜Assistant｜></think>Hello{EOS}<｜User｜>Sum?<｜Assistant｜></think>",
    ),
    "a reminder before the user": (
        "chat",
        [says("system", "S."), says("latest_reminder", "2026-08-11, London"), USER],
        "S.<｜latest_reminder｜>2026-08-11, London<｜User｜>Hi<｜Assistant｜></think>",
    ),
    "a reminder after the user": (
        "thinking",
        [USER, says("latest_reminder", "now"), OLD],
        f"<｜User｜>Hi<｜Assistant｜><think><｜latest_reminder｜>nowa greeting</think>Hello{EOS}",
    ),
    "user messages in a row are one turn": (
        "chat",
        [USER, AGAIN],
        "<｜User｜>Hi\n\nSum?<｜Assistant｜></think>",
    ),
    "a message without EOS is gone on with": (
        "thinking",
        [USER, {**OLD, "wo_eos": True}],
        "<｜User｜>Hi<｜Assistant｜><think>a greeting</think>Hello",
    ),
    "a tool call": ("chat", [USER, ASKS], f"<｜User｜>Hi<｜Assistant｜></think>Let me see.\n\n{BLOCK}{EOS}"),
    "a tool call without text": (
        "thinking",
        [USER, {**ASKS, "content": None, "reasoning_content": "look"}],
        f"<｜User｜>Hi<｜Assistant｜><think>look</think>\n\n{BLOCK}{EOS}",
    ),
    "a tool result": (
        "chat",
        [USER, ASKS, says("tool", "22 °C", tool_call_id="c0")],
        f"<｜User｜>Hi<｜Assistant｜></think>Let me see.\n\n{BLOCK}{EOS}"
        "<｜User｜><tool_result>22 °C</tool_result><｜Assistant｜></think>",
    ),
    "a task of one token": ("thinking", [{**USER, "task": "query"}], "<｜User｜>Hi<｜query｜>"),
    "the task action, thinking": (
        "thinking",
        [{**USER, "task": "action"}],
        "<｜User｜>Hi<｜Assistant｜><think><｜action｜>",
    ),
    "the task action, chat": (
        "chat",
        [{**USER, "task": "action"}],
        "<｜User｜>Hi<｜Assistant｜></think><｜action｜>",
    ),
    "a task's answer has no reasoning": (
        "thinking",
        [{**USER, "task": "domain"}, OLD],
        f"<｜User｜>Hi<｜domain｜>Hello{EOS}",
    ),
    "a title for an answer": (
        "thinking",
        [USER, {**OLD, "task": "title"}, says("assistant", "Greeting")],
        f"<｜User｜>Hi<｜Assistant｜><think>a greeting</think>Hello{EOS}<｜title｜>Greeting{EOS}",
    ),
}


@pytest.mark.parametrize(("mode", "conversation", "text"), GOLDEN.values(), ids=GOLDEN)
def test_encode_golden_conversation_is_exact(mode: str, conversation: list[Any], text: str) -> None:
    assert encode(conversation, mode) == BOS + text


@pytest.mark.parametrize("task", ["query", "authority", "domain", "title", "read_url"])
def test_encode_task_appends_its_own_token(task: str) -> None:
    assert encode([{**USER, "task": task}], "chat") == f"{BOS}<｜User｜>Hi<｜{task}｜>"


def test_encode_kept_thinking_shows_every_reasoning() -> None:
    assert encode([USER, OLD, AGAIN], "thinking", drop_thinking=False) == (
        f"{BOS}<｜User｜>Hi<｜Assistant｜><think>a greeting</think>Hello{EOS}<｜User｜>Sum?<｜Assistant｜><think>"
    )


def test_encode_kept_thinking_keeps_developer_messages_and_empty_reasoning() -> None:
    conversation = [says("developer", "D."), says("assistant", "ok"), AGAIN]
    assert encode(conversation, "thinking", drop_thinking=False) == (
        f"{BOS}<｜User｜>D.<｜Assistant｜><think></think>ok{EOS}<｜User｜>Sum?<｜Assistant｜><think>"
    )


def test_encode_leaves_the_messages_alone() -> None:
    conversation = [USER, copy.deepcopy(ASKS), says("tool", "1", tool_call_id="c0"), OLD, AGAIN]
    before = copy.deepcopy(conversation)
    encode(conversation, "thinking")
    assert conversation == before


# ---- tools, formats, efforts: with texts of our own, and without


def test_encode_tools_fill_the_template_and_keep_all_reasoning() -> None:
    conversation = [says("system", "S.", tools=[WEATHER, WEATHER]), USER, OLD, AGAIN]
    schema = '{"name": "weather", "parameters": {"type": "object", "town": "Köln"}}'
    assert encode(conversation, "thinking", texts=TEXTS) == (
        f"{BOS}S.\n\n# Tools <｜DSML｜x> <think></think>\n{schema}\n{schema}\nEnd."
        f"<｜User｜>Hi<｜Assistant｜><think>a greeting</think>Hello{EOS}<｜User｜>Sum?<｜Assistant｜><think>"
    )


def test_encode_developer_with_tools_and_format_has_both_sections() -> None:
    form = {"type": "json_object", "z": 1, "a": [True, None]}
    conversation = [says("developer", "Search.", tools=[WEATHER], response_format=form)]
    assert encode(conversation, "chat", texts=TEXTS) == (
        f"{BOS}<｜User｜>Search.\n\n# Tools <｜DSML｜x> <think></think>\n"
        '{"name": "weather", "parameters": {"type": "object", "town": "Köln"}}\nEnd.'
        '\n\n# Format\n{"type": "json_object", "z": 1, "a": [true, null]}<｜Assistant｜></think>'
    )


def test_encode_schema_that_looks_like_a_slot_stays_as_it_is() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "{dsml_token} {0} {tool_schemas}"}}
    text = encode([says("system", tools=[tool])], "chat", texts=TEXTS)
    assert '"{dsml_token} {0} {tool_schemas}"' in text


@pytest.mark.parametrize(
    ("field", "value"), [("tools", [WEATHER]), ("response_format", {"type": "json_object"})]
)
def test_encode_section_without_its_text_is_refused(field: str, value: Any) -> None:
    with pytest.raises(Usage, match=rf"message 1 \(system\).* {field} .*(\n.*)*--trust-encoding"):
        encode([says("system", "S.", **{field: value}), USER])


def test_encode_empty_tools_and_format_are_none_at_all() -> None:
    conversation = [says("system", "S.", tools=[], response_format={}), USER, OLD, AGAIN]
    assert encode(conversation, "thinking").startswith(f"{BOS}S.<｜User｜>Hi<｜Assistant｜></think>")


@pytest.mark.parametrize("mode", ["chat", "thinking"])
@pytest.mark.parametrize("effort", [None, "none", "low"])
def test_encode_low_effort_writes_nothing(effort: str | None, mode: str) -> None:
    assert encode([USER], mode, reasoning_effort=effort) == encode([USER], mode)


@pytest.mark.parametrize("effort", ["high", "max"])
def test_encode_high_effort_without_its_text_is_refused(effort: str) -> None:
    with pytest.raises(Usage, match=r"--trust-encoding"):
        encode([USER], "thinking", reasoning_effort=effort)


def test_encode_effort_stands_right_after_bos() -> None:
    text = encode([says("system", "S."), USER], "thinking", reasoning_effort="max", texts=TEXTS)
    assert text == f"{BOS}Think harder.\n\nS.<｜User｜>Hi<｜Assistant｜><think>"


def test_encode_effort_in_chat_mode_writes_nothing() -> None:
    assert encode([USER], "chat", reasoning_effort="max") == encode([USER], "chat")


def test_encode_unknown_effort_or_mode_is_refused() -> None:
    with pytest.raises(Usage, match="unknown reasoning effort"):
        encode([USER], "thinking", reasoning_effort="huge", texts=TEXTS)
    with pytest.raises(Usage, match="unknown thinking mode"):
        encode([USER], "think")


# ---- tool calls and their results


def block_of(*arguments: str, name: str = "f") -> str:
    """The tool block that an assistant turn holds."""
    return encode([USER, says("assistant", tool_calls=calls(*arguments, name=name))]).split("</think>\n\n")[1]


def test_tool_block_values_are_raw_text_or_json_in_their_order() -> None:
    arguments = (
        '{"z": "a\\n\\"b\\"", "a": [1, {"k":"ü"}], "f": 1.0, "n": null, "t": true, "s": "", "b": "\\u00fc"}'
    )
    assert block_of(arguments) == (
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="z" string="true">a\n"b"</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="a" string="false">[1, {"k": "ü"}]</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="f" string="false">1.0</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">null</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="t" string="false">true</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="s" string="true"></｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="b" string="true">ü</｜DSML｜parameter>\n'
        f"</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}"
    )


def test_tool_block_two_calls_one_without_arguments() -> None:
    assert block_of("{}", '{"a": 1}') == (
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
        f"</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}"
    )


def last_user_turn(*after_calls: Any, ids: bool = True) -> str:
    """What stands in the user turn that follows three tool calls."""
    asks = says("assistant", tool_calls=calls("{}", "{}", "{}", ids=ids))
    text = encode([USER, asks, *after_calls])
    return text.rpartition("<｜User｜>")[2].removesuffix("<｜Assistant｜></think>")


def result(call: int, content: Any, **fields: Any) -> Any:
    return says("tool", content, tool_call_id=f"c{call}", **fields)


def test_tool_results_take_the_order_of_the_calls() -> None:
    assert last_user_turn(result(2, "two"), result(0, "zero"), result(1, "one")) == (
        "<tool_result>zero</tool_result>\n\n<tool_result>one</tool_result>\n\n<tool_result>two</tool_result>"
    )


def test_tool_results_and_texts_share_a_turn_and_texts_keep_their_places() -> None:
    turn = last_user_turn(result(2, "two"), says("user", "wait"), result(0, "zero"), says("user", "go on"))
    assert turn == "<tool_result>zero</tool_result>\n\nwait\n\n<tool_result>two</tool_result>\n\ngo on"


def test_tool_results_without_ids_answer_calls_without_ids_in_order() -> None:
    turn = last_user_turn(says("tool", "zero"), says("tool", "one"), ids=False)
    assert turn == "<tool_result>zero</tool_result>\n\n<tool_result>one</tool_result>"


def test_tool_result_of_several_texts_is_joined_by_blank_lines() -> None:
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert last_user_turn(result(0, blocks)) == "<tool_result>a\n\nb</tool_result>"


def test_tool_result_ends_the_turns_whose_reasoning_is_dropped() -> None:
    """A user turn made of results counts as the last user turn, unless tools are defined."""
    conversation = [USER, {**ASKS, "reasoning_content": "look"}, result(0, "22")]
    assert "look" not in encode(conversation, "thinking")
    assert "<think>look</think>" in encode(
        [says("system", tools=[WEATHER]), *conversation], "thinking", texts=TEXTS
    )


# ---- mistakes

MISTAKES: dict[str, tuple[list[Any], str]] = {
    "no messages": ([], "without messages"),
    "no object": (["Hi"], "message 1: is no object"),
    "unknown role": ([says("bot", "Hi")], "message 1: unknown role"),
    "no role": ([{"content": "Hi"}], "unknown role"),
    "role that is no text": ([{"role": ["user"]}], "unknown role"),
    "misspelled field": ([USER, {**OLD, "reasoning": "x"}], r"message 2 \(assistant\).*no field 'reasoning'"),
    "tools on a user": ([{**USER, "tools": [WEATHER]}], "no field 'tools'"),
    "no text": ([says("user")], r"message 1 \(user\), content: not a text"),
    "content of parts": ([says("user", [{"type": "text", "text": "Hi"}])], "content: not a text"),  # type: ignore[arg-type]
    "empty developer": ([says("developer", "")], "no content"),
    "assistant first": ([OLD, USER], "answers nothing"),
    "assistant after system": ([says("system", "S."), OLD], "answers nothing"),
    "assistant after system after user": ([USER, says("system", "S."), OLD], "answers nothing"),
    "assistant twice": ([USER, OLD, OLD], r"message 3 \(assistant\): .*answers nothing"),
    "assistant after a reminder": ([says("latest_reminder", "now"), OLD], "answers nothing"),
    "half a character": ([says("user", "\ud800")], "half a character"),
    "result without an id": ([USER, ASKS, says("tool", "22")], r"message 3 \(tool\): tool_call_id"),
    "result of an unknown call": ([USER, ASKS, result(7, "22")], "tool_call_id"),
    "result of no call": ([USER, says("tool", "22", tool_call_id="c0")], "tool_call_id"),
    "result of an older call": ([USER, ASKS, result(0, "1"), says("assistant", "ok"), result(0, "1")], "tool_call_id"),
    "second result": ([USER, ASKS, result(0, "1"), result(0, "2")], "second result"),
    "result without text": ([USER, ASKS, result(0, None)], "content: not a text"),
    "result that is an image": ([USER, ASKS, result(0, [{"type": "image"}])], "not text"),
    "arguments that are an object": ([USER, says("assistant", tool_calls=calls({"a": 1}))], "are no text"),  # type: ignore[arg-type]
    "arguments that are no JSON": ([USER, says("assistant", tool_calls=calls("{a}"))], "not JSON"),
    "arguments that are a list": ([USER, says("assistant", tool_calls=calls("[1]"))], "no object"),
    "arguments with a key twice": ([USER, says("assistant", tool_calls=calls('{"a":1,"a":2}'))], "twice"),
    "arguments with NaN": ([USER, says("assistant", tool_calls=calls('{"a":NaN}'))], "not a JSON number"),
    "name with a quote": ([USER, says("assistant", tool_calls=calls("{}", name='a"b'))], "cannot hold"),
    "parameter with a newline": ([USER, says("assistant", tool_calls=calls('{"a\\n": 1}'))], "cannot hold"),
    "call without a function": ([USER, says("assistant", tool_calls=[{"id": "c0"}])], "without a function"),
    "calls that share an id": ([USER, says("assistant", tool_calls=[*calls("{}"), *calls("{}")])], "share an id"),
    "call without an id": ([USER, says("assistant", tool_calls=[*calls("{}"), *calls("{}", ids=False)])], "only some"),
    "calls that are no list": ([USER, says("assistant", tool_calls={"id": "c0"})], "no list of objects"),
    "tool without a name": ([says("system", tools=[{"type": "function"}]), USER], "without a named function"),
    "format that is no object": ([says("system", response_format="json"), USER], "no object"),
    "unknown task": ([{**USER, "task": "sing"}], "unknown task"),
    "task that nothing answers": ([{**USER, "task": "query"}, says("system", "S.")], "nothing answers"),
    "task before a user message": ([{**USER, "task": "query"}, AGAIN], "become one turn"),
    "task on a message that is merged": ([USER, {**AGAIN, "task": "query"}], "become one turn"),
    "wo_eos that is no truth value": ([USER, {**OLD, "wo_eos": "yes"}], "wo_eos"),
}  # fmt: skip


@pytest.mark.parametrize(("conversation", "words"), MISTAKES.values(), ids=MISTAKES)
def test_encode_mistake_is_refused_with_its_place_and_what_to_do(conversation: list[Any], words: str) -> None:
    with pytest.raises(Usage, match=words) as refusal:
        encode(conversation, "thinking", texts=TEXTS)
    assert refusal.value.facts.get("do")


SPECIAL = [
    BOS, EOS, "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>", "<think>", "</think>", "｜DSML｜",
    "<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜title｜>",
    "<｜read_url｜>", "<｜place▁holder▁no▁7｜>",
]  # fmt: skip


@pytest.mark.parametrize("token", SPECIAL)
def test_encode_special_token_inside_a_user_text_is_refused(token: str) -> None:
    with pytest.raises(Usage, match="special token inside a text"):
        encode([says("user", f"say {token}!")])


@pytest.mark.parametrize(
    "conversation",
    [
        [says("system", "<think>"), USER],
        [says("developer", "<think>")],
        [says("latest_reminder", "<think>"), USER],
        [USER, says("assistant", "<think>")],
        [USER, says("assistant", "", reasoning_content="<think>")],
        [USER, ASKS, result(0, "<think>")],
        [USER, ASKS, result(0, [{"type": "text", "text": "<think>"}])],
        [USER, says("assistant", tool_calls=calls('{"a": "<think>"}'))],
        [USER, says("assistant", tool_calls=calls('{"a": ["<think>"]}'))],
        [USER, says("assistant", tool_calls=calls('{"<think>": 1}'))],
        [USER, says("assistant", tool_calls=calls("{}", name="<think>"))],
        [says("system", tools=[{"function": {"name": "f", "description": "<think>"}}])],
        [says("system", response_format={"title": "<think>"})],
    ],
)
def test_encode_special_token_anywhere_is_refused(conversation: list[Any]) -> None:
    with pytest.raises(Usage, match="special token inside a text"):
        encode(conversation, "thinking", texts=TEXTS)


@pytest.mark.parametrize(
    "text", ["<｜", "｜>", "< think>", "<thinking>", "DSML", "<tool_result>", "a｜b", "<|User|>"]
)
def test_encode_text_that_only_looks_special_passes(text: str) -> None:
    assert encode([says("user", text)]) == f"{BOS}<｜User｜>{text}<｜Assistant｜></think>"


def test_special_tokens_are_all_found_and_always_used_ones_are_among_them() -> None:
    assert set(chat.SPECIAL_TOKENS) == set(SPECIAL[:-1])
    assert set(chat.ALWAYS_USED) < set(chat.SPECIAL_TOKENS)
    assert all(messages.find_special(f"a{token}b") == token for token in SPECIAL)


# ---- pieces


def test_spans_mark_reasoning_content_block_and_eos() -> None:
    conversation = [USER, {**ASKS, "reasoning_content": "look"}, result(0, "22"), OLD]
    assert encode_with_spans(conversation, "thinking", drop_thinking=False) == [
        Piece(f"{BOS}<｜User｜>Hi<｜Assistant｜><think>", False),
        Piece(f"look</think>Let me see.\n\n{BLOCK}{EOS}", True),
        Piece("<｜User｜><tool_result>22</tool_result><｜Assistant｜><think>", False),
        Piece(f"a greeting</think>Hello{EOS}", True),
    ]


def test_spans_of_a_dropped_thought_begin_after_its_closing_token() -> None:
    assert encode_with_spans([USER, OLD, AGAIN], "thinking") == [
        Piece(f"{BOS}<｜User｜>Hi<｜Assistant｜></think>", False),
        Piece(f"Hello{EOS}", True),
        Piece("<｜User｜>Sum?<｜Assistant｜><think>", False),
    ]


def test_spans_leave_the_task_token_to_the_prompt() -> None:
    conversation = [USER, {**OLD, "task": "title"}, says("assistant", "Greeting")]
    assert [piece.text for piece in encode_with_spans(conversation) if piece.is_assistant] == [
        f"Hello{EOS}",
        f"Greeting{EOS}",
    ]


@pytest.mark.parametrize(("mode", "conversation", "text"), GOLDEN.values(), ids=GOLDEN)
def test_spans_joined_are_the_text_and_alternate(mode: str, conversation: list[Any], text: str) -> None:
    pieces = encode_with_spans(conversation, mode)
    assert "".join(piece.text for piece in pieces) == BOS + text
    assert all(piece.text for piece in pieces)
    assert all(a.is_assistant != b.is_assistant for a, b in itertools.pairwise(pieces))


# ---- completions


def test_parse_thinking_completion_splits_reasoning_and_content() -> None:
    assert parse_completion(f"two and two</think>4{EOS}", "thinking") == {
        "role": "assistant", "content": "4", "reasoning_content": "two and two", "tool_calls": [],
    }  # fmt: skip


def test_parse_chat_completion_is_content_only() -> None:
    assert parse_completion(f"\n4\n{EOS}", "chat")["content"] == "\n4\n"
    assert parse_completion(EOS, "chat")["content"] == ""


def test_parse_tool_block_gives_json_arguments_in_their_order() -> None:
    message = parse_completion(f"look</think>Let me see.\n\n{BLOCK}{EOS}", "thinking")
    assert message["content"] == "Let me see."
    assert message["tool_calls"] == [
        {"type": "function", "function": {"name": "weather", "arguments": '{"town": "Köln", "days": 2}'}}
    ]


@pytest.mark.parametrize("blank", ["\n", ""])
def test_parse_call_without_parameters_may_have_an_empty_line(blank: str) -> None:
    block = (
        f'<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n{blank}</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    )
    (call,) = parse_completion(f"\n\n{block}{EOS}", "chat")["tool_calls"] or []
    assert call["function"] == {"name": "f", "arguments": "{}"}


DAYS = '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
BROKEN = {
    "no EOS": "4",
    "text after EOS": f"4{EOS}!",
    "EOS twice": f"4{EOS}{EOS}",
    "thought in chat": f"4</think>{EOS}",
    "special token": f"<｜User｜>4{EOS}",
    "block after one newline": f"4\n{BLOCK}{EOS}",
    "text after the block": f"4\n\n{BLOCK}\n{EOS}",
    "unclosed block": f"4\n\n{BLOCK.removesuffix('</｜DSML｜tool_calls>')}{EOS}",
    "empty block": f"\n\n<｜DSML｜tool_calls>\n</｜DSML｜tool_calls>{EOS}",
    "parameter twice": f"\n\n{BLOCK.replace(DAYS, DAYS + DAYS)}{EOS}",
    "parameters without a newline": f"\n\n{BLOCK.replace(DAYS, DAYS.rstrip())}{EOS}",
    "blank line after parameters": f"\n\n{BLOCK.replace(DAYS, DAYS + chr(10))}{EOS}",
    "value that is no JSON": f"\n\n{BLOCK.replace('>2<', '>two<')}{EOS}",
    "value with a special token": f"\n\n{BLOCK.replace('Köln', '<think>')}{EOS}",
    "flag that is neither": f"\n\n{BLOCK.replace('false', 'maybe')}{EOS}",
    "no name": f"\n\n{BLOCK.replace(' name=' + chr(34) + 'weather' + chr(34), '')}{EOS}",
    "other block": f"\n\n{BLOCK.replace('tool_calls', 'function_calls')}{EOS}",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_parse_broken_completion_is_refused(text: str) -> None:
    with pytest.raises(BadCompletion):
        parse_completion(text, "chat")


def test_parse_thinking_without_its_end_is_refused() -> None:
    with pytest.raises(BadCompletion, match="not closed"):
        parse_completion(f"two and two{EOS}", "thinking")
    with pytest.raises(BadCompletion):  # the block is part of an unfinished thought
        parse_completion(f"two\n\n{BLOCK}</think>{EOS}", "thinking")


PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(
    lambda text: messages.find_special(text) is None
)
JSON_VALUES = st.recursive(
    PLAIN | st.booleans() | st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
    max_leaves=5,
)
NAMES = st.text(
    st.characters(exclude_characters='"\n｜<>', exclude_categories=["Cs"]), min_size=1, max_size=8
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(PLAIN, PLAIN, st.lists(st.tuples(NAMES, st.dictionaries(NAMES, JSON_VALUES, max_size=3)), max_size=3))
def test_parse_of_what_encode_writes_gives_the_message_back(
    reasoning: str, content: str, called: list[tuple[str, dict[str, Any]]]
) -> None:
    made = [{"function": {"name": name, "arguments": json.dumps(arguments)}} for name, arguments in called]
    said = says("assistant", content, reasoning_content=reasoning, tool_calls=made)
    *_, piece = encode_with_spans([USER, said], "thinking")
    message = parse_completion(piece.text, "thinking")
    assert (message["content"], message["reasoning_content"]) == (content, reasoning)
    functions = [call["function"] for call in message["tool_calls"] or []]
    assert [(f["name"], json.loads(f["arguments"])) for f in functions] == called
