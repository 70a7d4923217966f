"""Conversions whose source is on the Hub: the same bytes as from the directory, whatever happens on the way."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import shutil
import signal
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import server
import tiny
from pushing import INDEX, MANIFEST, Done, Killer, Verbs, hashes, refused, run
from server import Fault, Hub, Request, serving

from dsv4ckpt import hub_source
from dsv4ckpt.hub_fetch import Bringer

LAB, HUB = "lab/flash", "hf://lab/flash"
FIRST, SEGMENT = 1000, 50_000  # bytes of a header's first request, and of a shard's segments, in these tests
STORAGE = "/storage/"
BF16 = ("--to", "bf16", "--max-shard-size", "150KB")
FOR_EVER = 10**6
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_source, "_FIRST_BYTES", FIRST)
    monkeypatch.setattr(hub_source, "Bringer", functools.partial(Bringer, segment_bytes=SEGMENT))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def header_bytes(shard: Path) -> int:
    """Of a header with its length field."""
    return 8 + int(struct.unpack("<Q", shard.read_bytes()[:8])[0])


def bytes_of_headers(directory: Path) -> int:
    """What finding out all headers costs."""
    return sum(max(FIRST, header_bytes(shard)) for shard in shards(directory))


def num_header_requests(directory: Path) -> int:
    return sum(1 + (header_bytes(shard) > FIRST) for shard in shards(directory))


def bytes_of_shards(directory: Path) -> int:
    return sum(shard.stat().st_size for shard in shards(directory))


def without_manifest(directory: Path) -> dict[str, str]:
    return {name: sha for name, sha in hashes(directory).items() if name != MANIFEST}


def require_same(made: Path, expected: Path) -> None:
    """The same files, and a manifest that differs in what it says of the source's place and ids alone."""
    assert without_manifest(made) == without_manifest(expected)
    there, here = (json.loads((at / MANIFEST).read_bytes()) for at in (made, expected))
    for document in (there, here):
        for row in document["source"]:
            row.pop("sample_sha256", None)
            row.pop("sha256", None)
        document.pop("source_repository", None)
        document.pop("source_commit", None)
    assert there == here


def begin_after(hub: Hub, num_requests: int, action: Callable[[], object]) -> None:
    """Act once when so many bodies have been asked for from the storage."""
    left = [num_requests]

    def see(request: Request) -> None:
        if request.method == "GET" and request.path.startswith(STORAGE):
            with hub.lock:
                left[0] -= 1
                acts = left[0] == 0
            if acts:
                action()

    hub.on_request = see


def spoil_shards(
    hub: Hub, directory: Path, what: int | str, count: int = 1, after: int = 0, **headers: str
) -> None:
    """Order a fault that meets no header, but what comes `after` so many requests for segments."""
    item = Fault("GET", STORAGE, what, count, headers)
    begin_after(hub, num_header_requests(directory) + after, lambda: hub.faults.append(item))


# ---- the same bytes


@pytest.mark.slow
def test_conversion_is_that_of_the_directory_and_fetches_every_byte_once(
    hub: Hub, source: str, smallest: Path, published: Path, tmp_path: Path
) -> None:
    done = run("convert", source, tmp_path / "out", *BF16)
    assert done.code == 0
    require_same(tmp_path / "out", published)
    assert not (tmp_path / "out" / ".dsv4").exists()
    assert hub.fetched == bytes_of_headers(smallest) + bytes_of_shards(smallest)
    document = json.loads((tmp_path / "out" / MANIFEST).read_bytes())
    commit = hub.repos[LAB].branches["main"][-1].oid
    assert (document["source_repository"], document["source_commit"]) == (LAB, commit)
    ids = {row["file"]: row["sha256"] for row in document["source"]}
    assert ids == {shard.name: hashes(smallest)[shard.name] for shard in shards(smallest)}
    assert f"hf://{LAB}, commit {commit}" in done.out and "4 of 4 shards" in done.out


def test_conversion_that_is_complete_is_not_made_again(
    hub: Hub, source: str, smallest: Path, tmp_path: Path
) -> None:
    assert run("convert", source, tmp_path / "out", *BF16).code == 0
    before, hub.fetches = hashes(tmp_path / "out"), []
    again = run("convert", source, tmp_path / "out", *BF16)
    assert again.code == 0 and "was complete already" in again.out
    assert hashes(tmp_path / "out") == before
    assert hub.fetched == bytes_of_headers(smallest)
    # nothing compares samples of a directory's shards with ids of the Hub
    elsewhere = refused(run("convert", smallest, tmp_path / "out", *BF16), "ForeignOutput", 2)
    assert "its source was read from elsewhere" in elsewhere
    assert hashes(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--to", "fp8", "--allow-lossy"),
        ("--to", "nvfp4", "--allow-lossy"),
        ("--to", "mxfp4-ct"),
        ("--to", "bf16", "--names", "transformers"),
    ],
    ids=lambda options: f"{options[1]} {options[-1]}",
)
def test_every_target_is_that_of_the_directory(
    source: str, smallest: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    for src, dst in ((smallest, "expected"), (source, "out")):
        assert run("convert", src, tmp_path / dst, *options).code == 0
    require_same(tmp_path / "out", tmp_path / "expected")


def test_scales_are_looked_at_by_ranges_before_a_shard_is_fetched(
    hub: Hub, smallest: Path, tmp_path: Path
) -> None:
    """What FP8 cannot hold is refused for the price of some scales."""
    directory = tiny.copy_of(smallest, tmp_path / "steep")
    scale = "layers.0.ffn.experts.0.w1.scale"

    def edit(tensors: dict[str, tiny.Tensor]) -> None:
        item = tensors[scale]
        assert isinstance(item.data, bytes)
        tensors[scale] = item._replace(data=bytes([100, 140]) * (item.size // 2) + item.data[: item.size % 2])

    tiny.edit_shard(tiny.shard_of(directory, scale), edit)
    hub.seed(LAB, directory)
    there, here = (run("convert", src, tmp_path / "out", "--to", "fp8") for src in (HUB, directory))
    assert "does not fit into FP8" in refused(there, "NotLossless", 3)
    assert there.err == here.err
    assert hub.fetched < bytes_of_headers(directory) + 3 * 65536
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_selection_of_layers_fetches_only_the_shards_that_it_needs(
    hub: Hub, source: str, smallest: Path, tmp_path: Path
) -> None:
    options = ("--to", "bf16", "--layers", "0-0", "--mtp", "drop")
    for src, dst in ((smallest, "expected"), (source, "out")):
        assert run("convert", src, tmp_path / dst, *options).code == 0
    require_same(tmp_path / "out", tmp_path / "expected")
    wanted = {
        shard
        for shard in shards(smallest)
        if any(not name.startswith("mtp.") for name in tiny.read_shard(shard))
    }
    assert 0 < len(wanted) < 4
    assert hub.fetched == bytes_of_headers(smallest) + sum(shard.stat().st_size for shard in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("is_lfs", [False, True])
def test_way_back_takes_the_sidecar_from_the_hub(
    hub: Hub, smallest: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_lfs: bool
) -> None:
    if is_lfs:
        monkeypatch.setattr(server, "MAX_REGULAR_BYTES", 10_000)
    hub.seed("lab/bf16", published)
    assert run("convert", "hf://lab/bf16", tmp_path / "out", "--to", "native").code == 0
    made, released = hashes(tmp_path / "out"), hashes(smallest)
    assert {name: made[name] for name in released} == released


@pytest.mark.slow
def test_way_back_measures_by_a_release_on_the_hub_within_the_room_that_is_named(
    hub: Hub, source: str, smallest: Path, published: Path, tmp_path: Path
) -> None:
    directory = tiny.copy_of(published, tmp_path / "bf16")
    (directory / "dsv4.roundtrip").unlink()
    hub.seed("lab/bf16", directory)
    command = ("convert", "hf://lab/bf16", tmp_path / "out", "--to", "native", "--source", source)
    told = refused(run(*command, "--scratch-limit", "1000"), "Usage", 2)
    least = int(re.findall(r"at least ([\d,]+) bytes", told)[0].replace(",", ""))
    refused(run(*command, "--scratch-limit", least - 2), "Usage", 2)
    assert not (tmp_path / "out").exists()
    most = watched_room(hub, tmp_path / "out")
    assert run(*command, "--scratch-limit", least).code == 0
    made, released = hashes(tmp_path / "out"), hashes(smallest)
    assert {name: made[name] for name in released} == released
    assert 0 < most[0] <= least


@pytest.mark.slow
def test_sidecar_that_is_carried_is_proven(hub: Hub, published: Path, tmp_path: Path) -> None:
    hub.seed("lab/bf16", published)
    command = ("convert", "hf://lab/bf16", tmp_path / "out", "--to", "bf16", "--max-shard-size", "400KB")
    hub.faults.append(Fault("GET", "/resolve/.*/dsv4.roundtrip", "wrong bytes"))
    done = run(*command)
    assert "dsv4.roundtrip" in refused(done, "HubFailed", 4)
    assert not (tmp_path / "out" / "dsv4.roundtrip").exists()
    assert run(*command).code == 0
    assert hashes(tmp_path / "out")["dsv4.roundtrip"] == hashes(published)["dsv4.roundtrip"]


@pytest.mark.slow
def test_reshard_reads_from_the_hub_and_goes_on_with_the_same_commit(
    hub: Hub, source: str, smallest: Path, published: Path, tmp_path: Path, waits: list[float]
) -> None:
    assert run("reshard", smallest, tmp_path / "expected", "--to", "dcp").code == 0
    spoil_shards(hub, smallest, 500, FOR_EVER, after=5)
    refused(run("reshard", source, tmp_path / "out", "--to", "dcp"), "HubFailed", 4)
    hub.on_request = lambda request: None
    hub.faults.clear()
    hub.seed(LAB, published)  # the branch goes on
    assert waits and run("reshard", source, tmp_path / "out", "--to", "dcp").code == 0
    require_same(tmp_path / "out", tmp_path / "expected")


@pytest.mark.slow
def test_reshard_takes_config_and_tokenizer_from_the_hub(source: str, smallest: Path, tmp_path: Path) -> None:
    assert run("reshard", smallest, tmp_path / "dcp", "--to", "dcp").code == 0
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "dcp" / name).unlink()
    for like, dst in ((smallest, "expected"), (source, "out")):
        done = run("reshard", tmp_path / "dcp", tmp_path / dst, "--to", "safetensors", "--like", like)
        assert done.code == 0, done
    assert without_manifest(tmp_path / "out") == without_manifest(tmp_path / "expected")


def test_dry_run_fetches_headers_and_makes_nothing(
    hub: Hub, source: str, smallest: Path, tmp_path: Path
) -> None:
    done = run("convert", source, tmp_path / "out", *BF16, "--dry-run", "--json")
    assert done.code == 0
    fetched = json.loads(done.out)["to_fetch"]["source"]
    commit = hub.repos[LAB].branches["main"][-1].oid
    assert fetched == {
        "repository": LAB, "commit": commit, "shards": 4, "bytes": bytes_of_shards(smallest)
    }  # fmt: skip
    assert hub.fetched == bytes_of_headers(smallest) and not (tmp_path / "out").exists()
    room = json.loads(done.out)["space"]["needed"] - json.loads(done.out)["bytes"]
    local = json.loads(run("convert", smallest, tmp_path / "out", *BF16, "--dry-run", "--json").out)
    assert room == local["space"]["needed"] - local["bytes"] + bytes_of_shards(
        smallest
    )  # they are here meanwhile
    too_small = run("convert", source, tmp_path / "out", *BF16, "--dry-run", "--scratch-limit", "1KB")
    assert "at least" in refused(too_small, "Usage", 2)


# ---- room


def watched_room(hub: Hub, out: Path) -> list[int]:
    """The most bytes that shelves below `out` have held, seen at every request."""
    most = [0]

    def see(request: Request) -> None:
        sizes = Counter[str]()
        for file in out.glob(".dsv4/shelf.*/*"):
            try:
                if file.suffix in (".whole", ".part"):
                    sizes["all"] += file.stat().st_size
            except FileNotFoundError:
                continue
        most[0] = max(most[0], sizes["all"])

    hub.on_request = see
    return most


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 8])
def test_shards_never_take_more_room_than_they_may(
    hub: Hub, source: str, published: Path, tmp_path: Path, workers: int
) -> None:
    command = ("convert", source, tmp_path / "out", *BF16, "--workers", workers)
    told = refused(run(*command, "--scratch-limit", "1000"), "Usage", 2)
    least = int(re.findall(r"at least ([\d,]+) bytes", told)[0].replace(",", ""))
    refused(run(*command, "--scratch-limit", least - 1), "Usage", 2)
    assert not (tmp_path / "out").exists()
    for limit in (least, least + 150_000):
        most = watched_room(hub, tmp_path / "out")
        assert run(*command, "--scratch-limit", limit).code == 0
        assert 0 < most[0] <= limit
        require_same(tmp_path / "out", published)
        shutil.rmtree(tmp_path / "out")


# ---- what goes wrong on the way


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "count", "num_waits"),
    [
        ("drop", 2, 2),
        ("mute", 2, 2),
        ("drop body", 2, 2),
        ("short", 2, 2),
        ("no range", 3, None),
        ("wrong bytes", 1, 0),
        (403, 1, 1),
        (429, 2, 2),
        (500, 3, 3),
        (503, 3, 3),
    ],
)
def test_fault_that_passes_by_changes_no_byte(
    hub: Hub,
    source: str,
    smallest: Path,
    published: Path,
    tmp_path: Path,
    waits: list[float],
    what: int | str,
    count: int,
    num_waits: int | None,
) -> None:
    spoil_shards(hub, smallest, what, count, after=3, **({"Retry-After": "9"} if what == 429 else {}))
    done = run("convert", source, tmp_path / "out", *BF16)
    assert done.code == 0, done
    require_same(tmp_path / "out", published)
    assert hub.faults[0].count == 0
    assert num_waits is None or len(waits) == num_waits
    assert what != 429 or waits == [9, 9]
    num_heads = hub.count(
        "HEAD", "/resolve/.*safetensors$"
    )  # an address is asked for anew, by all who want it then
    assert 4 < num_heads <= 8 if what == 403 else num_heads == 4


@pytest.mark.slow
def test_bytes_that_stay_wrong_never_come_into_the_output(
    hub: Hub, source: str, smallest: Path, published: Path, tmp_path: Path
) -> None:
    spoil_shards(hub, smallest, "wrong bytes", FOR_EVER)
    told = refused(run("convert", source, tmp_path / "out", *BF16), "HubFailed", 4)
    assert "as something else than the Hub's id of it says" in told and ".safetensors" in told
    right = hashes(published)
    for name, sha in hashes(tmp_path / "out").items():
        assert name.startswith(".dsv4/") or sha == right[name]
    for whole in (tmp_path / "out").glob(".dsv4/*/*.whole"):
        assert hashlib.sha256(whole.read_bytes()).hexdigest() == hashes(smallest)[whole.stem]
    hub.faults.clear()
    hub.on_request = lambda request: None
    assert run("convert", source, tmp_path / "out", *BF16).code == 0
    require_same(tmp_path / "out", published)


def test_header_that_was_wrong_on_its_way_is_found_out(hub: Hub, smallest: Path, tmp_path: Path) -> None:
    """It can be a header all the same, such as with other metadata: nothing has proven it when the plan is made."""
    directory = tiny.copy_of(smallest, tmp_path / "more")
    shard = shards(directory)[0]
    tensors = tiny.read_shard(shard)
    header = b'{"__metadata__":{"of":"' + b"a" * (2 * FIRST) + b'"},' + tiny.header_of(tensors)[1:]
    (data,) = (tensor.data for tensor in tensors.values())
    assert isinstance(data, bytes)
    tiny.replace(shard, tiny.packed(header, data))
    hub.seed(LAB, directory)
    oid = hashlib.sha256(shard.read_bytes()).hexdigest()
    hub.faults.append(Fault("GET", STORAGE + oid, "wrong bytes"))
    told = refused(run("convert", HUB, tmp_path / "out", *BF16), "HubFailed", 4)
    assert "header" in told and shard.name in told
    assert not (tmp_path / "out" / INDEX).exists()


@pytest.mark.slow
def test_restart_of_the_server_changes_no_byte(
    hub: Hub, source: str, smallest: Path, published: Path, tmp_path: Path
) -> None:
    num_requests = num_header_requests(smallest) + sum(
        -(-shard.stat().st_size // SEGMENT) for shard in shards(smallest)
    )
    begin_after(hub, num_header_requests(smallest) + 4, hub.restart)
    assert run("convert", source, tmp_path / "out", *BF16).code == 0
    require_same(tmp_path / "out", published)
    assert hub.count("GET", STORAGE) > num_requests  # some had to be asked for again


# ---- going on


@pytest.mark.slow
@pytest.mark.parametrize("after", [2, 7, 13])
def test_run_that_goes_on_asks_for_no_segment_twice(
    hub: Hub, source: str, smallest: Path, published: Path, tmp_path: Path, waits: list[float], after: int
) -> None:
    spoil_shards(hub, smallest, 500, FOR_EVER, after=after)
    refused(run("convert", source, tmp_path / "out", *BF16), "HubFailed", 4)
    assert waits and hub.fetched < bytes_of_headers(smallest) + bytes_of_shards(smallest)
    hub.faults.clear()
    hub.on_request = lambda request: None
    assert run("convert", source, tmp_path / "out", *BF16).code == 0
    require_same(tmp_path / "out", published)
    assert hub.fetched == 2 * bytes_of_headers(smallest) + bytes_of_shards(smallest)


def interrupted(hub: Hub, smallest: Path, out: Path, address: str) -> None:
    """A run that ends after some segments."""
    spoil_shards(hub, smallest, 500, FOR_EVER, after=5)
    refused(run("convert", address, out, *BF16), "HubFailed", 4)
    hub.faults.clear()
    hub.on_request = lambda request: None


@pytest.mark.slow
def test_interrupted_run_goes_on_with_its_commit_though_the_branch_has_moved(
    hub: Hub, source: str, smallest: Path, published: Path, tmp_path: Path, waits: list[float]
) -> None:
    commit, out = hub.repos[LAB].branches["main"][-1].oid, tmp_path / "out"
    interrupted(hub, smallest, out, source)
    assert waits and (out / ".dsv4" / "commit").read_text() == f"{LAB} {commit}"
    directory = tiny.copy_of(smallest, tmp_path / "edited")
    data = bytearray(shards(directory)[1].read_bytes())
    data[-1] ^= 1
    tiny.replace(shards(directory)[1], bytes(data))
    moved = hub.seed(LAB, directory)
    for other in (
        f"{source}@main",
        f"{source}@{moved}",
    ):  # whoever names another commit does not get this one's
        refused(run("convert", other, out, *BF16), "ForeignOutput", 2)
    hub.requests.clear()
    assert run("convert", source, out, *BF16).code == 0
    assert not any(moved in request.path or "/main" in request.path for request in hub.requests)
    require_same(out, published)
    assert json.loads((out / MANIFEST).read_bytes())["source_commit"] == commit


@pytest.mark.slow
def test_commit_that_changes_no_shard_can_go_on_with_what_is_there(
    hub: Hub, source: str, smallest: Path, published: Path, tmp_path: Path, waits: list[float]
) -> None:
    interrupted(hub, smallest, tmp_path / "out", f"{source}@main")
    hub.seed(LAB, smallest, title="nothing new")
    assert waits and run("convert", f"{source}@main", tmp_path / "out", *BF16).code == 0
    require_same(tmp_path / "out", published)


@pytest.mark.slow
def test_run_of_another_repository_is_not_gone_on_with(
    hub: Hub, source: str, smallest: Path, tmp_path: Path, waits: list[float]
) -> None:
    interrupted(hub, smallest, tmp_path / "out", source)
    directory = tiny.copy_of(smallest, tmp_path / "edited")
    data = bytearray(shards(directory)[1].read_bytes())
    data[-1] ^= 1
    tiny.replace(shards(directory)[1], bytes(data))
    hub.seed("lab/other", directory)
    assert waits
    refused(run("convert", "hf://lab/other", tmp_path / "out", *BF16), "ForeignOutput", 2)


@pytest.mark.slow
def test_shard_of_an_earlier_run_that_was_tampered_with_is_fetched_anew(
    hub: Hub, source: str, smallest: Path, published: Path, tmp_path: Path, waits: list[float]
) -> None:
    interrupted(hub, smallest, tmp_path / "out", source)
    left = [*(tmp_path / "out").glob(".dsv4/shelf.*/*")]
    assert waits and left
    for file in left:
        if file.suffix != ".marks":
            file.write_bytes(bytes(file.stat().st_size))
    assert run("convert", source, tmp_path / "out", *BF16).code == 0
    require_same(tmp_path / "out", published)


@pytest.mark.slow
def test_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    smallest: Path, published: Path, tmp_path: Path, often: Callable[[int, int], int]
) -> None:
    """No shard that a run before had proven is fetched again, and none of which all that is made is finished."""
    chance, out = random.Random(11), tmp_path / "out"
    native = ("--to", "native", "-q")
    assert run("convert", published, tmp_path / "expected", *native) == (0, "", "")
    right, ids = hashes(tmp_path / "expected"), hashes(published)
    with serving() as hub, Killer(hub, tmp_path) as killer:
        hub.seed(LAB, published)
        num_kept = 0
        for trial in range(often(8, 40)):
            kept = {ids[file.stem] for file in out.glob(".dsv4/shelf.*/*.whole")}
            num_kept += len(kept)
            hub.fetches.clear()
            kill = killer.killed(chance.randint(2, 12), is_done=trial % 2 == 0, counts=out.exists)
            done = kill("convert", HUB, out, *native)
            times = Counter(item.oid for item in hub.fetches)
            assert all(times[oid] <= 1 for oid in kept)  # for its header
            made = hashes(out)
            assert all(name.startswith(".dsv4/") or made[name] == right[name] for name in made)
            if done.code == 0 or trial % 4 == 3:
                assert killer.verbs("convert", HUB, out, *native) == Done(0, "", "")
                require_same(out, tmp_path / "expected")
                assert not (out / ".dsv4").exists()
                shutil.rmtree(out)
        assert killer.num_killed > trial / 2 and num_kept > 0
    assert {name: right[name] for name in hashes(smallest)} == hashes(smallest)


@pytest.mark.slow
def test_signal_ends_a_run_that_waits_for_the_hub(smallest: Path, published: Path, tmp_path: Path) -> None:
    with serving() as hub:
        hub.seed(LAB, smallest)
        verbs = Verbs(hub, tmp_path)
        command = ("convert", HUB, tmp_path / "out", *BF16)

        def act() -> None:
            hub.faults.append(Fault("GET", STORAGE, 429, FOR_EVER, {"Retry-After": "250"}))
            threading.Timer(0.5, verbs.kill, [signal.SIGINT]).start()

        begin_after(hub, 5, act)  # here headers come in one request each
        try:
            began = time.monotonic()
            done = verbs(*command)
            assert time.monotonic() - began < 60  # and not the 250 s that the server asks for
            assert done.code == 130 and "the same command continues" in done.err, done
            hub.faults.clear()
            hub.on_request = lambda request: None
            assert verbs(*command).code == 0
        finally:
            verbs.close()
        require_same(tmp_path / "out", published)
