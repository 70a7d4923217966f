"""What `import dsv4model` offers: seen from a fresh process, since modules of the package are loaded once."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import sys
import dsv4model
assert "torch" not in sys.modules
first = dsv4model.load, dsv4model.save
import dsv4model.loading, dsv4model.saving
assert first == (dsv4model.load, dsv4model.save) == (dsv4model.loading.load, dsv4model.saving.save)
"""


@pytest.mark.slow
def test_load_and_save_are_functions_however_often_they_are_asked_for() -> None:
    """The modules that hold them once had their names, and took their places after the first use."""
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
