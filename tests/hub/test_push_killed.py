"""dsv4 push killed at any request: what can be seen never lies, and the same command goes on."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from pushing import REPO, Killer, commits, hashes, on_hub, require_honest
from server import serving

USUAL_REQUESTS = 90  # of one whole push of the sample
TRIALS = 4  # on one repository


@pytest.mark.slow
def test_push_that_is_killed_again_and_again_ends_with_the_same_content(
    published: Path, tmp_path: Path, often: Callable[[int, int], int]
) -> None:
    chance = random.Random(7)
    with serving(part_bytes=120_000) as hub, Killer(hub, tmp_path) as killer:
        for trial in range(often(24, 72)):
            moment = chance.randint(3, USUAL_REQUESTS // 2)
            killer.killed(moment, is_done=trial % 2 == 0)("push", published, REPO)
            require_honest(hub)
            if trial % TRIALS == TRIALS - 1:
                last = killer.verbs("push", published, REPO)
                assert (last.code, last.err) == (0, ""), last
                require_honest(hub)
                assert on_hub(hub) == hashes(published)
                assert len(commits(hub)) == 3
                hub.repos.clear()
                hub.blobs.clear()
        assert killer.resent == []  # what had come was not sent again
        assert killer.num_killed >= often(20, 60)  # the others were done before
