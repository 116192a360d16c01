"""Both platforms' profiles can be had on either: here under a Python that has only what macOS gives it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What the standard library has on Linux and not on macOS (its documentation's "Availability", Python 3.11).
ABSENT = {
    "os": """
        O_PATH O_TMPFILE O_DIRECT O_NOATIME O_LARGEFILE O_RSYNC pidfd_open memfd_create eventfd eventfd_read
        eventfd_write pipe2 setresuid setresgid getresuid getresgid sched_getaffinity sched_setaffinity
        sched_getscheduler sched_setscheduler sched_param posix_fadvise posix_fallocate copy_file_range splice
        getrandom listxattr getxattr setxattr removexattr fdatasync unshare setns
    """,
    "signal": "pidfd_send_signal SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT SIGPOLL SIGCLD sigwaitinfo sigtimedwait",
    "select": "epoll EPOLLIN EPOLLOUT EPOLLERR EPOLLHUP EPOLLET",
    "socket": "SO_PEERCRED SO_PASSCRED AF_NETLINK AF_PACKET AF_VSOCK SOCK_CLOEXEC SOCK_NONBLOCK MSG_CMSG_CLOEXEC",
    "resource": "prlimit RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_RTPRIO RLIMIT_RTTIME RLIMIT_SIGPENDING RLIMIT_OFILE",
    "fcntl": "F_SETPIPE_SZ F_GETPIPE_SZ F_ADD_SEALS F_GET_SEALS F_SEAL_WRITE F_NOTIFY F_SETLEASE F_OFD_SETLK",
    "errno": "EREMOTEIO EBADFD EUNATCH",
    "mmap": "MAP_POPULATE",
}  # fmt: skip
# Functions of glibc that libSystem has not.
NO_SYMBOL = "prctl gettid unshare setns close_range mount umount2 pivot_root capset capget memfd_create"

PROGRAM = """
import ctypes, importlib, json, os, platform, sys
absent, missing = json.loads(sys.argv[1]), set(sys.argv[2].split())
for module, names in absent.items():
    found = importlib.import_module(module)
    for name in names.split():
        if hasattr(found, name):
            delattr(found, name)

def of_macos(real):
    class Library(real):
        def __getattr__(self, name):
            if name in missing:
                raise AttributeError(f"dlsym: symbol {name} not found")
            return super().__getattr__(name)
    return Library

ctypes.CDLL, ctypes.PyDLL = of_macos(ctypes.CDLL), of_macos(ctypes.PyDLL)
platform.machine = lambda: "arm64"
from schemas.spec import decode_spec
from worker.answers import sandbox_of
from worker.profiles import Place, canonical_on, make
from worker.questions import parse_question

said = {}
for name in ("darwin", "linux"):
    spec = decode_spec({"image": {"name": "a:1"}, "sandbox": {"read": ["/opt/data"]}})
    made = make(spec, Place(platform=name))
    ask = sandbox_of(made.profile).ask
    questions = [("read", "/opt/data/x"), ("write", "/opt/data/x"), ("connect", "10.0.0.1:443"), ("gpu", None)]
    said[name] = [ask(parse_question(*one, canonical_on(name))).decision for one in questions]
print(json.dumps(said))
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac is the real thing")
def test_a_linux_profile_on_a_mac() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(ABSENT), NO_SYMBOL],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    decided = ["allow", "deny", "allow", "deny"]
    assert json.loads(done.stdout) == {"darwin": decided, "linux": decided}
