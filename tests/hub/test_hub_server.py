"""The Hub on this machine, asked by the unpatched client: what a push leaves can be listed, fetched, read in ranges."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session
from pushing import REPO, Push
from server import Commit, Fault, Hub, Repo

SHARD = "model-00001-of-00012.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own


def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint)


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
