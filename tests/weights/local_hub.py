"""A server on loopback that speaks the Hub's protocol for one file, and fails as it is told."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ERRORS = {
    "repository": "RepoNotFound",
    "revision": "RevisionNotFound",
    "file": "EntryNotFound",
    "gated": "GatedRepo",
}


class LocalHub:
    """One repository, `org/repo`, with the file `m.safetensors` at main and at COMMIT.

    faults: method → a fault, see `_answer`; `times` of them, then all is well. log: (method, path, headers).
    cdn: another server that the file is redirected to.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.faults, self.log = data, {}, []
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.cdn: LocalHub | None = None
        self.ended = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def fail(self, method: str, times: int = 10**6, **fault: Any) -> None:
        self.faults[method] = {"times": times, **fault}

    def asked(self, method: str) -> int:
        return sum(entry[0] == method for entry in self.log)


@contextmanager
def running(data: bytes):
    hub = LocalHub(data)
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        hub.server.shutdown()
        hub.server.server_close()


def environment(server: LocalHub, tmp_path: Path) -> dict[str, str | None]:
    """What a client is told, so that it asks this server alone; None: what must not be set."""
    proxies = [
        n for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy") for n in (name, name.upper())
    ]
    absent = [*proxies, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"]
    told = {
        "HF_ENDPOINT": server.url,
        "CTSR_CACHE": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "theirs"),
    }
    return dict.fromkeys(absent) | told


def prepare(monkeypatch: Any, server: LocalHub, tmp_path: Path) -> None:
    """The same for the client in this process, which has read its settings already."""
    from huggingface_hub import constants

    for name, value in environment(server, tmp_path).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "theirs"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("ctsr.weights.hub.WAITS", (0.01, 0.01))


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def _answer(self, method: str) -> None:
        hub = self.hub
        hub.log.append((method, self.path, dict(self.headers)))
        fault = hub.faults.get(method, {})
        if fault.get("times", 0) > 0:
            fault["times"] -= 1
        else:
            fault = {}
        if "wait" in fault:
            hub.ended.wait(fault["wait"])
        parts = self.path.split("?")[0].strip("/").split("/")
        missing = fault.get("missing")
        if parts[0] == "cdn":
            missing = missing or None
        elif parts[:2] != ["org", "repo"]:
            missing = "repository"
        elif parts[2:3] != ["resolve"] or parts[3] not in ("main", COMMIT):
            missing = "revision"
        elif parts[4:] != ["m.safetensors"]:
            missing = "file"
        if missing or "status" in fault:
            status = fault.get("status", 404)
            headers = {"X-Error-Code": ERRORS[missing]} if missing else {}
            return self._send(status, headers | fault.get("headers", {}) | {"Content-Length": "0"})
        data = fault.get("data", hub.data)
        headers = {
            "X-Repo-Commit": COMMIT, "ETag": f'"{fault.get("etag", hub.sha256)}"',
            "Content-Length": str(fault.get("size", len(data))), "Accept-Ranges": "bytes",
        }  # fmt: skip
        if hub.cdn is not None:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": headers.pop("Content-Length")}
            return self._send(
                302, headers | {"Location": f"{hub.cdn.url}/cdn/m?sig=1", "Content-Length": "0"}
            )
        headers |= fault.get("headers", {})
        for name in fault.get("without", ()):
            headers.pop(name)
        start = 0
        if (asked := self.headers.get("Range", "")).startswith("bytes="):
            start = int(asked[6:].split("-")[0])
            headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            headers |= {"Content-Length": str(len(data) - start)}
        self._send(206 if start else 200, headers, b"" if method == "HEAD" else data[start:], fault)
        return None

    def _send(
        self, status: int, headers: dict[str, str], body: bytes = b"", fault: dict[str, Any] | None = None
    ) -> None:
        fault = fault or {}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if "cut" not in fault:
            self.wfile.write(body)
            return
        self.wfile.write(body[: fault["cut"]])
        self.wfile.flush()
        if fault.get("by") == "stall":
            self.hub.ended.wait(60)
        elif fault.get("by") == "reset":
            time.sleep(0.05)  # the bytes are read before
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True
