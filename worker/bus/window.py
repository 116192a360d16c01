"""Who may send now: a window over all subjects, a turnstile that keeps order through a reconnect, and who waits
behind a refused one.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable

WINDOW_BYTES = 16 * 1024 * 1024  # 50 MB/s at 300 ms
WINDOW_MESSAGES = 96


class Place:
    """A chunk's place in the window. `number` counts the admissions."""

    __slots__ = ("admitted", "number", "size", "subject")

    def __init__(self, subject: str, size: int) -> None:
        self.subject = subject
        self.size = size
        self.number = 0
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Window:
    """Admits chunks up to `max_messages` and `max_bytes` (always one), by turns over the subjects that
    wait.
    """

    def __init__(self, max_messages: int = WINDOW_MESSAGES, max_bytes: int = WINDOW_BYTES) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._messages = 0
        self._bytes = 0
        self._waiting: dict[str, deque[Place]] = {}  # in the order of their turns
        self._waking = 0  # admitted, and not running yet
        self._admissions = 0

    async def enter(self, subject: str, size: int) -> Place:
        place = Place(subject, size)
        # Nobody overtakes one that was admitted and has yet to run.
        if not self._waiting and not self._waking and self._has_room(size):
            self._take(place)
            return place
        self._waiting.setdefault(subject, deque()).append(place)
        try:
            await place.admitted
        except asyncio.CancelledError:
            self._withdraw(place)
            raise
        self._waking -= 1
        self._next_turns()
        return place

    def leave(self, place: Place) -> None:
        self._messages -= 1
        self._bytes -= place.size
        self._next_turns()

    @property
    def holds_back(self) -> bool:
        """Whether somebody waits for a place."""
        return bool(self._waiting)

    def resize(self, max_bytes: int) -> None:
        """Who is inside stays."""
        self._max_bytes = max_bytes
        self._next_turns()

    def _has_room(self, size: int) -> bool:
        if self._messages == 0:
            return True
        return self._messages < self._max_messages and self._bytes + size <= self._max_bytes

    def _take(self, place: Place) -> None:
        self._admissions += 1
        place.number = self._admissions
        self._messages += 1
        self._bytes += place.size

    def _next_turns(self) -> None:
        while self._waiting:
            subject, places = next(iter(self._waiting.items()))
            if not self._has_room(places[0].size):
                return
            place = places.popleft()
            del self._waiting[subject]
            if places:
                self._waiting[subject] = places  # at the end of the turns
            if place.admitted.cancelled():
                continue
            self._take(place)
            self._waking += 1
            place.admitted.set_result(None)

    def _withdraw(self, place: Place) -> None:
        """Cancelled while it waited, or just after it was admitted."""
        if not place.admitted.cancelled():
            self._waking -= 1
            self.leave(place)
            return
        places = self._waiting.get(place.subject)
        if places is not None and place in places:
            places.remove(place)
            if not places:
                del self._waiting[place.subject]
        self._next_turns()


class Turnstile:
    """Lets one through at a time while it is open: at once, or in order of `number` when several wait.

    Who waited when a connection broke goes before who comes later, so that a chunk that is sent again is not
    overtaken by a new one. Call `advance` when it may have opened.
    """

    def __init__(self, is_open: Callable[[], bool]) -> None:
        self._is_open = is_open
        self._busy = False
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = 0

    async def enter(self, number: int) -> None:
        if not self._busy and not self._waiting and self._is_open():
            self._busy = True
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals += 1
        heapq.heappush(self._waiting, (number, self._arrivals, future))
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():  # it was let through already
                self.leave()
            raise

    def leave(self) -> None:
        self._busy = False
        self.advance()

    def advance(self) -> None:
        while self._waiting and not self._busy and self._is_open():
            _, _, future = heapq.heappop(self._waiting)
            if not future.cancelled():
                self._busy = True
                future.set_result(None)


class Refusals:
    """Keeps the chunks of a subject in order when the server refuses some, as a full stream does.

    The first that was refused is the subject's head: it alone is tried again, and all that were admitted later wait
    in `turn`. Once it is stored they go on, in their order.
    """

    def __init__(self) -> None:
        self._heads: dict[str, Place] = {}
        self._waiting: dict[str, list[tuple[int, asyncio.Future[None]]]] = {}

    def refused(self, place: Place) -> None:
        head = self._heads.get(place.subject)
        if head is None or place.number < head.number:
            self._heads[place.subject] = place

    def is_head(self, place: Place) -> bool:
        return self._heads.get(place.subject) is place

    async def turn(self, place: Place) -> None:
        """Return when no earlier one is refused."""
        while (head := self._heads.get(place.subject)) is not None and head.number < place.number:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(place.subject, []).append((place.number, future))
            await future

    def settled(self, place: Place) -> None:
        """It is stored, or was given up."""
        if not self.is_head(place):
            return
        del self._heads[place.subject]
        for _, future in sorted(self._waiting.pop(place.subject, []), key=lambda waiting: waiting[0]):
            if not future.done():
                future.set_result(None)
