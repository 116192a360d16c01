"""How long to wait for a registry, and how often to try."""

import math
import random
from datetime import datetime
from email.utils import parsedate_to_datetime

import msgspec

MAX_RETRY_AFTER_S = 120.0


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """`idle_s` bounds the wait for the next bytes, `headers_s` that for all of a response's head.

    A body that brings less than `slow_bytes` in each `slow_s` has stalled. `attempts` count from the last
    progress: whoever goes on sending is never given up. Who was not there at the first question is asked
    `absent_attempts` times.
    """

    connect_s: float = 10.0
    headers_s: float = 60.0
    idle_s: float = 30.0
    slow_bytes: int = 64 * 1024
    slow_s: float = 60.0
    attempts: int = 6
    absent_attempts: int = 3
    backoff_s: float = 0.5
    max_backoff_s: float = 20.0

    def pause_s(self, failures: int, after_s: float | None) -> float:
        """The wait before the next try, after so many failures in a row.

        What the registry asked for (Retry-After) counts up to two minutes.
        """
        backoff = min(self.max_backoff_s, self.backoff_s * 2.0 ** (failures - 1))
        spread = backoff * random.uniform(0.5, 1.0)
        return spread if after_s is None else min(max(after_s, spread), MAX_RETRY_AFTER_S)


def parse_retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds, from either form of the header (RFC 9110, 10.2.3); None for anything else."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text) if len(text) < 10 else math.inf
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        return None
    return max(0.0, (moment - now).total_seconds())
