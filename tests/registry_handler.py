"""The test registry's answers: the distribution specification, and the faults that get in its way."""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from tests.registry_model import Blob, Fault, Seen, digest_of

if TYPE_CHECKING:
    from tests.registry_server import Registry, Server

_NAME = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
_DIGEST = r"sha256:[0-9a-f]{64}"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_PIECE = 256 * 1024


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str = "", **headers: str) -> None:
        self.status = status
        self.code = code
        self.message = message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    @property
    def registry(self) -> Registry:
        return self.server.registry

    def log_message(self, format: str, *args: Any) -> None:
        return None

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length", "0"))
        short = self.registry.next_fault(f"{self.command} {self.path}", short=True)
        if short is not None:
            self._take_some(min(short.at, length))
            return
        self.body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            self.body = self._chunks()
        parts = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        registry = self.registry
        with registry.lock:
            registry.seen.append(Seen(self.command, self.path, dict(self.headers.items()), self.body))
        registry.gate.wait()
        self.faulty = registry.next_fault(f"{self.command} {self.path}")
        if self.faulty is not None and self._fail(self.faulty):
            return
        try:
            if parts.path == "/token":
                self._token()
                return
            self._authorize(parts.path)
            self._route(parts.path)
        except _Refused as refused:
            errors = {"errors": [{"code": refused.code, "message": refused.message or refused.code.lower()}]}
            self._answer(refused.status, json.dumps(errors).encode(), **refused.headers)

    def _take_some(self, size: int) -> None:
        """As a registry whose client's connection is cut: what came of an upload is kept."""
        body = self.rfile.read(size)
        session = urlsplit(self.path).path.rpartition("/")[2]
        with self.registry.lock:
            self.registry.seen.append(Seen(self.command, self.path, dict(self.headers.items()), body))
            received = self.registry.uploads.get(session)
            if received is not None and self.command == "PATCH":
                received += body
        self.close_connection = True

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(100), 16):
            content += self.rfile.read(size)
            self.rfile.readline(100)
        self.rfile.readline(100)
        return content

    # -- failing

    def _fail(self, fault: Fault) -> bool:
        """Answer in the fault's way; False when it only changes what is sent."""
        kind = fault.kind
        if kind in ("status", "redirect", "body"):
            headers = dict(fault.headers)
            if kind == "redirect":
                headers["Location"] = fault.url
            self._answer(fault.status if kind != "redirect" else 307, fault.body, **headers)
            return True
        if kind == "hang_up":
            self.close_connection = True
            return True
        if kind == "garbage":
            self.wfile.write(b"\x00\x01\x02 this is no HTTP\r\n\r\n" * 4)
            self.close_connection = True
            return True
        if kind in ("head", "continue"):
            self.close_connection = True
            line = b"X-More: " + b"x" * 1000 + b"\r\n" if kind == "head" else b"HTTP/1.1 100 Continue\r\n\r\n"
            if kind == "head":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            self._forever(line)
            return True
        if kind == "endless":
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n\r\n")
            self._forever(b"\0" * 65536)
            return True
        return False

    def _forever(self, piece: bytes) -> None:
        while not self.registry.stopping.is_set():
            self.wfile.write(piece)

    # -- answering

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        named.setdefault("Content-Type", "application/json")
        named.setdefault("Docker-Distribution-Api-Version", "registry/2.0")
        self.send_response(status)
        for name, value in named.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", named.get("Content-Length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send(self, content: Blob, status: int, start: int, headers: dict[str, str]) -> None:
        """A body from `start` on, as the request's fault has it."""
        fault = self.faulty
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        end = size + (fault.at if fault is not None and fault.kind == "grow" else 0)
        self.send_response(status)
        for name, value in {"Docker-Distribution-Api-Version": "registry/2.0", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = start + fault.at if fault is not None and fault.kind in ("cut", "stall") else end
        for piece in _pieces(content, start, min(stop, size)):
            if fault is not None and fault.kind == "corrupt" and piece:
                piece = bytes([piece[0] ^ 1]) + piece[1:]
                fault = None
            if fault is not None and fault.kind == "drip":
                self._drip(piece)
                return
            self.wfile.write(piece)
        self.wfile.write(b"\0" * (max(end, size) - size if stop >= end else 0))
        if fault is not None and fault.kind in ("cut", "stall"):
            self.close_connection = True
            while fault.kind == "stall" and not fault.over.is_set():
                if self.registry.stopping.wait(0.02):
                    return

    def _drip(self, piece: bytes) -> None:
        self.close_connection = True
        for byte in piece:
            if self.registry.stopping.wait(0.02):
                return
            self.wfile.write(bytes([byte]))

    # -- letting in

    def _authorize(self, path: str) -> None:
        registry = self.registry
        if not registry.auth:
            return
        match = re.match(rf"/v2/({_NAME})/(?:blobs|manifests|tags)/", path)
        repository = match[1] if match else ""
        given = self.headers.get("Authorization", "")
        if registry.auth == "basic":
            if repository in registry.public or self._user(given) is not None:
                return
            raise _Refused(401, "UNAUTHORIZED", WWW_Authenticate='Basic realm="registry"')
        if given.startswith("Bearer "):
            scope = registry.tokens.get(given.removeprefix("Bearer "))
            pushes = self.command not in ("GET", "HEAD")
            known = scope is not None and (not repository or f"repository:{repository}:" in scope)
            if known and (not pushes or "push" in (scope or "")):
                return
        realm = registry.realm or f"{registry.url}/token"
        challenge = f'Bearer realm="{realm}",service="registry.test"'
        if repository:
            actions = "pull" if self.command in ("GET", "HEAD") else "pull,push"
            challenge += f',scope="repository:{repository}:{actions}"'
        raise _Refused(401, "UNAUTHORIZED", WWW_Authenticate=challenge)

    def _user(self, given: str) -> str | None:
        """Whose name and password these are."""
        with suppress(ValueError):
            kind, _, pair = given.partition(" ")
            name, _, password = base64.b64decode(pair).decode().partition(":")
            if kind == "Basic" and self.registry.users.get(name) == password:
                return name
        return None

    def _token(self) -> None:
        registry = self.registry
        if self.command == "POST":
            form = {name: values[0] for name, values in parse_qs(self.body.decode()).items()}
            user = registry.refresh_tokens.get(form.get("refresh_token", ""))
            if form.get("grant_type") != "refresh_token" or user is None:
                raise _Refused(401, "UNAUTHORIZED")
            scope, key = form.get("scope", ""), "access_token"
        else:
            given = self.headers.get("Authorization")
            user = self._user(given) if given is not None else None
            if given is not None and user is None:
                raise _Refused(401, "UNAUTHORIZED")
            scope, key = self.query.get("scope", ""), "token"
        match = re.fullmatch(rf"repository:({_NAME}):[a-z,]+", scope)
        if user is None and (match is None or match[1] not in registry.public):
            scope = ""  # a token that opens nothing, as Docker Hub gives
        token = secrets.token_urlsafe(16)
        with registry.lock:
            registry.tokens[token] = scope
        body = json.dumps({key: token, "expires_in": registry.token_life_s}).encode()
        self._answer(200, body)

    # -- the interface

    def _route(self, path: str) -> None:
        if path in ("/v2", "/v2/"):
            self._answer(200, b"{}")
            return
        for pattern, method in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None:
                getattr(self, method)(*match.groups())
                return
        raise _Refused(404, "NAME_INVALID", "no such place")

    def _blob(self, repository: str, digest: str) -> None:
        content = self.registry.blobs.get(repository, {}).get(digest)
        if content is None:
            raise _Refused(404, "BLOB_UNKNOWN")
        if self.command == "DELETE":
            with self.registry.lock:
                del self.registry.blobs[repository][digest]
            self._answer(202)
            return
        if self.command not in ("GET", "HEAD"):
            raise _Refused(405, "UNSUPPORTED")
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        headers = {"Content-Type": "application/octet-stream", "Docker-Content-Digest": digest}
        headers["Accept-Ranges"] = "bytes"
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        kind = self.faulty.kind if self.faulty is not None else ""
        if wanted is None or kind == "no_range":
            self._send(content, 200, 0, headers)
            return
        start = int(wanted[1])
        if start >= size:
            raise _Refused(416, "RANGE_INVALID", Content_Range=f"bytes */{size}")
        shown = start + 1 if kind == "shift" else start
        headers["Content-Range"] = f"bytes {shown}-{size - 1}/{size}"
        self._send(content, 206, start, headers)

    def _manifest(self, repository: str, reference: str) -> None:
        registry = self.registry
        if self.command == "PUT":
            self._put_manifest(repository, reference)
            return
        digest = registry.tags.get(repository, {}).get(reference, reference)
        found = registry.manifests.get(repository, {}).get(digest)
        if found is None:
            raise _Refused(404, "MANIFEST_UNKNOWN", "manifest unknown")
        media_type, content = found
        if self.command == "DELETE":
            with registry.lock:
                del registry.manifests[repository][digest]
            self._answer(202)
            return
        if self.command not in ("GET", "HEAD"):
            raise _Refused(405, "UNSUPPORTED")
        accepted = self.headers.get("Accept", "*/*")
        if media_type not in accepted and "*/*" not in accepted:
            raise _Refused(404, "MANIFEST_UNKNOWN", f"it is a {media_type}, which was not asked for")
        self._send(content, 200, 0, {"Content-Type": media_type, "Docker-Content-Digest": digest})

    def _put_manifest(self, repository: str, reference: str) -> None:
        registry = self.registry
        digest = digest_of(self.body)
        if reference.startswith("sha256:") and reference != digest:
            raise _Refused(400, "DIGEST_INVALID")
        try:
            document = json.loads(self.body)
            blobs = [document["config"], *document["layers"]] if "layers" in document else []
            children = document.get("manifests", [])
        except (ValueError, KeyError, TypeError):
            raise _Refused(400, "MANIFEST_INVALID") from None
        media_type = self.headers.get("Content-Type", "")
        if document.get("mediaType", media_type) != media_type:
            raise _Refused(400, "MANIFEST_INVALID", "the media type differs from the header's")
        known, manifests = registry.blobs.get(repository, {}), registry.manifests.get(repository, {})
        for blob in blobs:
            if blob["digest"] not in known:
                raise _Refused(400, "MANIFEST_BLOB_UNKNOWN", blob["digest"])
        for child in children:
            if child["digest"] not in manifests:
                raise _Refused(400, "MANIFEST_UNKNOWN", child["digest"])
        tags = () if reference.startswith("sha256:") else (reference,)
        registry.add_manifest(repository, self.body, media_type, *tags)
        place = f"/v2/{repository}/manifests/{digest}"
        self._answer(201, Location=place, Docker_Content_Digest=digest)

    def _tags(self, repository: str) -> None:
        tags = self.registry.tags.get(repository)
        if tags is None:
            raise _Refused(404, "NAME_UNKNOWN")
        names = sorted(tag for tag in tags if tag > self.query.get("last", ""))
        names = names[: int(self.query.get("n", "1000"))]
        self._answer(200, json.dumps({"name": repository, "tags": names}).encode())

    # -- uploads

    def _uploads(self, repository: str) -> None:
        if self.command != "POST":
            raise _Refused(405, "UNSUPPORTED")
        registry = self.registry
        mount, source = self.query.get("mount"), self.query.get("from")
        if mount is not None:
            content = registry.blobs.get(source or "", {}).get(mount)
            if content is not None:
                registry.add_blob(repository, content, mount)
                self._stored(repository, mount)
                return
        if "digest" in self.query:
            self._finish_upload(repository, self.body)
            return
        session = secrets.token_hex(8)
        with registry.lock:
            registry.uploads[session] = bytearray()
        self._progress(repository, session)

    def _upload(self, repository: str, session: str) -> None:
        registry = self.registry
        received = registry.uploads.get(session)
        if received is None:
            raise _Refused(404, "BLOB_UPLOAD_UNKNOWN")
        if self.command == "GET":
            self._progress(repository, session, status=204)
        elif self.command == "PATCH":
            self._check_order(received)
            received += self.body
            self._progress(repository, session)
        elif self.command == "PUT":
            if self.body:
                self._check_order(received)
            with registry.lock:
                del registry.uploads[session]
            self._finish_upload(repository, bytes(received) + self.body)
        elif self.command == "DELETE":
            with registry.lock:
                del registry.uploads[session]
            self._answer(204)
        else:
            raise _Refused(405, "UNSUPPORTED")

    def _check_order(self, received: bytearray) -> None:
        span = self.headers.get("Content-Range")
        if span is None:
            return
        match = re.fullmatch(r"(\d+)-(\d+)", span)
        start, last = (int(match[1]), int(match[2])) if match else (-1, -1)
        if start != len(received) or last - start + 1 != len(self.body):
            raise _Refused(416, "BLOB_UPLOAD_INVALID", "a chunk out of order")

    def _progress(self, repository: str, session: str, status: int = 202) -> None:
        size = len(self.registry.uploads[session])
        self._answer(
            status,
            Location=f"/v2/{repository}/blobs/uploads/{session}?state=kept",
            Range=f"0-{max(0, size - 1)}",
            Docker_Upload_UUID=session,
        )

    def _finish_upload(self, repository: str, content: bytes) -> None:
        digest = self.query.get("digest", "")
        if digest_of(content) != digest:
            raise _Refused(400, "DIGEST_INVALID")
        self.registry.add_blob(repository, content, digest)
        self._stored(repository, digest)

    def _stored(self, repository: str, digest: str) -> None:
        self._answer(201, Location=f"/v2/{repository}/blobs/{digest}", Docker_Content_Digest=digest)


_ROUTES = (
    (rf"/v2/({_NAME})/blobs/uploads/", "_uploads"),
    (rf"/v2/({_NAME})/blobs/uploads/([0-9a-f]+)", "_upload"),
    (rf"/v2/({_NAME})/blobs/({_DIGEST})", "_blob"),
    (rf"/v2/({_NAME})/manifests/({_DIGEST}|{_TAG})", "_manifest"),
    (rf"/v2/({_NAME})/tags/list", "_tags"),
)


def _pieces(content: Blob, start: int, end: int) -> Iterator[bytes]:
    if isinstance(content, bytes):
        for place in range(start, end, _PIECE):
            yield content[place : min(end, place + _PIECE)]
        return
    with content.open("rb") as file:
        file.seek(start)
        while start < end and (piece := file.read(min(_PIECE, end - start))):
            start += len(piece)
            yield piece
