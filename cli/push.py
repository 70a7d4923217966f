"""dsv4 push: a finished directory onto the Hugging Face Hub."""

from __future__ import annotations

import click

from dsv4ckpt import push as pushing
from dsv4ckpt.errors import EXIT_DIFFERENT, EXIT_OK, Usage
from dsv4ckpt.push import Pushed, PushPlan

from .common import common_options, dry_run_option
from .progress import Progress
from .words import Console, human, plural

_SHOWN = 10  # names; --json lists all


@click.command("push")
@click.argument("directory", type=click.Path())
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository a private one; one that is there must be.")
@click.option("--create-pr", is_flag=True, help="Open a pull request, or go on with the one that is open.")
@click.option(
    "--revision",
    metavar="BRANCH",
    help="Push to this branch; it is made if it is not there.  [default: main]",
)
@click.option(
    "--card",
    "card_path",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="The model card.  [default: README.md of DIRECTORY; else that of REPO; else one made from the manifest]",
)
@dry_run_option
@common_options
def command(
    directory: str,
    repo: str,
    private: bool,
    create_pr: bool,
    revision: str | None,
    card_path: str | None,
    dry_run: bool,
    console: Console,
) -> int:
    """Publish DIRECTORY, which dsv4 convert or dsv4 export has written, as the model REPO (owner/name).

    What the manifest names is sent, and nothing else, after its bytes were compared with the manifest. Write access and
    model card are checked before the first byte. What the Hub has is not sent again: stop it at any time, and the same
    command goes on. At last the id of every file on the Hub is compared with the manifest; exits with 1 if one differs.

    The token is the one that huggingface_hub finds: hf auth login, or HF_TOKEN. --dry-run asks nobody, and shows the
    card.

    \b
    Examples:
      dsv4 push flash-bf16 me/DeepSeek-V4-Flash-BF16 --dry-run
      dsv4 push flash-bf16 me/DeepSeek-V4-Flash-BF16 --private
      dsv4 push tuned me/tuned --card card.md --revision epoch-2
      dsv4 push restored some-team/model --create-pr
    """
    if create_pr and revision is not None:
        raise Usage("a pull request is a branch of its own", do="leave out --revision or --create-pr")
    plan = pushing.plan_push(directory, repo, card_path)
    document = {
        "directory": directory,
        "repo": repo,
        "bytes": plan.num_bytes,
        "files_to_publish": [file.name for file in plan.files],
        "left_here": [*plan.strays],
        "card": plan.card.decode(),
    }
    _say_plan(plan, directory, console)
    if dry_run:
        console.say()
        console.say(plan.card.decode())
        console.say("nothing was sent: this was a dry run")
        console.document(document)
        return EXIT_OK
    from dsv4ckpt.hub_writer import WritableRepo  # brings the client

    hub = WritableRepo(repo)
    user = hub.user()
    hub.require_card(plan.card.decode())
    was_made = hub.create(private=private)
    if create_pr:
        number = hub.take_pull_request(f"dsv4 push {plan.plan_sha256[:12]}", user)
    else:
        hub.require_write()
        if revision not in (None, "main"):
            hub.take_branch(str(revision))
    kind = "new" if was_made else "there already"
    where = f"pull request {number}" if create_pr else f"branch {hub.revision}"
    console.say(f"  to        {repo}, {kind}, {where}, as {user}")
    with Progress("push", quiet=console.quiet) as progress:
        pushed = pushing.push(plan, hub, _follow(progress, console))
    _say_result(pushed, console)
    document |= {
        "ok": pushed.ok,
        "revision": hub.revision,
        "files": [file._asdict() for file in pushed.files],
        "others_on_the_hub": [*pushed.others],
        "sent": pushed.num_sent,
        "sent_bytes": pushed.sent_bytes,
        "kept_card": pushed.kept_card,
    }
    console.document(document)
    console.say(f"ok: {hub.endpoint}/{repo}" if pushed.ok else "NOT the same", bold=True)
    return EXIT_OK if pushed.ok else EXIT_DIFFERENT


def _say_plan(plan: PushPlan, directory: str, console: Console) -> None:
    files = f"{plural(len(plan.files) + 1, 'file')}, {human(plan.num_bytes)}"
    console.say(f"{directory}: {files}, in {plural(len(plan.groups) + 1, 'commit')} at most", bold=True)
    console.say(f"  card      {plan.card_from}")
    if plan.strays:
        console.say(f"  not sent  {_few(plan.strays)}: the manifest does not name them")


def _follow(progress: Progress, console: Console) -> pushing.OnEvent:
    def on_event(event: pushing.Event) -> None:
        if isinstance(event, pushing.Started):
            progress.start(event.total_bytes, event.present_bytes)
            if event.present_bytes:
                console.say(f"  there     {human(event.present_bytes)} are on the Hub already")
        elif isinstance(event, pushing.Sent):
            progress.advance(event.num_bytes)
        else:
            console.say(f"  committed {_few(event.names)}")

    return on_event


def _say_result(pushed: Pushed, console: Console) -> None:
    for file in [file for file in pushed.files if file.verdict != "ok"][:_SHOWN]:
        console.say(
            f"  {file.name}: {file.verdict}, expected {file.expected}, found {file.found or 'nothing'}"
        )
    good = sum(file.verdict == "ok" for file in pushed.files)
    console.say(f"  sent      {plural(pushed.num_sent, 'file')}, {human(pushed.sent_bytes)}")
    console.say(
        f"  compared  {good} of {plural(len(pushed.files), 'file')} on the Hub have the manifest's SHA-256"
    )
    if pushed.kept_card:
        console.say("  card      that of the Hub was kept; --card FILE replaces it")
    if pushed.others:
        console.say(f"  also on the Hub, and not of this directory: {_few(pushed.others)}")


def _few(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
