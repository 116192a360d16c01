"""A hub of three servers and a site, each started with the very files of deploy/nats: what is published on one side is
captured by one stream only, and a cut of the link between them loses and repeats nothing.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from schemas.subjects import Subjects
from tests.acceptance.harness import Worker
from tests.integration.conftest import NatsSettings
from tests.integration.proxy import Proxy
from tests.integration.test_bus_cluster import free_ports
from worker.bus.connection import Bus
from worker.bus.messages import StreamMessage
from worker.bus.reader import StreamReader
from worker.bus.server import find_binary
from worker.errors import Unavailable

FILES = Path(__file__).parents[2] / "deploy" / "nats"
OF = Subjects()
NODE = "mac-1"  # the one of node-permissions.conf
DEADLINE_S = 45.0
PASSWORDS = {f"NATS_{who}_PASSWORD": f"p-{who.lower()}" for who in ("OPERATOR", "SITE", "NODE", "SYS")}
STREAMS = ("SANDFLEET_CMD", "SANDFLEET_EVT", "SANDFLEET_LOG", "SANDFLEET_STAT", "KV_SANDFLEET_NODES")

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(180),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds launchers by /proc"),
]


class Server:
    """`nats-server -c` one of the files, with its variables."""

    def __init__(self, file: str, folder: Path, **variables: object) -> None:
        self.folder = folder
        self.port = int(str(variables["NATS_PORT"]))
        self._argv = [str(find_binary()), "-c", str(FILES / file)]
        given = {name: str(value) for name, value in variables.items()}
        self._env = {**os.environ, **PASSWORDS, **given, "NATS_STORE": str(folder / "store")}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._argv, env=self._env, stdout=log, stderr=log)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(15)
            self._process = None

    def url(self, user: str = "operator") -> str:
        password = PASSWORDS["NATS_NODE_PASSWORD" if user == NODE else "NATS_OPERATOR_PASSWORD"]
        return f"nats://{user}:{password}@127.0.0.1:{self.port}"


class Link(Proxy):
    """The way from the site to the hub."""

    up = True

    async def cut(self) -> None:
        self.up = False
        await self.break_all()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.up:
            super()._accept(reader, writer)
        else:
            writer.close()


class SiteWorker(Worker):
    """With exactly the permissions of its node; the streams are the operator's."""

    def argv(self, *extra: str) -> list[str]:
        given = super().argv(*extra)
        return [word for word in given if word not in ("--setup", "--insecure")]

    async def started(self, bus: Bus) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log_text()[-3000:]
        return bool(await events_of(bus))


class Fleet:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ports = free_ports(10)
        routes = {f"NATS_ROUTE_{n}": f"nats://127.0.0.1:{port}" for n, port in enumerate(ports[3:6], 1)}
        local = {"NATS_HOST": "127.0.0.1", "NATS_ROUTE_HOST": "127.0.0.1", "NATS_LEAF_HOST": "127.0.0.1"}
        self.hub = [
            Server(
                "cluster.conf", folder / f"hub-{n}", **local, **routes,
                NATS_NAME=f"nats-{n}", NATS_PORT=ports[n], NATS_ROUTE_PORT=ports[3 + n], NATS_LEAF_PORT=ports[6 + n],
            )
            for n in range(3)
        ]  # fmt: skip
        self.link = Link(ports[6])
        self._site_port = ports[9]
        self.site: Server
        self.at_hub: Bus
        self.at_site: Bus
        self.worker: SiteWorker

    async def __aenter__(self) -> "Fleet":
        for server in self.hub:
            server.start()
        await self.link.__aenter__()
        way = self.link.url.replace("nats://", f"nats-leaf://site:{PASSWORDS['NATS_SITE_PASSWORD']}@")
        self.site = Server(
            "leaf.conf", self.folder / "site", NATS_HOST="127.0.0.1", NATS_PORT=self._site_port, NATS_NAME="site-1",
            NATS_DOMAIN="site", NATS_HUB_1=way, NATS_HUB_2=way, NATS_HUB_3=way,
        )  # fmt: skip
        self.site.start()
        urls = ",".join(server.url() for server in self.hub)
        self.at_hub = await connected(NatsSettings(url=urls, replicas=3))
        self.at_site = await connected(NatsSettings(url=self.site.url(), domain="site"))
        (self.folder / "images" / "base").mkdir(parents=True)
        (self.folder / "images" / "base" / "motd").write_text("hello\n")
        policy = f"[nats]\ndomain = 'site'\n[policy]\nregister_roots = ['{self.folder / 'images'}']\n"
        node = type("Place", (), {"url": self.site.url(NODE)})()
        self.worker = SiteWorker(self.folder / "node", node, NODE, policy)
        return self

    async def __aexit__(self, *_: object) -> None:
        launcher = self.worker.launcher_pid()
        if self.worker.process is not None:
            await asyncio.to_thread(self.worker.terminate)
        if launcher is not None:
            os.kill(launcher, signal.SIGTERM)
            await until(lambda: not Path(f"/proc/{launcher}").exists())
        await self.at_hub.close()
        await self.at_site.close()
        await self.link.__aexit__()
        for server in [self.site, *self.hub]:
            server.kill()

    async def say(self, where: Server, *words: str, domain: str | None = None) -> str:
        """A command line as the operator of hub or site; what it prints."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("SANDFLEET_")}
        env |= {"SANDFLEET_NATS_URL": where.url(), "XDG_RUNTIME_DIR": str(self.folder)}
        env |= {"SANDFLEET_NATS_DOMAIN": domain} if domain else {}
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).parent / "sandfleet"), *words, env=env,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == 0, (words, err.decode(), self.worker.log_text()[-3000:])
        return out.decode()


async def connected(settings: NatsSettings) -> Bus:
    return await asyncio.wait_for(Bus.connect(settings, node=None, name="test", retry=True), 20)


async def until(condition: Any, what: str = "the condition") -> Any:
    """Poll a condition, or a coroutine function; failures of a stream without a leader count as not yet."""
    deadline = asyncio.get_running_loop().time() + DEADLINE_S
    found: Any = None
    while asyncio.get_running_loop().time() < deadline:
        try:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
        except Unavailable as failure:
            found = None
            what = f"{what} ({failure.message})"[:300]
        if found:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"{what} did not come true within {DEADLINE_S} s: {found}")


async def messages(bus: Bus, stream: str) -> list[StreamMessage]:
    async with StreamReader(bus, stream, follow=False) as reader:
        return [message async for message in reader]


async def count(bus: Bus, stream: str) -> int:
    return (await bus.js.stream_info(stream)).messages


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """Hub, site and a worker there; set up as docs/operations.md says."""
    async with Fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        await until(lambda: fleet.at_hub.js.api("INFO"), "the hub's JetStream")
        hub, site = fleet.hub[0], fleet.site
        made = await fleet.say(site, "setup", domain="site")
        assert made.count("created") == 6, made
        said = await fleet.say(hub, "setup", "--replicas", "3", "--collect", "site")
        assert (said.count("created"), said.count("joined")) == (6, 4), said
        said = await fleet.say(site, "setup", "--commands-from", "hub", "--for", NODE, domain="site")
        assert said.count("joined") == 1, said
        fleet.worker.start()
        await until(lambda: fleet.worker.started(fleet.at_site), "the first event")
        await fleet.say(site, "register", "base", str(fleet.folder / "images" / "base"), domain="site")
        yield fleet


async def events_of(bus: Bus, node: str = NODE) -> list[dict[str, Any]]:
    found = [json.loads(message.data) for message in await messages(bus, "SANDFLEET_EVT")]
    return [event for event in found if event["node"] == node]


async def test_setup_twice_changes_nothing(fleet: Fleet) -> None:
    said = await fleet.say(fleet.hub[1], "setup", "--replicas", "3", "--collect", "site")
    assert "created" not in said
    assert "joined" not in said
    again = await fleet.say(fleet.site, "setup", "--commands-from", "hub", "--for", NODE, domain="site")
    assert "joined" not in again


async def test_every_publish_is_captured_once(fleet: Fleet) -> None:
    """The trap of two domains: both sides have streams on the same subjects."""
    subjects = [
        ("SANDFLEET_CMD", OF.command("elsewhere", "c-0", "start")),
        ("SANDFLEET_EVT", OF.state("elsewhere", "c-0")),
        ("SANDFLEET_LOG", OF.log("elsewhere", "c-0", "stdout")),
        ("SANDFLEET_STAT", OF.stat("elsewhere", "c-0")),
    ]
    buses = {"hub": fleet.at_hub, "site": fleet.at_site}
    for here, bus in buses.items():
        for stream, subject in subjects:
            ack = json.loads((await bus.request(subject, b'{"node":"elsewhere"}', 5.0)).data)
            assert (ack["stream"], ack["domain"]) == (stream, here)
    for stream, subject in subjects:
        kept = {
            place: [m.subject for m in await messages(bus, stream)].count(subject) if stream != "SANDFLEET_CMD"
            else await queued(bus, subject)
            for place, bus in buses.items()
        }  # fmt: skip
        if stream == "SANDFLEET_CMD":
            assert kept == {"hub": 1, "site": 1}
        else:  # the hub collects the site's
            assert kept["site"] == 1
            await until(lambda s=stream, x=subject: appears(fleet.at_hub, s, x, 2), f"the site's {stream}")


async def queued(bus: Bus, subject: str) -> int:
    answer = await bus.js.api("STREAM.INFO.SANDFLEET_CMD", {"subjects_filter": subject})
    return int((answer["state"].get("subjects") or {}).get(subject, 0))


async def appears(bus: Bus, stream: str, subject: str, times: int) -> bool:
    return [message.subject for message in await messages(bus, stream)].count(subject) == times


async def test_command_lines_on_both_sides(fleet: Fleet) -> None:
    hub, site = fleet.hub[2], fleet.site
    script = ("--", "/bin/sh", "-c", "echo here; exec sleep 600")
    await fleet.say(site, "run", "base", "--name", "near", *script, domain="site")
    # From the hub: stored there, taken over by the site, answered by its events, which the hub has collected.
    await until(lambda: nodes_seen(fleet.at_hub), "the node's presence at the hub")
    await fleet.say(hub, "run", "base", "--name", "far", *script)
    # And with the site's domain, across the link.
    await fleet.say(hub, "run", "base", "--name", "across", *script, domain="site")
    wanted = {"near-0", "far-0", "across-0"}
    for where, domain in ((hub, None), (hub, "site"), (site, "site")):
        assert set((await fleet.say(where, "ps", "-q", domain=domain)).split()) == wanted
        assert NODE in await fleet.say(where, "nodes", "-q", domain=domain)
        for name in sorted(wanted):
            assert "here" in await fleet.say(where, "logs", name, domain=domain)
    assert await fleet.say(hub, "exec", "near", "--", "/bin/echo", "hello") == "hello\n"
    await fleet.say(hub, "rm", *sorted(wanted))
    assert await fleet.say(site, "ps", "-q", domain="site") == ""


async def nodes_seen(bus: Bus) -> bool:
    return await count(bus, "KV_SANDFLEET_NODES") > 0


async def send(bus: Bus, cid: str, verb: str, command_id: str, **fields: Any) -> str:
    """Store a command; the domain whose stream has it."""
    body = json.dumps({"type": verb, "id": command_id, **fields}).encode()
    reply = await bus.request(OF.command(NODE, cid, verb), body, 5.0)
    return str(json.loads(reply.data)["domain"])


async def test_a_cut_loses_and_repeats_nothing(fleet: Fleet) -> None:
    lines = 20_000
    script = f"i=0; while [ $i -lt {lines} ]; do echo line $i; i=$((i+1)); done; exec sleep 600"
    spec = {"image": {"name": "base"}, "command": {"entrypoint": ["/bin/sh", "-c", script]}}
    sent: list[str] = []

    async def both(turn: str) -> None:
        """Two containers' commands from each side; each publisher's own stream answers, link or not."""
        for place, bus in (("hub", fleet.at_hub), ("site", fleet.at_site)):
            for verb, fields in (("run", {"spec": spec}), ("stop", {"timeout_s": 1}), ("start", {})):
                command_id = f"{turn}-{place}-{verb}"
                assert await send(bus, f"{turn}-{place}-0", verb, command_id, **fields) == place
                sent.append(command_id)

    await both("before")
    await until(lambda: completed(fleet.at_site, "before-hub-start"), "a command from the hub")
    await fleet.link.cut()
    await both("during")
    # The site works on: its own commands, and those that it had taken over.
    await until(lambda: completed(fleet.at_site, "during-site-start"), "a command during the cut")
    assert not await completed(fleet.at_site, "during-hub-run")
    fleet.link.up = True
    await until(lambda: completed(fleet.at_site, "during-hub-start"), "what the hub had stored")
    # The same once more, with the site's server killed.
    await both("crash")
    fleet.site.kill()
    assert await send(fleet.at_hub, "crash-hub-0", "kill", "crash-hub-kill") == "hub"
    sent.append("crash-hub-kill")
    fleet.site.start()
    await fleet.at_site.wait_connected()
    for command_id in sent:
        await until(lambda c=command_id: completed(fleet.at_site, c), command_id)
    await until(lambda: empty(fleet.at_hub), "the hub's queue")
    assert await queued(fleet.at_site, OF.commands_of(NODE)) == 0

    names = [f"{turn}-{place}-0" for turn in ("before", "during", "crash") for place in ("hub", "site")]
    await fleet.say(fleet.site, "rm", *names, domain="site")
    await until(lambda: same_events(fleet), "the hub's events")
    events = await events_of(fleet.at_hub)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    done = [e["command_id"] for e in events if e["type"] == "command_completed"]
    assert sorted(c for c in done if c in sent) == sorted(sent)
    assert not [e for e in events if e.get("duplicate")]
    assert "ermissions" not in fleet.worker.log_text()  # a node's permissions are enough at a site, too

    for name in names:
        subject = OF.log(NODE, name, "stdout")
        here = [m for m in await messages(fleet.at_site, "SANDFLEET_LOG") if m.subject == subject]
        times = len(here)
        await until(lambda s=subject, n=times: appears(fleet.at_hub, "SANDFLEET_LOG", s, n), "the logs")
        there = [m for m in await messages(fleet.at_hub, "SANDFLEET_LOG") if m.subject == subject]
        assert [m.data for m in there] == [m.data for m in here]
        ends = 0
        for message in there:
            assert int(message.headers["Sandfleet-Offset"]) == ends
            ends += len(message.data) + int(message.headers.get("Sandfleet-Lost", 0))


async def completed(bus: Bus, command_id: str) -> bool:
    return any(
        event["type"] == "command_completed" and event["command_id"] == command_id
        for event in await events_of(bus)
    )


async def empty(bus: Bus) -> bool:
    return await queued(bus, OF.commands_of(NODE)) == 0


async def same_events(fleet: Fleet) -> bool:
    return await events_of(fleet.at_hub) == await events_of(fleet.at_site)


async def test_a_missing_stream_and_the_own_domain_are_refused(fleet: Fleet) -> None:
    from worker.bus.sites import collect, forward_commands
    from worker.errors import Configuration

    with pytest.raises(Configuration, match="own domain"):
        await collect(fleet.at_site, "site")
    elsewhere = await connected(NatsSettings(url=fleet.site.url(), domain="site", stream_prefix="ACME"))
    try:
        with pytest.raises(Configuration, match="sandfleet setup"):
            await forward_commands(elsewhere, "hub", [NODE], subjects=OF)
    finally:
        await elsewhere.close()


async def test_the_link_carries_no_capture_even_when_the_sites_file_lacks_the_rules(
    fleet: Fleet, tmp_path: Path
) -> None:
    """The hub's own rules for the link's user."""
    text = (FILES / "leaf.conf").read_text()
    start, end = text.index("      # What a stream captures must not cross"), text.index("    }\n  ]\n}")
    loose = tmp_path / "leaf.conf"
    loose.write_text(text[:start] + text[end:])
    (tmp_path / "node-permissions.conf").write_text((FILES / "node-permissions.conf").read_text())
    (port,) = free_ports(1)
    way = fleet.link.url.replace("nats://", f"nats-leaf://site:{PASSWORDS['NATS_SITE_PASSWORD']}@")
    server = Server(
        "leaf.conf", tmp_path / "other", NATS_HOST="127.0.0.1", NATS_PORT=port, NATS_NAME="site-2",
        NATS_DOMAIN="other", NATS_HUB_1=way, NATS_HUB_2=way, NATS_HUB_3=way,
    )  # fmt: skip
    server._argv[-1] = str(loose)
    server.start()
    bus = None
    try:
        bus = await connected(NatsSettings(url=server.url(), domain="other"))
        await fleet.say(server, "setup", domain="other")
        # It is joined: the hub's API answers there by its domain.
        await until(lambda: hub_answers(bus), "the link of the other site")
        for verb in ("start", "stop"):
            reply = await bus.request(OF.command("third", "c-0", verb), b"{}", 5.0)
            assert json.loads(reply.data)["domain"] == "other"
            assert await queued(bus, OF.command("third", "c-0", verb)) == 1
            assert await queued(fleet.at_hub, OF.command("third", "c-0", verb)) == 0
        reply = await fleet.at_hub.request(OF.command("third", "c-1", "start"), b"{}", 5.0)
        assert json.loads(reply.data)["domain"] == "hub"
        assert await queued(bus, OF.command("third", "c-1", "start")) == 0
    finally:
        if bus is not None:
            await bus.close()
        server.kill()


async def hub_answers(bus: Bus) -> bool:
    """As an account of that JetStream, and so across the link."""
    reply = await bus.request("$JS.hub.API.INFO", b"", 1.0)
    return "storage" in json.loads(reply.data)
