"""Attempts in a confined child, for the tests of the Linux sandbox."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from schemas.status import Network
from worker.platform.base import NetworkPolicy, PathRule, SandboxPolicy
from worker.platform.linux import landlock, seccomp
from worker.platform.linux.driver import LinuxDriver

HELPER = Path(__file__).with_name("confine.py")
NOBODY = 65534
FULL = NetworkPolicy(level=Network.FULL, udp=True)

needs_sandbox = pytest.mark.skipif(
    landlock.abi() < 6 or not seccomp.supported(), reason="needs Landlock ABI 6 and system-call filters"
)


class Place(NamedTuple):
    """A throw-away folder: `rootfs` and `tmp` are the container's, `readable` is granted, `outside` not."""

    top: Path
    rootfs: Path
    tmp: Path
    readable: Path
    outside: Path
    uid: int | None
    helper: "subprocess.Popen[bytes]"

    @property
    def root(self) -> bool:
        return self.uid is None and os.geteuid() == 0

    def driver(self) -> LinuxDriver:
        return LinuxDriver(root=self.root)

    def policy(self, **changes: Any) -> SandboxPolicy:
        own = [PathRule(str(p), "rwx", "rootfs") for p in (self.rootfs, self.tmp)]
        return SandboxPolicy(
            container="web-0",
            instance="0" * 26,
            rootfs=str(self.rootfs),
            tmp=str(self.tmp),
            state_dir=str(self.outside),
            paths=(*own, PathRule(str(self.readable), "r", "sandbox.read"), *changes.pop("paths", ())),
            **changes,
        )


@pytest.fixture(name="helper", scope="module")
def make_helper() -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-I", "-S", str(HELPER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as helper:
        yield helper
        assert helper.stdin is not None
        helper.stdin.close()
        assert helper.wait(10) == 0


@pytest.fixture(name="place", params=["as this user", "as nobody"])
def make_place(request: pytest.FixtureRequest, helper: "subprocess.Popen[bytes]") -> Iterator[Place]:
    uid = None
    if request.param == "as nobody":
        if os.geteuid() != 0:
            pytest.skip("becoming another user needs root")
        uid = NOBODY
    top = Path(os.path.realpath(tempfile.mkdtemp(prefix="sandfleet-test-")))
    made = Place(top, top / "rootfs", top / "tmp", top / "readable", top / "outside", uid, helper)
    for folder in (made.rootfs, made.tmp, made.readable, made.outside):
        folder.mkdir()
        (folder / "file").write_text("the secret")
        (folder / "folder").mkdir()
    (made.rootfs / "link").symlink_to(made.outside / "file")
    if uid is not None:
        for path in (top, *top.rglob("*")):
            os.chown(path, uid, uid, follow_symlinks=False)
    yield made
    shutil.rmtree(top)


class Outcome(NamedTuple):
    errno: int
    error: str | None
    said: str


def attempt(
    place: Place,
    code: str,
    policy: SandboxPolicy | None,
    *,
    setup: str = "",
    argv: list[str] | None = None,
    driver: LinuxDriver | None = None,
) -> Outcome:
    """Do it confined by `policy`, or, with None, free. `driver` makes the plan in the place of this kernel's."""
    names = f"top, rootfs, tmp, readable, outside = {[str(p) for p in place[:5]]!r}\n"
    task = {
        "plan": None if policy is None else (driver or place.driver()).plan(policy),
        "uid": place.uid,
        "setup": names + setup,
        "code": code,
        "argv": argv,
    }
    assert place.helper.stdin is not None
    assert place.helper.stdout is not None
    place.helper.stdin.write(json.dumps(task).encode() + b"\n")
    place.helper.stdin.flush()
    return Outcome(**json.loads(place.helper.stdout.readline()))
