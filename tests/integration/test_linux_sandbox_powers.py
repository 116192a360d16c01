"""What the Linux kernel refuses to a confined program: other processes, privileges, limits.

Each attempt is proved alive: without the plan it succeeds.
"""

import errno
import os

import pytest

from tests.integration.sandbox_help import FULL, Place, attempt, make_helper, make_place, needs_sandbox
from worker.platform.base import Limits

__all__ = ["make_helper", "make_place"]

pytestmark = needs_sandbox

# name: (code, errno of the refusal)
POWERS: dict[str, tuple[str, int]] = {
    "signal the parent": ("os.kill(os.getppid(), 0)", errno.EPERM),
    "signal the parent by a pidfd": ("signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)", errno.EPERM),
    "set the parent's limits": (
        "resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0))", errno.EPERM),
    "read the parent's memory": ("call((310, 270), os.getppid(), None, 0, None, 0, 0)", errno.EPERM),
    "trace a child": (
        "child = os.fork()\n"
        "if child == 0: signal.pause()\n"
        "try: call((101, 117), 16, child, 0, 0)\n"
        "finally: os.kill(child, 9); os.waitpid(child, 0)", errno.EPERM),
    "make a keyring": ("call((250, 219), 1, None)", errno.EPERM),
    "ask for memory of System V": ("call((29, 194), 0, 4096, 0o1600)", errno.EPERM),
    "make a set-user-ID file": ("os.chmod(rootfs + '/file', 0o4755)", errno.EPERM),
    "open a set-user-ID file": ("os.open(rootfs + '/new', os.O_CREAT | os.O_WRONLY, 0o4755)", errno.EPERM),
    "a time beyond the filter": ("call((435, 435), None, 0)", errno.ENOSYS),
    "io_uring": ("call((425, 425), 1, ctypes.create_string_buffer(120))", errno.ENOSYS),
    "openat2": ("call((437, 437), -100, b'/usr\\0', struct.pack('QQQ', 0, 0, 0), 24)", errno.ENOSYS),
    "a user namespace": ("call((272, 97), 0x10000000)", errno.EPERM),
    "switch address randomisation off": ("call((135, 92), 0x0040000)", errno.EPERM),
}  # fmt: skip
# Refused for their arguments by any kernel, so that success cannot be the control.
NEVER_ALIVE = {"a time beyond the filter": errno.EINVAL}


@pytest.mark.parametrize("what", POWERS)
def test_powers(place: Place, what: str) -> None:
    code, refusal = POWERS[what]
    free = attempt(place, code, None)
    if what != "signal the parent" and free.errno in (errno.ENOSYS, errno.EPERM, errno.ENOSPC):
        pytest.skip(f"this kernel refuses it to everybody: {free.error}")
    assert free.errno == NEVER_ALIVE.get(what, 0), free
    refused = attempt(place, code, place.policy(network=FULL))
    assert refused.errno == refusal, refused


def test_no_capability_no_group_no_new_privileges(place: Place) -> None:
    code = "say(open('/proc/self/status').read())"
    status = dict(
        line.split(":\t", 1)
        for line in attempt(place, code, place.policy()).said.splitlines()
        if ":\t" in line
    )
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[name], 16) == 0, name
    if place.root:
        assert int(status["CapBnd"], 16) == 0
    assert status["Groups"].split() == []
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"


def test_root_cannot_get_its_capabilities_back_by_exec(place: Place) -> None:
    said = attempt(place, "", place.policy(), argv=["/bin/cat", "/proc/self/status"]).said
    capabilities = [line.split()[1] for line in said.splitlines() if line.startswith("Cap")]
    assert capabilities[:3] == ["0" * 16] * 3, said


@pytest.mark.skipif(os.geteuid() != 0, reason="settling matters for root only")
def test_a_launcher_that_has_settled_keeps_its_own_powers_and_hands_down_none(place: Place) -> None:
    if place.uid is not None:
        pytest.skip("settling matters for root only")
    setup = "enforce.settle(); os.chown(rootfs + '/file', 1, 1)"
    done = attempt(place, "say(open('/proc/self/status').read())", place.policy(), setup=setup)
    assert done.errno == 0, done
    assert [int(line.split()[1], 16) for line in done.said.splitlines() if line.startswith("Cap")] == [0] * 5


def test_limits(place: Place) -> None:
    code = (
        "for name in 'NOFILE', 'CORE', 'CPU', 'STACK':\n"
        "    say(*resource.getrlimit(getattr(resource, 'RLIMIT_' + name)))"
    )
    limits = Limits(max_files=123, cpu_time_limit_s=9, ulimits={"stack": (1 << 20, 1 << 21)})
    said = attempt(place, code, place.policy(limits=limits)).said
    assert said == "123 123\n0 0\n9 10\n1048576 2097152\n"


def test_more_files_than_this_user_may_have_are_as_many_as_it_may(place: Place) -> None:
    code = "say(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    setup = "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))"
    said = attempt(place, code, place.policy(limits=Limits(max_files=300)), setup=setup).said
    free = attempt(place, "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))", None, setup=setup)
    assert said == ("300 300\n" if free.errno == 0 else "200 200\n")


def test_a_limit_that_cannot_be_had_is_named(place: Place) -> None:
    policy = place.policy(limits=Limits(ulimits={"nofile": (1 << 40, 1 << 40)}))
    refused = attempt(place, "", policy)
    assert refused.error is not None
    assert "EnforceError: rlimits: nofile" in refused.error


def test_sandboxes_do_not_reach_each_other(place: Place) -> None:
    """Two containers of one user, one plan each: no signal from one to the other."""
    setup = (
        f"plan = {place.driver().plan(place.policy())!r}\n"
        "other = os.fork()\n"
        "if other == 0:\n"
        "    call((157, 167), 1, 9, 0, 0, 0)\n"  # prctl: die with the parent
        "    os.closerange(3, 64); enforce.apply(plan); signal.pause()\n"
        "while 'Seccomp:\\t2' not in open(f'/proc/{other}/status').read(): pass\n"
    )
    refused = attempt(place, "os.kill(other, 0)", place.policy(), setup=setup)
    assert refused.errno == errno.EPERM, refused
    free = attempt(place, "os.kill(other, 9)", None, setup=setup)
    assert free.errno == 0, free
