"""One repository of models on the Hugging Face Hub: the only network.  Knows no tensors and no manifest.

Calls only what huggingface_hub 1.0 and 2.4 share.  It finds the token itself (HF_TOKEN, `hf auth login`); here it is
asked for once, to take it out of what a server says.  What passes by (too many requests, a broken server or
connection) is tried again, a bounded number of times; everything else is HubFailed.  Addresses of the storage are
signed, and the client's own messages contain them: none of these is passed on, and its logger stays quiet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from .errors import Environment, HubFailed, Usage, printable

_TRIES = 6
_LONGEST_WAIT = 300.0  # seconds, whatever a server asks for
_PASSING = {408, 409, 412, 429, 500, 502, 503, 504}  # 409, 412: somebody else committed meanwhile
_MAX_SAID = 200  # characters of what a server says
_AGAIN = "give the same command again later: it goes on where it stopped"
_LOGIN = "hf auth login, or set HF_TOKEN, with a token that may write to this repository"
_Result = TypeVar("_Result")


class Remote(NamedTuple):
    """A file on the Hub: LFS files are known by their SHA-256, others by their git blob id."""

    size: int
    sha256: str | None
    git_blob: str


class Addition(NamedTuple):
    """A file to commit. content: where it lies, or its bytes"""

    name: str
    content: str | bytes


class Repo:
    """A repository, and the branch of it that is written to."""

    def __init__(self, name: str) -> None:
        """raises Usage, HubFailed without a token"""
        import huggingface_hub as client
        from huggingface_hub.utils import HFValidationError, disable_progress_bars, logging, validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError:
            raise _no_repo(name) from None
        if name.count("/") != 1:
            raise _no_repo(name)
        logging.set_verbosity(50)  # above every level that it speaks at
        disable_progress_bars()
        self.name, self.revision = name, "main"
        self._api = client.HfApi()
        self._secret: str | None = None
        self._secret = self._tried("looking for the token", client.get_token)
        if not self._secret:
            raise HubFailed(
                "there is no token of the Hub on this machine", expected="a login, or HF_TOKEN", do=_LOGIN
            )

    @property
    def endpoint(self) -> str:
        return str(self._api.endpoint)

    def user(self) -> str:
        """Whose token it is. raises HubFailed"""
        return str(self._tried("asking whose token it is", self._api.whoami)["name"])

    def require_card(self, text: str) -> None:
        """Let the Hub read a model card's metadata. raises Usage, HubFailed"""
        body = {"content": text, "repoType": "model"}
        answer = self._tried(
            "checking the model card", lambda: self._request("POST", "validate-yaml", body, {400})
        )
        said = answer.json().get("errors") if answer.status_code == 400 else None
        if said is not None:
            found = "; ".join(str(item.get("message")) for item in said)
            raise Usage(
                "the Hub does not accept the model card",
                file="README.md",
                found=repr(self._harmless(found)),
                do="mend the lines between the two --- at its beginning",
            )

    def create(self, *, private: bool) -> bool:
        """Make the repository unless it is there; whether it was made. raises Usage, HubFailed

        private  one that is there must be private as well
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        def create() -> bool:
            try:
                info = self._api.repo_info(self.name)
            except RepositoryNotFoundError:
                self._api.create_repo(self.name, private=private, exist_ok=True)
                return True
            if private and not info.private:
                raise Usage(
                    f"{self.name} is there already, and public",
                    do="make it private in its settings, or leave --private out",
                )
            return False

        return self._tried("creating the repository", create)

    def require_write(self) -> None:
        """raises HubFailed if the token may not write here"""
        self._tried(
            "asking for write access",
            lambda: self._request("GET", f"models/{self.name}/auth-check/write"),
        )

    def take_branch(self, branch: str) -> None:
        """Write to this branch from now on; it is made from main if it is not there. raises HubFailed"""
        self._tried(
            "creating the branch", lambda: self._api.create_branch(self.name, branch=branch, exist_ok=True)
        )
        self.revision = branch

    def take_pull_request(self, title: str, user: str) -> int:
        """Write to a pull request from now on: to the user's open one of this title, or a new one. raises HubFailed"""

        def take() -> int:
            for item in self._api.get_repo_discussions(self.name):
                is_open = item.is_pull_request and item.status in ("draft", "open")
                if is_open and item.title == title and item.author == user:
                    return int(item.num)
            return int(self._api.create_pull_request(self.name, title, description="See the model card.").num)

        number = self._tried("opening a pull request", take)
        self.revision = f"refs/pr/{number}"
        return number

    def files(self) -> dict[str, Remote]:
        """What the branch holds now. raises HubFailed"""
        from huggingface_hub.hf_api import RepoFile

        def files() -> dict[str, Remote]:
            entries = self._api.list_repo_tree(self.name, recursive=True, revision=self.revision)
            return {
                item.path: Remote(item.size, item.lfs.sha256 if item.lfs else None, item.blob_id)
                for item in entries
                if isinstance(item, RepoFile)
            }

        return self._tried("listing its files", files)

    def commit(
        self,
        missing: Callable[[Mapping[str, Remote]], tuple[Iterable[Addition], Iterable[str]]],
        message: str,
        on_sent: Callable[[str], None],
    ) -> None:
        """Send files and make them visible in one commit. raises HubFailed, Environment

        missing  what is to be sent and what to be deleted, given what is there: asked again before every attempt,
                 because a commit may have been done though its answer never came
        on_sent  told of every file whose bytes are on the Hub
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        def attempt() -> None:
            additions, deletions = missing(self.files())
            adds = [CommitOperationAdd(item.name, item.content) for item in additions]
            for add in adds:
                self._api.preupload_lfs_files(self.name, [add], revision=self.revision)
                on_sent(add.path_in_repo)
            operations: list[Any] = [*adds, *(CommitOperationDelete(name) for name in deletions)]
            if operations:
                self._api.create_commit(self.name, operations, commit_message=message, revision=self.revision)

        self._tried("sending files", attempt)

    # ---- one way to ask

    def _request(self, method: str, route: str, body: object = None, also: Iterable[int] = ()) -> Any:
        """A route of the API that no method of both versions covers. also: statuses that are answers as well"""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = f"{self.endpoint}/api/{route}"
        answer = get_session().request(method, url, headers=build_hf_headers(), json=body)
        if answer.status_code not in also:
            hf_raise_for_status(answer)
        return answer

    def _tried(self, doing: str, call: Callable[[], _Result]) -> _Result:
        """Call, and again after what passes by. raises HubFailed, what is ours"""
        from huggingface_hub.errors import HfHubHTTPError

        # the HTTP library of the client's version: httpx, or httpx2
        http_error: type[Exception] = HfHubHTTPError.__bases__[0]
        wait = 1.0
        for left in range(_TRIES - 1, -1, -1):
            try:
                return call()
            except (http_error, OSError, RuntimeError, ValueError) as error:
                cause = _http_cause(error, http_error)
                passes = _passes(cause, http_error)
                if not left or not passes:
                    raise self._told(
                        doing, cause, passes=passes, is_http=isinstance(cause, http_error)
                    ) from None
                threading.Event().wait(min(_asked_wait(cause, wait), _LONGEST_WAIT))
                wait *= 2
        raise AssertionError

    def _told(self, doing: str, error: Exception, *, passes: bool, is_http: bool) -> Environment:
        """What went wrong, without a word of the client's: they hold addresses."""
        kind, status = type(error).__name__, _status(error)
        where = f"{self.name}: {doing}"
        if isinstance(error, OSError) and not is_http and kind != "OfflineModeIsEnabled":
            return Environment(f"{where}: cannot read a file to send", found=error.strerror, do=_AGAIN)
        if kind == "OfflineModeIsEnabled":
            return HubFailed(f"{where}: HF_HUB_OFFLINE is set", do="unset it")
        if status is None:
            what = "the connection failed" if is_http else "the client gave up"
            return HubFailed(
                f"{where}: {what}", found=kind, do=_AGAIN if passes else "see whether a newer client helps"
            )
        said = getattr(error, "server_message", None)
        found = str(status) + (f": {self._harmless(str(said))!r}" if said else "")
        if kind == "RevisionNotFoundError":
            return HubFailed(
                f"{where}: there is no such branch", found=self.revision, do="check its spelling"
            )
        if kind in ("RepositoryNotFoundError", "GatedRepoError"):
            what = "there is no such repository, or this token may not see it"
            return HubFailed(f"{where}: {what}", found=found, do=f"check its spelling; {_LOGIN}")
        whats = {
            401: ("the Hub does not know this token", _LOGIN),
            403: ("the Hub does not allow it", _LOGIN),
            429: ("too many requests, again and again", _AGAIN),
        }
        what, do = whats.get(
            status, ("the Hub fails again and again" if passes else "the Hub refuses it", _AGAIN)
        )
        return HubFailed(f"{where}: {what}", found=found, do=do)

    def _harmless(self, text: str) -> str:
        """What a server says, cut, without the token."""
        return printable(text.replace(self._secret or "\0", "[removed]")[:_MAX_SAID])


def _no_repo(name: str) -> Usage:
    return Usage(
        "this is no name of a repository", expected="owner/name", found=repr(name)[:_MAX_SAID], do="mend it"
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
