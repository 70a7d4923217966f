"""No token, and no signed address, in anything that is said, written or sent: of all verbs that speak with the Hub."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from dsv4cli.main import dsv4
from pushing import COMMIT, PUT, REPO, Done, Verbs, fault, run
from server import OWNERS_TOKEN, READERS_TOKEN, SIGNATURE, Hub, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own
]

SRC = "lab/flash"
SECRETS = (OWNERS_TOKEN, READERS_TOKEN, SIGNATURE)
FLAGS = ("--to", "bf16", "--max-shard-size", "150KB", "--scratch-limit", "1MB")
STATUSES = (401, 403, 500)
PLACES = (  # method and address of what fails, in the order in which a verb comes there
    ("GET", "/api/models/"),
    ("HEAD", "/resolve/"),
    ("GET", PUT),
    ("POST", "/validate-yaml"),
    ("POST", "/objects/batch"),
    ("PUT", PUT),
    ("POST", COMMIT),
)


def commands(published: Path, at: Path) -> tuple[tuple[object, ...], ...]:
    """Each with places of its own, so that none goes on with what another one has begun."""
    flash, to_hub = published.parent / "flash", (f"hf://{REPO}", *FLAGS, "--work")
    return (
        ("inspect", f"hf://{SRC}"),
        ("convert", f"hf://{SRC}", at / "down", *FLAGS),
        ("convert", flash, *to_hub, at / "one"),
        ("convert", f"hf://{SRC}", *to_hub, at / "both"),
        ("verify", f"hf://{SRC}"),
        ("verify", flash, f"hf://{SRC}", "--level", "values"),
        ("push", published, REPO),
    )


def require_clean(hub: Hub, home: Path, done: Done) -> None:
    """Nothing said, no file here, no file, blob or title on the Hub."""
    written = [file for file in home.rglob("*") if file.is_file()]
    sent = [*hub.blobs.values()]
    for repo in hub.repos.values():
        for commit in (commit for branch in repo.branches.values() for commit in branch):
            sent += [commit.title.encode(), *(item.content or b"" for item in commit.files.values())]
    for data in (done.out.encode(), done.err.encode(), *(file.read_bytes() for file in written), *sent):
        for secret in SECRETS:
            assert secret.encode() not in data, data[:2000]


def fail(hub: Hub, method: str, path: str, status: int) -> None:
    """Forever; and the server repeats what it was sent, and says where a request came to."""
    said = f"Bearer {OWNERS_TOKEN}, {READERS_TOKEN} at {hub.storage('x')}"
    fault(hub, method, path, status, 9999, **{"X-Error-Message": said})


def test_no_verb_says_writes_or_sends_a_token(
    hub: Hub, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv4ckpt.hub._asked_wait", lambda error, otherwise: 0.0)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.seed(SRC, published.parent / "flash")
    home, said, kept = tmp_path / "here", list[Done](), dict(hub.blobs)
    for number, place in enumerate((*PLACES, None)):
        if place is None:
            monkeypatch.setenv("HF_TOKEN", READERS_TOKEN)
        for turn, words in enumerate(commands(published, home / str(number))):
            hub.repos.pop(REPO, None)
            hub.blobs = dict(kept)
            hub.faults.clear()
            if place is not None:
                fail(hub, *place, STATUSES[(number + turn) % len(STATUSES)])
            done = run(*words, "-v")
            assert done.code in (0, 4), done
            require_clean(hub, tmp_path, done)
            said.append(done)
    assert {done.code for done in said} == {0, 4}
    told = "".join(done.err for done in said)
    for words in ("HubFailed: ", " 401: ", " 403: ", " 500: ", "Bearer [removed]", "X-Amz-Signature=[rem"):
        assert words in told, words


def test_processes_of_their_own_say_write_and_send_no_token(published: Path, tmp_path: Path) -> None:
    with serving(part_bytes=120_000) as hub:
        hub.seed(SRC, published.parent / "flash")
        verbs = Verbs(hub, tmp_path)
        for place in (None, ("POST", COMMIT, 403)):
            if place:
                hub.repos.pop(REPO)
                fail(hub, *place)
            for words in commands(published, tmp_path / str(place)):
                done = verbs(*words, "-v", "--json")
                assert done.code == (4 if place and REPO in f"{words}" else 0), done
                require_clean(hub, tmp_path, done)
        verbs.close()


def test_no_option_takes_a_token_and_one_that_is_given_is_not_repeated(tmp_path: Path) -> None:
    context = click.Context(dsv4)
    for verb in dsv4.list_commands(context):
        command = dsv4.get_command(context, verb)
        assert command is not None
        for option in command.params:
            assert not any(re.search("(token|auth|login|password|key)$", name) for name in option.opts), verb
        for words in (
            ("--token", OWNERS_TOKEN),
            (f"--token={OWNERS_TOKEN}",),
            (f"--hf-token={READERS_TOKEN}",),
        ):
            done = run(verb, *words)
            assert done.code == 2 and not [secret for secret in SECRETS if secret in done.out + done.err]
