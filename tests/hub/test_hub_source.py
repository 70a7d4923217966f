"""hf:// as something to look at: one commit of it, headers by ranges, and the same refusals as of a directory."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import server
import tiny
from huggingface_hub import constants
from pushing import INDEX, environment, fault, refused, run
from server import OWNERS_TOKEN, READERS_TOKEN, Fault, Hub, Request, entry_of

from dsv4ckpt import hub as remote
from dsv4ckpt import hub_source

LAB, CONFIG, SIDECAR = "lab/flash", "config.json", "dsv4.roundtrip"
FIRST = 1000  # bytes of a shard that are asked for first: fewer than most headers here have
STORAGE = "/storage/"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own


def header_bytes(shard: Path) -> int:
    """Of a header with its length field."""
    return 8 + int(struct.unpack("<Q", shard.read_bytes()[:8])[0])


def bytes_of_headers(directory: Path) -> int:
    """What finding out all headers costs, FIRST bytes at first."""
    return sum(max(FIRST, header_bytes(shard)) for shard in directory.glob("*.safetensors"))


def asked(hub: Hub) -> list[str]:
    """Paths in the order of the requests, but for what the client asks on its own account."""
    return [request.path for request in hub.requests if request.path != "/api/agent-harnesses"]


@pytest.fixture
def first_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_source, "_FIRST_BYTES", FIRST)


# ---- inspect


def test_report_is_that_of_the_directory(hub: Hub, source: str, smallest: Path) -> None:
    there, here = (run("inspect", src, "--json", "--tensors") for src in (source, smallest))
    assert (there.code, here.code) == (0, 0)
    document = json.loads(there.out)
    commit = hub.repos[LAB].branches["main"][-1].oid
    assert document.pop("source") == {"repository": LAB, "commit": commit}
    assert document == json.loads(here.out)
    assert f"hf://{LAB}, commit {commit}" in there.err


@pytest.mark.usefixtures("first_bytes")
def test_nothing_but_headers_is_fetched_of_shards(hub: Hub, source: str, smallest: Path) -> None:
    assert run("inspect", source, "-q").code == 0
    sizes = [header_bytes(shard) for shard in smallest.glob("*.safetensors")]
    assert min(sizes) < FIRST < max(sizes)  # one request for some, two for others
    assert hub.fetched == bytes_of_headers(smallest)
    assert hub.count("GET", STORAGE) == sum(1 + (size > FIRST) for size in sizes)


def test_all_is_read_from_the_commit_that_the_branch_had_at_first(
    hub: Hub, source: str, smallest: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / CONFIG).write_text("{}")
    commit = hub.repos[LAB].branches["main"][-1].oid

    def move_on(request: Request) -> None:
        if "/tree/" in request.path and len(hub.repos[LAB].branches["main"]) == 2:
            hub.seed(LAB, tmp_path / "other")

    hub.on_request = move_on
    done = run("inspect", source, "--json")
    assert done.code == 0 and json.loads(done.out)["source"]["commit"] == commit
    assert len(hub.repos[LAB].branches["main"]) == 3
    first, *others = asked(hub)
    assert first.endswith("/revision/main")
    assert all(commit in path or path.startswith(STORAGE) for path in others)
    assert run("inspect", source).code == 3
    assert run("inspect", f"{source}@{commit}").code == 0


@pytest.mark.slow
def test_shards_are_asked_for_at_once_and_twice_each(hub: Hub, smallest: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    assert run("convert", smallest, many, "--to", "bf16", "--max-shard-size", "10KB", "-q").code == 0
    num_shards = len(list(many.glob("*.safetensors")))
    assert num_shards > 48
    hub.seed(LAB, many)
    meeting = threading.Barrier(4)  # passed by as many requests that are under way together
    left = [4]

    def meet(request: Request) -> None:
        with hub.lock:
            left[0] -= request.path.startswith(STORAGE)
            meets = request.path.startswith(STORAGE) and left[0] >= 0
        if meets:
            meeting.wait(10)

    hub.on_request = meet
    assert run("inspect", f"hf://{LAB}", "-q").code == 0
    assert not meeting.broken and left[0] < 0
    shards = [path for path in asked(hub) if path.startswith(STORAGE) or ".safetensors" in path]
    assert len([path for path in shards if not path.endswith(INDEX)]) == 2 * num_shards


@pytest.mark.slow
def test_torch_is_not_brought(hub: Hub, source: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom dsv4cli.main import main\n"
        "try:\n    main(['inspect', sys.argv[1], '-q'])\n"
        "except SystemExit as left:\n    assert not left.code\n"
        "assert 'dsv4ckpt.hub_source' in sys.modules and 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, source]
    done = subprocess.run(command, env=environment(hub, tmp_path), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert hub.fetched > 0


# ---- what the Hub refuses


@pytest.mark.parametrize(
    ("address", "token", "words"),
    [
        ("lab/gated", "", "this repository is gated, and there is no token on this machine"),
        ("lab/gated", READERS_TOKEN, "this repository is gated, and this token has no access to it"),
        ("lab/private", "", "there is no such repository, or it is private, and there is no token here"),
        ("lab/private", READERS_TOKEN, "there is no such repository, or this token may not see it"),
        ("lab/nowhere", OWNERS_TOKEN, "there is no such repository, or this token may not see it"),
        ("lab/flash@nowhere", OWNERS_TOKEN, "there is no revision 'nowhere'"),
        ("lab/flash", "hf_NobodyKnowsThisOne0", "the Hub does not know this token"),
    ],
)
def test_repository_that_cannot_be_read_is_told_apart(
    hub: Hub,
    source: str,
    smallest: Path,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    token: str,
    words: str,
) -> None:
    assert source == "hf://lab/flash"
    hub.seed("lab/gated", smallest, gated=True)
    hub.seed("lab/private", smallest, private=True)
    monkeypatch.setenv("HF_TOKEN", token)
    told = refused(run("inspect", f"hf://{address}"), "HubFailed", 4)
    assert words in told and (not token or token not in told)
    assert hub.fetched == 0


@pytest.mark.parametrize("name", ["gated", "private"])
def test_repository_that_the_token_may_read_is_read(hub: Hub, smallest: Path, name: str) -> None:
    hub.seed(f"lab/{name}", smallest, gated=name == "gated", private=name == "private")
    assert run("inspect", f"hf://lab/{name}").code == 0


@pytest.mark.parametrize(
    "address", ["hf://lab", "hf://lab/a/b", "hf://lab/a@", "hf://lab/a@x y", "hf://../a", "hf://"]
)
def test_what_is_no_address_is_refused_before_anybody_is_asked(hub: Hub, address: str) -> None:
    assert "hf://owner/name@revision" in refused(run("inspect", address), "Usage", 2)
    assert asked(hub) == []


def test_client_that_is_told_to_stay_offline_asks_nobody(
    hub: Hub, source: str, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(run("inspect", source), "HubFailed", 4)
    assert (asked(hub), waits) == ([], [])


def test_host_that_is_not_reached_is_tried_again_and_told(
    hub: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # nobody listens on it
        taken.bind(("127.0.0.1", 0))
        nowhere = f"http://{'127.0.0.1'}:{taken.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", nowhere)
        told = refused(run("inspect", f"hf://{LAB}"), "HubFailed", 4)
    assert "the connection failed" in told and nowhere in told
    assert waits == [1, 2, 4, 8, 16]
    assert hub.requests == []


@pytest.mark.parametrize("path", ["/revision/", "/tree/", CONFIG, "/storage/"])
@pytest.mark.parametrize(
    ("status", "words"),
    [(403, "the Hub does not allow it"), (418, "the Hub refuses it"), (404, "there is no such|refuses it")],
)
def test_refusal_that_stays_is_told_at_once(
    hub: Hub, source: str, waits: list[float], path: str, status: int, words: str
) -> None:
    fault(hub, "GET", path, status, 99)
    told = refused(run("inspect", source), "HubFailed", 4)
    assert any(word in told for word in words.split("|")), told
    assert waits == []


@pytest.mark.parametrize("path", ["/revision/", "/tree/", CONFIG, "/storage/"])
def test_requests_that_are_too_many_wait_as_long_as_the_server_says(
    hub: Hub, source: str, waits: list[float], path: str
) -> None:
    hub.faults.append(Fault("GET", path, 429, 2, {"Retry-After": "7"}))
    assert run("inspect", source).code == 0
    assert waits == [7, 7]


def test_server_may_not_ask_for_a_day(hub: Hub, source: str, waits: list[float]) -> None:
    hub.faults.append(Fault("GET", "/tree/", 429, 1, {"Retry-After": "86400"}))
    assert run("inspect", source).code == 0
    assert waits == [300]


@pytest.mark.parametrize("what", [500, 502, 503, 504, "drop", "mute", "drop body"])
def test_server_that_fails_three_times_is_asked_a_fourth_time(
    hub: Hub, source: str, waits: list[float], what: int | str
) -> None:
    hub.faults.append(Fault("GET", "/tree/", what, 3))
    assert run("inspect", source).code == 0
    assert waits == [1, 2, 4]


@pytest.mark.parametrize(
    ("status", "words"),
    [(500, "the Hub fails again and again"), (429, "too many requests, again and again")],
)
def test_server_that_fails_for_ever_is_given_up(
    hub: Hub, source: str, waits: list[float], status: int, words: str
) -> None:
    hub.faults.append(Fault("GET", "/tree/", status, 99))
    told = refused(run("inspect", source), "HubFailed", 4)
    assert words in told and f"{status}: 'a fault that the test ordered'" in told
    assert waits == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("what", ["drop body", "short", "no range"])
@pytest.mark.usefixtures("first_bytes")
def test_header_that_comes_in_pieces_is_put_together(
    hub: Hub, source: str, smallest: Path, waits: list[float], what: str
) -> None:
    hub.faults.append(Fault("GET", STORAGE, what, 3))
    there, here = (json.loads(run("inspect", src, "--json").out) for src in (source, smallest))
    del there["source"]
    assert there == here
    assert waits or what == "no range"  # which is not much of a fault where the beginning is asked for


@pytest.mark.parametrize("name", [CONFIG, INDEX])
def test_small_file_that_is_not_what_its_id_says_is_not_taken(hub: Hub, source: str, name: str) -> None:
    hub.faults.append(Fault("GET", f"/resolve/.*/{name}", "wrong bytes"))
    told = refused(run("inspect", source), "HubFailed", 4)
    assert "not what the Hub's id of it says" in told and name in told
    assert run("inspect", source).code == 0


# ---- hostile files


def shard_named(directory: Path, number: int = 1) -> Path:
    return sorted(directory.glob("*.safetensors"))[number]


def cut(directory: Path) -> None:
    tiny.replace(shard_named(directory), shard_named(directory).read_bytes()[:-100])


def leads_out(directory: Path) -> None:
    def edit(weight_map: dict[str, str]) -> None:
        weight_map[min(weight_map)] = "../model.safetensors"

    tiny.edit_weight_map(directory, edit)


def is_a_folder(directory: Path) -> None:
    shard = shard_named(directory)
    shard.unlink()
    shard.mkdir()
    (shard / "README.md").write_text("hello")


HOSTILE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "index leads out": ("UnsafePath", leads_out),
    "index is no JSON": ("BadIndex", lambda at: tiny.replace(at / INDEX, "{")),
    "index names nothing": ("BadIndex", lambda at: tiny.replace(at / INDEX, '{"weight_map": {}}')),
    "shard missing": ("MissingFile", lambda at: shard_named(at).unlink()),
    "shard cut": ("BadHeader", cut),
    "shard of five bytes": ("BadHeader", lambda at: tiny.replace(shard_named(at), b"12345")),
    "header longer than the file": (
        "BadHeader",
        lambda at: tiny.replace(shard_named(at), tiny.packed(b"{}", length=2**20)),
    ),
    "header of an exabyte": (
        "BadHeader",
        lambda at: tiny.replace(shard_named(at), tiny.packed(b"{}", length=2**60)),
    ),
    "header is no JSON": ("BadHeader", lambda at: tiny.replace(shard_named(at), tiny.packed(b"[[[["))),
    "shard is a folder": ("UnsafePath", is_a_folder),
    "two shards, no index": ("BadIndex", lambda at: (at / INDEX).unlink()),
    "no shard": (
        "MissingFile",
        lambda at: [file.unlink() for file in (*at.glob("*.safetensors"), at / INDEX)],
    ),
    "config is no JSON": ("BadConfig", lambda at: tiny.replace(at / CONFIG, "{")),
    "no config": ("MissingFile", lambda at: (at / CONFIG).unlink()),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_repository_is_refused_as_the_directory_is(
    hub: Hub, smallest: Path, tmp_path: Path, case: str
) -> None:
    kind, spoil = HOSTILE[case]
    directory = tiny.copy_of(smallest, tmp_path / "spoiled")
    spoil(directory)
    hub.seed(LAB, directory)
    there, here = run("inspect", f"hf://{LAB}"), run("inspect", directory)
    assert kind in refused(there, kind, 3)
    known = [line for line in here.err.splitlines() if "other entries" not in line]
    assert [line for line in there.err.splitlines() if "other entries" not in line] == known


@pytest.mark.parametrize(
    "name",
    ["inference/../../evil.json", "../evil.json", "/evil.json", "a//evil.json", "encoding/./evil.json"],
)
def test_file_name_that_leads_out_of_the_repository_is_refused(
    hub: Hub, source: str, tmp_path: Path, name: str
) -> None:
    hub.repos[LAB].files()[name] = entry_of(b"{}")
    refused(run("convert", source, tmp_path / "out", "--to", "bf16"), "UnsafePath", 3)
    assert list(tmp_path.rglob("evil.json")) == [] and not (tmp_path / "out").exists()


def test_same_small_files_are_carried_and_left_as_of_the_directory(
    hub: Hub, smallest: Path, tmp_path: Path
) -> None:
    directory = tiny.copy_of(smallest, tmp_path / "more")
    for name in (
        "a.py",
        "encoding/a.py",
        "x/y/z.json",
        ".hidden.json",
        "b\x1b[2J.json",
        "w.bin",
        "inference/.x",
    ):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("hello")
    deep = directory.joinpath("inference", *"abcdefghij")
    deep.mkdir(parents=True)
    (deep / "x.json").write_text("hello")
    hub.seed(LAB, directory)
    there, here = (hub_source.open_checkpoint(str(src)) for src in (f"hf://{LAB}", directory))
    assert there.small_files() == here.small_files()
    assert {item.left for item in here.small_files()} >= {None, "hidden", "an unprintable name", "too deep"}


# ---- verify


@pytest.mark.usefixtures("first_bytes")
def test_ids_of_the_hub_are_compared_with_the_manifest_and_no_shard_is_fetched(
    hub: Hub, published: Path
) -> None:
    hub.seed("lab/bf16", published)
    done = run("verify", "hf://lab/bf16", "--json")
    assert done.code == 0 and json.loads(done.out)["ok"]
    here = json.loads(run("verify", published, "--json").out)
    assert json.loads(done.out)["bytes"] == here["bytes"]
    assert hub.fetched == bytes_of_headers(published)


@pytest.mark.parametrize("name", ["model-00005-of-00012.safetensors", SIDECAR, "tokenizer.json", CONFIG])
def test_changed_byte_of_a_file_on_the_hub_is_found_by_its_id(hub: Hub, directory: Path, name: str) -> None:
    data = bytearray((directory / name).read_bytes())
    if name == CONFIG:
        data[data.index(b"\n")] = ord(" ")  # it says the same
    else:
        data[-2] ^= 1
    tiny.replace(directory / name, bytes(data))
    hub.seed("lab/bf16", directory)
    done = run("verify", "hf://lab/bf16", "--level", "bytes", "--json")
    files = json.loads(done.out)["bytes"]["files"]
    assert done.code == 1, done
    assert [file["name"] for file in files if file["verdict"] != "ok"] == [name]


def test_manifest_is_asked_for_where_bytes_are_verified(source: str) -> None:
    assert run("verify", source).code == 0
    assert "dsv4.manifest.json" in refused(run("verify", source, "--level", "bytes"), "MissingFile", 3)


def test_file_that_is_missing_on_the_hub_is_found(hub: Hub, directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    hub.seed("lab/bf16", directory)
    done = run("verify", "hf://lab/bf16")
    assert done.code == 1 and "tokenizer.json: missing" in done.out


@pytest.mark.slow
def test_values_of_two_checkpoints_are_compared_wherever_they_are(
    hub: Hub, source: str, smallest: Path, published: Path
) -> None:
    hub.seed("lab/bf16", published)
    for a, b in ((smallest, "hf://lab/bf16"), (source, published), (source, "hf://lab/bf16")):
        assert run("verify", a, b, "--level", "values").code == 0
    assert run("verify", smallest, source, "--level", "bytes").code == 0
    there, here = (
        run("verify", smallest, b, "--level", "bytes", "--json") for b in ("hf://lab/bf16", published)
    )
    assert (there.code, json.loads(there.out)) == (here.code, json.loads(here.out))


@pytest.mark.slow
@pytest.mark.parametrize("level", ["values", "bytes"])
def test_changed_value_on_the_hub_is_found(
    hub: Hub, source: str, smallest: Path, tmp_path: Path, level: str
) -> None:
    directory = tiny.copy_of(smallest, tmp_path / "edited")

    def edit(tensors: dict[str, tiny.Tensor]) -> None:
        item = tensors["layers.0.attn.wq_a.weight"]
        assert isinstance(item.data, bytes)
        data = bytes([item.data[0] ^ 1]) + item.data[1:]
        tensors["layers.0.attn.wq_a.weight"] = item._replace(data=data)

    tiny.edit_shard(tiny.shard_of(directory, "layers.0.attn.wq_a.weight"), edit)
    done = run("verify", directory, source, "--level", level, "--json")
    assert done.code == 1
    (found,) = json.loads(done.out)["values"]["tensors"]
    assert found["name"] == "layers.0.attn.wq_a.weight" and found["verdict"] == "differs"


def test_repo_goes_on_with_the_byte_that_is_due(
    hub: Hub, source: str, smallest: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PIECE", 1000)
    assert source == f"hf://{LAB}"
    repo, shard = remote.Repo(LAB), sorted(smallest.glob("*.safetensors"))[1]
    hub.faults.append(Fault("GET", STORAGE, "drop body", 2))
    assert repo.read(shard.name, 1000, 81_000) == shard.read_bytes()[1000:81_000]
    assert [(item.begin, item.num_bytes) for item in hub.fetches] == [
        (1000, 40_000),
        (41_000, 20_000),
        (61_000, 20_000),
    ]
    assert waits == [1, 1]


def test_connection_that_breaks_more_often_than_tries_are_allowed_is_enough_if_each_brings_something(
    hub: Hub, source: str, smallest: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PIECE", 10)
    repo, shard = remote.Repo(LAB), sorted(smallest.glob("*.safetensors"))[1]
    assert source == f"hf://{LAB}"
    hub.faults.append(Fault("GET", STORAGE, "drop body", 8))
    assert repo.read(shard.name, 0, 81_000) == shard.read_bytes()[:81_000]
    assert waits == [1] * 8


@pytest.mark.parametrize(
    "row",
    [
        {"type": "file"},
        {"type": "file", "path": "config.json", "size": -1, "oid": "0" * 40},
        {"type": "file", "path": "config.json", "size": 1, "oid": "../../x"},
        {"type": "file", "path": "config.json", "size": 1, "oid": "0" * 40, "lfs": {"oid": "a"}},
        {"type": "file", "path": "config.json", "size": 1, "oid": "0" * 40, "lfs": 5},
        "a page that asks to log in",
    ],
)
def test_list_of_files_that_is_none_is_refused(
    hub: Hub, source: str, row: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_row", lambda name, entry: row)
    assert hub.repos
    assert "the client gave up" in refused(run("inspect", source), "HubFailed", 4)


# ---- a download, against the ids


def test_directory_is_compared_with_the_ids_of_the_hub(
    hub: Hub, source: str, smallest: Path, tmp_path: Path
) -> None:
    downloaded = tiny.copy_of(smallest, tmp_path / "downloaded")
    good = run("verify", downloaded, "--against-hub-oids", source)
    commit = hub.repos[LAB].branches["main"][-1].oid
    assert good.code == 0 and f"of {LAB}, commit {commit}" in good.out and good.out.endswith("ok\n")
    assert hub.fetched == 0
    for name in ("config.json", sorted(downloaded.glob("*.safetensors"))[0].name):
        data = bytearray((smallest / name).read_bytes())
        data[-2] ^= 1
        tiny.replace(downloaded / name, bytes(data))
    bad = json.loads(run("verify", downloaded, "--against-hub-oids", source, "--json").out)
    differing = {row["name"] for row in bad["oids"]["files"] if row["verdict"] == "differs"}
    assert not bad["ok"] and len(differing) == 2 and "config.json" in differing
    (downloaded / "model.safetensors.index.json").unlink()
    missing = run("verify", downloaded, "--against-hub-oids", source)
    assert missing.code == 1 and "model.safetensors.index.json: missing" in missing.out
    assert "no such repository" in refused(
        run("verify", downloaded, "--against-hub-oids", "hf://lab/none"), "HubFailed", 4
    )
