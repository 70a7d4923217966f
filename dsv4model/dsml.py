"""Tool blocks: what an assistant turn holds after its text, written and read.  Knows no roles and no prompts.

Owns the DSML grammar and the strict reading of a completion. Reading is stricter than the releases' own function,
which lets through a tool block without the EOS after it, an empty block, and values that are no JSON.
Source: the layout and the parsing rules of the releases' encoding file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NoReturn

from dsv4ckpt import strictjson
from dsv4ckpt.errors import Dsv4Error

from .messages import DSML, END_THINK, EOS, Call, Message, ToolCall, find_special, to_json

_OPEN, _CLOSE = f"<{DSML}tool_calls>\n", f"</{DSML}tool_calls>"
_INVOKE = re.compile(rf'<{DSML}invoke name="([^"\n]+)">\n')
_PARAMETER = re.compile(
    rf'<{DSML}parameter name="([^"\n]+)" string="(true|false)">(.*?)</{DSML}parameter>\n', re.DOTALL
)
_END_OF_INVOKE = re.compile(rf"\n?</{DSML}invoke>\n")  # the blank line stands where there are no parameters
_SHOWN = 80  # characters of a completion that an error repeats


class BadCompletion(Dsv4Error):
    """A completion that is not of the form that the encoding asks the model for."""


def tool_block(calls: Sequence[Call]) -> str:
    """The block of a turn's tool calls, without the blank line before it. Exact: the model was trained on these bytes.

    A text argument stands as it is, anything else as JSON; a call without arguments has an empty line.
    """
    invokes = []
    for call in calls:
        parameters = "\n".join(_parameter(name, value) for name, value in call.arguments.items())
        invokes.append(f'<{DSML}invoke name="{call.name}">\n{parameters}\n</{DSML}invoke>\n')
    return _OPEN + "".join(invokes) + _CLOSE


def _parameter(name: str, value: object) -> str:
    is_text = isinstance(value, str)
    text, flag = (value, "true") if is_text else (to_json(value), "false")
    return f'<{DSML}parameter name="{name}" string="{flag}">{text}</{DSML}parameter>'


def parse_completion(text: str, thinking_mode: str) -> Message:
    """Read what the model wrote after the prompt of one turn, its EOS included.

    thinking_mode  "thinking": reasoning, </think>, content; "chat": content only
    returns        role, content, reasoning_content and tool_calls, all of them always; the calls have no ids, and their
                   arguments are the JSON text of an object, in the completion's order
    raises         BadCompletion: no EOS at the end, no </think>, special tokens inside a text, or a tool block that is
                   not exactly of the form (newlines, a parameter twice, a value that is no JSON)
    """
    if not text.endswith(EOS):
        _refuse("the completion does not end with EOS", text[-_SHOWN:])
    body, reasoning = text.removesuffix(EOS), ""
    if thinking_mode == "thinking":
        reasoning, found, body = body.partition(END_THINK)
        if not found:
            _refuse("the reasoning is not closed by </think>", reasoning[-_SHOWN:])
    content, found, block = body.partition("\n\n" + _OPEN)
    for part in (reasoning, content):
        if special := find_special(part):
            _refuse("a special token inside a text", special)
    calls = _parse_block(block) if found else []
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}


def _refuse(what: str, found: str) -> NoReturn:
    raise BadCompletion(
        what,
        expected="the form of the released encoding",
        found=repr(found),
        do="sample again; the text itself is what the model said",
    )


def _parse_block(block: str) -> list[ToolCall]:
    """Everything between the opening line of a tool block and EOS."""
    calls: list[ToolCall] = []
    position = 0
    while block[position:] != _CLOSE or not calls:
        invoke = _INVOKE.match(block, position)
        if invoke is None:
            _refuse("a tool block that breaks its form", block[position : position + _SHOWN])
        arguments, position = _parse_parameters(block, invoke.end())
        end = _END_OF_INVOKE.match(block, position)
        if end is None or (arguments and end[0].startswith("\n")):
            _refuse("a tool call that breaks its form", block[position : position + _SHOWN])
        position = end.end()
        text = ", ".join(f"{to_json(name)}: {value}" for name, value in arguments.items())
        calls.append({"type": "function", "function": {"name": invoke[1], "arguments": "{" + text + "}"}})
    return calls


def _parse_parameters(block: str, position: int) -> tuple[dict[str, str], int]:
    """Name -> JSON text of the parameters that stand at `position`, and where they end."""
    arguments: dict[str, str] = {}
    while parameter := _PARAMETER.match(block, position):
        name, is_text, value = parameter.groups()
        if name in arguments:
            _refuse("a parameter that stands there twice", name)
        if special := find_special(value):
            _refuse("a special token inside a value", special)
        if is_text == "false":
            try:
                strictjson.loads(value, floats=True)
            except strictjson.Malformed as error:
                _refuse(f"a value that is no text: {error}", value[:_SHOWN])
        arguments[name] = to_json(value) if is_text == "true" else value
        position = parameter.end()
    return arguments, position
