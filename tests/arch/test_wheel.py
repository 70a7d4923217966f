"""The wheel holds exactly the three packages and the release configs, and works without the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"dsv4ckpt": "dsv4ckpt", "dsv4model": "dsv4model", "dsv4cli": "cli"}  # import package: folder
NOT_PRODUCT = shutil.ignore_patterns(".*", "build", "dist", "demo", "tests", "*.egg-info", "__pycache__")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building in the checkout leaves build/ behind, and a stale build/ gets into the wheel."""
    place = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, place / "source", ignore=NOT_PRODUCT)
    command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "wheel", "--quiet"]
    command += ["--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir", "-w", str(place), "."]
    done = subprocess.run(command, cwd=place / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = place.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Iterator[Path]:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            target = wheel.parent / "site" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))
    yield wheel.parent / "site"


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def info_of(wheel: Path) -> str:
    return "-".join(wheel.name.split("-")[:2]) + ".dist-info"


@pytest.mark.slow
def test_wheel_holds_exactly_the_three_packages_and_the_release_configs(wheel: Path) -> None:
    expected = {
        f"{package}/{file.relative_to(ROOT / folder)}"
        for package, folder in FOLDERS.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    expected |= {f"dsv4ckpt/releases/{file.name}" for file in (ROOT / "dsv4ckpt" / "releases").glob("*.json")}
    info = info_of(wheel)
    expected |= {
        f"{info}/{name}"
        for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    }
    assert contents(wheel) == expected
    assert len([name for name in expected if name.endswith(".json")]) == 8


def test_wheel_is_for_every_platform_and_offers_the_command(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        entry_points = archive.read(f"{info_of(wheel)}/entry_points.txt").decode()
        top_level = archive.read(f"{info_of(wheel)}/top_level.txt").decode().split()
    assert entry_points.split() == ["[console_scripts]", "dsv4", "=", "dsv4cli.main:main"]
    assert sorted(top_level) == sorted(FOLDERS)


_USE = """
import sys
sys.path.insert(0, sys.argv[1])
import dsv4ckpt, dsv4cli, dsv4model
from dsv4ckpt import plan, release, survey
for package in (dsv4ckpt, dsv4cli, dsv4model):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
print(len([release.shipped_config(name) for name in release.RELEASES]))
"""


@pytest.mark.slow
def test_wheel_works_without_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-c", _USE, str(unpacked)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("8\n", 0), done.stderr


def test_command_of_the_wheel_starts(unpacked: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(unpacked)!r}); sys.argv = ['dsv4', '--help']; import runpy; "
    code += "runpy.run_module('dsv4cli', run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "convert" in done.stdout
