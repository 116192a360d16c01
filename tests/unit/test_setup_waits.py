"""A worker with --setup waits for a cluster that has no leader yet, and for nothing that waiting does not mend."""

from typing import Any, cast

import pytest

from schemas.subjects import Subjects
from worker.bus import streams
from worker.bus.connection import Bus
from worker.bus.failures import JetStreamError, NoAnswer, NotConnected
from worker.bus.streams import Created, set_up_at_last
from worker.errors import Configuration

MADE = Created(("SANDFLEET_EVT",), ())
PASSING = [
    NoAnswer("no answer on $JS.API.STREAM.INFO.SANDFLEET_EVT within 5 s"),
    NotConnected("the connection broke"),
    JetStreamError(503, 10008, "JetStream system temporarily unavailable"),
    JetStreamError(400, 10005, "no suitable peers for placement"),
]


class Link:
    async def wait_connected(self) -> None:
        return None


async def set_up(monkeypatch: pytest.MonkeyPatch, *outcomes: Exception | Created) -> Created:
    left = list(outcomes)

    async def setup_streams(*args: Any, **options: Any) -> Created:
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(streams, "setup_streams", setup_streams)
    monkeypatch.setattr(streams, "RETRY_S", 0.0)
    made = await set_up_at_last(cast("Bus", Link()), subjects=Subjects(), pools=())
    assert not left
    return made


@pytest.mark.parametrize("failure", PASSING, ids=lambda failure: failure.message)
async def test_what_passes_is_waited_for(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    assert await set_up(monkeypatch, failure, failure, MADE) == MADE


@pytest.mark.parametrize(
    "failure",
    [JetStreamError(500, 10074, "replicas > 1 not supported"), Configuration("JetStream is off")],
    ids=lambda failure: failure.message,
)
async def test_what_does_not_pass_is_told(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    with pytest.raises(type(failure)):
        await set_up(monkeypatch, failure, MADE)
