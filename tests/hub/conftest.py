"""A directory to publish, a Hub on this machine, and the command that speaks with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import server
import tiny
from huggingface_hub import constants
from pushing import Push, run
from server import OWNERS_TOKEN, Hub

from dsv4ckpt import hub as remote
from dsv4ckpt import hub_source
from dsv4ckpt.stop import StopFlag


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion of 12 shards: two groups and the last commit. Nobody writes into it: take tiny.copy_of."""
    at = tmp_path_factory.mktemp("hub")
    tiny.make_sample("flash", at / "flash", **tiny.SMALLEST)
    done = run("convert", at / "flash", at / "bf16", "--to", "bf16", "--max-shard-size", "150KB", "-q")
    assert done == (0, "", "")
    assert len(list((at / "bf16").glob("*.safetensors"))) == 12
    return at / "bf16"


@pytest.fixture
def directory(published: Path, tmp_path: Path) -> Path:
    """The test's own."""
    return tiny.copy_of(published, tmp_path / "bf16")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub, and this process set up as HF_ENDPOINT, HF_HUB_DISABLE_XET and HF_TOKEN would have done it."""
    with server.serving(part_bytes=120_000) as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.endpoint)
        template = made.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", OWNERS_TOKEN)
        yield made


@pytest.fixture
def push(hub: Hub, directory: Path) -> Push:
    """dsv4 push of the test's directory to tester/model."""
    return lambda *flags: run("push", directory, "tester/model", *flags)


@pytest.fixture
def source(hub: Hub, smallest: Path) -> str:
    """What a verb is given for the smallest sample, which is on the Hub."""
    hub.seed("lab/flash", smallest)
    return "hf://lab/flash"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited before asking again; nobody waits."""
    waited: list[float] = []
    made = remote.Repo.__init__

    def init(repo: remote.Repo, name: str, revision: str | None = None) -> None:
        made(repo, name, revision)
        repo.pause = waited.append

    def pause(stop: StopFlag, seconds: float) -> None:
        stop.check()
        waited.append(seconds)

    monkeypatch.setattr(remote.Repo, "__init__", init)
    monkeypatch.setattr(hub_source, "pause", pause)
    return waited
