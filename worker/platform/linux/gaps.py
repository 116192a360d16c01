"""What this kernel cannot enforce, and why, in words for operators and schedulers."""

from schemas.node import Feature, NotEnforced
from schemas.status import Network
from worker.platform.base import ROOTED, SandboxPolicy

# A node without Landlock lets programs see every file of its user. The contract has no name for this yet.
FILES = Feature.FILES

_TCP_ONLY = "Landlock here knows TCP only: UDP, where a level has it, goes to and from any port"
_NO_FILTER = "this kernel takes no system-call filter"
_NO_LANDLOCK = "this kernel has no Landlock"
_NOT_IN_NAMESPACES = {
    Feature.NETWORK_NONE: f"{_NO_FILTER}: a socket to the machine's own host (vsock) is in no namespace",
    Feature.IPC: f"{_NO_FILTER}: keys of the user are in no namespace",
}


def of_machine(
    abi: int, has_filter: bool, *, rooted: bool, ports: bool, controllers: tuple[str, ...]
) -> list[NotEnforced]:
    """Everything that falls short at some setting. `rooted`: there is isolation `rootfs` too, and with `ports` a
    network of its own for the level `localhost` there; `controllers` are those of control groups.
    """
    found = _always(abi, has_filter, controllers)
    if has_filter:
        found[Feature.UNIX_SOCKETS] = (
            "closed but for the host API's, unless the spec is granted others: then every socket that the user "
            "may reach is open"
        )
        found[Feature.IPC] = "closed, but open to all objects of the user under the groups ipc and shm"
    if abi < 6 and has_filter:
        found[Feature.ABSTRACT_SOCKETS] = f"open once unix sockets are granted: {_older(abi, 6)}"
    shared = {
        Feature.NETWORK_LOCALHOST: _localhost(abi),
        Feature.NETWORK_OUTBOUND: _outbound(abi),
        Feature.NETWORK_UDP: _TCP_ONLY,
    }
    listed = _listed(found | shared, "process")
    if rooted:
        inside = _in_any_root(controllers)
        if not has_filter:
            inside |= _NOT_IN_NAMESPACES
        if abi < 6:
            closed = "none and localhost" if ports else "none"
            inside[Feature.ABSTRACT_SOCKETS] = f"open at every level but {closed}: {_older(abi, 6)}"
        if ports:
            del shared[Feature.NETWORK_LOCALHOST]
            shared[Feature.NETWORK_UDP] = f"at the level outbound only: {_TCP_ONLY}"
        listed += _listed(inside | shared, ROOTED)
    return listed


def of_policy(
    policy: SandboxPolicy,
    abi: int,
    has_filter: bool,
    *,
    opens_sockets: bool,
    ports: bool,
    controllers: tuple[str, ...],
) -> list[NotEnforced]:
    """What falls short for this very policy. `opens_sockets`: a granted unix socket opens them all. `ports`: it has
    a network of its own, with granted ports of the host.
    """
    network = policy.network
    if policy.isolation == ROOTED:
        return _listed(_in_root(policy, abi, has_filter, ports, controllers), ROOTED)
    found = _always(abi, has_filter, controllers)
    if has_filter and opens_sockets:
        found[Feature.UNIX_SOCKETS] = (
            "a kernel filter cannot tell socket paths apart: all of the user's are open"
        )
        if abi < 6:
            found[Feature.ABSTRACT_SOCKETS] = _older(abi, 6)
    if {"ipc", "shm"} & set(policy.groups):
        found[Feature.IPC] = "the groups ipc and shm open these objects to all processes of the user"
    if network.level is Network.LOCALHOST:
        found[Feature.NETWORK_LOCALHOST] = _localhost(abi)
    if network.level is Network.OUTBOUND:
        found[Feature.NETWORK_OUTBOUND] = _outbound(abi)
    if network.udp and network.level in (Network.LOCALHOST, Network.OUTBOUND):
        found[Feature.NETWORK_UDP] = _TCP_ONLY
    return _listed(found, "process")


def _in_root(
    policy: SandboxPolicy, abi: int, has_filter: bool, ports: bool, controllers: tuple[str, ...]
) -> dict[Feature, str]:
    """For a container with a root of its own: files, processes, signals and IPC end at its namespaces."""
    network = policy.network
    found = _in_any_root(controllers)
    sized = [volume for volume in policy.volumes if volume.size_bytes is not None]
    if sized and all(volume.kind == "tmpfs" for volume in sized):
        del found[Feature.VOLUME_SIZE]
    if not has_filter:
        found |= _NOT_IN_NAMESPACES
    if ports:
        return found
    if network.level is not Network.NONE and abi < 6 and (network.unix_sockets or not has_filter):
        found[Feature.ABSTRACT_SOCKETS] = _older(abi, 6)
    if network.level is Network.LOCALHOST:
        found[Feature.NETWORK_LOCALHOST] = _localhost(abi)
    if network.level is Network.OUTBOUND:
        found[Feature.NETWORK_OUTBOUND] = _outbound(abi)
    if (network.udp or not has_filter) and network.level in (Network.LOCALHOST, Network.OUTBOUND):
        found[Feature.NETWORK_UDP] = _TCP_ONLY
    return found


def _in_any_root(controllers: tuple[str, ...]) -> dict[Feature, str]:
    return {
        **_unlimited(controllers),
        Feature.VOLUME_SIZE: "only that of tmpfs: others are folders of the host's file system",
    }


def _unlimited(controllers: tuple[str, ...]) -> dict[Feature, str]:
    """Of the limits that only a control group can keep, those that it cannot here."""
    without = {
        Feature.MEMORY: (
            "measured a few times a second and answered by a kill; the kernel itself refuses nothing, and memory "
            "in unmapped memfd files is not counted"
        ),
        Feature.CPU: "no control group is used; only the CPU time of each process can be limited",
        Feature.PIDS: "no control group is used, and the kernel's own limit counts all of the user's processes",
    }
    return {feature: reason for feature, reason in without.items() if feature.value not in controllers}


def _always(abi: int, has_filter: bool, controllers: tuple[str, ...]) -> dict[Feature, str]:
    """What no setting of a spec changes."""
    found: dict[Feature, str] = {}
    if not has_filter:
        found[Feature.NETWORK_NONE] = f"{_NO_FILTER}: " + (
            "only TCP is refused" if abi >= 4 else "nothing is refused"
        )
        for feature in (Feature.NETWORK_UDP, Feature.UNIX_SOCKETS, Feature.IPC):
            found[feature] = _NO_FILTER
        if abi < 6:
            found[Feature.ABSTRACT_SOCKETS] = _NO_FILTER
    if abi == 0:
        found[FILES] = f"{_NO_LANDLOCK}: programs may read and write whatever the worker's user may"
        found[Feature.GPU] = f"{_NO_LANDLOCK}: devices of the worker's user are open"
    found[Feature.FILE_METADATA] = (
        "Landlock does not cover stat, chmod, utime, extended attributes and inotify: a program can see that "
        "a file exists anywhere, and change modes and times of files that its user owns"
    )
    if abi in (1, 2):
        found[Feature.FILE_METADATA] += f"; it can empty files that it may only read: {_older(abi, 3)}"
    if abi < 6:
        found[Feature.SIGNALS] = f"programs may signal all processes of the worker's user: {_older(abi, 6)}"
    found[Feature.PROCESSES] = (
        "other processes' command lines, environment and memory are closed, but not that they exist, nor "
        "their priority and affinity where the user is the same, nor which connections the host has"
        if abi
        else f"{_NO_LANDLOCK}: all that /proc tells is open"
    )
    found |= _unlimited(controllers)
    found[Feature.VOLUME_SIZE] = "volumes are folders of the host's file system"
    return found


def _localhost(abi: int) -> str:
    if abi < 4:
        return f"TCP is open as under full: {_older(abi, 4)}"
    return (
        "ports, but not addresses: the named ports are open on every address, also outwards, and a server "
        "that never binds may listen on a free port"
    )


def _outbound(abi: int) -> str:
    if abi < 4:
        return f"TCP is open as under full: {_older(abi, 4)}"
    return "connections go to every port of loopback too, the NATS server's and the node's own included"


def _older(abi: int, needed: int) -> str:
    return _NO_LANDLOCK if abi == 0 else f"this kernel's Landlock has ABI {abi}, and that takes {needed}"


def _listed(found: dict[Feature, str], isolation: str) -> list[NotEnforced]:
    return [
        NotEnforced(feature=feature, isolation=isolation, reason=reason) for feature, reason in found.items()
    ]
