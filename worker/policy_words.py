"""A sandbox policy in words, for people: what a container may do, before any language of a platform. Pure."""

from collections.abc import Iterator

from schemas.status import Gpu, Network
from worker.platform.base import NetworkPolicy, PathRule, SandboxPolicy

_ACCESS = {"r": "read", "w": "write", "x": "execute"}
_LEVELS = {
    Network.NONE: "no network",
    Network.LOCALHOST: "this machine only, the named ports",
    Network.OUTBOUND: "any host, on this machine the named ports",
    Network.FULL: "whatever the host's network allows",
}

Section = tuple[str, list[tuple[str, str]]]


def in_words(policy: SandboxPolicy) -> list[Section]:
    """(heading, [(what, about it)]) in the order for reading; sections without a line are left out."""
    sections: list[Section] = [
        ("Files", [_file(rule) for rule in policy.paths]),
        ("Network", list(_network(policy.network))),
        ("Also", list(_more(policy))),
        ("Limits", list(_limits(policy))),
        ("Never", [(path, "part of the node itself") for path in policy.deny]),
    ]
    return [section for section in sections if section[1]]


def _file(rule: PathRule) -> tuple[str, str]:
    return ", ".join(_ACCESS[letter] for letter in rule.access), f"{rule.path}  ({rule.origin})"


def _network(network: NetworkPolicy) -> Iterator[tuple[str, str]]:
    yield network.level.value, _LEVELS.get(network.level, "")
    if network.level is not Network.NONE:
        if network.level is not Network.FULL:
            yield "connect on this machine", _ports(network.connect_ports)
            yield "listen", _ports(network.bind_ports)
        yield "UDP", "yes" if network.udp else "no"
    for path in network.unix_sockets:
        yield "unix socket", path + ("  (host API)" if path == network.api_socket else "")
    if network.denied_ports:
        yield "never", f"port {_ports(network.denied_ports)}: the node's own NATS server"


def _more(policy: SandboxPolicy) -> Iterator[tuple[str, str]]:
    if policy.gpu is not Gpu.NONE:
        yield "GPU", policy.gpu.value
    if policy.groups:
        yield "groups", " ".join(policy.groups)
    for name in policy.mach_lookup:
        yield "Mach service", name
    for device in policy.devices:
        may = " and ".join(word for word, has in (("read", device.read), ("write", device.write)) if has)
        yield "device", f"{device.path}: {may or 'nothing'}"
    for volume in policy.volumes:
        how = "read-only" if volume.readonly else "writable"
        yield "volume", f"{volume.target} is {volume.source}, {volume.kind}, {how}"
    if policy.require:
        yield "insists on", " ".join(policy.require)


def _limits(policy: SandboxPolicy) -> Iterator[tuple[str, str]]:
    limits = policy.limits
    yield "open files", f"{limits.max_files} each process"
    if limits.cpu_time_limit_s is not None:
        yield "CPU time", f"{limits.cpu_time_limit_s} s each process"
    if limits.memory_bytes is not None:
        yield "memory", f"{limits.memory_bytes} bytes, all processes"
    if limits.pids is not None:
        yield "processes", str(limits.pids)
    if limits.cpu is not None:
        yield "CPUs", f"{limits.cpu:g}"
    for name, (soft, hard) in limits.ulimits.items():
        yield name, f"{soft} {hard}"


def _ports(ports: tuple[int, ...]) -> str:
    return " ".join(map(str, ports)) or "none"
