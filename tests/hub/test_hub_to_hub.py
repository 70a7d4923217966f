"""dsv4 convert hf://SRC hf://DST: what the branch holds, what was sent and fetched, and what lay here meanwhile.

The oracles are the server's own record, and the directory that dsv4 convert DIR makes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
from dsv4cli import relay
from pushing import (
    CARD,
    COMMIT,
    INDEX,
    MANIFEST,
    PUT,
    REPO,
    Done,
    card_on_hub,
    commits,
    fault,
    hashes,
    nothing_sent,
    on_hub,
    refused,
    require_honest,
    run,
)  # fmt: skip
from server import READERS_TOKEN, Commit, Hub, Repo, Request, entry_of

from dsv4ckpt import hub as hubs
from dsv4ckpt import outdir
from dsv4ckpt import run as run_module
from dsv4ckpt.errors import Environment, NoSpace, Usage
from dsv4ckpt.hub_writer import WritableRepo
from dsv4ckpt.outbox import Outbox
from dsv4ckpt.push import Pushed
from dsv4ckpt.steps import PlannedFile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own
]

SRC, WORK = "lab/flash", "model.partial"
FLAGS = ("--to", "bf16", "--max-shard-size", "150KB")  # as the fixture `published`
Convert = Callable[..., Done]


@pytest.fixture
def source(hub: Hub, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The commit of the release on the Hub. This process works in a directory of the test's own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return hub.seed(SRC, published.parent / "flash")


@pytest.fixture
def convert(source: str) -> Convert:
    """From the Hub to the Hub."""
    return lambda *more: run("convert", f"hf://{SRC}", f"hf://{REPO}", *FLAGS, *more)


def manifest_on_hub(hub: Hub, branch: str = "main") -> dict[str, object]:
    document = json.loads(hub.repos[REPO].files(branch)[MANIFEST].content or b"")
    assert isinstance(document, dict)
    return document


def require_as_pushed(hub: Hub, published: Path, source: str | None, branch: str = "main") -> None:
    """What `dsv4 convert DIR` and `dsv4 push` would have made, but for where the source was."""
    found, expected = on_hub(hub, branch), hashes(published)
    told, pushed = manifest_on_hub(hub, branch), json.loads((published / MANIFEST).read_text())
    if source is None:
        assert found == expected
        return
    del found[MANIFEST], expected[MANIFEST]
    assert found == expected
    assert (told.pop("source_repository"), told.pop("source_commit")) == (SRC, source)
    for row in told["source"]:  # type: ignore[attr-defined]
        assert row.pop("sha256") == hub.repos[SRC].files()[row["file"]].sha256
    for row in pushed["source"]:
        del row["sample_sha256"]
    assert told == pushed


# ---- what arrives


def test_branch_holds_what_a_directory_and_a_push_would_have_made(
    hub: Hub, convert: Convert, published: Path, source: str
) -> None:
    done = convert()
    assert (done.code, done.err) == (0, "")
    require_as_pushed(hub, published, source)
    require_honest(hub)
    *shards, last = commits(hub)
    heavy = {name for name in hashes(published) if name.endswith((".safetensors", ".roundtrip"))}
    assert len(shards) < len(heavy) / 2  # groups
    assert {INDEX, "config.json", MANIFEST, CARD} <= last.files.keys()
    assert shards[-1].files.keys() == heavy | {".gitattributes"}  # nothing else is seen before the end
    assert os.listdir() == []


def test_directory_goes_to_the_hub_as_well(hub: Hub, source: str, published: Path) -> None:
    done = run("convert", published.parent / "flash", f"hf://{REPO}", *FLAGS, "--json")
    assert done.code == 0 and json.loads(done.out)["ok"]
    require_as_pushed(hub, published, None)
    require_honest(hub)
    assert source not in card_on_hub(hub) and os.listdir() == []


def test_older_index_is_gone_with_the_first_shards(
    hub: Hub, convert: Convert, published: Path, source: str
) -> None:
    old = {INDEX: entry_of(b'{"weight_map": {"x": "old.safetensors"}}'), "old.safetensors": entry_of(b"")}
    hub.repos[REPO] = Repo(False, {"main": [Commit("0" * 40, "", old)]})
    done = convert()
    assert done.code == 0 and "also on the Hub, and not of this conversion: old.safetensors" in done.out
    assert INDEX not in commits(hub)[0].files
    require_honest(hub)
    del hub.repos[REPO].files()["old.safetensors"]
    require_as_pushed(hub, published, source)


def test_second_run_sends_and_fetches_nothing(
    hub: Hub, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv4ckpt.hub_source._FIRST_BYTES", 8)  # so that headers cost what they are
    assert convert().code == 0
    sent, fetched, num_commits = hub.sent(), hub.fetched, len(commits(hub))
    done = convert()
    assert done.code == 0 and "was complete already: nothing to do" in done.out
    assert (hub.sent(), len(commits(hub))) == (sent, num_commits)
    assert hub.fetched - fetched < 20_000
    assert os.listdir() == []


def test_branch_privacy_and_work_directory_are_as_named(
    hub: Hub, published: Path, source: str, tmp_path: Path
) -> None:
    seen = set[str]()
    hub.on_request = lambda request: seen.update(file.name for file in (tmp_path / "via").glob("*"))
    done = run(
        "convert", f"hf://{SRC}", f"hf://{REPO}@v2", *FLAGS, "--private", "--work", tmp_path / "via", "--json"
    )
    assert done.code == 0
    told = json.loads(done.out)
    assert (told["repo"], told["revision"], told["ok"]) == (REPO, "v2", True)
    assert hub.repos[REPO].private and on_hub(hub) == {}
    require_as_pushed(hub, published, source, "v2")
    assert any(name.endswith(".safetensors") for name in seen)
    assert os.listdir() == [] and not (tmp_path / "via").exists()


def test_release_on_the_hub_lends_what_the_way_back_needs(
    hub: Hub, source: str, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checkpoints are fetched from, whose shards have other names."""
    tuned = {name: entry for name, entry in tiny.tree_of(published).items() if name != "dsv4.roundtrip"}
    (published.parent / "tuned").mkdir()
    for name in tuned:
        (published.parent / "tuned" / name).parent.mkdir(exist_ok=True)
        os.link(published / name, published.parent / "tuned" / name)
    hub.seed("lab/bf16", published.parent / "tuned")

    def back(*more: object) -> Done:
        return run(
            "convert", "hf://lab/bf16", f"hf://{REPO}", "--to", "native", "--source", f"hf://{SRC}", *more
        )

    text = refused(back("--scratch-limit", "1KB"), "Usage", 2)
    assert REPO not in hub.repos
    least = int(text.split("at least ")[1].split(" bytes")[0].replace(",", ""))
    assert back("--scratch-limit", least - 1).code == 2
    assert back("--scratch-limit", least).code == 0
    released = hub.repos[SRC].files()
    found = hub.repos[REPO].files()
    for name, entry in released.items():
        assert found[name] == entry or name == INDEX, name


# ---- room


def bytes_of_shards(work: Path, names: set[str]) -> int:
    """Fetched, finished, and in the making; a file may go while one looks."""
    temporaries = {hashlib.sha256(name.encode()).hexdigest()[:16] for name in names}
    total = 0
    for path in work.rglob("*"):
        is_fetched = path.parent.name.startswith("shelf.") and path.suffix != ".marks"
        is_made = path.name in names or path.name.partition(".")[0] in temporaries
        if is_fetched or is_made:
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def test_scratch_limit_holds_at_any_time(hub: Hub, convert: Convert, published: Path, source: str) -> None:
    text = refused(convert("--scratch-limit", "100KB"), "Usage", 2)
    least = int(text.split("at least ")[1].split(" bytes")[0].replace(",", ""))
    assert refused(convert("--scratch-limit", least - 1), "Usage", 2)
    assert nothing_sent(hub) and REPO not in hub.repos and os.listdir() == []
    names = {file.name for file in published.glob("*.safetensors")}
    most = 0

    def look(request: Request) -> None:
        nonlocal most
        most = max(most, bytes_of_shards(Path(WORK), names))

    hub.on_request = look
    assert convert("--scratch-limit", least, "--workers", "4").code == 0
    assert 0 < most <= least
    require_as_pushed(hub, published, source)
    hub.repos.pop(REPO)
    assert convert().code == 0
    assert most > least  # else the above would say nothing


def test_finished_shards_that_a_killed_run_had_sent_take_no_room(
    hub: Hub, convert: Convert, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the commit, and before they were removed."""

    def die(outbox: Outbox, name: str) -> None:
        raise Environment("killed")

    with monkeypatch.context() as patched:
        patched.setattr(Outbox, "_remove", die)
        assert convert().code == 4
    there = {file.name for file in Path(WORK).glob("*.safetensors")}
    committed = {name for name in commits(hub)[-1].files if name.endswith(".safetensors")}
    assert committed and committed <= there
    hub.on_request = lambda request: seen.append({file.name for file in Path(WORK).glob("*.safetensors")})
    seen: list[set[str]] = []
    assert convert().code == 0
    assert [names for names in seen if not names & committed]
    assert hashes(published).keys() == on_hub(hub).keys()


# ---- what is refused, and before what


@pytest.mark.parametrize("src", ["hub", "directory"])
def test_torchrun_is_refused(
    hub: Hub, source: str, published: Path, src: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os._exit", sys.exit)  # as a rank leaves
    src = f"hf://{SRC}" if src == "hub" else str(published.parent / "flash")
    assert "one process" in refused(run("convert", src, f"hf://{REPO}", *FLAGS), "Usage", 2)
    assert REPO not in hub.repos and os.listdir() == []


@pytest.mark.parametrize(
    ("token", "words"),
    [(READERS_TOKEN, "does not allow it"), ("", "no token"), ("hf_NobodyKnowsThisOne", "does not know")],
)
@pytest.mark.parametrize("is_there", [False, True])
def test_token_that_may_not_write_is_refused_before_anything(
    hub: Hub,
    published: Path,
    source: str,
    token: str,
    words: str,
    is_there: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_there:
        hub.repos[REPO] = Repo(False, {"main": [Commit("0" * 40, "", {})]})
    monkeypatch.setenv("HF_TOKEN", token)
    done = run("convert", published.parent / "flash", f"hf://{REPO}", *FLAGS)
    assert words in refused(done, "HubFailed", 4)
    assert nothing_sent(hub) and hub.fetched == 0 and os.listdir() == []
    assert (REPO in hub.repos) is is_there


def test_card_that_the_hub_refuses_is_told_before_the_first_byte(hub: Hub, convert: Convert) -> None:
    fault(hub, "POST", "/validate-yaml", 400)
    assert "model card" in refused(convert(), "Usage", 2)
    assert nothing_sent(hub) and REPO not in hub.repos and os.listdir() == []


def test_public_repository_is_not_taken_for_private(hub: Hub, convert: Convert) -> None:
    hub.repos[REPO] = Repo(False, {"main": [Commit("0" * 40, "", {})]})
    assert "public" in refused(convert("--private"), "Usage", 2)
    assert nothing_sent(hub) and os.listdir() == []


@pytest.mark.parametrize("dst", [f"hf://{SRC}", f"hf://{SRC}@main"])
def test_source_is_not_written_to(hub: Hub, source: str, dst: str) -> None:
    assert "DST is SRC" in refused(run("convert", f"hf://{SRC}", dst, *FLAGS), "Usage", 2)
    assert hub.requests == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("reshard", "FLASH", "hf://x/y", "--to", "dcp"),
        ("sample", "hf://x/y", "--layers", "1"),
        ("reshard", "FLASH", "hf:x", "--work", "x"),
        ("convert", "FLASH", "hf://x", "--to", "bf16"),
        ("convert", "FLASH", "here", "--to", "bf16", "--private"),
    ],
)
def test_verb_that_writes_a_directory_refuses_the_hub(
    hub: Hub, source: str, published: Path, arguments: tuple[str, ...]
) -> None:
    flash = str(published.parent / "flash")
    done = run(*(flash if word == "FLASH" else word for word in arguments))
    assert done.code == 2, done
    assert os.listdir() == [] and hub.requests == []


def test_every_directory_that_is_opened_refuses_the_hub(source: str) -> None:
    """The one place through which all verbs go, dsv4 export as well."""
    with pytest.raises(Usage, match="into a directory of this machine"):
        outdir.open_outdir("hf://x/y", "0" * 64, set()).__enter__()
    assert os.listdir() == []


def test_dry_run_sends_and_makes_nothing(hub: Hub, convert: Convert) -> None:
    done = convert("--dry-run", "--json")
    assert done.code == 0 and json.loads(done.out)["to_fetch"]["source"]["shards"] == 4
    assert {request.method for request in hub.requests} == {"GET", "HEAD"}
    assert hub.count("GET", "tester") == 0 and REPO not in hub.repos and os.listdir() == []
    assert "at least" in refused(convert("--dry-run", "--scratch-limit", "1KB"), "Usage", 2)


# ---- faults


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between two tries."""
    monkeypatch.setattr(hubs, "_asked_wait", lambda error, otherwise: 0.0)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "faults",
    [
        [("POST", COMMIT, 429, 2), ("POST", "/objects/batch", 429, 2), ("PUT", PUT, 429, 1)],
        [("POST", COMMIT, 500, 3), ("POST", "/objects/batch", 500, 3), ("PUT", PUT, 500, 3)],
        [("POST", COMMIT, 409, 1), ("POST", COMMIT, 412, 1), ("GET", "/tree/", 503, 3)],
        [("POST", COMMIT, "drop", 1), ("PUT", PUT, "drop", 1), ("POST", COMMIT, "mute", 2)],
        [("GET", PUT, "drop body", 2), ("GET", PUT, "short", 2), ("GET", PUT, "wrong bytes", 2)],
        [("GET", PUT, 429, 2), ("GET", PUT, 500, 2), ("HEAD", "/resolve/", 500, 3)],
        [("POST", COMMIT, "wrong sha", 1)],
    ],
    ids=lambda faults: "+".join(dict.fromkeys(str(fault[2]) for fault in faults)),
)
def test_faults_that_pass_on_either_side_change_nothing(
    hub: Hub,
    convert: Convert,
    published: Path,
    source: str,
    faults: list[tuple[str, str, int | str, int]],
) -> None:
    for method, path, what, count in faults:
        fault(hub, method, path, what, count)
    done = convert("-q")
    assert done == (0, "", ""), done
    assert not any(item.count for item in hub.faults)
    require_as_pushed(hub, published, source)
    require_honest(hub)
    assert os.listdir() == []


@pytest.mark.usefixtures("at_once")
def test_upload_that_was_cut_is_told_and_the_same_command_ends_it(
    hub: Hub, convert: Convert, published: Path, source: str
) -> None:
    fault(hub, "PUT", PUT, "truncate")
    refused(convert(), "HubFailed", 4)
    assert INDEX not in hub.repos[REPO].files()
    assert convert().code == 0
    require_as_pushed(hub, published, source)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(("method", "path"), [("PUT", PUT), ("POST", COMMIT), ("GET", PUT)])
def test_server_that_restarts_in_the_middle_changes_nothing(
    hub: Hub,
    convert: Convert,
    published: Path,
    source: str,
    method: str,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hubs, "_asked_wait", lambda error, otherwise: 0.1)  # it is away for a moment
    left = 6 if path == PUT else 2

    def restart(request: Request) -> None:
        nonlocal left
        if request.method == method and path in request.path:
            left -= 1
            if left == 0:
                hub.restart()

    hub.on_request = restart
    done = convert("-q")
    if done.code:  # parts of a file were lost with the server, as some versions of the client tell
        assert "the parts could not be found" in refused(done, "HubFailed", 4)
        done = convert("-q")
    assert done == (0, "", ""), done
    assert left <= 0
    require_as_pushed(hub, published, source)
    require_honest(hub)


def test_worker_that_fails_ends_the_run_though_the_hub_asks_for_patience(
    hub: Hub, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(hub, "POST", COMMIT, 429, 99, **{"Retry-After": "60"})
    waits = threading.Event()
    hub.on_request = lambda request: waits.set() if COMMIT in request.path else None

    def full(file: PlannedFile, number: int, of: Any) -> Any:
        if not number < 9:
            assert waits.wait(30)
            raise NoSpace("the disk is full", do="make room")
        return written(file, number, of)

    written = run_module._write_shard
    monkeypatch.setattr(run_module, "_write_shard", full)
    began = time.monotonic()
    refused(convert(), "NoSpace", 4)
    assert time.monotonic() - began < 20


@pytest.mark.usefixtures("at_once")
def test_commit_that_is_refused_ends_the_run_and_the_next_one_goes_on(
    hub: Hub, convert: Convert, published: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_commits = 0

    def refuse(request: Request) -> None:
        nonlocal num_commits
        num_commits += COMMIT in request.path
        if COMMIT in request.path and num_commits == 1:
            fault(hub, "POST", COMMIT, 403)  # the next one

    hub.on_request = refuse
    assert "does not allow it" in refused(convert("--scratch-limit", "900KB"), "HubFailed", 4)
    there = {name for name in commits(hub)[-1].files if name.endswith(".safetensors")}
    here = {file.name for file in Path(WORK).glob("*.safetensors")}
    assert there and here and not there & here
    hub.on_request, made = lambda request: None, list[str]()

    def write_shard(file: PlannedFile, number: int, of: Any) -> Any:
        made.append(file.name)
        return written(file, number, of)

    written = run_module._write_shard
    monkeypatch.setattr(run_module, "_write_shard", write_shard)
    sent = [*hub.requests]
    assert convert("--scratch-limit", "900KB").code == 0
    assert made and not {*made} & (there | here)
    oids = {entry.sha256 for name, entry in commits(hub)[0].files.items() if name in there}
    puts = {item.path.removeprefix(PUT)[:64] for item in hub.requests[len(sent) :] if item.method == "PUT"}
    assert puts and not puts & oids
    require_as_pushed(hub, published, source)


# ---- a Hub that changes under one's hands


def test_shard_that_is_another_one_at_the_end_is_a_difference(
    hub: Hub, convert: Convert, published: Path, source: str
) -> None:
    name = "model-00003-of-00012.safetensors"

    def tamper(request: Request) -> None:
        files = hub.repos[REPO].files() if REPO in hub.repos else {}
        if COMMIT in request.path and "dsv4.roundtrip" in files:  # the last one
            files[name] = files["model-00001-of-00012.safetensors"]

    hub.on_request = tamper
    done = convert()
    assert done.code == 1 and f"{name}: differs" in done.out and "NOT the same" in done.out
    hub.on_request = lambda request: None
    sent = hub.sent()
    assert convert().code == 0
    assert hub.sent() == sent  # its bytes are there still
    require_as_pushed(hub, published, source)
    assert os.listdir() == []


@pytest.mark.parametrize("how", ["differs", "missing"])
def test_shard_that_is_lost_before_the_end_is_a_difference_and_no_index_comes(
    hub: Hub, convert: Convert, published: Path, source: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model-00003-of-00012.safetensors"
    finish = relay.finish

    def tampered(goal: relay.Goal, on_sent: Callable[[int], None]) -> Pushed:
        files = hub.repos[REPO].files()
        other = files["model-00001-of-00012.safetensors"]
        del files[name]
        files |= {name: other} if how == "differs" else {}
        return finish(goal, on_sent)

    with monkeypatch.context() as patched:
        patched.setattr(relay, "finish", tampered)
        done = convert()
    assert done.code == 1 and f"{name}: {how}" in done.out
    assert INDEX not in hub.repos[REPO].files()
    assert convert().code == 0
    require_as_pushed(hub, published, source)
    assert os.listdir() == []


# ---- the end


def test_run_that_died_before_its_last_commit_is_ended_though_the_source_moved_on(
    hub: Hub, convert: Convert, published: Path, source: str, tmp_path: Path
) -> None:
    def refuse(request: Request) -> None:
        if COMMIT in request.path and (Path(WORK) / MANIFEST).exists():
            fault(hub, "POST", COMMIT, 403, 1)

    hub.on_request = refuse
    refused(convert(), "HubFailed", 4)
    assert (Path(WORK) / MANIFEST).exists() and INDEX not in hub.repos[REPO].files()
    hub.on_request = lambda request: None
    hub.faults.clear()
    tiny.make_sample("flash", tmp_path / "other", **{**tiny.SMALLEST, "seed": 5})
    assert hub.seed(SRC, tmp_path / "other") != source
    num_fetches, sent = len(hub.fetches), hub.sent()
    assert convert().code == 0
    assert {item.begin for item in hub.fetches[num_fetches:]} == {0}  # headers
    assert len(hub.fetches) - num_fetches == 4 and hub.sent() == sent
    hub.repos[SRC].branches["main"].pop()
    require_as_pushed(hub, published, source)
    assert os.listdir() == []


class Killed(BaseException):
    """As SIGKILL: nobody catches it."""


def test_directory_goes_whenever_the_process_is_killed_while_it_goes(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every single call that removes something."""
    plan_sha256 = json.loads((published / MANIFEST).read_text())["plan_sha256"]
    goal = relay.Goal(cast("WritableRepo", None), str(tmp_path / WORK))
    num_calls = 0
    while True:
        tiny.copy_of(published, tmp_path / WORK)
        (tmp_path / WORK / ".dsv4").mkdir()
        (tmp_path / WORK / ".dsv4" / "journal").touch()
        left = num_calls

        def dying(call: Callable[..., None]) -> Callable[..., None]:
            def remove(*arguments: Any, **named: Any) -> None:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                call(*arguments, **named)

            return remove

        try:
            with monkeypatch.context() as patched:
                patched.setattr("os.unlink", dying(os.unlink))
                patched.setattr("os.rmdir", dying(os.rmdir))
                relay.tidy(goal, plan_sha256)
        except Killed:
            num_calls += 1
            relay.tidy(goal, plan_sha256)
            assert not (tmp_path / WORK).exists(), num_calls
        else:
            break
    assert num_calls > 20 and not (tmp_path / WORK).exists()


def test_run_that_died_while_the_directory_went_is_complete_and_ends_that(
    hub: Hub, convert: Convert, published: Path
) -> None:
    assert convert().code == 0
    Path(WORK).mkdir()
    assert convert().code == 0 and os.listdir() == []
    content = hub.repos[REPO].files()[MANIFEST].content or b""
    Path(WORK).mkdir()
    (Path(WORK) / MANIFEST).write_bytes(content)
    (Path(WORK) / "config.json").write_text("{}")
    assert convert().code == 0 and os.listdir() == []


def test_work_directory_of_somebody_else_stays(
    hub: Hub, convert: Convert, published: Path, tmp_path: Path
) -> None:
    """A finished conversion of another plan, named by mistake."""
    theirs = run("convert", published, tmp_path / "native", "--to", "native", "-q")
    assert theirs.code == 0
    before = hashes(tmp_path / "native")
    refused(convert("--work", tmp_path / "native"), "ForeignOutput", 2)
    assert convert().code == 0
    assert convert("--work", tmp_path / "native").code == 0
    assert hashes(tmp_path / "native") == before


# ---- the card


README = (
    "---\nlicense: mit\nlicense_link: LICENSE\nbase_model: evil/one\ntags:\n- secret\n---\nThe release.\n"
)


def test_card_names_source_commit_and_licence_and_the_download_verifies(
    hub: Hub, convert: Convert, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = tiny.copy_of(published.parent / "flash", tmp_path / "flash")
    (flash / CARD).write_text(README)
    commit = hub.seed(SRC, flash)
    texts: list[str] = []
    require_card = WritableRepo.require_card
    monkeypatch.setattr(
        WritableRepo, "require_card", lambda repo, text: texts.append(text) or require_card(repo, text)
    )
    assert convert().code == 0
    card = card_on_hub(hub)
    head = card.split("---\n")[1].splitlines()
    told = {f"base_model: {SRC}", "base_model_relation: quantized", "license: mit", "license_link: LICENSE"}
    for text in (*texts, card):  # the Hub has judged the same before the first byte
        assert told < {*text.split("---\n")[1].splitlines()}
    assert "- secret" not in head and "The release." not in card
    assert f"\ndsv4 convert hf://{SRC}@{commit} OUT --to bf16 --names deepseek\n" in card
    assert "No value was rounded; 0 are NaN or infinite." in card
    assert "Every shard that was read had the SHA-256 that the Hub publishes" in card
    down = downloaded(hub, tmp_path / "down")
    assert not [line for line in (down / "dsv4.sha256").read_text().splitlines() if CARD in line]
    done = run("verify", down)
    assert done.code == 0 and "README.md is another one" in done.out
    subprocess.run(["sha256sum", "-c", "--strict", "--quiet", "dsv4.sha256"], cwd=down, check=True)
    assert run("verify", f"hf://{REPO}").code == 0


def test_card_of_the_source_is_not_published_and_an_edited_one_is(
    hub: Hub, source: str, published: Path, tmp_path: Path
) -> None:
    flash = tiny.copy_of(published.parent / "flash", tmp_path / "flash")
    (flash / CARD).write_text(README)
    assert run("convert", flash, tmp_path / "bf16", *FLAGS, "-q") == (0, "", "")
    assert (tmp_path / "bf16" / CARD).read_text() == README
    assert run("push", tmp_path / "bf16", REPO).code == 0
    assert "The release." not in card_on_hub(hub) and "\nlicense: mit\n" in card_on_hub(hub)
    hub.repos.pop(REPO)
    tiny.replace(tmp_path / "bf16" / CARD, README.replace("The release.", "Mine."))
    assert run("push", tmp_path / "bf16", REPO).code == 0
    assert card_on_hub(hub).endswith("Mine.\n")
    assert run("verify", tmp_path / "bf16").code == 0


def downloaded(hub: Hub, at: Path) -> Path:
    for name, entry in hub.repos[REPO].files().items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(hub.blobs[entry.sha256] if entry.sha256 else entry.content or b"")
    (at / ".gitattributes").unlink()
    return at
