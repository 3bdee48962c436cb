"""A stand-in for the Hugging Face hub: the endpoints that huggingface_hub uses to push and to load.

Written from what the client sends and expects (``_commit_api.py``, ``lfs.py``, ``hf_api.py``,
``file_download.py`` and ``_snapshot_download.py`` of huggingface_hub 2.4). Large files go by LFS:
Xet, the hub's other one, has a client in Rust, so tests set HF_HUB_DISABLE_XET. Nothing is kept on disk.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")


@dataclass
class Fault:
    """What goes wrong with the requests that match, so many times."""

    method: str
    path: str
    """Regular expression, searched in the path."""
    action: int | str | Callable[[], object]
    """A status to answer with; ``cut`` reads half of the body and hangs up, ``lose`` does the work first.
    A function is called, and the request then goes its way: something happens in between."""
    times: int = 1
    after: int = 0
    """Matching requests that are let through first."""
    message: str = "made to fail"
    code: str | None = None
    """The hub's X-Error-Code."""


@dataclass
class Repository:
    """One repository: commits, newest last."""

    private: bool = False
    card: dict[str, Any] = field(default_factory=dict)
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    """Digest, and every file by its path."""
    lfs: set[str] = field(default_factory=set)
    """Paths stored by LFS."""

    @property
    def head(self) -> str:
        """The newest commit."""
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        """What the newest commit holds."""
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision: main, or a digest."""
        return next((c for c in reversed(self.commits) if revision in ("main", c[0])), None)

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit that holds exactly these files."""
        listing = repr(
            [len(self.commits), sorted((k, hashlib.sha1(v).hexdigest()) for k, v in files.items())]
        )
        self.commits.append((hashlib.sha1(listing.encode()).hexdigest(), dict(files)))
        return self.head


class Hub:
    """The hub's state: users by token, repositories, large files, faults to come, and all requests so far."""

    def __init__(self) -> None:
        self.users = {"hf_" + "w" * 30: "ana"}
        self.readers = {"hf_" + "r" * 30: "ana"}
        """Tokens that may only read."""
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.url = ""

    @property
    def token(self) -> str:
        """One that may write as ana."""
        return next(iter(self.users))

    def add(self, name: str, files: dict[str, bytes] | None = None, **settings: Any) -> Repository:
        """A repository that is there already."""
        repository = Repository(**settings)
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})})
        repository.lfs |= {path for path in files or {} if path.endswith(LFS_SUFFIXES)}
        self.repositories[name] = repository
        return repository

    def fail(
        self, method: str, path: str, action: int | str | Callable[[], object], **settings: Any
    ) -> Fault:
        """Let matching requests go wrong."""
        self.faults.append(Fault(method, path, action, **settings))
        return self.faults[-1]

    def asked(self, method: str, path: str) -> int:
        """How many requests matched."""
        with self.lock:
            return sum(m == method and re.search(path, p) is not None for m, p in self.requests)

    def fault_for(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets; it is then used up once."""
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path) and fault.times > 0:
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on the loopback while the context is open; its address is ``hub.url``."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def git_oid(content: bytes) -> str:
    """The digest git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer of two packets waits 40 ms for the first one's receipt

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    ROUTES: tuple[tuple[str, str, str], ...] = (
        ("POST", r"/api/repos/create", "_create"),
        ("POST", r"/api/validate-yaml", "_validate_yaml"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "_info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "_tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "_preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "_commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "_batch"),
        ("PUT", r"/upload/([0-9a-f]{64})", "_put"),
        ("POST", r"/verify/([0-9a-f]{64})", "_verify"),
        ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "_resolve"),
        ("GET|HEAD", r"/cdn/([0-9a-f]{64})", "_cdn"),
    )

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        fault = self.hub.fault_for(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.action == "cut":
            self.rfile.read(length // 2)
            self._hang_up()
            return
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        self.body = self._chunks() if chunked else self.rfile.read(length)
        if fault is not None and isinstance(fault.action, int):
            self._error(fault.action, fault.message, fault.code)
            return
        if fault is not None and callable(fault.action):
            fault.action()
        self.is_lost = fault is not None and fault.action == "lose"
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                handle: Callable[..., None] = getattr(self, name)
                handle(*match.groups())
                return
        self._error(404, f"no such endpoint: {self.command} {path}")

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        if getattr(self, "is_lost", False):
            self._hang_up()
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        more = {"X_Error_Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self._send(status, body, Content_Type="application/json", X_Error_Message=message, **more)

    def _who(self, *, to_write: bool = False) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.hub.users.get(token) or (None if to_write else self.hub.readers.get(token))

    def _knows_token(self) -> bool:
        """False, and answered, for a token that is nobody's; a request without one is a stranger's."""
        if "Authorization" in self.headers and self._who() is None:
            self._error(401, "Invalid credentials in Authorization header")
            return False
        return True

    def _repository(self, name: str, *, to_write: bool = False) -> Repository | None:
        """The repository if the one who asks may see (and write) it; else None, and answered."""
        repository = self.hub.repositories.get(name)
        if not self._knows_token():
            return None
        is_own = self._who() == name.split("/")[0]
        if repository is None or (repository.private and not is_own):
            self._error(404 if self._who() else 401, "Repository not found", "RepoNotFound")
            return None
        if to_write and self._who(to_write=True) != name.split("/")[0]:
            self._error(403, "Forbidden: you must use a token with write access to this repository")
            return None
        return repository

    def _create(self) -> None:
        asked = json.loads(self.body)
        if self._who() is None:
            self._error(401, "Invalid credentials in Authorization header")
            return
        name = f"{asked['organization'] or self._who()}/{asked['name']}"
        if self._who(to_write=True) != name.split("/")[0]:
            self._error(403, f"You don't have the rights to create a model under the namespace {name}")
        elif name in self.hub.repositories:
            self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        else:
            self.hub.add(name, private=asked.get("visibility") == "private")
            self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _validate_yaml(self) -> None:
        import yaml

        content = json.loads(self.body)["content"]
        front = yaml.safe_load(content.split("---\n")[1])
        errors = [] if front.get("license", "mit").islower() else [{"message": '"license" must be one of …'}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _info(self, name: str, revision: str | None) -> None:
        if (repository := self._repository(name)) is None:
            return
        found = repository.at(revision or "main")
        if found is None:
            self._error(404, "Invalid rev id", "RevisionNotFound")
            return
        sha, files = found
        listed = [{"rfilename": path} for path in files]
        self._json(
            {"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": listed,
             "tags": [], "cardData": repository.card or None}
        )  # fmt: skip

    def _tree(self, name: str, revision: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        found = repository.at(revision)
        if found is None:
            self._error(404, "Invalid rev id", "RevisionNotFound")
            return
        entries = []
        for path, content in found[1].items():
            entry = {"type": "file", "oid": git_oid(content), "size": len(content), "path": path}
            if path in repository.lfs:
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def _preupload(self, name: str, revision: str) -> None:
        if (repository := self._repository(name, to_write=True)) is None:
            return
        there = (repository.at(revision) or ("", {}))[1]
        files = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            is_lfs = path.endswith(LFS_SUFFIXES) or asked["size"] > 10 * 1024**2
            old = there.get(path)
            oid = None
            if old is not None:
                oid = hashlib.sha256(old).hexdigest() if path in repository.lfs else git_oid(old)
            mode = "lfs" if is_lfs else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files, "commitOid": repository.head})

    def _batch(self, name: str) -> None:
        if self._repository(name, to_write=True) is None:
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/upload/{asked['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.url}/verify/{asked['oid']}"},
                }
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._error(400, "the content is not what was announced")
            return
        self.hub.blobs[oid] = self.body
        self._send(200, ETag=f'"{oid}"')

    def _verify(self, oid: str) -> None:
        asked = json.loads(self.body)
        is_there = oid in self.hub.blobs and len(self.hub.blobs[oid]) == asked["size"]
        self._json({}, 200 if is_there else 404)

    def _commit(self, name: str, _revision: str) -> None:
        if (repository := self._repository(name, to_write=True)) is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        with self.hub.lock:
            parent = lines[0]["value"].get("parentCommit")
            if parent is not None and parent != repository.head:
                self._error(412, "A commit has happened since. Please refresh and try again.")
                return
            files, lfs = dict(repository.files), set(repository.lfs)
            for line in lines[1:]:
                value, path = line["value"], line["value"]["path"]
                if line["key"] == "file":
                    files[path] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.blobs:
                        self._error(400, f"LFS pointer pointed to a file that does not exist: {path}")
                        return
                    files[path] = self.hub.blobs[value["oid"]]
                    lfs.add(path)
                elif line["key"] == "deletedFile":
                    del files[path]
            repository.lfs = lfs
            oid = repository.commit(files)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        found = repository.at(revision)
        if found is None:
            self._error(404, "Invalid rev id", "RevisionNotFound")
            return
        sha, files = found
        if path not in files:
            self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return
        content = files[path]
        if path not in repository.lfs:
            self._content(content, git_oid(content), X_Repo_Commit=sha)
            return
        oid = hashlib.sha256(content).hexdigest()
        self.hub.blobs[oid] = content
        self._send(
            302,
            # Another host than the hub's, as the hub's own CDN is: no token may follow there.
            Location=f"{self.hub.url}/cdn/{oid}".replace("127.0.0.1", "localhost"),
            X_Repo_Commit=sha,
            X_Linked_Etag=f'"{oid}"',
            X_Linked_Size=str(len(content)),
        )

    def _cdn(self, oid: str) -> None:
        if "Authorization" in self.headers:
            self._error(400, "a token was sent to another host")
            return
        self._content(self.hub.blobs[oid], oid)

    def _content(self, content: bytes, etag: str, **headers: str) -> None:
        """A file, or the rest of it that a client that was cut off asks for."""
        headers = {"ETag": f'"{etag}"', "Accept_Ranges": "bytes", **headers}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self._send(200, content, **headers)
            return
        begin, end = int(match[1]), int(match[2] or len(content) - 1)
        where = f"bytes {begin}-{end}/{len(content)}"
        self._send(206, content[begin : end + 1], Content_Range=where, **headers)
