"""Puts tests/ on sys.path (pytest's rootdir import mode), so that every folder below can import tiny and tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nightly", action="store_true", help="the long versions: more kills, an hour of fuzzing"
    )


@pytest.fixture(scope="session")
def often(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """often(usual, nightly): how many times to try."""
    nightly: bool = pytestconfig.getoption("--nightly")
    return lambda usual, many: many if nightly else usual


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other, for seconds where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flash sample, made once per session. Nobody writes into it: take tiny.copy_of."""
    return tiny.make_sample("flash", tmp_path_factory.mktemp("tiny") / "flash")


@pytest.fixture(scope="session")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flash sample of one layer and 0.9 MB, for what is done a thousand times. Nobody writes into it."""
    path = tmp_path_factory.mktemp("tiny") / "smallest"
    return tiny.make_sample("flash", path, **tiny.SMALLEST)


@pytest.fixture
def checkpoint(flash: Path, tmp_path: Path) -> Path:
    """A flash sample of the test's own, to be broken."""
    return tiny.copy_of(flash, tmp_path / "checkpoint")
