"""Tests can fail: for every promise a version of the product that breaks it, and the tests that must notice.

A mutant is a copy of the packages with one passage replaced; the named tests run against it in a process of their own
and have to fail.  Against a copy without a change all of them have to pass.
"""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"dsv4ckpt": "dsv4ckpt", "dsv4model": "dsv4model", "cli": "dsv4cli"}
PASSED, FAILED = 0, 1  # exit codes of pytest; all others are accidents


class Mutant(NamedTuple):
    """One broken promise."""

    breaks: str
    file: str
    passage: str  # stands there exactly once
    instead: str
    caught_by: str  # file of tests, and words that select among them


OUTDIR, CONVERT, KILL = "tests/ckpt/test_outdir.py", "tests/ckpt/test_convert.py", "tests/crash/test_kill.py"
MUTANTS = (
    # ---- a visible file is whole and stays so
    Mutant(
        "a shard is synced",
        "dsv4ckpt/sink.py",
        "            os.fsync(self._fd)\n",
        "",
        f"{OUTDIR} durable_before",
    ),
    Mutant(
        "a name is synced",
        "dsv4ckpt/outdir.py",
        "            sync_directory(os.path.dirname(final))\n",
        "",
        f"{OUTDIR} durable_before",
    ),
    Mutant(
        "a file written under its final name",
        "dsv4ckpt/outdir.py",
        "        key = hashlib",
        "        if name.endswith('.safetensors'):\n"
        "            return os.path.join(self.path, name)\n"
        "        key = hashlib",
        f"{KILL} few_times",
    ),
    Mutant(
        "temporaries are ours alone",
        "dsv4ckpt/sink.py",
        "os.O_CREAT | os.O_EXCL | os.O_CLOEXEC",
        "os.O_CREAT | os.O_CLOEXEC",
        f"{OUTDIR} there_already",
    ),
    Mutant(
        "small temporaries are ours alone",
        "dsv4ckpt/outdir.py",
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC",
        "os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC",
        f"{OUTDIR} there_already",
    ),
    Mutant(
        "the manifest comes last",
        "dsv4ckpt/run.py",
        "    _run_jobs(ours, run, num_workers)\n",
        "    out.publish_bytes(MANIFEST_NAME, b'{}', journal=False)\n    _run_jobs(ours, run, num_workers)\n",
        f"{KILL} few_times",
    ),
    Mutant(
        "a file of another size is refused",
        "dsv4ckpt/sink.py",
        "            if self._written != self._size:",
        "            if False:",
        f"{OUTDIR} another_size",
    ),
    # ---- the same command continues
    Mutant(
        "a finished file is there",
        "dsv4ckpt/outdir.py",
        "        is_here = _size_of(os.path.join(self.path, receipt.name)) == receipt.size\n",
        "        is_here = True\n",
        f"{OUTDIR} journal_line",
    ),
    Mutant(
        "a torn journal line does not count",
        "dsv4ckpt/outdir.py",
        'if not line.endswith(b"\\n") or crc != b"%08x" % zlib.crc32(text):',
        'if not line.endswith(b"\\n"):',
        f"{OUTDIR} changed_keeps_the_first",
    ),
    Mutant(
        "what nobody wrote down does not stay",
        "dsv4ckpt/outdir.py",
        "                os.unlink(final)\n",
        "                pass\n",
        f"{OUTDIR} does_not_stay",
    ),
    Mutant(
        "an unfinished run of other options is refused",
        "dsv4ckpt/outdir.py",
        "        if claimed is not None and claimed != claim:\n",
        "        if False:\n",
        f"{OUTDIR} another_plan",
    ),
    # ---- equal inputs, equal bytes
    Mutant(
        "files are listed in order",
        "dsv4ckpt/run.py",
        "in sorted(order | (out.finished",
        "in list(order | (out.finished",
        "tests/ckpt/test_determinism.py any_interpreter",
    ),
    # ---- every tensor once
    Mutant(
        "a name twice in a header is refused",
        "dsv4ckpt/strictjson.py",
        "    if len(result) != len(pairs):\n",
        "    if False:\n",
        "tests/hostile/test_headers.py hostile_file",
    ),
    Mutant(
        "a tensor in two shards is refused",
        "dsv4ckpt/source.py",
        "        if first.shard != item.name:\n",
        "        if False:\n",
        "tests/ckpt/test_conservation.py fifteenth",
    ),
    Mutant(
        "index and headers agree",
        "dsv4ckpt/source.py",
        "        if tensor not in weight_map:\n",
        "        if False:\n",
        "tests/hostile/test_index_and_config.py hostile",
    ),
    # ---- hostile files
    Mutant(
        "ranges leave no hole",
        "dsv4ckpt/shard.py",
        "        if entry.begin != position:\n",
        "        if entry.begin < position:\n",
        "tests/hostile/test_headers.py hostile_file",
    ),
    Mutant(
        "headers are bounded before they are parsed",
        "dsv4ckpt/shard.py",
        "        strictjson.require_modest(prefixed, _LIMITS)\n",
        "",
        "tests/ckpt/test_shard.py unparsed",
    ),
    Mutant(
        "links stay inside",
        "dsv4ckpt/contained.py",
        "    if not follow_links and not any(",
        "    if False and not any(",
        "tests/hostile/test_paths.py link",
    ),
    Mutant(
        "only regular files are read",
        "dsv4ckpt/contained.py",
        "        if not stat.S_ISREG(os.fstat(fd).st_mode):\n",
        "        if False:\n",
        "tests/hostile/test_paths.py replaced_by_something_else",
    ),
    Mutant(
        "an I/O error is no absence",
        "dsv4ckpt/probe.py",
        "        if error.errno in _ABSENT:\n",
        "        if True:\n",
        "tests/ckpt/test_probe.py",
    ),
    # ---- no silent numerics
    Mutant(
        "a source that changed is refused",
        "dsv4ckpt/source.py",
        "    if stamp(status) != place.stamp:\n",
        "    if False:\n",
        "tests/ckpt/test_source.py",
    ),
    Mutant(
        "a small file that changed is not published",
        "dsv4ckpt/run.py",
        "            if hashlib.sha256(data).hexdigest() != sha256:\n",
        "            if False:\n",
        "tests/crash/test_source_changes.py small_file",
    ),
    # ---- space, locks, signals
    Mutant(
        "space is asked for first",
        "dsv4ckpt/outdir.py",
        "    if free < needed:\n",
        "    if False:\n",
        f"{CONVERT} without_room",
    ),
    Mutant(
        "one process at a time",
        "dsv4ckpt/outdir.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB)\n            except OSError as error",
        "fcntl.LOCK_SH | fcntl.LOCK_NB)\n            except OSError as error",
        f"{OUTDIR} second",
    ),
    Mutant(
        "a signal stops the workers",
        "dsv4ckpt/stop.py",
        "        if self.is_set:\n",
        "        if False:\n",
        f"{CONVERT} stopped_anywhere",
    ),
    Mutant(
        "temporaries of the living stay",
        "dsv4ckpt/outdir.py",
        "not is_alive(int(parts[2]))",
        "True",
        f"{OUTDIR} living_process",
    ),
    Mutant(
        "modes follow the umask",
        "dsv4ckpt/outdir.py",
        "os.O_EXCL | os.O_CLOEXEC, 0o666)",
        "os.O_EXCL | os.O_CLOEXEC, 0o600)",
        f"{OUTDIR} umask",
    ),
    # ---- anyone can verify
    Mutant(
        "verify reads what it vouches for",
        "dsv4ckpt/verify.py",
        "    if sha256 == file.sha256:\n",
        "    if sha256 is not None:\n",
        "tests/ckpt/test_bit_flips.py few",
    ),
    Mutant(
        "no token is repeated",
        "cli/main.py",
        "    return _SECRETS.sub(lambda match: f\"{match['kept'] or 'hf_'}[removed]\", text)\n",
        "    return text\n",
        "tests/cli/test_secrets.py not_repeated",
    ),
    Mutant(
        "the list has every file",
        "dsv4ckpt/run.py",
        "    write_sums(out)\n",
        "",
        f"{CONVERT} sha256sum",
    ),
)


def copied(where: Path) -> Path:
    """The packages under the names that they are imported by."""
    for folder, package in PACKAGES.items():
        shutil.copytree(ROOT / folder, where / package, ignore=shutil.ignore_patterns("__pycache__"))
    return where


def mutated(where: Path, mutant: Mutant) -> Path:
    copied(where)
    folder, _, rest = mutant.file.partition("/")
    file = where / PACKAGES[folder] / rest
    text = file.read_text()
    assert text.count(mutant.passage) == 1, (
        f"the passage of {mutant.breaks!r} stands {text.count(mutant.passage)} times"
    )
    file.write_text(text.replace(mutant.passage, mutant.instead))
    return where


def outcome(packages: Path, file: str, words: str = "") -> subprocess.CompletedProcess[str]:
    """Run tests against other packages than the installed ones: from their folder, which Python puts first."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(ROOT / file)]
    environment = {**os.environ, "PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*command, "-k", words] if words else command,
        cwd=packages, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """What the tests said of each mutant, two mutants at a time."""
    base = tmp_path_factory.mktemp("mutants")

    def judged(mutant: Mutant) -> tuple[str, subprocess.CompletedProcess[str]]:
        file, _, words = mutant.caught_by.partition(" ")
        packages = mutated(base / str(MUTANTS.index(mutant)), mutant)
        done = outcome(packages, file, words)
        shutil.rmtree(packages)
        return mutant.breaks, done

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(pool.map(judged, MUTANTS))


@pytest.mark.slow
@pytest.mark.parametrize("breaks", [mutant.breaks for mutant in MUTANTS])
def test_mutant_is_caught(breaks: str, outcomes: dict[str, subprocess.CompletedProcess[str]]) -> None:
    done = outcomes[breaks]
    assert done.returncode == FAILED, f"the tests did not notice:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.mark.slow
def test_copy_without_a_change_passes_what_catches_mutants(tmp_path: Path) -> None:
    """The failures above are due to the mutations, and the tests do import the copy."""
    packages = copied(tmp_path)
    by_file: dict[str, set[str]] = {}
    for mutant in MUTANTS:
        file, _, words = mutant.caught_by.partition(" ")
        by_file.setdefault(file, set()).add(words)
    (packages / "dsv4ckpt" / "__init__.py").open("a").write("\nIS_THE_COPY = True\n")
    for file, words in by_file.items():
        done = outcome(packages, file, "" if "" in words else " or ".join(sorted(words)))
        assert done.returncode == PASSED, done.stdout[-3000:]
    for where in (packages, tmp_path.parent):  # of drivers, which start elsewhere
        command = [
            sys.executable,
            "-c",
            "import dsv4cli, dsv4ckpt; print(dsv4ckpt.IS_THE_COPY, dsv4cli.__file__)",
        ]
        environment = {**os.environ, "PYTHONPATH": str(packages)}
        found = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
        assert found.stdout.startswith(f"True {packages}"), found.stderr


def test_promises_have_different_mutants_and_the_product_has_their_passages(tmp_path: Path) -> None:
    assert len({mutant.breaks for mutant in MUTANTS}) == len(MUTANTS) >= 30
    for number, mutant in enumerate(MUTANTS):
        shutil.rmtree(mutated(tmp_path / str(number), mutant))
