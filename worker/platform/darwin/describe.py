"""What Seatbelt can enforce and a policy in its language, for any machine: no call of macOS is made here."""

import functools
from collections.abc import Mapping

import msgspec

from schemas.node import Capabilities, Feature, NotEnforced
from schemas.status import Gpu, Network
from worker.platform.base import Profile, RuleGroup, SandboxPolicy

from .groups import GROUPS
from .sbpl import Sbpl, build_profile

OLDEST_RELEASE = 12
NEWEST_RELEASE = 26

_OPEN_TO_THE_NETWORK = (
    "a port that the program opens can be reached from the network unless it binds 127.0.0.1 or ::1; "
    "Seatbelt cannot tell local addresses apart"
)
# Measured: openai/codex#42925, SRT#494. Whether `localhost` takes in the machine's own other addresses is reported
# both ways (BAZEL#30865).
_MAPPED_LOOPBACK = (
    "a service of this machine can be reached by ::ffff:127.0.0.1, and perhaps by another address of the machine: "
    "Seatbelt takes neither for `localhost`"
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


def _listed(found: Mapping[Feature, str]) -> list[NotEnforced]:
    return [
        NotEnforced(feature=feature, isolation="process", reason=reason) for feature, reason in found.items()
    ]


_CAPABILITIES = Capabilities(
    sandbox="seatbelt",
    network=[level.value for level in (Network.NONE, Network.LOCALHOST, Network.OUTBOUND, Network.FULL)],
    gpu=[level.value for level in (Gpu.NONE, Gpu.METAL_COMPUTE, Gpu.MPS_ONLY)],
    isolation=["process"],
    clone="clonefile or copy",
    limits=["memory", "cpu_time_limit", "max_files", "ulimits"],
    not_enforced=_listed(
        _ALWAYS
        | {
            Feature.NETWORK_LOCALHOST: _OPEN_TO_THE_NETWORK,
            Feature.NETWORK_OUTBOUND: f"{_MAPPED_LOOPBACK}; {_OPEN_TO_THE_NETWORK}",
            Feature.GPU: _SHARED_GPU,
            Feature.IPC: _SHARED_IPC,
        }
    ),
)


@functools.cache
def _gaps(level: Network, binds: bool, gpu: bool, ipc: bool) -> tuple[NotEnforced, ...]:
    found = dict(_ALWAYS)
    if level is Network.LOCALHOST:
        found[Feature.NETWORK_LOCALHOST] = _OPEN_TO_THE_NETWORK
    if level is Network.OUTBOUND:
        more = [_OPEN_TO_THE_NETWORK] if binds else []
        found[Feature.NETWORK_OUTBOUND] = "; ".join([_MAPPED_LOOPBACK, *more])
    if gpu:
        found[Feature.GPU] = _SHARED_GPU
    if ipc:
        found[Feature.IPC] = _SHARED_IPC
    return tuple(_listed(found))


class SeatbeltRules:
    """The describing half of the macOS driver, for macOS `release` (12 … 26)."""

    name = "darwin"

    def __init__(self, release: int) -> None:
        self.release = release

    def capabilities(self) -> Capabilities:
        return _CAPABILITIES

    def groups(self) -> Mapping[str, RuleGroup]:
        return GROUPS

    def not_enforced(self, policy: SandboxPolicy) -> list[NotEnforced]:
        """What of this very policy macOS cannot enforce."""
        network = policy.network
        return list(
            _gaps(network.level, bool(network.bind_ports), policy.gpu is not Gpu.NONE, "ipc" in policy.groups)
        )

    def profile(self, policy: SandboxPolicy) -> Sbpl:
        return build_profile(policy, release=self.release)

    def describe(self, policy: SandboxPolicy) -> Profile:
        made = self.profile(policy)
        return Profile(
            language="sbpl",
            text=made.text,
            params=made.params,
            policy=msgspec.to_builtins(policy),
            not_enforced=self.not_enforced(policy),
        )
