"""What the kernel refuses, seen from inside a container; each attempt is first shown to work outside."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.harness import Fleet

pytestmark = pytest.mark.asyncio(loop_scope="module")

PYTHON = os.path.realpath(sys.executable)
PREFIX = os.path.realpath(sys.base_prefix)


@pytest.fixture(scope="module")
def listener() -> Iterator[int]:
    """A TCP server on loopback that takes any connection."""
    server = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=_serve, args=(server,), daemon=True)
    thread.start()
    yield int(server.getsockname()[1])
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(5)


def _serve(server: socket.socket) -> None:
    while True:
        try:
            client, _ = server.accept()
        except OSError:
            return
        client.close()


@pytest.fixture(scope="module")
def secret(fleet: Fleet) -> Path:
    path = fleet.folder / "secret.txt"
    path.write_text("the secret")
    return path


def outside(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, timeout=20, check=False)


async def inside(fleet: Fleet, cid: str, code: str, **spec: Any) -> str:
    """Run Python code in a container; gives what it printed."""
    body = {
        "image": {"name": "base"},
        "command": {"entrypoint": [PYTHON, "-c", code]},
        "sandbox": {"read": [PREFIX], **spec.pop("sandbox", {})},
        **spec,
    }
    done = await fleet.client.ok(cid, "run", spec=body)
    instance = done["result"]["instance"]
    log = await fleet.client.log(cid, instance=instance)
    errors = await fleet.client.log(cid, "stderr", instance=instance)
    await fleet.client.ok(cid, "remove")
    return (log.data + errors.data).decode()


ATTEMPTS = {
    "read a file outside": "print(open({secret!r}).read())",
    "list a folder outside": "import os; print('the secret' if os.listdir({folder!r}) else '')",
    "write outside": "open({folder!r} + '/made-{n}', 'w').write('x'); print('the secret')",
    "rename outside": "import os; open({folder!r} + '/r-{n}', 'w'); os.rename({folder!r} + '/r-{n}', {folder!r} + '/s-{n}');"
                      " print('the secret')",
    "hard link a file outside": "import os, tempfile; d = tempfile.mkdtemp(dir={dir!r}); os.link({secret!r}, d + '/l');"
                                " print(open(d + '/l').read())",
    "connect to a port": "import socket; socket.create_connection(('127.0.0.1', {port}), 2); print('the secret')",
    "bind a port": "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print('the secret')",
    "udp": "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', {port}));"
           " print('the secret')",
    "unix socket": "import socket; s = socket.socket(socket.AF_UNIX); print('the secret')",
    "abstract socket": "import socket; s = socket.socket(socket.AF_UNIX); s.bind('\\0sf-{n}'); print('the secret')",
    "signal a stranger": "import os; os.kill({pid}, 0); print('the secret')",
    "a new user namespace": "import ctypes; print('the secret' if ctypes.CDLL(None).unshare(0x10000000) == 0 else 'no')",
}  # fmt: skip


@pytest.mark.parametrize("what", ATTEMPTS)
async def test_the_kernel_refuses(fleet: Fleet, cid: str, secret: Path, listener: int, what: str) -> None:
    def code(n: str) -> str:
        folder = str(secret.parent)
        return ATTEMPTS[what].format(
            secret=str(secret),
            folder=folder,
            dir=folder if n == "out" else None,
            port=listener,
            pid=os.getpid(),
            n=n,
        )

    control = outside(code("out"))
    assert "the secret" in control.stdout, control.stderr
    seen = await inside(fleet, cid, code("in"), network={"access": "none"})
    assert "the secret" not in seen, seen


async def test_localhost_reaches_only_named_ports(fleet: Fleet, cid: str, listener: int) -> None:
    code = f"import socket; socket.create_connection(('127.0.0.1', {listener}), 2); print('connected')"
    named = await inside(fleet, cid, code, network={"access": "localhost", "connect_ports": [listener]})
    assert "connected" in named, named
    other = await inside(fleet, cid, code, network={"access": "localhost"})
    assert "connected" not in other
    assert "Permission" in other


async def test_the_assigned_port_can_be_bound_and_no_other(fleet: Fleet, cid: str) -> None:
    code = (
        "import os, socket\n"
        "socket.create_server(('127.0.0.1', int(os.environ['PORT']))); print('bound')\n"
        "socket.create_server(('127.0.0.1', 0)); print('another')"
    )
    seen = await inside(fleet, cid, code, network={"access": "localhost"})
    assert "bound" in seen, seen
    assert "another" not in seen, seen


async def test_the_nats_server_is_out_of_reach(fleet: Fleet, cid: str) -> None:
    code = (
        f"import socket; socket.create_connection(('127.0.0.1', {fleet.server.port}), 2); print('connected')"
    )
    for access in ("none", "localhost"):
        seen = await inside(fleet, cid, code, network={"access": access, "connect_ports": []})
        assert "connected" not in seen


async def test_the_nodes_own_files_are_out_of_reach(fleet: Fleet, cid: str) -> None:
    data = fleet.worker.data
    files = [
        data / "worker.db",
        data / "launcher.key",
        data / "node.json",
        data / "containers" / cid / "state",
    ]
    assert all(f.exists() for f in files[:3])
    code = (
        "import os\n"
        f"for p in {[str(f) for f in files]!r}:\n"
        "    try: print('reached', os.listdir(p) if os.path.isdir(p) else open(p,'rb').read(1))\n"
        "    except OSError as e: print('refused', e.errno)\n"
    )
    seen = await inside(fleet, cid, code)
    assert seen.count("refused") == 4, seen
    assert "reached" not in seen


async def test_no_capability_no_new_privileges_only_three_descriptors(fleet: Fleet, cid: str) -> None:
    code = (
        "import os, resource\n"
        "s = dict(l.split(':\\t') for l in open('/proc/self/status').read().splitlines() if ':\\t' in l)\n"
        "print([int(s[k], 16) for k in ('CapInh','CapPrm','CapEff','CapBnd','CapAmb')], s['NoNewPrivs'], s['Seccomp'])\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_CORE))\n"
        "print(sorted(int(f) for f in os.listdir('/proc/self/fd'))[:3], len(os.listdir('/proc/self/fd')))\n"
        "print(os.getsid(0) == os.getpid(), os.environ.get('USER'))\n"
    )
    seen = await inside(fleet, cid, code)
    assert "[0, 0, 0, 0, 0] 1 2" in seen, seen
    assert "(4096, 4096) (0, 0)" in seen, seen
    assert "[0, 1, 2] 4" in seen, seen
    assert "True None" in seen, seen


async def test_the_environment_is_clean(fleet: Fleet, cid: str) -> None:
    seen = await inside(
        fleet, cid, "import os; print(sorted(os.environ)); print(os.environ['A'])", env={"A": "b c"}
    )
    names = [
        "A", "HOME", "PATH", "PORT", "SANDFLEET_CONTAINER", "SANDFLEET_INSTANCE", "SANDFLEET_NODE", "SANDFLEET_PORT",
        "TMPDIR", "ZLAYER_PORT",
    ]  # fmt: skip
    lines = seen.splitlines()
    assert [n for n in eval(lines[0]) if n != "LC_CTYPE"] == names
    assert lines[1] == "b c"


async def test_a_bind_mount_needs_the_nodes_word(fleet: Fleet, cid: str) -> None:
    storage = [{"type": "bind", "source": "/etc", "target": "/mnt"}]
    done = await fleet.client.do(cid, "create", spec={"image": {"name": "base"}, "storage": storage})
    assert done["error"]["code"] == "policy_denied"
    assert "bind_sources" in done["error"]["message"]
    assert "node.toml" in done["error"]["message"]
