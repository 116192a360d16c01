"""What the Linux kernel refuses to a confined program: files and programs.

Each attempt is proved alive: without the plan it succeeds.
"""

import errno
import os
import shutil

import pytest

from tests.integration.sandbox_help import Place, attempt, make_helper, make_place, needs_sandbox
from worker.platform.base import PathRule
from worker.platform.linux.driver import LinuxDriver

__all__ = ["make_helper", "make_place"]

pytestmark = needs_sandbox

# name: (code, errno of the refusal)
FILES: dict[str, tuple[str, int]] = {
    "read a file outside": ("open(outside + '/file').read()", errno.EACCES),
    "read it through a link": ("open(rootfs + '/link').read()", errno.EACCES),
    "read it through ..": ("open(rootfs + '/../outside/file').read()", errno.EACCES),
    "read it through /proc/self/root": ("open('/proc/self/root' + outside + '/file').read()", errno.EACCES),
    "list a folder outside": ("os.listdir(outside)", errno.EACCES),
    "list the folder above": ("os.listdir(top)", errno.EACCES),
    "create a file outside": ("open(outside + '/new', 'w')", errno.EACCES),
    "append to a file outside": ("open(outside + '/file', 'a')", errno.EACCES),
    "empty a file outside": ("os.truncate(outside + '/file', 0)", errno.EACCES),
    "delete a file outside": ("os.unlink(outside + '/file')", errno.EACCES),
    "delete a folder outside": ("os.rmdir(outside + '/folder')", errno.EACCES),
    "make a folder outside": ("os.mkdir(outside + '/new')", errno.EACCES),
    "make a link outside": ("os.symlink('/x', outside + '/new')", errno.EACCES),
    "make a fifo outside": ("os.mkfifo(outside + '/new')", errno.EACCES),
    "rename outside": ("os.rename(outside + '/file', outside + '/new')", errno.EACCES),
    "rename a file in": ("os.rename(outside + '/file', rootfs + '/new')", errno.EACCES),
    "rename a file out": ("os.rename(rootfs + '/file', outside + '/new')", errno.EACCES),
    "rename a folder out": ("os.rename(rootfs + '/folder', outside + '/new')", errno.EACCES),
    "hard link a file in": ("os.link(outside + '/file', rootfs + '/new')", errno.EXDEV),
    "hard link a file out": ("os.link(rootfs + '/file', outside + '/new')", errno.EACCES),
    "write a file that is granted to read": ("open(readable + '/file', 'r+')", errno.EACCES),
    "empty a file that is granted to read": ("os.truncate(readable + '/file', 0)", errno.EACCES),
    "empty it while opening it": ("os.open(readable + '/file', os.O_RDONLY | os.O_TRUNC)", errno.EACCES),
    "create a file where reading is granted": ("open(readable + '/new', 'w')", errno.EACCES),
    "delete a file that is granted to read": ("os.unlink(readable + '/file')", errno.EACCES),
    "link a readable file to make it writable": ("os.link(readable + '/file', rootfs + '/new')", errno.EXDEV),
    "open a device": ("os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY)", errno.EACCES),
    "list all processes": ("os.listdir('/proc')", errno.EACCES),
    "read the parent's command line": ("open(f'/proc/{os.getppid()}/cmdline').read()", errno.EACCES),
    "read the parent's environment": ("open(f'/proc/{os.getppid()}/environ').read()", errno.EACCES),
    "list the parent's descriptors": ("os.listdir(f'/proc/{os.getppid()}/fd')", errno.EACCES),
    "follow the parent's working directory": ("os.readlink(f'/proc/{os.getppid()}/cwd')", errno.EACCES),
    "list temporary files of others": ("os.listdir('/tmp')", errno.EACCES),
    "use shared memory of the user": ("os.close(os.open('/dev/shm', os.O_RDONLY))", errno.EACCES),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_files(place: Place, what: str) -> None:
    code, refusal = FILES[what]
    refused = attempt(place, code, place.policy())
    assert refused.errno == refusal, refused
    for name in ("file", "folder"):
        assert (place.outside / name).exists()
    assert (place.outside / "file").read_text() == (place.readable / "file").read_text() == "the secret"
    assert {p.name for p in place.outside.iterdir()} == {"file", "folder"}
    free = attempt(place, code, None)
    assert free.errno == 0, free


def test_a_program_may_do_what_is_granted(place: Place) -> None:
    code = (
        "open(rootfs + '/new', 'w').write('x'); os.rename(rootfs + '/new', tmp + '/moved')\n"
        "os.link(tmp + '/moved', rootfs + '/linked'); os.unlink(tmp + '/moved'); os.mkdir(tmp + '/d')\n"
        "os.symlink('linked', rootfs + '/soft'); os.mkfifo(tmp + '/fifo'); os.truncate(rootfs + '/soft', 0)\n"
        "os.chmod(rootfs + '/linked', 0o600); open('/dev/null', 'w').write('x'); open('/etc/passwd').read()\n"
        "assert open(readable + '/file').read() == 'the secret'\n"
        "assert b'Name:' in open('/proc/self/status', 'rb').read()\n"
        "assert open('/proc/meminfo').read() and open('/proc/sys/kernel/osrelease').read()\n"
        "ends = socket.socketpair(); ends[0].send(b'x'); assert ends[1].recv(1) == b'x'\n"
        "child = os.fork()\n"
        "if child == 0: signal.pause()\n"
        "os.kill(child, 9); os.waitpid(child, 0)\n"
    )
    done = attempt(place, code, place.policy())
    assert done.errno == 0, done


def test_programs_of_the_host_run(place: Place) -> None:
    said = attempt(
        place, "", place.policy(), argv=["/bin/sh", "-c", "ls -d /usr && cat /proc/self/comm < /dev/null"]
    )
    assert said.said.splitlines()[0] == "/usr", said


def test_a_child_cannot_read_its_own_entry_in_proc(place: Place) -> None:
    """What `system` says of /proc: the program may, its children may not."""
    code = (
        "if os.fork() == 0:\n"
        "    try: open('/proc/self/status'); os._exit(0)\n"
        "    except OSError: os._exit(7)\n"
        "say(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    assert attempt(place, code, place.policy()).said == "7\n"
    assert attempt(place, code, place.policy(groups=("proc",))).said == "0\n"


def test_execution_is_a_right_of_its_own(place: Place) -> None:
    for folder in (place.readable, place.rootfs, place.outside):
        shutil.copy("/bin/true", folder / "program")
        os.chmod(folder / "program", 0o755)
    code = (
        "if os.fork() == 0:\n"
        "    try: os.execv({where} + '/program', ['true'])\n"
        "    except OSError as e: os._exit(e.errno)\n"
        "say(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    for where, expected in (("readable", errno.EACCES), ("outside", errno.EACCES), ("rootfs", 0)):
        assert attempt(place, code.format(where=where), place.policy()).said == f"{expected}\n", where
        assert attempt(place, code.format(where=where), None).said == "0\n"


def test_a_path_that_became_a_link_is_not_followed(place: Place) -> None:
    policy = place.policy(paths=(PathRule(str(place.rootfs / "folder"), "rwx", "sandbox.write"),))
    setup = (
        "os.rmdir(rootfs + '/folder'); os.symlink(outside, rootfs + '/folder')\n"
        "try: enforce.prepare(plan)\n"
        "except enforce.EnforceError as e: assert (e.step, e.errno) == ('landlock', 40), e\n"
        "else: raise AssertionError('the link was followed')"
    )
    plan = place.driver().plan(policy)
    done = attempt(place, "", None, setup=f"plan = {plan!r}\n" + setup)
    assert done.errno == 0, done


@pytest.mark.parametrize(("abi", "has_filter"), [(0, False), (0, True), (3, False), (5, True)])
def test_a_plan_for_a_kernel_that_has_less_still_runs(place: Place, abi: int, has_filter: bool) -> None:
    driver = LinuxDriver(abi=abi, filter=has_filter, root=place.root)
    done = attempt(place, "open(rootfs + '/file').read()", place.policy(), driver=driver)
    assert done.errno == 0, done
    seen = attempt(place, "open(outside + '/file').read()", place.policy(), driver=driver)
    assert seen.errno == (errno.EACCES if abi else 0), seen


AHEAD = "enforce.settle(); enforce.ahead(); assert enforce._ahead and '/proc/meminfo' in enforce._held\n"


def test_a_ruleset_made_ahead_is_as_tight(place: Place) -> None:
    system = dict(place.driver().plan(place.policy())["steps"])["landlock"]["system"]
    check = f"assert enforce._take_ahead({tuple(map(tuple, system))!r}) is not None\n"
    used = attempt(place, "", None, setup=AHEAD + check)
    assert used.errno == 0, used.error
    for what in ("read a file outside", "rename a file out", "list all processes", "open a device"):
        code, refusal = FILES[what]
        assert attempt(place, code, place.policy(), setup=AHEAD).errno == refusal, what
    allowed = "open(rootfs + '/new', 'w').write('x'); open('/proc/self/status').read(); os.listdir('/usr')"
    assert attempt(place, allowed, place.policy(), setup=AHEAD).errno == 0


def test_a_ruleset_made_ahead_for_other_paths_is_not_used(place: Place) -> None:
    other = (
        "os.chmod(top, 0o755); enforce.settle()\n"
        "enforce.system._known.clear()\n"
        "enforce.system.SYSTEM += (enforce.system.SystemPath(top, 'r', ''),)\n"
        "enforce.ahead()\n"
        "assert (top, 'r') in enforce._paths(enforce._ahead.system)\n"
    )
    assert attempt(place, "open(outside + '/file')", place.policy(), setup=other).errno == errno.EACCES


def test_a_ruleset_made_ahead_is_not_for_forks(place: Place) -> None:
    """Or two containers would share it, and each be let into the other's folders."""
    code = "assert enforce._take_ahead(enforce._paths(enforce._ahead.system)) is None"
    done = attempt(place, code, None, setup=AHEAD)
    assert done.errno == 0, done.error


def test_a_ruleset_made_ahead_of_a_change_is_not_used(place: Place) -> None:
    """A file of /etc that was replaced since is another: the old rule would not let it be read."""
    setup = (
        AHEAD + "found = enforce._ahead.system\n"
        "enforce._ahead = enforce._ahead._replace(system=found._replace(stamps=(0,) * len(found.stamps)))\n"
        "assert enforce._take_ahead(enforce._paths(found)) is None and enforce._ahead is None"
    )
    done = attempt(place, "open('/etc/passwd').read()", place.policy(), setup=setup)
    assert done.errno == 0, done.error
