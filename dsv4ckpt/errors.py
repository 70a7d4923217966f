"""What can go wrong, one class per cause, and the exit code of each.  Knows nothing else.

A message says where, what, expected, found, and what to do.  Text that came from a file is shown with !r by whoever
raises, because a tensor name may hold escape codes; paths are relative to the checkpoint.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_DIFFERENT = 1
EXIT_USAGE = 2
EXIT_BAD_INPUT = 3
EXIT_ENVIRONMENT = 4
EXIT_DIVERGED = 5
EXIT_BUSY = 75
EXIT_SIGNAL = 128  # plus the signal's number: 130 for SIGINT, 143 for SIGTERM


def printable(text: str) -> str:
    """Text from a file system or a file, harmless on a terminal and encodable: what is not printable is escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class Dsv4Error(Exception):
    """Base of the family: a sentence, then one line for each fact that is known."""

    exit_code = EXIT_BAD_INPUT
    leaves_nothing = False  # the input can never become this output: nothing of it stays

    def __init__(
        self,
        what: str,
        *,
        file: str | None = None,
        expected: object = None,
        found: object = None,
        do: str | None = None,
    ) -> None:
        facts = {"file": file, "expected": expected, "found": found, "do": do}
        self.what = what
        self.facts = {key: printable(str(value)) for key, value in facts.items() if value is not None}
        super().__init__("\n".join([what, *(f"    {key:<9} {text}" for key, text in self.facts.items())]))


# ---- bad or hostile input: exit 3


class BadHeader(Dsv4Error):
    """A safetensors file that breaks one of the format's rules."""


class BadDcp(Dsv4Error):
    """A directory of torch.distributed.checkpoint that is malformed, or was written by something else than torch."""


class BadIndex(Dsv4Error):
    """model.safetensors.index.json is malformed or does not agree with the shards."""


class BadConfig(Dsv4Error):
    """config.json is malformed, or a value in it is missing, mistyped or out of bounds."""


class UnsafePath(Dsv4Error):
    """A file name or link that would lead outside the checkpoint, or is no regular file."""


class MissingFile(Dsv4Error):
    """A file that the checkpoint needs is not there."""


class UnknownRelease(Dsv4Error):
    """The config or the stored dtypes fit no release that we know."""


class NotConform(Dsv4Error):
    """The tensors of a checkpoint are not the ones its config asks for."""


class MissingScale(NotConform):
    """Quantized codes without their scales."""


class OrphanScale(NotConform):
    """Scales without codes."""


class NotFinite(Dsv4Error):
    """NaN or infinity in a scale, a code or a decoded value."""

    leaves_nothing = True


LEAVE_SOURCE_ALONE = "leave the source alone while a command reads it, then start again"


class SourceChanged(Dsv4Error):
    """A source file is not what it was when the plan was made."""


class BadSidecar(Dsv4Error):
    """dsv4.roundtrip is malformed, or belongs to another checkpoint."""

    leaves_nothing = True


class NotLossless(Dsv4Error):
    """A value would not survive, and nobody allowed that."""

    leaves_nothing = True


class EditedOutput(Dsv4Error):
    """A conversion's values are not those that its manifest vouches for."""

    leaves_nothing = True


class VanishingChange(Dsv4Error):
    """Most of what was fine-tuned would not survive the quantization. Finished files stay: it can be allowed."""


class BadManifest(Dsv4Error):
    """dsv4.manifest.json, a list of ids to verify against, or a dump to compare is malformed."""


# ---- usage: exit 2


class Usage(Dsv4Error):
    """A request that cannot be carried out as it was put."""

    exit_code = EXIT_USAGE


class ForeignOutput(Usage):
    """The output directory holds something that is not ours, or another plan's work."""


# ---- environment: exit 4


class Environment(Dsv4Error):
    """The machine does not let us: permission, I/O error."""

    exit_code = EXIT_ENVIRONMENT


class NoSpace(Environment):
    """Not enough room for the output."""


class HubFailed(Environment):
    """The Hugging Face Hub cannot be reached, or does not let us."""


class Busy(Dsv4Error):
    """Another process is writing this output."""

    exit_code = EXIT_BUSY


class Diverged(Dsv4Error):
    """Training has met a loss or a gradient that is not finite."""

    exit_code = EXIT_DIVERGED


class Interrupted(Dsv4Error):
    """A signal asked us to stop."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("stopped by a signal", do="the same command continues: files that are finished stay")
        self.exit_code = EXIT_SIGNAL + signal_number
