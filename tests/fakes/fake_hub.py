"""A model hub on loopback that speaks as much of the hub's protocol as downloads need."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Repository:
    """One repository with one commit."""

    def __init__(self, files: dict[str, bytes], is_gated: bool = False) -> None:
        self.files, self.is_gated = files, is_gated
        self.commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": oid(content)}
            for path, content in sorted(self.files.items())
        ]


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub:
    """The server; `broken` is a status that every request then gets, `asked` all paths so far."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}  # "models/owner/name", "datasets/owner/name"
        self.broken: int | None = None
        self.asked: list[str] = []
        hub = self

        class Handler(Answers):
            def do_GET(self) -> None:
                self.answer(hub)

            do_HEAD = do_GET
            do_POST = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, hub: Hub) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]
        hub.asked.append(f"{self.command} {self.path}")
        if hub.broken:
            return self.say(hub.broken, b"{}")
        is_api = parts[0] == "api"
        kind = parts.pop(0) if not is_api and parts[0] == "datasets" else "models"
        if is_api:
            _, kind, *parts = parts
        repository = hub.repositories.get("/".join([kind, *parts[:2]]))
        if repository is None:
            return self.say(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        what, rest = (parts[2], parts[3:]) if len(parts) > 2 else ("", [])
        if rest and rest[0] not in ("main", repository.commit):
            return self.say(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if what == "resolve":
            return self.file(repository, "/".join(rest[1:]))
        if what == "tree":
            return self.json(repository.tree())
        if what == "paths-info":
            paths = (
                json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            )
            return self.json([entry for entry in repository.tree() if entry["path"] in paths])
        siblings = [{"rfilename": path} for path in repository.files]
        info = {"id": "/".join(parts[:2]), "sha": repository.commit, "siblings": siblings}
        return self.json({**info, "private": False, "gated": False, "downloads": 0, "tags": []})

    def file(self, repository: Repository, path: str) -> None:
        content = repository.files.get(path)
        if repository.is_gated:
            return self.say(403, b"", {"X-Error-Code": "GatedRepo"})
        if content is None:
            return self.say(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{oid(content)}"'}
        return self.say(200, content, headers)

    def json(self, content: Any) -> None:
        self.say(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def say(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
