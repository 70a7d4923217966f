"""What is there, what is not, and what cannot be told."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv4ckpt import probe
from dsv4ckpt.errors import Environment

ALL = (probe.is_there, probe.leads_somewhere, probe.is_directory, probe.is_real_directory, probe.is_link)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "linked directory").symlink_to("directory")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    absent = {"absent": "absent", "below a file": "file/x", "too long": "x" * 300, "no name": "a\0b"}
    names = {name: name for name in os.listdir(tmp_path)} | absent
    return {what: str(tmp_path / name) for what, name in names.items()}


@pytest.mark.parametrize(
    ("ask", "yes"),
    [
        (probe.is_there, {"file", "directory", "link", "linked directory", "dangling", "loop"}),
        (probe.leads_somewhere, {"file", "directory", "link", "linked directory"}),
        (probe.is_directory, {"directory", "linked directory"}),
        (probe.is_real_directory, {"directory"}),
        (probe.is_link, {"link", "linked directory", "dangling", "loop"}),
    ],
)
def test_probe_of_every_kind_of_place(
    ask: Callable[[str], bool], yes: set[str], places: dict[str, str]
) -> None:
    assert {what for what, path in places.items() if ask(path)} == yes


@pytest.mark.parametrize("ask", ALL)
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_probe_that_the_system_does_not_answer_is_an_error_and_no_absence(
    ask: Callable[[str], bool], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "stat", failing)
    with pytest.raises(Environment, match="cannot look at it") as raised:
        ask("somewhere/config.json")
    assert raised.value.facts["file"] == "config.json"
