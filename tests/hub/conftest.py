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
