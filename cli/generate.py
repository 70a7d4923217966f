"""dsv4 generate: greedy or sampled text of a checkpoint, for a look at what it says."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import click

from dsv4ckpt import hub, inventory
from dsv4ckpt.errors import EXIT_OK, Usage

from .common import common_options, follow_links_option
from .prompts import read_ids, read_text
from .words import Console, plural

if TYPE_CHECKING:
    from dsv4ckpt.survey import Survey
    from dsv4model.config import Config
    from dsv4model.model import Model
    from dsv4model.tokenizer import Tokenizer

_CHAT_ONLY = {
    "thinking": "--thinking",
    "system": "--system",
    "trust_encoding": "--trust-encoding",
}  # fields of _Options: flags


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What argv says."""

    ckpt: str
    text: str | None  # of text, text_path and ids_path there is one
    text_path: str | None
    ids_path: str | None
    chat: bool
    thinking: bool
    system: str | None
    trust_encoding: bool
    max_new_tokens: int
    temperature: float  # 0: greedy
    top_p: float
    seed: int
    dtype: str
    experts: Literal["dense", "packed"]
    device: str
    follow_links: bool


@click.command("generate")
@click.argument("ckpt", type=click.Path())
@click.option("--text", metavar="TEXT", help="The prompt. The begin token is put before it.")
@click.option(
    "--file", "text_path", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
    help="The prompt is all that stands in this file of UTF-8 text, its last line end included.",
)  # fmt: skip
@click.option(
    "--ids", "ids_path", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
    help="The prompt as token ids, begin token included: a JSON list, or plain text with blanks between the ids.",
)  # fmt: skip
@click.option(
    "--chat", is_flag=True, help="The prompt is a user's message, and the assistant's turn follows."
)
@click.option("--thinking", is_flag=True, help="With --chat: the assistant begins with its reasoning.")
@click.option("--system", metavar="TEXT", help="With --chat: a system message before the user's.")
@click.option(
    "--trust-encoding", is_flag=True,
    help="With --chat: run the encoding file of CKPT for the prompt. It is a program: it can do what you can.",
)  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True,
    help="0: always the likeliest token. Above: draw tokens, the more evenly the higher it is.",
)  # fmt: skip
@click.option(
    "--top-p", type=float, default=1.0, show_default=True,
    help="Draw only among the likeliest tokens that together have this probability.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True,
    help="Equal seeds draw equal tokens.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True,
    help="What the model computes in.",
)  # fmt: skip
@click.option(
    "--experts", type=click.Choice(["dense", "packed"]), default="dense", show_default=True,
    help="packed: quantized matrices stay as they are stored, and the model takes the memory of its files.",
)  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@follow_links_option
@common_options
def command(console: Console, **given: Any) -> int:
    """Let the model of CKPT continue a text, and show what it says as it comes.

    CKPT is a DeepSeek-V4 checkpoint in any storage format and either namespace; the whole model must fit into memory.
    This is a check that a checkpoint speaks, not a server: one sequence, one token at a time. It ends at the end token.
    Without --chat the text is continued as it stands. The text goes to stdout, everything else to stderr.

    \b
    Examples:
      dsv4 generate demo/flash --text 'The capital of France is'
      dsv4 generate demo/flash --text 'Why is the sky blue?' --chat --thinking --max-new-tokens 500
      dsv4 generate demo/flash --file story.txt --temperature 0.8 --top-p 0.95 --seed 7
      dsv4 generate demo/flash --ids ids.json --dtype float32 --json | jq .ids
    """
    options = _Options(**given)
    _require_one_meaning(options)
    from dsv4model.dumps import as_dtype
    from dsv4model.generate import device_of, require_possible
    from dsv4model.loading import load, surveyed
    from dsv4model.tokenizer import Tokenizer

    device = device_of(options.device)
    found, config = surveyed(options.ckpt, follow_links=options.follow_links)
    tokenizer = Tokenizer.open(found.checkpoint.small_directory, follow_links=options.follow_links)
    prompt = _prompt(options, tokenizer)
    require_possible(config, prompt, options.max_new_tokens, options.temperature, options.top_p)
    _tell(f"{found.identity.release.name}, stored as {found.identity.storage}", console)
    model = load(found, as_dtype(options.dtype), options.experts, device)
    for note in _notes(options, found, model):
        _tell(f"  note      {note}", console)
    _generate(options, prompt, model, config, tokenizer, console)
    return EXIT_OK


def _tell(text: str, console: Console) -> None:
    """Facts go to stderr, always: stdout is for what the model says."""
    if not console.quiet:
        click.echo(text, err=True)


def _require_one_meaning(options: _Options) -> None:
    """raises Usage for flags that do not go together"""
    sources = (options.text, options.text_path, options.ids_path)
    if sum(source is not None for source in sources) != 1:
        raise Usage(
            "one prompt is continued",
            expected="one of --text TEXT, --file FILE and --ids FILE",
            do="give one of them",
        )
    if options.chat and options.ids_path is not None:
        raise Usage(
            "--chat makes a message of a text, and --ids is a prompt of token ids already",
            expected="--chat with --text or --file",
            do="leave out one of the two",
        )
    for field, flag in _CHAT_ONLY.items():
        if getattr(options, field) not in (None, False) and not options.chat:
            raise Usage(f"{flag} is about conversations", expected=f"--chat {flag}", do="add --chat")


# ---- the prompt


def _prompt(options: _Options, tokenizer: Tokenizer) -> list[int]:
    """Token ids that the model goes on from. raises Usage and its kin, BadEncoding"""
    if options.ids_path is not None:
        return _one_row(read_ids(options.ids_path))
    text = options.text if options.text_path is None else read_text(options.text_path)
    if not text:
        raise Usage(
            "the prompt is empty",
            expected="at least one character",
            do="give a text; for the begin token alone, give its id by --ids",
        )
    if options.chat:
        return tokenizer.encode(_conversation(options, text))
    ids = tokenizer.encode(text)
    return ids if ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


def _conversation(options: _Options, text: str) -> str:
    """A user's message, ready for the assistant's turn."""
    from dsv4model import chat, trusted

    messages: list[chat.Message] = [{"role": "user", "content": text}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    mode = "thinking" if options.thinking else "chat"
    if options.trust_encoding:
        if options.ckpt.startswith(hub.PREFIX):
            raise Usage(
                "--trust-encoding runs code that lies on this machine, and none from elsewhere",
                do="download the checkpoint, read its encoding/, then name the directory",
            )
        return trusted.load(options.ckpt, follow_links=options.follow_links).encode(messages, mode)
    return chat.encode(messages, mode)


def _one_row(rows: list[list[int]]) -> list[int]:
    if len(rows) != 1:
        raise Usage("one sequence is continued", found=f"{len(rows)} lists of ids", do="give one of them")
    return rows[0]


# ---- what comes


def _notes(options: _Options, found: Survey, model: Model) -> list[str]:
    notes = list(model.notes)
    if found.identity.release.family is inventory.DSPARK and model.unused:
        notes.append(
            f"{plural(len(model.unused), 'tensor')} of DSpark's stages are not used: they only speed up"
        )
    if options.chat and found.identity.release.family.base:
        notes.append("this is a base model: it has not learned conversations")
    return notes


def _generate(
    options: _Options, prompt: list[int], model: Model, config: Config, tokenizer: Tokenizer, console: Console
) -> None:
    """Text to stdout as it comes, or the whole as a document; facts at the end."""
    from dsv4model.generate import TextStream, generate, seeded

    stop_ids = {config.eos, tokenizer.eos}
    stream = TextStream(tokenizer.decode)
    ids: list[int] = []
    parts: list[str] = []

    def show(text: str) -> None:
        parts.append(text)
        if text and not console.as_json:
            click.echo(_shown(text).encode(), nl=False)

    began = first = time.monotonic()
    for token in generate(
        model, prompt, max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p,
        generator=seeded(options.seed), num_tokens=tokenizer.num_tokens, stop_ids=stop_ids,
    ):  # fmt: skip
        first = time.monotonic() if not ids else first
        ids.append(token)
        if token not in stop_ids:
            show(stream.push(token))
    show(stream.close())
    ended = time.monotonic()
    stop = "end token" if ids[-1] in stop_ids else "max new tokens"
    if not console.as_json:
        click.echo()
    rate = f", {(len(ids) - 1) / (ended - first):.1f} tokens/s" if len(ids) > 1 else ""
    _tell(f"  prompt    {plural(len(prompt), 'token')} in {first - began:.2f} s", console)
    _tell(f"  new       {plural(len(ids), 'token')}{rate}; ended by {stop}", console)
    console.document(
        {
            "text": "".join(parts),
            "stop": stop,
            "ids": ids,
            "prompt_ids": prompt,
            "num_prompt_tokens": len(prompt),
            "num_new_tokens": len(ids),
        }
    )


def _shown(text: str) -> str:
    """On a terminal, what is neither a character nor a line end is escaped: a model may say anything."""
    if not sys.stdout.isatty() or text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
