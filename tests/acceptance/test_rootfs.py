"""Containers with a root of their own: what they see, what stays, and that nothing of them is left."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.acceptance.harness import Fleet
from worker.platform.linux.able import Able

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(bool(Able().reason), reason=f"no isolation rootfs here: {Able().reason}"),
]

CONFIG = """
[node]
isolation = "rootfs"
[policy]
register_roots = ["{images}"]
read = ["{images}"]
write = ["{images}"]
bind_sources = ["{images}"]
"""
FOREVER = "while :; do sleep 0.05; done"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet(CONFIG) as made:
        shared = made.images / "shared"
        shared.mkdir()
        (shared / "given").write_text("given")
        await made.register("base")
        yield made


def spec(script: str, **fields: Any) -> dict[str, Any]:
    return {
        "image": {"name": "base"},
        "command": {"entrypoint": ["/bin/sh", "-c", script]},
        "network": {"access": "none"},
        **fields,
    }


async def printed(fleet: Fleet, cid: str, script: str, **fields: Any) -> str:
    """What a script says before it ends by itself; it must end well."""
    await fleet.client.ok(cid, "run", spec=spec(f"exec 2>&1; {script}", **fields))
    log = await fleet.client.log(cid)
    status = await fleet.client.state(cid, "exited", run=1)
    assert status["exit_code"] == 0, log.data.decode()
    return log.data.decode()


async def asked(fleet: Fleet, cid: str, script: str) -> tuple[int, str]:
    """An exec in a running container: its exit code and all that it said."""
    reply = await fleet.client.query("exec", container=cid, argv=["/bin/sh", "-c", f"exec 2>&1; {script}"])
    assert "error" not in reply, reply
    return reply["exit_code"], reply["stdout"]


async def test_the_node_says_that_it_can(fleet: Fleet) -> None:
    info = await fleet.client.query("info")
    assert info["capabilities"]["isolation"] == ["process", "rootfs"]
    assert "isolation.rootfs" in info["api"]["features"]


async def test_it_sees_its_own_root_and_processes_only(fleet: Fleet, cid: str) -> None:
    data = fleet.folder / "node" / "data"
    said = await printed(
        fleet,
        cid,
        f"echo root: $(ls /); ls {data} {fleet.images} /root /home /run; "
        "echo pids: $(ls /proc | grep '^[0-9]'); echo me $$; cat /proc/1/cmdline; hostname; pwd; "
        'echo "$HOME $TMPDIR"; echo nets: $(cut -d: -f1 /proc/net/dev | tail -n +3)',
    )
    lines = said.splitlines()
    assert lines[0].split()[1:] == ["bin", "dev", "etc", "lib", "lib64", "proc", "sbin", "sys", "tmp", "usr"]
    for path in (data, fleet.images, "/root", "/home", "/run"):
        assert f"'{path}': No such file or directory" in said
    pids = next(line for line in lines if line.startswith("pids: ")).split()[1:]
    assert set(pids) <= {str(n) for n in range(1, 12)}
    assert "me 2" in lines
    assert "launcher" not in said
    assert cid[:64] in said
    assert "/tmp /tmp" in lines
    assert "nets: lo" in lines


@pytest.mark.parametrize(
    "attempt",
    [
        "echo x > /usr/planted",
        "echo x > /proc/sys/kernel/core_pattern",
        "echo x > /proc/sysrq-trigger",
        "echo x > /etc/passwd",
        "mount -t tmpfs none /tmp",
        "umount /proc/sys",
        "umount /usr",
        "mknod /tmp/disk b 8 0",
        "hostname other",
        "kill -9 1; kill -0 1",
        "cat /proc/1/environ",
        "ls /proc/1/root/",
        "chroot /tmp true",
        "unshare -r true",
        "cat /proc/kcore | head -c 1 | grep -q .",
    ],
)
async def test_what_is_not_its_own_is_refused(fleet: Fleet, attempt: str) -> None:
    await _running(fleet, "refused-0")
    code, said = await asked(fleet, "refused-0", attempt)
    assert code != 0 or "kill" in attempt, said
    code, said = await asked(fleet, "refused-0", "echo alive")
    assert (code, said) == (0, "alive\n")


async def _running(fleet: Fleet, cid: str, script: str = FOREVER, **fields: Any) -> dict[str, Any]:
    found = await fleet.client.query("state", container=cid)
    if found.get("state") != "running":
        await fleet.client.ok(cid, "run", spec=spec(script, **fields))
        found = await fleet.client.query("state", container=cid)
    return found


async def test_what_it_writes_stays_and_is_seen_by_nobody_else(fleet: Fleet, cid: str) -> None:
    script = "cat /kept 2>/dev/null; echo run >> /kept; ls /elsewhere 2>/dev/null; true"
    await fleet.client.ok(cid, "run", spec=spec(script))
    await fleet.client.state(cid, "exited", run=1)
    await fleet.client.ok(cid, "start")
    await fleet.client.state(cid, "exited", run=2)
    log = await fleet.client.log(cid, run=2)
    assert log.data == b"run\n"
    assert "kept" not in await printed(fleet, "neighbour-0", "ls /")


async def test_granted_paths_and_volumes(fleet: Fleet, cid: str) -> None:
    shared = fleet.images / "shared"
    said = await printed(
        fleet,
        cid,
        f"cat {shared}/given; echo x > {shared}/new || echo refused; "
        "cat /ro/given; echo x > /ro/new || echo refused; echo x > /rw/made && echo written; "
        "echo y > /kept/file && cat /kept/file; dd if=/dev/zero of=/small/big bs=1M count=8 || echo full; "
        "df -k /small | tail -1",
        sandbox={"read": [str(shared)]},
        storage=[
            {"type": "bind", "source": str(shared), "target": "/ro", "readonly": True},
            {"type": "bind", "source": str(shared), "target": "/rw"},
            {"type": "named", "name": "kept", "target": "/kept"},
            {"type": "tmpfs", "target": "/small", "size": "1Mi"},
        ],
    )
    assert said.count("given") == 2
    assert said.count("refused") == 2
    assert said.count("Read-only file system") == 2
    assert "written" in said
    assert (shared / "made").read_text() == "x\n"
    assert "y\n" in said
    assert "No space left on device" in said
    assert not (shared / "new").exists()
    # A link in the rootfs, as without a root of its own, would be a trace.
    rootfs = fleet.folder / "node" / "data" / "containers" / cid / "rootfs"
    assert not (rootfs / "kept").is_symlink()


async def test_exec_joins_the_container(fleet: Fleet, cid: str) -> None:
    status = await _running(fleet, cid, f"echo secret > /only-here; {FOREVER}")
    assert Path(f"/proc/{status['pid']}/comm").read_text() == "sh\n"
    code, said = await asked(
        fleet,
        cid,
        "cat /only-here; hostname; echo pids $(ls /proc | grep -c '^[0-9]'); grep -E '^(CapEff|NoNewPrivs|Seccomp):' "
        "/proc/self/status; exit 9",
    )
    assert code == 9
    assert said.splitlines()[:2] == ["secret", cid]
    assert "CapEff:\t0000000000000000" in said
    assert "NoNewPrivs:\t1" in said
    assert "Seccomp:\t2" in said


async def test_nothing_of_a_tree_is_left(fleet: Fleet, cid: str) -> None:
    """Orphans in sessions of their own, ignoring every signal that can be ignored."""
    orphan = "trap '' TERM INT HUP; while :; do sleep 0.02; done"
    script = f'for n in 1 2 3; do setsid /bin/sh -c "{orphan}" & done; sleep 0.1; echo up; {FOREVER}'
    status = await _running(fleet, cid, script)
    await fleet.client.log_seen(cid, b"up\n")
    inside = os.readlink(f"/proc/{status['pid']}/ns/pid")
    assert len(_in_namespace(inside)) >= 5
    stats = await fleet.client.query("stats", container=cid)
    assert stats["processes"] >= 4
    await fleet.client.ok(cid, "stop", timeout_s=0.2)
    assert _in_namespace(inside) == []
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if cid in line]


def _in_namespace(name: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.readlink(folder / "ns" / "pid") == name:
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


async def test_the_programs_own_end_is_told(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "run", spec=spec("setsid sleep 60 & exit 7"))
    assert (await fleet.client.state(cid, "exited", run=1))["exit_code"] == 7
    await fleet.client.ok(cid, "run", spec=spec("kill -SEGV $$"), replace=True)
    status = await fleet.client.event(
        lambda e: e["type"] == "state_changed" and e["container"] == cid and e["status"]["exit_code"] == -11
    )
    assert status["status"]["state"] == "exited"


async def test_a_program_that_is_missing_is_named(fleet: Fleet, cid: str) -> None:
    done = await fleet.client.do(
        cid, "run", spec={"image": {"name": "base"}, "command": {"entrypoint": ["no-such-program"]}}
    )
    assert done["error"]["code"] == "start_failed"
    assert "no-such-program" in done["error"]["message"]
    done = await fleet.client.do(
        cid,
        "run",
        spec={"image": {"name": "base"}, "command": {"entrypoint": ["/bin/true"], "workdir": "/nowhere"}},
        replace=True,
    )
    assert done["error"]["field"] == "spec.command.workdir"


LISTER = """
#include <dirent.h>
#include <stdio.h>
int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        DIR *folder = opendir(argv[i]);
        for (struct dirent *e; folder && (e = readdir(folder)); )
            if (e->d_name[0] != '.') printf("%s/%s\\n", argv[i], e->d_name);
    }
    return 0;
}
"""


async def test_an_image_with_a_system_of_its_own_shows_that(fleet: Fleet, cid: str) -> None:
    """A static program stands for its shell; the host's files do not appear."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler to make a static program")
    source = fleet.images / "own"
    (source / "bin").mkdir(parents=True)
    command = [compiler, "-static", "-x", "c", "-o", str(source / "bin" / "sh"), "-"]
    made = subprocess.run(command, input=LISTER, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no static program can be made: {made.stderr[-200:]}")
    await fleet.client.ok(None, "register_image", image="own", source_dir=str(source))
    body = {
        "image": {"name": "own"},
        "command": {"entrypoint": ["/bin/sh", "/", "/etc"]},
        "network": {"access": "none"},
    }
    await fleet.client.ok(cid, "run", spec=body)
    names = set((await fleet.client.log(cid)).data.decode().split())
    assert {"//bin", "//proc", "//dev", "//tmp"} <= names
    assert "//usr" not in names
    assert {name for name in names if name.startswith("/etc/")} <= {"/etc/hosts", "/etc/resolv.conf"}


async def test_a_killed_worker_finds_it_again(fleet: Fleet, cid: str) -> None:
    status = await _running(fleet, cid)
    fleet.worker.kill()
    boots = len({e["boot"] for e in fleet.client.events if e["type"] == "node_changed"})
    fleet.worker.start()
    await fleet.ready(boots + 1)
    assert (await fleet.client.query("state", container=cid))["pid"] == status["pid"]
    code, said = await asked(fleet, cid, "echo $$")
    assert code == 0, said
    await fleet.client.ok(cid, "remove")
    async with asyncio.timeout(10):
        while Path(f"/proc/{status['pid']}").exists():
            await asyncio.sleep(0.02)
