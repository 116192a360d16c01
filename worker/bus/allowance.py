"""How many bytes of logs may be under way: enough for the distance, and no more than the way carries. Pure.

Events and answers go over the same connection, behind what was written before them. Bytes beyond what the way
holds stand in a queue somewhere and make answers late, so the lateness tells: when an answer takes QUEUE_S
longer than the quickest of late, the allowance is halved, at most once a round trip. When they come in time and
the allowance is what holds sending back, it grows: doubled each round trip until the first halving, then by an
eighth. (The thought is that of TCP Vegas and LEDBAT, RFC 6817; as there is but one sender, nothing is shared.)
"""

QUEUE_S = 0.25
START_BYTES = 2 * 1024 * 1024
LEAST_BYTES = 256 * 1024
RECENT_S = 10.0


class Allowance:
    """`limit_bytes` is what may be under way; times are seconds of any one clock."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._least = min(LEAST_BYTES, most_bytes)
        self.limit_bytes = min(START_BYTES, most_bytes)
        self._halved = False
        self._react_at = float("-inf")
        self._quickest_s = self._quickest_before_s = float("inf")
        self._bucket_ends = float("-inf")

    @property
    def usual_s(self) -> float:
        """The quickest answer of the last 10 to 20 seconds: what the distance alone takes."""
        return min(self._quickest_s, self._quickest_before_s)

    def answered(self, size: int, took_s: float, now: float, *, held_back: bool) -> None:
        """A chunk of `size` bytes was answered; `held_back`: others wait for the allowance."""
        if now >= self._bucket_ends:
            self._quickest_before_s, self._quickest_s = self._quickest_s, took_s
            self._bucket_ends = now + RECENT_S
        self._quickest_s = min(self._quickest_s, took_s)
        if took_s > self.usual_s + QUEUE_S:
            self._late(took_s, now)
        elif held_back:
            grown = self.limit_bytes + (size // 8 if self._halved else size)
            self.limit_bytes = min(grown, self._most)

    def silent(self, waited_s: float, now: float) -> None:
        """No answer came in the time it was waited for."""
        self._late(waited_s, now)

    def _late(self, took_s: float, now: float) -> None:
        if now < self._react_at:
            return
        self._halved = True
        self._react_at = now + took_s  # what is under way already is late too
        self.limit_bytes = max(self.limit_bytes // 2, self._least)
