"""How long to wait for an answer from a server that may be near, far, slow or gone. Pure.

An answer that is not waited for long enough is asked for again, and again for nothing: a server that needs
longer than the wait would never be heard. One that is waited for too long holds up what follows when it was
lost, as a leader that steps down loses what it was asked.
"""

SAFETY = 4  # times what answers usually take
AFTER_SILENCE = 1.5
_ENOUGH = 32  # silences; more make no difference


class Patience:
    """`seconds`: at least `least_s`, at most `longest_s`."""

    def __init__(self, least_s: float, longest_s: float) -> None:
        self._least_s = least_s
        self._longest_s = longest_s
        self._usual_s = 0.0
        self._silences = 0

    @property
    def seconds(self) -> float:
        wanted = max(self._least_s, SAFETY * self._usual_s) * AFTER_SILENCE**self._silences
        return min(wanted, self._longest_s)

    def answered(self, took_s: float) -> None:
        """Slower answers count at once, quicker ones by and by."""
        self._silences = 0
        self._usual_s = max(took_s, self._usual_s + (took_s - self._usual_s) * 0.1)

    def silent(self, waited_s: float) -> None:
        """None came in time. Of several that were waited for together, only the first counts."""
        if waited_s >= self.seconds:
            self._silences = min(self._silences + 1, _ENOUGH)
