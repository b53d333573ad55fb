"""A small server of the Hugging Face hub's API: as much of it as huggingface_hub 2.4 calls to push, pull and read.

Repositories, their branches and commits are kept in memory; a commit is a dict of name -> contents. Files that are no
UTF-8 go through LFS, others into the commit, as on the hub.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_a-secret-that-nobody-may-print"
USER = "user"
PAGE = 7  # files in one page of a listing

Files = dict[str, bytes]


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    """Hash -> name -> contents."""
    branches: dict[str, str] = field(default_factory=dict)
    """Name -> hash of its newest commit."""

    def commit(self, branch: str, files: Files) -> str:
        sums = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())
        oid = hashlib.sha1(f"{len(self.commits)} {sums}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.branches.get(revision, revision)]


class Refused(Exception):
    """An answer other than 200: the status, the message, the hub's code of the error, and more of its document."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


class Hub:
    """The state of the server, which tests look into and spoil."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        """SHA-256 -> contents of LFS."""
        self.requests: list[str] = []
        self.tokens = {TOKEN: USER}
        self.refusal: Refused | None = None
        """The answer to every request."""

    def repository(self, repo_id: str, kind: str = "dataset") -> Repository:
        return self.repositories[kind, repo_id]


class Handler(BaseHTTPRequestHandler):
    """Finds the method whose pattern fits the request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Server"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, self.query = url.path, parse_qs(url.query)
        self.body = self._read_body()
        hub = self.server.hub
        hub.requests.append(f"{self.command} {unquote(path)}")
        try:
            if hub.refusal is not None:
                raise hub.refusal
            for command, pattern, method in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in command:
                    answer = method(self, *map(unquote, found.groups("")))
                    break
            else:
                raise Refused(404, f"the fake hub has no {self.command} {path}")
        except Refused as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self._send(error.status, json.dumps({"error": str(error), **error.more}).encode(), headers)
            return
        if isinstance(answer, tuple):
            self._send(200, *answer)
        else:
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.server.hub.tokens.get(token)

    def _repository(self, kind: str, repo_id: str, *, write: bool = False) -> Repository:
        repository, user = self.server.hub.repositories.get((kind, repo_id)), self._user()
        if repository is None or (repository.private and user is None):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user != repo_id.partition("/")[0]:
            raise Refused(403, "you must not write here")
        return repository

    @staticmethod
    def _oid(repository: Repository, revision: str) -> str:
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        return oid

    def create(self) -> Any:
        asked, user = json.loads(self.body), self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        owner = asked.get("organization") or user
        if owner != user:
            raise Refused(403, f"You don't have the rights to create a repository under the namespace {owner}")
        kind, repo_id = asked.get("type", "model"), f"{owner}/{asked['name']}"
        url = f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        if (kind, repo_id) in self.server.hub.repositories:
            raise Refused(409, "You already created this repo", url=url)
        repository = Repository(private=asked.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.bin filter=lfs\n"})
        self.server.hub.repositories[kind, repo_id] = repository
        return {"url": url}

    def validate(self) -> Any:
        content = json.loads(self.body)["content"]
        license = re.search(r"^license: (.*)$", content, re.MULTILINE)
        if not content.startswith("---\n") or (license and license[1] not in ("mit", "cc-by-4.0")):
            raise Refused(400, "Invalid", errors=[{"message": '"license" must be one of those known'}])
        return {"errors": [], "warnings": []}

    def info(self, kind: str, repo_id: str, revision: str = "main") -> Any:
        repository = self._repository(kind, repo_id)
        return {"id": repo_id, "sha": self._oid(repository, revision), "private": repository.private}

    def tree(self, kind: str, repo_id: str, revision: str, folder: str) -> Any:
        repository = self._repository(kind, repo_id)
        oid = self._oid(repository, revision)
        start, recursive = int(self.query.get("cursor", ["0"])[0]), self.query.get("recursive") == ["true"]
        under = f"{folder}/" if folder else ""
        files = {name: data for name, data in repository.commits[oid].items() if name.startswith(under)}
        folders = {str(parent) for name in files for parent in PurePosixPath(name).parents} - {"."}
        entries = [
            {"type": "directory", "path": name, "oid": "0", "size": 0}
            for name in sorted(folders)
            if name.startswith(under)
        ]
        entries += [self._entry(name, data) for name, data in sorted(files.items())]
        if not recursive:
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(under)]
        more = {}
        if start + PAGE < len(entries):
            url = (
                f"{self.server.url}{urlsplit(self.path).path}?recursive={str(recursive).lower()}&cursor={start + PAGE}"
            )
            more = {"Link": f'<{url}>; rel="next"'}
        return json.dumps(entries[start : start + PAGE]).encode(), {"Content-Type": "application/json", **more}

    @staticmethod
    def _entry(name: str, data: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # of a file in LFS, git knows another one
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {"type": "file", "path": name, "size": len(data), "oid": oid} | ({} if _is_text(data) else {"lfs": lfs})

    def paths_info(self, kind: str, repo_id: str, revision: str) -> Any:
        repository = self._repository(kind, repo_id)
        files = repository.commits[self._oid(repository, revision)]
        names = parse_qs(self.body.decode())["paths"]
        return [self._entry(name, files[name]) for name in names if name in files]

    def branch(self, kind: str, repo_id: str, name: str) -> Any:
        repository = self._repository(kind, repo_id, write=True)
        repository.branches[name] = repository.branches["main"]
        return {}

    def preupload(self, kind: str, repo_id: str, revision: str) -> Any:
        repository = self._repository(kind, repo_id, write=True)
        files = repository.commits[self._oid(repository, revision)]
        asked = json.loads(self.body)
        ignored = (asked.get("gitIgnore") or files.get(".gitignore", b"").decode()).split()
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "regular" if _is_text(base64.b64decode(file["sample"])) else "lfs",
                    "shouldIgnore": file["path"] in ignored,
                }
                for file in asked["files"]
            ]
        }

    def batch(self, repo: str) -> Any:
        kind, repo_id = ("dataset", repo.removeprefix("datasets/")) if repo.startswith("datasets/") else ("model", repo)
        self._repository(kind, repo_id, write=True)
        objects = []
        for it in json.loads(self.body)["objects"]:
            known = it["oid"] in self.server.hub.objects
            upload = {"upload": {"href": f"{self.server.url}/lfs/{it['oid']}", "header": {}}}
            objects.append({**it, **({} if known else {"actions": upload})})
        return {"transfer": "basic", "objects": objects}

    def store_object(self, oid: str) -> Any:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.hub.objects[oid] = self.body
        return {}

    def commit(self, kind: str, repo_id: str, revision: str) -> Any:
        repository = self._repository(kind, repo_id, write=True)
        head = self._oid(repository, revision)
        files = dict(repository.commits[head])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit", head) != head:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(revision, files)
        url = f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{repo_id}/commit/{oid}"
        return {"commitUrl": url, "commitOid": oid}

    def resolve(self, repo: str, revision: str, name: str) -> Any:
        kind, repo_id = ("dataset", repo.removeprefix("datasets/")) if repo.startswith("datasets/") else ("model", repo)
        repository = self._repository(kind, repo_id)
        oid = self._oid(repository, revision)
        if name not in repository.commits[oid]:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data = repository.commits[oid][name]
        return data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": oid}


def _is_text(sample: bytes) -> bool:
    try:
        sample.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in sample


_API = r"/api/(model|dataset)s/([^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", _API, Handler.info),
    ("GET", _API + "/revision/([^/]+)", Handler.info),
    ("GET", _API + "/tree/([^/]+)(?:/([^/]+))?", Handler.tree),
    ("POST", _API + "/paths-info/([^/]+)", Handler.paths_info),
    ("POST", _API + "/branch/([^/]+)", Handler.branch),
    ("POST", _API + "/preupload/([^/]+)", Handler.preupload),
    ("POST", _API + "/commit/([^/]+)", Handler.commit),
    ("POST", r"/((?:datasets/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/([0-9a-f]{64})", Handler.store_object),
    ("GET HEAD", "/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
]


class Server(ThreadingHTTPServer):
    """The server, on a port of its own, as long as the context lasts."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = Hub()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
