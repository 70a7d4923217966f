"""The chat encoding of DeepSeek-V4: a list of messages -> the prompt's text.  Knows no tokenizer and no files.

Owns the layout of a conversation (what stands between which turns), what old reasoning is dropped, and which pieces
the model itself would have written. Everything is a pure function of its arguments.
Source: the layout of the releases' encoding file, held by golden conversations. Three kinds of text are that file's
own and not ours: the section that introduces tools, the one for a response format, and the prefixes of the reasoning
efforts "high" and "max" (which differ between releases). They come in as Texts, read from the checkpoint
(trusted.read_texts); without them, what needs them is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dsv4ckpt.errors import Usage

from .dsml import BadCompletion, parse_completion, tool_block
from .messages import (
    ALWAYS_USED,
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    REMINDER,
    SPECIAL_TOKENS,
    TASKS,
    THINK,
    USER,
    Message,
    Turn,
    turns_of,
)

__all__ = [
    "ALWAYS_USED", "SPECIAL_TOKENS", "BadCompletion", "Message", "Piece", "Texts", "encode", "encode_with_spans",
    "parse_completion",
]  # fmt: skip

MODES = ("chat", "thinking")
SILENT_EFFORTS = (None, "none", "low")  # nothing is written for these
EFFORTS = ("high", "max")
_TRUST = "--trust-encoding uses the checkpoint's own encoding file, which has it"
_SLOT = re.compile(r"\{(\w+)\}")


class Piece(NamedTuple):
    """A stretch of the encoded text. is_assistant: the model writes it, so this is what fine-tuning trains on."""

    text: str
    is_assistant: bool


@dataclass(frozen=True)
class Texts:
    """Texts that only a checkpoint's own encoding file has. None, or an effort that is absent: not known.

    tools            template with the slots dsml_token, thinking_start_token, thinking_end_token and tool_schemas
    response_format  template with the slot schema
    efforts          what stands right after BOS in thinking mode, by reasoning effort
    """

    tools: str | None = None
    response_format: str | None = None
    efforts: Mapping[str, str] = field(default_factory=dict)


NO_TEXTS = Texts()


class _Layout(NamedTuple):
    """What holds for all turns of one conversation."""

    is_thinking: bool
    drops_reasoning: bool  # of what stands before the last user turn
    last_user: int  # index of the last user or developer turn; -1: none
    texts: Texts


def encode(
    messages: Sequence[Message],
    thinking_mode: str = "chat",
    *,
    drop_thinking: bool = True,
    reasoning_effort: str | None = None,
    texts: Texts = NO_TEXTS,
) -> str:
    """The text of a conversation; ready for the model to go on if it ends with a user, tool or developer message.

    thinking_mode     "chat" or "thinking"
    drop_thinking     leave out the reasoning of assistant turns before the last user turn, and the developer messages
                      before it; has no effect in chat mode, or if any message defines tools
    reasoning_effort  None, "none" and "low" write nothing; "high" and "max" need texts, in thinking mode
    raises            Usage: a conversation that cannot be encoded, or that needs a text which texts does not have
    """
    pieces = encode_with_spans(
        messages,
        thinking_mode,
        drop_thinking=drop_thinking,
        reasoning_effort=reasoning_effort,
        texts=texts,
    )
    return "".join(piece.text for piece in pieces)


def encode_with_spans(
    messages: Sequence[Message],
    thinking_mode: str = "chat",
    *,
    drop_thinking: bool = True,
    reasoning_effort: str | None = None,
    texts: Texts = NO_TEXTS,
) -> list[Piece]:
    """The same text in pieces: prompts and assistant turns, none of them empty, no two neighbours of a kind.

    An assistant's piece is reasoning + </think> + content + tool block + EOS; the <think> or </think> that opens its
    turn belongs to the prompt. raises Usage
    """
    if thinking_mode not in MODES:
        raise Usage("unknown thinking mode", expected=" or ".join(MODES), found=repr(thinking_mode))
    is_thinking = thinking_mode == "thinking"
    turns = turns_of(messages)
    drops = drop_thinking and is_thinking and not any(turn.tools for turn in turns)
    if drops:
        turns = _without_old_reasoning(turns)
    layout = _Layout(is_thinking, drops, _last_user(turns), texts)
    pieces = [Piece(BOS + _effort(reasoning_effort, layout), False)]
    for index, turn in enumerate(turns):
        before = turns[index - 1] if index else None
        after = turns[index + 1] if index + 1 < len(turns) else None
        if turn.role == "assistant":
            pieces.append(Piece(_assistant(index, turn, before, layout), True))
        else:
            pieces.append(Piece(_asking(turn, layout), False))
        pieces.append(Piece(_transition(index, turn, after, layout), False))
    return _joined(pieces)


def _last_user(turns: Sequence[Turn]) -> int:
    return max((index for index, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def _without_old_reasoning(turns: Sequence[Turn]) -> list[Turn]:
    """Before the last user turn, assistants lose their reasoning and developers their place."""
    last = _last_user(turns)
    return [
        replace(turn, reasoning="") if turn.role == "assistant" and index < last else turn
        for index, turn in enumerate(turns)
        if turn.role != "developer" or index >= last
    ]


def _effort(effort: str | None, layout: _Layout) -> str:
    """What stands right after BOS. raises Usage"""
    if effort in SILENT_EFFORTS:
        return ""
    if effort not in EFFORTS:
        raise Usage(
            "unknown reasoning effort", expected=f"none, low, {', '.join(EFFORTS)}", found=repr(effort)
        )
    if not layout.is_thinking:
        return ""
    if effort not in layout.texts.efforts:
        raise Usage(
            f"the text of the reasoning effort {effort!r} differs between releases and is not known here",
            do=f"{_TRUST}; or ask for 'low'",
        )
    return layout.texts.efforts[effort]


def _asking(turn: Turn, layout: _Layout) -> str:
    """A turn that is not the assistant's, without what follows it."""
    prefix = {"system": "", "user": USER, "developer": USER, "latest_reminder": REMINDER}[turn.role]
    text = prefix + turn.text
    if turn.tools:
        slots = {
            "dsml_token": DSML,
            "thinking_start_token": THINK,
            "thinking_end_token": END_THINK,
            "tool_schemas": "\n".join(turn.tools),
        }
        text += "\n\n" + _filled(turn, "tools", layout.texts.tools, slots)
    if turn.response_format is not None:
        slots = {"schema": turn.response_format}
        text += "\n\n" + _filled(turn, "response_format", layout.texts.response_format, slots)
    return text


def _filled(turn: Turn, what: str, template: str | None, slots: Mapping[str, str]) -> str:
    """A template with its slots filled, once: what stands in a value stays as it is. raises Usage"""
    if template is None:
        raise Usage(
            f"{turn.where}: the text that introduces {what} is not known here",
            do=f"{_TRUST}; or take {what} out of the message",
        )
    return _SLOT.sub(lambda slot: slots.get(slot[1], slot[0]), template)


def _assistant(index: int, turn: Turn, before: Turn | None, layout: _Layout) -> str:
    """Reasoning, </think>, content, tool block, EOS. What answers a task has no reasoning part."""
    answers_task = before is not None and before.task is not None
    keeps_reasoning = not layout.drops_reasoning or index > layout.last_user
    thought = (
        turn.reasoning + END_THINK if layout.is_thinking and keeps_reasoning and not answers_task else ""
    )
    block = "\n\n" + tool_block(turn.calls) if turn.calls else ""
    return thought + turn.text + block + (EOS if turn.has_eos else "")


def _transition(index: int, turn: Turn, after: Turn | None, layout: _Layout) -> str:
    """What leads from a turn to the assistant's next one."""
    if after is not None and after.role not in ("assistant", "latest_reminder"):
        return ""
    if turn.task == "action":
        return ASSISTANT + (THINK if layout.is_thinking else END_THINK) + TASKS["action"]
    if turn.task is not None:
        return TASKS[turn.task]
    if turn.role not in ("user", "developer"):
        return ""
    is_open = layout.is_thinking and (not layout.drops_reasoning or index >= layout.last_user)
    return ASSISTANT + (THINK if is_open else END_THINK)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].is_assistant == piece.is_assistant:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.is_assistant)
        elif piece.text:
            joined.append(piece)
    return joined
