"""A checkpoint's own encoding file: its texts, read as data; its code, run only where the user said --trust-encoding.

Owns how that file is found and loaded. Reading texts runs nothing: the file is parsed, and constants are taken out of
it. Running it gives it all that this process may do; what runs are the very bytes that were checked, and nothing is
written beside them. Knows no layout.
Source: encoding/encoding_dsv4.py of the releases, encoding/encoding.py of V4.1: encode_messages(messages,
thinking_mode=...); the names of the constants are those of the April and the 0731 file.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.abc
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

from dsv4ckpt import formats, probe, shard
from dsv4ckpt.contained import io_errors, opened
from dsv4ckpt.errors import Dsv4Error, MissingFile, UnsafePath

from .chat import Message, Texts

FOLDER = "encoding"
FUNCTION = "encode_messages"
_FILE_NAME = re.compile(r"encoding(_[a-z0-9]+)?\.py")
_MAX_BYTES = formats.MAX_CONFIG_BYTES  # the released files have 29 kB
_PUBLISHED = "take the folder that was published with this checkpoint"
_SLOT = re.compile(r"\{(\w+)\}")
# constant of the file: the slots that its template has
_TOOLS, _RESPONSE_FORMAT = "TOOLS_TEMPLATE", "response_format_template"
_SLOTS = {
    _TOOLS: {"dsml_token", "thinking_start_token", "thinking_end_token", "tool_schemas"},
    _RESPONSE_FORMAT: {"schema"},
}
_PROMPTS, _APRIL_MAX = "REASONING_EFFORT_PROMPTS", "REASONING_EFFORT_MAX"


class BadEncoding(Dsv4Error):
    """The checkpoint's own encoding file cannot be read or run, or does not do what the encoding needs."""


@dataclass(frozen=True)
class Trusted:
    """The checkpoint's own encoding, loaded."""

    file: str  # relative to the checkpoint
    sha256: str
    module: ModuleType

    def encode(
        self,
        messages: Sequence[Message],
        thinking_mode: str = "chat",
        *,
        drop_thinking: bool = True,
        reasoning_effort: str | None = None,
    ) -> str:
        """What the checkpoint's own function makes of a conversation. raises BadEncoding with what it said"""
        options: dict[str, Any] = {"thinking_mode": thinking_mode}
        if not drop_thinking:  # only what differs from its own defaults: releases differ in what they know
            options["drop_thinking"] = False
        if reasoning_effort is not None:
            options["reasoning_effort"] = reasoning_effort
        try:
            text = getattr(self.module, FUNCTION)(list(messages), **options)
        except Exception as error:  # of code that is not ours
            raise BadEncoding(
                f"the checkpoint's own encoding refuses this conversation: {_said(error)}",
                file=self.file,
                do="correct the conversation",
            ) from error
        if not isinstance(text, str):
            _refuse(self.file, f"{FUNCTION} gives no text but {type(text).__name__!r}")
        return text


def load(directory: str, *, follow_links: bool = False) -> Trusted:
    """Run the checkpoint's own encoding file. Call it only where the user said so.

    raises MissingFile, UnsafePath, Environment, BadEncoding
    """
    file, source = _source(directory, follow_links)
    sha256 = hashlib.sha256(source.encode("utf-8")).hexdigest()
    name = f"_dsv4_trusted_encoding_{sha256[:16]}"
    spec = importlib.util.spec_from_loader(name, _CheckedSource(source))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module while it is being run
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of code that is not ours
        raise BadEncoding(f"this file does not run: {_said(error)}", file=file, do=_PUBLISHED) from error
    finally:
        sys.modules.pop(name, None)
    if not callable(getattr(module, FUNCTION, None)):
        _refuse(file, f"this file has no function {FUNCTION}")
    return Trusted(file, sha256, module)


def read_texts(directory: str, *, follow_links: bool = False) -> Texts:
    """The texts of the checkpoint's own encoding file, for chat.encode. Nothing of the file is run.

    A text that the file does not have, or not as a constant, is not known. raises MissingFile, UnsafePath, Environment,
    BadEncoding: no Python, or a template with other slots than we can fill
    """
    file, source = _source(directory, follow_links)
    try:
        constants = _constants(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        _refuse(file, f"this file is no Python: {_said(error)}")
    templates = {name: constants.get(name) for name in _SLOTS}
    for name, template in templates.items():
        if template is None:
            continue
        rest = _SLOT.sub("", template) if isinstance(template, str) else "{"
        if set("{}") & set(rest) or set(_SLOT.findall(str(template))) != _SLOTS[name]:
            _refuse(file, f"the template {name} is not of the form that we know")
    return Texts(templates[_TOOLS], templates[_RESPONSE_FORMAT], _efforts(file, constants))


def _efforts(file: str, constants: Mapping[str, Any]) -> dict[str, str]:
    """Reasoning effort -> text. In the April file "high" is accepted and writes nothing."""
    prompts = constants.get(_PROMPTS)
    if prompts is None and _APRIL_MAX in constants:
        prompts = {"high": "", "max": constants[_APRIL_MAX]}
    if prompts is None:
        return {}
    if not isinstance(prompts, dict) or not all(
        isinstance(text, str) for pair in prompts.items() for text in pair
    ):
        _refuse(file, "the texts of the reasoning efforts are not of the form that we know")
    return prompts


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Name -> value of what the file's outermost statements set once, to a literal."""
    found: dict[str, Any] = {}
    twice = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if not isinstance(target, ast.Name) or getattr(node, "value", None) is None:
                continue
            if target.id in found:
                twice.add(target.id)
            try:
                found[target.id] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            except (ValueError, TypeError):
                found[target.id] = None  # computed, so not known without running it
    return {name: value for name, value in found.items() if name not in twice and value is not None}


class _CheckedSource(importlib.abc.InspectLoader):
    """Runs a source text that is already in memory: nothing is read again, and no __pycache__ is written."""

    def __init__(self, source: str) -> None:
        self._text = source

    def get_source(self, fullname: str) -> str:  # noqa: ARG002 - the machinery asks by name
        return self._text


def _source(directory: str, follow_links: bool) -> tuple[str, str]:
    """Name and text of the one encoding file. raises MissingFile, UnsafePath, Environment, BadEncoding"""
    folder = os.path.join(directory, FOLDER)
    if probe.is_link(folder):
        raise UnsafePath("this folder is a link", file=FOLDER, do="put its target in its place")
    names = []
    if probe.is_real_directory(folder):
        with io_errors(FOLDER):
            names = sorted(name for name in os.listdir(folder) if _FILE_NAME.fullmatch(name))
    if len(names) != 1:
        raise MissingFile(
            "the checkpoint has no encoding file of its own" if not names else "several encoding files",
            file=FOLDER,
            expected="one file encoding_*.py or encoding.py",
            found=", ".join(names) or "none",
            do=f"{_PUBLISHED}; or leave out what asks for it: tools, a response format, --trust-encoding",
        )
    file = f"{FOLDER}/{names[0]}"
    with opened(directory, file, follow_links) as fd:
        size = os.fstat(fd).st_size
        if size > _MAX_BYTES:
            _refuse(file, f"this file is too large: {size:,} bytes")
        data = shard.read_exactly(fd, size, 0, file)
    try:
        return file, data.decode("utf-8")
    except UnicodeDecodeError:
        _refuse(file, "this file is no UTF-8")


def _refuse(file: str, what: str) -> NoReturn:
    raise BadEncoding(what, file=file, do=_PUBLISHED)


def _said(error: BaseException) -> str:
    """What an exception of foreign code says, short and harmless."""
    return f"{type(error).__name__}: {str(error)[:200]!r}"
