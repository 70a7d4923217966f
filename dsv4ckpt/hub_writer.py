"""A repository of models on the Hub, to write to.  Knows no tensors and no manifest.

What is sent becomes visible in commits; each asks first what is there, so that an answer that never came does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from .errors import HubFailed, Usage
from .hub import LOGIN_TO_WRITE, Remote, Repo


class Addition(NamedTuple):
    """A file to commit. content: where it lies, or its bytes"""

    name: str
    content: str | bytes


class WritableRepo(Repo):
    """A repository, and the branch of it that is written to."""

    login = LOGIN_TO_WRITE

    def __init__(self, name: str) -> None:
        """raises Usage, HubFailed without a token"""
        super().__init__(name)
        if not self.has_token:
            raise HubFailed(
                "there is no token of the Hub on this machine",
                expected="a login, or HF_TOKEN",
                do=LOGIN_TO_WRITE,
            )

    def user(self) -> str:
        """Whose token it is. raises HubFailed"""
        return str(self.tried("asking whose token it is", self.api.whoami)["name"])

    def require_card(self, text: str) -> None:
        """Let the Hub read a model card's metadata. raises Usage, HubFailed"""
        body = {"content": text, "repoType": "model"}
        answer = self.tried(
            "checking the model card", lambda: self.request("POST", "validate-yaml", body, {400})
        )
        if answer.status_code == 400:
            said = answer.json()
            errors = said.get("errors") or [{"message": said.get("error")}]
            found = "; ".join(str(item.get("message")) for item in errors)
            raise Usage(
                "the Hub does not accept the model card",
                file="README.md",
                found=repr(self.harmless(found)),
                do="mend the lines between the two --- at its beginning",
            )

    def create(self, *, private: bool) -> bool:
        """Make the repository unless it is there; whether it was made. raises Usage, HubFailed

        private  one that is there must be private as well
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        def create() -> bool:
            try:
                info = self.api.repo_info(self.name)
            except RepositoryNotFoundError:
                self.api.create_repo(self.name, private=private, exist_ok=True)
                return True
            if private and not info.private:
                raise Usage(
                    f"{self.name} is there already, and public",
                    do="make it private in its settings, or leave --private out",
                )
            return False

        return self.tried("creating the repository", create)

    def require_write(self) -> None:
        """raises HubFailed if the token may not write here"""
        self.tried(
            "asking for write access",
            lambda: self.request("GET", f"models/{self.name}/auth-check/write"),
        )

    def take_branch(self, branch: str) -> None:
        """Write to this branch from now on; it is made from main if it is not there. raises HubFailed"""
        self.tried(
            "creating the branch", lambda: self.api.create_branch(self.name, branch=branch, exist_ok=True)
        )
        self.revision = branch

    def take_pull_request(self, title: str, user: str) -> int:
        """Write to a pull request from now on: to the user's open one of this title, or a new one. raises HubFailed"""

        def take() -> int:
            for item in self.api.get_repo_discussions(self.name):
                is_open = item.is_pull_request and item.status in ("draft", "open")
                if is_open and item.title == title and item.author == user:
                    return int(item.num)
            return int(self.api.create_pull_request(self.name, title, description="See the model card.").num)

        number = self.tried("opening a pull request", take)
        self.revision = f"refs/pr/{number}"
        return number

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
                self.api.preupload_lfs_files(self.name, [add], revision=self.revision)
                on_sent(add.path_in_repo)
            operations: list[Any] = [*adds, *(CommitOperationDelete(name) for name in deletions)]
            if operations:
                self.api.create_commit(self.name, operations, commit_message=message, revision=self.revision)

        self.tried("sending files", attempt)
