"""Messages as the rest of the worker sees them, and the few wire details around them. No I/O.

Headers: keys and values are ASCII without CR or LF. nats-py folds line breaks into spaces and gives back a
strange object for other text, so a value is checked before it is sent.
"""

import re
from datetime import UTC, datetime
from typing import Any

import msgspec

from worker.errors import Internal

HEADER_BLOCK_BYTES = 12  # "NATS/1.0\r\n" and the empty line
HEADER_LINE_BYTES = 4  # ": " and "\r\n"

_KEY = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\x20-\x7e\t]*")
_PART = re.compile(r"[^\s.*>]+")
_NANOS = re.compile(r"\.(\d{1,9})")

Headers = dict[str, str]


class Message(msgspec.Struct, frozen=True):
    """`status` is that of a message the server itself made (404, 408, 409, 503 …), else 0."""

    subject: str
    data: bytes = b""
    headers: Headers = {}
    reply: str = ""
    status: int = 0
    description: str = ""


Reply = Message


class StreamMessage(msgspec.Struct, frozen=True):
    """A message out of a stream. `pending`: how many more the reader's consumer has yet to give."""

    subject: str
    data: bytes
    headers: Headers
    stream_seq: int
    time: datetime
    pending: int = 0


class Ack(msgspec.Struct, frozen=True):
    """What the reply subject of a delivered message says (`$JS.ACK.…`, ADR-15)."""

    stream: str
    consumer: str
    deliveries: int
    stream_seq: int
    consumer_seq: int
    time: datetime
    pending: int


def parse_ack(reply: str) -> Ack | None:
    """None when `reply` is no acknowledgement subject. Reads the form with and without a domain."""
    tokens = reply.split(".")
    if len(tokens) < 9 or tokens[0] != "$JS" or tokens[1] != "ACK":
        return None
    rest = tokens[2:9] if len(tokens) == 9 else tokens[4:11]
    if len(rest) < 7:
        return None
    try:
        deliveries, stream_seq, consumer_seq, nanos, pending = (int(token) for token in rest[2:])
        seconds, rest_ns = divmod(nanos, 1_000_000_000)
        moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest_ns // 1000)
    except (ValueError, OverflowError, OSError):
        return None
    return Ack(rest[0], rest[1], deliveries, stream_seq, consumer_seq, moment, pending)


def parse_time(text: str) -> datetime:
    """RFC 3339 with up to nine decimals, as the server writes it; cut to microseconds. ValueError when it
    is none.
    """
    found = _NANOS.search(text)
    if found is not None:
        text = f"{text[: found.start()]}.{found[1][:6].ljust(6, '0')}{text[found.end() :]}"
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def check_headers(headers: Headers | None) -> int:
    """The size of the header block in bytes. Internal when a key or value cannot be sent as it is."""
    if not headers:
        return 0
    size = HEADER_BLOCK_BYTES
    for key, value in headers.items():
        if _KEY.fullmatch(key) is None or _VALUE.fullmatch(value) is None:
            raise Internal(f"the header {key!r} holds what a header cannot carry")
        size += len(key) + len(value) + HEADER_LINE_BYTES
    return size


def check_pattern(subject: str) -> None:
    """Internal unless one can subscribe to `subject`: no empty part, no blank, wildcards in their places."""
    parts = subject.split(".")
    for number, part in enumerate(parts, 1):
        wildcard = part == "*" or (part == ">" and number == len(parts))
        if _PART.fullmatch(part) is None and not wildcard:
            raise Internal(f"{subject!r} is no subject to subscribe to")


def from_nats(subject: str, reply: str, data: bytes, headers: dict[Any, str] | None) -> Message:
    """A message of nats-py as ours. Its own status keys are enum members that hash unlike their text."""
    if not headers:
        return Message(subject, data, {}, reply)
    plain = {str(getattr(key, "value", key)): value for key, value in headers.items()}
    status = plain.get("Status", "")
    if status.isdigit() and not data:
        return Message(subject, data, plain, reply, int(status), plain.get("Description", ""))
    return Message(subject, data, plain, reply)
