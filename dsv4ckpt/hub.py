"""One repository of models on the Hugging Face Hub, to read from; with hub_writer the only network.  Knows no tensors.

Calls only what huggingface_hub 1.0 and 2.4 share.  It finds the token itself (HF_TOKEN, `hf auth login`); here it is
asked for once, to take it out of what a server says.  What passes by (too many requests, a broken server or
connection) is tried again, a bounded number of times; everything else is HubFailed.  Addresses of the storage are
signed, and the client's own messages contain them: none of these is passed on, and its logger stays quiet.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from .errors import Environment, HubFailed, Usage, printable

PREFIX = "hf://"  # of a SRC or DST that is on the Hub
_TRIES = 6
_LONGEST_WAIT = 300.0  # seconds, whatever a server asks for
_PASSING = {408, 409, 412, 429, 500, 502, 503, 504}  # 409, 412: somebody else committed meanwhile
_EXPIRED = {400, 401, 403, 404, 410}  # what a storage says to an address that was good once
_REDIRECTS = {301, 302, 303, 307, 308}
_MOST_REDIRECTS = 5
_TIMEOUT = 60.0  # seconds without a byte
_PIECE = 1 << 20  # bytes handed on at a time
_MAX_SAID = 200  # characters of what a server says
_AGAIN = "give the same command again later: it goes on where it stopped"
LOGIN_TO_WRITE = "hf auth login, or set HF_TOKEN, with a token that may write to this repository"
_Result = TypeVar("_Result")


class Remote(NamedTuple):
    """A file on the Hub: LFS files are known by their SHA-256, others by their git blob id."""

    size: int
    sha256: str | None
    git_blob: str

    @property
    def id(self) -> str:
        """What `digest` comes to for the right bytes."""
        return self.sha256 or self.git_blob

    def digest(self) -> Any:
        """A hash, to be fed with the bytes."""
        if self.sha256:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    def is_of(self, data: bytes) -> bool:
        """Whether these are the bytes."""
        digest = self.digest()
        digest.update(data)
        return bool(digest.hexdigest() == self.id)


class Address(NamedTuple):
    """What stands behind hf://: a repository, and a branch, tag or commit of it."""

    name: str
    revision: str | None


class _Broken(RuntimeError):
    """Bytes that did not come as they were asked for; passes by."""


def parse_address(text: str) -> Address:
    """hf://owner/name or hf://owner/name@revision. raises Usage"""
    name, at, revision = text.removeprefix(PREFIX).partition("@")
    if not text.startswith(PREFIX) or (at and not re.fullmatch(r"[\w./-]{1,250}", revision, re.ASCII)):
        raise _no_repo(text)
    _require_name(name)
    return Address(name, revision or None)


class Repo:
    """A repository as of a revision; `pin` makes that a commit."""

    login = "hf auth login, or set HF_TOKEN, with a token that may read this repository"

    def __init__(self, name: str, revision: str | None = None) -> None:
        """raises Usage"""
        import huggingface_hub as client
        from huggingface_hub.utils import disable_progress_bars, logging

        _require_name(name)
        logging.set_verbosity(50)  # above every level that it speaks at
        disable_progress_bars()
        self.name, self.revision = name, revision or "main"
        self.api = client.HfApi()
        self._locations: dict[
            str, str
        ] = {}  # signed addresses of files in the storage: good for an hour or so
        self.pause: Callable[[float], object] = threading.Event().wait  # between two tries, in seconds
        self._secret: str | None = None
        self._secret = self.tried("looking for the token", client.get_token)

    @property
    def has_token(self) -> bool:
        return bool(self._secret)

    @property
    def endpoint(self) -> str:
        return str(self.api.endpoint)

    def pin(self) -> str:
        """The commit that the revision names now; it is what is read from here on. raises HubFailed"""
        self.revision = str(
            self.tried(
                "looking for it",
                lambda: self.api.repo_info(self.name, revision=self.revision, timeout=_TIMEOUT),
            ).sha
        )
        return self.revision

    def files(self) -> dict[str, Remote]:
        """What the revision holds now. raises HubFailed"""
        revision = self.revision.replace("/", "%2F")
        found: dict[str, Remote] = {}
        route = f"models/{self.name}/tree/{revision}?recursive=true"
        while route:
            files, route = self.tried("listing its files", functools.partial(self._page, route))
            found |= files
        return found

    def _page(self, route: str) -> tuple[dict[str, Remote], str]:
        """Some of the files, and the route to the next ones. raises ValueError for an answer that is none

        The client's own way to ask for pages waits as long as a server says, and does not hear of a signal meanwhile.
        """
        answer = self.request("GET", route)
        following = str(answer.links.get("next", {}).get("url", ""))
        here = f"{self.endpoint}/api/"  # the token goes nowhere else
        try:
            files = dict(_remote(row) for row in answer.json() if row["type"] == "file")
        except (KeyError, TypeError, AttributeError):
            raise ValueError("no list of files") from None
        return files, following.removeprefix(here) if following.startswith(here) else ""

    def read(self, file: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a file. raises HubFailed"""
        found = bytearray(end - begin)

        def take(offset: int, piece: bytes) -> None:
            found[offset - begin : offset - begin + len(piece)] = piece

        self.stream(file, begin, end, take)
        return bytes(found)

    def stream(self, file: str, begin: int, end: int, take: Callable[[int, bytes], None]) -> None:
        """Hand bytes [begin, end) of a file to `take(offset, piece)`, in order. raises HubFailed, what `take` raises

        After a broken connection it goes on with the byte that is due.
        """
        done = begin

        def attempt() -> None:
            nonlocal done
            for piece in self._pieces(file, done, end):
                take(done, piece)
                done += len(piece)
            if done != end:
                raise _Broken("the connection ended early")

        self.tried(f"reading {printable(file)}", attempt, lambda: done)

    def _pieces(self, file: str, begin: int, end: int) -> Iterator[bytes]:
        if begin == end:
            return
        known = self._locations.get(file)
        location, headers = (known, {}) if known else self._resolved(file)
        with self._asked(location, headers, begin, end) as answer:
            if known and answer.status_code in _EXPIRED:
                self._locations.pop(file, None)
                raise _Broken("the address has expired")
            self._require_range(answer, begin)
            left = end - begin
            for piece in answer.iter_bytes(_PIECE):
                yield piece[:left]
                left -= len(piece[:left])
                if not left:
                    return

    def _asked(self, location: str, headers: dict[str, str], begin: int, end: int) -> Any:
        from huggingface_hub.utils import get_session

        ranged = {**headers, "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        return get_session().stream("GET", location, headers=ranged, follow_redirects=False, timeout=_TIMEOUT)

    def _require_range(self, answer: Any, begin: int) -> None:
        from huggingface_hub.utils import hf_raise_for_status

        if answer.status_code >= 400:
            answer.read()
            hf_raise_for_status(answer)
        starts = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if answer.status_code != 206 or starts is None or int(starts[1]) != begin:
            if answer.status_code == 200 and begin == 0:
                return  # the whole file, of which the beginning is taken
            raise _Broken("the storage did not send the range that was asked for")

    def _resolved(self, file: str) -> tuple[str, dict[str, str]]:
        """Where a file's bytes are, and what to send there: the token goes to the Hub alone."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.name, file, revision=self.revision, endpoint=self.endpoint)
        host = self.endpoint.rstrip("/") + "/"
        for _ in range(_MOST_REDIRECTS):
            headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
            answer = get_session().request(
                "HEAD", url, headers=headers, follow_redirects=False, timeout=_TIMEOUT
            )
            if answer.status_code not in _REDIRECTS:
                hf_raise_for_status(answer)
                return url, headers
            url = str(answer.url.join(answer.headers.get("Location", "")))
            if not url.startswith(host):
                self._locations[file] = url
                return url, {}
        raise _Broken("it is redirected in a circle")

    # ---- one way to ask

    def request(self, method: str, route: str, body: object = None, also: Iterable[int] = ()) -> Any:
        """A route of the API that no method of both versions covers. also: statuses that are answers as well"""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = f"{self.endpoint}/api/{route}"
        answer = get_session().request(method, url, headers=build_hf_headers(), json=body, timeout=_TIMEOUT)
        if answer.status_code not in also:
            hf_raise_for_status(answer)
        return answer

    def tried(
        self, doing: str, call: Callable[[], _Result], progress: Callable[[], int] = lambda: 0
    ) -> _Result:
        """Call, and again after what passes by. raises HubFailed, what is ours

        progress   how far it has come: who comes further between two failures may fail as often again
        """
        from huggingface_hub.errors import HfHubHTTPError

        # the HTTP library of the client's version: httpx, or httpx2
        http_error: type[Exception] = HfHubHTTPError.__bases__[0]
        wait, left, reached = 1.0, _TRIES, progress()
        while True:
            try:
                return call()
            except (http_error, OSError, RuntimeError, ValueError) as error:
                cause = _http_cause(error, http_error)
                passes = _passes(cause, http_error)
                if progress() != reached:
                    wait, left, reached = 1.0, _TRIES, progress()
                left -= 1
                if not left or not passes:
                    raise self._told(
                        doing, cause, passes=passes, is_http=isinstance(cause, http_error)
                    ) from None
                self.pause(min(_asked_wait(cause, wait), _LONGEST_WAIT))
                wait *= 2

    def _told(self, doing: str, error: Exception, *, passes: bool, is_http: bool) -> Environment:
        """What went wrong, without a word of the client's: they hold addresses."""
        kind, status = type(error).__name__, _status(error)
        where = f"{self.name}: {doing}"
        if isinstance(error, OSError) and not is_http and kind != "OfflineModeIsEnabled":
            return Environment(f"{where}: cannot read or write a file", found=error.strerror, do=_AGAIN)
        if kind == "OfflineModeIsEnabled":
            return HubFailed(
                f"{where}: HF_HUB_OFFLINE is set",
                do="unset it, or name a directory of this machine",
            )
        if isinstance(error, _Broken):
            return HubFailed(f"{where}: {error}, again and again", do=_AGAIN)
        if status is None:
            if is_http:
                do = f"see whether this machine reaches {self.endpoint}, then {_AGAIN}"
                return HubFailed(f"{where}: the connection failed", found=kind, do=do)
            return HubFailed(
                f"{where}: the client gave up",
                found=kind,
                do=_AGAIN if passes else "see whether a newer client helps",
            )
        said = getattr(error, "server_message", None)
        found = str(status) + (f": {self.harmless(str(said))!r}" if said else "")
        what, do = self._words(kind, status, passes=passes)
        return HubFailed(f"{where}: {what}", found=found, do=do)

    def _words(self, kind: str, status: int, *, passes: bool) -> tuple[str, str]:
        """What happened, and what to do."""
        page = f"{self.endpoint}/{self.name}"
        if kind == "RevisionNotFoundError":
            return f"there is no revision {self.revision!r}", f"{page}/tree/main shows branches and tags"
        if kind == "GatedRepoError":
            access = f"ask for access on {page}"
            if self.has_token:
                return "this repository is gated, and this token has no access to it", access
            return (
                "this repository is gated, and there is no token on this machine",
                f"{access}, then {self.login}",
            )
        if kind == "RepositoryNotFoundError":
            what = "there is no such repository, or "
            what += (
                "this token may not see it" if self.has_token else "it is private, and there is no token here"
            )
            return what, f"check its spelling; {self.login}"
        if kind == "RemoteEntryNotFoundError" or kind == "EntryNotFoundError":
            return "there is no such file", _AGAIN
        whats = {
            401: ("the Hub does not know this token", self.login),
            403: ("the Hub does not allow it", self.login),
            429: ("too many requests, again and again", _AGAIN),
        }
        return whats.get(
            status, ("the Hub fails again and again" if passes else "the Hub refuses it", _AGAIN)
        )

    def harmless(self, text: str) -> str:
        """What a server says, cut, without the token."""
        return printable(text.replace(self._secret or "\0", "[removed]")[:_MAX_SAID])


def _remote(row: dict[str, Any]) -> tuple[str, Remote]:
    """A file as the Hub lists it. raises KeyError, TypeError if it is none"""
    path, size, blob, lfs = row["path"], row["size"], row["oid"], row.get("lfs")
    sha256 = lfs["oid"] if lfs else None
    ids = (sha256 or "0" * 64, blob)
    if type(size) is not int or size < 0 or not isinstance(path, str):
        raise TypeError
    if not all(re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", item) for item in ids):
        raise TypeError
    return path, Remote(size, sha256, blob)


def _require_name(name: str) -> None:
    """raises Usage"""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise _no_repo(name) from None
    if name.count("/") != 1:
        raise _no_repo(name)


def _no_repo(name: str) -> Usage:
    return Usage(
        "this is no name of a repository",
        expected="owner/name; where a checkpoint is named, hf://owner/name or hf://owner/name@revision",
        found=repr(name)[:_MAX_SAID],
        do="mend it",
    )


def _http_cause(error: Exception, http_error: type[Exception]) -> Exception:
    """The client wraps what happens in its threads."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, http_error):
        inner = inner.__cause__
    return inner if isinstance(inner, Exception) else error


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _passes(error: Exception, http_error: type[Exception]) -> bool:
    """Whether the same may succeed later."""
    status = _status(error)
    if status is not None:
        return status in _PASSING
    return isinstance(error, (http_error, RuntimeError))  # no answer at all; xet has errors of its own


def _asked_wait(error: Exception, otherwise: float) -> float:
    """Seconds, as Retry-After says; a date there is not waited for."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked = str(headers.get("retry-after", ""))
    return float(asked) if asked.isdecimal() else otherwise
