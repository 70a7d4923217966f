"""docs/errors.md: every class of error once, provoked for real, as the command prints it.

    python tests/cli/test_errors_page.py --write        makes the page anew

Owns the page's words and one way into each error.  A class without a way in, a message that differs from the page's,
and one that does not say what to do fail a test.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import io
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

if __name__ == "__main__":  # pytest's conftest.py does this for tests
    sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import tiny
import torch
from dsv4cli import convert as convert_verb
from dsv4cli import main as cli

from dsv4ckpt import errors, outdir
from dsv4ckpt.errors import Dsv4Error
from dsv4ckpt.stop import StopFlag
from dsv4model.corpus import BadLine
from dsv4model.dsml import BadCompletion
from dsv4model.runs import BadRun
from dsv4model.tokenizer import BadTokenizer
from dsv4model.trusted import BadEncoding

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "errors.md"
BASES = {Dsv4Error}  # nobody raises these
WQ_A = "layers.0.attn.wq_a"
EXPERT = "layers.0.ffn.experts.0.w1"
TO_BF16 = "convert flash out --to bf16"
BACK = "convert bf16 out --to native"

Way = Callable[[Path, contextlib.ExitStack], str]
WAYS: dict[type[Dsv4Error], Way] = {}


def provokes(kind: type[Dsv4Error]) -> Callable[[Way], Way]:
    """A way into one class of error: prepares a folder with `flash` and `bf16` in it, returns the command."""

    def keep(way: Way) -> Way:
        assert kind not in WAYS
        WAYS[kind] = way
        return way

    return keep


# ---- breaking one thing


def changed(checkpoint: Path, tensor: str, change: Callable[[bytearray], None]) -> None:
    """Change the bytes of one tensor."""

    def edit(tensors: dict[str, tiny.Tensor]) -> None:
        data = bytearray(tensors[tensor].data)  # type: ignore[arg-type]
        change(data)
        tensors[tensor] = tensors[tensor]._replace(data=bytes(data))

    tiny.edit_shard(tiny.shard_of(checkpoint, tensor), edit)


def without(checkpoint: Path, tensor: str) -> None:
    """Take a tensor out of its shard and the index."""
    tiny.edit_shard(tiny.shard_of(checkpoint, tensor), lambda tensors: tensors.pop(tensor))
    tiny.edit_weight_map(checkpoint, lambda weight_map: weight_map.pop(tensor))


def nudged(data: bytearray) -> None:
    """Every BF16 value up or down by a hundredth of their size."""
    values = torch.frombuffer(data, dtype=torch.bfloat16)
    signs = 1.0 - 2.0 * (torch.arange(values.numel()) % 2)
    wide = values.double()
    values.copy_((wide + 0.01 * wide.square().mean().sqrt() * signs).to(torch.bfloat16))


def set_byte(data: bytearray, value: int) -> None:
    data[0] = value


# ---- one way into each


@provokes(errors.Usage)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    return "convert flash out --to nvfp4 --names transformers"


@provokes(errors.ForeignOutput)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    (at / "out").mkdir()
    (at / "out" / "thesis.txt").touch()
    return TO_BF16


@provokes(errors.BadHeader)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    shard = tiny.shard_of(at / "flash", f"{EXPERT}.weight")
    tiny.replace(shard, shard.read_bytes()[:-1000])
    return TO_BF16


@provokes(errors.BadDcp)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    (at / "dcp").mkdir()
    (at / "dcp" / ".metadata").write_bytes(b"\x80\x04cos\nsystem\n(X\x04\0\0\0exittR.")
    return "reshard dcp out --to safetensors --like flash"


@provokes(errors.Diverged)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    (at / "ids.jsonl").write_text('{"input_ids": [7, 8, 9, 10]}\n')
    (at / "recipe.toml").write_text(
        '[model]\nsource = "flash"\n[train]\nrun = "run"\nsteps = 5\nrows = 1\n'
        '[data]\nfiles = ["ids.jsonl"]\nkind = "tokens"\nlength = 64\n'
    )
    return "finetune recipe.toml optimizer.lr=1e30 -q"


@provokes(errors.BadIndex)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    wrong = tiny.shard_of(at / "flash", "embed.weight").name
    tiny.edit_weight_map(at / "flash", lambda weight_map: weight_map.update({f"{EXPERT}.weight": wrong}))
    return TO_BF16


@provokes(errors.BadConfig)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    tiny.edit_json(at / "flash" / tiny.CONFIG, lambda config: config.update(num_hidden_layers="one"))
    return TO_BF16


@provokes(errors.UnsafePath)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    outside = "../../somebody/model.safetensors"
    tiny.edit_weight_map(at / "flash", lambda weight_map: weight_map.update({"embed.weight": outside}))
    return TO_BF16


@provokes(errors.MissingFile)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    tiny.shard_of(at / "flash", "embed.weight").unlink()
    return TO_BF16


@provokes(errors.UnknownRelease)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    def retag(tensors: dict[str, tiny.Tensor]) -> None:
        for name, tensor in tensors.items():
            if ".experts." in name and tensor.dtype == "I8":
                tensors[name] = tensor._replace(dtype="BOOL")

    tiny.edit_shard(tiny.shard_of(at / "flash", f"{EXPERT}.weight"), retag)
    return TO_BF16


@provokes(errors.NotConform)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    without(at / "flash", "norm.weight")
    return TO_BF16


@provokes(errors.MissingScale)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    without(at / "flash", f"{WQ_A}.scale")
    return TO_BF16


@provokes(errors.OrphanScale)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    without(at / "flash", f"{WQ_A}.weight")
    return TO_BF16


@provokes(errors.NotFinite)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    changed(at / "flash", f"{WQ_A}.scale", lambda data: set_byte(data, 255))
    return TO_BF16


@provokes(errors.SourceChanged)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    shard = tiny.shard_of(at / "flash", "embed.weight")

    def meanwhile(*_: object, **__: object) -> None:  # called between reading the headers and the data
        tiny.replace(shard, shard.read_bytes() + b"more")

    stack.enter_context(mock.patch.object(convert_verb, "_say_plan", meanwhile))
    return TO_BF16


@provokes(errors.BadSidecar)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    sidecar = at / "bf16" / "dsv4.roundtrip"
    tiny.replace(sidecar, sidecar.read_bytes().replace(b"roundtrip 1", b"roundtrip 9", 1))
    return BACK


@provokes(errors.NotLossless)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    changed(at / "flash", f"{EXPERT}.scale", lambda data: set_byte(data, 90))
    return "convert flash out --to fp8"


@provokes(errors.EditedOutput)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    changed(at / "bf16", f"{EXPERT}.weight", nudged)
    return BACK


@provokes(errors.VanishingChange)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    changed(at / "bf16", f"{EXPERT}.weight", nudged)
    (at / "bf16" / "dsv4.manifest.json").unlink()
    return BACK + " --source flash"


@provokes(errors.BadManifest)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    manifest = at / "bf16" / "dsv4.manifest.json"
    tiny.edit_json(manifest, lambda document: document["files"][0].update(size="large"))
    return "verify bf16"


@provokes(errors.Environment)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    (at / "notes.txt").touch()
    return "convert flash notes.txt/out --to bf16"


@provokes(errors.NoSpace)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    stack.enter_context(mock.patch.object(outdir, "free_bytes", lambda path: 5_000_000))
    return TO_BF16


@provokes(errors.Busy)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    (at / "out" / ".dsv4").mkdir(parents=True)
    held = stack.enter_context((at / "out" / ".dsv4" / "lock").open("w"))
    fcntl.flock(held, fcntl.LOCK_EX)
    print("process 4711 on node-3", end="", file=held, flush=True)
    return TO_BF16


@provokes(errors.HubFailed)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    stack.enter_context(mock.patch("huggingface_hub.get_token", lambda: None))
    return "push bf16 me/flash-bf16"


@provokes(errors.Interrupted)
def _(at: Path, stack: contextlib.ExitStack) -> str:
    stop = StopFlag()
    stop.signal_number = 15
    stack.enter_context(mock.patch.object(convert_verb, "StopFlag", lambda: stop))
    return TO_BF16


# ---- what the command says


class Told(NamedTuple):
    """What a user sees."""

    kind: type[Dsv4Error]
    command: str
    exit_code: int
    text: str

    @property
    def facts(self) -> dict[str, str]:
        """file, expected, found, do."""
        lines = [line.split(maxsplit=1) for line in self.text.splitlines()[1:]]
        return dict(lines)


class Said(NamedTuple):
    """What a command did."""

    exit_code: int
    out: str
    err: str


def said(command: str) -> Said:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            cli.main(shlex.split(command))
        except SystemExit as ended:
            return Said(int(ended.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main returned")


def provoked(kind: type[Dsv4Error], made: Path, at: Path, flags: str = "") -> tuple[str, Said]:
    """Go the way into an error in a folder of its own: the command, and what it said."""
    for name in ("flash", "bf16"):
        tiny.copy_of(made / name, at / name)
    with contextlib.ExitStack() as stack, contextlib.chdir(at):
        command = WAYS[kind](at, stack)
        return command, said(f"{command} {flags}")


def told_of(kind: type[Dsv4Error], made: Path, at: Path) -> Told:
    command, done = provoked(kind, made, at)
    return Told(kind, command, done.exit_code, done.err)


def make(directory: Path) -> Path:
    """A release of one layer and its conversion."""
    directory.mkdir()
    with contextlib.chdir(directory):
        sizes = "--layers 1 --hidden 128 --intermediate 32 --experts 6 --heads 2"
        assert said(f"sample flash {sizes} -q") == (0, "", "")
        assert said("convert flash bf16 --to bf16 -q") == (0, "", "")
    return directory


def family() -> list[type[Dsv4Error]]:
    """Every class that can be raised, as errors.py has them."""
    classes = [item for item in vars(errors).values() if isinstance(item, type)]
    return [item for item in classes if issubclass(item, Dsv4Error) and item not in BASES]


# ---- the page

HEAD = """\
# Errors

Every class of error that `dsv4` can end with: what it means, and a real message. Tests provoke each of them and compare
this page with what the command printed; `python tests/cli/test_errors_page.py --write` makes it.

A message names its class and says in a sentence what is wrong. Below stand the facts that are known:

- `file`: where, relative to the checkpoint or the output directory (`.` is the directory itself);
- `expected` and `found`: what should be there, and what is;
- `do`: what to do next. Several ways are separated by `;` or `or`.

Names and values that come from a file stand in quotes, with escapes for what a terminal would obey; what looks like a
token is removed. Errors go to stderr. With `--json` the same facts are also one document on stdout:
`{"error": {"class": ..., "what": ..., "file": ..., "expected": ..., "found": ..., "do": ...}}`, without those that are
not known.

## Exit codes, for scripts

| code | what happened | what a script does |
|---|---|---|
| 0 | done; for `inspect` and `verify` also: all is well | go on |
| 1 | `verify`, `parity` or `push` found a difference | do not use the checkpoint; the report names tensors or files |
| 2 | the command cannot be carried out as it was put | correct it: trying again does not help |
| 3 | the checkpoint is incomplete, broken, hostile, or would lose values | replace it: trying again does not help |
| 4 | the machine or the Hub did not let us: space, permission, I/O | repair, then the same command: it continues |
| 5 | training met a loss or a gradient that is not finite | look at data and learning rate; checkpoints are untouched |
| 70 | a mistake of our own | report it; `-v` prints where it happened |
| 75 | another process is writing this output | wait, or do nothing: it is being done |
| 130, 143 | stopped by SIGINT or SIGTERM | give the same command again: it continues |
| 141 | the reader of a pipe went away | nothing |

Files under their final names are complete whatever the code is, and `dsv4.manifest.json` is there only if all of them
are.
"""

TITLES = {
    errors.EXIT_USAGE: "the command",
    errors.EXIT_BAD_INPUT: "the input",
    errors.EXIT_ENVIRONMENT: "the machine",
    errors.EXIT_DIVERGED: "the training",
    errors.EXIT_BUSY: "somebody else",
    errors.EXIT_SIGNAL + 15: "a signal (here SIGTERM; 130 for SIGINT)",
}
TEXT_HEAD = """\
## Exit 3: text and runs

What `generate`, `dump --text`, the chat encoding and `finetune` refuse; `tests/model` provokes each of them.
"""
LEAVES_NOTHING = " Nothing of the output stays, since no later run could finish it."


def page(all_told: list[Told]) -> str:
    """docs/errors.md."""
    lines = [HEAD]
    for code in sorted({told.exit_code for told in all_told}):
        lines.append(f"## Exit {code}: {TITLES[code]}\n")
        for told in all_told:
            if told.exit_code == code:
                lines += section(told)
    lines.append(TEXT_HEAD)
    for kind in (BadTokenizer, BadEncoding, BadCompletion, BadLine, BadRun):
        lines.append(f"- **{kind.__name__}**: {kind.__doc__}")
    return "\n".join(lines) + "\n"


def section(told: Told) -> Iterator[str]:
    meaning = " ".join((told.kind.__doc__ or "").split())
    parent = told.kind.__bases__[0]
    of = "" if parent in BASES else f" (a kind of {parent.__name__})"
    yield f"### {told.kind.__name__}{of}\n"
    yield meaning + (LEAVES_NOTHING if told.kind.leaves_nothing else "") + "\n"
    yield f"```console\n$ dsv4 {told.command}\n{told.text}```\n"


def write() -> None:
    """Make the page anew."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        made = make(Path(name) / "made")
        told = [told_of(kind, made, Path(name) / kind.__name__) for kind in family()]
    PAGE.write_text(page(told), encoding="utf-8")


# ---- tests


@pytest.fixture(scope="module")
def all_told(tmp_path_factory: pytest.TempPathFactory) -> dict[type[Dsv4Error], Told]:
    directory = tmp_path_factory.mktemp("errors")
    made = make(directory / "made")
    return {kind: told_of(kind, made, directory / kind.__name__) for kind in WAYS}


def test_every_class_of_the_family_has_a_way_in() -> None:
    assert [kind.__name__ for kind in family() if kind not in WAYS] == []


@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.__name__)
def test_error_is_of_its_class_and_exits_with_its_code(
    kind: type[Dsv4Error], all_told: dict[type[Dsv4Error], Told]
) -> None:
    told = all_told[kind]
    assert told.text.startswith(f"{kind.__name__}: "), told.text
    assert told.exit_code == (errors.EXIT_SIGNAL + 15 if kind is errors.Interrupted else kind.exit_code)


@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.__name__)
def test_error_says_what_is_wrong_where_or_how_and_what_to_do(
    kind: type[Dsv4Error], all_told: dict[type[Dsv4Error], Told]
) -> None:
    told = all_told[kind]
    facts = told.facts
    assert facts.keys() <= {"file", "expected", "found", "do"}
    assert "do" in facts
    assert facts.keys() & {"file", "expected", "found"} or kind is errors.Interrupted


@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.__name__)
def test_error_names_no_directory_of_the_machine(
    kind: type[Dsv4Error], all_told: dict[type[Dsv4Error], Told], tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = all_told[kind].text
    assert str(tmp_path_factory.getbasetemp()) not in text
    assert not [word for word in text.split() if word.strip("'\"(").startswith("/")]


def test_page_is_what_the_command_says(all_told: dict[type[Dsv4Error], Told]) -> None:
    assert PAGE.read_text(encoding="utf-8") == page([all_told[kind] for kind in family()])


def raised_without_advice(file: Path) -> list[str]:
    names = {kind.__name__ for kind in family()} - {"Interrupted"}  # has its own
    return [
        f"{file.name}:{node.lineno}: {ast.unparse(node)[:100]}"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
        if not {"do", None} & {keyword.arg for keyword in node.keywords}
        and not (node.func.id == "Usage" and "expected" in {keyword.arg for keyword in node.keywords})
    ]


@pytest.mark.parametrize("folder", ["dsv4ckpt", "cli"])
def test_no_error_is_raised_without_saying_what_to_do(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert [text for file in files for text in raised_without_advice(file)] == []


def test_an_error_without_advice_is_found(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        "raise BadIndex('no', file='x')\nraise BadIndex('no', do='this')\nraise Usage('no', **facts)\n"
    )
    assert len(raised_without_advice(file)) == 1


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(__doc__)
    write()
