"""What every verb is given: where to print, how to reach the fleet, which node and container are meant."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import msgspec

from schemas.errors import InvalidCommand
from schemas.subjects import parse_cid
from schemas.values import SERVICE, check_node
from worker.bus.failures import NoAnswer, NoResponders
from worker.cli.devfile import DevFile, find
from worker.cli.output import Output
from worker.cli.parser import Namespace
from worker.config import NatsConfig, load_config
from worker.errors import Conflict, NotFound, Unavailable

if TYPE_CHECKING:
    from worker.client import FleetClient


@dataclass(frozen=True, slots=True)
class Target:
    """A container and the node it is on."""

    node: str
    cid: str


class Context:
    def __init__(
        self,
        out: Output,
        *,
        nats: str | None = None,
        creds: str | None = None,
        node: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.out = out
        self.env = os.environ if env is None else env
        self._nats = nats
        self._creds = creds
        self.chosen_node = node or self.env.get("SANDFLEET_NODE") or None

    @classmethod
    def of(cls, args: Namespace) -> Self:
        """From a verb's options; a verb that does not connect has only some of them."""
        given: dict[str, Any] = vars(args)
        return cls(
            Output(as_json=bool(given.get("json"))),
            nats=given.get("nats"),
            creds=given.get("creds"),
            node=given.get("node"),
        )

    def nats_config(self) -> NatsConfig:
        """Where to connect: by flags, environment, the file of SANDFLEET_CONFIG, a running `dev`."""
        config = load_config(None, self.env, {"nats.url": self._nats, "nats.creds": self._creds})
        if "nats.url" in config.origins:
            return config.nats
        running = self.running_dev()
        if running is None:
            return config.nats
        return msgspec.structs.replace(config.nats, url=running.url_with_token())

    def running_dev(self) -> DevFile | None:
        return find(self.env)

    @asynccontextmanager
    async def fleet(self, *, replicas: int | None = None) -> "AsyncIterator[FleetClient]":
        """A connected client. NoAnswer when no server is there."""
        from worker.client import FleetClient  # `worker` and other verbs of this machine need none

        if self.chosen_node is not None:
            check_node(self.chosen_node, field="--node")
        quiet_logs()
        config = self.nats_config()
        if replicas is not None:
            config = msgspec.structs.replace(config, replicas=replicas)
        try:
            async with self.out.busy("connecting"):
                client = await FleetClient.connect(config)
        except Unavailable as failure:
            raise NoAnswer(
                f"{failure.message}; start sandfleet dev, or name the server with --nats"
            ) from None
        try:
            yield client
        finally:
            await client.close()

    async def node(self, fleet: "FleetClient") -> str:
        """The node that is meant: the chosen one, or the only one."""
        return self.chosen_node or await fleet.default_node()

    async def locate(self, fleet: "FleetClient", name: str) -> Target:
        """The container that is meant: `web-0`, or `web` while that service has one.

        With one node (or a chosen one) a full name is taken as it is. NotFound; Conflict when unclear.
        """
        if not _is_cid(name):
            return await self._only_container(fleet, name)
        if self.chosen_node is not None:
            return Target(self.chosen_node, name)
        nodes = [presence.node for presence in await fleet.nodes()]
        if len(nodes) == 1:
            return Target(nodes[0], name)
        found = await asyncio.gather(*(self._has(fleet, node, name) for node in nodes))
        holders = [node for node, has in zip(nodes, found, strict=True) if has]
        if not holders:
            where = f"on any of {len(nodes)} nodes" if nodes else "here: no node is there"
            raise NotFound(f"there is no container {name} {where} (sandfleet ps lists them)")
        if len(holders) > 1:
            raise Conflict(f"{name} is on {' and '.join(holders)}: choose one with --node")
        return Target(holders[0], name)

    async def _has(self, fleet: "FleetClient", node: str, cid: str) -> bool:
        try:
            await fleet.state(node, cid)
        except (NotFound, NoResponders, NoAnswer):
            return False
        return True

    async def _only_container(self, fleet: "FleetClient", service: str) -> Target:
        if SERVICE.fullmatch(service) is None:
            raise InvalidCommand(f"{service!r} is no container name: web-0, or web", field="container")
        nodes = [self.chosen_node] if self.chosen_node else [one.node for one in await fleet.nodes()]
        listed = await asyncio.gather(*(fleet.containers(node) for node in nodes))
        found = [
            Target(node, status.container)
            for node, statuses in zip(nodes, listed, strict=True)
            for status in statuses
            if status.service == service
        ]
        if not found:
            raise NotFound(f"there is no container of {service} (sandfleet ps lists them)")
        if len(found) > 1:
            names = ", ".join(sorted({target.cid for target in found})[:6])
            raise Conflict(f"{service} has {len(found)} containers ({names}): name the one that is meant")
        return found[0]

    def tell_absent(self, node: str) -> None:
        self.out.note(
            f"node {node} is not there; the command waits for it (Ctrl-C to leave it waiting)", "warn"
        )


def _is_cid(name: str) -> bool:
    try:
        parse_cid(name)
    except InvalidCommand:
        return False
    return True


def quiet_logs() -> None:
    """A verb speaks through its own output: what the bus logs while it reconnects is for a worker's log."""
    from loguru import logger

    logger.remove()
    if os.environ.get("SANDFLEET_DEBUG"):
        import sys

        logger.add(sys.stderr, level="DEBUG")
