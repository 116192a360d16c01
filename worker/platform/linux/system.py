"""What any program of a Linux host needs of it, as data. Standard library only.

Nothing here is writable but the harmless devices. What is left out, and why:

- the folders of /etc as a whole: it holds password hashes, keys and the configuration of services;
- /tmp, /var/tmp, /run, /home, /root: a container has its own TMPDIR and HOME;
- /dev/shm: shared by every process of the user; group `shm`;
- /dev/pts: other people's terminals are there; group `pty`;
- /proc as a whole: it tells the command lines of all processes of the host; group `proc`. A program may
  read its own entry (not its children theirs) and files that describe the machine.
"""

import glob
import os
import stat
import time
from collections.abc import Iterable
from typing import NamedTuple

_UNCHANGING = ("/proc/", "/sys/", "/dev/")

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class SystemPath(NamedTuple):
    """`access` is letters of `landlock.LETTERS`."""

    path: str
    access: str
    reason: str


PROGRAMS = (
    SystemPath("/usr", "rx", "programs and libraries"),
    SystemPath("/bin", "rx", "programs"),
    SystemPath("/sbin", "rx", "programs"),
    SystemPath("/lib", "rx", "libraries"),
    SystemPath("/lib32", "rx", "libraries"),
    SystemPath("/lib64", "rx", "libraries, the loader"),
    SystemPath("/libx32", "rx", "libraries"),
    SystemPath("/nix/store", "rx", "programs of NixOS"),
    SystemPath("/gnu/store", "rx", "programs of Guix"),
)

# A rule costs each start about 12 µs: what programs do well without is left out.
_LOADER = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.preload")
_NAMES = (
    "/etc/passwd",
    "/etc/group",
    "/etc/nsswitch.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/resolv.conf",
    "/etc/services",
    "/etc/protocols",
)
_TRUST = (
    "/etc/ssl/certs",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/openssl.cnf",
    "/etc/pki/tls/certs",
    "/etc/pki/tls/cert.pem",
    "/etc/pki/tls/openssl.cnf",
    "/etc/pki/ca-trust/extracted",
    "/etc/crypto-policies",
)
_FLAVOUR = (
    "/etc/localtime",
    "/etc/timezone",
    "/etc/locale.conf",
    "/etc/os-release",
    "/etc/lsb-release",
    "/etc/mime.types",
    "/etc/terminfo",
    "/etc/fonts",
)
# Patterns. Programs of these kinds do not start, or not as they should, when their settings are refused.
_SETTINGS = (
    "/etc/gitconfig",
    "/etc/java-*",
    "/etc/perl",
    "/etc/python3*",
    "/etc/profile",
    "/etc/profile.d",
    "/etc/bash.bashrc",
    "/etc/bashrc",
    "/etc/inputrc",
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
# Of /proc/sys not the whole: below net and fs are keys that only root may read, and a container can be
# root.
_MACHINE = (
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/loadavg",
    "/proc/uptime",
    "/proc/version",
    "/proc/filesystems",
    "/proc/sys/kernel",
    "/proc/sys/vm",
    "/proc/sys/net/core/somaxconn",
    "/proc/sys/crypto/fips_enabled",
    "/sys/devices/system/cpu",
    "/sys/devices/system/node",
    "/sys/kernel/mm/transparent_hugepage",
)
SYSTEM = (
    *PROGRAMS,
    *(SystemPath(path, "r", "where libraries are") for path in _LOADER),
    *(SystemPath(path, "r", "names of users, hosts and services") for path in _NAMES),
    *(SystemPath(path, "r", "whom TLS trusts") for path in _TRUST),
    *(SystemPath(path, "r", "time zone, language, kind of system") for path in _FLAVOUR),
    *(SystemPath(path, "r", "settings of common programs") for path in _SETTINGS),
    *(SystemPath(path, "rw", "harmless devices") for path in _DEVICES),
    SystemPath("/dev/tty", "rwi", "the program's own terminal, if it has one"),
    *(SystemPath(path, "r", "the machine, not its processes") for path in _MACHINE),
)

_GROUP_PATHS = {
    "proc": (SystemPath("/proc", "r", "group proc"),),
    "shm": (SystemPath("/dev/shm", "rw", "group shm"),),
    "pty": (SystemPath("/dev/ptmx", "rwi", "group pty"), SystemPath("/dev/pts", "rwi", "group pty")),
    "cgroup": (SystemPath("/sys/fs/cgroup", "r", "group cgroup"),),
}


class System(NamedTuple):
    """The rules for this host, and when the folders that they were found in last changed."""

    rules: tuple[SystemPath, ...]
    folders: tuple[str, ...]
    stamps: tuple[int, ...]

    def stale(self) -> bool:
        """Whether files may have come, gone or been replaced since."""
        return self.stamps != _stamps(self.folders)


_ONE_START_S = 0.005
_asked: tuple[float, System | None, bool] = (0.0, None, False)


def stale_at_start(found: System) -> bool:
    """`found.stale()`, asked for mounts and for rules: of one start it is one look."""
    global _asked
    now = time.monotonic()
    looked, known, answer = _asked
    if known is not found or now - looked > _ONE_START_S:
        answer = found.stale()
        _asked = now, found, answer
    return answer


# How long a look is good for: in a burst of starts, each would ask forty folders for their times.
_GOOD_FOR_S = 0.25

_known: dict[tuple[str, ...], tuple[float, System]] = {}


def system(groups: Iterable[str] = ()) -> System:
    """Canonical paths that exist, without those that another already covers.

    `groups` are names of `groups.GROUPS`. Looked up anew only when a folder has changed.
    """
    wanted = tuple(sorted(set(groups) & _GROUP_PATHS.keys()))
    now = time.monotonic()
    looked, known = _known.get(wanted, (0.0, None))
    if known is not None and now - looked < _GOOD_FOR_S:
        return known
    if known is None or known.stale():
        known = _look((*SYSTEM, *(path for group in wanted for path in _GROUP_PATHS[group])))
    _known[wanted] = now, known
    return known


def listed(groups: Iterable[str] = ()) -> tuple[SystemPath, ...]:
    """The same as they stand above, patterns included: for a host that is not this one."""
    return (
        *SYSTEM,
        *(path for group in sorted(set(groups) & _GROUP_PATHS.keys()) for path in _GROUP_PATHS[group]),
    )


def links() -> dict[str, str]:
    """Those of the paths above that are links on this host, and where they lead (`/bin` to `/usr/bin`)."""
    real = ((rule.path, os.path.realpath(rule.path)) for rule in SYSTEM if not glob.has_magic(rule.path))
    return {path: target for path, target in real if target != path}


def _look(wanted: Iterable[SystemPath]) -> System:
    found: dict[str, SystemPath] = {}
    folders = set()
    for rule in wanted:
        folders.add(os.path.dirname(rule.path))
        for path in glob.glob(rule.path):
            canonical = os.path.realpath(path)
            if not _public(canonical):
                continue
            folders.add(os.path.dirname(canonical))
            before = found.get(canonical)
            access = rule.access if before is None else _union(before.access, rule.access)
            found[canonical] = SystemPath(canonical, access, rule.reason)
    # Those of /proc, /sys and /dev keep their files, but their times change.
    watched = tuple(sorted(folder for folder in folders if not f"{folder}/".startswith(_UNCHANGING)))
    stamps = _stamps(watched)
    rules = tuple(rule for rule in found.values() if not _covered(rule, found))
    return System(rules, watched, stamps)


def _stamps(folders: Iterable[str]) -> tuple[int, ...]:
    return tuple(_changed(folder) for folder in folders)


def _changed(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0


def _public(path: str) -> bool:
    """Whether everybody on the host may read it. Where the worker is root, it could hand out what only root
    may.
    """
    try:
        return bool(os.stat(path).st_mode & stat.S_IROTH)
    except OSError:
        return False  # a link to nowhere


def _covered(rule: SystemPath, found: dict[str, SystemPath]) -> bool:
    folder = os.path.dirname(rule.path)
    while folder != "/":
        above = found.get(folder)
        if above is not None and set(rule.access) <= set(above.access):
            return True
        folder = os.path.dirname(folder)
    return False


def _union(one: str, other: str) -> str:
    return "".join(letter for letter in "rwxsi" if letter in one or letter in other)
