"""dsv4 push killed at any request: what can be seen never lies, and the same command goes on."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from pushing import INDEX, MANIFEST, REPO, commits, hashes, on_hub, started
from server import SIGNATURE, Hub, Refused, Request, serving

USUAL_REQUESTS = 90  # of one whole push of the sample


class Killer:
    """Kills a push when its n-th request has come, and lets the Hub carry that one out or not."""

    def __init__(self, hub: Hub) -> None:
        self.hub, self.resent = hub, list[str]()
        self.process, self.left, self.is_done = None, 0, True
        self.lock = threading.Lock()
        hub.on_request = self.see

    def see(self, request: Request) -> None:
        oid = request.path.removeprefix("/storage/")[:64]
        if request.method == "PUT" and oid in self.hub.blobs:
            self.resent.append(oid)
        with self.lock:
            self.left -= 1
            kills = self.left == 0 and self.process is not None
        if kills:
            self.process.kill()
            self.process.wait()
            if not self.is_done:
                raise Refused(500, "the connection is gone")


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


@pytest.mark.slow
def test_push_that_is_killed_again_and_again_ends_with_the_same_content(
    published: Path, tmp_path: Path, often: Callable[[int, int], int]
) -> None:
    chance = random.Random(7)
    with serving(part_bytes=120_000) as hub:
        killer, num_killed = Killer(hub), 0
        for trial in range(often(6, 60)):
            if trial % 6 == 0:  # from nothing, after it was complete
                hub.repos.clear()
                hub.blobs.clear()
            killer.left, killer.is_done = chance.randint(3, USUAL_REQUESTS // 2), trial % 2 == 0
            killer.process = started(hub, tmp_path, "push", published, REPO)
            killer.process.communicate(timeout=60)
            num_killed += killer.process.returncode == -9
            require_honest(hub)
            if trial % 6 == 5:
                killer.process = None
                last = started(hub, tmp_path, "push", published, REPO)
                out, err = last.communicate(timeout=60)
                assert (last.returncode, err) == (0, ""), out
                require_honest(hub)
                assert on_hub(hub) == hashes(published)
                assert len(commits(hub)) == 3
        assert killer.resent == []  # what had come was not sent again
        assert num_killed >= trial / 2  # the others were done before


@pytest.mark.slow
def test_process_of_its_own_says_and_writes_no_token(published: Path, tmp_path: Path) -> None:
    token = "hf_LocalHubOwner0123456789"
    with serving(part_bytes=120_000) as hub:
        process = started(hub, tmp_path, "push", published, REPO, "-v", "--json")
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert on_hub(hub) == hashes(published)
        kept = [*hub.blobs.values(), *(item.content or b"" for item in hub.repos[REPO].files().values())]
        titles = [commit.title.encode() for commit in commits(hub)]
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    for data in [out.encode(), err.encode(), *kept, *titles, *written]:
        assert token.encode() not in data and SIGNATURE.encode() not in data
