"""Frames of the launcher's socket, shared by both ends. Standard library only.

A frame is four bytes of length (big endian) and that many bytes of JSON, always an object. The client's
first frame is `hello` with the secret of `launcher.key` and the protocol versions it speaks; everything
before that is refused. Then, in any order:

    client -> launcher   {"id": n, "op": NAME, ...}             answered once, by id
                         {"op": "ack_output", ...}              never answered
    launcher -> client   {"id": n, "ok": {...}}
                         {"id": n, "error": {"code", "message", "step"?, "errno"?, "detail"?}}
                         {"event": "exit", "record": {...}}
                         {"event": "output", "items": [[cid, stream, end offset], ...]}

A newer worker adopts from an older launcher, so fields and ops are only ever added within a version, and
the launcher answers `hello` with the highest version that both know. The same frames, without ids and
versions, run between the launcher and its shims.
"""

import json
from typing import Any

PROTOCOL_MIN = 1
PROTOCOL_MAX = 1

MAX_FRAME = 8 * 1024 * 1024
MAX_HELLO_FRAME = 4 * 1024
HEADER_BYTES = 4

STREAMS = ("stdout", "stderr")

# Codes of the wire contract that the launcher's answers use.
CONFLICT = "conflict"
INTERNAL = "internal"
INVALID = "invalid_command"
NOT_FOUND = "not_found"
EXHAUSTED = "resource_exhausted"
START_FAILED = "start_failed"
UNAVAILABLE = "unavailable"
UNSUPPORTED = "unsupported"


class ProtocolError(Exception):
    """The peer sent something that is no frame; nothing after it can be trusted."""


class Refused(Exception):
    """An op that cannot be done; becomes the `error` of its answer."""

    def __init__(self, code: str, message: str, **extra: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.extra = extra

    def to_wire(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, **self.extra}


def encode_body(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def encode_frame(message: dict[str, Any]) -> bytes:
    return frame(encode_body(message))


def decode_body(body: bytes) -> dict[str, Any]:
    """The object in a frame; ProtocolError for anything else, however deep or odd."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as failure:
        raise ProtocolError(f"a frame that is not JSON: {failure}") from None
    if not isinstance(message, dict):
        raise ProtocolError(f"a frame that is no object but {type(message).__name__}")
    return message


class FrameBuffer:
    """Cuts a byte stream into frame bodies; holds at most one frame of `max_frame` bytes and one read."""

    def __init__(self, max_frame: int = MAX_FRAME) -> None:
        self.max_frame = max_frame
        self._data = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self._data += data

    @property
    def pending(self) -> bytes:
        """What was fed and is no whole frame yet."""
        return bytes(self._data)

    def next(self) -> bytes | None:
        """The next whole body, or None. ProtocolError when it announces more than `max_frame` bytes."""
        if len(self._data) < HEADER_BYTES:
            return None
        length = int.from_bytes(self._data[:HEADER_BYTES], "big")
        if length > self.max_frame:
            raise ProtocolError(f"a frame of {length} bytes; the limit is {self.max_frame}")
        end = HEADER_BYTES + length
        if len(self._data) < end:
            return None
        body = bytes(self._data[HEADER_BYTES:end])
        del self._data[:end]
        return body
