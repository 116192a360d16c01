"""ULIDs: 26 characters that sort by the time they were made (https://github.com/ulid/spec).

48 bits of Unix milliseconds, 80 random bits, Crockford's base 32. A maker never gives two that are equal
or out of order: within one millisecond, or when the clock steps back, the last value is raised by a small
random step.
"""

import secrets
import threading
from datetime import datetime

from worker.clock import Clock, from_us, to_us, utc_now

ULID_LENGTH = 26

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_VALUE = {char: value for value, char in enumerate(_ALPHABET)}
_RANDOM_BITS = 80
_LIMIT = 1 << 128


class UlidMaker:
    """Makes strictly rising ULIDs; safe to share between threads."""

    def __init__(self, clock: Clock = utc_now) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._last = 0

    def new(self) -> str:
        with self._lock:
            return self._next()

    def above(self, other: str) -> str:
        """A ULID above `other` and all made before. ValueError when `other` is no ULID, or the last one."""
        floor = decode_ulid(other)
        with self._lock:
            self._last = max(self._last, floor)
            return self._next()

    def _next(self) -> str:
        stamp = to_us(self._clock()) // 1000
        value = stamp << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
        if value <= self._last:
            # A random step keeps the next one as hard to guess as the spec wants, without using up the range.
            value = self._last + 1 + secrets.randbits(32)
        if value >= _LIMIT:
            raise ValueError("no ULID is left above the one given")
        self._last = value
        return encode_ulid(value)


def encode_ulid(value: int) -> str:
    chars = []
    for _ in range(ULID_LENGTH):
        chars.append(_ALPHABET[value & 31])
        value >>= 5
    return "".join(reversed(chars))


def decode_ulid(text: str) -> int:
    """The 128 bits. ValueError unless `text` is a ULID in its canonical form (26 characters, upper case)."""
    if not is_ulid(text):
        raise ValueError(f"{text[:40]!r} is no ULID")
    value = 0
    for char in text:
        value = value << 5 | _VALUE[char]
    return value


def is_ulid(text: str) -> bool:
    return len(text) == ULID_LENGTH and text[0] <= "7" and all(char in _VALUE for char in text)


def ulid_time(text: str) -> datetime:
    """When it was made. ValueError as in `decode_ulid`, OverflowError past the year 9999."""
    return from_us((decode_ulid(text) >> _RANDOM_BITS) * 1000)


new_ulid = UlidMaker().new
"""For identities that need no order with another maker's: instances, command ids, sessions."""
