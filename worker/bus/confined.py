"""Asking as a user whom the server confines: a question that is not allowed gets no answer, only a complaint beside
the connection. Here the two come together, so that nobody waits for what will not come.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from worker.bus.connection import Bus
from worker.bus.failures import NoAnswer

POLL_S = 0.01
Answer = TypeVar("Answer")


class NotAllowed(NoAnswer):
    """The server's permissions keep this user from asking."""


async def ask(bus: Bus, question: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer to one question at a time. NotAllowed as soon as the server refuses it (on a connection that was
    refused less than the hundred times that it keeps; after that when the question's own time is up).
    """
    before = len(bus.complaints)
    asking = asyncio.ensure_future(question)
    try:
        while not asking.done():
            await asyncio.wait({asking}, timeout=POLL_S)
            refused = [text for text in bus.complaints[before:] if is_refusal(text)]
            if refused and not asking.done():
                raise NotAllowed(f"not allowed to ask: {refused[0]}")
        return asking.result()
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def can_hear(bus: Bus) -> bool:
    """Whether answers can come: the server let this connection subscribe to its own inbox."""
    await bus.flush()
    inbox = f'subscription to "{bus.inbox_prefix}.'.casefold()
    return not any(is_refusal(text) and inbox in text.casefold() for text in bus.complaints)


def is_refusal(complaint: str) -> bool:
    return "permissions violation" in complaint.casefold()
