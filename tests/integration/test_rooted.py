"""Roots of their own, made from hostile images, as root and as an ordinary user."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.status import Network
from worker.platform.base import Limits, NetworkPolicy, PathRule, SandboxPolicy, VolumeMount
from worker.platform.linux import system
from worker.platform.linux.able import Able
from worker.platform.linux.rootplan import make_root

NOBODY = 65534
CHILD = Path(__file__).with_name("rooted_child.py")

pytestmark = pytest.mark.skipif(bool(Able().reason), reason=f"no isolation rootfs here: {Able().reason}")


class Box:
    """A throwaway folder: `rootfs` is the container's, `outside` is not to be touched."""

    def __init__(self, top: Path, uid: int | None, child: "subprocess.Popen[str]") -> None:
        self.top = top
        self.uid = uid
        self.rootfs = top / "rootfs"
        self.tmp = top / "tmp"
        self.outside = top / "outside"
        self._child = child
        for folder in (self.rootfs, self.tmp, self.outside):
            folder.mkdir()
        (self.outside / "canary").write_text("untouched")

    def policy(self, **changes: Any) -> SandboxPolicy:
        fields: dict[str, Any] = {
            "container": "box-0",
            "instance": "0" * 26,
            "isolation": "rootfs",
            "rootfs": str(self.rootfs),
            "tmp": str(self.tmp),
            "state_dir": str(self.top / "state"),
            "paths": (),
            "network": NetworkPolicy(level=Network.NONE),
        }
        return SandboxPolicy(**{**fields, **changes})

    def run(self, script: str, join: str | None = None, **changes: Any) -> dict[str, Any]:
        policy = self.policy(**changes)
        if self.uid is not None:
            for path in (self.top, *self.top.rglob("*")):
                os.chown(path, self.uid, self.uid, follow_symlinks=False)
        ordinary = self.uid is not None or os.geteuid() != 0
        user = (self.uid or os.getuid(), self.uid or os.getgid()) if ordinary else None
        root = make_root(policy, system=system.system().rules, links=system.links(), user=user)
        task = {
            "root": root,
            "uid": self.uid,
            "argv": ["/bin/sh", "-c", script],
            "join": None if join is None else ["/bin/sh", "-c", join],
        }
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(task) + "\n")
        self._child.stdin.flush()
        answer: dict[str, Any] = json.loads(self._child.stdout.readline())
        assert (self.outside / "canary").read_text() == "untouched"
        assert sorted(os.listdir(self.outside)) == ["canary"]
        assert str(self.top) not in Path("/proc/self/mountinfo").read_text()
        return answer


@pytest.fixture(name="child", scope="module")
def make_child() -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-I", "-S", str(CHILD)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        yield child
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(10) == 0


@pytest.fixture(name="box", params=["as this user", "as nobody"])
def make_box(request: pytest.FixtureRequest, child: "subprocess.Popen[str]") -> Iterator[Box]:
    uid = None
    if request.param == "as nobody":
        if os.geteuid() != 0:
            pytest.skip("becoming another user needs root")
        uid = NOBODY
    top = Path(os.path.realpath(tempfile.mkdtemp(prefix="sandfleet-test-")))
    yield Box(top, uid, child)
    shutil.rmtree(top)


def test_a_program_runs_as_itself(box: Box) -> None:
    answer = box.run("id -u; cat /proc/1/cmdline; echo x > /made; hostname; exit 5", join="cat /made; exit 6")
    assert answer["error"] == ""
    assert answer["status"] == 5 << 8
    uid = os.getuid() if box.uid is None else box.uid
    lines = answer["said"].replace("\0", "").splitlines()
    assert lines[0] == str(uid)
    assert lines[1] == "initbox-0"
    error, _, status, said = answer["joined"]
    assert error == ""
    assert (status, said) == (6 << 8, "x\n")
    assert answer["left"] == 1  # number 1 itself, which was killed
    assert (box.rootfs / "made").read_text() == "x\n"


def test_a_second_start_finds_what_the_first_did(box: Box) -> None:
    script = "ls /usr/bin | wc -l; ls / | tr '\\n' ' '"
    first, second = box.run(script), box.run(script)
    assert first["said"] == second["said"]
    assert int(first["said"].split()[0]) > 10


# Links, by their place in the rootfs, where {outside} is a folder of the host.
HOSTILE = {
    "a folder of the system is a link out": {"etc": "../outside"},
    "the same, absolute": {"etc": "{outside}"},
    "dev is a link out": {"dev": "../../../../../..{outside}"},
    "tmp is a link to nothing": {"tmp": "/no/where"},
    "resolv.conf is a link to nothing": {"etc/resolv.conf": "../run/resolve/stub"},
    "a target is a link out": {"data": "{outside}"},
    "a target goes through a link out": {"deep": "../outside"},
    "a link leads through another": {"deep": "/far", "far": "../../{outside}"},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_links_of_an_image_stay_inside(box: Box, what: str) -> None:
    for place, text in HOSTILE[what].items():
        (box.rootfs / place).parent.mkdir(exist_ok=True)
        (box.rootfs / place).symlink_to(text.format(outside=box.outside))
    volume = box.top / "volume"
    volume.mkdir()
    (volume / "kept").write_text("kept")
    mounts = tuple(
        VolumeMount(kind="bind", source=str(volume), target=target) for target in ("/data", "/deep/er")
    )
    answer = box.run(
        "cat /data/kept /deep/er/kept; test -c /dev/null; cat /proc/version | head -c 5", volumes=mounts
    )
    assert answer["error"] == "", what
    assert answer["said"] == "keptkeptLinux"


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (lambda box: (box.rootfs / "tmp").write_text("a file"), "mounts"),
        (lambda box: (box.rootfs / "proc").symlink_to("proc"), "mounts"),
        (lambda box: shutil.rmtree(box.tmp), "mounts"),
        (lambda box: shutil.rmtree(box.rootfs), "mounts"),
    ],
)
def test_what_cannot_be_mounted_is_an_error_and_leaves_nothing(box: Box, make: Any, step: str) -> None:
    make(box)
    answer = box.run("true")
    assert answer["error"].startswith(f"{step}: "), answer
    assert answer["numbers"] == []
    assert answer["left"] == 2  # number 1, which was killed, and the program's process


def test_read_only_holds_for_what_is_mounted_below_too(box: Box) -> None:
    given = box.top / "given"
    given.mkdir()
    (given / "file").write_text("x")
    rules = (PathRule(str(given), "rx", "sandbox.read"),)
    answer = box.run(
        f"cat {given}/file; echo y > {given}/file; echo y > {given}/new; chmod 777 {given}/file; "
        "touch /usr/x; ln /usr/bin/env /linked; true",
        paths=rules,
    )
    assert answer["said"].count("Read-only file system") == 4
    assert "Invalid cross-device link" in answer["said"]
    assert (given / "file").read_text() == "x"


def test_the_network_is_its_own_under_none_only(box: Box) -> None:
    script = "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ' | tr '\\n' ' '"
    assert box.run(script)["said"] == "lo "
    host = {line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]}
    shared = box.run(script, network=NetworkPolicy(level=Network.FULL, udp=True))
    assert set(shared["said"].split()) == host


def test_devices_are_the_harmless_ones(box: Box) -> None:
    answer = box.run(
        "ls /dev | tr '\\n' ' '; head -c 3 /dev/zero | wc -c; echo x > /dev/null && echo ok; ls /dev/pts"
    )
    assert answer["said"].splitlines() == [
        "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero 3",
        "ok",
        "ptmx",
    ]


@pytest.mark.parametrize("memory_bytes", [None, 4 * 1024 * 1024])
def test_shared_memory_is_its_own_and_as_large_as_its_memory(box: Box, memory_bytes: int | None) -> None:
    script = (
        "stat -c %a /dev/shm; ls -A /dev/shm; head -c 5000000 /dev/zero > /dev/shm/x; stat -c %s /dev/shm/x"
    )
    mode, *said = box.run(script, limits=Limits(memory_bytes=memory_bytes))["said"].splitlines()
    assert mode == "1777"
    assert said[-1] == ("5000000" if memory_bytes is None else str(memory_bytes))
    assert not Path("/dev/shm/x").exists()
