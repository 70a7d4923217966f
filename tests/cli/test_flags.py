"""Every verb has its documented flags, says what it does, and can be started in every documented way."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from dsv4cli import main as cli
from forked import dsv4

ROOT = Path(__file__).parents[2]
COMMON = {"--json", "-q", "--quiet", "-v", "--verbose", "-h", "--help"}
FLAGS = {
    "sample": {
        "--release", "--layers", "--hidden", "--intermediate", "--experts", "--heads", "--vocab", "--target-size",
        "--release-dims", "--seed",
    },
    "inspect": {"--tensors", "--follow-symlinks"},
    "convert": {
        "--to", "--names", "--layers", "--mtp", "--max-shard-size", "--workers", "--dry-run", "--allow-nan",
        "--unit-scale", "--follow-symlinks", "--source", "--sidecar", "--scale-policy", "--accept-changes",
        "--allow-lossy", "--input-scales", "--bandwidth", "--ranks", "--scratch-limit", "--work", "--private",
    },
    "verify": {
        "--level", "--against-hub-oids", "--subset", "--tensor", "--unit-scale", "--workers", "--follow-symlinks",
    },
    "reshard": {
        "--to", "--names", "--experts", "--storage", "--to-dtype", "--chunk-bytes", "--max-file-size", "--workers",
        "--dry-run", "--allow-nan", "--prefix", "--like", "--source", "--sidecar", "--scale-policy", "--allow-lossy",
        "--follow-symlinks", "--scratch-limit",
    },
    "finetune": {"--dry-run", "--keys", "--ranks"},
    "export": {
        "--to", "--names", "--step", "--scale-policy", "--adapter", "--max-shard-size", "--workers", "--dry-run",
        "--allow-lossy", "--scratch-limit",
    },
    "dump": {"--ids", "--text", "--out", "--impl", "--dtype", "--only", "--follow-symlinks"},
    "parity": {"--atol", "--rtol", "--max-ulp"},
    "generate": {
        "--text", "--file", "--ids", "--chat", "--thinking", "--system", "--trust-encoding", "--max-new-tokens",
        "--temperature", "--top-p", "--seed", "--dtype", "--experts", "--device", "--follow-symlinks",
    },
    "push": {"--private", "--create-pr", "--revision", "--card", "--dry-run"},
}  # fmt: skip


@pytest.mark.parametrize("verb", FLAGS)
def test_flags_of_a_verb_are_exactly_the_documented_ones(verb: str) -> None:
    context = click.Context(cli.dsv4)
    command = cli.dsv4.get_command(context, verb)
    assert command is not None
    found = {flag for item in command.params if isinstance(item, click.Option) for flag in item.opts}
    assert found == FLAGS[verb] | (COMMON - {"-h", "--help"})


@pytest.mark.parametrize("verb", FLAGS)
def test_help_of_a_verb_shows_an_example_that_starts_with_its_name(verb: str) -> None:
    shown = CliRunner().invoke(cli.dsv4, [verb, "--help"])
    assert shown.exit_code == 0
    assert f"\n    dsv4 {verb} " in shown.output
    assert set(cli._VERBS) == set(FLAGS)


@pytest.mark.parametrize("flag", sorted({flag for flags in FLAGS.values() for flag in flags}))
def test_flag_is_explained_somewhere(flag: str) -> None:
    texts = [CliRunner().invoke(cli.dsv4, [verb, "--help"]).output for verb in FLAGS]
    assert any(flag in text for text in texts)


@pytest.mark.parametrize("start", [["-m", "dsv4cli"], ["-m", "cli"]])
def test_command_starts_as_a_module(start: list[str]) -> None:
    done = subprocess.run([sys.executable, *start, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "dsv4 0.1.0\n")


@pytest.mark.slow
def test_help_inspect_and_dry_run_import_no_torch(tmp_path: Path) -> None:
    """Importing torch takes seconds, reading headers does not."""
    program = (
        "import sys\n"
        "from dsv4cli import main as cli\n"
        "code = cli.dsv4.main(args=sys.argv[1:], standalone_mode=False)\n"
        "assert not code, code\n"
        "sys.exit(9 if 'torch' in sys.modules else 0)\n"
    )
    src = str(tmp_path / "src")
    assert CliRunner().invoke(cli.dsv4, ["sample", src, "-q"]).exit_code == 0
    ids = tmp_path / "oids.txt"
    files = sorted(Path(src).glob("*.safetensors"))
    ids.write_text(
        "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    )
    for arguments in (
        ["--help"],
        ["convert", "--help"],
        ["inspect", src],
        ["inspect", src, "--json"],
        ["convert", src, str(tmp_path / "out"), "--to", "bf16", "--dry-run"],
        ["verify", src, "--level", "structure"],
        ["verify", src, "--against-hub-oids", str(ids)],
    ):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)


@pytest.mark.slow
def test_json_is_one_document_on_stdout_and_words_go_to_stderr(tmp_path: Path) -> None:
    src, out = str(tmp_path / "src"), str(tmp_path / "out")
    for arguments in (
        ["sample", src],
        ["inspect", src, "--tensors", "*norm*"],
        ["convert", src, out, "--to", "bf16", "--dry-run"],
        ["convert", src, out, "--to", "bf16"],
        ["verify", out],
        ["verify", src, out],
    ):
        done = dsv4(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert isinstance(document, dict)
        assert done.stderr, arguments
