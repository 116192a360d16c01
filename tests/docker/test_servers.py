"""Servers in containers: what stands for a process of theirs, and that nothing of them stays behind."""

import signal
import socket
import subprocess
from pathlib import Path

import docker
import pytest
from testcontainers.core.labels import LABEL_SESSION_ID, SESSION_ID

from tests.acceptance.harness import until
from tests.containers import ServerContainer, remove_ours


def ours(client: docker.DockerClient) -> int:
    return len(client.containers.list(all=True, filters={"label": f"{LABEL_SESSION_ID}={SESSION_ID}"}))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, 137)])
async def test_one_lives_and_ends(
    client: docker.DockerClient, tmp_path: Path, unused_tcp_port: int, number: int, code: int
) -> None:
    before = ours(client)
    server = ServerContainer(
        ["-a", "127.0.0.1", "-p", str(unused_tcp_port), "-js", "-sd", str(tmp_path)], [tmp_path]
    )
    await until(lambda: b"Server is ready" in server.log, what="the server is ready")
    with socket.create_connection(("127.0.0.1", unused_tcp_port), 1):
        pass  # it has the host's network
    assert (tmp_path / "jetstream").is_dir()  # and the folder
    assert (tmp_path / "jetstream").stat().st_uid == tmp_path.stat().st_uid
    assert server.poll() is None
    assert Path(f"/proc/{server.pid}/cmdline").read_bytes().startswith(b"/nats-server\0")
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait(0)
    assert ours(client) == before + 1
    server.send_signal(number)
    assert server.wait(20) == code
    assert server.poll() == code
    assert b"Server is ready" in server.log
    assert ours(client) == before
    server.kill()  # as with a process that has ended: nothing to do


def test_what_is_left_is_removed_by_label(client: docker.DockerClient, tmp_path: Path) -> None:
    server = ServerContainer(["-a", "127.0.0.1", "-p", "-1"], [tmp_path])
    assert server.poll() is None
    assert ours(client) > 0
    remove_ours()
    assert ours(client) == 0
