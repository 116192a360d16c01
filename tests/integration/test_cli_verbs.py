"""Every verb against a real server and scripted nodes: what it sends, what it prints, how it ends."""

import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from schemas.errors import Error, ErrorCode
from schemas.events import NodeChanged
from schemas.node import NodeState
from schemas.queries import DenialEntry, DenialsReply, ExecReply, ImageEntry, LogLine
from schemas.status import State
from worker.bus.connection import Bus
from worker.cli.app import run
from worker.errors import Unavailable

from .brokers import end_server, make_server
from .conftest import NatsSettings
from .fake_node import STARTED, FakeNode, status

T = TypeVar("T")


class Fleet:
    """A server and nodes in a loop of their own thread; the command line runs in the test's."""

    def __init__(self, folder: Path) -> None:
        self.server = make_server(store_dir=folder)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._buses: list[Bus] = []
        self.url = self.do(self.server.start())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def soon(self, work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def node(self, name: str, *containers: Any) -> FakeNode:
        async def start() -> FakeNode:
            bus = await Bus.connect(NatsSettings(url=self.url), node=None, name=name, retry=False)
            self._buses.append(bus)
            return await FakeNode.start(bus, name, *containers)

        return self.do(start())

    def close(self) -> None:
        for bus in self._buses:
            self.do(bus.close())
        self.do(end_server(self.server))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    for name in [name for name in os.environ if name.startswith("SANDFLEET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    fleet = Fleet(tmp_path / "nats")
    monkeypatch.setenv("SANDFLEET_NATS_URL", fleet.url)
    yield fleet
    fleet.close()


@pytest.fixture
def mac(fleet: Fleet) -> FakeNode:
    return fleet.node("mac", status("web-0"), status("web-1"), status("db-0", State.EXITED, exit_code=3))


Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command line: exit code, stdout, stderr."""

    def run_it(*words: str) -> tuple[int, str, str]:
        code = run(list(words))
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return run_it


# -- one container after another


def test_start_stop_kill_restart_rm(mac: FakeNode, say: Say) -> None:
    assert say("start", "web-0") == (0, "web-0\n", "")
    assert say("stop", "-t", "1m30s", "web-0", "web-1")[0] == 0
    assert say("kill", "-s", "hup", "web-0")[0] == 0
    assert say("restart", "web-0", "--timeout", "2")[0] == 0
    assert say("rm", "--if-stopped", "web-0")[0] == 0
    assert say("rm", "web-9") == (0, "web-9\n", "")
    sent = [{k: v for k, v in one.items() if k != "id"} for one in mac.commands]
    assert sorted(sent[1:3], key=str) == [
        {"container": "web-0", "type": "stop", "timeout_s": 90.0},
        {"container": "web-1", "type": "stop", "timeout_s": 90.0},
    ]
    assert sent[3:] == [
        {"container": "web-0", "type": "kill", "signal": "SIGHUP"},
        {"container": "web-0", "type": "restart", "timeout_s": 2.0},
        {"container": "web-0", "type": "remove", "force": False},
        {"container": "web-9", "type": "remove"},
    ]


def test_a_service_name_means_its_only_container(mac: FakeNode, say: Say) -> None:
    assert say("start", "db") == (0, "db-0\n", "")
    code, out, err = say("start", "web")
    assert (code, out) == (4, "")
    assert "web has 2 containers (web-0, web-1): name the one that is meant" in err
    assert say("start", "nope")[0] == 3
    assert say("start", "No_Name")[0] == 2


def test_failures_are_told_by_name_and_the_others_are_done(mac: FakeNode, say: Say) -> None:
    mac.on_command = lambda cid, body: (
        Error(code=ErrorCode.CONFLICT, message="it is stopping") if cid == "web-1" else None
    )
    code, out, err = say("start", "web-0", "web-1")
    assert (code, out) == (4, "web-0\n")
    assert err == "error: web-1: it is stopping\n"
    mac.on_command = lambda cid, body: Error(code=ErrorCode.NOT_FOUND, message="there is no container web-9")
    assert say("start", "web-9")[0] == 3


def test_json_is_the_completion_itself(mac: FakeNode, say: Say) -> None:
    code, out, _ = say("stop", "web-0", "--json")
    event = json.loads(out)
    assert (code, event["type"], event["command"], event["ok"]) == (0, "command_completed", "stop", True)
    assert event["status"]["container"] == "web-0"


def test_a_command_can_be_left_waiting(fleet: Fleet, mac: FakeNode, say: Say) -> None:
    code, out, _ = say("start", "--no-wait", "--json", "--node", "away", "web-0")
    left = json.loads(out)
    assert code == 0
    assert (left["node"], left["container"]) == ("away", "web-0")


def test_an_absent_node_is_told_and_ends_in_5(
    mac: FakeNode, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.client.PRESENCE_EVERY_S", 0.05)
    from worker.client import FleetClient

    monkeypatch.setitem(FleetClient.command.__kwdefaults__, "absent_s", 0.2)
    code, out, err = say("start", "--node", "away", "web-0")
    assert (code, out) == (5, "")
    assert "node away is not there; the command waits for it (Ctrl-C to leave it waiting)" in err
    assert err.splitlines()[-1].startswith("error: web-0: node away is not there; the command ")


def test_wait_prints_exit_codes(mac: FakeNode, say: Say) -> None:
    mac.containers["web-1"] = status("web-1", State.EXITED, exit_code=-9, reason="memory_limit")
    assert say("wait", "db") == (0, "3\n", "")
    code, out, err = say("wait", "db-0", "web-1")
    assert (code, sorted(out.splitlines())) == (0, ["db-0  3", "web-1  137"])
    assert "web-1: SIGKILL, memory_limit" in err
    code, _, err = say("wait", "-t", "100ms", "web-0")
    assert code == 4
    assert "web-0 has not ended within 0.1 s" in err
    assert json.loads(say("wait", "--json", "db-0")[1])["exit_code"] == 3


# -- several nodes


def test_the_node_is_found_by_the_container(fleet: Fleet, mac: FakeNode, say: Say) -> None:
    other = fleet.node("pc", status("web-1"), status("solo-0"))
    assert say("start", "solo-0") == (0, "solo-0\n", "")
    assert [one["container"] for one in other.commands] == ["solo-0"]
    code, _, err = say("start", "web-1")
    assert code == 4
    assert "web-1 is on mac and pc: choose one with --node" in err
    assert say("start", "--node", "pc", "web-1")[0] == 0
    assert say("start", "nope-0")[0] == 3
    code, _, err = say("images")
    assert code == 4
    assert "there are 2 nodes (mac, pc): choose one with --node" in err


# -- listing


def test_ps_is_a_table_in_80_columns(mac: FakeNode, say: Say) -> None:
    code, out, err = say("ps")
    assert (code, err) == (0, "")
    head, *rows = out.splitlines()
    assert head.split() == ["CONTAINER", "STATE", "SINCE", "PORT", "IMAGE"]
    assert [row.split()[0] for row in rows] == ["db-0", "web-0", "web-1"]
    assert rows[0].split()[1:3] == ["exited", "3"]
    assert max(len(line) for line in out.splitlines()) <= 80
    assert say("ps", "-q")[1] == "db-0\nweb-0\nweb-1\n"
    assert say("ps", "-q", "--state", "exited")[1] == "db-0\n"


def test_ps_json_is_one_array_of_statuses(mac: FakeNode, say: Say) -> None:
    code, out, _ = say("--json", "ps")
    listed = json.loads(out)
    assert code == 0
    assert out.count("\n") == 1
    assert [(one["node"], one["reachable"], one["container"]) for one in listed] == [
        ("mac", True, "db-0"),
        ("mac", True, "web-0"),
        ("mac", True, "web-1"),
    ]
    assert listed[1]["memory_limit"] == 512 * 2**20


def test_ps_shows_containers_of_a_node_that_is_away(fleet: Fleet, mac: FakeNode, say: Say) -> None:
    pc = fleet.node("pc")
    fleet.do(pc.become("job-0", State.RUNNING))
    fleet.do(pc.vanish())
    code, out, err = say("ps")
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("job-0"))
    assert "unreachable (running)" in row
    assert row.endswith("pc")
    assert "node pc does not answer" in err
    listed = {one["container"]: one["reachable"] for one in json.loads(say("ps", "--json")[1])}
    assert listed == {"db-0": True, "web-0": True, "web-1": True, "job-0": False}


def test_containers_outlive_a_worker_that_was_stopped(fleet: Fleet, mac: FakeNode, say: Say) -> None:
    pc = fleet.node("pc")
    fleet.do(pc.event("sandfleet.v1.evt.pc._.node", NodeChanged, state=NodeState.STOPPED, info=pc.info()))
    fleet.do(pc.vanish())
    assert say("ps")[2] == ""
    fleet.do(pc.become("job-0", State.RUNNING))
    code, out, err = say("ps")
    assert code == 0
    assert "unreachable (running)" in out
    assert "node pc does not answer" in err


def test_no_nodes_and_no_containers_are_said(fleet: Fleet, say: Say) -> None:
    fleet.do(fleet.node("mac").vanish())
    assert say("nodes")[2].startswith("no node is there")
    code, _, err = say("info")
    assert code == 3
    assert "sandfleet dev" in err


def test_inspect_hides_the_environment(mac: FakeNode, say: Say) -> None:
    mac.spec = {"image": {"name": "web:1"}, "env": {"API_KEY": "s3cret"}}
    code, out, _ = say("inspect", "web-0")
    assert code == 0
    assert "API_KEY" in out
    assert "s3cret" not in out
    assert "127.0.0.1:20001" in out
    assert "512.0 MiB" in out
    assert "s3cret" not in say("inspect", "--json", "web-0")[1]
    assert "s3cret" in say("inspect", "--show-env", "web-0")[1]
    assert json.loads(say("inspect", "--json", "--show-env", "web-0")[1])["spec"]["env"] == {
        "API_KEY": "s3cret"
    }
    assert say("inspect", "nope-0")[0] == 3


def test_inspect_shows_what_the_sandbox_refused(mac: FakeNode, say: Say) -> None:
    assert "Refused" not in say("inspect", "web-0")[1]
    assert "denials" not in json.loads(say("inspect", "--json", "web-0")[1])
    entry = DenialEntry(
        time_first=STARTED,
        time_last=STARTED,
        count=12,
        process="cu\x1brl",
        pid=9,
        operation="mach-lookup",
        argument="com.apple.dnssd.service\r\n",
        allow="add `dns` to sandbox.groups",
    )
    mac.denials = DenialsReply(denials=[entry], complete=False, note="macOS merged 3 reports")
    code, out, _ = say("inspect", "--since", "2h", "web-0")
    assert code == 0
    shown = out.partition("Refused by the sandbox\n")[2].splitlines()
    assert shown[0].startswith("   12x mach-lookup com.apple.dnssd.service    (cu\ufffdrl, pid 9, ")
    assert shown[1].strip() == "to allow it: add `dns` to sandbox.groups"
    assert shown[2] == "incomplete: macOS merged 3 reports"
    asked = dict(mac.requests)["denials"]
    assert 7190 < asked["since_s"] < 7300
    assert json.loads(say("inspect", "--json", "web-0")[1])["denials"] == msgspec.to_builtins(mac.denials)


def test_inspect_without_refusals_and_without_the_log(mac: FakeNode, say: Say) -> None:
    mac.denials = DenialsReply(denials=[], complete=True, note="not every refusal is recorded")
    out = say("inspect", "web-0")[1]
    assert out.endswith("Refused by the sandbox\nnothing on record\nnot every refusal is recorded\n")
    mac.denials = Unavailable("the log of macOS cannot be read")
    code, out, err = say("inspect", "web-0")
    assert code == 0
    assert "127.0.0.1:20001" in out
    assert "Refused" not in out
    assert "what the sandbox refused is not known: the log of macOS cannot be read" in err


def test_stats_and_a_look_of_top(mac: FakeNode, say: Say) -> None:
    code, out, _ = say("stats")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["web-0", "web-1"]
    assert "100.0 MiB" in out
    assert json.loads(say("stats", "--json", "web-0")[1])[0]["memory_bytes"] == 100 * 2**20
    code, out, _ = say("top")
    assert code == 0
    assert out.splitlines()[0].split() == [
        "CONTAINER",
        "STATE",
        "UP",
        "CPU%",
        "MEMORY",
        "LIMIT",
        "PROCS",
        "PORT",
    ]
    assert len(out.splitlines()) == 4


# -- logs


def lines(*texts: str) -> list[LogLine]:
    return [LogLine(time=STARTED, stream="stderr" if "!" in text else "stdout", text=text) for text in texts]


def test_logs_come_from_the_node(mac: FakeNode, say: Say) -> None:
    mac.lines = lines("one", "two!", "three")
    assert say("logs", "web-0") == (0, "one\nthree\n", "two!\n")
    assert say("logs", "-n", "0", "web-0") == (0, "", "")
    assert say("logs", "-t", "web-0")[1].splitlines()[0] == "2026-11-24T03:00:00.000000Z one"
    assert [json.loads(line)["text"] for line in say("logs", "--json", "web-0")[1].splitlines()] == [
        "one",
        "two!",
        "three",
    ]
    say("logs", "--stderr", "--tail", "5", "--since", "2026-01-01T00:00:00Z", "web-0")
    asked = next(body for verb, body in reversed(mac.requests) if verb == "logs" and "cursor" not in body)
    assert asked == {"container": "web-0", "stream": "stderr", "tail": 5, "since": "2026-01-01T00:00:00Z"}


def test_logs_of_what_is_gone_come_from_the_stream(fleet: Fleet, mac: FakeNode, say: Say) -> None:
    for at in range(3):
        fleet.do(mac.log("gone-0", "stdout", 2 * at, f"{at}\n".encode()))
    fleet.do(mac.log("gone-0", "stderr", 0, b"bad\nend", eof=1))
    assert say("logs", "gone-0") == (0, "0\n1\n2\n", "bad\nend")
    assert say("logs", "-n", "2", "gone-0") == (0, "", "bad\nend")
    assert say("logs", "-n", "1", "--stdout", "gone-0") == (0, "2\n", "")
    code, _, err = say("logs", "never-0")
    assert code == 3
    assert "never-0" in err
    fleet.do(mac.vanish())
    assert say("logs", "--stdout", "gone-0") == (0, "0\n1\n2\n", "")


def test_raw_logs_are_every_byte_in_order_of_offset(
    fleet: Fleet, mac: FakeNode, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    for offset, data in ((0, b"ab"), (4, b"ef"), (2, b"cd"), (2, b"cd")):
        fleet.do(mac.log("old-0", "stdout", offset, data))
    fleet.do(mac.log("old-0", "stdout", 6, lost=4))
    fleet.do(mac.log("old-0", "stdout", 10, b"\x00\xff\r\n", eof=1))
    assert run(["logs", "--raw", "--stdout", "--node", "mac", "old-0"]) == 0
    said = capfdbinary.readouterr()
    assert said.out == b"abcdef\x00\xff\r\n"
    assert b"4 B of stdout at offset 6 are lost to the rate limit" in said.err


def test_following_ends_with_the_container(fleet: Fleet, mac: FakeNode, say: Say) -> None:
    for at in range(100):
        fleet.do(mac.log("web-0", "stdout", 4 * at, f"{at:03}\n".encode()))

    async def go_on() -> None:
        await asyncio.sleep(0.3)
        await mac.log("web-0", "stdout", 404, b"more\n")
        await mac.log("web-0", "stdout", 400, b"late")
        await mac.log("web-0", "stdout", 409, b"last\n", eof=1)
        mac.containers["web-0"] = status("web-0", State.EXITED, exit_code=0)
        await mac.log("web-0", "stderr", 0, b"", eof=1)

    fleet.soon(go_on())
    code, out, err = say("logs", "-f", "-n", "2", "web-0")
    assert (code, err) == (0, "")
    assert out == "098\n099\nlatemore\nlast\n"


def test_following_a_container_that_has_ended_ends(fleet: Fleet, mac: FakeNode, say: Say) -> None:
    fleet.do(mac.log("db-0", "stdout", 0, b"done\n", eof=1))
    fleet.do(mac.log("db-0", "stderr", 0, eof=1))
    assert say("logs", "-f", "db-0") == (0, "done\n", "")


# -- exec, run


def test_exec_gives_output_and_exit_code(mac: FakeNode, say: Say) -> None:
    mac.exec_reply = ExecReply(exit_code=7, stdout="out\n", stderr="err\n", truncated=False)
    assert say("exec", "-e", "A=1", "web-0", "ls", "-l") == (7, "out\n", "err\n")
    verb, body = mac.requests[-1]
    assert verb == "exec"
    assert body == {"container": "web-0", "argv": ["ls", "-l"], "env": {"A": "1"}, "timeout_s": 60.0}
    mac.exec_reply = ExecReply(exit_code=-15, stdout="aGk=", stderr="", truncated=True, encoding="base64")
    code, out, err = say("exec", "web-0", "--", "cat")
    assert (code, out) == (143, "hi")
    assert "longer than 256 KiB" in err
    assert json.loads(say("exec", "--json", "web-0", "cat")[1])["stdout"] == "aGk="
    code, _, err = say("exec", "-it", "web-0", "sh")
    assert code == 4
    assert "not built yet" in err


def test_run_prints_the_name(mac: FakeNode, say: Say, tmp_path: Path) -> None:
    assert say("run", "web:1", "-p", "80", "--", "serve", "-x") == (0, "web-0\n", "")
    assert mac.commands[-1]["spec"]["command"] == {"args": ["serve", "-x"]}
    assert say("create", "web:1", "--name", "shop", "--replica", "3") == (0, "shop-3\n", "")
    assert mac.commands[-1]["type"] == "create"
    path = tmp_path / "shop.yaml"
    path.write_text(
        "version: v1\ndeployment: shop\nservices:\n  a: {image: {name: x}}\n  b: {image: {name: y}}\n"
    )
    code, out, _ = say("run", str(path))
    assert (code, sorted(out.split())) == (0, ["a-0", "b-0"])
    mac.on_command = lambda cid, body: Error(code=ErrorCode.CONFLICT, message=f"{cid} exists")
    code, _, err = say("run", "web:1")
    assert code == 4
    assert "web-0 exists; take --replace, or another --name or --replica" in err


def test_run_wait_shows_the_output_and_ends_as_the_program(fleet: Fleet, mac: FakeNode, say: Say) -> None:
    def started(cid: str | None, body: dict[str, Any]) -> None:
        async def live() -> None:
            await mac.become("job-0", State.RUNNING)
            await mac.log("job-0", "stdout", 0, b"hello\n")
            await mac.log("job-0", "stderr", 0, b"oops", eof=1)
            await mac.become("job-0", State.EXITED, exit_code=5)
            await mac.log("job-0", "stdout", 6, b"bye\n", eof=1)

        asyncio.ensure_future(live())  # noqa: RUF006 (the loop outlives it)

    mac.on_command = started
    assert say("run", "--wait", "--name", "job", "web:1", "--", "x") == (5, "hello\nbye\n", "oops")


def test_ctrl_c_in_run_wait_stops_and_then_kills(fleet: Fleet, mac: FakeNode, say: Say) -> None:
    async def live() -> None:
        await mac.become("job-0", State.RUNNING)
        os.kill(os.getpid(), signal.SIGINT)

    async def end() -> None:
        await mac.log("job-0", "stdout", 0, eof=1)
        await mac.log("job-0", "stderr", 0, eof=1)
        await mac.become("job-0", State.EXITED, exit_code=-9, reason="killed")

    def on_command(cid: str | None, body: dict[str, Any]) -> None:
        if body["type"] == "run":
            asyncio.ensure_future(live())  # noqa: RUF006
        elif body["type"] == "stop":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            asyncio.ensure_future(end())  # noqa: RUF006

    mac.on_command = on_command
    code, _, err = say("run", "-w", "--name", "job", "web:1")
    assert code == 137
    assert [one["type"] for one in mac.commands] == ["run", "stop", "kill"]
    assert "stopping job-0 (again to kill it)" in err
    assert "job-0: SIGKILL, killed" in err


def test_a_run_that_fails_says_why(mac: FakeNode, say: Say) -> None:
    mac.on_command = lambda cid, body: Error(
        code=ErrorCode.START_FAILED, message="exec: no such file", field=None
    )
    assert say("run", "-w", "web:1") == (4, "", "error: exec: no such file\n")


# -- events


def test_events_are_readable_lines_or_themselves(fleet: Fleet, mac: FakeNode, say: Say) -> None:
    fleet.do(mac.become("web-0", State.EXITED, exit_code=-9, reason="memory_limit"))
    code, out, _ = say("events")
    assert code == 0
    first, last = out.splitlines()
    assert first.split()[1:5] == ["mac", "-", "node", "ready"]
    assert last.split(maxsplit=3)[1:] == ["mac", "web-0", "exited        SIGKILL, memory_limit"]
    code, out, _ = say("events", "--json", "--type", "state_changed", "web-0")
    assert [json.loads(line)["status"]["exit_code"] for line in out.splitlines()] == [-9]
    code, out, err = say("events", "--since", "2030-01-01")
    assert (code, out) == (0, "")
    assert "no events since 2030-01-01" in err


# -- images and nodes


def test_images(mac: FakeNode, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = say("images")
    assert code == 0
    columns = ["IMAGE", "DIGEST", "SIZE", "CREATED", "LAST", "USED", "USED", "BY"]
    assert out.splitlines()[0].split() == columns
    assert out.splitlines()[1].split()[:4] == ["web:1", "sha256:abababababab", "3.0", "MiB"]
    assert json.loads(say("images", "--json")[1])[0]["bytes"] == 3 * 2**20
    mac.result = {"digest": "sha256:cd"}
    monkeypatch.chdir(tmp_path)
    assert say("register", "demo:1", "build") == (0, "demo:1  sha256:cd\n", "")
    assert mac.commands[-1]["source_dir"] == str(tmp_path / "build")
    assert say("pull", "--policy", "newer", "demo:1") == (0, "demo:1  sha256:cd\n", "")
    assert mac.commands[-1]["policy"] == "newer"
    assert say("tag", "demo:1", "demo:2") == (0, "demo:2  sha256:cd\n", "")
    assert say("rmi", "-f", "demo:1", "demo:2")[0] == 0
    mac.result = {"removed": 2, "bytes": 2048}
    assert say("prune") == (0, "2 removed, 2.0 KiB freed\n", "")
    mac.images = [
        ImageEntry(
            name="a" * 60, digest="sha256:" + "0" * 64, bytes=1, created_at=datetime.now(UTC), containers=0
        )
    ]
    assert "a" * 60 in say("images")[1]


def test_nodes_info_drain_resume(fleet: Fleet, mac: FakeNode, say: Say) -> None:
    fleet.do(fleet.node("pc").vanish())
    code, out, err = say("nodes")
    assert code == 0
    assert out.splitlines()[1].split()[:3] == ["mac", "ready", "1/8"]
    assert "1 more known but away" in err
    assert "away" in say("nodes", "--all")[1]
    listed = json.loads(say("nodes", "--all", "--json")[1])
    assert [(one["node"], one["present"]) for one in listed] == [("mac", True), ("pc", False)]
    code, out, _ = say("info")
    assert "landlock:7" in out
    assert "network.udp: no UDP rules" in out
    assert json.loads(say("info", "--json")[1])["memory_bytes"] == 16 * 2**30
    assert say("drain", "--stop", "-t", "5") == (0, "mac drained\n", "")
    assert mac.commands[-1]["stop_containers"] is True
    assert say("resume") == (0, "mac ready\n", "")


def test_profile(mac: FakeNode, say: Say) -> None:
    assert say("profile", "show", "web-0") == (0, "allow read /usr\n", "")
    assert json.loads(say("profile", "show", "--policy", "web-0")[1]) == {"a": 1}
    code, _, err = say("profile", "check", "web-0", "read", "/etc/passwd")
    assert code == 4
    assert "check" in err


# -- the server


def test_setup_makes_streams_once(fleet: Fleet, say: Say) -> None:
    code, out, _ = say("setup")
    assert code == 0
    assert out.count("created") == 6
    assert json.loads(say("setup", "--json")[1])["created"] == []


def test_doctor_looks_at_streams_and_clock(fleet: Fleet, say: Say) -> None:
    def levels() -> dict[str, str]:
        return {one["check"]: one["level"] for one in json.loads(say("doctor", "--json")[1])}

    before = levels()
    assert before["server"] == "ok"
    assert before["SANDFLEET_EVT"] == "fail"
    assert "clock" not in before
    assert "do: sandfleet setup" in " ".join(say("doctor")[1].split())
    fleet.node("mac")
    after = levels()
    assert [after[check] for check in ("server", "streams", "clock", "nodes")] == ["ok"] * 4


def test_without_streams_the_way_is_shown(fleet: Fleet, say: Say) -> None:
    code, _, err = say("ps")
    assert code == 4
    assert "run sandfleet setup" in err


@pytest.mark.parametrize("verb", [("ps",), ("nodes",), ("logs", "web-0"), ("setup",)])
def test_no_server_ends_in_5(verb: tuple[str, ...], say: Say, fleet: Fleet) -> None:
    code, out, err = say(*verb, "--nats", "nats://127.0.0.1:1")
    assert (code, out) == (5, "")
    assert err.startswith("error: no NATS server: nats://127.0.0.1:1: connection refused")
    assert err.count("\n") == 1


def test_wrong_credentials_and_addresses_are_told(say: Say, tmp_path: Path, fleet: Fleet) -> None:
    code, _, err = say("ps", "--creds", str(tmp_path / "nope.creds"))
    assert code == 4
    assert "nope.creds" in err
    assert say("ps", "--nats", "http://127.0.0.1")[0] == 4
