"""From a policy to the text of a Seatbelt profile. Pure: the same policy gives the same text.

Everything is denied unless a rule allows it. Among rules with filters on one operation the last that
matches decides, and a rule on a more specific operation beats one on its wildcard, whatever their order. So a
denial names every operation that was allowed, and what must never be reachable stands last:

    what (deny default) does not cover · what every program needs · groups · services · the way to what is
    granted · grants, from the outermost folder to the innermost · what stays in its place · network · GPU ·
    the marker · never

Paths and names from outside enter only as parameters, whose values the compiler never reads as text.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from schemas.status import Network
from worker.errors import CreateFailed, Internal, InvalidSpec
from worker.platform.base import Access, PathRule, SandboxPolicy

from .groups import BY_NAME, gpu_text, group_text, places, selected
from .paths import canonical, check_nameable, parents
from .rules import Rule, complete, form, literal
from .sbpl_paths import ancestors, covers

__all__ = [
    "ALL_ON_PATHS",
    "MAX_PROFILE_BYTES",
    "MAX_RULE_BYTES",
    "Sbpl",
    "build_profile",
    "canonical",
    "run_tag",
]

# The compiler takes 64 KiB of patterns in one rule; a quarter of it leaves room for what it adds.
MAX_RULE_BYTES = 16 * 1024
# Of text and the values in it together: compiling a large profile costs tens of milliseconds.
MAX_PROFILE_BYTES = 64 * 1024

_ORIGIN = re.compile(r"[^A-Za-z0-9 ._-]")
_INSTANCE = re.compile(r"[A-Za-z0-9_-]{1,64}")

# A clone is a copy; a hard link is another way to write the same file.
_OPERATIONS = {
    "r": ("file-read*", "file-clone"),
    "x": ("process-exec*", "file-map-executable"),
    "w": ("file-write*", "file-link"),
}
# Every operation on a path that some rule here allows, wildcard and specific.
ALL_ON_PATHS = (
    "file-read* file-read-data file-read-metadata file-clone file-write* file-write-data file-link file-ioctl "
    "file-map-executable process-exec* network-outbound network-inbound network-bind"
)

# Allowed by the default of a version 1 profile, or possibly so: WebKit's and Firefox's profiles for the first
# six, libsandbox's table of operations (0xbf00/simbple, catalina/operations.c) for the others.
_UNCOVERED: tuple[tuple[str, ...], ...] = (
    ("process-info* process-info-codesignature",),
    ("nvram*",),
    ("system-privilege",),
    ("iokit-get-properties",),
    ("sysctl*",),
    ("mach-lookup", '(xpc-service-name-prefix "")'),
    ("mach-cross-domain-lookup",),
    ("file-clone file-link file-test-existence",),
    ("file-write-setugid",),
    ("file-map-executable",),
)

_NAMES = 53  # the port of name servers, which is asked over UDP


class Sbpl(msgspec.Struct, frozen=True):
    """A profile's text and the values of its parameters, in the order of their first use."""

    text: str
    params: dict[str, str]


def build_profile(policy: SandboxPolicy, *, release: int) -> Sbpl:
    """The profile of one container for macOS `release` (12 … 26).

    InvalidSpec for a path that no profile can name or a group that does not exist, CreateFailed for a
    profile that is too large, Internal for a policy that contradicts itself.
    """
    return _Builder(policy, release).build()


def run_tag(instance: str, run: int) -> str:
    """What the log says of a run's denials. Internal for an instance that could be read as more."""
    if _INSTANCE.fullmatch(instance) is None or run < 0:
        raise Internal(f"{instance!r}, run {run}, cannot tag a sandbox profile")
    return f"sandfleet:{instance}/{run}"


class _Filter(NamedTuple):
    """A filter and how many bytes it adds to the compiled pattern."""

    text: str
    size: int


class _Builder:
    def __init__(self, policy: SandboxPolicy, release: int) -> None:
        self._policy = policy
        self._release = release
        self._tag = run_tag(policy.instance, policy.run)
        self._text: list[str] = []
        self._bytes = 0
        self._params: dict[str, str] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._counts: Counter[str] = Counter()
        self._devices = {canonical(device.path): device for device in policy.devices}
        rules = [msgspec.structs.replace(one, path=canonical(one.path)) for one in policy.paths]
        # A device is granted as one file, without its name being the program's to change.
        rules = [one for one in rules if one.origin != "device" or one.path not in self._devices]
        self._rules = sorted(_merged(rules), key=lambda one: (one.path.count("/"), one.path))
        self._denied = [canonical(path) for path in dict.fromkeys(policy.deny)]
        self._sockets = [canonical(path) for path in dict.fromkeys(policy.network.unix_sockets)]
        self._own = [canonical(path) for path in (policy.rootfs, policy.tmp)]
        self._marker = canonical(policy.marker) if policy.marker else None
        self._groups = selected(self._group_names())
        self._above_system, self._above = self._find_above()

    def build(self) -> Sbpl:
        self._check()
        self._write(f'(version 1)\n(deny default (with message "{self._tag}"))\n')
        self._section("what (deny default) does not cover")
        for operation, *filters in _UNCOVERED:
            self._write(form("deny", operation, *filters, tag=self._tag))
        self._write_groups()
        self._write_services()
        self._section("the way to what is granted")
        self._rule("allow", "file-read-metadata", self._way())
        self._write_grants()
        self._write_network()
        if text := gpu_text(self._policy.gpu, self._release):
            self._section(f"gpu: {self._policy.gpu.value}")
            self._write(text)
        self._write_marker()
        self._write_never()
        if self._bytes > MAX_PROFILE_BYTES:
            raise CreateFailed(
                f"the sandbox profile has {self._bytes} bytes with its values, more than the "
                f"{MAX_PROFILE_BYTES} that are safe; name fewer paths and ports"
            )
        return Sbpl("".join(self._text), self._params)

    # -- what the policy means

    def _check(self) -> None:
        granted = [*(one.path for one in self._rules), *self._sockets, *self._devices]
        granted += [] if self._marker is None else [self._marker]
        for path in (*granted, *self._denied):
            if path == "/":
                raise Internal("a sandbox rule on / would cover everything")
        for denied in self._denied:
            for path in granted:
                if covers(denied, path):
                    raise Internal(f"the sandbox policy denies {denied} and grants {path} in it")

    def _group_names(self) -> list[str]:
        names = list(self._policy.groups)
        for name in names:
            if name not in BY_NAME:
                raise InvalidSpec(
                    f"there is no sandbox group {name!r} on macOS; there are {', '.join(sorted(BY_NAME))}",
                    field="spec.sandbox.groups",
                )
        if self._policy.network.level in (Network.OUTBOUND, Network.FULL):
            names += ["dns", "tls"]
        return names

    def _find_above(self) -> tuple[tuple[str, ...], list[str]]:
        """The folders above what our own rules name, and above what this policy grants.

        getcwd and every walk of realpath look at each folder on the way: that it is there may be known.
        """
        known = places(tuple(group.name for group in self._groups), self._policy.gpu)
        paths = [one.path for one in self._rules]
        granted = parents([*paths, *self._sockets, *self._devices]) - {*known.above}
        readable = {*known.readable, *paths}
        inside = tuple(f"{top}/" for top in readable)
        return known.above, sorted(
            one for one in granted if one not in readable and not one.startswith(inside)
        )

    def _held(self) -> list[str]:
        """What a container must not move or remove: the roots of its writable folders, and every folder on the
        way to something in them that it may not write.

        Whoever renames a folder above a rule takes the files out of the rule.
        """
        writable = [one.path for one in self._rules if "w" in one.access]
        shut = [one.path for one in self._rules if "w" not in one.access] + self._denied
        return sorted({*writable, *_between(writable, shut)})

    # -- text

    def _write(self, text: str) -> None:
        self._text.append(text)
        self._bytes += len(text)

    def _section(self, title: str) -> None:
        self._write(f"\n; --- {title}\n")

    def _param(self, kind: str, value: str) -> str:
        """`(param "KIND_n")` for a value; the same value again is the same parameter."""
        name = self._names.get((kind, value))
        if name is None:
            number = self._counts[kind]
            self._counts[kind] += 1
            name = self._names[kind, value] = f"{kind}_{number}"
            self._params[name] = value
        return f'(param "{name}")'

    def _filters(self, filter_name: str, kind: str, values: Iterable[str]) -> list[_Filter]:
        return [
            _Filter(f"({filter_name} {self._param(kind, value)})", len(os.fsencode(value)) + 16)
            for value in values
        ]

    def _way(self) -> list[_Filter]:
        return [_constant(one) for one in literal(*self._above_system)] + self._filters(
            "literal", "ABOVE", self._above
        )

    def _rule(self, action: str, operations: str, filters: Sequence[_Filter]) -> None:
        """One rule, or as many as its patterns need; none where there is nothing to match."""
        tag = self._tag if action == "deny" else ""
        operations = complete(operations)
        for chunk in _chunks(filters):
            self._write(form(action, operations, *(one.text for one in chunk), tag=tag))
            self._bytes += sum(one.size for one in chunk)

    # -- sections, in their order

    def _write_groups(self) -> None:
        for group in self._groups:
            self._section(f"{'every program' if group.always else 'group'}: {group.name}")
            text = group_text(group.name, self._release)
            if text is not None:
                self._write(text)
                continue
            for rule in group.rules:
                self._rule("allow", rule.operations, [*map(_constant, rule.filters), *self._reached(rule)])

    def _reached(self, rule: Rule) -> list[_Filter]:
        """The places of a rule that depend on the policy."""
        if rule.reach == "own":
            return self._filters("subpath", "OWN", self._own)
        if rule.reach == "above":
            folder = "(vnode-type DIRECTORY)"
            return [_Filter(f"(require-all {one.text} {folder})", one.size + 16) for one in self._way()]
        return []

    def _write_services(self) -> None:
        if not self._policy.mach_lookup:
            return
        for service in self._policy.mach_lookup:
            check_nameable(service)
        self._section("services asked for")
        self._rule(
            "allow",
            "mach-lookup",
            self._filters("global-name", "SERVICE", sorted(set(self._policy.mach_lookup))),
        )

    def _write_grants(self) -> None:
        self._section("granted")
        for one in self._rules:
            self._write(f"; {_ORIGIN.sub('', one.origin)}: {one.access}\n")
            place = self._filters("subpath", "PATH", [one.path])
            self._rule("allow", " ".join(_operations(one.access)), place)
            # What a folder further out grants and this one does not.
            outer = {
                letter
                for other in self._rules
                if other is not one and covers(other.path, one.path)
                for letter in other.access
            }
            more = [letter for letter in "rxw" if letter in outer and letter not in one.access]
            if more:
                self._rule("deny", " ".join(_operations(more)), place)
        for path, device in sorted(self._devices.items()):
            operations = ["file-read*"] if device.read else ["file-read-metadata"]
            operations += ["file-write-data"] if device.write else []
            self._write("; device\n")
            self._rule(
                "allow",
                " ".join([*operations, "file-ioctl"]),
                self._filters("literal", "DEVICE", [path]),
            )
        self._section("what stays in its place")
        self._rule("deny", "file-write-unlink", self._filters("literal", "HELD", self._held()))
        # A folder is cloned whole, with what in it must not be read.
        around = _between([one.path for one in self._rules], self._denied)
        self._rule("deny", "file-clone", self._filters("literal", "HELD", sorted(around)))

    def _write_network(self) -> None:
        network = self._policy.network
        level = network.level
        self._section(f"network: {level.value}")
        # A filter on the local side accepts other machines too, whatever host it names; and never may one
        # stand on an outbound rule, where it would open everything.
        if level in (Network.OUTBOUND, Network.FULL):
            self._rule("allow", "network-outbound", [_constant("(remote ip)")])
        if level is Network.OUTBOUND:
            self._rule("deny", "network-outbound", [_constant('(remote ip "localhost:*")')])
        if level is Network.FULL:
            self._rule("allow", "network-bind network-inbound", [_constant("(local ip)")])
        elif level is not Network.NONE:
            family = "ip" if network.udp else "tcp"
            connect = [
                _port(f"remote {'ip' if port == _NAMES else family}", "localhost", port)
                for port in sorted(set(network.connect_ports))
            ]
            bind = [_port(f"local {family}", "*", port) for port in sorted(set(network.bind_ports))]
            self._rule("allow", "network-outbound", connect)
            self._rule("allow", "network-bind network-inbound", bind)
        if self._sockets:
            self._write("; unix sockets\n")
            sockets = self._filters("literal", "SOCKET", self._sockets)
            self._rule("allow", "network-outbound file-read-metadata", sockets)

    def _write_marker(self) -> None:
        if self._marker is not None:
            self._section("marker: tells this container's processes from all others")
            self._rule("allow", "file-read-data", self._filters("literal", "MARKER", [self._marker]))

    def _write_never(self) -> None:
        """What no rule above may have opened."""
        ports = sorted(set(self._policy.network.denied_ports))
        self._section("never: other programs' arguments; the worker's files, sockets and servers")
        self._rule("deny", "sysctl-read", [_constant('(sysctl-name-prefix "kern.procargs")')])
        places = self._filters("literal", "DENIED", self._denied)
        places += self._filters("subpath", "DENIED", self._denied)
        self._rule("deny", ALL_ON_PATHS, places)
        self._rule("deny", "network-outbound", [_port("remote ip", "*", port) for port in ports])
        self._rule("deny", "network-bind network-inbound", [_port("local ip", "*", port) for port in ports])


def _merged(rules: Iterable[PathRule]) -> list[PathRule]:
    """One rule for each path: what any of them allows there."""
    merged: dict[str, PathRule] = {}
    for one in rules:
        known = merged.get(one.path)
        if known is not None:
            access = "".join(letter for letter in "rwx" if letter in known.access + one.access)
            one = msgspec.structs.replace(known, access=msgspec.convert(access, Access))
        merged[one.path] = one
    return list(merged.values())


def _between(tops: Sequence[str], paths: Iterable[str]) -> set[str]:
    """Those paths that lie in one of `tops`, and the folders between."""
    found: set[str] = set()
    for path in paths:
        over = [top for top in tops if covers(top, path)]
        if over:
            found |= {step for step in (path, *ancestors(path)) if any(covers(top, step) for top in over)}
    return found


def _operations(letters: Iterable[str]) -> list[str]:
    return [name for letter in "rxw" if letter in letters for name in _OPERATIONS[letter]]


def _constant(text: str) -> _Filter:
    """A filter of ours, whose text is counted where it is written."""
    return _Filter(text, 0)


def _port(side: str, host: str, port: int) -> _Filter:
    """Host is `localhost` or `*`, port 1 … 65535: all that the compiler takes."""
    if not 1 <= port <= 65535:
        raise Internal(f"{port} is no port")
    return _constant(f'({side} "{host}:{port}")')


def _chunks(filters: Sequence[_Filter]) -> Iterator[list[_Filter]]:
    chunk: list[_Filter] = []
    size = 0
    for one in filters:
        adds = one.size + len(one.text)
        if chunk and size + adds > MAX_RULE_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(one)
        size += adds
    if chunk:
        yield chunk
