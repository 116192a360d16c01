"""What becomes of a node on a kernel that lacks something, told by what it does under a filter that answers ENOSYS.

    attack_old_kernel.py PROGRAM

For each of CASES, in a process of its own, a driver and a launcher are started that meet the missing calls. Printed is
one JSON line each: what the driver then says of itself, which features a spec that requires them is refused for, and
what the attack program (mode `probe`) reaches in a container of each isolation. Run by `attack_machine`.
"""

import asyncio
import ctypes
import errno
import json
import os
import shutil
import signal
import struct
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from schemas.node import Feature
from schemas.spec import decode_spec
from tests.integration.attack_machine import PLACE
from tests.integration.attack_node import end
from tests.integration.launcher_help import Hearing, Home, until
from worker.config import Config
from worker.datadir import ContainerDirs
from worker.errors import ContractError, Unsupported
from worker.platform.base import SandboxPolicy
from worker.platform.linux.driver import LinuxDriver
from worker.platform.linux.syscall_table import NUMBERS
from worker.policy import HostFacts, make_policy
from worker.supervisor import ExecRequest, Launcher, LaunchFailed

# Beside those of the project's own table: (x86-64, aarch64).
_OTHERS = {
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
    "close_range": (436, 436),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "prctl": (157, 167),
}
_COLUMN = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[os.uname().machine]
_LD, _JEQ, _RET, _ALLOW, _ERRNO = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000
_SET_SECCOMP, _SET_DUMPABLE, _NO_NEW_PRIVS, _FILTER = 22, 4, 38, 2
_MOUNTS = "open_tree move_mount fsopen fsconfig fsmount mount_setattr"


class Case(NamedTuple):
    """Calls that there are not; `filters`: prctl cannot set a system-call filter either."""

    calls: str
    filters: bool = True


CASES = {
    "everything": Case(""),
    "no Landlock": Case("landlock_create_ruleset landlock_add_rule landlock_restrict_self"),
    "no clone3": Case("clone3"),
    "no pidfds": Case("pidfd_open pidfd_send_signal"),
    "no pidfd_getfd": Case("pidfd_getfd"),
    "no openat2": Case("openat2"),
    "no new mount calls": Case(_MOUNTS),
    "no close_range": Case("close_range"),
    "no seccomp call": Case("seccomp"),
    "no filters at all": Case("seccomp", filters=False),
    "no namespaces": Case("unshare setns"),
    "nothing new": Case(
        "landlock_create_ruleset clone3 pidfd_open pidfd_send_signal pidfd_getfd openat2 close_range seccomp "
        f"{_MOUNTS}",
        filters=False,
    ),
}
AT_ONCE = 3
PATIENCE_S = 20.0

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def remove(case: Case) -> None:
    """Let the calls of a case be missing, from this process down."""
    refuse = (_RET, 0, 0, _ERRNO | errno.ENOSYS)
    code = [(_LD, 0, 0, 4), (_JEQ, 1, 0, _AUDIT), (_RET, 0, 0, _ALLOW), (_LD, 0, 0, 0)]
    for name in case.calls.split():
        number = (_OTHERS.get(name) or NUMBERS[name])[_COLUMN]
        assert number is not None
        code += [(_JEQ, 0, 1, number), refuse]
    if not case.filters:
        number = _OTHERS["prctl"][_COLUMN]
        code += [(_JEQ, 0, 3, number), (_LD, 0, 0, 16), (_JEQ, 0, 1, _SET_SECCOMP)]
        code += [(_RET, 0, 0, _ERRNO | errno.EINVAL)]
    code.append((_RET, 0, 0, _ALLOW))
    raw = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
    if os.geteuid() != 0:
        _libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    program = _Program(len(code), raw)
    if _libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "the filter")


async def look(name: str, program: str) -> dict[str, Any]:
    """All that is to be known of one case."""
    folder = Path(PLACE) / name.replace(" ", "-")
    home_folder = folder / "data"
    home_folder.mkdir(parents=True)
    secret = folder / "secret"
    secret.write_text("the secret")
    driver = LinuxDriver()
    capabilities = driver.capabilities()
    told: dict[str, Any] = {
        "case": name,
        "sandbox": capabilities.sandbox,
        "network": capabilities.network,
        "isolation": capabilities.isolation,
        "not_enforced": sorted({f"{gap.isolation}/{gap.feature.value}" for gap in capabilities.not_enforced}),
        "runs": {},
    }
    home = Home(home_folder)
    launcher = await Launcher.attach(home)
    heard = Hearing(launcher)
    try:
        for isolation in ("process", "rootfs"):
            one = _Container(home, driver, isolation, program)
            told["runs"][isolation] = await one.run(launcher, heard, str(secret))
    finally:
        await end(launcher)
    return told


class _Container:
    def __init__(self, home: Home, driver: LinuxDriver, isolation: str, program: str) -> None:
        self._home, self._driver, self._isolation = home, driver, isolation
        self._cid = f"{isolation}-0"
        self._dirs = ContainerDirs(home.root / "containers" / self._cid)
        for folder in (self._dirs.rootfs, self._dirs.tmp, self._dirs.state):
            folder.mkdir(parents=True)
        shutil.copy(program, self._dirs.rootfs / "attack")

    def _policy(self, *require: str) -> SandboxPolicy:
        sandbox = {"isolation": self._isolation, "require": list(require)}
        spec = decode_spec({"image": {"name": "any"}, "network": {"access": "none"}, "sandbox": sandbox})
        return make_policy(
            spec,
            config=Config(source="node.toml"),
            dirs=self._dirs,
            cid=self._cid,
            instance="0" * 26,
            port=None,
            host=HostFacts(data_root=str(self._home.root)),
            driver=self._driver,
        )

    async def run(self, launcher: Launcher, heard: Hearing, secret: str) -> dict[str, Any]:
        try:
            policy = self._policy()
        except ContractError as refusal:
            return {"refused": str(refusal), "field": refusal.field}
        missing = sorted(gap.feature.value for gap in self._driver.not_enforced(policy))
        told: dict[str, Any] = {"missing": missing, "require": self._required()}
        plan = self._driver.plan(policy)
        rooted = "root" in plan
        attack = "/attack" if rooted else str(self._dirs.rootfs / "attack")
        cwd = "/" if rooted else str(self._dirs.rootfs)
        script = f"{attack} probe {secret}; {attack} ran; while :; do sleep 1; done"
        request = self._home.shell(self._cid, script, plan=plan, cwd=cwd)
        try:
            await launcher.start(request)
            await until(lambda: self._home.output(self._cid).endswith(b"\n"), PATIENCE_S)
            asked = ExecRequest(program=attack, argv=["attack", "ran"], env={}, cwd=cwd, timeout_s=PATIENCE_S)
            told["exec"] = (await launcher.exec(self._cid, asked)).stdout.decode()
            ended = await launcher.stop(self._cid, "I", 1, signal.SIGTERM, PATIENCE_S)
        except LaunchFailed as failure:
            return {**told, "failed": str(failure), "step": failure.step}
        said = self._home.output(self._cid).decode()
        return {**told, "said": said, "ended": ended.exit_code}

    def _required(self) -> list[str]:
        """The features that a spec which requires them is refused for."""
        refused = []
        for feature in Feature:
            try:
                self._policy(feature.value)
            except Unsupported as refusal:
                if refusal.field == "spec.sandbox.require[0]":
                    refused.append(feature.value)
        return sorted(refused)


def main(program: str) -> None:
    os.environ["TMPDIR"] = PLACE
    waiting, running = list(CASES), {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            name = waiting.pop(0)
            running[_begin(name, program)] = name
        child, _ = os.wait()
        print(Path(PLACE, f"{running.pop(child)}.json").read_text(), flush=True)


def _begin(name: str, program: str) -> int:
    """Look at a case in a process of its own, which leaves what it has to tell in a file."""
    child = os.fork()
    if child:
        return child
    told: dict[str, Any]
    try:
        remove(CASES[name])
        told = asyncio.run(look(name, program))
    except BaseException:
        told = {"case": name, "error": traceback.format_exc()}
    Path(PLACE, f"{name}.json").write_text(json.dumps(told))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:2])
