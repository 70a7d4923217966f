"""A conversation's messages, checked, and merged into the turns that the encoding writes.  Knows no layout.

Owns the message format (the field's usual one: role, content, tool_calls, ...), the special tokens, and every rule by
which a conversation is refused: what the released encoding would drop or garble in silence is an error here.
Source: the message format and the merging of tool results in the releases' encoding file; the refusals are ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypedDict

from dsv4ckpt import strictjson
from dsv4ckpt.errors import Usage

_BAR = "\uff5c"  # the bar of full width in every special token


def _token(name: str) -> str:
    return f"<{_BAR}{name}{_BAR}>"


BOS, EOS = _token("begin\u2581of\u2581sentence"), _token("end\u2581of\u2581sentence")
USER, ASSISTANT, REMINDER = _token("User"), _token("Assistant"), _token("latest_reminder")
THINK, END_THINK = "<think>", "</think>"
DSML = f"{_BAR}DSML{_BAR}"
TASKS = {task: _token(task) for task in ("action", "query", "authority", "domain", "title", "read_url")}
ALWAYS_USED = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK)
SPECIAL_TOKENS = (*ALWAYS_USED, DSML, REMINDER, *TASKS.values())
_SPECIAL = re.compile(rf"<{_BAR}[^{_BAR}]*{_BAR}>|</?think>|{DSML}")  # these, and all of the same shape

_FIELDS = {  # role: what its messages may hold; "mask" belongs to the trainer and leaves no trace in the text
    "system": {"content", "tools", "response_format"},
    "developer": {"content", "tools", "response_format", "task"},
    "user": {"content", "task", "mask"},
    "latest_reminder": {"content"},
    "tool": {"content", "tool_call_id"},
    "assistant": {"content", "reasoning_content", "tool_calls", "wo_eos", "task", "mask"},
}
_USER_TURN = ("user", "tool")


class Function(TypedDict):
    """A call's target; `arguments` is the JSON text of an object."""

    name: str
    arguments: str


class ToolCall(TypedDict, total=False):
    """One call of an assistant message."""

    id: str
    type: str
    function: Function


class Message(TypedDict, total=False):
    """One message. A field that is None counts as absent; which role may have which field is checked."""

    role: str
    content: str | None
    reasoning_content: str | None
    tool_calls: list[ToolCall] | None
    tool_call_id: str | None
    tools: list[dict[str, Any]] | None
    response_format: dict[str, Any] | None
    task: str | None
    wo_eos: bool | None
    mask: int | None


class Call(NamedTuple):
    """A tool call, checked: the arguments in the order of their JSON text."""

    id: str | None
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What is written in one go: a message, or the user's message with the tool results around it."""

    role: str  # system, developer, user, latest_reminder, assistant
    where: str  # for messages of errors
    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    tools: tuple[str, ...] = ()  # JSON text of each function
    response_format: str | None = None  # JSON text
    task: str | None = None
    has_eos: bool = True


def to_json(value: Any) -> str:
    """JSON as the encoding writes it: Python's blanks and key order, letters as they are."""
    return json.dumps(value, ensure_ascii=False)


def find_special(text: str) -> str | None:
    """The first special token that stands in a text, spelled out, or None."""
    found = _SPECIAL.search(text)
    return found[0] if found else None


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """Check a conversation and merge its tool results into user turns. raises Usage"""
    if not messages:
        raise Usage("a conversation without messages", do="give at least one user message")
    turns: list[Turn] = []
    together: list[tuple[str, Mapping[str, Any]]] = []  # user and tool messages that become one turn
    calls: tuple[Call, ...] = ()
    for number, message in enumerate(messages, 1):
        where, fields = _checked(number, message)
        if fields["role"] in _USER_TURN:
            together.append((where, fields))
            continue
        if together:
            turns.append(_user_turn(together, calls))
            together = []
        turn = _turn(where, fields)
        turns.append(turn)
        if turn.role == "assistant":
            calls = turn.calls
    if together:
        turns.append(_user_turn(together, calls))
    _require_order(turns)
    return turns


def _refuse(where: str, what: str, *, do: str, expected: object = None, found: object = None) -> NoReturn:
    raise Usage(f"{where}: {what}", expected=expected, found=found, do=do)


def _checked(number: int, message: Message) -> tuple[str, dict[str, Any]]:
    """A name for the message, and its fields without those that are None."""
    where = f"message {number}"
    if not isinstance(message, Mapping):
        _refuse(where, "is no object", do="give a list of objects with role and content")
    fields = {key: value for key, value in message.items() if value is not None}
    role = fields.get("role")
    if not isinstance(role, str) or role not in _FIELDS:
        _refuse(where, "unknown role", expected=", ".join(_FIELDS), found=repr(role), do="correct the role")
    where = f"message {number} ({role})"
    for key in fields.keys() - {"role"} - _FIELDS[role]:
        _refuse(
            where,
            f"a message of this role has no field {key!r}",
            expected=", ".join(sorted(_FIELDS[role])),
            do="take the field out, or correct its name",
        )
    return where, fields


def _plain(where: str, field: str, value: object) -> str:
    """A text that can be part of a prompt."""
    if not isinstance(value, str):
        _refuse(f"{where}, {field}", "not a text", found=type(value).__name__, do="give a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        _refuse(f"{where}, {field}", "half a character (a lone surrogate)", do="repair the text")
    if special := find_special(value):
        _refuse(
            f"{where}, {field}",
            "a special token inside a text would be read as structure",
            found=repr(special),
            do="spell it differently; the checkpoint's own encoding lets it through: --trust-encoding",
        )
    return value


def _turn(where: str, fields: Mapping[str, Any]) -> Turn:
    """A message of any role but user and tool."""
    role = fields["role"]
    text = _plain(where, "content", fields.get("content", ""))
    if role in ("developer", "latest_reminder") and not text:
        _refuse(where, "no content", do="give the text, or take the message out")
    form = fields.get("response_format")
    if form is not None and not isinstance(form, Mapping):
        _refuse(where, "response_format is no object", do="give the JSON schema as an object")
    if not isinstance(fields.get("wo_eos", False), bool):
        _refuse(where, "wo_eos is neither true nor false", do="correct it")
    return Turn(
        role=role,
        where=where,
        text=text,
        reasoning=_plain(where, "reasoning_content", fields.get("reasoning_content", "")),
        calls=_calls(where, fields.get("tool_calls", [])),
        tools=_tools(where, fields.get("tools", [])),
        response_format=_plain(where, "response_format", to_json(form)) if form else None,
        task=_task(where, fields),
        has_eos=not fields.get("wo_eos", False),
    )


def _task(where: str, fields: Mapping[str, Any]) -> str | None:
    task = fields.get("task")
    if task is not None and task not in TASKS:
        _refuse(where, "unknown task", expected=", ".join(TASKS), found=repr(task), do="correct the task")
    return task


def _objects(where: str, field: str, value: object) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        _refuse(where, f"{field} is no list of objects", do=f"give {field} as a list of objects")
    return value


def _tools(where: str, value: object) -> tuple[str, ...]:
    functions = []
    for tool in _objects(where, "tools", value):
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            _refuse(
                where, "a tool without a named function", do='give {"type": "function", "function": {...}}'
            )
        functions.append(_plain(where, "tools", to_json(function)))
    return tuple(functions)


def _calls(where: str, value: object) -> tuple[Call, ...]:
    calls = tuple(_call(where, item) for item in _objects(where, "tool_calls", value))
    ids = [call.id for call in calls if call.id is not None]
    if len(set(ids)) != len(ids) or len(ids) not in (0, len(calls)):
        _refuse(where, "tool calls share an id, or only some have one", do="give every call an id of its own")
    return calls


def _call(where: str, item: Mapping[str, Any]) -> Call:
    function, call_id = item.get("function"), item.get("id")
    if not isinstance(function, Mapping) or not isinstance(call_id, str | None):
        _refuse(where, "a tool call without a function, or with an id that is no text", do="correct the call")
    arguments = _arguments(where, function.get("arguments"))
    for name in (function.get("name"), *arguments):
        if not _plain(where, "the name of a tool or parameter", name) or re.search(r'["\n]', str(name)):
            _refuse(where, "a name that a tool block cannot hold", found=repr(name), do="rename it")
    for argument in arguments.values():
        _plain(
            where, "an argument of a tool call", argument if isinstance(argument, str) else to_json(argument)
        )
    return Call(call_id or None, str(function["name"]), arguments)


def _arguments(where: str, text: object) -> dict[str, Any]:
    advice = "give the arguments as the JSON text of one object, in a string"
    if not isinstance(text, str):
        _refuse(where, "the arguments of a tool call are no text", found=type(text).__name__, do=advice)
    try:
        arguments = strictjson.loads(text, floats=True)
    except strictjson.Malformed as error:
        _refuse(where, f"the arguments of a tool call are {error}", do=advice)
    if not isinstance(arguments, dict):
        _refuse(where, "the arguments of a tool call are no object", do=advice)
    return arguments


def _user_turn(together: Sequence[tuple[str, Mapping[str, Any]]], calls: tuple[Call, ...]) -> Turn:
    """Join user texts and tool results by blank lines: texts keep their places, results take the calls' order."""
    results: dict[int, str] = {}  # index of the call: result
    texts: list[str | None] = []  # None: a place for a result
    for where, fields in together:
        if fields["role"] == "user":
            texts.append(_plain(where, "content", fields.get("content")))
        else:
            index = _answered(where, fields.get("tool_call_id"), calls, len(results))
            if index in results:
                _refuse(where, "a second result for the same call", do="give each call one result")
            results[index] = f"<tool_result>{_result(where, fields.get('content'))}</tool_result>"
            texts.append(None)
        if _task(where, fields) and len(together) > 1:
            _refuse(
                where,
                "a task cannot be set on one of several messages that become one turn",
                do="put an assistant message between them, or write them as one message",
            )
    ordered = iter([results[index] for index in sorted(results)])
    text = "\n\n".join(next(ordered) if item is None else item for item in texts)
    where, fields = together[-1]
    return Turn(role="user", where=where, text=text, task=_task(where, fields))


def _answered(where: str, call_id: object, calls: tuple[Call, ...], num_before: int) -> int:
    """Index of the call that a tool message answers. Calls without ids are answered in order."""
    ids = [call.id for call in calls]
    if call_id is None and num_before < len(calls) and not any(ids):
        return num_before
    if call_id is None or call_id not in ids:
        _refuse(
            where,
            "tool_call_id names no call of the assistant message before it",
            expected=", ".join(repr(known) for known in ids if known)
            or "an assistant message with tool_calls",
            found=repr(call_id),
            do="give the id of the call that this result answers",
        )
    return ids.index(str(call_id))


def _result(where: str, content: object) -> str:
    """The text of a tool result; several text blocks are joined by blank lines."""
    if not isinstance(content, list):
        return _plain(where, "content", content)
    blocks = _objects(where, "content", content)
    if any(block.get("type") != "text" for block in blocks):
        _refuse(where, "a tool result that is not text", do="leave only text blocks in it")
    return "\n\n".join(_plain(where, "content", block.get("text")) for block in blocks)


def _require_order(turns: Sequence[Turn]) -> None:
    """An assistant turn answers something, and a task is answered at once, or last. raises Usage"""
    for index, turn in enumerate(turns):
        before = [other for other in turns[:index] if other.role != "latest_reminder"][-1:]
        asks = any(other.role in ("user", "developer") or other.task for other in before)
        if turn.role == "assistant" and not asks:
            _refuse(
                turn.where, "an assistant message that answers nothing", do="put a user message before it"
            )
        if turn.task and index + 1 < len(turns) and turns[index + 1].role != "assistant":
            _refuse(
                turn.where, "nothing answers this task", do="let an assistant message follow, or end here"
            )
