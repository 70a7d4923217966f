"""argv in, words out: the group `dsv4`, and the one place where errors become exit codes.

Verbs are imported when they are called: --help, inspect and --dry-run must not wait for torch.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import sys
import traceback
import warnings
from typing import NoReturn

import click

from dsv4ckpt import __version__
from dsv4ckpt.errors import EXIT_SIGNAL, EXIT_USAGE, Dsv4Error, Usage

from .common import ending_on_signals, place_in_job
from .words import style

_VERBS = {
    "sample": "Write a small random checkpoint in a released layout.",
    "inspect": "Say what a checkpoint is, and what is wrong with it.",
    "convert": "Convert a checkpoint: streamed, resumable, bit for bit.",
    "reshard": "Write a checkpoint as torch DCP loads it, or a DCP directory as a checkpoint.",
    "finetune": "Train a model by a recipe, from released weights on.",
    "export": "Write what a run has trained as a servable checkpoint.",
    "verify": "Prove that a checkpoint is complete and right.",
    "dump": "Run the model once and write its intermediate tensors.",
    "parity": "Compare two dumps and find the first divergence.",
    "generate": "Let a model continue a text, to see that it speaks.",
    "push": "Publish a finished directory on the Hugging Face Hub.",
}
_ON_MANY_RANKS = {
    "convert",
    "finetune",
    "reshard",
}  # under torchrun; the others would do the same work once for each rank
_OUR_BUG = 70
_SECRETS = re.compile(  # a token of the Hub; what a request is signed with
    r"hf_[A-Za-z0-9]{8,}|(?P<kept>(?:authorization|x-amz-[a-z-]+)[^\w\n]{1,6}(?:(?:bearer|basic)\s+)?|bearer +)"
    r"[^\s\"'\\,;&]+",
    re.IGNORECASE,
)


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in _VERBS:
            return None
        command: click.Command = importlib.import_module(f".{name}", __package__).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"there is no verb {args[0]!r}; the verbs are {', '.join(_VERBS)}", ctx)
        size = place_in_job().size
        if size > 1 and args and args[0] in _VERBS.keys() - _ON_MANY_RANKS:
            raise Usage(
                f"{args[0]} runs in one process, and this is one of {size:,} ranks",
                expected=f"torchrun with {' or '.join(sorted(_ON_MANY_RANKS))}",
                do="start it without torchrun; within a job of other ranks: env -u WORLD_SIZE dsv4 ...",
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Verbs"):
            formatter.write_dl(list(_VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dsv4", message="%(prog)s %(version)s")
def dsv4() -> None:
    """DeepSeek-V4 checkpoints: convert, verify, and prove it.

    \b
    A first round, all on this machine:
      dsv4 sample demo/flash
      dsv4 inspect demo/flash
      dsv4 convert demo/flash demo/bf16 --to bf16
      dsv4 verify demo/flash demo/bf16 --level values
    """


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command and exit with its code. Without `argv` the process is ours, to its end."""
    with ending_on_signals(to_the_last=argv is None):
        _run(sys.argv[1:] if argv is None else argv)


def _run(arguments: list[str]) -> NoReturn:
    # torch says this at import where numpy is not installed; we do without it
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    # and this of every checkpoint that one process saves alone
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    code = _carried_out(arguments)
    if place_in_job().size > 1:
        # threads of the process group may wait for a meeting that never comes, and the interpreter for them; after
        # torch has saved a checkpoint, some of its threads abort the interpreter now and then while it leaves
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _carried_out(arguments: list[str]) -> int:
    """Do what the arguments say. The exit code."""
    try:
        return dsv4.main(args=arguments, prog_name="dsv4", standalone_mode=False) or 0
    except click.ClickException as error:
        told = io.StringIO()
        error.show(told)
        click.echo(_speaker() + _redacted(told.getvalue()), err=True, nl=False)
        return EXIT_USAGE
    except Dsv4Error as error:
        _tell(error, as_json="--json" in arguments)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return EXIT_SIGNAL + 2
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away; nothing is left to say
        return EXIT_SIGNAL + 13
    except Exception as error:  # noqa: BLE001 - the last line: whatever gets here is our bug
        if "-v" in arguments or "--verbose" in arguments:
            click.echo(_placeless(traceback.format_exc()), err=True, nl=False)
        what = f"{_speaker()}dsv4: internal error: {type(error).__name__}: {error}"
        click.echo(_placeless(what), err=True)
        click.echo("    do        please report this; -v prints where it happened", err=True)
        return _OUR_BUG


def _speaker() -> str:
    """Who says it, where it is not the first of several ranks."""
    rank = place_in_job().rank
    return f"rank {rank}: " if rank else ""


def _tell(error: Dsv4Error, *, as_json: bool) -> None:
    kind = type(error).__name__
    headline = f"{_speaker()}{style(kind, sys.stderr, fg='red', bold=True)}"
    click.echo(f"{headline}: {_redacted(str(error))}", err=True)
    if as_json and place_in_job().rank == 0:
        facts = {"what": error.what, **error.facts}
        told = {"class": kind, **{fact: _redacted(text) for fact, text in facts.items()}}
        click.echo(json.dumps({"error": told}, indent=2))


def _redacted(text: str) -> str:
    """A message without what looks like a secret: a name or a value from a file may hold one."""
    return _SECRETS.sub(lambda match: f"{match['kept'] or 'hf_'}[removed]", text)


def _placeless(text: str) -> str:
    """For text that is made to be shown around: no secret, and no directory of this machine."""
    homes = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), *sys.path]
    for place in sorted({home for home in homes if len(home) > 1}, key=len, reverse=True):
        text = text.replace(place + os.sep, "")
    return _redacted(text.replace(os.path.expanduser("~") + os.sep, "~/"))
