"""A durable output directory: lock, temporary files, fsync, rename, journal, space.  Knows no tensors.

A file under its final name is complete and correct, and stays so over a power cut.  What is unfinished lives in
`.dsv4/` inside the directory (same file system, and no name there ends in .safetensors); the manifest comes last.
Uniqueness of temporary names and determinism make two runs harmless even where locks lie; the lock is for manners.

The ranks of one job share a directory: rank 0 opens it, the others join.  Each has a journal of its own, which every
later run reads, however many ranks it has; all hold the lock together, so that the job lasts until the last is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import secrets
import shutil
import socket
import zlib
from collections.abc import Callable, Collection, Iterator

from . import probe
from .errors import Busy, Dsv4Error, Environment, ForeignOutput, NoSpace, Usage, printable
from .formats import MANIFEST_NAME, WORK_NAME
from .sink import FileSink, Receipt, io_errors
from .temporaries import host_key, is_alive

_PLAN, _JOURNAL, _REFUSED, _COMMIT = "plan", "journal", "refused", "commit"
SHELF_PREFIX = "shelf."  # of directories for what is fetched from elsewhere
_OUR_WORK_FILES = (_REFUSED, "lock", _COMMIT, _PLAN)  # in this order: what still has a plan is taken up again
_SPACE_MARGIN = 64 * 1024 * 1024  # bytes kept free beyond the output itself
PART_PREFIX = "roundtrip."  # of the files that `new_part` makes


class OutDir:
    """An output directory that belongs to one plan. Use `open_outdir` or `join_outdir`."""

    def __init__(
        self,
        path: str,
        plan_sha256: str,
        source_sha256: str,
        rank: int = 0,
        is_elsewhere: Callable[[Receipt], bool] | None = None,
    ) -> None:
        """is_elsewhere: whether a finished file that is not here any more is where it was moved to"""
        self.path = path
        self._is_elsewhere = is_elsewhere
        self._plan_sha256 = plan_sha256
        self._source_sha256 = source_sha256
        self._journal = f"{_JOURNAL}.{rank}" if rank else _JOURNAL
        self._known: set[str] = set()
        self._good_bytes = 0  # of our journal, before a torn tail
        self._is_shared = False  # other ranks write here too
        self._work = os.path.join(path, WORK_NAME)
        self._host = host_key()
        self._journal_fd = -1
        self._lock_fd = -1
        self._is_new = False  # no earlier run claimed the directory
        self.made_directory = False
        self.finished: dict[str, Receipt] = {}

    # -- life

    def lock(self) -> None:
        """Take the directory. raises Busy"""
        while True:
            os.makedirs(self._work, exist_ok=True)
            if probe.is_link(self._work):
                raise ForeignOutput(
                    "the work directory is a link", file=WORK_NAME, do="choose a new directory"
                )
            try:
                self._lock_fd = self._open_work("lock")
            except FileNotFoundError:  # a finished run has just removed the directory
                continue
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = printable(os.pread(self._lock_fd, 200, 0).decode(errors="replace"))
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                raise Busy(
                    "another process is writing this output",
                    found=holder or "a process that has not signed yet",
                    do="wait for it, or choose another directory",
                ) from None
            if os.fstat(self._lock_fd).st_nlink:  # a finished run may have removed the file that we locked
                break
            self.close()
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def _open_work(self, name: str) -> int:
        """Open or create one of our own files in the work directory; a link there is an error."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(os.path.join(self._work, name), flags, 0o666)

    def load(self, known: set[str]) -> None:
        """Claim the directory for the plan and read what an earlier run of it finished.

        known   names of the files that the plan makes
        raises  ForeignOutput if anything else lies there
        """
        present = set(os.listdir(self.path))  # first: files of another run come after its claim
        claimed, claim = self._claimed(), self._claim()
        self._is_new = claimed is None
        if claimed is not None and claimed[:64] == claim[:64] and claimed != claim:
            raise ForeignOutput(
                "the source files are not those that the unfinished run read: they were modified or copied since",
                expected="the same sizes and modification times",
                do="put the same files back (cp -p and rsync -t keep their times), or remove this directory",
            )
        if claimed is not None and claimed != claim:
            raise ForeignOutput(
                "this directory holds an unfinished conversion of another source or with other options",
                expected=f"plan {self._plan_sha256[:16]}",
                found=f"plan {printable(claimed[:16].decode(errors='replace'))}",
                do="choose another directory, or remove this one",
            )
        strangers = sorted(
            present - {WORK_NAME} - ({name.partition(os.sep)[0] for name in known} if claimed else set())
        )
        if strangers:
            raise ForeignOutput(
                "the output directory is not empty",
                found=", ".join(f"'{printable(name)}'" for name in strangers[:3])
                + (", ..." if len(strangers) > 3 else ""),
                do="choose a new directory",
            )
        if claimed is None:
            self.publish_bytes(os.path.join(WORK_NAME, _PLAN), claim, journal=False)
        elif probe.is_there(os.path.join(self._work, _REFUSED)):  # by a job whose last rank was killed
            os.unlink(os.path.join(self._work, _REFUSED))
        self._open_journal(known)

    def share(self) -> None:
        """Let other ranks join. raises Busy"""
        self._is_shared = True
        self._lock_with_others()

    def join(self, known: set[str]) -> None:
        """Take part in what rank 0 has opened for the same plan. raises Environment, Busy"""
        if self._claimed() != self._claim():
            raise Environment(
                "this rank has read other source files than rank 0, or was given other options",
                expected=f"plan {self._plan_sha256[:16]}, and the same sizes and modification times",
                do="give all ranks the same command, and a file system that they share",
            )
        self._lock_fd = self._open_work("lock")
        self._is_shared = True
        self._lock_with_others()
        self._open_journal(known)

    def _claim(self) -> bytes:
        return f"{self._plan_sha256} {self._source_sha256}".encode()

    def _claimed(self) -> bytes | None:
        return _read_if_there(os.path.join(self._work, _PLAN))

    def _lock_with_others(self) -> None:
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                "another process has just begun to write this output",
                do="wait for it, or choose another directory",
            ) from None

    def _is_last(self) -> bool:
        """Whether all other ranks are gone. Asking gives our own share of the lock away: the last to ask is told."""
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _open_journal(self, known: set[str]) -> None:
        self._known = known
        self._journal_fd = self._open_work(self._journal)
        self.read_journals()
        os.ftruncate(self._journal_fd, self._good_bytes)
        os.lseek(self._journal_fd, 0, os.SEEK_END)
        self.remove_dead_temporaries()

    def close(self) -> None:
        for fd in (self._journal_fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._journal_fd = self._lock_fd = -1

    def finish(self, manifest: bytes) -> None:
        """Publish the manifest: from here on the directory is complete. Then remove the work directory."""
        self.publish_bytes(MANIFEST_NAME, manifest, journal=False)
        self.clean()

    def abandon(self, *, refused: bool = False) -> None:
        """After an error: if nothing of this plan was finished, or by another run begun, leave no trace.

        refused   the input cannot become this output, so that nobody will continue: finished files go as well
        Of several ranks the last one tidies up: until then others may still write.
        """
        with contextlib.suppress(Environment, OSError):  # the first error is the one to tell
            if self._is_shared:
                if refused:
                    os.close(self._open_work(_REFUSED))
                if not self._is_last():
                    return
                refused = probe.is_there(os.path.join(self._work, _REFUSED))
                self.read_journals()
            if refused:
                self._remove_shelves()
                for name in self.finished:
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(self.path, name))
                self.finished.clear()
            if (self._is_new or refused) and not self.finished and not self._shelves():
                self.clean()
                if self.made_directory:
                    os.rmdir(self.path)

    def _shelves(self) -> list[str]:
        return [name for name in _names_in(self._work) if name.startswith(SHELF_PREFIX)]

    def _remove_shelves(self) -> None:
        for name in self._shelves():
            shutil.rmtree(os.path.join(self._work, name), ignore_errors=True)

    def pin(self, commit: str) -> None:
        """Write down which commit of a source on the Hub is read: a later run reads the same. raises Environment"""
        self.publish_bytes(os.path.join(WORK_NAME, _COMMIT), commit.encode(), journal=False)

    def clean(self) -> None:
        """Remove our own files and the work directory; what others left in it stays, and so does it then.

        raises  Environment
        """
        with io_errors(WORK_NAME):
            self._remove_shelves()
            names = _names_in(self._work)
            many = [name for name in names if name.startswith(PART_PREFIX) or _is_journal(name)]
            for name in (*many, *_OUR_WORK_FILES):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self._work, name))
        with contextlib.suppress(OSError):
            os.rmdir(self._work)

    # -- files

    def new_file(self, name: str, size: int, *, in_order: bool = True) -> FileSink:
        """A file of exactly `size` bytes that appears under `name` when the `with` block ends well."""
        with io_errors(name):
            temporary = self._temporary(name)
        publish = functools.partial(self._publish, journal=True)
        return FileSink(name, size, temporary, publish, in_order=in_order)

    @contextlib.contextmanager
    def new_part(self, name: str) -> Iterator[int]:
        """A file of the work directory, to be written through its descriptor; durable when the block ends well."""

        def publish(temporary: str) -> None:
            os.rename(temporary, os.path.join(self._work, name))
            sync_directory(self._work)

        with self._new_temporary(os.path.join(WORK_NAME, name), publish) as fd:
            yield fd

    @contextlib.contextmanager
    def _new_temporary(self, name: str, publish: Callable[[str], None]) -> Iterator[int]:
        """A file of our own, synced and handed to `publish` when the block ends well, else removed."""
        with io_errors(name):
            temporary = self._temporary(name)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                try:
                    yield fd
                    os.fsync(fd)
                finally:
                    os.close(fd)
                publish(temporary)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise

    @contextlib.contextmanager
    def open_part(self, name: str) -> Iterator[int]:
        """A finished file of the work directory. raises Environment"""
        with io_errors(name):
            fd = os.open(os.path.join(self._work, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                yield fd
            finally:
                os.close(fd)

    def part_sha256(self, name: str) -> str | None:
        """SHA-256 of a finished file of the work directory; None if it is not there."""
        if not probe.leads_somewhere(os.path.join(self._work, name)):
            return None
        digest = hashlib.sha256()
        with self.open_part(name) as fd:
            while data := os.read(fd, 1 << 22):
                digest.update(data)
        return digest.hexdigest()

    def forget(self, name: str) -> None:
        """Count a finished file as not finished: what belongs to it is lost."""
        self.finished.pop(name, None)

    def publish_bytes(self, name: str, data: bytes, *, journal: bool = True) -> Receipt:
        """Write a small file through the same protocol."""
        with io_errors(name):
            parent = os.path.join(self.path, os.path.dirname(name))
            make_directory(parent)
            if os.path.realpath(parent) != os.path.normpath(
                os.path.join(os.path.realpath(self.path), os.path.dirname(name))
            ):
                raise ForeignOutput(
                    "a directory in the output is a link", file=name, do="choose a new directory"
                )
        receipt = Receipt(name, len(data), hashlib.sha256(data).hexdigest(), {})
        publish = functools.partial(self._publish, receipt=receipt, journal=journal)
        with self._new_temporary(name, publish) as fd:
            write_all(fd, data)
        return receipt

    def _publish(self, temporary: str, receipt: Receipt, *, journal: bool) -> None:
        """rename, fsync the directory, then write down that it is done; what nobody wrote down does not stay."""
        final = os.path.join(self.path, receipt.name)
        os.rename(temporary, final)
        try:
            sync_directory(os.path.dirname(final))
            if journal:
                self._write_down(receipt)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(final)
            raise

    def _write_down(self, receipt: Receipt) -> None:
        """One line of the journal, durable."""
        line = json.dumps(list(receipt))
        write_all(self._journal_fd, f"{zlib.crc32(line.encode()):08x} {line}\n".encode())
        os.fsync(self._journal_fd)
        self.finished[receipt.name] = receipt

    def _temporary(self, name: str) -> str:
        key = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]  # any name, however long
        return os.path.join(self._work, f"{key}.{self._host}.{os.getpid()}.{secrets.token_hex(4)}.part")

    def read_journals(self) -> None:
        """What this and earlier runs have finished, whichever rank did it. raises OSError"""
        self.finished.clear()
        for name in sorted(filter(_is_journal, _names_in(self._work))):
            if name != self._journal:
                self._read_journal(_read_other(os.path.join(self._work, name)))
        self._good_bytes = self._read_journal(_read_fd(self._journal_fd))

    def _read_journal(self, data: bytes) -> int:
        """A line counts if it is whole and its file is there with that size. Returns the bytes before a torn tail."""
        good = 0
        for line in data.splitlines(keepends=True):
            crc, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
                break
            good += len(line)
            receipt = _receipt(text)
            if receipt and receipt.name in self._known and self._is_kept(receipt):
                self.finished[receipt.name] = receipt
        return good

    def _is_kept(self, receipt: Receipt) -> bool:
        is_here = _size_of(os.path.join(self.path, receipt.name)) == receipt.size
        return is_here or (self._is_elsewhere is not None and self._is_elsewhere(receipt))

    def remove_dead_temporaries(self) -> None:
        """Leftovers of a killed run on this host. Another host's, or a living process's, are left alone."""
        for name in _names_in(self._work):
            parts = name.split(".")
            if len(parts) != 5 or parts[-1] != "part" or parts[1] != self._host or not parts[2].isdecimal():
                continue
            # our own number: an earlier process had it, for this one has written nothing yet
            if int(parts[2]) == os.getpid() or not is_alive(int(parts[2])):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self._work, name))


@contextlib.contextmanager
def open_outdir(
    path: str,
    plan_sha256: str,
    known: set[str],
    source_sha256: str = "",
    is_elsewhere: Callable[[Receipt], bool] | None = None,
) -> Iterator[OutDir]:
    """Create or resume an output directory.

    plan_sha256    what is to be written; source_sha256: the very files that it is made from
    known          names of all files that will be written
    is_elsewhere   whether a finished file that is not here any more is where it was moved to
    raises         Usage for a place on the Hub; Busy, ForeignOutput, Environment
    """
    if path.startswith("hf://"):
        raise Usage(
            "this verb writes into a directory of this machine",
            found=repr(path),
            do="name one, then dsv4 push it; dsv4 convert can write to hf://owner/name at once",
        )
    with io_errors("."):
        existed = probe.is_directory(path)
        make_directory(path)
        out = OutDir(path, plan_sha256, source_sha256, is_elsewhere=is_elsewhere)
        out.made_directory = not existed
    try:
        with io_errors(WORK_NAME):
            out.lock()
            out.load(known)
        yield out
    except BaseException as error:
        out.abandon(refused=isinstance(error, Dsv4Error) and error.leaves_nothing)
        raise
    finally:
        out.close()


@contextlib.contextmanager
def join_outdir(
    path: str, plan_sha256: str, known: set[str], source_sha256: str, rank: int
) -> Iterator[OutDir]:
    """As another rank of the job whose rank 0 has opened and shared the directory. raises Busy, Environment"""
    out = OutDir(path, plan_sha256, source_sha256, rank)
    try:
        with io_errors(WORK_NAME):
            out.join(known)
        yield out
    except BaseException as error:
        out.abandon(refused=isinstance(error, Dsv4Error) and error.leaves_nothing)
        raise
    finally:
        out.close()


def pinned_commit(path: str) -> str | None:
    """The commit that an unfinished run there reads; None: it has not written one down. raises Environment"""
    with io_errors(WORK_NAME):
        found = _read_if_there(os.path.join(path, WORK_NAME, _COMMIT))
    return None if found is None else found.decode(errors="replace")


def is_claimed(path: str) -> bool:
    """Whether a run has begun there, as far as this process can see. raises Environment"""
    with io_errors(WORK_NAME):
        return _read_if_there(os.path.join(path, WORK_NAME, _PLAN)) is not None


def remove_leftovers(path: str) -> None:
    """Remove the work directory of a run that died after its manifest. raises Environment

    Where another process holds the lock, it is about to do that itself.
    """
    if not probe.is_real_directory(os.path.join(path, WORK_NAME)):
        return
    with io_errors(WORK_NAME):
        out = OutDir(path, "", "")
        try:
            out.lock()
            out.remove_dead_temporaries()
            out.clean()
        except Busy:
            pass
        finally:
            out.close()


def remove_output(path: str, names: Collection[str]) -> None:
    """Remove a finished output whose files are named, and the directory unless others lie in it. raises Environment

    The manifest goes last of all, so that a later run can end what was begun.
    """
    remove_leftovers(path)
    folders = {os.path.dirname(name) for name in names} | {""}
    while parents := {os.path.dirname(folder) for folder in folders} - folders:
        folders |= parents
    with io_errors("."):
        for name in names:
            _remove_if_there(path, name)
        for folder in sorted(folders - {""}, key=len, reverse=True):
            with contextlib.suppress(OSError):
                os.rmdir(os.path.join(path, folder))
        _remove_if_there(path, MANIFEST_NAME)
        with contextlib.suppress(OSError):
            os.rmdir(path)


def _remove_if_there(path: str, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(path, name))


def free_bytes(path: str) -> int:
    """Free space, for us, of the file system that holds `path` or its nearest existing parent."""
    path = os.path.abspath(path)
    while not probe.leads_somewhere(path):
        path = os.path.dirname(path)
    with io_errors("."):
        status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def space_needed(remaining_bytes: int) -> int:
    """Free bytes that a run asks for before it starts."""
    return remaining_bytes + _SPACE_MARGIN


def require_space(
    path: str, remaining_bytes: int, *, what: str = "output", do: str = "make room or choose another disk"
) -> None:
    """raises NoSpace unless so much, and a margin, is free where `path` is or will be"""
    needed, free = space_needed(remaining_bytes), free_bytes(path)
    if free < needed:
        raise NoSpace(
            f"not enough room for the {what}",
            expected=f"{needed:,} bytes",
            found=f"{free:,} bytes free",
            do=f"{do}; nothing was written",
        )


def make_directory(path: str) -> None:
    """Create a directory and its parents, and make every new name durable."""
    path = os.path.abspath(path)
    missing = []
    while not probe.is_directory(path):
        missing.append(path)
        path = os.path.dirname(path)
    for new in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(new)
        sync_directory(os.path.dirname(new))


def sync_directory(path: str) -> None:
    fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _names_in(directory: str) -> list[str]:
    """What lies there; nothing if a finished run has just removed it."""
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _read_if_there(path: str) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _read_fd(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _is_journal(name: str) -> bool:
    return name == _JOURNAL or name.startswith(f"{_JOURNAL}.")


def _read_other(path: str) -> bytes:
    """A journal that another process wrote. A link there is an error, and a fifo keeps nobody waiting."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return _read_fd(fd)
    finally:
        os.close(fd)


def _size_of(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return -1


def _receipt(line: bytes) -> Receipt | None:
    """What a journal line says; None if it is no receipt."""
    try:
        name, size, sha256, notes = json.loads(line)
    except (ValueError, TypeError):
        return None
    if not (
        isinstance(name, str)
        and isinstance(size, int)
        and isinstance(sha256, str)
        and isinstance(notes, dict)
    ):
        return None
    return Receipt(name, size, sha256, notes)
