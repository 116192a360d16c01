"""Servers for the integration tests in each of the three forms of tests/broker.py, behind one class."""

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.broker import BROKER, Address, cannot
from worker.bus.server import EmbeddedServer

if TYPE_CHECKING:
    from tests.containers import ServerContainer

# What an address cannot be told: it is configured already.
_OPTIONS = ("port", "token", "config", "name", "domain", "jetstream")


def make_server(*, store_dir: Path, purpose: str = "test", **options: Any) -> EmbeddedServer:
    """An EmbeddedServer, or what stands for one under SANDFLEET_TEST_NATS; not started. `end_server` ends it.

    Skips where the form cannot do what is asked. `purpose`: see `Address`.
    """
    if BROKER.form == "testcontainers":
        from tests.containers import no_engine  # only here: the other forms do without testcontainers

        if reason := no_engine():
            pytest.skip(reason)
        return ContainerServer(store_dir=store_dir, **options)
    if BROKER.form == "address":
        for name in _OPTIONS:
            if name in options:
                cannot(f"this test sets the server's {name}")
        return AddressServer(store_dir=store_dir, purpose=purpose)
    return EmbeddedServer(store_dir=store_dir, **options)


async def end_server(server: EmbeddedServer) -> None:
    """After the test: a server of ours is ended, one of an address is left without streams."""
    if isinstance(server, AddressServer):
        await server.release()
    else:
        await server.stop()


class ContainerServer(EmbeddedServer):
    """The same server with the same configuration and store, its process in a container."""

    _process: "ServerContainer | None"  # type: ignore[assignment]

    async def _spawn(self, binary: Path) -> None:
        from tests.containers import ServerContainer

        lock = await self._lock_for_child()  # ends a plain server whose owner was killed, as ever
        os.close(lock)
        for stale in self.store_dir.glob("*.ports"):
            stale.unlink()
        self._write_config()
        folders = {self.store_dir}
        if self._config is not None:
            folders.add(
                self._config.parent.parent
            )  # where pytest makes the folders: certificates are in another
        arguments = ["-c", str(self.store_dir / "server.conf")]
        self._process = await asyncio.to_thread(ServerContainer, arguments, folders)

    def log_tail(self) -> str:
        return self._process.log.decode("utf-8", "replace") if self._process is not None else ""


class AddressServer(EmbeddedServer):
    """A server that somebody else runs, without streams at the start. A test that ends it or looks at its process or
    files is skipped there and then.
    """

    def __init__(self, *, store_dir: Path, purpose: str) -> None:
        self._address = Address(purpose)
        super().__init__(store_dir=store_dir)

    @property
    def running(self) -> bool:
        return True

    @property
    def pid(self) -> int | None:
        cannot("this test looks at the server's process")

    @property
    def port(self) -> int:
        return self._address.port

    @port.setter
    def port(self, asked: int) -> None:
        """The address has it."""

    @property
    def store_dir(self) -> Path:
        cannot("this test uses the server's files")

    @store_dir.setter
    def store_dir(self, asked: Path) -> None:
        """The server has its own, wherever it is."""

    async def start(self) -> str:
        await self._address.claim()
        self.url = self._address.url
        return self.url

    async def stop(self, *, kill: bool = False) -> None:
        cannot("this test ends its server")

    async def release(self) -> None:
        await self._address.release()
