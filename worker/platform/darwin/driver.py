"""The macOS driver: what Seatbelt can enforce, and the plan that enforces a policy."""

import ctypes
import functools
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from schemas.node import Capabilities, Feature, NotEnforced
from schemas.status import Gpu, Network
from worker.errors import Unavailable
from worker.platform.base import CloneReport, Profile, RuleGroup, SandboxPolicy

from .clone import DarwinCloner
from .enforce import PLAN_VERSION, declare
from .groups import EXECUTABLE, GROUPS
from .proc import DarwinProcessTable, LibProc
from .sbpl import Sbpl, build_profile
from .seatbelt import Seatbelt, load_libsystem

OLDEST_RELEASE = 12

_OPEN_TO_THE_NETWORK = (
    "a port that the program opens can be reached from the network unless it binds 127.0.0.1 or ::1; "
    "Seatbelt cannot tell local addresses apart"
)

_SHARED_GPU = "a GPU is shared whole: neither its memory nor its time can be limited"
_SHARED_IPC = "the group ipc opens the POSIX semaphores and shared memory of all of the user's processes"

# What no setting of a spec changes.
_ALWAYS = {
    Feature.FILE_METADATA: "that the folders above what is granted exist, and their times, can be seen",
    Feature.MEMORY: "measured a few times a second and answered by a kill; macOS limits no process tree",
    Feature.CPU: "macOS has no CPU quota; only the CPU time of each process can be limited",
    Feature.PIDS: "macOS counts the processes of a user, not of a container",
    Feature.VOLUME_SIZE: "volumes are folders, and APFS limits no folder",
}


class DarwinDriver:
    """`library` stands for libSystem and `release` for the machine's macOS (12 … 26).

    Both are found unless given.
    """

    name = "darwin"

    def __init__(self, library: ctypes.CDLL | None = None, *, release: int | None = None) -> None:
        self._library = load_libsystem() if library is None else library
        self._release = _machine_release() if release is None else release
        declare(self._library)
        self._seatbelt = Seatbelt(self._library)
        self._cloner = DarwinCloner(self._library)
        self._proc = LibProc(self._library)

    @functools.cached_property
    def _confined(self) -> bool:
        """A process in a sandbox cannot give another one to its children."""
        return self._seatbelt.confined(os.getpid())

    def capabilities(self) -> Capabilities:
        return Capabilities(
            sandbox="none" if self._confined else "seatbelt",
            network=[
                level.value for level in (Network.NONE, Network.LOCALHOST, Network.OUTBOUND, Network.FULL)
            ],
            gpu=[level.value for level in (Gpu.NONE, Gpu.METAL_COMPUTE, Gpu.MPS_ONLY)],
            isolation=["process"],
            clone="clonefile or copy",
            limits=["memory", "cpu_time_limit", "max_files", "ulimits"],
            not_enforced=_listed(
                _ALWAYS
                | {
                    Feature.NETWORK_LOCALHOST: _OPEN_TO_THE_NETWORK,
                    Feature.NETWORK_OUTBOUND: _OPEN_TO_THE_NETWORK,
                    Feature.GPU: _SHARED_GPU,
                    Feature.IPC: _SHARED_IPC,
                }
            ),
        )

    def groups(self) -> Mapping[str, RuleGroup]:
        return GROUPS

    def not_enforced(self, policy: SandboxPolicy) -> list[NotEnforced]:
        found = dict(_ALWAYS)
        level = policy.network.level
        if level is Network.LOCALHOST:
            found[Feature.NETWORK_LOCALHOST] = _OPEN_TO_THE_NETWORK
        if level is Network.OUTBOUND and policy.network.bind_ports:
            found[Feature.NETWORK_OUTBOUND] = _OPEN_TO_THE_NETWORK
        if policy.gpu is not Gpu.NONE:
            found[Feature.GPU] = _SHARED_GPU
        if "ipc" in policy.groups:
            found[Feature.IPC] = _SHARED_IPC
        return _listed(found)

    def describe(self, policy: SandboxPolicy) -> Profile:
        profile = self._profile(policy)
        return Profile(
            language="sbpl",
            text=profile.text,
            params=profile.params,
            policy=msgspec.to_builtins(policy),
            not_enforced=self.not_enforced(policy),
        )

    def plan(self, policy: SandboxPolicy) -> dict[str, Any]:
        """See `enforce`. Unavailable in a worker that is itself in a sandbox: nothing would be enforced."""
        if self._confined:
            raise Unavailable("this worker runs in a sandbox of its own and cannot give its containers one")
        profile = self._profile(policy)
        return {
            "version": PLAN_VERSION,
            "platform": self.name,
            "limits": _limits(policy),
            "profile": profile.text,
            "params": [text for pair in profile.params.items() for text in pair],
        }

    def clone_tree(self, src: Path, dst: Path) -> CloneReport:
        return self._cloner.clone_tree(src, dst)

    def processes(self) -> DarwinProcessTable:
        return DarwinProcessTable(self._proc)

    def allocated_bytes(self) -> int | None:
        return None

    def default_path(self) -> str:
        return "/usr/bin:/bin:/usr/sbin:/sbin"

    def search_dirs(self) -> tuple[str, ...]:
        return EXECUTABLE

    def _profile(self, policy: SandboxPolicy) -> Sbpl:
        return build_profile(policy, release=self._release)


def _machine_release() -> int:
    """Of macOS; where it cannot be read, the oldest that is supported, as it knows the fewest names."""
    major = platform.mac_ver()[0].partition(".")[0]
    return int(major) if major.isdecimal() else OLDEST_RELEASE


def _listed(found: Mapping[Feature, str]) -> list[NotEnforced]:
    return [
        NotEnforced(feature=feature, isolation="process", reason=reason) for feature, reason in found.items()
    ]


def _limits(policy: SandboxPolicy) -> list[list[Any]]:
    """[name, soft, hard, cap] for each; what the spec asks for by name is never quietly lowered."""
    limits = policy.limits
    wanted: dict[str, list[Any]] = {
        "core": ["core", 0, 0, False],
        "nofile": ["nofile", limits.max_files, limits.max_files, True],
    }
    if limits.cpu_time_limit_s is not None:
        # SIGXCPU at the limit, SIGKILL a second later for a program that ignores it.
        wanted["cpu"] = ["cpu", limits.cpu_time_limit_s, limits.cpu_time_limit_s + 1, False]
    for name, (soft, hard) in limits.ulimits.items():
        wanted[name] = [name, soft, hard, False]
    return list(wanted.values())
