"""The query `denials`: a container's record, a stand-in for the log tool, the real policy and evaluator."""

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from schemas import queries as q
from schemas.errors import InvalidCommand, Unsupported
from schemas.spec import decode_spec
from schemas.status import ContainerStatus, State
from worker.config import Config
from worker.config_model import PolicyConfig
from worker.datadir import ContainerDirs
from worker.errors import NotFound, Unavailable
from worker.platform.darwin.describe import SeatbeltRules
from worker.platform.darwin.unified_log import UnifiedLog
from worker.policy import HostFacts, make_policy
from worker.queries import Queries
from worker.records import ContainerRecord

INSTANCE = "01JDDAAAAAAAAAAAAAAAAAAAAA"
AT = datetime(2026, 11, 24, 3, 31, 39, tzinfo=UTC)
DENIED = "Sandbox: curl(9) deny(1) mach-lookup com.apple.dnssd.service"


class Node:
    """What `Queries` needs of a worker on a Mac, with one container."""

    def __init__(
        self, folder: Path, script: str | None, *, state: State = State.RUNNING, **policy: Any
    ) -> None:
        self.members: list[int] = []
        driver: Any = SeatbeltRules(26)
        driver.processes = lambda: SimpleNamespace(members=self._members)
        own = Config(policy=PolicyConfig(**policy))

        def policy_of(
            spec: Any,
            cid: str,
            instance: str,
            port: Any,
            run: int,
            *,
            config: Config | None,
            user: Any = None,
        ) -> Any:
            return make_policy(
                spec,
                config=config or own,
                dirs=ContainerDirs(Path("/Users/w/data/containers") / cid),
                cid=cid,
                instance=instance,
                port=port,
                run=run,
                host=HostFacts(data_root="/Users/w/data", nats_ports=(4222,), canonical=lambda path: path),
                driver=driver,
            )

        self.services: Any = SimpleNamespace(
            config=own,
            driver=driver,
            make_policy=policy_of,
            in_thread=self._in_thread,
            data=SimpleNamespace(root=folder),
        )
        status = ContainerStatus(
            container="web-0", service="web", replica=0, instance=INSTANCE, run=1, state=state, started_at=AT
        )
        spec = decode_spec(
            json.dumps({"image": {"name": "base"}, "network": {"access": "localhost"}}).encode()
        )
        self.record = ContainerRecord(status=status, spec=spec, shim_pid=4711, shim_start=1)
        self.asked = folder / "asked"
        log = None
        if script is not None:
            program = folder / "log"
            program.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {self.asked}\n{script}\n")
            program.chmod(0o700)
            log = UnifiedLog(str(program))
        self.queries = Queries(
            self.services, SimpleNamespace(known=self._known), info=lambda state: None, delivery=None, log=log  # type: ignore[arg-type, return-value]
        )  # fmt: skip

    def _members(self, shim: int) -> tuple[int, ...]:
        self.members.append(shim)
        return (77,)

    def _known(self, cid: str) -> Any:
        if cid != "web-0":
            raise NotFound(f"there is no container {cid}", field="container")
        return SimpleNamespace(record=self.record)

    @staticmethod
    async def _in_thread(call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.to_thread(call, *args)

    async def ask(self, **request: Any) -> q.DenialsReply:
        body = json.dumps({"container": "web-0", **request}).encode()
        raw = await self.queries.handlers()["denials"](body, {})
        return msgspec.json.decode(raw, type=q.DenialsReply)


def printing(*messages: str) -> str:
    """A tool that prints these records."""
    stamp = "2026-11-24 03:31:40.000000+0000"
    records = [{"eventMessage": text, "timestamp": stamp, "processID": 0} for text in messages]
    lines = "\n".join(json.dumps(one) for one in records)
    return f"cat <<'END'\n{lines}\nEND"


async def test_a_containers_refusals(tmp_path: Path) -> None:
    other = f"{DENIED}\nsandfleet:01JDDBBBBBBBBBBBBBBBBBBBBB/1"
    node = Node(tmp_path, printing(f"{DENIED}\nsandfleet:{INSTANCE}/1", other), groups=("dns",))
    told = await node.ask(since_s=600)
    [entry] = told.denials
    assert (entry.process, entry.pid, entry.count) == ("curl", 9, 1)
    assert entry.allow == "add `dns` to sandbox.groups"
    assert told.complete
    asked = node.asked.read_text().splitlines()
    assert asked[:5] == ["show", "--style", "ndjson", "--last", "600s"]
    assert f'"sandfleet:{INSTANCE}"' in asked[6]
    assert '"(77) deny("' in asked[6]
    assert node.members == [4711]


async def test_what_the_operator_has_not_granted_is_said(tmp_path: Path) -> None:
    node = Node(tmp_path, printing(f"{DENIED}\nsandfleet:{INSTANCE}/1"))
    [entry] = (await node.ask()).denials
    assert entry.allow is not None
    assert entry.allow.startswith("add `dns` to sandbox.groups; the rule group dns is not granted here")
    assert 'groups = ["dns"]' in entry.allow


async def test_a_container_that_has_ended_is_known_by_its_tag_alone(tmp_path: Path) -> None:
    cut = "Sandbox: sh(77) deny(1) file-read-data /x<…>"
    node = Node(tmp_path, printing(f"{DENIED}\nsandfleet:{INSTANCE}/1", cut), state=State.EXITED)
    assert [entry.pid for entry in (await node.ask()).denials] == [9]
    assert node.members == []
    running = Node(tmp_path, printing(cut))
    assert [entry.argument for entry in (await running.ask()).denials] == ["/x…"]


async def test_a_spec_that_the_node_does_not_take_any_more(tmp_path: Path) -> None:
    """The refusals are told all the same."""
    node = Node(tmp_path, printing(f"{DENIED}\nsandfleet:{INSTANCE}/1"), network=("none",))
    [entry] = (await node.ask()).denials
    assert (entry.operation, entry.allow) == ("mach-lookup", None)


async def test_failures(tmp_path: Path) -> None:
    failing = Node(tmp_path, "echo 'log: Could not open local log store' >&2; exit 64")
    with pytest.raises(Unavailable, match="only an administrator"):
        await failing.ask()
    with pytest.raises(NotFound):
        await failing.ask(container="db-0")
    for since_s in (-1, 1e9):
        with pytest.raises(InvalidCommand) as caught:
            await failing.ask(since_s=since_s)
        assert caught.value.field == "since_s"


async def test_linux_has_no_record(tmp_path: Path) -> None:
    node = Node(tmp_path, None)
    node.services.driver.name = "linux"
    with pytest.raises(Unsupported, match="audit log"):
        await node.ask()
