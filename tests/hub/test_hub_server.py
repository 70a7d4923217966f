"""The Hub on this machine, asked by the unpatched client: what a push leaves can be listed, fetched, read in ranges."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import server
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, http_backoff
from pushing import REPO, Push, hashes
from server import READERS_TOKEN, Commit, Fault, Fetch, Hub, Repo

SHARD = "model-00001-of-00012.safetensors"
SOURCE, WEIGHTS, CONFIG = "lab/source", "model.safetensors", "config.json"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own


def api(hub: Hub, token: str | bool | None = None) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A directory with files of both kinds, and a folder."""
    (tmp_path / "local" / "inference").mkdir(parents=True)
    (tmp_path / "local" / WEIGHTS).write_bytes(bytes(range(256)) * 40)
    (tmp_path / "local" / "tokenizer.json").write_bytes(b" " * 100_001)
    for name in (CONFIG, "inference/config.json"):
        (tmp_path / "local" / name).write_text(json.dumps({"of": name}))
    return tmp_path / "local"


def asked(hub: Hub, name: str, *, method: str = "GET", revision: str = "main", **headers: str) -> Any:
    """The answer to a request for a seeded file, redirects followed."""
    url = hf_hub_url(SOURCE, name, revision=revision, endpoint=hub.endpoint)
    return get_session().request(method, url, headers={**build_hf_headers(), **headers})


def storage(hub: Hub, name: str) -> str:
    """Where the storage keeps an LFS file of the seeded repository."""
    return hub.storage(str(hub.repos[SOURCE].files()[name].sha256))


@pytest.mark.slow
def test_pushed_files_can_be_downloaded(hub: Hub, push: Push, directory: Path, tmp_path: Path) -> None:
    assert push().code == 0
    for name in (SHARD, "config.json", "inference/config.json"):
        path = api(hub).hf_hub_download(REPO, name, local_dir=tmp_path / "down")
        assert Path(path).read_bytes() == (directory / name).read_bytes()


@pytest.mark.slow
def test_pushed_files_can_be_listed_and_read_in_ranges(hub: Hub, push: Push, directory: Path) -> None:
    assert push().code == 0
    info = api(hub).repo_info(REPO)
    assert {item.rfilename for item in info.siblings or []} >= {SHARD, "config.json"}
    (entry,) = api(hub).get_paths_info(REPO, [SHARD])
    assert entry.size == (directory / SHARD).stat().st_size
    assert [branch.name for branch in api(hub).list_repo_refs(REPO).branches] == ["main"]
    url = hf_hub_url(REPO, SHARD, revision=info.sha, endpoint=hub.endpoint)
    answer = get_session().get(url, headers={**build_hf_headers(), "Range": "bytes=8-107"})
    assert answer.status_code == 206
    assert answer.content == (directory / SHARD).read_bytes()[8:108]
    beyond = get_session().get(url, headers={**build_hf_headers(), "Range": "bytes=99999999-"})
    assert beyond.status_code == 416


def test_what_is_missing_is_told_as_the_hub_tells_it(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api(hub).repo_info(REPO)
    hub.repos[REPO] = Repo(False, {"main": [Commit("0" * 40, "", {})]})
    with pytest.raises(RevisionNotFoundError):
        api(hub).repo_info(REPO, revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        api(hub).hf_hub_download(REPO, "x.json", local_dir=tmp_path)


def test_fault_meets_as_many_requests_as_it_was_ordered_for(hub: Hub) -> None:
    hub.faults.append(Fault("GET", "whoami", 418, 2))
    statuses = []
    for _ in range(3):
        try:
            statuses.append(api(hub).whoami()["name"])
        except HfHubHTTPError as error:
            statuses.append(error.response.status_code)
    assert statuses == [418, 418, "tester"]
    assert hub.count("GET", "whoami") == 3


# ---- seeded repositories


def test_seeded_directory_is_listed_and_downloaded_as_it_is(hub: Hub, local: Path, tmp_path: Path) -> None:
    oid = hub.seed(SOURCE, local)
    for index in range(10):  # a second page
        (local / f"note-{index}").write_text(str(index))
    second = hub.seed(SOURCE, local, title="notes")
    assert [commit.oid for commit in hub.repos[SOURCE].branches["main"][1:]] == [oid, second]
    files = [item for item in api(hub).list_repo_tree(SOURCE, recursive=True) if isinstance(item, RepoFile)]
    assert {item.path for item in files} == {*hashes(local), ".gitattributes"}
    assert {item.path: item.lfs.sha256 for item in files if item.lfs} == {
        name: hashes(local)[name] for name in (WEIGHTS, "tokenizer.json")
    }
    for name in hashes(local):
        api(hub).hf_hub_download(SOURCE, name, local_dir=tmp_path / "down")
    assert {name: sha for name, sha in hashes(tmp_path / "down").items() if ".cache" not in name} == hashes(
        local
    )


def test_listing_that_is_not_recursive_shows_folders_instead_of_what_is_in_them(
    hub: Hub, local: Path
) -> None:
    hub.seed(SOURCE, local)
    names = [item.path for item in api(hub).list_repo_tree(SOURCE)]
    assert names == [".gitattributes", CONFIG, "inference", WEIGHTS, "tokenizer.json"]
    assert [item.path for item in api(hub).list_repo_tree(SOURCE, "inference")] == ["inference/config.json"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api(hub).list_repo_tree(SOURCE, "nowhere"))


def test_every_kind_of_revision_shows_what_it_did_then(hub: Hub, local: Path, tmp_path: Path) -> None:
    """A branch, one with a slash, a tag, a pull request, and a commit that is the last of no branch."""
    contents = {}
    for branch in ("main", "feature/x", "main"):
        (local / CONFIG).write_text(f"file {len(contents)}")
        (local / f"only-{len(contents)}").touch()
        contents[hub.seed(SOURCE, local, branch=branch)] = f"file {len(contents)}"
        (local / f"only-{len(contents) - 1}").unlink()
    first, aside, last = contents
    hub.repos[SOURCE].tags["v1"] = first
    number = api(hub).create_pull_request(SOURCE, "a change").num
    (tag,) = api(hub).list_repo_refs(SOURCE).tags
    assert (tag.name, tag.target_commit) == ("v1", first)
    revisions = {"main": last, "feature/x": aside, "v1": first, f"refs/pr/{number}": last}
    for revision, oid in (revisions | {oid: oid for oid in contents}).items():
        assert api(hub).model_info(SOURCE, revision=revision).sha == oid
        tree = {item.path: item for item in api(hub).list_repo_tree(SOURCE, revision=revision)}
        only = f"only-{[*contents].index(oid)}"
        assert [name for name in tree if name.startswith("only")] == [only]
        (entry,) = api(hub).get_paths_info(SOURCE, [only, CONFIG], revision=revision)[1:]
        assert entry.blob_id == tree[CONFIG].blob_id
        down = api(hub).hf_hub_download(SOURCE, CONFIG, revision=revision, local_dir=tmp_path / oid)
        assert Path(down).read_text() == contents[oid]
        assert asked(hub, WEIGHTS, revision=revision).history[0].headers["X-Repo-Commit"] == oid
    with pytest.raises(RevisionNotFoundError):
        api(hub).model_info(SOURCE, revision="0" * 40)


@pytest.mark.parametrize(("token", "status"), [(False, 401), (READERS_TOKEN, 403), (None, 200)])
def test_gated_repository_is_seen_by_everybody_and_read_by_its_owner(
    hub: Hub, local: Path, tmp_path: Path, token: str | bool | None, status: int
) -> None:
    oid = hub.seed(SOURCE, local, gated=True)
    client = api(hub, token)
    assert client.model_info(SOURCE, revision=oid).gated == "manual"
    assert WEIGHTS in [item.path for item in client.list_repo_tree(SOURCE, revision=oid)]
    for name in (WEIGHTS, CONFIG):
        if status == 200:
            down = client.hf_hub_download(SOURCE, name, revision=oid, local_dir=tmp_path / "down")
            assert Path(down).read_bytes() == (local / name).read_bytes()
            continue
        with pytest.raises(GatedRepoError, match=f"Access to model {SOURCE} is restricted") as caught:
            client.hf_hub_download(SOURCE, name, revision=oid, local_dir=tmp_path / "down")
        assert caught.value.response.status_code == status
    with pytest.raises(GatedRepoError) if status != 200 else contextlib.nullcontext():
        client.auth_check(SOURCE)


def test_private_repository_is_none_for_others(hub: Hub, local: Path) -> None:
    hub.seed(SOURCE, local, private=True)
    assert api(hub).model_info(SOURCE).private
    with pytest.raises(RepositoryNotFoundError):
        api(hub, READERS_TOKEN).model_info(SOURCE)


@pytest.mark.slow
def test_command_seeds_directories_before_it_says_its_address(local: Path) -> None:
    command = [sys.executable, server.__file__, "--seed", f"{SOURCE}={local}", "--seed", f"lab/b={local}=no"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "DIR has to be there" in refused.stderr
    command[-1] = f"lab/b={local / 'inference'}"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        client = HfApi(endpoint=process.stdout.readline().strip())
        assert {*client.list_repo_files(SOURCE)} == {*hashes(local), ".gitattributes"}
        assert client.list_repo_files("lab/b") == [".gitattributes", CONFIG]
        process.terminate()


# ---- what is sent to the client


def test_bytes_that_leave_the_storage_are_counted(hub: Hub, local: Path) -> None:
    hub.seed(SOURCE, local)
    assert asked(hub, WEIGHTS, Range="bytes=0-7").content == bytes(range(8))
    assert asked(hub, WEIGHTS, Range="bytes=250-259").content == bytes([*range(250, 256), *range(4)])
    asked(hub, WEIGHTS, method="HEAD")
    asked(hub, CONFIG)
    oid = hashes(local)[WEIGHTS]
    assert hub.fetches == [Fetch(oid, 0, 8), Fetch(oid, 250, 10)]
    assert hub.fetched == 18


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=2-9"}])
def test_fault_spoils_what_is_sent_once(hub: Hub, local: Path, name: str, headers: dict[str, str]) -> None:
    hub.seed(SOURCE, local)
    path, whole = "/storage/" if name == WEIGHTS else "/resolve/", (local / name).read_bytes()
    right = whole[2:10] if headers else whole
    half = len(right) // 2

    def spoiled(what: str) -> Any:
        hub.faults.append(Fault("GET", path, what))
        return asked(hub, name, **headers)

    with pytest.raises(
        Exception, match=rf"complete message body \(received {half} bytes, expected {len(right)}\)"
    ):
        spoiled("drop body")
    short = spoiled("short")
    assert short.content == right[:half] and int(short.headers["Content-Length"]) == half
    assert short.headers.get("Content-Range") == (f"bytes 2-5/{len(whole)}" if headers else None)
    wrong = spoiled("wrong bytes").content
    assert len(wrong) == len(right) and sum(a != b for a, b in zip(wrong, right, strict=True)) == 1
    ignored = spoiled("no range")
    assert (ignored.status_code, ignored.content) == (200, whole)
    after = asked(hub, name, **headers)
    assert (after.status_code, after.content) == (206 if headers else 200, right)
    if name == WEIGHTS:
        assert hub.fetched == half + half + len(wrong) + len(whole) + len(right)


def test_answer_of_a_route_can_be_cut_amid_its_body(hub: Hub, local: Path) -> None:
    hub.seed(SOURCE, local)
    hub.faults.append(Fault("GET", "/tree/", "drop body"))
    with pytest.raises(Exception, match="complete message body"):
        get_session().get(f"{hub.endpoint}/api/models/{SOURCE}/tree/main")


def test_request_without_a_body_can_be_dropped(hub: Hub, local: Path) -> None:
    hub.seed(SOURCE, local)
    hub.faults.append(Fault("GET", "/storage/", "drop"))
    with pytest.raises(Exception, match="disconnected without sending a response"):
        asked(hub, WEIGHTS)
    assert hub.fetched == 0


@pytest.mark.parametrize(("path", "name"), [("/storage/", WEIGHTS), ("/resolve/", CONFIG)])
def test_rate_limit_of_a_download_is_waited_for(
    hub: Hub, local: Path, tmp_path: Path, path: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.seed(SOURCE, local)
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.faults.append(Fault("GET", path, 429, 2, {"Retry-After": "7"}))
    down = api(hub).hf_hub_download(SOURCE, name, local_dir=tmp_path / "down")
    assert Path(down).read_bytes() == (local / name).read_bytes()
    assert waits == [8.0, 8.0]  # the client adds a second
    assert hub.fetched == ((local / name).stat().st_size if name == WEIGHTS else 0)


def test_rate_limit_can_meet_the_way_to_the_storage(hub: Hub, local: Path) -> None:
    hub.seed(SOURCE, local)
    hub.faults.append(Fault("GET", "/resolve/", 429, 1, {"Retry-After": "1"}))
    first, second = asked(hub, WEIGHTS, Range="bytes=0-7"), asked(hub, WEIGHTS, Range="bytes=0-7")
    assert (first.status_code, first.headers["Retry-After"]) == (429, "1")
    assert (second.status_code, hub.fetched) == (206, 8)


@pytest.mark.parametrize(("ordered", "other"), [("GET", "HEAD"), ("HEAD", "GET")])
def test_fault_of_one_method_leaves_the_other_alone(hub: Hub, local: Path, ordered: str, other: str) -> None:
    hub.seed(SOURCE, local)
    hub.faults.append(Fault(ordered, "/storage/", 503))
    statuses = [asked(hub, WEIGHTS, method=method).status_code for method in (other, ordered, ordered)]
    assert statuses == [200, 503, 200]


def test_storage_takes_no_token(hub: Hub, local: Path) -> None:
    """As a signed address does not; the client sends none where it follows a redirect."""
    hub.seed(SOURCE, local)
    assert asked(hub, WEIGHTS).status_code == 200
    assert get_session().get(storage(hub, WEIGHTS), headers=build_hf_headers()).status_code == 400
    assert get_session().get(storage(hub, WEIGHTS)).status_code == 200


# ---- restarts


def test_restart_ends_what_is_under_way_and_keeps_what_is_whole(hub: Hub, local: Path) -> None:
    (local / WEIGHTS).write_bytes(bytes(32_000_000))  # more than lies between two sockets
    hub.seed(SOURCE, local)
    port, url = hub.port, storage(hub, WEIGHTS)
    with get_session().stream("GET", url) as answer:
        pieces = answer.iter_raw(1000)
        next(pieces)
        hub.restart()
        with pytest.raises(Exception, match=r"complete message body|reset by peer"):
            list(pieces)
    assert hub.port == port
    assert get_session().get(url, headers={"Range": "bytes=31999990-"}).content == bytes(10)
    assert api(hub).model_info(SOURCE).sha == hub.repos[SOURCE].branches["main"][-1].oid


def test_restart_forgets_parts_and_refuses_what_they_were_to_complete(hub: Hub, local: Path) -> None:
    hub.seed(REPO, local)
    oid = "a" * 64
    complete = f"{hub.endpoint}/{REPO}.git/info/lfs/objects/complete"
    assert get_session().put(hub.storage(f"{oid}/1"), content=b"half").status_code == 200
    hub.restart()
    answer = get_session().post(complete, json={"oid": oid, "parts": [{"partNumber": 1, "etag": "x"}]})
    assert answer.status_code == 400 and hub.parts == {} and oid not in hub.blobs


def test_request_that_a_restart_met_was_never_carried_out(hub: Hub, local: Path) -> None:
    """Nor is it answered: the restart comes between the two, from the thread that serves the request."""
    hub.seed(SOURCE, local)

    def once(request: server.Request) -> None:
        hub.on_request = lambda request: None
        hub.restart()

    hub.on_request = once
    with pytest.raises(Exception, match=r"disconnected without sending a response|reset by peer"):
        get_session().put(hub.storage("a" * 64 + "/1"), content=b"part")
    assert hub.count("PUT", "/storage/") == 1 and hub.parts == {}


def test_client_that_tries_again_outlives_a_pause(hub: Hub, local: Path) -> None:
    hub.seed(SOURCE, local)
    contents, num_asked = [asked(hub, WEIGHTS).content], 1  # leaves an open connection
    thread = threading.Thread(target=hub.restart, args=(0.1,))
    thread.start()
    while thread.is_alive():
        num_asked += 1
        with contextlib.suppress(Exception):  # whatever the client calls a refused connection
            contents.append(get_session().get(storage(hub, WEIGHTS), timeout=10).content)
        thread.join(0.005)
    assert len(contents) < num_asked
    contents.append(http_backoff("GET", storage(hub, WEIGHTS)).content)
    assert {*contents} == {(local / WEIGHTS).read_bytes()}


def test_connections_are_refused_while_a_restart_pauses(
    hub: Hub, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = []

    def look(seconds: float) -> None:
        pauses.append(seconds)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", hub.port), timeout=10)

    monkeypatch.setattr("server.time", types.SimpleNamespace(sleep=look))
    hub.restart(3)
    assert pauses == [3]
    assert api(hub).whoami()["name"] == "tester"
