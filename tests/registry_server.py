"""A registry for tests, to the letter of the OCI distribution specification 1.1, that can also misbehave.

It pulls and pushes: blobs with ranges, uploads in one piece and in chunks, mounts, manifests that are refused
when something they name is missing, tags. `Fault`s make it fail the way networks, proxies and attackers do.
Everything is in memory, a blob may be a file; each connection has a thread; `stop` ends all of them.
"""

from __future__ import annotations

import re
import socket
import socketserver
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tests.registry_handler import Handler
from tests.registry_model import Blob, Fault, Seen, digest_of

__all__ = ["Fault", "Registry", "Seen", "digest_of", "running"]


class Registry:
    """`auth`: "", "basic" or "bearer" for `users` (name → password); `public` repositories need none."""

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        auth: str = "",
        users: dict[str, str] | None = None,
        public: tuple[str, ...] = (),
        realm: str = "",
        token_life_s: int = 300,
    ) -> None:
        self.tls = tls
        self.auth = auth
        self.users = users or {}
        self.public = public
        self.realm = realm
        self.token_life_s = token_life_s
        self.blobs: dict[str, dict[str, Blob]] = {}
        self.manifests: dict[str, dict[str, tuple[str, bytes]]] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.uploads: dict[str, bytearray] = {}
        self.tokens: dict[str, str] = {}
        self.refresh_tokens: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.errors: list[BaseException] = []
        self.stopping = threading.Event()
        # Tests may hold answers back: each request waits for it.
        self.gate = threading.Event()
        self.gate.set()
        self.lock = threading.Lock()
        self._server: Server | None = None
        self._thread: threading.Thread | None = None

    # -- running

    def start(self) -> Registry:
        self._server = Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="registry")
        self._thread.start()
        return self

    def stop(self) -> None:
        self.stopping.set()
        self.gate.set()
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.hang_up()
            self._server.server_close()

    def __enter__(self) -> Registry:
        return self.start()

    def __exit__(self, *failure: object) -> None:
        self.stop()

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.server_address[1])

    @property
    def host(self) -> str:
        return f"localhost:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host}"

    # -- content

    def add_blob(self, repository: str, content: Blob, digest: str | None = None) -> str:
        digest = digest or digest_of(content if isinstance(content, bytes) else content.read_bytes())
        with self.lock:
            self.blobs.setdefault(repository, {})[digest] = content
        return digest

    def add_manifest(self, repository: str, content: bytes, media_type: str, *tags: str) -> str:
        digest = digest_of(content)
        with self.lock:
            self.manifests.setdefault(repository, {})[digest] = (media_type, content)
            for tag in tags:
                self.tags.setdefault(repository, {})[tag] = digest
        return digest

    # -- what was asked

    def asked(self, pattern: str) -> list[Seen]:
        with self.lock:
            return [seen for seen in self.seen if re.search(pattern, f"{seen.method} {seen.path}")]

    def fault(self, kind: str, match: str = "", **more: Any) -> Fault:
        fault = Fault(kind, match, **more)
        with self.lock:
            self.faults.append(fault)
        return fault

    def next_fault(self, what: str, *, short: bool = False) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if (fault.kind == "short") != short:
                    continue
                if fault.times != 0 and not fault.over.is_set() and re.search(fault.match, what):
                    fault.times -= 1
                    return fault
        return None


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = False
    block_on_close = True
    request_queue_size = 64

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._sockets: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), Handler)

    def finish_request(self, request: Any, address: Any) -> None:
        with self.registry.lock:
            self._sockets.add(request)
        try:
            if self.registry.tls is not None:
                request = self.registry.tls.wrap_socket(request, server_side=True)
                with self.registry.lock:
                    self._sockets.add(request)
            super().finish_request(request, address)
        finally:
            with self.registry.lock:
                self._sockets.discard(request)
            if isinstance(request, ssl.SSLSocket):
                request.close()

    def hang_up(self) -> None:
        with self.registry.lock:
            left = list(self._sockets)
        for one in left:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, address: Any) -> None:
        failure = sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]
        if failure is not None and not isinstance(failure, OSError | ValueError):
            self.registry.errors.append(failure)


@contextmanager
def running(**options: Any) -> Iterator[Registry]:
    """A registry for a test's length; fails the test when a handler failed."""
    registry = Registry(**options)
    with registry:
        yield registry
    if registry.errors:
        raise registry.errors[0]
