"""What tests of dsv4 push share: the command, and what a Hub holds in words that a directory can be compared with."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from dsv4cli import main as cli
from server import OWNERS_TOKEN, Commit, Fault, Hub

REPO = "tester/model"
INDEX, MANIFEST, CARD = "model.safetensors.index.json", "dsv4.manifest.json", "README.md"
PUT, COMMIT = "/storage/", "/commit/"


class Done(NamedTuple):
    code: int
    out: str
    err: str


def run(*arguments: object) -> Done:
    """The command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out), pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return Done(int(left.value.code or 0), out.getvalue(), err.getvalue())


def environment(hub: Hub, home: Path, token: str = OWNERS_TOKEN) -> dict[str, str]:
    """For a process of its own: nothing but what it needs."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token,
    }


def started(hub: Hub, home: Path, *arguments: object) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "dsv4cli", *(str(argument) for argument in arguments)]
    return subprocess.Popen(
        command, env=environment(hub, home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


Push = Callable[..., Done]


def hashes(directory: Path) -> dict[str, str]:
    return tiny.tree_of(directory)


def on_hub(hub: Hub, branch: str = "main", repo: str = REPO) -> dict[str, str]:
    """SHA-256 of every file of a branch, of what is really kept, but the card and what the Hub itself put there."""
    files = hub.repos[repo].files(branch)
    contents = {
        name: item.content if item.sha256 is None else hub.blobs[item.sha256] for name, item in files.items()
    }
    return {
        name: hashlib.sha256(content or b"").hexdigest()
        for name, content in contents.items()
        if name not in (".gitattributes", CARD)
    }


def card_on_hub(hub: Hub, branch: str = "main") -> str:
    content = hub.repos[REPO].files(branch)[CARD].content
    assert content is not None
    return content.decode()


def commits(hub: Hub, branch: str = "main") -> list[Commit]:
    return hub.repos[REPO].branches[branch][1:]


def fault(hub: Hub, method: str, path: str, what: int | str, count: int = 1, **headers: str) -> None:
    hub.faults.append(Fault(method, path, what, count, {"Retry-After": "0"} | headers))


def refused(done: Done, kind: str, code: int) -> str:
    assert done.code == code, done
    assert done.err.startswith(f"{kind}: ") and "\n    do " in done.err, done.err
    return done.err


def nothing_sent(hub: Hub) -> bool:
    return hub.sent() == 0 and hub.count("POST", COMMIT) == 0
