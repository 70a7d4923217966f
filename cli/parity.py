"""dsv4 parity: two dumps side by side, and where they part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from dsv4ckpt.errors import EXIT_DIFFERENT, EXIT_OK, Usage, printable

from .common import common_options
from .progress import Progress
from .words import Console, plural, table

if TYPE_CHECKING:
    from dsv4model.dumps import Dump
    from dsv4model.parity import Row, Tolerance

_SHOWN = 20  # names that only one dump has; --json lists all


class _Bound(click.ParamType[float]):
    """A number from 0 on."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            self.fail(f"{value!r} is no number from 0 on: write it like 2e-5", param, ctx)
        return number


@click.command("parity")
@click.argument("a", type=click.Path(), metavar="DIR_A")
@click.argument("b", type=click.Path(), metavar="DIR_B")
@click.option("--atol", type=_Bound(), default=2e-5, show_default=True, help="See above.")
@click.option("--rtol", type=_Bound(), default=5e-6, show_default=True, help="See above.")
@click.option(
    "--max-ulp", type=click.IntRange(0), default=0, show_default=True, metavar="N",
    help="Let a value pass also if it is at most N steps away, in the coarser dtype of both.",
)  # fmt: skip
@common_options
def command(a: str, b: str, atol: float, rtol: float, max_ulp: int, console: Console) -> int:
    """Compare two dumps tensor by tensor, in the order of execution, and name the first divergence.

    A value passes if |a - b| <= atol + rtol * largest, where largest is the largest |value| in its row (the last axis);
    or by --max-ulp. Whole numbers (picks, router ids) must be equal; rows that differ are counted. NaN never passes.
    Tensors that only one dump has are listed, and no failure. The defaults fit two float32 passes of a few layers;
    for bfloat16 begin with --rtol 0.05, and look at the cosines.

    Exits with 0 if everything passes, with 1 if not, with 3 if a dump is damaged.

    \b
    Examples:
      dsv4 parity ours theirs
      dsv4 parity ours theirs --atol 0 --rtol 0 --max-ulp 4
      dsv4 parity ours theirs --json | jq .first_divergence
    """
    from dsv4model.dumps import open_dump
    from dsv4model.parity import Tolerance, aligned, first_divergence, require_comparable

    tolerance = Tolerance(atol=atol, rtol=rtol, max_ulp=max_ulp)
    with ExitStack() as stack:
        dump_a, dump_b = (stack.enter_context(open_dump(path)) for path in (a, b))
        _require_same_ids(dump_a, dump_b)
        require_comparable(dump_a.looks, dump_b.looks)
        common, only_a, only_b = aligned(dump_a, dump_b)
        _say_head((dump_a, dump_b), tolerance, console)
        rows = list(_rows(dump_a, dump_b, common, tolerance, console))
        abouts = (dump_a.about, dump_b.about)
    first = first_divergence(rows)
    console.say(table([_HEAD, *map(_cells, rows)]) + "\n")
    for side, names in (("A", only_a), ("B", only_b)):
        if names:
            more = f", ... and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
            shown = ", ".join(map(printable, names[:_SHOWN]))
            console.say(f"only in {side}, not compared: {plural(len(names), 'tensor')}: {shown}{more}")
    _say_result(rows, first, console)
    console.document(
        {
            "within": first is None,
            "first_divergence": first.name if first else None,
            "tolerance": {"atol": atol, "rtol": rtol, "max_ulp": max_ulp},
            "a": _about(abouts[0]),
            "b": _about(abouts[1]),
            "only_in_a": only_a,
            "only_in_b": only_b,
            "tensors": [_row_document(row) for row in rows],
        }
    )
    return EXIT_OK if first is None else EXIT_DIFFERENT


def _require_same_ids(a: Dump, b: Dump) -> None:
    if a.about.ids_sha256 != b.about.ids_sha256:
        told = [
            "{} x {} ids, SHA-256 {}...".format(*d.about.ids_shape, d.about.ids_sha256[:16]) for d in (a, b)
        ]
        raise Usage(
            "the dumps are of different token ids: nothing in them is comparable",
            expected=told[0],
            found=told[1],
            do="dump both with the same --ids",
        )


def _rows(a: Dump, b: Dump, common: list[str], tolerance: Tolerance, console: Console) -> Iterator[Row]:
    from dsv4model.parity import compare

    with Progress("parity", quiet=console.quiet) as progress:
        progress.start(sum(a.size_of(name) + b.size_of(name) for name in common))
        for row in compare(a, b, tolerance):
            yield row
            progress.advance(a.size_of(row.name) + b.size_of(row.name))


# ---- words

_HEAD = ("tensor", "shape", "cosine", "max abs", "max rel", "max ulp", "verdict")


def _say_head(dumps: tuple[Dump, Dump], tolerance: Tolerance, console: Console) -> None:
    for side, dump in zip("AB", dumps, strict=True):
        about = dump.about
        of = f", of {printable(about.checkpoint.get('release', 'a checkpoint'))}" if about.checkpoint else ""
        console.say(f"{side}: {printable(about.impl)}, {printable(about.dtype)}{of}", bold=True)
    shape = " x ".join(map(str, dumps[0].about.ids_shape))
    ulp = f", or {tolerance.max_ulp} ulp" if tolerance.max_ulp else ""
    console.say(f"  tokens     {shape}")
    console.say(f"  tolerance  {tolerance.atol:g} + {tolerance.rtol:g} x the largest of the row{ulp}")
    a, b = (dump.about.checkpoint for dump in dumps)
    if a and b and a != b:
        console.say("  note       the checkpoints are not the same files")
    console.say()


def _cells(row: Row) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    if row.cosine is None:
        return (printable(row.name), shape, "", "", "", "", _verdict(row))
    return (
        printable(row.name),
        shape,
        f"{row.cosine:.9f}",
        f"{row.max_abs:.2e}",
        f"{row.max_rel:.2e}",
        f"{row.max_ulp:,}",
        _verdict(row),
    )


def _verdict(row: Row) -> str:
    if not row.num_over:
        return row.verdict
    return f"{row.verdict}: {row.num_over:,} of {plural(row.num_in_all, _unit(row))}"


def _unit(row: Row) -> str:
    return "row" if row.cosine is None else "value"


def _which(row: Row) -> str:
    """Of those that do not pass, the one that is shown."""
    return "the worst" if row.verdict == "DIFFERS" and row.cosine is not None else "the first"


def _say_result(rows: list[Row], first: Row | None, console: Console) -> None:
    if first is None:
        equal = sum(row.verdict == "equal" for row in rows)
        console.say(
            f"within the tolerance: all {plural(len(rows), 'tensor')}, {equal:,} of them equal", bold=True
        )
        return
    before = rows.index(first)
    after = [row for row in rows[before + 1 :] if row.num_over]
    console.say(f"first divergence: {printable(first.name)}", bold=True)
    console.say(f"  {_verdict(first)}; {_which(first)} at {list(first.at or ())}")
    for side, value in zip("AB", first.values or (), strict=False):
        console.say(f"  {side}  {value}")
    console.say(
        f"  {plural(before, 'tensor')} before it within the tolerance; "
        f"{len(after):,} of the {len(rows) - before - 1:,} after it are not"
    )


# ---- JSON


def _about(about: Any) -> dict[str, Any]:
    return {
        "impl": about.impl,
        "dtype": about.dtype,
        "ids": {"shape": list(about.ids_shape), "sha256": about.ids_sha256},
        "checkpoint": about.checkpoint,
    }


def _row_document(row: Row) -> dict[str, Any]:
    """Figures that are no finite number (NaN, infinity) have no JSON: null."""
    figures = {"cosine": row.cosine, "max_abs": row.max_abs, "max_rel": row.max_rel}
    return {
        "name": row.name,
        "shape": list(row.shape),
        "dtypes": list(row.dtypes),
        "verdict": row.verdict.lower(),
        "over": row.num_over,
        "of": row.num_in_all,
        "unit": _unit(row),
        "at": None if row.at is None else list(row.at),
        "values": None if row.values is None else list(row.values),
        **{
            key: value if value is not None and math.isfinite(value) else None
            for key, value in figures.items()
        },
        "max_ulp": row.max_ulp,
    }
