"""What tests of dsv4 push share: the command, and what a Hub holds in words that a directory can be compared with."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from dsv4cli import main as cli
from server import OWNERS_TOKEN, Commit, Fault, Hub, Request

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


class Verbs:
    """Commands in processes of their own, forked from one that is ready: tests/hub/verbs_driver.py."""

    def __init__(self, hub: Hub, home: Path, token: str = OWNERS_TOKEN) -> None:
        self._driver = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "verbs_driver.py")],
            env=environment(hub, home, token) | {"OMP_NUM_THREADS": "1"},
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._child, self._has_ended = 0, threading.Event()

    def __call__(self, *arguments: object) -> Done:
        """Returns when it has ended; the code is minus the signal that ended it."""
        stdin, stdout = self._driver.stdin, self._driver.stdout
        assert stdin is not None and stdout is not None
        self._has_ended.clear()
        stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        stdin.flush()
        self._child = int(stdout.readline())
        done = Done(*json.loads(stdout.readline()))
        self._child = 0
        self._has_ended.set()
        return done

    def kill(self, number: int = signal.SIGKILL) -> None:
        """From another thread."""
        if self._child:
            os.kill(self._child, number)

    def wait(self) -> None:
        """From another thread: until it has ended."""
        assert self._has_ended.wait(60)

    def close(self) -> None:
        assert self._driver.stdin is not None
        self._driver.stdin.close()
        self._driver.wait(60)


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


def require_honest(hub: Hub) -> None:
    """An index is only there with all its shards, and a manifest with all its files."""
    if REPO not in hub.repos:
        return
    for commit in hub.repos[REPO].branches["main"]:
        if INDEX in commit.files:
            content = commit.files[INDEX].content
            assert content is not None
            assert {*json.loads(content)["weight_map"].values()} <= commit.files.keys()
        if MANIFEST in commit.files:
            content = commit.files[MANIFEST].content
            assert content is not None
            assert {row["file"] for row in json.loads(content)["files"]} <= commit.files.keys()


class Killer:
    """Kills a command when its n-th request has come, and lets the Hub carry that one out or not."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.verbs = hub, Verbs(hub, home)
        self.resent, self.num_killed = list[str](), 0
        self._left, self._is_done = 0, True
        self._counts: Callable[[], bool] = lambda: True
        hub.on_request = self._see

    def killed(
        self, moment: int, *, is_done: bool, counts: Callable[[], bool] = lambda: True
    ) -> Callable[..., Done]:
        """What carries a command out, and kills it at its `moment`-th request of those that come while `counts`.

        is_done   the request is carried out all the same
        """

        def command(*arguments: object) -> Done:
            self._left, self._is_done, self._counts = moment, is_done, counts
            done = self.verbs(*arguments)
            self.num_killed += done.code == -signal.SIGKILL
            assert done.code in (0, -signal.SIGKILL), done
            self._left = 0
            return done

        return command

    def _see(self, request: Request) -> None:
        oid = request.path.removeprefix(PUT)[:64]
        if request.method == "PUT" and oid in self.hub.blobs:
            self.resent.append(oid)
        with self.hub.lock:
            counts = self._left > 0 and self._counts()
            self._left -= counts
            kills = counts and self._left == 0
        if kills:
            self.verbs.kill()
            self.verbs.wait()
            if not self._is_done:
                raise ConnectionError("the client is gone")

    def __enter__(self) -> Killer:
        return self

    def __exit__(self, *_: object) -> None:
        self.verbs.close()
