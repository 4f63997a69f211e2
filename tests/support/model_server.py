"""A web server and model hub on this machine that misbehaves on command."""

import hashlib
import json
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

MODEL = Path(__file__).resolve().parents[2] / "foam" / "models" / "foam-tiny-2.6m-q8_0.gguf"
COMMIT = "c0ffee00" * 5


@dataclass
class Act:
    """What the server does for one request instead of serving it well.

    Attributes:
        cut_after: Bytes of the body after which the connection is reset.
        stall_after: Bytes of the body after which nothing comes any more.
        status: Answer with this status and no file.
        headers: Headers added to (or put in place of) the usual ones.
        ignore_range: Send everything whatever was asked.
        claim: Content-Length to state instead of the true one.
        become: New content of the file, before it is served.
    """

    cut_after: int | None = None
    stall_after: int | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    ignore_range: bool = False
    claim: int | None = None
    become: bytes | None = None


class ModelServer:
    """Serves `files` by path; each request for a file takes one `Act` from `script`."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.script: deque[Act] = deque()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.api: dict[str, Any] = {}
        self.redirect: dict[str, tuple[str, dict[str, str]]] = {}
        self.etags = True
        self.release = threading.Event()
        server = self

        class Handler(_Handler):
            owner = server

        self._http = _Http(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self.release.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def sent(self, path: str) -> list[dict[str, str]]:
        return [headers for asked, headers in self.requests if urlsplit(asked).path == path]

    def add_repository(self, repo: str, files: dict[str, bytes]) -> None:
        """Offer files as the model hub does."""
        self.api[f"/api/models/{repo}/revision/main"] = {
            "sha": COMMIT,
            "siblings": [
                {
                    "rfilename": name,
                    "size": len(data),
                    "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)},
                }
                for name, data in files.items()
            ],
        }
        for name, data in files.items():
            self.files[f"/{repo}/resolve/{COMMIT}/{name}"] = data


@contextmanager
def model_server() -> Iterator[ModelServer]:
    server = ModelServer()
    try:
        yield server
    finally:
        server.close()


class _Http(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: cut connections are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    owner: ModelServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""

    def do_GET(self) -> None:
        owner, path = self.owner, unquote(urlsplit(self.path).path)
        owner.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        self.close_connection = True
        if path in owner.redirect:
            target, headers = owner.redirect[path]
            return self._empty(302, {"Location": target, **headers})
        act = owner.script.popleft() if owner.script else Act()
        if act.status is not None:
            return self._empty(act.status, act.headers)
        if path in owner.api:
            body = json.dumps(owner.api[path]).encode()
            return self._send(200, body, {"Content-Type": "application/json"}, act)
        if act.become is not None:
            owner.files[path] = act.become
        if path not in owner.files:
            return self._empty(404, {})
        return self._serve(owner.files[path], act)

    def _serve(self, data: bytes, act: Act) -> None:
        tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        headers = {"Accept-Ranges": "bytes"} | ({"ETag": tag} if self.owner.etags else {})
        if self.owner.etags and self.headers.get("If-None-Match") == tag:
            return self._empty(304, headers)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        holds = self.headers.get("If-Range") in (None, tag)
        if asked is None or act.ignore_range or not holds:
            return self._send(200, data, headers, act)
        first = int(asked[1])
        if first >= len(data):
            return self._empty(416, {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        return self._send(206, data[first:], headers, act)

    def _send(self, status: int, body: bytes, headers: dict[str, str], act: Act) -> None:
        length = len(body) if act.claim is None else act.claim
        self._head(status, {"Content-Length": str(length), **headers, **act.headers})
        if act.cut_after is not None and act.cut_after < len(body):
            self.wfile.write(body[: act.cut_after])
            self.wfile.flush()
            # A reset, not a polite end: SO_LINGER with no time.
            if act.cut_after % 2:
                option = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        elif act.stall_after is not None:
            self.wfile.write(body[: act.stall_after])
            self.wfile.flush()
            self.owner.release.wait(20)
        else:
            self.wfile.write(body[:length])

    def _empty(self, status: int, headers: dict[str, str]) -> None:
        self._head(status, {"Content-Length": "0", **headers})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
