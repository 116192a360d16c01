"""A real S3 server for the tests, moto's, and a proxy before it that does what networks and servers do."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.util
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from worker.volume_s3.client import S3Client
from worker.volume_s3.source import S3Credentials, S3Source

START_S = 30.0
ABSENT = importlib.util.find_spec("moto") is None
needs_moto = pytest.mark.skipif(
    ABSENT, reason="needs the package moto, an S3 server (pip install 'moto[s3]' flask flask-cors)"
)
KEYS = S3Credentials("AKIDEXAMPLE", "not-a-real-key")
_SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
}


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[str]:
    """The address of a server with nothing in it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with (folder / "moto.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            assert server.poll() is None, (folder / "moto.log").read_text()
            assert time.monotonic() < deadline, "moto did not start"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait(10)


class Bucket:
    """A bucket as somebody else sees it: plain requests, as moto takes any signature."""

    def __init__(self, url: str, name: str) -> None:
        self.url = url
        self.name = name
        status, _, _ = self.request("PUT", "")
        assert status == 200, status

    def request(
        self, method: str, key: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        from urllib.parse import quote

        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        try:
            path = f"/{self.name}" if not key else f"/{self.name}/{quote(key, safe='/')}"
            connection.request(method, path, body, {**_SIGNED, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
        finally:
            connection.close()

    def put(self, key: str, body: bytes | str, **metadata: str) -> str:
        """The ETag."""
        raw = body.encode() if isinstance(body, str) else body
        headers = {f"x-amz-meta-{name.replace('_', '-')}": value for name, value in metadata.items()}
        status, answer, text = self.request("PUT", key, raw, headers)
        assert status == 200, text
        return answer["etag"].strip('"')

    def get(self, key: str) -> bytes | None:
        status, _, body = self.request("GET", key)
        return body if status == 200 else None

    def delete(self, key: str) -> None:
        self.request("DELETE", key)

    def keys(self) -> list[str]:
        client = S3Client(self.source(self.url), KEYS, private=True)
        try:
            found: list[str] = []
            token: str | None = None
            while True:
                page, token = client.page(token)
                found += [one.key for one in page]
                if token is None:
                    return sorted(found)
        finally:
            client.close()

    def source(self, url: str, prefix: str = "", **fields: object) -> S3Source:
        settings: dict[str, object] = {
            "region": "us-east-1",
            "path_style": True,
            "credentials": "s3",
            "readonly": False,
            "interval_s": 60.0,
        }
        return S3Source(bucket=self.name, prefix=prefix, endpoint=url, **{**settings, **fields})  # type: ignore[arg-type]


@dataclass
class Fault:
    """What happens to one request instead of its answer."""

    status: int | None = None  # answered so, not passed on
    code: str = "SlowDown"
    lose_answer: bool = False  # passed on, and the connection cut
    cut_after: int | None = None  # bytes of the answer's body, then the connection is cut
    etag: str | None = None  # in the place of the answer's
    body: bytes | None = None  # in the place of the answer's
    before: Callable[[], None] | None = None  # done before the request is passed on
    slow_s: float = 0.0  # between chunks of the answer
    drop_headers: tuple[str, ...] = ()  # of the request


@dataclass
class Request:
    method: str
    path: str
    query: str
    headers: dict[str, str]


Plan = Callable[[Request], Fault | None]


@dataclass
class FaultProxy:
    """HTTP to the real server; `plan` decides about each request. `seen` are all of them."""

    target: str
    plan: Plan = lambda request: None
    seen: list[Request] = field(default_factory=list)
    url: str = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[FaultProxy]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join(10)

    def count(self, method: str, part: str = "") -> int:
        return sum(1 for r in self.seen if r.method == method and part in f"{r.path}?{r.query}")


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path)
            request = Request(
                self.command, parts.path, parts.query, {k.lower(): v for k, v in self.headers.items()}
            )
            proxy.seen.append(request)
            fault = proxy.plan(request) or Fault()
            md5 = request.headers.get("content-md5")
            if md5 is not None and md5 != b64encode(hashlib.md5(body).digest()).decode():
                self._answer(400, {}, _error("BadDigest"))  # which moto does not check
                return
            if fault.status is not None:
                self._answer(fault.status, {}, _error(fault.code))
                return
            if fault.before is not None:
                fault.before()
            headers = {
                k: v
                for k, v in self.headers.items()
                if k.lower() not in fault.drop_headers and k.lower() != "expect"
            }
            connection = http.client.HTTPConnection(urlsplit(proxy.target).netloc, timeout=30)
            try:
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                found = {
                    k: v
                    for k, v in answer.headers.items()
                    if k.lower() not in ("transfer-encoding", "connection")
                }
            finally:
                connection.close()
            if fault.lose_answer:
                self.close_connection = True
                return
            if fault.etag is not None:
                found = {k: v for k, v in found.items() if k.lower() != "etag"} | {"ETag": fault.etag}
            if fault.body is not None:
                content = fault.body
                found = {k: v for k, v in found.items() if k.lower() != "content-length"}
            self._answer(answer.status, found, content, fault)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

        def _answer(
            self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None = None
        ) -> None:
            fault = fault or Fault()
            try:
                self.send_response(status)
                lengths = [v for k, v in headers.items() if k.lower() == "content-length"]
                for name, value in headers.items():
                    if name.lower() != "content-length":
                        self.send_header(name, value)
                self.send_header(
                    "Content-Length", lengths[0] if lengths and self.command == "HEAD" else str(len(body))
                )
                self.end_headers()
                if self.command == "HEAD":
                    return
                end = len(body) if fault.cut_after is None else min(fault.cut_after, len(body))
                step = 65536
                for at in range(0, end, step):
                    self.wfile.write(body[at : min(at + step, end)])
                    if fault.slow_s:
                        self.wfile.flush()
                        time.sleep(fault.slow_s)
                if end < len(body):
                    self.close_connection = True
            except OSError:
                self.close_connection = True

    return Handler


def _error(code: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>no</Message></Error>'.encode()
