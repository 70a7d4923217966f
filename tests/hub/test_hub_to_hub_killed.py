"""dsv4 convert hf://SRC hf://DST, killed or stopped at any time: nothing seen lies, and the same command goes on."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pushing import (
    MANIFEST,
    REPO,
    Killer,
    hashes,
    on_hub,
    require_honest,
    started,
)
from server import Hub, Request, serving

pytestmark = pytest.mark.slow

SRC = "lab/flash"
LIMIT = "1MB"  # less than source and output together
COMMAND = (
    "convert",
    f"hf://{SRC}",
    f"hf://{REPO}",
    "--to",
    "bf16",
    "--max-shard-size",
    "150KB",
    "--scratch-limit",
)
USUAL_REQUESTS = 160  # of one whole conversion of the sample
LAST_REQUESTS = 18  # of what comes after its shards
TRIALS = 6  # on one repository


def shown(hub: Hub) -> set[str]:
    """Shards that the last commit has."""
    files = hub.repos[REPO].files() if REPO in hub.repos else {}
    return {name for name in files if name.endswith(".safetensors")}


def test_conversion_onto_the_hub_that_is_killed_again_and_again_ends_with_the_same_content(
    published: Path, tmp_path: Path, often: Callable[[int, int], int]
) -> None:
    """On the way shards that a commit shows are neither made again nor sent."""
    chance = random.Random(7)
    work = tmp_path / "model.partial"
    manifest, num_late = work / MANIFEST, 0
    made_again: list[str] = []
    with serving(part_bytes=120_000) as hub, Killer(hub, tmp_path) as killer:
        hub.seed(SRC, published.parent / "flash")
        kill, before = hub.on_request, set[str]()

        def see(request: Request) -> None:
            # what a commit showed before this run: a killed one may have left it, but nobody makes it again
            made_again.extend(
                name for name in before if (work / name).exists() and (work / name).stat().st_mtime_ns > began
            )
            kill(request)

        hub.on_request = see
        expected = hashes(published)
        del expected[MANIFEST]
        for trial in range(often(24, 72)):
            before, began = shown(hub), time.time_ns()
            is_last = trial % TRIALS == TRIALS - 1
            if is_last:  # after the manifest is here, and before it is there
                killed = killer.killed(
                    chance.randint(1, LAST_REQUESTS),
                    is_done=bool(trial // TRIALS % 2),
                    counts=manifest.exists,
                )
            else:
                killed = killer.killed(chance.randint(20, USUAL_REQUESTS // 2), is_done=trial % 2 == 0)
            killed(*COMMAND, LIMIT, "--workers", trial % 3 + 1)
            num_late += is_last and manifest.exists()
            require_honest(hub)
            if is_last:
                before, began = shown(hub), time.time_ns()
                last = killer.verbs(*COMMAND, LIMIT)
                assert (last.code, last.err) == (0, ""), last
                require_honest(hub)
                found = on_hub(hub)
                assert (
                    json.loads(hub.repos[REPO].files()[MANIFEST].content or b"")["source_repository"] == SRC
                )
                del found[MANIFEST]
                assert found == expected
                assert not work.exists()
                del hub.repos[REPO]
                for name in expected:
                    hub.blobs.pop(expected[name], None)
        assert killer.resent == [] and made_again == []
        assert killer.num_killed >= often(20, 60)  # the others were done before
        assert num_late >= often(2, 6)


def test_ctrl_c_ends_the_command_at_once_while_a_shard_is_sent(published: Path, tmp_path: Path) -> None:
    """A fresh process: at its end the interpreter waits for threads."""
    asked, released = threading.Event(), threading.Event()

    def see(request: Request) -> None:
        if request.method == "PUT":
            asked.set()
            released.wait(60)

    with serving(part_bytes=120_000) as hub:
        hub.on_request = see
        flash, flags = published.parent / "flash", COMMAND[2:]
        process = started(hub, tmp_path, "convert", flash, *flags, LIMIT, "--work", tmp_path / "work")
        assert asked.wait(60)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - began < 5
        released.set()
    assert process.returncode == 130 and err.startswith("Interrupted: "), err
    assert [*(tmp_path / "work").glob("*.safetensors")]  # what is finished stays
