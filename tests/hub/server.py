"""A small Hub on this machine, which the unpatched huggingface_hub client talks to: models, LFS storage, no xet.

    python tests/hub/server.py          serves until it is stopped; the first line is what HF_ENDPOINT has to be

Owns repositories as values in memory, a record of every request, and faults that tests order.  Files are what a client
needs to create, upload, list and fetch.  Source: the routes as huggingface_hub 1.0 and 2.4 call them; Git LFS (batch).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

OWNER, OWNERS_TOKEN = "tester", "hf_LocalHubOwner0123456789"
READER, READERS_TOKEN = "reader", "hf_LocalHubReader0123456789"
SIGNATURE = "f1e2d3c4b5a6"  # in every address of the storage: no client may show it
MAX_REGULAR_BYTES = 100_000  # larger files, and shards, are kept by LFS
_API = r"/api/models/(?P<repo>[^/]+/[^/]+)"


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

    def files(self, branch: str = "main") -> dict[str, Entry]:
        return self.branches[branch][-1].files


@dataclass
class Fault:
    """What goes wrong with the next `count` requests of this kind.

    what  a status; `drop`: the connection ends amid the body; `truncate`: half of the body is kept and called good;
          `wrong sha`: the commit takes another id for its first LFS file; `mute`: done, but the answer never comes
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


class Refused(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


class Hub:
    """What the server knows. Tests read it, and order faults."""

    def __init__(self, part_bytes: int = 1_000_000) -> None:
        self.part_bytes = part_bytes  # larger files are sent in parts
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
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


@contextlib.contextmanager
def serving(part_bytes: int = 1_000_000, port: int = 0) -> Iterator[Hub]:
    """A Hub that answers while the block runs."""
    hub = Hub(part_bytes)
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def entry_of(content: bytes) -> Entry:
    return Entry(len(content), git_blob(content), None, content)


def lfs_entry(sha256: str, size: int) -> Entry:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Entry(size, git_blob(pointer.encode()), sha256, None)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece, at once: else each one waits 40 ms for TCP
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        fault = self.hub.fault(self.command, self.path)
        if fault and fault.what == "drop":
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
                raise Refused(fault.what, "a fault that the test ordered", headers=fault.headers)
            status, answer, headers = self._answer()
        except Refused as error:
            status, answer = error.status, {"error": str(error)}
            headers = {"X-Error-Message": str(error), **error.headers}
            headers |= {"X-Error-Code": error.code} if error.code else {}
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
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _send(self, status: int, answer: Any, headers: dict[str, str]) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("Content-Length", str(len(data))))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- routes

    def _answer(self) -> tuple[int, Any, dict[str, str]]:
        for method, pattern, respond in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in method.split():
                with self.hub.lock:
                    found = respond(self, **match.groupdict())
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

    def branch(self, repo: Repo, revision: str) -> list[Commit]:
        for commits in repo.branches.values():
            if commits[-1].oid == revision:
                return commits
        if revision not in repo.branches:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        return repo.branches[revision]

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
        first = Commit(
            secrets.token_hex(20), "initial commit", {".gitattributes": entry_of(b"*.safetensors lfs\n")}
        )
        self.hub.repos[name] = Repo(private, {"main": [first]})
        return url

    def repo_info(self, repo: str, revision: str = "main") -> Any:
        found = self.repo(repo)
        commit = self.branch(found, revision)[-1]
        names = [{"rfilename": name} for name in sorted(commit.files)]
        return {
            "id": repo,
            "modelId": repo,
            "sha": commit.oid,
            "private": found.private,
            "siblings": names,
            "tags": [],
        }

    def may_write(self, repo: str) -> Any:
        self.repo(repo, write=True)
        return {}

    def may_read(self, repo: str) -> Any:
        self.repo(repo)
        return {}

    def tree(self, repo: str, revision: str) -> Any:
        """All files in pages of ten, as the client has to be able to turn them."""
        files = sorted(self.branch(self.repo(repo), revision)[-1].files.items())
        begin = int(self.query.get("cursor", ["0"])[0])
        rows = [_row(name, entry) for name, entry in files[begin : begin + 10]]
        if begin + 10 >= len(files):
            return rows
        following = f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive=True&cursor={begin + 10}"
        return 200, rows, {"Link": f'<{following}>; rel="next"'}

    def paths_info(self, repo: str, revision: str) -> Any:
        files = self.branch(self.repo(repo), revision)[-1].files
        return [
            _row(name, files[name]) for name in parse_qs(self.body.decode()).get("paths", []) if name in files
        ]

    def refs(self, repo: str) -> Any:
        branches = self.repo(repo).branches.items()
        rows = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].oid}
            for name, commits in branches
            if not name.startswith("refs/")
        ]
        return {"branches": rows, "converts": [], "tags": []}

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
            is_lfs = file["path"].endswith(".safetensors") or file["size"] > MAX_REGULAR_BYTES
            entry = present.get(file["path"])
            row = {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            rows.append(row | ({"oid": entry.sha256 or entry.git_blob} if entry else {}))
        return {"files": rows}

    def lfs_batch(self, repo: str) -> Any:
        self.repo(repo)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        asked = json.loads(self.body)["objects"]
        return {
            "transfer": "basic",
            "objects": [self._instructions(repo, item["oid"], item["size"]) for item in asked],
        }

    def _instructions(self, repo: str, oid: str, size: int) -> dict[str, Any]:
        if oid in self.hub.blobs:
            return {"oid": oid, "size": size}
        verify = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/objects/verify", "header": {}}
        if size <= self.hub.part_bytes:
            return {
                "oid": oid,
                "size": size,
                "actions": {"upload": {"href": self.hub.storage(oid)}, "verify": verify},
            }
        count = -(-size // self.hub.part_bytes)
        header = {f"{part:05d}": self.hub.storage(f"{oid}/{part}") for part in range(1, count + 1)}
        header["chunk_size"] = str(self.hub.part_bytes)
        upload = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/objects/complete", "header": header}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def put(self, oid: str, part: str | None = None) -> Any:
        """The storage trusts what it gets; `verify` does not."""
        self.hub.parts[oid, int(part or 1)] = self.body
        if part is None:
            self._keep(oid, [1])
        return 200, b"", {"ETag": hashlib.sha256(self.body).hexdigest()[:32]}

    def complete(self, repo: str) -> Any:
        asked = json.loads(self.body)
        self._keep(asked["oid"], [row["partNumber"] for row in asked["parts"]])
        return {}

    def _keep(self, oid: str, parts: list[int]) -> None:
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
        found.requests.append(
            {
                "num": number,
                "title": asked["title"],
                "status": "draft",
                "author": {"name": self.user},
                "repo": {"name": repo, "type": "model"},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "isPullRequest": asked["pullRequest"],
            }
        )
        found.branches[f"refs/pr/{number}"] = found.branches["main"][-1:]
        return found.requests[-1]

    def discussion(self, repo: str, number: str) -> Any:
        row = self.repo(repo).requests[int(number) - 1]
        changes = {"base": "refs/heads/main", "mergeCommitId": None}
        return row | {"events": [], "filesWithConflicts": [], "changes": changes, "diff": ""}

    def resolve(self, repo: str, revision: str, path: str) -> Any:
        commit = self.branch(self.repo(repo), revision)[-1]
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
        if oid not in self.hub.blobs:
            raise Refused(404, "there is no such object")
        return self._ranged(self.hub.blobs[oid], {"ETag": f'"{oid}"'})

    def _ranged(self, content: bytes, headers: dict[str, str]) -> Any:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 200, content, headers | {"Content-Length": str(len(content)), "Accept-Ranges": "bytes"}
        begin, end = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
        if begin >= len(content):
            raise Refused(
                416, "the range lies behind the end", headers={"Content-Range": f"bytes */{len(content)}"}
            )
        piece = content[begin : end + 1]
        return 206, piece, headers | {"Content-Range": f"bytes {begin}-{end}/{len(content)}"}


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
    ("GET", _API + "/revision/(?P<revision>.+)", Handler.repo_info),
    ("GET", _API + "/auth-check", Handler.may_read),
    ("GET", _API + "/auth-check/write", Handler.may_write),
    ("GET", _API + "/tree/(?P<revision>.+)", Handler.tree),
    ("POST", _API + "/paths-info/(?P<revision>.+)", Handler.paths_info),
    ("GET", _API + "/refs", Handler.refs),
    ("POST", _API + "/branch/(?P<name>.+)", Handler.create_branch),
    ("POST", _API + "/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", _API + "/commit/(?P<revision>.+)", Handler.commit),
    ("GET", _API + "/discussions", Handler.discussions),
    ("POST", _API + "/discussions", Handler.discuss),
    ("GET", _API + r"/discussions/(?P<number>\d+)", Handler.discussion),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/complete", Handler.complete),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/verify", Handler.verify),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", Handler.put),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", Handler.put),
    ("GET HEAD", r"/storage/(?P<oid>[0-9a-f]{64})", Handler.fetch),
    (
        "GET HEAD",
        r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+|refs/pr/\d+)/(?P<path>.+)",
        Handler.resolve,
    ),
)


if __name__ == "__main__":
    with serving() as started:
        print(started.endpoint, flush=True)
        threading.Event().wait()
