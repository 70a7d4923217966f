"""Samples that several tests read; nobody writes into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch

from dsv4ckpt import run, sample


@pytest.fixture(scope="session")
def sample_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a release's tiny sample."""
    made: dict[str, Path] = {}

    def directory(release: str) -> Path:
        if release not in made:
            made[release] = tmp_path_factory.mktemp("samples") / release
            sample.write_sample(sample.plan_sample(sample.SampleOptions(release=release)), str(made[release]))
        return made[release]

    return directory


@pytest.fixture
def flushing() -> Iterator[None]:
    """Subnormal operands and results count as zero while the test runs."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no flush-to-zero mode")
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def convert() -> Callable[..., run.Summary]:
    return tiny.convert


@pytest.fixture(scope="session")
def tree_of() -> Callable[[Path], dict[str, str]]:
    return tiny.tree_of
