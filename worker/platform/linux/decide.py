"""May a container do this? Answered from its policy and plan, as the Linux kernel would, without asking it.

Only what the sandbox itself refuses counts: ownership and modes of files are another matter. What Linux
cannot tell apart is answered as it is enforced, not as it is meant: a port that is open on one address is
open on all, one granted unix socket opens every one, and a read-only folder inside a writable one is
writable. Pure; the facts are those of `landlock`, `seccomp` and `enforce`.
"""

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from worker.platform.base import Profile, SandboxPolicy

from . import landlock, seccomp
from .decide_root import Seen
from .render import OWN_NETWORK, OWN_PROC, call_line, file_line, port_heading
from .ruling import Ruling
from .syscall_table import NUMBERS
from .system import SystemPath

FAMILIES = {"unix": 1, "inet": 2, "inet6": 10, "netlink": 16, "packet": 17, "vsock": 40}
KINDS = {"stream": 1, "dgram": 2, "raw": 3, "seqpacket": 5}
# Bits of the Landlock scopes, from ABI 6 on.
SCOPES = ("signal", "abstract_unix")
FIRST_OPEN_PORT = 1024


class Grant(NamedTuple):
    """A folder or file, the letters of `landlock.LETTERS` granted there, and its line in the text."""

    path: str
    letters: str
    line: str


class Confinement:
    """What one plan leaves a program of its container.

    `links` lead from paths that are links on the host to what they name; the questions may use either.
    """

    def __init__(
        self,
        profile: Profile,
        plan: dict[str, Any],
        policy: SandboxPolicy,
        system: Sequence[SystemPath],
        links: dict[str, str],
    ) -> None:
        steps = dict(plan["steps"])
        self._abi = int(profile.params["landlock_abi"])
        self._lines = profile.text.split("\n")
        self._links = links
        self._denied = policy.deny
        self._level = policy.network.level.value
        self._landlock: dict[str, Any] | None = steps.get("landlock")
        self._seen = Seen(plan["root"], self._lines) if "root" in plan else None
        self._gate: str | None = plan.get("gate")
        self._ports: dict[str, list[int]] | None = plan.get("ports")
        options = steps.get("seccomp")
        self._calls = None if options is None else seccomp.rules(seccomp.Options(**options))
        self._inet = None if options is None else options["inet"]
        within = self._landlock is None or self._seen is not None
        self._grants = [] if within else list(_grants(self._landlock or {}, policy, system))

    def line(self, rule: str | None) -> int | None:
        """The number of a rule's line in the profile's text, from 1."""
        return self._lines.index(rule) + 1 if rule in self._lines else None

    # -- files

    def file(self, right: str, path: str) -> Ruling:
        """`right` is one of `landlock.FS_RIGHTS`; the path is absolute and normalised."""
        if self._seen is not None:
            return self._seen.file(right, path)
        if self._landlock is None:
            return Ruling("allow", None, "this kernel has no Landlock: whatever the worker's user may")
        if right not in _covered(self._abi):
            if right == "refer":
                return Ruling("deny", None, "Landlock before ABI 2 moves nothing from folder to folder")
            since = landlock.FS_RIGHTS[right][1]
            return Ruling("allow", None, f"Landlock before ABI {since} does not see it")
        path = self._resolved(path)
        covering = [grant for grant in self._grants if _covers(grant.path, path)]
        for grant in sorted(covering, key=lambda one: one.path.count("/"), reverse=True):
            if any(right in landlock.LETTERS[letter] for letter in grant.letters):
                return Ruling("allow", grant.line, "granted")
        if any(_covers(denied, path) for denied in self._denied):
            return Ruling(
                "deny", self._heading("[files]"), "it belongs to the node itself, no spec reaches it"
            )
        if covering:
            return Ruling("deny", covering[-1].line, "what is granted there does not include it")
        return Ruling("deny", self._heading("[files]"), "nothing that is granted covers it")

    def _resolved(self, path: str) -> str:
        """Past the links at the beginning of the path; the kernel's rules are for what they lead to."""
        for _ in range(8):
            found = max((link for link in self._links if _covers(link, path)), key=len, default=None)
            if found is None or self._links[found] == found:
                return path
            path = self._links[found] + path[len(found) :]
        return path

    # -- network

    def connect(self, port: int, *, udp: bool = False, local: bool = True) -> Ruling:
        """To this machine or, unless `local`, another: Landlock tells ports apart, and no addresses."""
        if self._ports is not None:
            return self._granted(self._ports, "connect", port, udp, local)
        return self._port("c", "connect", port, udp)

    def bind(self, port: int, *, udp: bool = False) -> Ruling:
        if self._ports is not None:
            ruling = self._granted(self._ports, "bind", port, udp, True)
        else:
            ruling = self._port("b", "bind", port, udp)
        if ruling.decision == "allow" and 0 < port < FIRST_OPEN_PORT:
            return ruling._replace(
                reason=f"{ruling.reason}; but a port below {FIRST_OPEN_PORT} needs a capability that no "
                "container has, unless the host opens it (net.ipv4.ip_unprivileged_port_start)"
            )
        return ruling

    def _port(self, letter: str, word: str, port: int, udp: bool) -> Ruling:
        made = self.socket("inet", "dgram" if udp else "stream", 0)
        if made.decision == "deny":
            return made
        if udp:
            return Ruling("allow", made.rule, "UDP goes to and from any port: Landlock does not see it")
        net = "" if self._landlock is None else self._landlock["net"]
        line = self._heading(port_heading(word, "tcp"))
        if letter not in net:
            return Ruling("allow", line, f"at the level {self._level} no port is refused")
        ports = {number for number, letters in (self._landlock or {})["ports"] if letter in letters}
        if port in ports:
            return Ruling("allow", line, "the port is open, on every address")
        return Ruling("deny", line, f"the level {self._level} opens only the ports that are named")

    def _granted(self, ports: dict[str, list[int]], word: str, port: int, udp: bool, local: bool) -> Ruling:
        """In a network of its own, where granted ports are the host's."""
        line = self._heading(port_heading(word, "udp" if udp else "tcp"))
        if not local:
            return Ruling("deny", OWN_NETWORK, "its network is a loopback, nobody else is there")
        if port in ports[f"udp_{word}" if udp else word]:
            return Ruling("allow", line, "the host's, on its loopback")
        if word == "bind":
            return Ruling("allow", OWN_NETWORK, "in its own network: the host does not see it")
        return Ruling("deny", OWN_NETWORK, "in its own network, where only its own programs are")

    def unix(self, path: str | None, *, serve: bool = False) -> Ruling:
        """Connecting to a unix socket by its path (None: one without a path), or serving one."""
        if self._gate is not None:
            line = self._heading("unix ")
            if path == self._gate and not serve:
                return Ruling("allow", line, "the host API's socket, connected by the container's shim")
            return Ruling("deny", line, "no other unix socket than the host API's can be had")
        ruling = self.socket("unix", "stream", 0)
        if ruling.decision != "allow" or self._calls is None or path is None:
            return ruling
        if self._seen is not None and not serve:
            return self._seen.shows(path)
        return ruling._replace(reason="a filter cannot tell paths apart: every socket of the user is open")

    def socket(self, family: str, kind: str, protocol: int) -> Ruling:
        """Making a socket: names of `FAMILIES` and `KINDS`."""
        return self.call("socket", {0: FAMILIES[family], 1: KINDS[kind], 2: protocol})

    # -- the rest

    def scope(self, name: str) -> Ruling:
        """One of `SCOPES`, towards a process outside of the container."""
        if name == "abstract_unix":
            made = self.unix(None)
            if made.decision == "deny":
                return made
        if name == "signal" and self._seen is not None:
            return Ruling("deny", self._heading("[namespaces]"), "no other process can be named")
        if self._landlock is not None and self._abi >= 6:
            return Ruling("deny", None, "Landlock keeps it inside of the container")
        return Ruling("allow", None, "Landlock before ABI 6 does not see it")

    def call(self, name: str, arguments: dict[int, int] | None = None) -> Ruling:
        """A system call; without `arguments` one whose rules look at them is unknown."""
        if self._calls is None:
            return Ruling("allow", None, "this kernel takes no system-call filter")
        if name not in NUMBERS:
            return Ruling("unknown", None, "no rule has that name; if there is such a call, it is allowed")
        asked: list[seccomp.Rule] = []
        for rule in self._calls:
            if name not in rule.calls.split():
                continue
            if arguments is None and rule.when:
                asked.append(rule)
            elif all(_holds(check, arguments or {}) for check in rule.when):
                if asked and any(bool(one.verdict) != bool(rule.verdict) for one in asked):
                    return self._depends(asked[0])
                if rule.verdict == seccomp.ASK:
                    return Ruling("unknown", call_line(rule), rule.reason)
                return Ruling("deny" if rule.verdict else "allow", call_line(rule), rule.reason)
        if any(rule.verdict for rule in asked):
            return self._depends(asked[0])
        return Ruling("allow", None, "no rule names it")

    def _depends(self, rule: seccomp.Rule) -> Ruling:
        return Ruling("unknown", call_line(rule), "it depends on the call's arguments")

    def _heading(self, start: str) -> str | None:
        return next((line for line in self._lines if line.startswith(start)), None)


def _grants(rules: dict[str, Any], policy: SandboxPolicy, system: Sequence[SystemPath]) -> Iterable[Grant]:
    for (path, letters), rule in zip(rules["paths"], policy.paths, strict=True):
        yield Grant(path, letters, file_line(letters, path, rule.origin))
    for known in system:
        yield Grant(known.path, known.access, file_line(known.access, known.path, known.reason))
    if rules["own_proc"]:
        yield Grant("/proc/self", "r", OWN_PROC)


def _covered(abi: int) -> set[str]:
    return {right for right, (_, since) in landlock.FS_RIGHTS.items() if since <= abi}


def _covers(outer: str, path: str) -> bool:
    """Whether `path` is `outer` or below it. `outer` may be a pattern whose `*` stops at a slash."""
    if "*" not in outer:
        return path == outer or path.startswith(outer.rstrip("/") + "/")
    wanted, given = outer.split("/"), path.split("/")
    return len(given) >= len(wanted) and all(map(fnmatch.fnmatchcase, given, wanted))


def _holds(check: seccomp.Check, arguments: dict[int, int]) -> bool:
    value = arguments.get(check.argument, 0) & check.mask
    return (value == check.value) is check.equal
