"""A server on 127.0.0.1 that speaks as much of the Hugging Face hub as a download needs, and fails as networks do."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository; set what is to go wrong between requests.

    Attributes:
        files: name → content.
        token: needed for everything where it is set.
        ranges: answer them; otherwise whole files with status 200.
        breaks: after how many bytes of a safetensors file's body the next connections are cut, one by one.
        failures: statuses that the next requests for safetensors files get.
        claims: replaces the Content-Range of every answer.
        says: what the API says of the repository in place of what is right; bytes.
        headers: beside the others of every answer for a file.
        circles: redirections lead to themselves.
        requests: (method, path, Range header, bytes of body that were sent).
    """

    repository: str
    files: dict[str, bytes]
    token: str | None = None
    ranges: bool = True
    breaks: list[int] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    claims: str | None = None
    says: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    circles: bool = False
    requests: list[tuple[str, str, str | None, int]] = field(default_factory=list)
    endpoint: str = ""

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def sent(self, suffix: str = ".safetensors") -> int:
        """Bytes of all bodies of files whose name ends so."""
        return sum(count for _, path, _, count in self.requests if path.endswith(suffix))


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        """Clients that close a connection in the middle are no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.state, unquote(self.path)
        if path.startswith("/storage/") and hub.circles:
            return self._send(302, b"", {"Location": hub.endpoint + path})
        if path.startswith("/storage/"):
            # The real hub's links to its storage are signed: no token is asked for.
            return self._send_file(path, path.removeprefix("/storage/"))
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._send(401, b"{}", {"X-Error-Message": "Repository not found"})
        api = re.fullmatch(rf"/api/models/{hub.repository}/revision/([^?]+)(?:\?.*)?", path)
        if api:
            if api.group(1) not in ("main", "v1", COMMIT):
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name, "size": len(content)} for name, content in hub.files.items()]
            body = {"id": hub.repository, "modelId": hub.repository, "sha": COMMIT, "siblings": siblings, "tags": []}
            said = json.dumps(body).encode() if hub.says is None else hub.says
            return self._send(200, said, {"Content-Type": "application/json"})
        file = path.removeprefix(f"/{hub.repository}/resolve/{COMMIT}/")
        if not path.startswith(f"/{hub.repository}/"):
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if file not in hub.files:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        if file.endswith(".safetensors"):
            return self._send(302, b"", {"Location": f"{hub.endpoint}/storage/{file}"})
        return self._send_file(path, file)

    def _send_file(self, path: str, file: str) -> None:
        hub, content = self.state, self.state.files[file]
        if file.endswith(".safetensors") and hub.failures:
            return self._send(hub.failures.pop(0), b"")
        asked = self.headers.get("Range")
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT} | hub.headers
        if match and hub.ranges:
            start = int(match.group(1))
            stop = min(len(content), int(match.group(2) or len(content)) + 1)
            said = f"bytes {start}-{stop - 1}/{len(content)}" if hub.claims is None else hub.claims
            self._send(206, content[start:stop], etag | {"Content-Range": said})
        else:
            self._send(200, content, etag)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        hub = self.state
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = 0
        try:
            if self.command != "HEAD":
                cut = None
                if status in (200, 206) and self.path.endswith(".safetensors") and hub.breaks:
                    cut = hub.breaks.pop(0)
                # In pieces, so that what a client stops reading is not counted as sent.
                for start in range(0, len(body if cut is None else body[:cut]), 1 << 14):
                    piece = body[start : min(start + (1 << 14), len(body) if cut is None else cut)]
                    self.wfile.write(piece)
                    sent += len(piece)
                if cut is not None:
                    self.close_connection = True
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        hub.requests.append((self.command, self.path, self.headers.get("Range"), sent))
