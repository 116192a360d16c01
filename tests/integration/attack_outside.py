"""What is outside of the sandboxes in the machine of the attacks: the things that attempts are made on.

`Outside` lays them out anew before each run of the attack program, and afterwards tells what has changed of them, by
the names of the attempts. Who judges is `attack_table`: nothing here knows what should happen.
"""

import contextlib
import ctypes
import os
import secrets
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.integration import attack_machine
from tests.integration.attack_listeners import ABSTRACT, Listeners
from tests.integration.attack_machine import PLACE, make_fixed

ROOT = Path(__file__).parents[2]
TOP = Path(PLACE)
OUTSIDE, READABLE, DATA, TMP = TOP / "outside", TOP / "readable", TOP / "data", TOP / "tmp"
PROGRAM, SET_USER_ID = TOP / "attack", Path(attack_machine.SET_USER_ID)
OF_GROUP = Path(attack_machine.OF_GROUP)
CGROUP = Path("/sys/fs/cgroup")
LAUNCHER_FILE = ROOT / "worker" / "launcher" / "program.py"
PRELOAD = Path("/etc/ld.so.preload")
PLANTED = Path("/usr/local/bin/sandfleet-attack-planted")
PASSWORDS = Path("/etc/shadow")
TEMPORARY = Path("/tmp/sandfleet-attack-canary")
DOMAIN, FORWARDING = Path("/proc/sys/kernel/domainname"), Path("/proc/sys/net/ipv4/ip_forward")
KEY = 0x5AF1

_KEPT = ("write_outside", "empty_outside", "empty_while_opening", "delete_outside", "rename_outside")
_METADATA = ("change_mode", "change_owner", "change_times", "change_attribute", "read_attribute")
_READ = ("read_file", "read_by_hard_link", "read_after_rename", "lock_file", "see_file")
_MADE = ("create_outside", "make_folder", "make_link", "make_fifo", "rename_out", "hard_link_out")
_READABLE = ("write", "empty", "delete", "mode", "lease")
_ARRIVES_S = 2.0
_PAUSE_S = 0.02

_libc = ctypes.CDLL(None, use_errno=True)
_NAME_TO_HANDLE_AT = {"x86_64": 303, "aarch64": 264}


class Outside:
    """All of it, for one user. `token` is what every secret contains."""

    def __init__(self) -> None:
        self.token = attack_machine.secret_of(Path(attack_machine.SIGN_FILE).read_text())
        self.size = secrets.randbelow(50_000) + 1_000
        self.listeners = Listeners(OUTSIDE)
        self.victim: Victim | None = None
        self._root = os.geteuid() == 0
        self._cpus = len(os.sched_getaffinity(0))
        self._launcher_size = LAUNCHER_FILE.stat().st_size

    # -- before a run

    def lay_out(self) -> None:
        """Everything as at the beginning."""
        for folder in (OUTSIDE, READABLE):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            folder.chmod(0o755)
        os.chdir(OUTSIDE)
        for name in (*_KEPT, *_METADATA, *_READ):
            (OUTSIDE / name).write_text(self.token)
        (OUTSIDE / "see_file").write_text("x" * self.size)
        with contextlib.suppress(OSError):
            os.setxattr(OUTSIDE / "read_attribute", "user.secret", self.token.encode())
        (OUTSIDE / "folder").mkdir()
        (OUTSIDE / "folder" / self.token).touch()
        (OUTSIDE / "delete_folder").mkdir()
        for name in _READABLE:
            (READABLE / name).write_text("given")
        for folder in (OUTSIDE, READABLE):
            shutil.copy(PROGRAM, folder / "program")
        self._lay_out_system()
        self.listeners.open()
        if self.victim is not None:
            self.victim.end()
        self.victim = Victim(self.token)

    def _lay_out_system(self) -> None:
        with contextlib.suppress(OSError):
            TEMPORARY.write_text(self.token)
        for path in (PRELOAD, PLANTED):
            with contextlib.suppress(OSError):
                path.unlink()
        if not self._root:
            return
        PASSWORDS.write_text(self.token)
        PASSWORDS.chmod(0o600)
        os.truncate(LAUNCHER_FILE, self._launcher_size)
        socket.sethostname("machine")
        DOMAIN.write_text("machine")
        FORWARDING.write_text("0")
        fixed = [line.split() for line in Path("/proc/mounts").read_text().splitlines() if "/fixed " in line]
        if not fixed or not fixed[0][3].startswith("ro"):
            make_fixed()
        if self._groups:
            (CGROUP / "other").mkdir(exist_ok=True)

    @property
    def _groups(self) -> bool:
        return self._root and (CGROUP / "cgroup.procs").exists()

    def parameters(self) -> dict[str, Any]:
        """What the attack program is told, whoever runs it."""
        assert self.victim is not None
        found: dict[str, Any] = {
            "sign": "given",
            "outside": OUTSIDE,
            "readable": READABLE,
            "data": DATA,
            "victim": self.victim.facts["pid"],
            "secret_at": self.victim.facts["secret_at"],
            "value_at": self.victim.facts["value_at"],
            "secret_fd": self.victim.facts["secret_fd"],
            "key": KEY,
            "worker": os.getpid(),
            "abstract": ABSTRACT,
            "terminal": os.ttyname(self.listeners.terminals[1][1]),
            "launcher_file": LAUNCHER_FILE,
            "handle": _handle(OUTSIDE / "read_file"),
            "loader": _loader(),
            **self.listeners.ports,
        }
        if int(self.victim.facts["serial"]) > 0:
            found["serial"] = self.victim.facts["serial"]
        if SET_USER_ID.exists():
            found["set_user_id"] = SET_USER_ID
        if (OF_GROUP / "file").exists():
            found["of_group"] = OF_GROUP
        if self._groups:
            found["cgroup"] = CGROUP / "other"
        return found

    # -- after a run

    def effects(self, sent: set[str], rootfs: Path, state: Path) -> set[str]:
        """The attempts that have changed something out here. `sent` are those that believe to have sent a message."""
        found = {name for name in _MADE if os.path.lexists(OUTSIDE / name)}
        found |= self._of_files() | self._of_the_system() | self._of_the_victim()
        deadline = time.monotonic() + _ARRIVES_S
        while not sent & self.listeners.names <= self.listeners.heard and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
        found |= self.listeners.heard
        for name, path in (
            ("write_own_record", state / "planted"),
            ("move_own_root", Path(f"{rootfs}.moved")),
        ):
            if path.exists():
                found.add(name)
        planted = DATA / "containers" / "neighbour-0" / "rootfs" / "planted"
        if planted.exists():
            planted.unlink()
            found.add("write_neighbours_file")
        return found

    def _of_files(self) -> set[str]:
        found = {name for name in _KEPT if not _holds(OUTSIDE / name, self.token)}
        if not (OUTSIDE / "delete_folder").exists():
            found.add("delete_folder")
        if os.path.lexists(OUTSIDE / "planted.sock"):
            found.add("make_socket")
        for name in ("write", "empty", "delete"):
            if not _holds(READABLE / name, "given"):
                found.add(f"{name}_readable")
        if (READABLE / "mode").stat().st_mode & 0o777 == 0o777:
            found.add("change_mode_of_readable")
        if (OUTSIDE / "change_mode").stat().st_mode & 0o777 == 0o777:
            found.add("change_mode")
        if (OUTSIDE / "change_owner").stat().st_uid == 4242:
            found.add("change_owner")
        if (OUTSIDE / "change_times").stat().st_mtime == 1000:
            found.add("change_times")
        with contextlib.suppress(OSError):
            if "user.attack" in os.listxattr(OUTSIDE / "change_attribute"):
                found.add("change_attribute")
        return found

    def _of_the_system(self) -> set[str]:
        found = set()
        for name, is_there in (
            ("plant_preload", PRELOAD.exists()),
            ("plant_program", PLANTED.exists()),
            ("rewrite_launcher", LAUNCHER_FILE.stat().st_size != self._launcher_size),
            ("set_domain_by_file", DOMAIN.read_text() == "attack-file\n"),
            ("rename_host", socket.gethostname() == "attack-call"),
            ("set_forwarding", FORWARDING.read_text() == "1\n"),
            ("make_group", (CGROUP / "other" / "attack").exists()),
        ):
            if is_there:
                found.add(name)
        if self._groups:
            assert self.victim is not None
            line = Path(f"/proc/{self.victim.facts['pid']}/cgroup").read_text()
            if "0::/other" in line:
                found.add("join_group")
                (CGROUP / "cgroup.procs").write_text(self.victim.facts["pid"])
            with contextlib.suppress(FileNotFoundError):
                (CGROUP / "other" / "attack").rmdir()
        return found

    def _of_the_victim(self) -> set[str]:
        assert self.victim is not None
        seen = self.victim.report()
        signals = int(seen["signals"])
        names = ("everybody", "by_kill", "a_thread", "by_queue", "by_descriptor", "a_group", "as_owner")
        found = {f"signal_{name}" for bit, name in enumerate(names) if signals & 1 << bit}
        for name, field, value in (
            ("write_memory", "value", "4711"),
            ("set_limits", "limit", "77"),
            ("slow_down_everybody", "nice", str(int(self.victim.facts["nice"]) + 2)),
            ("set_scheduler", "scheduler", "3"),
            ("set_disk_priority_of_user", "disk", str(3 << 13 | 5)),
            ("offer_to_oom", "oom", "901"),
            ("move_semaphore", "semaphore", "5"),
        ):
            if seen[field] == value:
                found.add(name)
        if int(seen["cpus"]) < self._cpus:
            found.add("set_affinity")
        return found

    def close(self) -> None:
        if self.victim is not None:
            self.victim.end()
        self.listeners.close()


class Victim:
    """A process of the attack program, in mode `victim`."""

    def __init__(self, token: str) -> None:
        self._process = subprocess.Popen(
            [PROGRAM, "victim", f"secret={token}", f"key={KEY}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"VICTIMS_SECRET": token},
        )
        self.facts = self._read()

    def _read(self) -> dict[str, str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the victim is gone"
        return dict(word.split("=", 1) for word in line.split())

    def report(self) -> dict[str, str]:
        assert self._process.stdin is not None
        self._process.stdin.write("?\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def _holds(path: Path, content: str) -> bool:
    try:
        return path.read_text() == content
    except OSError:
        return False


def _handle(path: Path) -> str:
    """`type:bytes` of name_to_handle_at(2); empty where the file system has none."""
    raw = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0) + bytes(128), 136)
    mount = ctypes.c_int()
    number = _NAME_TO_HANDLE_AT[os.uname().machine]
    if _libc.syscall(number, -100, os.fsencode(path), raw, ctypes.byref(mount), 0) < 0:
        return ""
    length, kind = struct.unpack_from("=Ii", raw.raw)
    return f"{kind}:{raw.raw[8 : 8 + length].hex()}"


def _loader() -> str:
    for name in ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"):
        if os.path.exists(name):
            return os.path.realpath(name)
    return ""
