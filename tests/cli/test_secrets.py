"""No token, host, user, place or time in anything that the command writes or says.

Everything runs in a process whose environment and directories bear words that occur nowhere else; then every byte of
every output file and every word on stdout and stderr is searched for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
from dsv4cli import main as cli
from test_errors_page import ROOT, WAYS, make, provoked, said

from dsv4ckpt import outdir, source
from dsv4ckpt.errors import Dsv4Error
from dsv4ckpt.formats import WORK_NAME

TOKEN = "hf_QqZzXxWwVvUuTtSs0192837465"
PLACE, HOME, USER, HOST = "aardvark-place", "badger-home", "caiman-user", "dingo-host"
SIZES = "--layers 1 --hidden 128 --intermediate 32 --experts 6 --heads 2"
ROUND = [
    f"sample flash {SIZES}",
    "inspect flash",
    "inspect flash --json --tensors *norm*",
    "inspect flash/model-00001-of-00004.safetensors",
    "convert flash bf16 --to bf16 --dry-run --json",
    "convert flash bf16 --to bf16 -v",
    "convert flash bf16 --to bf16 --json",  # it was complete already
    "convert flash hf --to bf16 --names transformers --json",
    "convert hf back --to native",
    "convert flash fp8 --to fp8 -q",
    "verify bf16 --level structure",
    "verify bf16 --json",
    "verify flash hf --level values",
    "verify flash back --level bytes -v",
    "verify bf16 --against-hub-oids bf16/dsv4.sha256",
]
OUTPUTS = ("flash", "bf16", "hf", "back", "fp8")
MISTAKES = [
    "inspect nowhere",
    "inspect",
    "frobnicate flash",
    "convert flash bf16 --to fp4",
    "convert flash flash --to bf16",
    "convert flash fp8 --to bf16 -v",
    "convert hf://org out --to bf16",
    "convert flash out --to native --sidecar nowhere",
    "convert flash out --to nvfp4 --input-scales flash/config.json",
    "verify flash bf16 --tensor no.such.tensor --json",
    "verify bf16 --against-hub-oids flash/config.json -v",
    "sample bf16",
]
RUN_ALL = """
import json, os, socket, sys
socket.gethostname = lambda: os.environ["HOSTNAME"]
from dsv4cli.main import main
for command in json.loads(sys.argv[1]):
    try:
        main(command.split())
    except SystemExit as ended:
        print(command, "->", ended.code, flush=True)
"""


def forbidden(base: Path) -> list[str]:
    """What must not appear: the words of the environment, and where things lie on this machine."""
    return [TOKEN, PLACE, HOME, USER, HOST, str(base), str(ROOT)]


def surroundings(base: Path, mark: str = "") -> dict[str, str]:
    """An environment full of words that may not leave it."""
    home = base / f"{HOME}{mark}"
    home.mkdir(parents=True, exist_ok=True)
    return {
        "PATH": os.environ["PATH"],
        "HF_TOKEN": TOKEN + mark,
        "HUGGING_FACE_HUB_TOKEN": TOKEN + mark,
        "HOME": str(home),
        "USER": USER + mark,
        "LOGNAME": USER + mark,
        "HOSTNAME": HOST + mark,
    }


class Round(NamedTuple):
    """A whole round of commands in one process."""

    base: Path
    at: Path
    words: str


def went_round(base: Path, mark: str = "") -> Round:
    at = base / f"{PLACE}{mark}"
    at.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(ROUND + MISTAKES)],
        cwd=at, env=surroundings(base, mark), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    codes = [int(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if " -> " in line[-8:]]
    assert codes[: len(ROUND)] == [0] * len(ROUND), done.stdout + done.stderr
    assert len(codes) == len(ROUND) + len(MISTAKES) and set(codes[len(ROUND) :]) <= {2, 3}, codes
    return Round(base, at, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> list[Round]:
    """The same commands on two machines, as far as they can tell."""
    return [went_round(tmp_path_factory.mktemp("one")), went_round(tmp_path_factory.mktemp("two"), "-other")]


def files_of(item: Round) -> dict[str, bytes]:
    """Everything that lies in the outputs."""
    return {
        str(file.relative_to(item.at)): file.read_bytes()
        for name in OUTPUTS
        for file in sorted((item.at / name).rglob("*"))
        if file.is_file()
    }


@pytest.mark.slow
def test_no_output_file_holds_a_word_of_its_surroundings(rounds: list[Round]) -> None:
    files = files_of(rounds[0])
    assert len(files) > 40
    for name, data in files.items():
        found = [word for word in forbidden(rounds[0].base) if word in name or word.encode() in data]
        assert found == [], name


@pytest.mark.slow
def test_no_word_of_its_surroundings_is_said(rounds: list[Round]) -> None:
    """All paths were typed relative: whatever is absolute comes from elsewhere."""
    words = rounds[0].words
    assert [word for word in forbidden(rounds[0].base) if word in words] == []
    assert [word for word in words.split() if word.strip("'\"(").startswith(("/", "~/"))] == []


@pytest.mark.slow
def test_another_environment_at_another_time_gives_the_same_bytes(rounds: list[Round]) -> None:
    """What is compressed or hashed cannot hide anything either."""
    assert files_of(rounds[0]) == files_of(rounds[1])


@pytest.mark.slow
def test_nothing_of_the_work_directory_is_left_in_outputs(rounds: list[Round]) -> None:
    assert [name for name in files_of(rounds[0]) if WORK_NAME in name.split("/")] == []


@pytest.mark.slow
def test_absolute_path_that_the_user_types_stays_out_of_files(rounds: list[Round], tmp_path: Path) -> None:
    flash, out = rounds[0].at / "flash", tmp_path / "out"
    done = said(f"convert {flash} {out} --to bf16")
    assert done.exit_code == 0 and str(flash) in done.out
    files = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    typed = {name: data for name, data in files_of(rounds[0]).items() if name.startswith("bf16/")}
    assert {f"bf16/{name}": data for name, data in files.items()} == typed


def test_lock_names_process_and_host_only_while_a_run_is_going(tmp_path: Path) -> None:
    """On purpose: the message of Busy shows it to whoever comes second."""
    out = tmp_path / "out"
    with outdir.open_outdir(str(out), "0" * 64, {"a"}) as held:
        lock = (out / WORK_NAME / "lock").read_text()
        assert lock == f"process {os.getpid()} on {socket.gethostname()}"
        others = [file for file in (out / WORK_NAME).iterdir() if file.name != "lock"]
        assert not [file for file in others if socket.gethostname().encode() in file.read_bytes()]
        held.publish_bytes("a", b"content")
        held.clean()
    assert os.listdir(out) == ["a"]


# ---- every class of error


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("secrets") / "made")


@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.__name__)
def test_error_says_nothing_of_its_surroundings(
    kind: type[Dsv4Error], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in surroundings(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    _, done = provoked(kind, made, tmp_path / PLACE, "--json -v")
    assert done.err.splitlines()[-1].startswith("    do ")
    assert json.loads(done.out[done.out.rindex('{\n  "error"') :])["error"]["class"] == kind.__name__
    assert [word for word in forbidden(tmp_path) if word in done.out + done.err] == []


# ---- tokens in what a file says


def refused(at: Path, command: str) -> tuple[str, dict[str, Any]]:
    """stderr, and the error as JSON."""
    with contextlib.chdir(at):
        done = said(f"{command} --json")
    assert done.exit_code in (2, 3)
    return done.err, json.loads(done.out)["error"]


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (TOKEN, TOKEN),
        (f"x{TOKEN}.bin", TOKEN),
        ("Authorization: Bearer abc.def-ghi=", "abc.def-ghi="),
        ("authorization=abcdefgh", "abcdefgh"),
        ('{"Authorization": "Basic dXNlcjpwYXNz"}', "dXNlcjpwYXNz"),
        ("https://host/file?X-Amz-Signature=0123abcd&x=1", "0123abcd"),
    ],
)
def test_secret_in_a_config_value_is_not_repeated(checkpoint: Path, text: str, secret: str) -> None:
    tiny.edit_json(checkpoint / tiny.CONFIG, lambda config: config.update(model_type=text))
    words, document = refused(checkpoint, "convert . ../out --to bf16")
    assert words.startswith("BadConfig") and secret not in words and "[removed]" in words
    assert secret not in json.dumps(document) and "[removed]" in document["found"]


def test_token_in_a_file_name_is_not_repeated(checkpoint: Path) -> None:
    tiny.edit_weight_map(checkpoint, lambda names: names.update({"norm.weight": f"{TOKEN}.safetensors"}))
    words, document = refused(checkpoint, "inspect .")
    assert words.startswith("MissingFile") and TOKEN not in words
    assert document["expected"] == "hf_[removed].safetensors"


def test_token_on_the_command_line_is_not_repeated() -> None:
    done = said(f"{TOKEN} flash")
    assert done.exit_code == 2
    assert TOKEN not in done.err and "there is no verb 'hf_[removed]'" in done.err


def test_harmless_names_stay_as_they_are(checkpoint: Path) -> None:
    harmless = {"a.weight": "hf_quant.safetensors", "b.weight": "hf_1234567.safetensors"}
    tiny.edit_weight_map(checkpoint, lambda names: names.update(harmless))
    assert all(name in refused(checkpoint, "inspect .")[0] for name in harmless.values())


@pytest.mark.parametrize("flag", ["", " -v"])
def test_our_own_bug_is_told_without_secrets_and_places(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    secret = str(ROOT / "dsv4ckpt" / "source.py")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"{TOKEN} of {secret} in {Path.home() / 'x'}; Authorization: Bearer abc123")

    monkeypatch.setattr(source, "open_checkpoint", fail)
    monkeypatch.setenv("HOME", str(checkpoint / HOME))
    done = said(f"inspect {checkpoint}{flag}")
    assert done.exit_code == cli._OUR_BUG
    assert "internal error: RuntimeError: hf_[removed] of dsv4ckpt/source.py in ~/x;" in done.err
    assert ("Traceback" in done.err) == bool(flag)
    assert not [word for word in (TOKEN, "abc123", f"{ROOT}/", HOME) if word in done.err]
