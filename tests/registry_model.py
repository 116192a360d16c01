"""What the test registry is told: how to fail, and what it remembers of a request."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path

Blob = bytes | Path


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@dataclass
class Fault:
    """What happens to the next `times` requests whose `METHOD path` matches; -1: to all.

    kind      cut: the connection ends after `at` bytes of the body    stall: it goes silent there
              status: answer `status` with `headers`                   redirect: to `url`
              corrupt: one byte of the body is another                 grow: `at` bytes are appended
              endless: bytes without a length that never end           no_range: the whole, whatever was asked
              shift: a range that was not asked for                    head: header lines without end
              continue: 100 Continue without end                       garbage: no HTTP
              hang_up: nothing at all                                  drip: a byte now and then
              body: answer `status` with `body`
              short: take `at` bytes of the request's body and hang up; what came of an upload is kept
    """

    kind: str
    match: str = ""
    times: int = 1
    at: int = 0
    status: int = 503
    url: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    # Set: no more of it, and who went silent hangs up.
    over: threading.Event = field(default_factory=threading.Event)


@dataclass
class Seen:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""
