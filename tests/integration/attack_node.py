"""A node under attack: run in a machine of its own by `attack_machine`, it prints one JSON line for each run.

    attack_node.py PROGRAM WHAT

PROGRAM is the compiled attack program. It is run in containers of every setting by a real launcher (WHAT is `attacks`),
in plans with a single layer of the sandbox, under bubblewrap where there is one, and in the end free, as the control;
or its trees of processes are (`trees`), or the hardest of its fork bombs, while the node is asked for more (`storms`).
This process stands for the worker: same user, same launcher, same folders.
"""

import asyncio
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from schemas.status import Network
from tests.integration.attack_machine import SIGN_FILE
from tests.integration.attack_outside import DATA, OF_GROUP, OUTSIDE, PROGRAM, READABLE, TMP, TOP, Outside
from tests.integration.launcher_help import Hearing, Home, alive, until
from worker.launcher.protocol import encode_frame
from worker.platform.base import NetworkPolicy, PathRule, SandboxPolicy
from worker.platform.linux.driver import LinuxDriver
from worker.supervisor import ExecRequest, Launcher

ISOLATIONS = ("process", "rootfs")
LEVELS = tuple(level.value for level in (Network.NONE, Network.LOCALHOST, Network.OUTBOUND, Network.FULL))
LAYERS = {
    "launcher": (),
    "privileges": ("rlimits", "groups", "capabilities", "no_new_privs", "dumpable"),
    "landlock": ("no_new_privs", "landlock"),
    "seccomp": ("no_new_privs", "seccomp"),
    "namespaces": (),
}
TREES = ("bomb", "run_away", "orphans", "deaf", "stopped", "beside", "reaper", "traced", "headless")
PATIENCE_S = 60.0

Meanwhile = Callable[[], Awaitable[float]]

_KEYCTL, _ADD_KEY = {"x86_64": (250, 248), "aarch64": (219, 217)}[os.uname().machine]
_libc = ctypes.CDLL(None, use_errno=True)


def tell(**line: Any) -> None:
    print(json.dumps(line), flush=True)


class Node:
    """The launcher, a neighbour in it, and what is outside."""

    def __init__(self, launcher: Launcher, home: Home, outside: Outside) -> None:
        self.launcher = launcher
        self.home = home
        self.heard = Hearing(launcher)
        self.driver = LinuxDriver()
        self.outside = outside
        self.neighbour = 0
        self._count = 0
        self._greeting = encode_frame(
            {"id": 1, "op": "hello", "key": home.key_path.read_text(), "protocol": [1, 1], "events": False}
        ).hex()

    # -- containers

    def place(self, cid: str) -> tuple[Path, Path, Path]:
        """The folders of a container, made: root, temporary files, state."""
        folders = tuple(DATA / "containers" / cid / name for name in ("rootfs", "tmp", "state"))
        for folder in folders:
            folder.mkdir(parents=True)
        shutil.copy(PROGRAM, folders[0] / "attack")
        return folders  # type: ignore[return-value]

    def policy(self, cid: str, isolation: str, level: str) -> SandboxPolicy:
        ports = self.outside.listeners.ports
        rootfs, tmp, state = (DATA / "containers" / cid / name for name in ("rootfs", "tmp", "state"))
        return SandboxPolicy(
            container=cid,
            instance="I",
            isolation=isolation,
            rootfs=str(rootfs),
            tmp=str(tmp),
            state_dir=str(state),
            paths=(
                PathRule(str(rootfs), "rwx", "rootfs"),
                PathRule(str(tmp), "rwx", "tmp"),
                PathRule(str(READABLE), "r", "sandbox.read"),
                PathRule(str(OF_GROUP), "r", "sandbox.read"),
            ),
            network=NetworkPolicy(
                level=Network(level),
                connect_ports=(53, 80, 443, ports["granted"]),
                denied_ports=(ports["nats"],),
                udp=level in ("outbound", "full"),
            ),
            deny=(str(DATA),),
        )

    async def start(self, cid: str, plan: dict[str, Any], *arguments: str, **env: str) -> int:
        rooted = "root" in plan
        rootfs = DATA / "containers" / cid / "rootfs"
        request = self.home.request(
            cid,
            "/attack" if rooted else str(rootfs / "attack"),
            *arguments,
            plan=plan,
            cwd="/" if rooted else str(rootfs),
            env={"PATH": "/usr/bin:/bin", **env},
        )
        return (await self.launcher.start(request)).pid

    async def begin(self) -> None:
        """A container beside the one that attacks."""
        cid = "neighbour-0"
        rootfs, _, _ = self.place(cid)
        (rootfs / "kept").write_text(self.outside.token)
        plan = self.driver.plan(self.policy(cid, "process", "none"))
        script = f"echo {self.outside.token}; while :; do sleep 60; done"
        request = self.home.shell(
            cid, script, plan=plan, env={"SECRET": self.outside.token, "PATH": "/usr/bin:/bin"}
        )
        self.neighbour = (await self.launcher.start(request)).pid
        await until(lambda: self.home.output(cid))

    def parameters(self, own: Path, program: Path, rootfs: Path, state: Path, **more: Any) -> list[str]:
        told = {
            **self.outside.parameters(),
            "launcher": self.launcher.pid,
            "neighbour": self.neighbour,
            "greeting": self._greeting,
            "own": own,
            "program": program,
            "rootfs": rootfs,
            "state": state,
            "fixed": TOP / "fixed",
            **more,
        }
        return [f"{name}={value}" for name, value in told.items()]

    # -- runs

    async def contained(
        self, isolation: str, level: str, *, layer: str | None = None, joined: bool = False
    ) -> None:
        """In a container: with its whole plan, or with one layer of it; `joined` by an exec."""
        self._count += 1
        cid = f"run-{self._count}"
        rootfs, tmp, state = self.place(cid)
        self.outside.lay_out()
        policy = self.policy(cid, isolation, level)
        plan = self.driver.plan(policy)
        if layer is not None:
            plan["steps"] = [step for step in plan["steps"] if step[0] in LAYERS[layer]]
        rooted = "root" in plan
        own, program = (Path("/tmp"), Path("/attack")) if rooted else (tmp, rootfs / "attack")
        arguments = self.parameters(own, program, rootfs, state, **({"fixed": "/usr"} if rooted else {}))
        if joined:
            script = "while :; do sleep 60; done"
            request = self.home.shell(cid, script, plan=plan, cwd="/" if rooted else str(rootfs))
            await self.launcher.start(request)
            asked = ExecRequest(
                program=str(program),
                argv=["attack", "run", *arguments],
                env={},
                cwd="/",
                timeout_s=PATIENCE_S,
            )
            said = (await self.launcher.exec(cid, asked)).stdout
            await self.launcher.kill_tree(cid, "I", 1)
        else:
            await self.start(cid, plan, "run", *arguments)
            await until(lambda: any(e.cid == cid for e in self.heard.exits), PATIENCE_S)
            said = self.home.output(cid)
        missing = [gap.feature.value for gap in self.driver.not_enforced(policy)]
        await self.launcher.forget(cid, "I")
        self._tell(
            f"{isolation}/{level}", said, rootfs, state, layer=layer, joined=joined, not_enforced=missing
        )
        shutil.rmtree(DATA / "containers" / cid)

    def free(self, name: str, *before: str, own: Path) -> None:
        """Not in a container; with what a careless parent would hand down, all that the launcher keeps back."""
        rootfs, state = TOP / "free" / "rootfs", TOP / "free" / "state"
        for folder in (rootfs, state, TOP / "own"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        shutil.rmtree(f"{rootfs}.moved", ignore_errors=True)
        self.outside.lay_out()
        leaked = os.open(OUTSIDE / "lock_file", os.O_RDONLY)
        terminal = self.outside.listeners.terminals[0][1]

        def careless() -> None:
            os.setsid()
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 1)
            os.umask(0)
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

        done = subprocess.run(
            [*before, str(PROGRAM), "run", *self.parameters(own, PROGRAM, rootfs, state)],
            capture_output=True,
            pass_fds=(leaked,),
            preexec_fn=careless,
            env={"NODES_SECRET": self.outside.token},
            timeout=PATIENCE_S,
            check=False,
        )
        os.close(leaked)
        if before and not done.stdout:
            tell(run=name, unavailable=done.stderr.decode(errors="replace").strip()[-300:])
            return
        self._tell(name, done.stdout, rootfs, state)

    def _tell(self, run: str, said: bytes, rootfs: Path, state: Path, **more: Any) -> None:
        attempts = {one["name"]: one for one in map(json.loads, said.decode().splitlines())}
        sent = {name for name, one in attempts.items() if one["errno"] == 0}
        effects = self.outside.effects(sent, rootfs, state)
        tell(
            run=run,
            attempts={name: [one["errno"], one["said"]] for name, one in attempts.items()},
            effects=sorted(effects),
            **more,
        )

    # -- trees

    async def tree(self, isolation: str, kind: str, meanwhile: Meanwhile | None = None) -> None:
        """A tree that is hard to end, and what is left of it when it was stopped."""
        self._count += 1
        cid = f"tree-{self._count}"
        self.place(cid)
        before, mounts = _processes(), _mounts()
        plan = self.driver.plan(self.policy(cid, isolation, "none"))
        program = await self.start(cid, plan, "tree", kind)
        inside = os.readlink(f"/proc/{program}/ns/pid")
        await until(lambda: b"up" in self.home.output(cid))
        most = len(_processes() - before)
        answered = None if meanwhile is None else await meanwhile()
        begun = time.monotonic()
        ended = await self.launcher.stop(cid, "I", 1, signal.SIGTERM, 0.1)
        took = time.monotonic() - begun
        left = [_name(pid) for pid in _processes() - before if _belongs(pid, inside)]
        await self.launcher.forget(cid, "I")
        # What goes is the host's: a mount ends here, too, when its folder is deleted there.
        unmounted = _mounts() <= mounts
        tell(
            tree=kind,
            isolation=isolation,
            most=most,
            seconds=took,
            left=left,
            mounts=unmounted,
            lost=ended.lost,
            answered=answered,
            others=alive(self.neighbour) and alive(self.launcher.pid),
        )

    async def answers(self) -> float:
        """Ask for all that a node does: containers, a new one, a program in an old one. Gives the seconds it took."""
        begun = time.monotonic()
        cids = [known.cid for known in await self.launcher.containers()]
        assert "neighbour-0" in cids, cids
        asked = ExecRequest(program="/bin/echo", argv=["echo", "here"], env={}, cwd="/", timeout_s=PATIENCE_S)
        assert (await self.launcher.exec("neighbour-0", asked)).stdout == b"here\n"
        self._count += 1
        cid = f"answer-{self._count}"
        self.place(cid)
        plan = self.driver.plan(self.policy(cid, "process", "none"))
        await self.launcher.start(self.home.shell(cid, "echo new", plan=plan))
        await until(lambda: any(e.cid == cid for e in self.heard.exits), PATIENCE_S)
        assert self.home.output(cid) == b"new\n"
        await self.launcher.forget(cid, "I")
        return time.monotonic() - begun


def _mounts() -> set[str]:
    return set(Path("/proc/self/mountinfo").read_text().splitlines())


def _processes() -> set[int]:
    return {int(entry) for entry in os.listdir("/proc") if entry.isdigit()}


def _belongs(pid: int, inside: str) -> bool:
    """Whether a process runs the attack program, or is in a namespace of a container's own."""
    try:
        in_there = inside == os.readlink(f"/proc/{pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
    except OSError:
        return False  # it has ended, or is the launcher's, which hides
    return in_there or _name(pid) == "attack"


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""  # it has ended


async def attacks(node: Node) -> None:
    isolations = [name for name in ISOLATIONS if name in node.driver.capabilities().isolation]
    for isolation in isolations:
        for level in LEVELS:
            await node.contained(isolation, level)
        await node.contained(isolation, "none", joined=True)
    bwrap = shutil.which("bwrap")
    if bwrap is not None:
        shown = (
            "--die-with-parent",
            "--ro-bind",
            "/",
            "/",
            "--dev",
            "/dev",
            "--proc",
            "/proc",
            "--tmpfs",
            "/tmp",
        )
        node.free("bwrap", bwrap, "--unshare-all", *shown, own=Path("/tmp"))
        node.free("bwrap with the network", bwrap, "--unshare-all", "--share-net", *shown, own=Path("/tmp"))
    # Last, because they slow down whatever they can.
    for isolation in isolations:
        for layer in LAYERS:
            if (layer == "namespaces") == (isolation == "rootfs"):
                await node.contained(isolation, "none", layer=layer)
    node.free("control", own=TOP / "own")


async def trees(node: Node) -> None:
    isolations = [name for name in ISOLATIONS if name in node.driver.capabilities().isolation]
    for isolation in isolations:
        for kind in TREES:
            await node.tree(isolation, kind)


async def storms(node: Node) -> None:
    for isolation in ISOLATIONS:
        if isolation in node.driver.capabilities().isolation:
            await node.tree(isolation, "storm", node.answers)


async def main(program: str, what: str) -> None:
    assert Path(SIGN_FILE).read_text(), "only in a machine of its own"
    for folder in (OUTSIDE, READABLE, DATA, TMP, DATA / "secrets", DATA / "containers"):
        folder.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(TMP)
    os.chdir(OUTSIDE)
    shutil.copy(program, PROGRAM)
    home, outside = Home(DATA), Outside()
    keep_a_key(outside.token.encode())
    launcher = await Launcher.attach(home)
    node = Node(launcher, home, outside)
    (DATA / "worker.db").write_text(node.outside.token)
    (DATA / "secrets" / "token").write_text(node.outside.token)
    try:
        await node.begin()
        tell(
            secret=outside.token,
            shown={"read_key": home.key_path.read_text(), "see_file": f"size {outside.size}"},
        )
        await {"attacks": attacks, "trees": trees, "storms": storms}[what](node)
    finally:
        node.outside.close()
        await end(launcher)


async def end(launcher: Launcher) -> None:
    """End a launcher and all that it runs."""
    await launcher.shutdown(kill=True)
    await until(lambda: not alive(launcher.pid))
    await launcher.close()


def keep_a_key(token: bytes) -> None:
    """In a session keyring that whatever is started from here inherits."""
    _libc.syscall(_KEYCTL, 1, None)
    _libc.syscall(_ADD_KEY, b"user", b"sandfleet-attack", token, ctypes.c_size_t(len(token)), -3)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
