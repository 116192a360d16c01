"""Keeps values that were registered as secret, and whatever is a signed token, out of every log line."""

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from urllib.parse import quote

HIDDEN = "[secret]"
_SHORTEST_LINE = 8
# A JWT: three parts of base64url, the first two of which are JSON objects, hence `eyJ`. Known by its looks: each
# container has several, and a pattern of all of them would have to be compiled anew at each renewal.
_JSON = "eyJ"
_JWT = re.compile(r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]*\.[A-Za-z0-9_-]{20,}")


class Redactor:
    """Knows the secrets as they are and as they look when quoted; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: Counter[str] = Counter()
        self._pattern: re.Pattern[str] | None = None

    def add(self, value: str | bytes) -> None:
        """From now on the value, its lines and its escaped forms are replaced. An empty one counts as none."""
        with self._lock:
            self._known.update(_forms(value))
            self._compile()

    def discard(self, value: str | bytes) -> None:
        """Once for each `add` of it."""
        with self._lock:
            self._known -= Counter(_forms(value))
            self._compile()

    def scrub(self, text: str) -> str:
        if self._pattern is not None:
            text = self._pattern.sub(HIDDEN, text)
        return _JWT.sub(HIDDEN, text) if _JSON in text else text

    def _compile(self) -> None:
        # The longest first: a secret may begin with another one.
        forms = sorted(self._known, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, forms))) if forms else None


def _forms(value: str | bytes) -> set[str]:
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
    return {form for form in _all_forms(text) if form}


def _all_forms(text: str) -> Iterator[str]:
    yield text
    yield text.strip()
    yield repr(text)[1:-1]
    yield json.dumps(text)[1:-1]
    yield quote(text.encode("utf-8", "surrogateescape"), safe="")
    lines = text.splitlines()
    if len(lines) > 1:
        yield from (line.strip() for line in lines if len(line.strip()) >= _SHORTEST_LINE)
