"""A small Hub on this machine, which the unpatched huggingface_hub client talks to: models, LFS storage, no xet.

    python tests/hub/server.py          serves until it is stopped; the first line is what HF_ENDPOINT has to be
      --seed OWNER/NAME=DIR             with a repository of the directory's files; can be said again

Owns repositories as values in memory, a record of every request, and faults that tests order.  Files are what a client
needs to create, upload, list and fetch.  Source: the routes as huggingface_hub 1.0 and 2.4 call them; Git LFS (batch).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

OWNER, OWNERS_TOKEN = "tester", "hf_LocalHubOwner0123456789"
READER, READERS_TOKEN = "reader", "hf_LocalHubReader0123456789"
SIGNATURE = "f1e2d3c4b5a6"  # in every address of the storage: no client may show it
MAX_REGULAR_BYTES = 100_000  # larger files, and shards, are kept by LFS
_API = r"/api/models/(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"  # clients quote the slashes of other names


class Entry(NamedTuple):
    """A file in a commit: by its content if git keeps it, else by its SHA-256."""

    size: int
    git_blob: str
    sha256: str | None
    content: bytes | None


@dataclass
class Commit:
    """What a branch showed after a commit."""

    oid: str
    title: str
    files: dict[str, Entry]


@dataclass
class Repo:
    """A model's repository: its branches, each a list of commits, the oldest first."""

    private: bool
    branches: dict[str, list[Commit]]
    requests: list[dict[str, Any]] = field(default_factory=list)  # pull requests
    gated: bool = False  # everybody sees it and its list of files; the owner alone reads them
    tags: dict[str, str] = field(default_factory=dict)  # name -> the commit's oid

    def files(self, branch: str = "main") -> dict[str, Entry]:
        return self.branches[branch][-1].files

    def commit(self, revision: str) -> Commit | None:
        """What a branch, a tag, refs/pr/N or any commit's oid shows; none if there is no such thing."""
        if revision in self.branches:
            return self.branches[revision][-1]
        oid = self.tags.get(revision, revision)
        history = (commit for commits in self.branches.values() for commit in commits)
        return next((commit for commit in history if commit.oid == oid), None)


@dataclass
class Fault:
    """What goes wrong with the next `count` requests of this kind.

    what  a status, with these headers; `mute`: done, but the answer never comes
          of what comes in   `drop`: the connection ends amid the body; `truncate`: half of the body is kept and called
                             good; `wrong sha`: the commit takes another id for its first LFS file
          of any answer      `drop body`: its headers and half of its body come, then the connection ends
          of a file's bytes  `short`: half of them, called all that was asked for; `wrong bytes`: one is another;
                             `no range`: all of them, with 200, whatever was asked for
    An LFS file's bytes come from GET /storage/..., to which GET .../resolve/... only points.
    """

    method: str
    path: str  # a pattern, searched
    what: int | str
    count: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Request(NamedTuple):
    """A request as it came."""

    method: str
    path: str
    num_bytes: int  # of its body


class Fetch(NamedTuple):
    """Bytes of an LFS file that the storage began to send."""

    oid: str
    begin: int
    num_bytes: int


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, **headers}
        self.headers |= {"X-Error-Code": code} if code else {}


class Hub:
    """What the server knows. Tests read it, and order faults."""

    def __init__(self, part_bytes: int = 1_000_000) -> None:
        self.part_bytes = part_bytes  # larger files are sent in parts
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.fetches: list[Fetch] = []
        self.on_request: Callable[[Request], None] = lambda request: None
        self.lock = threading.RLock()
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://{'127.0.0.1'}:{self.port}"

    def storage(self, path: str) -> str:
        """An address of the storage: another host name, as the client expects."""
        return f"http://{'localhost'}:{self.port}/storage/{path}?X-Amz-Signature={SIGNATURE}"

    def sent(self) -> int:
        """Bytes of files that came in through the storage."""
        return sum(item.num_bytes for item in self.requests if item.path.startswith("/storage/"))

    @property
    def fetched(self) -> int:
        """Bytes of files that left the storage; a client that hangs up early is said to have had all it asked for."""
        return sum(item.num_bytes for item in self.fetches)

    def count(self, method: str, path: str) -> int:
        return sum(item.method == method and bool(re.search(path, item.path)) for item in self.requests)

    def fault(self, method: str, path: str) -> Fault | None:
        """The next fault that was ordered for such a request, used up."""
        with self.lock:
            for item in self.faults:
                if item.count and item.method == method and re.search(item.path, path):
                    item.count -= 1
                    return item
        return None

    def seed(
        self,
        name: str,
        directory: Path,
        *,
        private: bool = False,
        gated: bool = False,
        branch: str = "main",
        title: str = "Add files",
    ) -> str:
        """Commit the files of a directory, and no others. returns the commit's oid

        A repository or branch that is not there is made; `private` and `gated` are of one that is made.
        """
        files, blobs = dict(FIRST_FILES), {}
        for file in directory.rglob("*"):
            if file.is_file():
                path, content = file.relative_to(directory).as_posix(), file.read_bytes()
                if is_lfs(path, len(content)):
                    sha256 = hashlib.sha256(content).hexdigest()
                    files[path], blobs[sha256] = lfs_entry(sha256, len(content)), content
                else:
                    files[path] = entry_of(content)
        with self.lock:
            self.blobs.update(blobs)
            repo = self.repos.setdefault(name, empty_repo(private=private, gated=gated))
            commits = repo.branches.setdefault(branch, repo.branches["main"][-1:])
            commits.append(Commit(secrets.token_hex(20), title, files))
            return commits[-1].oid

    def start(self, port: int = 0) -> None:
        self._listener = Listener(self, port)
        self.port = self._listener.server_address[1]
        self._listener.start()

    def restart(self, pause: float = 0) -> None:
        """Drop all connections and all parts of files that are not yet complete; listen again, `pause` seconds later.

        Repositories and blobs stay, and so does the port. Any thread may call it, that of `on_request` too.
        """
        self._listener.stop()
        with self.lock:
            self.parts.clear()
        self._listener = Listener(self, self.port)  # bound, so that nobody else gets the port meanwhile
        time.sleep(pause)
        self._listener.start()

    def stop(self) -> None:
        self._listener.stop()


class Listener(ThreadingHTTPServer):
    """The server from one start to the next stop."""

    daemon_threads = True
    request_queue_size = 128  # 5 would make some of many connections at once wait a second

    def __init__(self, hub: Hub, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler, bind_and_activate=False)
        self.server_bind()
        self.hub, self.is_stopped = hub, False
        self.connections: set[socket.socket] = set()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def start(self) -> None:
        self.server_activate()
        self.thread.start()

    def stop(self) -> None:
        """Nobody is listened to any more, and what is under way ends here: its answers never come."""
        self.shutdown()
        self.server_close()
        self.thread.join()
        with self.hub.lock:
            self.is_stopped = True
            still_open = list(self.connections)
        for connection in still_open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.hub.lock:
            self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.hub.lock:
            self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # else the client or a stop has ended the connection
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serving(part_bytes: int = 1_000_000, port: int = 0) -> Iterator[Hub]:
    """A Hub that answers while the block runs."""
    hub = Hub(part_bytes)
    hub.start(port)
    try:
        yield hub
    finally:
        hub.stop()


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def entry_of(content: bytes) -> Entry:
    return Entry(len(content), git_blob(content), None, content)


def lfs_entry(sha256: str, size: int) -> Entry:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Entry(size, git_blob(pointer.encode()), sha256, None)


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size > MAX_REGULAR_BYTES


FIRST_FILES = {".gitattributes": entry_of(b"*.safetensors lfs\n")}  # the Hub's own, in every new repository


def empty_repo(*, private: bool, gated: bool = False) -> Repo:
    first = Commit(secrets.token_hex(20), "initial commit", dict(FIRST_FILES))
    return Repo(private, {"main": [first]}, gated=gated)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Listener
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece, at once: else each one waits 40 ms for TCP
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = parts.path, parse_qs(parts.query)
        fault = self.hub.fault(self.command, self.path)
        if fault and fault.what == "drop":
            if int(self.headers.get("Content-Length", 0)):
                self.rfile.read1(1000)
            self._cut()
            return
        self.body = self._read_body()
        request = Request(self.command, self.path, len(self.body))
        with self.hub.lock:
            self.hub.requests.append(request)
        self.hub.on_request(request)
        if fault and fault.what == "truncate":
            self.body = self.body[: len(self.body) // 2]
        self.fault = fault
        try:
            if fault and isinstance(fault.what, int):
                raise Refused(fault.what, "a fault that the test ordered", **fault.headers)
            status, answer, headers = self._answer()
        except Refused as error:
            status, answer, headers = error.status, {"error": str(error)}, error.headers
        if fault and fault.what == "mute":
            self._cut()
            return
        self._send(status, answer, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self._exactly(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0] or b"-1", 16):  # no line: no more comes
            pieces.append(self._exactly(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _exactly(self, size: int) -> bytes:
        """The next bytes of the body. raises ConnectionError if they never come: half a request is none"""
        data = self.rfile.read(max(size, 0))
        if len(data) != size:
            raise ConnectionError("the client hung up amid the body")
        return data

    def _send(self, status: int, answer: Any, headers: dict[str, str]) -> None:
        data = answer if isinstance(answer, bytes | memoryview) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        is_cut = self.fault is not None and self.fault.what == "drop body"
        data = data[: len(data) // 2] if is_cut else data
        if self.command == "GET" and status in (200, 206) and self.route.startswith("/storage/"):
            with self.hub.lock:  # before the client can have them, who may look at once
                self.hub.fetches.append(Fetch(self.route.split("/")[2], self.begin, len(data)))
        self.wfile.write(data)
        if is_cut:
            self.wfile.flush()
            self._cut()

    # ---- routes

    def _answer(self) -> tuple[int, Any, dict[str, str]]:
        for method, pattern, respond in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in method.split():
                named = {key: unquote(value) for key, value in match.groupdict(default="").items()}
                with self.hub.lock:
                    if self.server.is_stopped:
                        raise ConnectionError("the server was stopped before it came to this request")
                    found = respond(self, **named)
                return found if isinstance(found, tuple) else (200, found, {})
        raise Refused(404, "there is no such route")

    @property
    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        users = {OWNERS_TOKEN: OWNER, READERS_TOKEN: READER}
        if token and token not in users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return users.get(token)

    def repo(self, name: str, *, write: bool = False) -> Repo:
        """A repository that the caller may see, and change. raises Refused"""
        user, repo = self.user, self.hub.repos.get(name)
        if repo is None or (repo.private and user != OWNER):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != OWNER:
            raise Refused(403 if user else 401, "you are not allowed to write to this repository")
        return repo

    def branch(self, repo: Repo, name: str) -> list[Commit]:
        """What can be written to. raises Refused"""
        if name not in repo.branches:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        return repo.branches[name]

    def seen(self, repo: str, revision: str) -> Commit:
        """What a revision shows to who may see the repository. raises Refused"""
        commit = self.repo(repo).commit(revision)
        if commit is None:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        return commit

    def require_access(self, repo: str) -> None:
        """raises Refused, with the Hub's own words, if the caller may see the repository and not read its files"""
        user = self.user
        if not self.repo(repo).gated or user == OWNER:
            return
        message = f"Access to model {repo} is restricted"
        if user is None:
            message += ". You must have access to it and be authenticated to access it. Please log in."
            raise Refused(401, message, "GatedRepo")
        message += " and you are not in the authorized list. "
        raise Refused(403, message + f"Visit {self.hub.endpoint}/{repo} to ask for access.", "GatedRepo")

    def whoami(self) -> Any:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        return {"type": "user", "name": self.user, "orgs": []}

    def validate_yaml(self) -> Any:
        text = json.loads(self.body)["content"]
        if not re.match(r"---\n(?:[\w-]+:.*\n|- .*\n| .*\n)*---\n", text):
            return 400, {"errors": [{"message": "the metadata is no YAML"}], "warnings": []}, {}
        return {"errors": [], "warnings": []}

    def create_repo(self) -> Any:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if name.split("/")[0] != self.user or self.user != OWNER:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {name!r}")
        url = {"url": f"{self.hub.endpoint}/{name}", "id": name}
        if name in self.hub.repos:
            return 409, {"error": "You already created this model repo", **url}, {}
        self.hub.repos[name] = empty_repo(private=private)
        return url

    def repo_info(self, repo: str, revision: str = "main") -> Any:
        commit, found = self.seen(repo, revision), self.repo(repo)
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        about: dict[str, Any] = {
            "private": found.private,
            "gated": "manual" if found.gated else False,
            "tags": [],
        }
        return about | {"id": repo, "modelId": repo, "sha": commit.oid, "siblings": siblings}

    def may_write(self, repo: str) -> Any:
        self.repo(repo, write=True)
        return {}

    def may_read(self, repo: str) -> Any:
        self.require_access(repo)
        return {}

    def tree(self, repo: str, revision: str, path: str = "") -> Any:
        """Files and folders in pages of ten, as the client has to be able to turn them."""
        recursive = self.query.get("recursive", [""])[0].lower() == "true"
        rows = _rows(self.seen(repo, revision).files, f"{path}/" if path else "", recursive=recursive)
        if path and not rows:
            raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        begin = int(self.query.get("cursor", ["0"])[0])
        if begin + 10 >= len(rows):
            return rows[begin:]
        following = f"{self.hub.endpoint}{self.route}?recursive={recursive}&cursor={begin + 10}"
        return 200, rows[begin : begin + 10], {"Link": f'<{following}>; rel="next"'}

    def paths_info(self, repo: str, revision: str) -> Any:
        files, asked = self.seen(repo, revision).files, parse_qs(self.body.decode()).get("paths", [])
        return [_row(name, files[name]) for name in asked if name in files]

    def refs(self, repo: str) -> Any:
        found = self.repo(repo)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].oid}
            for name, commits in found.branches.items()
            if not name.startswith("refs/")
        ]
        tags = [
            {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": at} for tag, at in found.tags.items()
        ]
        return {"branches": branches, "converts": [], "tags": tags}

    def create_branch(self, repo: str, name: str) -> Any:
        found = self.repo(repo, write=True)
        if name in found.branches:
            raise Refused(409, f"Reference already exists: refs/heads/{name}")
        found.branches[name] = found.branches["main"][-1:]
        return 201, {}, {}

    def preupload(self, repo: str, revision: str) -> Any:
        found = self.repo(repo, write=not revision.startswith("refs/pr/"))
        present = self.branch(found, revision)[-1].files
        rows = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            entry = present.get(file["path"])
            row = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            rows.append(row | ({"oid": entry.sha256 or entry.git_blob} if entry else {}))
        return {"files": rows}

    def lfs_batch(self, repo: str) -> Any:
        self.repo(repo)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        asked = json.loads(self.body)["objects"]
        objects = [self._instructions(repo, item["oid"], item["size"]) for item in asked]
        return {"transfer": "basic", "objects": objects}

    def _instructions(self, repo: str, oid: str, size: int) -> dict[str, Any]:
        if oid in self.hub.blobs:
            return {"oid": oid, "size": size}
        verify = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/objects/verify", "header": {}}
        if size <= self.hub.part_bytes:
            actions = {"upload": {"href": self.hub.storage(oid)}, "verify": verify}
            return {"oid": oid, "size": size, "actions": actions}
        count = -(-size // self.hub.part_bytes)
        header = {f"{part:05d}": self.hub.storage(f"{oid}/{part}") for part in range(1, count + 1)}
        header["chunk_size"] = str(self.hub.part_bytes)
        upload = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/objects/complete", "header": header}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def put(self, oid: str, part: str = "") -> Any:
        """The storage trusts what it gets; `verify` does not."""
        self.hub.parts[oid, int(part or 1)] = self.body
        if not part:
            self._keep(oid, [1])
        return 200, b"", {"ETag": hashlib.sha256(self.body).hexdigest()[:32]}

    def complete(self, repo: str) -> Any:
        asked = json.loads(self.body)
        self._keep(asked["oid"], [row["partNumber"] for row in asked["parts"]])
        return {}

    def _keep(self, oid: str, parts: list[int]) -> None:
        if any((oid, part) not in self.hub.parts for part in parts):
            raise Refused(400, "one or more of the parts could not be found")
        whole = b"".join(self.hub.parts.pop((oid, part)) for part in parts)
        if hashlib.sha256(whole).hexdigest() == oid:
            self.hub.blobs[oid] = whole

    def verify(self, repo: str) -> Any:
        asked = json.loads(self.body)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(422, "the uploaded object is not what its id says")
        return {}

    def commit(self, repo: str, revision: str) -> Any:
        found = self.repo(repo, write=not revision.startswith("refs/pr/"))
        commits = self.branch(found, revision)
        files, title = dict(commits[-1].files), ""
        wrong = self.fault is not None and self.fault.what == "wrong sha"
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, commits[-1].oid):
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = entry_of(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(400, "a commit refers to an LFS object that is not there")
                files[value["path"]] = lfs_entry("0" * 64 if wrong else value["oid"], value["size"])
                wrong = False
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
        commits.append(Commit(secrets.token_hex(20), title, files))
        url = f"{self.hub.endpoint}/{repo}/commit/{commits[-1].oid}"
        return {"success": True, "commitOid": commits[-1].oid, "commitUrl": url, "hookOutput": ""}

    def discussions(self, repo: str) -> Any:
        rows = self.repo(repo).requests
        return {"count": len(rows), "start": 0, "discussions": rows}

    def discuss(self, repo: str) -> Any:
        found, asked = self.repo(repo), json.loads(self.body)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        number = len(found.requests) + 1
        row = {
            "num": number,
            "title": asked["title"],
            "isPullRequest": asked["pullRequest"],
            "status": "draft",
        }
        row |= {"author": {"name": self.user}, "repo": {"name": repo, "type": "model"}}
        found.requests.append(row | {"createdAt": "2026-01-01T00:00:00.000Z"})
        found.branches[f"refs/pr/{number}"] = found.branches["main"][-1:]
        return found.requests[-1]

    def discussion(self, repo: str, number: str) -> Any:
        row = self.repo(repo).requests[int(number) - 1]
        changes = {"base": "refs/heads/main", "mergeCommitId": None}
        return row | {"events": [], "filesWithConflicts": [], "changes": changes, "diff": ""}

    def resolve(self, repo: str, revision: str, path: str) -> Any:
        self.require_access(repo)
        commit = self.seen(repo, revision)
        entry = commit.files.get(path)
        if entry is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.oid}
        if entry.sha256 is not None:
            headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
            return 302, b"", headers | {"Location": self.hub.storage(entry.sha256)}
        assert entry.content is not None
        return self._ranged(entry.content, headers | {"ETag": f'"{entry.git_blob}"'})

    def fetch(self, oid: str) -> Any:
        if "Authorization" in self.headers:
            raise Refused(400, "a signed address takes no token, and nobody else's storage may be told one")
        if oid not in self.hub.blobs:
            raise Refused(404, "there is no such object")
        return self._ranged(self.hub.blobs[oid], {"ETag": f'"{oid}"'})

    def _ranged(self, content: bytes, headers: dict[str, str]) -> Any:
        """What was asked for of a file, which is not copied; or what a fault makes of it."""
        what, size = self.fault and self.fault.what, len(content)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if what == "no range":
            match = None
        begin, end = (int(match[1]), min(int(match[2] or size) + 1, size)) if match else (0, size)
        if match and begin >= size:
            raise Refused(416, "the range lies behind the end", **{"Content-Range": f"bytes */{size}"})
        if what == "short":
            end = begin + (end - begin) // 2
        self.begin, piece = begin, memoryview(content)[begin:end]
        if what == "wrong bytes" and piece:
            changed = bytearray(piece)
            changed[len(changed) // 2] ^= 1
            piece = memoryview(changed)
        if match is None:
            return 200, piece, headers | {"Accept-Ranges": "bytes"}
        return 206, piece, headers | {"Content-Range": f"bytes {begin}-{end - 1}/{size}"}


def _rows(files: dict[str, Entry], below: str, *, recursive: bool) -> list[dict[str, Any]]:
    """What a listing shows of a folder; folders are rows too. below: its path with a slash, or nothing"""
    rows = {}
    for name, entry in files.items():
        if name.startswith(below):
            rows[name] = _row(name, entry)
            for slash in re.finditer("/", name[len(below) :]):
                folder = name[: len(below) + slash.start()]
                oid = hashlib.sha1(folder.encode(), usedforsecurity=False).hexdigest()
                rows[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
    return [rows[name] for name in sorted(rows) if recursive or "/" not in name[len(below) :]]


def _row(name: str, entry: Entry) -> dict[str, Any]:
    row = {"type": "file", "path": name, "size": entry.size, "oid": entry.git_blob}
    if entry.sha256 is None:
        return row
    return row | {"lfs": {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}}


_ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("GET", _API, Handler.repo_info),
    ("GET", _API + "/revision/" + _REVISION, Handler.repo_info),
    ("GET", _API + "/auth-check", Handler.may_read),
    ("GET", _API + "/auth-check/write", Handler.may_write),
    ("GET", _API + "/tree/" + _REVISION + "(?:/(?P<path>.+))?", Handler.tree),
    ("POST", _API + "/paths-info/" + _REVISION, Handler.paths_info),
    ("GET", _API + "/refs", Handler.refs),
    ("POST", _API + "/branch/(?P<name>.+)", Handler.create_branch),
    ("POST", _API + "/preupload/" + _REVISION, Handler.preupload),
    ("POST", _API + "/commit/" + _REVISION, Handler.commit),
    ("GET", _API + "/discussions", Handler.discussions),
    ("POST", _API + "/discussions", Handler.discuss),
    ("GET", _API + r"/discussions/(?P<number>\d+)", Handler.discussion),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/complete", Handler.complete),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/verify", Handler.verify),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", Handler.put),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", Handler.put),
    ("GET HEAD", r"/storage/(?P<oid>[0-9a-f]{64})", Handler.fetch),
    ("GET HEAD", rf"/(?P<repo>[^/]+/[^/]+)/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="A small Hub on this machine; see docs/hub.md.")
    parser.add_argument("--seed", action="append", default=[], metavar="OWNER/NAME=DIR")
    seeds = [given.partition("=") for given in parser.parse_args().seed]
    if not all(re.fullmatch("[^/]+/[^/]+", name) and Path(at).is_dir() for name, _, at in seeds):
        parser.error("--seed takes OWNER/NAME=DIR, and DIR has to be there")
    with serving() as hub:
        for name, _, at in seeds:
            hub.seed(name, Path(at))
        print(hub.endpoint, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
