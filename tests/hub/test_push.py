"""dsv4 push against a Hub on this machine: what is there afterwards, what was sent, and what a user is told.

The oracles are the server's own record, and hashes of the directory's files.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import tiny
from pushing import (
    CARD,
    COMMIT,
    INDEX,
    MANIFEST,
    PUT,
    REPO,
    Push,
    card_on_hub,
    commits,
    fault,
    hashes,
    nothing_sent,
    on_hub,
    refused,
)  # fmt: skip
from server import MAX_REGULAR_BYTES, OWNER, READERS_TOKEN, SIGNATURE, Commit, Hub, Repo, entry_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own
]


# ---- what arrives


def test_hub_holds_exactly_what_the_manifest_names(hub: Hub, push: Push, directory: Path) -> None:
    (directory / "thesis.txt").write_text("not yours")
    (directory / "stray.safetensors").write_bytes(b"")
    (directory / "more").mkdir()
    (directory / "more" / "notes.md").write_text("private")
    expected = hashes(directory)
    for stray in ("thesis.txt", "stray.safetensors", "more/notes.md"):
        del expected[stray]
    done = push()
    assert (done.code, done.err) == (0, "")
    assert on_hub(hub) == expected
    assert "not sent  stray.safetensors, thesis.txt, more/notes.md" in done.out
    assert f"compared  {len(expected) + 1} of {len(expected) + 1} files" in done.out


def test_shards_go_in_groups_and_the_index_last(hub: Hub, push: Push) -> None:
    assert push().code == 0
    seen: set[str] = {".gitattributes"}
    added = []
    for commit in commits(hub):
        added.append(sorted(commit.files.keys() - seen))
        seen |= commit.files.keys()
    assert [len(names) for names in added[:-1]] == [8, 5]
    assert all(
        name.endswith(".safetensors") or name == "dsv4.roundtrip" for group in added[:-1] for name in group
    )
    assert {INDEX, "config.json", MANIFEST, CARD} <= {*added[-1]}


def test_second_push_sends_nothing_and_reads_no_shard(hub: Hub, push: Push, directory: Path) -> None:
    assert push().code == 0
    sent, count = hub.sent(), len(commits(hub))
    shard = next(directory.glob("*.safetensors"))
    tiny.replace(shard, bytes(shard.stat().st_size))  # would be refused if anybody read it
    assert push().code == 0
    assert (hub.sent(), len(commits(hub))) == (sent, count)


def test_shard_that_changed_is_sent_alone_and_the_index_is_gone_meanwhile(
    hub: Hub, push: Push, directory: Path
) -> None:
    assert push().code == 0
    before, sent = len(commits(hub)), hub.sent()
    shard = sorted(directory.glob("*.safetensors"))[10]
    changed = bytearray(shard.read_bytes())
    changed[-1] ^= 1
    tiny.replace(shard, bytes(changed))
    digest = hashlib.sha256(changed).hexdigest()

    def relist(document: dict[str, list[dict[str, str]]]) -> None:
        next(row for row in document["files"] if row["file"] == shard.name)["sha256"] = digest

    tiny.edit_json(directory / MANIFEST, relist)
    assert push().code == 0
    assert hub.sent() - sent == len(changed)
    first, last = commits(hub)[before:]
    assert INDEX not in first.files and INDEX in last.files
    assert on_hub(hub) == hashes(directory)


def test_json_tells_what_was_published(hub: Hub, push: Push, directory: Path) -> None:
    done = push("--json")
    document = json.loads(done.out)
    assert document["ok"] and document["revision"] == "main" and not document["kept_card"]
    assert {row["name"]: row["expected"] for row in document["files"] if row["name"] != CARD} == hashes(
        directory
    )
    assert {row["verdict"] for row in document["files"]} == {"ok"}
    assert document["sent"] == len(document["files"])
    assert document["sent_bytes"] == document["bytes"]


def test_dry_run_asks_nobody_and_shows_the_card(hub: Hub, push: Push) -> None:
    done = push("--dry-run")
    assert done.code == 0 and "base_model: deepseek-ai/DeepSeek-V4-Flash\n" in done.out
    assert hub.requests == []


# ---- where it arrives


def test_private_repository_is_private(hub: Hub, push: Push) -> None:
    assert push("--private").code == 0
    assert hub.repos[REPO].private


def test_private_push_to_a_public_repository_is_refused(hub: Hub, push: Push) -> None:
    hub.repos[REPO] = Repo(False, {"main": [Commit("0" * 40, "", {})]})
    assert "public" in refused(push("--private"), "Usage", 2)
    assert nothing_sent(hub)


def test_revision_is_a_branch_and_main_stays(hub: Hub, push: Push, directory: Path) -> None:
    assert push("--revision", "v2/try").code == 0
    assert on_hub(hub, "v2/try") == hashes(directory)
    assert on_hub(hub) == {}


def test_pull_request_is_opened_once(hub: Hub, push: Push, directory: Path) -> None:
    hub.repos[REPO] = Repo(False, {"main": [Commit("0" * 40, "", {})]})
    fault(hub, "POST", COMMIT, 403)
    refused(push("--create-pr"), "HubFailed", 4)
    assert push("--create-pr").code == 0
    assert len(hub.repos[REPO].requests) == 1
    assert on_hub(hub, "refs/pr/1") == hashes(directory)
    assert on_hub(hub) == {}


def test_pull_request_needs_no_write_access(
    hub: Hub, push: Push, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO] = Repo(False, {"main": [Commit("0" * 40, "", {})]})
    monkeypatch.setenv("HF_TOKEN", READERS_TOKEN)
    assert push("--create-pr").code == 0
    assert on_hub(hub, "refs/pr/1") == hashes(directory)


# ---- the card


def test_card_is_made_from_the_manifest(hub: Hub, push: Push) -> None:
    assert push().code == 0
    card = card_on_hub(hub)
    head = card.split("---\n")[1].splitlines()
    assert {"base_model: deepseek-ai/DeepSeek-V4-Flash", "base_model_relation: quantized", "- bf16"} <= {
        *head
    }
    assert "dsv4 convert DeepSeek-V4-Flash OUT --to bf16 --names deepseek\n" in card
    assert "hf download tester/model --local-dir model\n" in card


def test_card_of_a_fine_tuned_model_says_so(hub: Hub, push: Push, directory: Path) -> None:
    def retell(document: dict[str, list[dict[str, str]]]) -> None:
        document["source"] = [{**document["source"][0], "file": "model in memory"}]

    tiny.edit_json(directory / MANIFEST, retell)
    assert push().code == 0
    assert "\nbase_model_relation: finetune\n" in card_on_hub(hub)


@pytest.mark.parametrize("release", ["flash\nlicense: mit", {"flash": 1}])
def test_manifest_of_a_stranger_adds_nothing_to_the_cards_head(
    hub: Hub, push: Push, directory: Path, release: object
) -> None:
    def retell(document: dict[str, object]) -> None:
        document["release"] = release
        document["tool"] = "`x`\n---\n# Owned"
        document["options"] = {"to": "bf16\n- x", "layers": None}

    tiny.edit_json(directory / MANIFEST, retell)
    assert push().code == 0
    card = card_on_hub(hub)
    assert "base_model" not in card and not re.search("^(license|# Owned|- x)", card, re.MULTILINE)


def test_readme_of_the_directory_is_the_card(hub: Hub, push: Push, directory: Path) -> None:
    (directory / CARD).write_text("---\nlicense: mit\n---\nMine\n")
    assert push().code == 0
    assert card_on_hub(hub) == "---\nlicense: mit\n---\nMine\n"


def test_card_that_was_edited_on_the_hub_is_kept_unless_another_one_is_named(
    hub: Hub, push: Push, tmp_path: Path
) -> None:
    assert push().code == 0
    hub.repos[REPO].files()[CARD] = entry_of(b"---\nlicense: mit\n---\nBetter\n")
    done = push()
    assert done.code == 0 and "that of the Hub was kept" in done.out
    assert card_on_hub(hub).endswith("Better\n")
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\nBest\n")
    assert push("--card", tmp_path / "card.md").code == 0
    assert card_on_hub(hub).endswith("Best\n")


def test_card_that_the_hub_refuses_stops_before_anything_is_made(
    hub: Hub, push: Push, tmp_path: Path
) -> None:
    (tmp_path / "card.md").write_text("no metadata")
    assert "the metadata is no YAML" in refused(push("--card", tmp_path / "card.md"), "Usage", 2)
    assert hub.repos == {}


# ---- faults


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/repos/create"), ("POST", COMMIT), ("GET", "/auth-check/")],
)
@pytest.mark.parametrize("status", [429, 503])
def test_fault_that_passes_is_overcome(
    hub: Hub, push: Push, directory: Path, method: str, path: str, status: int
) -> None:
    fault(hub, method, path, status, count=3)
    assert push("-q") == (0, "", "")
    assert on_hub(hub) == hashes(directory)


@pytest.mark.parametrize("what", [500, "drop"])
def test_fault_of_the_storage_is_overcome_by_the_client(
    hub: Hub, push: Push, directory: Path, what: int | str
) -> None:
    fault(hub, "PUT", PUT, what)
    assert push("-q") == (0, "", "")
    assert on_hub(hub) == hashes(directory)


@pytest.mark.parametrize("status", [409, 412])
def test_commit_that_came_second_is_made_again(hub: Hub, push: Push, directory: Path, status: int) -> None:
    fault(hub, "POST", COMMIT, status, count=2)
    assert push().code == 0
    assert on_hub(hub) == hashes(directory)


def test_commit_whose_answer_got_lost_is_not_made_twice(hub: Hub, push: Push, directory: Path) -> None:
    fault(hub, "POST", COMMIT, "mute")
    assert push().code == 0
    assert len(commits(hub)) == 3
    assert on_hub(hub) == hashes(directory)


@pytest.mark.parametrize(("status", "words"), [(429, "too many requests"), (500, "fails again and again")])
def test_fault_that_does_not_pass_ends_after_six_attempts(
    hub: Hub, push: Push, status: int, words: str
) -> None:
    fault(hub, "POST", COMMIT, status, count=1000)
    assert words in refused(push(), "HubFailed", 4)
    assert hub.count("POST", COMMIT) == 6
    hub.faults.clear()
    sent = hub.sent()
    assert push().code == 0
    again = hub.sent() - sent
    assert again < sum(len(blob) for blob in hub.blobs.values()) - sent + 1  # what is there is not sent again


@pytest.mark.parametrize("status", [400, 403, 404, 413])
def test_refusal_is_final(hub: Hub, push: Push, status: int) -> None:
    fault(hub, "POST", COMMIT, status, count=1000)
    assert str(status) in refused(push(), "HubFailed", 4)
    assert hub.count("POST", COMMIT) == 1


def test_truncated_upload_never_becomes_a_file(hub: Hub, push: Push, directory: Path) -> None:
    fault(hub, "PUT", PUT, "truncate")
    refused(push(), "HubFailed", 4)
    assert commits(hub) == []
    assert push().code == 0
    assert on_hub(hub) == hashes(directory)


def test_wrong_id_on_the_hub_is_found_and_is_a_difference(hub: Hub, push: Push) -> None:
    fault(hub, "POST", COMMIT, "wrong sha")
    done = push("--json")
    assert done.code == 1
    document = json.loads(done.out)
    assert not document["ok"]
    (row,) = [row for row in document["files"] if row["verdict"] != "ok"]
    assert row["found"] == "0" * 64 and row["verdict"] == "differs"
    assert "NOT the same" in done.err


@pytest.mark.parametrize("path", ["/whoami", "/auth-check/", PUT, COMMIT])
def test_neither_token_nor_signed_address_is_said(
    hub: Hub, push: Push, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if a server repeats the token, in a form that is not told by hf_."""
    secret = "Zq7-secret-of-tests"
    monkeypatch.setattr("server.OWNERS_TOKEN", secret)
    monkeypatch.setenv("HF_TOKEN", secret)
    method = {PUT: "PUT", COMMIT: "POST"}.get(path, "GET")
    fault(hub, method, path, 400, **{"X-Error-Message": f"no: Bearer {secret}, or {secret}"})
    done = push("-v", "--json")
    assert done.code == 4
    assert secret not in done.out + done.err and SIGNATURE not in done.out + done.err


def test_the_samples_need_both_kinds_of_storage(published: Path) -> None:
    """Else the tests above would say less than they seem to."""
    sizes = [file.stat().st_size for file in published.glob("*.safetensors")]
    assert min(sizes) < 120_000 < max(sizes)
    assert (published / "config.json").stat().st_size < MAX_REGULAR_BYTES
    assert f"{OWNER}/model" == REPO
