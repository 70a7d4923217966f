"""What dsv4 push refuses, and that it does so before the first byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import tiny
from pushing import INDEX, MANIFEST, REPO, Push, commits, nothing_sent, refused, run
from server import READERS_TOKEN, Commit, Hub, Repo

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own


def test_directory_without_manifest_is_refused(hub: Hub, push: Push, directory: Path) -> None:
    (directory / MANIFEST).unlink()
    refused(push(), "MissingFile", 3)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00012.safetensors"])
@pytest.mark.parametrize("how", ["missing", "shorter"])
def test_file_of_another_size_is_refused(hub: Hub, push: Push, directory: Path, name: str, how: str) -> None:
    data = (directory / name).read_bytes()
    (directory / name).unlink()
    if how == "shorter":
        (directory / name).write_bytes(data[:-1])
    assert name in refused(push(), "EditedOutput", 3)
    assert hub.requests == []


def test_small_file_that_was_edited_is_refused(hub: Hub, push: Push, directory: Path) -> None:
    data = (directory / "config.json").read_bytes()
    tiny.replace(directory / "config.json", data.replace(b"0", b"1", 1))
    assert "config.json" in refused(push(), "EditedOutput", 3)
    assert hub.requests == []


def test_shard_with_another_bit_is_never_sent_nor_an_index(hub: Hub, push: Push, directory: Path) -> None:
    shard = sorted(directory.glob("*.safetensors"))[10]  # of the second group
    changed = bytearray(shard.read_bytes())
    changed[-1] ^= 1
    tiny.replace(shard, bytes(changed))
    assert shard.name in refused(push(), "EditedOutput", 3)
    assert hashlib.sha256(changed).hexdigest() not in hub.blobs
    assert len(commits(hub)) == 1 and INDEX not in hub.repos[REPO].files()


def test_link_that_leads_outside_is_refused(hub: Hub, push: Push, directory: Path, tmp_path: Path) -> None:
    (directory / "config.json").rename(tmp_path / "outside.json")
    (directory / "config.json").symlink_to(tmp_path / "outside.json")
    refused(push(), "UnsafePath", 3)
    assert hub.requests == []


def test_no_token_is_told(hub: Hub, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    assert "hf auth login" in refused(push(), "HubFailed", 4)
    assert hub.requests == []


def test_unknown_token_is_told(hub: Hub, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_NobodyKnowsThisOne")
    text = refused(push(), "HubFailed", 4)
    assert "does not know this token" in text and "Nobody" not in text


def test_token_that_may_not_write_is_told_before_anything_is_sent(
    hub: Hub, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO] = Repo(False, {"main": [Commit("0" * 40, "", {})]})
    monkeypatch.setenv("HF_TOKEN", READERS_TOKEN)
    assert "asking for write access: the Hub does not allow it" in refused(push(), "HubFailed", 4)
    assert nothing_sent(hub) and hub.count("POST", "/preupload/") == 0


def test_private_repository_of_somebody_else_is_not_there(
    hub: Hub, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO] = Repo(True, {"main": [Commit("0" * 40, "", {})]})
    monkeypatch.setenv("HF_TOKEN", READERS_TOKEN)
    refused(push("--create-pr"), "HubFailed", 4)
    assert nothing_sent(hub)


def test_pull_request_on_a_branch_is_refused(push: Push) -> None:
    refused(push("--create-pr", "--revision", "x"), "Usage", 2)


@pytest.mark.parametrize("name", ["model", "a/b/c", "a b/c", "../x"])
def test_repository_has_an_owner_and_a_plain_name(hub: Hub, directory: Path, name: str) -> None:
    refused(run("push", directory, name), "Usage", 2)
    assert hub.requests == []
