"""A server of the cluster that the worker was only told of is the node's own, as the configured one is."""

from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import CONFIG
from tests.acceptance.harness import Fleet, Server
from tests.broker import BROKER
from tests.integration.test_bus_cluster import free_ports

pytestmark = [
    pytest.mark.asyncio(loop_scope="function"),
    pytest.mark.skipif(BROKER.form == "address", reason="needs a cluster of its own"),
]


class Member(Server):
    """One of two servers; `ports` are those of their routes, its own first."""

    def __init__(self, folder: Path, ports: tuple[int, int]) -> None:
        super().__init__(folder)
        self._ports = ports

    def _spawn(self, arguments: list[str]) -> Any:
        own, other = (f"nats://127.0.0.1:{port}" for port in self._ports)
        cluster = ["--cluster_name", "test", "--cluster", own, "--routes", other]
        return super()._spawn([*arguments, "--name", f"s{self._ports[0]}", *cluster])


async def test_the_port_of_a_server_that_was_learned_is_nobodys(tmp_path: Path) -> None:
    here, there = free_ports(2)
    fleet, other = Fleet(CONFIG), Member(tmp_path / "other", (there, here))
    fleet.server = fleet.worker.server = Member(tmp_path / "first", (here, there))
    other.start()
    try:
        async with fleet:
            await fleet.register("base")
            network = {"access": "localhost", "connect_ports": [other.port]}
            done = await fleet.client.do(
                "web-0", "create", spec={"image": {"name": "base"}, "network": network}
            )
    finally:
        other.close()
    assert done["error"]["code"] == "policy_denied"
    assert done["error"]["field"] == "spec.network.connect_ports[0]"
    assert "NATS server" in done["error"]["message"]
