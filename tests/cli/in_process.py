"""The command in the test's own process, since importing torch takes seconds: what a run of it gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from dsv4cli import main as cli


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Dsv4 = Callable[..., Done]


@pytest.fixture
def dsv4(capfd: pytest.CaptureFixture[str]) -> Dsv4:
    """Run the command here. A module of tests gets it by importing its name."""

    def run(*arguments: object) -> Done:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        code = left.value.code
        assert isinstance(code, int)
        return Done(code, *capfd.readouterr())

    return run
