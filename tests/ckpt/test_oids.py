"""Ids of the Hub: four forms of one list, right directories and directories with one thing wrong, hostile lists.

The oracles are `git hash-object` and `sha256sum`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from dsv4cli import main as cli
from tiny import CONFIG, EMBED, INDEX

from dsv4ckpt import formats, oids, verify
from dsv4ckpt.errors import BadManifest, Interrupted, MissingFile, UnsafePath, Usage
from dsv4ckpt.oids import Published, read_list, verify_oids

Ids = dict[str, str]
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git computes the blob ids")


def output(*command: str, cwd: Path) -> str:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def names(flash: Path) -> list[str]:
    return sorted(str(file.relative_to(flash)) for file in flash.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def blobs(flash: Path, names: list[str]) -> Ids:
    return dict(
        zip(names, output("git", "hash-object", "--no-filters", *names, cwd=flash).split(), strict=True)
    )


@pytest.fixture(scope="module")
def sha256s(flash: Path, names: list[str]) -> Ids:
    lines = output("sha256sum", *names, cwd=flash).splitlines()
    return {name: line[:64] for name, line in zip(names, lines, strict=True)}


def is_lfs(name: str) -> bool:
    return name.endswith(".safetensors")


@pytest.fixture
def tree(flash: Path, names: list[str], blobs: Ids, sha256s: Ids) -> list[dict[str, Any]]:
    """What the tree route answers: shards as LFS files, everything else as git blobs."""
    rows: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "inference"}]
    for name in names:
        size = (flash / name).stat().st_size
        row: dict[str, Any] = {"type": "file", "oid": blobs[name], "size": size, "path": name}
        if is_lfs(name):
            row |= {
                "oid": "1" * 40,
                "lfs": {"oid": sha256s[name], "size": size, "pointerSize": 135},
                "xetHash": "x",
            }
        rows.append(row)
    return rows


def as_siblings(tree: list[dict[str, Any]], blob_key: str) -> dict[str, Any]:
    """The same as model info."""
    siblings: list[dict[str, Any]] = []
    for row in tree[1:]:
        lfs = row.get("lfs")
        told = {"rfilename": row["path"], "size": row["size"], blob_key: row["oid"]}
        if lfs or blob_key == "blob_id":  # huggingface_hub's dataclass says None
            told["lfs"] = lfs and {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 135}
        siblings.append(told)
    return {"id": "deepseek-ai/x", "downloads": -1, "cardData": {"score": 0.5}, "siblings": siblings}


def written(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def published(tmp_path: Path, content: Any) -> tuple[Published, ...]:
    return read_list(written(tmp_path / "oids", content))


def wrong(report: oids.OidsReport) -> dict[str, str]:
    return {file.name: file.verdict for file in report.files if file.verdict != "ok"}


# ---- the four forms


@needs_git
def test_every_form_tells_the_same(
    tree: list[dict[str, Any]], names: list[str], sha256s: Ids, flash: Path, tmp_path: Path
) -> None:
    of_tree = published(tmp_path, tree)
    assert [file.name for file in of_tree] == names
    assert {file.name: file.sha256 for file in of_tree if file.sha256} == {
        name: digest for name, digest in sha256s.items() if is_lfs(name)
    }
    assert all(file.size == (flash / file.name).stat().st_size for file in of_tree)
    for row in tree:
        if "lfs" in row:
            row["lfs"]["oid"] = "sha256:" + row["lfs"]["oid"]
    assert published(tmp_path, tree) == of_tree
    for row in tree:
        if "lfs" in row:
            row["lfs"]["oid"] = row["lfs"]["oid"].removeprefix("sha256:")
    assert published(tmp_path, as_siblings(tree, "blobId")) == of_tree
    assert published(tmp_path, as_siblings(tree, "blob_id")) == of_tree


@pytest.mark.parametrize("form", ["{}  {}", "{} *{}", "{} * {}", "{} - {}", "{}  ./{}"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_sha256sum_and_of_git_lfs_tell_names_and_digests(
    form: str, end: str, sha256s: Ids, tmp_path: Path
) -> None:
    text = end.join(form.format(digest, name) for name, digest in sha256s.items()) + end
    assert published(tmp_path, text) == tuple(
        Published(name, None, digest) for name, digest in sha256s.items()
    )


@pytest.mark.parametrize("name", ["- x", "* x", "two  words", "-x"])
def test_names_that_look_like_markers_are_names_in_sha256sum_lines(name: str, tmp_path: Path) -> None:
    assert published(tmp_path, f"{'a' * 64}  {name}\n")[0].name == name


# ---- directories


@needs_git
@pytest.mark.parametrize("blob_key", [None, "blobId"])
def test_a_release_has_all_its_ids(
    blob_key: str | None, tree: list[dict[str, Any]], names: list[str], flash: Path, tmp_path: Path
) -> None:
    content = as_siblings(tree, blob_key) if blob_key else tree
    report = verify_oids(str(flash), published(tmp_path, content))
    assert report.ok and [file.name for file in report.files] == names
    assert report.num_bytes == sum((flash / name).stat().st_size for name in names)
    assert json.loads(json.dumps(report.document()))["ok"] is True


@pytest.mark.slow
@needs_git
def test_a_flipped_bit_is_found_in_every_file(
    tree: list[dict[str, Any]], names: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    ids = published(tmp_path, tree)
    for name in names:
        data = bytearray((checkpoint / name).read_bytes())
        data[-1] ^= 1
        tiny.replace(checkpoint / name, bytes(data))
        report = verify_oids(str(checkpoint), ids)
        assert wrong(report) == {name: "differs"} and not report.ok
        data[-1] ^= 1
        tiny.replace(checkpoint / name, bytes(data))
    assert verify_oids(str(checkpoint), ids).ok


@needs_git
def test_another_size_is_told_without_hashing(
    tree: list[dict[str, Any]], checkpoint: Path, tmp_path: Path
) -> None:
    size = (checkpoint / EMBED).stat().st_size
    tiny.replace(checkpoint / EMBED, (checkpoint / EMBED).read_bytes()[:-1])
    report = verify_oids(str(checkpoint), published(tmp_path, tree))
    (found,) = (file for file in report.files if file.verdict != "ok")
    assert found == verify.FileVerdict(EMBED, "differs", f"{size:,} bytes", f"{size - 1:,} bytes")
    assert report.num_bytes == sum(row["size"] for row in tree if row["path"] != EMBED)


@needs_git
@pytest.mark.parametrize("name", [EMBED, INDEX, CONFIG])
def test_a_listed_file_that_no_checkpoint_can_be_without_is_missing(
    name: str, tree: list[dict[str, Any]], checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / name).unlink()
    report = verify_oids(str(checkpoint), published(tmp_path, tree))
    assert wrong(report) == {name: "missing"} and not report.ok


@needs_git
def test_other_listed_files_may_be_absent_and_ours_and_others_unlisted(
    tree: list[dict[str, Any]], checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("assets/figure.png", ".gitattributes"):
        tree.append({"type": "file", "oid": "2" * 40, "size": 5, "path": name})
    (checkpoint / "LICENSE").unlink()
    for name in (*formats.OUR_NAMES, "notes.txt"):
        (checkpoint / name).write_text("no manifest is believed")
    report = verify_oids(str(checkpoint), published(tmp_path, tree))
    assert report.ok and report.not_here == ("LICENSE", "assets/figure.png", ".gitattributes")


@needs_git
def test_a_shard_that_the_list_does_not_know_is_a_difference(
    tree: list[dict[str, Any]], checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "stray\x1b.safetensors").write_text("")
    report = verify_oids(str(checkpoint), published(tmp_path, tree))
    assert (report.ok, wrong(report), report.unlisted) == (False, {}, ("stray\\x1b.safetensors",))


def test_a_list_of_which_nothing_is_here_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    report = verify_oids(str(tmp_path / "empty"), published(tmp_path, f"{'a' * 64}  LICENSE\n"))
    assert (report.ok, report.files, report.not_here) == (False, (), ("LICENSE",))


def test_a_directory_that_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        verify_oids(str(tmp_path / "nowhere"), published(tmp_path, f"{'a' * 64}  LICENSE\n"))


def test_an_empty_file_has_the_well_known_ids(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "empty.txt").write_text("")
    blob = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    rows = [{"type": "file", "path": "empty.txt", "size": 0, "oid": blob}]
    for content in (rows, f"{sha256}  empty.txt\n"):
        assert verify_oids(str(tmp_path / "dir"), published(tmp_path, content)).ok


def test_subsets_cover_every_listed_file_once(sha256s: Ids, flash: Path, tmp_path: Path) -> None:
    ids = published(tmp_path, "".join(f"{digest}  {name}\n" for name, digest in sha256s.items()))
    parts = [verify_oids(str(flash), ids, subset=(number, 3)) for number in (1, 2, 3)]
    assert all(part.ok for part in parts), "shards of other parts are listed, too"
    assert sorted(file.name for part in parts for file in part.files) == sorted(sha256s)
    with pytest.raises(Usage):
        verify_oids(str(flash), ids, subset=(4, 3))


def test_events_add_up_and_a_stop_flag_ends_it(sha256s: Ids, flash: Path, tmp_path: Path) -> None:
    ids = published(tmp_path, "".join(f"{digest}  {name}\n" for name, digest in sha256s.items()))
    events: list[verify.Event] = []
    verify_oids(str(flash), ids, on_event=events.append)
    assert isinstance(events[0], verify.Started)
    assert events[0].total_bytes == sum(e.num_bytes for e in events[1:] if isinstance(e, verify.Read))

    class Stopped:
        def check(self) -> None:
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        verify_oids(str(flash), ids, stop=Stopped())


def test_files_of_a_hub_cache_are_read_through_their_links_and_no_others(
    sha256s: Ids, flash: Path, tmp_path: Path
) -> None:
    ids = published(tmp_path, "".join(f"{digest}  {name}\n" for name, digest in sha256s.items()))
    cache = tmp_path / "models--x"
    snapshot = tiny.copy_of(flash, cache / "snapshots" / "main")
    (cache / "blobs").mkdir()
    os.rename(snapshot / EMBED, cache / "blobs" / "aa")
    (snapshot / EMBED).symlink_to(cache / "blobs" / "aa")
    assert verify_oids(str(snapshot), ids).ok
    os.rename(cache / "blobs" / "aa", tmp_path / "aa")
    (snapshot / EMBED).unlink()
    (snapshot / EMBED).symlink_to(tmp_path / "aa")
    with pytest.raises(UnsafePath):
        verify_oids(str(snapshot), ids)
    assert verify_oids(str(snapshot), ids, follow_links=True).ok


# ---- hostile and malformed lists

HOSTILE = [
    "../x",
    "/etc/passwd",
    "a/../../x",
    ".",
    "..",
    "a//b",
    "a\x1bb",
    "a\x00b",
    "b/",
    "..\\x",
    "x" * 600,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_in_every_form(name: str, tmp_path: Path) -> None:
    row = {"type": "file", "path": name, "size": 1, "oid": "0" * 40}
    lines = [form.format("a" * 64, name) for form in ("{}  {}", "{} * {}")]
    for content in (*lines, [row], {"siblings": [{"rfilename": name, "size": 1, "blobId": "0" * 40}]}):
        with pytest.raises(UnsafePath, match="plain relative") as raised:
            published(tmp_path, content)
        assert tiny.is_plain(str(raised.value))


GOOD = {"type": "file", "path": "config.json", "size": 3, "oid": "0" * 40}
LFS = {"oid": "a" * 64, "size": 3}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n\n",
        "[]",
        "{}",
        "[1]",
        "[null]",
        "{",
        '[{"type": "file", "type": "file"}]',
        "[" * 100_000,
        f"{'a' * 63}  x\n",
        f"{'A' * 64}  x\n",
        f"{'a' * 10} * x\n",
        f"{'a' * 64}\n",
        f"{'a' * 64} x\n",
        f"{'a' * 64}   \n",
        f"{'a' * 64}  x\n{'b' * 64}  x\n",
        {"siblings": 1},
        {"siblings": [{"rfilename": "config.json"}]},  # model info without files_metadata
        {"siblings": [{"rfilename": "config.json", "size": None, "blobId": None}]},
        [{**GOOD, "type": "link"}],
        [{**GOOD, "path": 7}],
        [{**GOOD, "size": -1}],
        [{**GOOD, "size": True}],
        [{**GOOD, "size": 3.0}],
        [{**GOOD, "size": 2**63}],
        [{**GOOD, "oid": "0" * 39}],
        [{**GOOD, "oid": None}],
        [{**GOOD, "lfs": []}],
        [{**GOOD, "lfs": {}}],
        [{**GOOD, "lfs": {**LFS, "oid": "0" * 40}}],
        [{**GOOD, "lfs": {**LFS, "oid": "sha1:" + "a" * 64}}],
        [{**GOOD, "lfs": {**LFS, "size": 4}}],
        [GOOD, GOOD],
    ],
)
def test_malformed_lists_are_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(BadManifest) as raised:
        published(tmp_path, content)
    assert raised.value.exit_code == 3
    assert raised.value.facts["file"] == "oids" and "--help" in raised.value.facts["do"]


def test_lists_that_are_no_text_or_too_large_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "oids").write_bytes(b"\xff" * 70)
    with pytest.raises(BadManifest, match="malformed"):
        read_list(str(tmp_path / "oids"))
    monkeypatch.setattr(formats, "MAX_INDEX_BYTES", 60)
    with pytest.raises(BadManifest, match="too large"):
        read_list(str(tmp_path / "oids"))


# ---- the command


@functools.cache
def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "100"}


def dsv4(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsv4cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


@pytest.mark.slow
def test_command_counts_matches_and_exits_1_for_a_mismatch(
    sha256s: Ids, checkpoint: Path, tmp_path: Path
) -> None:
    ids = written(tmp_path / "oids.txt", "".join(f"{digest}  {name}\n" for name, digest in sha256s.items()))
    done = dsv4("verify", checkpoint, "--against-hub-oids", ids)
    assert done.returncode == 0, done.stderr
    assert f"{len(sha256s)} of {len(sha256s)} files have the published id" in done.stdout
    tiny.replace(checkpoint / CONFIG, "{}")
    (checkpoint / "LICENSE").unlink()
    done = dsv4("verify", checkpoint, "--against-hub-oids", ids)
    assert done.returncode == 1
    assert f"{CONFIG}: differs, expected {sha256s[CONFIG]}, found 44136fa355b3678a" in done.stdout
    assert "not here  LICENSE" in done.stdout and "NOT the same" in done.stdout
    document = json.loads(dsv4("verify", checkpoint, "--against-hub-oids", ids, "--json").stdout)
    assert document["ok"] is False and document["oids"]["not_here"] == ["LICENSE"]


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["A", "A", "--against-hub-oids", "IDS"], 2, "leave out B"),
        (["A", "--against-hub-oids", "IDS", "--level", "bytes"], 2, "leave out B"),
        (["A", "--against-hub-oids", "IDS", "--tensor", "x"], 2, "leave out B"),
        (["A", "--against-hub-oids", "NOWHERE"], 2, "does not exist"),
        (["A", "--against-hub-oids", "A"], 2, "is a directory"),
        (["NOWHERE", "--against-hub-oids", "IDS"], 3, "no such directory"),
        (["A", "--against-hub-oids", "BAD"], 3, "malformed in line 1"),
    ],
)
def test_command_used_wrongly_says_how(
    arguments: list[str],
    code: int,
    word: str,
    flash: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {
        "A": str(flash),
        "IDS": written(tmp_path / "ids", f"{'a' * 64}  {CONFIG}\n"),
        "BAD": written(tmp_path / "bad", "nonsense\n"),
        "NOWHERE": str(tmp_path / "nowhere"),
    }
    with pytest.raises(SystemExit) as raised:
        cli.main(["verify", *(places.get(item, item) for item in arguments)])
    assert raised.value.code == code
    assert word in capsys.readouterr().err


def test_command_reads_nothing_outside_the_directory_and_the_list(
    sha256s: Ids, flash: Path, tmp_path: Path
) -> None:
    ids = written(tmp_path / "ids", "".join(f"{digest}  {name}\n" for name, digest in sha256s.items()))
    with tiny.recorded_opens() as opened:
        assert verify_oids(str(flash), read_list(ids)).ok
    assert len(opened) > len(sha256s) and not tiny.outside(opened, flash, tmp_path)


def example_of_the_help() -> str:
    """The Python of the help's example, as a shell would hand it over."""
    context = cli.dsv4.make_context("dsv4", ["verify"], resilient_parsing=True)
    text = cli.dsv4.get_command(context, "verify").help or ""  # type: ignore[union-attr]
    return text.partition('python -c "')[2].partition('" > ')[0].replace("\\\n", "")


def test_python_of_the_help_makes_a_list_that_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    told = {"siblings": [{"rfilename": "a", "size": 3, "blobId": "0" * 40},
                         {"rfilename": "b", "size": 9, "blobId": "1" * 40,
                          "lfs": {"sha256": "c" * 64, "size": 9, "pointerSize": 130}}]}  # fmt: skip
    info: Callable[..., Any] = lambda *_, **__: hub.ModelInfo(id="x/y", **told)  # noqa: E731
    monkeypatch.setattr(hub.HfApi, "model_info", info)
    exec(example_of_the_help(), {})
    expected = (Published("a", 3, None, "0" * 40), Published("b", 9, "c" * 64))
    assert published(tmp_path, capsys.readouterr().out) == expected
