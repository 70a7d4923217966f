"""Sends SIGINT and SIGTERM to the command at random moments of its life and looks at what is left.

A child is a fork that calls the command's main, or becomes `python -m dsv4cli`.  Its life counts from the moment when
it catches signals: before that it is still the interpreter that starts.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4cli.main import main as dsv4
from dsv4cli.progress import Progress
from dsv4cli.words import Console
from trials import SHARD_BYTES, attempt, ended, leftovers, start, torn, tree

from dsv4ckpt import plan, survey
from dsv4ckpt.outdir import OutDir
from dsv4ckpt.stop import StopFlag

Life = Callable[[], None]
SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP_SECONDS = 2.0


def _speak_into(words: Path) -> None:
    fd = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(fd, 1)
    os.dup2(fd, 2)


def command(arguments: list[str], words: Path) -> None:
    """The command in this process; what it says goes into a file."""
    _speak_into(words)
    sys.argv[1:] = arguments
    try:
        dsv4()
    except SystemExit as done:
        os._exit(int(done.code or 0))


def module(arguments: list[str], words: Path) -> None:
    """The same as a fresh process."""
    _speak_into(words)
    os.execv(sys.executable, [sys.executable, "-m", "dsv4cli", *arguments])


def deaf(arguments: list[str], words: Path) -> None:
    """The same with workers that never look at the flag."""
    StopFlag.check = lambda self: None  # type: ignore[method-assign]
    command(arguments, words)


def wait_until_it_listens(child: int) -> None:
    """Until the child catches SIGTERM, which the interpreter by itself does not; or is gone."""
    while True:
        status = Path(f"/proc/{child}/status").read_text().split()
        if (
            "Z" in status[status.index("State:") + 1]
            or int(status[status.index("SigCgt:") + 1], 16) & 1 << 14
        ):
            return
        time.sleep(0.0005)


def signalled(life: Life, *moments: tuple[float, int]) -> tuple[int, float]:
    """Exit code of a child that gets these signals so many seconds after the one before; how long the last took."""
    child = start(life)
    wait_until_it_listens(child)
    for delay, number in moments:
        time.sleep(delay)
        os.kill(child, number)
    sent = time.monotonic()
    return ended(child), time.monotonic() - sent


@dataclass
class Found:
    """What all trials of a kind together show."""

    landed: int = 0
    late: int = 0  # the command was done before
    codes: list[str] = field(default_factory=list)  # that are not the signal's
    slow: list[float] = field(default_factory=list)
    longest: float = 0.0
    said: list[str] = field(default_factory=list)  # tracebacks
    temporaries: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)


class Trials:
    """One command line, stopped again and again; `out` is what it makes, if anything."""

    def __init__(self, arguments: list[str], out: Path | None, work: Path, found: Found) -> None:
        self.arguments, self.out, self.found = arguments, out, found
        self.words = work / "words"
        began = time.monotonic()
        self.finish()
        self.seconds = time.monotonic() - began
        self.expected = tree(out) if out else {}
        self.forget()

    def life(self, way: Callable[[list[str], Path], None] = command) -> Life:
        return functools.partial(way, self.arguments, self.words)

    def forget(self) -> None:
        if self.out:
            shutil.rmtree(self.out, ignore_errors=True)

    def finish(self) -> None:
        """The same command, undisturbed."""
        code = attempt(self.life())
        if code:
            raise SystemExit(f"the undisturbed command ended with {code}: {self.words.read_text()}")

    def stop(self, life: Life, number: int, delay: float) -> None:
        """One signal; what takes too long is tried once more, since the machine may be busy."""
        code, seconds = signalled(life, (delay, number))
        if seconds > STOP_SECONDS:
            self.forget()
            code, seconds = signalled(life, (delay, number))
        self.found.slow += [seconds] if seconds > STOP_SECONDS else []
        self.found.longest = max(self.found.longest, seconds)
        self.judge(code, 128 + number)
        if self.out:
            self.found.temporaries += [file.name for file in self.out.rglob("*.part")]

    def judge(self, code: int, *fitting: int) -> None:
        words = self.words.read_text()
        if code in fitting:
            self.found.landed += 1
        elif code == 0 or (128 - code in fitting and "done in" in words):  # killed as the interpreter went
            self.found.late += 1
        else:
            self.found.codes.append(f"{code} instead of {fitting}: {words}")
        self.found.said += [words] if "Traceback" in words or "rror:" in words else []
        if self.out:
            self.found.torn += torn(self.out, self.expected)

    def resume(self) -> None:
        """The same command ends in the same bytes, and leaves nothing beside them."""
        self.finish()
        if self.out:
            self.found.different += [] if tree(self.out) == self.expected else [str(self.arguments)]
            self.found.leftovers += leftovers(self.out)


def convert(src: Path, out: Path, *more: str) -> list[str]:
    size = str(SHARD_BYTES)
    return ["convert", str(src), str(out), "--to", "bf16", "--max-shard-size", size, *more]


def once(src: Path, work: Path, num_signals: int, found: Found) -> None:
    """One signal each, up to two on an output before it is finished."""
    generator = random.Random(7)
    trials = Trials(convert(src, work / "out"), work / "out", work, found)
    numbers = itertools.cycle(SIGNALS)
    while found.landed < num_signals and found.late < num_signals:
        for _ in range(2):
            trials.stop(trials.life(), next(numbers), generator.uniform(0, trials.seconds))
        trials.resume()
        trials.forget()


def process(src: Path, work: Path, num_signals: int, found: Found) -> None:
    """As `once`, in fresh processes that import torch on the way."""
    trials = Trials(convert(src, work / "out"), work / "out", work, found)
    began = time.monotonic()
    attempt(trials.life(module))
    seconds = 0.8 * (time.monotonic() - began)
    trials.forget()
    for turn in range(num_signals):
        trials.stop(trials.life(module), SIGNALS[turn % 2], seconds * turn / num_signals)
    trials.resume()


def twice(src: Path, work: Path, num_signals: int, found: Found) -> None:
    """A second signal 1 to 20 ms after the first. Temporaries may stay then, until the command is given again."""
    generator = random.Random(7)
    trials = Trials(convert(src, work / "out"), work / "out", work, found)
    while found.landed < num_signals and found.late < num_signals:
        first, second = generator.sample(SIGNALS, 2)
        moments = (generator.uniform(0, trials.seconds), first), (generator.uniform(0.001, 0.02), second)
        code, seconds = signalled(trials.life(), *moments)
        found.longest = max(found.longest, seconds)
        trials.judge(code, 128 + first, 128 + second)
        trials.resume()
        trials.forget()


def unheard(src: Path, work: Path, num_signals: int, found: Found) -> None:
    """As `twice` where the first signal has no effect: only the second one can end the process."""
    trials = Trials(convert(src, work / "out"), work / "out", work, found)
    for turn in range(num_signals):
        first, second = SIGNALS[turn % 2], SIGNALS[turn // 2 % 2]
        code, seconds = signalled(trials.life(deaf), (0.3 * trials.seconds, first), (0.01, second))
        found.longest = max(found.longest, seconds)
        trials.judge(code, 128 + second)
        trials.resume()
        trials.forget()


def large(src: Path, work: Path, num_signals: int, found: Found) -> None:
    """Every verb at work on tensors of 100 MB."""
    bf16, sample = work / "bf16", work / "sample"
    sizes = ["--layers", "1", "--hidden", "256", "--intermediate", "32", "--experts", "6", "--heads", "4096"]
    converting = Trials(["convert", str(src), str(bf16), "--to", "bf16"], bf16, work, found)
    several_times(converting, num_signals)
    several_times(Trials(["sample", str(sample), *sizes], sample, work, found), num_signals)
    for arguments in (["verify", str(src), str(bf16), "--level", "values"], ["verify", str(bf16)]):
        several_times(Trials(arguments, None, work, found), num_signals)
    again = ["convert", str(bf16), str(work / "native"), "--to", "native"]
    several_times(Trials(again, work / "native", work, found), num_signals)


def several_times(trials: Trials, num_signals: int) -> None:
    for turn in range(num_signals):
        trials.stop(trials.life(), SIGNALS[turn % 2], trials.seconds * (turn + 1) / (num_signals + 2))
    if trials.out:
        trials.resume()


# What the command calls before it begins to write, and after the last moment at which it can stop.
BEFORE = ((survey, "survey"), (plan, "make_plan"), (Progress, "__enter__"))
AFTER = ((OutDir, "finish"), (Progress, "__exit__"), (Console, "document"))


def outside(src: Path, work: Path, num_signals: int, found: Found) -> None:
    """Signals where nothing is being written: nothing is left, or all is there."""
    trials = Trials(convert(src, work / "out"), work / "out", work, found)
    for place, number in itertools.product((*BEFORE, *AFTER), SIGNALS):
        code = attempt(functools.partial(signal_itself, place, number, trials.life()))
        trials.judge(code, 128 + number)
        seen = tree(work / "out") if (work / "out").exists() else {}
        found.different += [] if seen == (trials.expected if place in AFTER else {}) else [str(place)]
        trials.resume()
        trials.forget()


def signal_itself(place: tuple[Any, str], number: int, life: Life) -> None:
    """A life in which a function of the command sends a signal first."""
    owner, name = place
    whole = getattr(owner, name)

    def signalling(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), number)
        return whole(*arguments, **named)

    setattr(owner, name, signalling)
    life()


KINDS = {kind.__name__: kind for kind in (once, process, twice, unheard, large, outside)}

if __name__ == "__main__":
    for caught in SIGNALS:
        signal.signal(caught, signal.SIG_DFL)  # whatever the one who started us ignores
    what = Found()
    KINDS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), what)
    print(json.dumps(vars(what)))
