"""Faults of the servers and of their streams: killed, purged, made anew, put back from an older store, without a
leader.

What is taken from the events or the logs was read before, and what is taken from the commands is noted: so the
judge has nothing to excuse that it cannot name.
"""

import asyncio
import base64
import contextlib
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from .history import COMMANDS, EVENTS, LOGS, History, Loss, Refusal, digest
from .processes import Server
from .publisher import Publisher
from .reader import Reader, ReadFailed
from .world import World

STREAMS = (EVENTS, LOGS, COMMANDS)
API_S = 5.0
PATIENCE_S = 60.0
POLL_S = 0.02
UNAVAILABLE = 503  # no leader, or none yet
NO_PEERS = 10005  # servers that have just begun are not counted yet


class ServerFaults:
    """`nc` is a connection straight to the servers."""

    def __init__(self, world: World, reader: Reader, history: History, nc: Any, publisher: Publisher) -> None:
        self._world = world
        self._reader = reader
        self._history = history
        self._nc = nc
        self._publisher = publisher
        self._copy: Path | None = None

    # -- asking

    async def _api(self, call: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """JetStream's API, asked until it answers."""
        deadline = time.monotonic() + PATIENCE_S
        said: object = None
        while time.monotonic() < deadline:
            try:
                body = json.dumps(request).encode() if request is not None else b""
                raw = await self._nc.request(f"$JS.API.{call}", body, timeout=API_S)
                answer = dict(json.loads(raw.data))
            except Exception as failure:  # whatever: the server is killed on purpose
                said = failure
            else:
                said = error = answer.get("error") or {}
                if error.get("code") != UNAVAILABLE and error.get("err_code") != NO_PEERS:
                    return answer
            await asyncio.sleep(0.1)
        raise AssertionError(f"{call} was not answered in {PATIENCE_S:g} s: {said}")

    async def _info(self, stream: str) -> dict[str, Any]:
        return await self._api(f"STREAM.INFO.{stream}")

    async def _state(self, stream: str) -> dict[str, Any]:
        return dict((await self._info(stream))["state"])

    async def _held(self) -> list[tuple[int, str]]:
        """What the command stream holds: by sequence and digest."""
        found: list[tuple[int, str]] = []
        seq = 1
        pattern = f"{self._history.prefix}.cmd.>"
        while True:
            answer = await self._api(f"STREAM.MSG.GET.{COMMANDS}", {"seq": seq, "next_by_subj": pattern})
            message = answer.get("message")
            if message is None:
                return found
            found.append(
                (message["seq"], digest(message["subject"], base64.b64decode(message.get("data", ""))))
            )
            seq = message["seq"] + 1

    async def _read_all(self, stream: str) -> None:
        """To the end of a stream to which nothing comes any more."""
        deadline = time.monotonic() + PATIENCE_S
        before = -1
        while time.monotonic() < deadline:
            state = await self._state(stream)
            with contextlib.suppress(ReadFailed):
                await self._reader.catch_up(stream)
                read = not state["messages"] or self._reader.last(stream) >= state["last_seq"]
                if read and state["last_seq"] == before:
                    return
            before = state["last_seq"]
            await asyncio.sleep(POLL_S)
        raise AssertionError(f"{stream} could not be read to its end")

    def _lose(self, what: Any, stream: str, generation: int = 0, **more: Any) -> None:
        self._history.losses.append(
            Loss(what=what, stream=stream, at=self._publisher.now(), generation=generation, **more)
        )

    def _may_refuse(self) -> None:
        """It takes connections before its streams are there: what comes then is refused."""
        self._history.refusals.append(
            Refusal(generation=self._reader.generation[LOGS], after=self._reader.last(LOGS))
        )

    # -- one server

    async def do_server_kill(self, pause_s: float) -> None:
        async with self._world.server_lock:
            await self._kill(self._world.servers[0], pause_s)

    async def do_server_stop(self, hold_s: float) -> None:
        async with self._world.server_lock:
            await self._stop(self._world.servers[0], hold_s)

    async def _kill(self, server: Server, pause_s: float) -> None:
        self._may_refuse()
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(pause_s)
        await asyncio.to_thread(server.start)

    async def _stop(self, server: Server, hold_s: float) -> None:
        server.signal(signal.SIGSTOP)
        await asyncio.sleep(hold_s)
        server.signal(signal.SIGCONT)

    async def do_copy(self) -> None:
        """Keep a copy of the server's store, as a crash at this moment would leave it."""
        (server,) = self._world.servers
        copy = self._world.folder / "copy"
        async with self._world.server_lock:
            self._may_refuse()
            await asyncio.to_thread(server.kill)
            shutil.rmtree(copy, ignore_errors=True)
            await asyncio.to_thread(shutil.copytree, server.folder, copy)
            await asyncio.to_thread(server.start)
        self._copy = copy

    async def do_put_back(self, pause_s: float) -> None:
        """The server goes on from the copy: what it stored since is gone."""
        world, reader = self._world, self._reader
        (server,) = world.servers
        if self._copy is None:
            return
        async with world.server_lock, self._publisher.silence(), world.link.away():
            for stream in (EVENTS, LOGS):
                await self._read_all(stream)
            held = await self._held()
            async with reader.new_generation(EVENTS, LOGS):
                await asyncio.to_thread(server.kill)
                shutil.rmtree(server.folder)
                await asyncio.to_thread(shutil.copytree, self._copy, server.folder)
                await asyncio.sleep(pause_s)
                await asyncio.to_thread(server.start)
                for stream in (EVENTS, LOGS):
                    state, generation = await self._state(stream), reader.generation[stream] + 1
                    purged = max(0, state["first_seq"] - 1)
                    self._lose("put back", stream, generation, upto=state["last_seq"], purged=purged)
                    if stream == LOGS:
                        self._history.refusals.append(Refusal(generation=generation, after=state["last_seq"]))
            kept = set(await self._held())
            self._lose("put back", COMMANDS, taken=[place for place in held if place not in kept])

    # -- streams

    async def do_purge(self, stream: str) -> None:
        async with self._world.server_lock:
            if stream == COMMANDS:
                async with self._publisher.silence():
                    held = await self._held()
                    await self._api(f"STREAM.PURGE.{stream}")
                    self._lose("purged", stream, taken=held)
                return
            with contextlib.suppress(ReadFailed):
                await self._reader.catch_up(stream)
            generation, upto = self._reader.generation[stream], self._reader.last(stream)
            await self._api(f"STREAM.PURGE.{stream}", {"seq": upto + 1})
            self._lose("purged", stream, generation, upto=upto)

    async def do_make_anew(self, stream: str, pause_s: float) -> None:
        async with self._world.server_lock, contextlib.AsyncExitStack() as until_made:
            config = (await self._info(stream))["config"]
            if stream == COMMANDS:
                async with self._publisher.silence():
                    held = await self._held()
                    await self._api(f"STREAM.DELETE.{stream}")
                    self._lose("made anew", stream, taken=held)
            else:
                async with self._world.link.away():
                    await self._read_all(stream)
                    await until_made.enter_async_context(self._reader.new_generation(stream))
                    generation = self._reader.generation[stream] + 1
                    if stream == LOGS:
                        self._history.refusals.append(Refusal(generation=generation, after=0))
                    await self._api(f"STREAM.DELETE.{stream}")
                    self._lose("made anew", stream, generation)
            await asyncio.sleep(pause_s)
            await self._api(f"STREAM.CREATE.{stream}", config)
            if self._world.is_cluster:
                await self._whole()

    # -- a cluster

    async def do_leader_kill(self, stream: str, pause_s: float) -> None:
        async with self._world.server_lock:
            await self._kill(await self._leader(stream), pause_s)
            await self._whole()

    async def do_leader_stop(self, stream: str, hold_s: float) -> None:
        async with self._world.server_lock:
            self._may_refuse()
            await self._stop(await self._leader(stream), hold_s)
            await self._whole()

    async def do_step_down(self, stream: str) -> None:
        async with self._world.server_lock:
            self._may_refuse()
            await self._api(f"STREAM.LEADER.STEPDOWN.{stream}")
            if stream == COMMANDS:
                await self._api(f"CONSUMER.LEADER.STEPDOWN.{stream}.{self._history.node}")

    async def _leader(self, stream: str) -> Server:
        while True:
            name = (await self._info(stream))["cluster"].get("leader")
            for server in self._world.servers:
                if server.name == name:
                    return server
            await asyncio.sleep(POLL_S)

    async def _whole(self) -> None:
        """Every stream has a leader and two others that know what it knows: a cluster loses nothing by one server."""
        deadline = time.monotonic() + PATIENCE_S
        for stream in STREAMS:
            while True:
                cluster = (await self._info(stream)).get("cluster", {})
                replicas = cluster.get("replicas") or []
                current = [one for one in replicas if one.get("current") and not one.get("offline")]
                if cluster.get("leader") and len(current) == len(self._world.servers) - 1:
                    break
                if time.monotonic() > deadline:
                    raise AssertionError(f"{stream} does not get its replicas back: {cluster}")
                await asyncio.sleep(POLL_S)
