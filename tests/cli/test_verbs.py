"""The verbs as a newcomer uses them, with the mistakes people make."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import dsv4

from dsv4ckpt.release import RELEASES


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command from the start of an interpreter to its end."""
    command = [sys.executable, "-m", "dsv4cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "flash"
    assert process("sample", directory).returncode == 0
    return directory


@pytest.fixture(scope="module")
def bf16(flash: Path) -> Path:
    directory = flash.parent / "bf16"
    assert process("convert", flash, directory, "--to", "bf16").returncode == 0
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_first_round_sample_inspect_convert_verify(release: str, tmp_path: Path) -> None:
    src, out = tmp_path / "a directory with blanks", tmp_path / "out"
    assert dsv4("sample", src, "--release", release).returncode == 0
    shown = dsv4("inspect", src)
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"{release}, stored as ")
    assert "conform: every tensor of the inventory is there" in shown.stdout
    assert dsv4("convert", src, out, "--to", "bf16", "--names", "transformers").returncode == 0
    verified = dsv4("verify", src, out, "--level", "values", "--json")
    assert verified.returncode == 0
    counts = json.loads(verified.stdout)["values"]["counts"]
    assert counts["same values"] > 100
    assert counts["differs"] == counts["missing"] == counts["extra"] == 0
    assert dsv4("verify", out).returncode == 0


@pytest.mark.slow
def test_inspect_reports_every_deviation_and_exits_3(flash: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    src = tmp_path / "src"
    src.mkdir()
    tensors = {}
    for file in flash.glob("*.safetensors"):
        tensors |= load_file(file)
    (src / "config.json").write_bytes((flash / "config.json").read_bytes())
    del tensors["norm.weight"], tensors["layers.0.attn.wq_a.scale"], tensors["layers.1.attn.wkv.weight"]
    tensors["head.weight"] = tensors["head.weight"].float()
    tensors["layers.2.attn.q_norm.weight"] = tensors["layers.2.attn.q_norm.weight"][:64].clone()
    tensors["stranger"] = tensors["embed.weight"][:1].clone()
    save_file(tensors, src / "model.safetensors")
    done = dsv4("inspect", src, "--json")
    assert done.returncode == 3
    found = {(item["problem"], item["name"]) for item in json.loads(done.stdout)["deviations"]}
    assert found == {
        ("missing", "norm.weight"),
        ("weight without scale", "layers.0.attn.wq_a.scale"),
        ("scale without weight", "layers.1.attn.wkv.weight"),
        ("dtype", "head.weight"),
        ("shape", "layers.2.attn.q_norm.weight"),
        ("extra", "stranger"),
    }
    words = dsv4("inspect", src).stdout
    assert "BROKEN: 6 deviations" in words
    assert all(repr(name) in words for _, name in found)


def test_inspect_notes_a_wrong_total_size(flash: Path, tmp_path: Path) -> None:
    src = tmp_path / "src"
    subprocess.run(["cp", "-r", str(flash), str(src)], check=True)
    index = src / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    right, document["metadata"]["total_size"] = document["metadata"]["total_size"], 12345
    index.write_text(json.dumps(document))
    done = dsv4("inspect", src)
    assert done.returncode == 0
    assert f"total_size in the index is 12,345, the tensors have {right:,} bytes" in done.stdout


def test_inspect_single_file_lists_its_tensors(flash: Path) -> None:
    done = process("inspect", flash / "model-00001-of-00007.safetensors")
    assert done.returncode == 0
    assert "embed.weight" in done.stdout


def test_inspect_glob_selects_tensors(flash: Path) -> None:
    done = dsv4("inspect", flash, "--tensors", "layers.2.attn.indexer.*", "--json")
    listed = {item["name"] for item in json.loads(done.stdout)["listed"]}
    assert len(listed) == 7
    assert all(name.startswith("layers.2.attn.indexer.") for name in listed)


@pytest.mark.slow
def test_dry_run_writes_nothing_and_says_what_would_be(flash: Path, tmp_path: Path) -> None:
    done = dsv4(
        "convert", flash, tmp_path / "out", "--to", "bf16", "--layers", "0-1", "--mtp", "drop", "--dry-run"
    )
    assert done.returncode == 0
    assert not (tmp_path / "out").exists()
    assert "by --mtp drop" in done.stdout
    assert "by --layers" in done.stdout
    assert "model-00001-of-00004.safetensors" in done.stdout
    real = dsv4("convert", flash, tmp_path / "out", "--to", "bf16", "--layers", "0-1", "--mtp", "drop")
    assert real.returncode == 0
    for line in done.stdout.splitlines():
        if line.strip().startswith("model-"):
            name, _, size = line.split()
            assert (tmp_path / "out" / name).stat().st_size == int(size.replace(",", ""))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["frobnicate"], 2, "there is no verb"),
        (["convert", "FLASH"], 2, "DST"),
        (["convert", "FLASH", "OUT"], 2, "--to"),
        (["convert", "FLASH", "OUT", "--to", "bf17"], 2, "bf16"),
        (["convert", "FLASH", "FLASH", "--to", "bf16"], 2, "DST is SRC"),
        (["convert", "FLASH", "BF16", "--to", "bf16", "--mtp", "drop"], 2, "not empty"),
        (["convert", "NOWHERE", "OUT", "--to", "bf16"], 3, "no such file or directory"),
        (["convert", "FLASH", "OUT", "--to", "bf16", "--layers", "4"], 2, "layers 0 to 3"),
        (["convert", "FLASH", "OUT", "--to", "bf16", "--layers", "3-1"], 2, "0-3"),
        (["convert", "FLASH", "OUT", "--to", "bf16", "--max-shard-size", "5 bananas"], 2, "5GB"),
        (["convert", "FLASH", "OUT", "--to", "bf16", "--allow-nan", "nobody"], 2, "'nobody'"),
        (["convert", "FLASH", "OUT", "--to", "bf16", "--unit-scale", "nobody"], 2, "'nobody'"),
        (["convert", "FLASH", "OUT", "--to", "bf16", "--workers", "0"], 2, "1<=x<=64"),
        (["convert", "FLASH", "/dev/null/out", "--to", "bf16"], 4, "Not a directory"),
        (["inspect", "hf://deepseek-ai"], 2, "hf://owner/name@revision"),
        (["convert", "FLASH", "OUT", "--to", "bf16", "--work", "W"], 2, "hf:// as DST"),
        (["reshard", "FLASH", "hf://me/dcp", "--to", "dcp"], 2, "then dsv4 push"),
        (["inspect", "FLASH/config.json"], 3, "no safetensors file"),
        (["inspect", "EMPTY"], 3, "no safetensors file here"),
        (["sample", "FLASH"], 2, "not empty"),
        (["sample", "OUT", "--release", "v5"], 2, "pro-0813"),
        (["sample", "OUT", "--experts", "2"], 2, "too few experts"),
        (["sample", "OUT", "--layers", "44"], 2, "1 to 43"),
        (["sample", "OUT", "--release-dims", "--hidden", "512"], 2, "--release-dims"),
        (["sample", "OUT", "--release-dims"], 4, "not enough room"),
        (["verify", "FLASH", "--level", "values"], 2, "two checkpoints"),
        (["verify", "FLASH", "BF16", "--level", "structure"], 2, "one checkpoint"),
        (["verify", "FLASH", "BF16", "--tensor", "nobody"], 2, "'nobody'"),
        (["verify", "FLASH", "--level", "bytes"], 3, "no manifest"),
        (["verify", "FLASH", "BF16", "--subset", "3/2"], 2, "1/10"),
    ],
)
def test_mistake_gets_its_exit_code_and_a_helpful_word(
    arguments: list[str], code: int, word: str, flash: Path, bf16: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"FLASH": flash, "BF16": bf16, "OUT": tmp_path / "out", "NOWHERE": tmp_path / "nowhere"}
    places["EMPTY"] = tmp_path / "empty"
    if "--release-dims" in arguments and os.statvfs(tmp_path).f_bavail * 4096 > 120e9:
        pytest.skip("this machine has room for a whole release")
    given = [str(places.get(item.partition("/")[0], item)) + item[len(item.partition("/")[0]) :]
             if item.partition("/")[0] in places else item for item in arguments]  # fmt: skip
    done = dsv4(*given)
    assert done.returncode == code, done.stderr
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_error_with_json_is_a_document(tmp_path: Path) -> None:
    done = process("inspect", tmp_path / "nowhere", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["class"] == "MissingFile"


@pytest.mark.slow
def test_verify_finds_a_flipped_bit_and_exits_1(flash: Path, bf16: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", str(bf16), str(out)], check=True)
    victim = out / "model-00003-of-00007.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1000] ^= 1
    victim.write_bytes(data)
    by_hash = dsv4("verify", out)
    assert by_hash.returncode == 1
    assert victim.name in by_hash.stdout
    by_value = process("verify", flash, out, "--level", "values")
    assert by_value.returncode == 1
    assert "1 value differ by up to" in by_value.stdout
    assert "layers.1." in by_value.stdout


@pytest.mark.slow
def test_verify_subset_and_tensor_look_at_less(flash: Path, bf16: Path) -> None:
    whole = json.loads(dsv4("verify", flash, bf16, "--json").stdout)["values"]["counts"]
    part = json.loads(dsv4("verify", flash, bf16, "--subset", "1/4", "--json").stdout)["values"]["counts"]
    assert 0 < sum(part.values()) <= sum(whole.values()) / 4 + 1
    name = "layers.1.ffn.experts.3.w2.weight"
    one = json.loads(dsv4("verify", flash, bf16, "--tensor", name, "--json").stdout)["values"]["counts"]
    assert sum(one.values()) == one["same values"] == 1


@pytest.mark.slow
def test_quiet_says_nothing(flash: Path, tmp_path: Path) -> None:
    done = process("convert", flash, tmp_path / "out", "--to", "bf16", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_second_run_says_that_it_was_complete(flash: Path, bf16: Path) -> None:
    done = dsv4("convert", flash, bf16, "--to", "bf16")
    assert done.returncode == 0
    assert "was complete already" in done.stdout


def _started(flash: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dsv4cli", "convert", str(flash), str(out), "--to", "bf16", "--workers", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_leaves_finished_shards_and_the_same_command_continues(
    number: int, code: int, tmp_path: Path, large: Path
) -> None:
    out = tmp_path / "out"
    process = _started(large, out)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(out.glob("*.safetensors")):
        time.sleep(0.005)
    process.send_signal(number)
    began = time.monotonic()
    _, words = process.communicate(timeout=60)
    assert process.returncode == code, words
    assert time.monotonic() - began < 2 + 2, "stops within 2 s, with some room for a busy machine"
    assert "the same command continues" in words
    assert not list(out.rglob("*.part"))
    assert not (out / "dsv4.manifest.json").exists()
    finished = len(list(out.glob("*.safetensors")))
    assert finished > 0
    again = dsv4("convert", large, out, "--to", "bf16", "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["resumed"] == finished
    assert dsv4("verify", out).returncode == 0
    assert not (out / ".dsv4").exists()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that a signal finds it at work."""
    directory = tmp_path_factory.mktemp("large") / "flash"
    assert dsv4("sample", directory, "--target-size", "120MB").returncode == 0
    return directory


@pytest.mark.slow
def test_second_process_on_one_output_is_turned_away(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = _started(large, out)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(out.glob(".dsv4/*.part")):
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    second = dsv4("convert", large, out, "--to", "bf16")
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=120)
    assert first.returncode == 0
    assert second.returncode == 75
    assert f"process {first.pid}" in second.stderr


def test_interrupted_dry_reader_does_not_trace(flash: Path) -> None:
    """A pager that quits early is no error of ours."""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m dsv4cli inspect {flash} --tensors | head -1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith("flash, stored as")
    assert "Traceback" not in done.stderr
