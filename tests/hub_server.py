"""A small server on loopback that speaks as much of the hub's API as huggingface_hub asks for."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "b95be7d6f134c3a9e62ee616f310733567f069ce"
PROPOSED = "0123456789012345678901234567890123456789"


class Hub:
    """Repositories "models/owner/name" or "datasets/owner/name" -> folder, all at one `commit`. `asked` is what was requested.

    `cut_after` ends the connection after so many bytes of any weights, and refuses them from then on. `short` ends them so early once, as if that were all.
    `instead` is what any question about a repository is answered with: status, the header X-Error-Message, body.
    `refused` are files that are answered with a status, `lies` files whose stated hash is wrong.
    `proposed` are what pull request 1 of a repository would make of it: its author, and the folder.
    """

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.proposed: dict[str, tuple[str, Path]] = {}
        self.asked: list[tuple[str, str, str]] = []  # method, path, Range
        self.commit = COMMIT
        self.cut_after: int | None = None
        self.short: int | None = None
        self.instead: tuple[int, str, bytes] | None = None
        self.refused: dict[str, int] = {}
        self.lies: set[str] = set()
        self.url = ""

    def sha256(self, path: Path) -> str:
        return "0" * 64 if path.name in self.lies else hashlib.sha256(path.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.instead and path.startswith("/api/"):
            self.say(*self.hub.instead)
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.info(f"{found[1]}/{found[2]}", found[3], body)
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", path):
            self.tree(f"{found[1]}/{found[2]}", body)
        elif found := re.fullmatch(r"/api/(models/[^/]+/[^/]+)/(discussions|commits)(?:/.*)?", path):
            self.history(found[1], found[2], body)
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(f"{'datasets' if found[1] else 'models'}/{found[2]}", found[3], found[4], body)
        else:
            self.refuse("EntryNotFound")

    def say(self, status: int, error: str, data: bytes) -> None:
        self.send_response(status)
        if error:
            self.send_header("X-Error-Message", error)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, code: str, status: int = 404) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def known(self, repo: str, revision: str | None) -> Path | None:
        if repo not in self.hub.folders:
            self.refuse("RepoNotFound")
        elif repo in self.hub.proposed and revision in ("refs/pr/1", PROPOSED):
            return self.hub.proposed[repo][1]
        elif revision not in (None, "main", self.hub.commit):
            self.refuse("RevisionNotFound")
        else:
            return self.hub.folders[repo]
        return None

    def json(self, value: object, body: bool) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def info(self, repo: str, revision: str | None, body: bool) -> None:
        if (folder := self.known(repo, revision)) is None:
            return
        siblings = []
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            size = file.stat().st_size
            one = {"rfilename": file.relative_to(folder).as_posix(), "size": size, "blobId": self.hub.sha256(file)[:40]}
            if file.suffix == ".safetensors":
                one["lfs"] = {"sha256": self.hub.sha256(file), "size": size, "pointerSize": 134}
            siblings.append(one)
        self.json(
            {
                "id": repo.partition("/")[2],
                "modelId": repo.partition("/")[2],
                "sha": self.hub.commit if folder == self.hub.folders[repo] else PROPOSED,
                "siblings": siblings,
                "tags": [],
                "private": False,
                "cardData": {"license": "creativeml-openrail-m"},
                "downloads": 0,
            },
            body,
        )

    def history(self, repo: str, what: str, body: bool) -> None:
        """The pull requests of a repository, or the commits of the only one."""
        day = "2023-01-01T00:00:00.000Z"
        about = {"title": "Adding `safetensors` variant of this model", "status": "open", "isPullRequest": True, "createdAt": day}
        found = [about | {"num": 1, "author": {"name": who}, "repo": {"name": repo, "type": "model"}} for who, _ in [self.hub.proposed[repo]]]
        commits = [{"id": sha, "authors": [], "date": day, "title": "", "message": ""} for sha in (PROPOSED, COMMIT)]
        self.json({"discussions": found, "count": 1, "start": 0} if what == "discussions" else commits, body)

    def tree(self, repo: str, body: bool) -> None:
        folder = self.hub.folders[repo]
        rows = [
            {"type": "file", "path": p.relative_to(folder).as_posix(), "size": p.stat().st_size, "oid": self.hub.sha256(p)[:40]}
            for p in sorted(folder.rglob("*")) if p.is_file()
        ]  # fmt: skip
        self.json(rows, body)

    def file(self, repo: str, revision: str, name: str, body: bool) -> None:
        if (folder := self.known(repo, revision)) is None:
            return None
        path = folder / name
        if status := self.hub.refused.get(name):
            return self.refuse("EntryNotFound" if status == 404 else "", status)
        if not path.is_file():
            return self.refuse("EntryNotFound")
        if self.hub.cut_after == 0 and name.endswith(".safetensors"):
            return self.refuse("", 403)
        data = path.read_bytes()
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("ETag", f'"{self.hub.sha256(path)}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Linked-Etag", f'"{self.hub.sha256(path)}"')
        self.send_header("Accept-Ranges", "bytes")
        if self.hub.short and name.endswith(".safetensors"):
            data, self.hub.short = data[: self.hub.short], None
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return None
        if self.hub.cut_after and name.endswith(".safetensors"):
            self.wfile.write(data[start : start + self.hub.cut_after])
            self.wfile.flush()
            self.hub.cut_after = 0
            self.close_connection = True
            self.connection.shutdown(2)
            return None
        self.wfile.write(data[start:])
        return None


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
