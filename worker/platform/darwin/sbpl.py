"""From a policy to the text of a Seatbelt profile. Pure: the same policy gives the same text.

Everything is denied unless a rule allows it. Among rules with filters on one operation the last that
matches decides, and a rule on a more specific operation beats one on its wildcard. Hence the order: first
what `(deny default)` does not cover, then what every program needs, then the grants from the outermost
folder to the innermost, network and GPU, and last what must never be reachable, denied on every operation
that was allowed anywhere.

Paths and names from outside enter only as parameters, whose values the compiler never reads as text.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import msgspec

from schemas.status import Network
from worker.errors import CreateFailed, Internal, InvalidSpec
from worker.platform.base import Access, PathRule, SandboxPolicy

from .groups import DEVICES, GROUPS, PROCESSES, SERVICES, SYSCTL, SYSTEM, gpu_text, rule

# The compiler takes 64 KiB of patterns in one rule; a quarter of it leaves room for what it adds.
MAX_RULE_BYTES = 16 * 1024
MAX_PROFILE_BYTES = 64 * 1024

# These are links to folders below /private, and the kernel compares real paths only.
_ALIASES = ("/tmp", "/var", "/etc")

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ORIGIN = re.compile(r"[^A-Za-z0-9 ._-]")
_TAG = re.compile(r"[A-Za-z0-9_-]{1,64}")

_EXECUTE = ("process-exec", "file-map-executable")
_OPERATIONS = {"r": ("file-read*",), "x": _EXECUTE, "w": ("file-write*",)}
# Every operation on a path that some rule here allows, wildcard and specific.
_ALL_ON_PATHS = (
    "file-read* file-read-data file-read-metadata file-write* file-write-data file-write-unlink file-ioctl "
    "file-map-executable process-exec network-outbound network-bind"
)

# Allowed by the default of a version 1 profile, or possibly so (WebKit's and Firefox's profiles).
_UNCOVERED = (
    "(deny process-info*)\n"
    "(deny nvram*)\n"
    "(deny system-privilege)\n"
    "(deny iokit-get-properties)\n"
    "(deny sysctl*)\n"
    '(deny mach-lookup (xpc-service-name-prefix ""))\n'
    "(deny file-write-setugid)\n"
)


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


def canonical(path: str) -> str:
    """A path as the kernel compares it, without asking the file system.

    InvalidSpec for what cannot be a path in a profile: relative, with `..`, or with control characters.
    """
    _check_nameable(path)
    pure = PurePosixPath(path)
    if not path.startswith("/") or ".." in pure.parts:
        raise InvalidSpec(f"{path!r} is not an absolute path without `..`")
    text = "/" + "/".join(pure.parts[1:])
    for alias in _ALIASES:
        if text == alias or text.startswith(alias + "/"):
            return "/private" + text
    return text


def _check_nameable(text: str) -> None:
    try:
        os.fsencode(text)
    except UnicodeEncodeError as failure:
        raise InvalidSpec(f"{text!r} is no text that this system can name") from failure
    if _CONTROL.search(text):
        raise InvalidSpec(f"{text!r} holds control characters, which no sandbox profile can name")


class _Builder:
    def __init__(self, policy: SandboxPolicy, release: int) -> None:
        self._policy = policy
        self._release = release
        self._text: list[str] = []
        self._params: dict[str, str] = {}
        self._names: dict[tuple[str, str], str] = {}
        rules = [msgspec.structs.replace(one, path=canonical(one.path)) for one in policy.paths]
        self._rules = sorted(_merged(rules), key=lambda one: (one.path.count("/"), one.path))
        self._denied = [canonical(path) for path in dict.fromkeys(policy.deny)]
        self._sockets = [canonical(path) for path in policy.network.unix_sockets]

    def build(self) -> Sbpl:
        self._check()
        self._head()
        self._section("what every program needs", SYSTEM + PROCESSES + DEVICES + SERVICES + SYSCTL)
        self._groups()
        self._ancestors()
        self._grants()
        self._network()
        gpu = gpu_text(self._policy.gpu, self._release)
        if gpu:
            self._section(f"gpu: {self._policy.gpu.value}", gpu)
        self._never()
        text = "".join(self._text)
        if len(text) > MAX_PROFILE_BYTES:
            raise CreateFailed(
                f"the sandbox profile has {len(text)} bytes, more than the {MAX_PROFILE_BYTES} that are "
                "safe; name fewer paths and ports"
            )
        return Sbpl(text, self._params)

    def _check(self) -> None:
        for path in [one.path for one in self._rules] + self._denied:
            if path == "/":
                raise Internal("a sandbox rule on / would cover everything")
        for denied in self._denied:
            for granted in (*(one.path for one in self._rules), *self._sockets):
                if _covers(denied, granted):
                    raise Internal(f"the sandbox policy denies {denied} and grants {granted} in it")

    # -- text

    def _section(self, title: str, *text: str) -> None:
        self._text.append(f"\n; --- {title}\n")
        self._text.extend(text)

    def _param(self, kind: str, value: str) -> str:
        """`(param "KIND_n")` for a value; the same value again is the same parameter."""
        name = self._names.get((kind, value))
        if name is None:
            number = sum(1 for known in self._names if known[0] == kind)
            name = self._names[kind, value] = f"{kind}_{number}"
            self._params[name] = value
        return f'(param "{name}")'

    def _filters(self, filter_name: str, kind: str, values: Iterable[str]) -> list[tuple[str, int]]:
        """Filters with the size that each adds to the compiled pattern."""
        return [
            (f"({filter_name} {self._param(kind, value)})", len(os.fsencode(value)) + 16) for value in values
        ]

    def _rule(self, action: str, operations: str, filters: Sequence[tuple[str, int]]) -> str:
        """One rule, or as many as its patterns need."""
        text, size = "", 0
        chunk: list[str] = []
        for one, length in filters:
            if chunk and size + length > MAX_RULE_BYTES:
                text += rule(action, operations, *chunk)
                chunk, size = [], 0
            chunk.append(one)
            size += length
        return text + rule(action, operations, *chunk) if chunk else text

    # -- sections, in their order

    def _head(self) -> None:
        tag = self._policy.instance
        if _TAG.fullmatch(tag) is None:
            raise Internal(f"{tag!r} cannot tag a sandbox profile")
        self._text.append(f'(version 1)\n(deny default (with message "sandfleet:{tag}"))\n')
        self._section("what (deny default) does not cover", _UNCOVERED)

    def _groups(self) -> None:
        wanted = list(dict.fromkeys(self._policy.groups))
        if self._policy.network.level in (Network.OUTBOUND, Network.FULL):
            wanted += [name for name in ("dns", "tls") if name not in wanted]
        for name in sorted(wanted):
            if name not in GROUPS:
                raise InvalidSpec(
                    f"there is no sandbox group {name!r} on macOS; there are {', '.join(sorted(GROUPS))}",
                    field="spec.sandbox.groups",
                )
            self._section(f"group: {name}", GROUPS[name].text)
        if self._policy.mach_lookup:
            for service in self._policy.mach_lookup:
                _check_nameable(service)
            services = self._filters("global-name", "SERVICE", sorted(set(self._policy.mach_lookup)))
            self._section("services asked for", self._rule("allow", "mach-lookup", services))

    def _ancestors(self) -> None:
        """getcwd and every walk of realpath look at each folder on the way.

        They may know that it is there.
        """
        named = [one.path for one in self._rules] + self._sockets
        named += [canonical(device.path) for device in self._policy.devices]
        above = {str(parent) for path in named for parent in PurePosixPath(path).parents} - {"/"}
        filters = self._filters("literal", "ABOVE", sorted(above))
        self._section("the way to what is granted", self._rule("allow", "file-read-metadata", filters))

    def _grants(self) -> None:
        self._section("granted")
        for one in self._rules:
            self._text.append(f"; {_ORIGIN.sub('', one.origin)}: {one.access}\n")
            place = self._filters("subpath", "PATH", [one.path])
            allowed = [name for letter in "rxw" if letter in one.access for name in _OPERATIONS[letter]]
            allowed += ["file-ioctl"] * (one.origin == "device")
            self._text.append(self._rule("allow", " ".join(allowed), place))
            self._text.append(self._narrow(one, place))
        granted = {one.path for one in self._rules}
        for device in self._policy.devices:
            if canonical(device.path) in granted:
                continue
            place = self._filters("literal", "DEVICE", [canonical(device.path)])
            operations = ["file-ioctl"] + ["file-read*"] * device.read + ["file-write-data"] * device.write
            if device.read or device.write:
                self._text.append(self._rule("allow", " ".join(operations), place))

    def _narrow(self, one: PathRule, place: list[tuple[str, int]]) -> str:
        """Take back what a folder further out grants and this one does not, and hold it in its place."""
        outer = [other for other in self._rules if other is not one and _covers(other.path, one.path)]
        more = {letter for other in outer for letter in other.access} - set(one.access)
        if not more:
            return ""
        operations = [name for letter in "rxw" if letter in more for name in _OPERATIONS[letter]]
        text = self._rule("deny", " ".join(operations), place)
        if "w" in more:
            # Whoever may rename a folder above it would move it out of the rule.
            writable = [other.path for other in outer if "w" in other.access]
            held = [one.path] + [
                str(parent)
                for parent in PurePosixPath(one.path).parents
                if any(_covers(path, str(parent)) for path in writable)
            ]
            text += self._rule("deny", "file-write-unlink", self._filters("literal", "HELD", held))
        return text

    def _network(self) -> None:
        network = self._policy.network
        text = ""
        if network.level is not Network.NONE:
            # A filter on the local side accepts other machines too, whatever host it names; and never may one
            # stand on an outbound rule, where it would open everything.
            family = "ip" if network.udp or network.level in (Network.OUTBOUND, Network.FULL) else "tcp"
            if network.level in (Network.OUTBOUND, Network.FULL):
                text += rule("allow", "network-outbound", "(remote ip)")
            if network.level is Network.OUTBOUND:
                text += rule("deny", "network-outbound", '(remote ip "localhost:*")')
            if network.level is Network.FULL:
                text += rule("allow", "network-bind network-inbound", "(local ip)")
            else:
                text += _ports(
                    "allow", "network-outbound", f"remote {family}", "localhost", network.connect_ports
                )
                text += _ports(
                    "allow", "network-bind network-inbound", f"local {family}", "*", network.bind_ports
                )
        if self._sockets:
            sockets = self._filters("literal", "SOCKET", self._sockets)
            text += self._rule("allow", "network-outbound file-read-metadata", sockets)
        self._section(f"network: {network.level.value}", text)

    def _never(self) -> None:
        ports = self._policy.network.denied_ports
        text = '(deny sysctl-read (sysctl-name-prefix "kern.procargs"))\n'
        text += _ports("deny", "network-outbound", "remote ip", "*", ports)
        text += _ports("deny", "network-outbound", "remote ip", "localhost", ports)
        text += _ports("deny", "network-bind network-inbound", "local ip", "*", ports)
        if self._denied:
            places = self._filters("literal", "DENIED", self._denied)
            places += self._filters("subpath", "DENIED", self._denied)
            text += self._rule("deny", _ALL_ON_PATHS, places)
        self._section("never", text)
        if self._policy.marker:
            marker = self._filters("literal", "MARKER", [canonical(self._policy.marker)])
            self._section("marker", self._rule("allow", "file-read-data", marker))


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


def _covers(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(outer + "/")


def _ports(action: str, operations: str, side: str, host: str, ports: Iterable[int]) -> str:
    """Host is `localhost` or `*`, port 1 … 65535: all that the compiler takes."""
    numbers = sorted(set(ports))
    if any(not 1 <= port <= 65535 for port in numbers):
        raise Internal(f"no ports: {numbers}")
    filters = [f'({side} "{host}:{port}")' for port in numbers]
    return "".join(rule(action, operations, *filters[at : at + 256]) for at in range(0, len(filters), 256))
