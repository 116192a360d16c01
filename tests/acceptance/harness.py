"""A raw NATS client that knows only the contract, and whole worker processes to try it on.

Nothing here imports the project: what it knows of subjects, streams and messages is written out by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nats
import pytest
from nats.js.api import ConsumerConfig, DeliverPolicy

from tests.broker import BROKER, Address, cannot, wait_for

if TYPE_CHECKING:
    from tests.containers import ServerContainer

P = "sandfleet.v1"
BIN = Path(sys.executable).parent
DEADLINE_S = 15.0


def new_id() -> str:
    return uuid.uuid4().hex


class Server:
    """A nats-server with JetStream on a free port and a store that survives restarts.

    A process, a container, or somebody else's server, which is emptied and can be neither stopped nor killed:
    tests/broker.py has the switch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | ServerContainer | None = None
        self._address = Address("fleet") if BROKER.form == "address" else None
        self._port = 0 if self._address is not None else _free_port()

    @property
    def port(self) -> int:
        return self._port if self._address is None else self._address.port

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._port}" if self._address is None else self._address.url

    def start(self) -> None:
        if self._address is not None:
            wait_for(self._address.claim())
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = self._spawn(["-a", "127.0.0.1", "-p", str(self._port), "-js", "-sd", str(self.folder)])
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 0.2):
                return
            time.sleep(0.01)
        raise AssertionError("nats-server did not start")

    def _spawn(self, arguments: list[str]) -> subprocess.Popen[bytes] | ServerContainer:
        if BROKER.form == "testcontainers":
            from tests.containers import ServerContainer, no_engine

            if reason := no_engine():
                pytest.skip(reason)
            return ServerContainer(arguments, [self.folder])
        with (self.folder / "server.log").open("ab") as log:
            return subprocess.Popen(
                [str(BIN / "nats-server"), *arguments], stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._address is not None:
            cannot("this test ends its server")
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(10)
            self.process = None

    def close(self) -> None:
        """When the test is over."""
        if self._address is not None:
            wait_for(self._address.release())
        else:
            self.stop()


class Worker:
    """A `sandfleet worker` process on a data directory of its own."""

    def __init__(self, folder: Path, server: Server, node: str, config: str = "") -> None:
        self.folder = folder
        self.server = server
        self.node = node
        self.data = folder / "data"
        self.log_path = folder / "worker.log"
        self.config = folder / "node.toml"
        folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(config)
        self.process: subprocess.Popen[bytes] | None = None

    def argv(self, *extra: str) -> list[str]:
        return [
            str(BIN / "sandfleet"), "worker", "--nats", self.server.url, "--node", self.node,
            "--data-dir", str(self.data), "--config", str(self.config), "--setup", "--insecure", *extra,
        ]  # fmt: skip

    def start(self, *extra: str) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv(*extra), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)
        self.process = None

    def terminate(self) -> int:
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(20)
        self.process = None
        return code

    def launcher_pid(self) -> int | None:
        """The launcher of this data directory, found as an operator would: by its command line."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _is_launcher(int(entry.name), self.data):
                with contextlib.suppress(OSError):
                    parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    if not _is_launcher(parent, self.data):
                        return int(entry.name)
        return None

    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""


def _is_launcher(pid: int, data: Path) -> bool:
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(a.endswith(b"launcher/__main__.py") for a in argv) and str(data).encode() in argv


class Client:
    """What a scheduler and a dashboard do, with plain NATS."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.nc: Any = None
        self.js: Any = None
        self.events: list[dict[str, Any]] = []
        self._sub: Any = None
        self._arrived = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def connect(self, url: str) -> Client:
        async def quiet(_: Exception) -> None:
            return None

        self.nc = await nats.connect(
            url, max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=quiet, allow_reconnect=True
        )
        self.js = self.nc.jetstream(timeout=10)
        return self

    async def follow(self) -> None:
        """Read every event of the node from the first on, by a cursor of our own."""
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        subject = f"{P}.evt.{self.node}.>"
        last = 0
        while True:
            sub = None
            try:
                config = ConsumerConfig(
                    deliver_policy=DeliverPolicy.BY_START_SEQUENCE if last else DeliverPolicy.ALL,
                    opt_start_seq=last + 1 if last else None,
                )
                sub = await self.js.subscribe(
                    subject, stream="SANDFLEET_EVT", config=config, ordered_consumer=False, manual_ack=True
                )
                while True:
                    message = await sub.next_msg(timeout=1.0)
                    last = message.metadata.sequence.stream
                    event = json.loads(message.data)
                    event["_subject"] = message.subject
                    event["_headers"] = dict(message.headers or {})
                    self.events.append(event)
                    self._arrived.set()
                    await message.ack()
            except asyncio.CancelledError:
                raise
            except nats.errors.TimeoutError:
                if sub is not None:
                    with contextlib.suppress(Exception):
                        await sub.unsubscribe()
            except Exception:
                await asyncio.sleep(0.1)

    async def follow_live(self, also: Callable[[dict[str, Any]], None]) -> None:
        """From now on read by a core subscription instead: each event once, without acknowledgements.

        What it costs to watch is then next to nothing beside what is measured.
        """

        async def on(message: Any) -> None:
            event = json.loads(message.data)
            event["_subject"] = message.subject
            event["_headers"] = dict(message.headers or {})
            also(event)
            self.events.append(event)
            self._arrived.set()

        await self._stop_reading()
        await self.nc.subscribe(f"{P}.evt.{self.node}.>", cb=on)
        await self.nc.flush()

    async def back(self, times: int = 1) -> None:
        """Wait until the test's own connection has been lost and made again: what is asked before that is lost."""
        await until(
            lambda: self.nc.stats["reconnects"] >= times and self.nc.is_connected,
            what="the test's own connection",
        )

    async def close(self, server_runs: bool = False) -> None:
        await self._stop_reading()
        if self.nc is not None:
            if server_runs:
                # Closed in the midst of a reconnection, the library leaves its socket open.
                await until(
                    lambda: self.nc.is_connected or self.nc.is_closed, what="the test's own connection"
                )
            await self.nc.close()

    async def _stop_reading(self) -> None:
        if self._reader is not None:
            # A cancellation that meets a message just arriving can be lost in the library: ask until it ends.
            while not self._reader.done():
                self._reader.cancel()
                await asyncio.wait({self._reader}, timeout=0.2)

    # -- commands

    async def publish(self, subject: str, body: bytes, headers: dict[str, str] | None = None) -> int:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                return (await self.js.publish(subject, body, headers=headers)).seq
            except Exception:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)

    async def send(
        self, cid: str | None, verb: str, /, headers: dict[str, str] | None = None, **fields: Any
    ) -> str:
        """Publish a command; gives its id."""
        body = {"type": verb, "id": new_id(), **fields}
        await self.publish(f"{P}.cmd.{self.node}.{cid or '_'}.{verb}", json.dumps(body).encode(), headers)
        return str(body["id"])

    async def do(self, cid: str | None, verb: str, /, **fields: Any) -> dict[str, Any]:
        """Send a command and wait for its completion (or its rejection)."""
        return await self.completion(await self.send(cid, verb, **fields))

    async def ok(self, cid: str | None, verb: str, /, **fields: Any) -> dict[str, Any]:
        done = await self.do(cid, verb, **fields)
        assert done["type"] == "command_completed", done
        assert done["ok"], done["error"]
        return done

    async def completion(self, command_id: str, *, duplicate: bool = False) -> dict[str, Any]:
        def found(event: dict[str, Any]) -> bool:
            return (
                event["type"] in ("command_completed", "command_rejected")
                and event.get("command_id") == command_id
                and event.get("duplicate", False) == duplicate
            )

        return await self.event(found)

    async def event(self, found: Any, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        """The first event for which `found` holds, among all seen and to come."""
        deadline = time.monotonic() + deadline_s
        looked = 0
        while True:
            self._arrived.clear()
            for event in self.events[looked:]:
                if found(event):
                    return event
            looked = len(self.events)
            left = deadline - time.monotonic()
            assert left > 0, f"no such event within {deadline_s} s; the last: {self.events[-5:]}"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    async def state(self, cid: str, state: str, **status: Any) -> dict[str, Any]:
        """The status of the first `state_changed` of `cid` to `state` with these values."""

        def found(event: dict[str, Any]) -> bool:
            if event["type"] != "state_changed" or event["container"] != cid:
                return False
            told = event["status"]
            return told["state"] == state and all(told[k] == v for k, v in status.items())

        return (await self.event(found))["status"]

    async def now(self, cid: str, state: str) -> dict[str, Any]:
        """Wait until the node itself answers that `cid` is in `state`."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            status = await self.query("state", container=cid)
            if status.get("state") == state:
                return status
            assert time.monotonic() < deadline, f"{cid} is {status}, not {state}"
            await asyncio.sleep(0.02)

    # -- queries

    async def query(self, verb: str, timeout: float = 10.0, **fields: Any) -> dict[str, Any]:
        """A reply, or `{"error": …, "code": …}` of a micro service error."""
        reply = await self.nc.request(
            f"{P}.rpc.{self.node}.{verb}", json.dumps(fields).encode(), timeout=timeout
        )
        body = json.loads(reply.data)
        code = (reply.headers or {}).get("Nats-Service-Error-Code")
        return {"error": body, "code": int(code)} if code else body

    async def log_seen(self, cid: str, text: bytes, stream: str = "stdout") -> None:
        """Wait until the newest chunk of a stream ends with `text`."""
        deadline = time.monotonic() + DEADLINE_S
        subject = f"{P}.log.{self.node}.{cid}.{stream}"
        while True:
            with contextlib.suppress(nats.js.errors.NotFoundError):
                message = await self.js.get_last_msg("SANDFLEET_LOG", subject)
                if (message.data or b"").endswith(text):
                    return
            assert time.monotonic() < deadline, f"{cid} never printed {text!r}"
            await asyncio.sleep(0.02)

    async def stat_message(self, cid: str) -> dict[str, Any]:
        """The newest published stats sample."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            with contextlib.suppress(nats.js.errors.NotFoundError):
                message = await self.js.get_last_msg("SANDFLEET_STAT", f"{P}.stat.{self.node}.{cid}")
                return json.loads(message.data)
            assert time.monotonic() < deadline, "no stats were published"
            await asyncio.sleep(0.05)

    # -- logs

    async def log(
        self, cid: str, stream: str = "stdout", *, run: int = 1, instance: str | None = None
    ) -> Log:
        """Every chunk of a stream until the end of `run`."""
        log = Log()
        deadline = time.monotonic() + DEADLINE_S
        last = 0
        while not log.has_eof(run):
            assert time.monotonic() < deadline, f"no end of run {run} in {log.headers[-2:]}"
            with contextlib.suppress(Exception):
                config = ConsumerConfig(deliver_policy=DeliverPolicy.ALL)
                sub = await self.js.subscribe(
                    f"{P}.log.{self.node}.{cid}.{stream}",
                    stream="SANDFLEET_LOG",
                    config=config,
                    manual_ack=True,
                )
                try:
                    while not log.has_eof(run):
                        message = await sub.next_msg(timeout=1.0)
                        headers = dict(message.headers or {})
                        await message.ack()
                        seq = message.metadata.sequence.stream
                        if seq > last and (instance is None or headers["Sandfleet-Instance"] == instance):
                            last = seq
                            log.add(headers, message.data)
                finally:
                    await sub.unsubscribe()
        return log


class Log:
    """Chunks of one stream, checked as they come: each byte once, in order, or covered by a marker."""

    def __init__(self) -> None:
        self.headers: list[dict[str, str]] = []
        self.data = bytearray()
        self.lost = 0
        self.next: dict[str, int] = {}

    def add(self, headers: dict[str, str], data: bytes) -> None:
        instance, offset = headers["Sandfleet-Instance"], int(headers["Sandfleet-Offset"])
        expected = self.next.get(instance, 0)
        assert offset == expected, f"chunk at {offset}, expected {expected}: {headers}"
        lost = int(headers.get("Sandfleet-Lost", 0))
        assert not (lost and data)
        self.next[instance] = offset + len(data) + lost
        self.lost += lost
        self.data += data
        self.headers.append(headers)

    def has_eof(self, run: int) -> bool:
        return any(h.get("Sandfleet-Eof") == str(run) for h in self.headers)


class Fleet:
    """One server, one worker, one client over a throwaway folder."""

    def __init__(self, config: str = "", node: str = "n1") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sandfleet-test-"))
        self.server = Server(self.folder / "nats")
        self.images = self.folder / "images"
        self.images.mkdir()
        config = config.replace("{images}", str(self.images)).replace(
            "{prefix}", os.path.realpath(sys.base_prefix)
        )
        self.worker = Worker(self.folder / "node", self.server, node, config)
        self.client = Client(node)

    async def __aenter__(self) -> Fleet:
        try:
            self.server.start()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        try:
            self.worker.start()
            await self.client.connect(self.server.url)
            await self.ready()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def ready(self, boots: int = 1) -> None:
        """Wait until the worker has told `boots` times that it is ready."""
        if self.client._reader is None:
            await self.client.follow()
        deadline = time.monotonic() + DEADLINE_S
        while True:
            seen = {
                e["boot"] for e in self.client.events if e["type"] == "node_changed" and e["state"] == "ready"
            }
            if len(seen) >= boots:
                return
            process = self.worker.process
            assert process is None or process.poll() is None, self.worker.log_text()[-4000:]
            assert time.monotonic() < deadline, self.worker.log_text()[-4000:]
            await asyncio.sleep(0.02)

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.client.close(self.server.process is not None)
        finally:
            await self._end()

    async def _end(self) -> None:
        launcher = self.worker.launcher_pid()
        if self.worker.process is not None:
            self.worker.process.terminate()
            try:
                self.worker.process.wait(10)
            except subprocess.TimeoutExpired:
                self.worker.process.kill()
                self.worker.process.wait(5)
        launcher = self.worker.launcher_pid() or launcher
        if launcher is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(launcher, signal.SIGTERM)
            await until(lambda: not Path(f"/proc/{launcher}").exists())
        self.server.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def image(self, name: str, files: dict[str, str]) -> str:
        """A folder to register as an image; gives its path."""
        folder = self.images / name
        for path, text in files.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            if text.startswith("#!"):
                file.chmod(0o755)
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    async def register(self, name: str, files: dict[str, str] | None = None) -> str:
        """Register an image; gives its digest."""
        folder = self.image(re.sub(r"[^a-z0-9]", "-", name), files or {"etc/motd": "hello\n"})
        done = await self.client.ok(None, "register_image", image=name, source_dir=folder)
        return str(done["result"]["digest"])


async def until(condition: Any, deadline_s: float = DEADLINE_S, what: str = "the condition") -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {deadline_s} s"
        await asyncio.sleep(0.01)


def shell(script: str, **fields: Any) -> dict[str, Any]:
    """A spec that runs a shell script in the image `base`."""
    return {"image": {"name": "base"}, "command": {"entrypoint": ["/bin/sh", "-c", script]}, **fields}


def alive(pid: int) -> bool:
    """True while a process exists that is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in "ZX"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
