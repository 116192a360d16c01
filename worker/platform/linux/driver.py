"""The Linux driver: what this kernel can enforce, and the plan that enforces a policy."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from schemas.node import Capabilities, Feature, NotEnforced
from schemas.status import Network
from worker.errors import Configuration, Unsupported
from worker.platform.base import (
    ROOTED,
    CloneChoice,
    CloneReport,
    FolderLimits,
    Limits,
    NetworkPolicy,
    PathRule,
    Profile,
    RuleGroup,
    SandboxPolicy,
)

from . import cgroups, gaps, landlock, privileges, seccomp, system
from .able import Able
from .clone import clone_tree, copier_of, measure
from .enforce import PLAN_VERSION
from .groups import GROUPS
from .netrules import granted
from .notify import supported as gates_supported
from .proc import LinuxProcessTable, allocated_bytes
from .render import render
from .rootplan import make_root, shows_system
from .sizes import find_limits

# What Landlock restricts at each level: binding, connecting. To deny one port where all others are open
# would take a rule for each of these, 42 ms at every start.
_RESTRICTED = {Network.NONE: "bc", Network.LOCALHOST: "bc", Network.OUTBOUND: "b", Network.FULL: ""}


class LinuxDriver:
    """What the kernel has (`abi` of Landlock, system-call `filter`) and the user is, probed unless given.

    With `listed` the system's files are those of the list, not those that this host has: nothing is looked up.
    """

    name = "linux"

    def __init__(
        self,
        *,
        abi: int | None = None,
        filter: bool | None = None,
        root: bool | None = None,
        listed: bool = False,
        gate: bool | None = None,
        rooted: bool | None = None,
        ports: bool | None = None,
        controllers: tuple[str, ...] | None = None,
    ) -> None:
        self._abi = landlock.abi() if abi is None else abi
        self._filter = seccomp.supported() if filter is None else filter
        self._root = privileges.may_set_groups() if root is None else root
        self._listed = listed
        self._controllers = _controllers() if controllers is None else controllers
        self._gate = self._filter and (gates_supported() if gate is None else gate)
        self._able = (
            Able() if rooted is None else Able(user=not self._root, reason="" if rooted else "not here")
        )
        self._ports = ports
        self._sizes: FolderLimits | None = None

    def capabilities(self) -> Capabilities:
        # Levels that hold at least by port; `not_enforced` says how much less than the contract that is.
        levels = [
            *([Network.NONE] if self._filter else []),
            *([Network.LOCALHOST, Network.OUTBOUND] if self._abi >= 4 else []),
            Network.FULL,
        ]
        return Capabilities(
            sandbox=self._sandbox(),
            network=[level.value for level in levels],
            gpu=["none"],
            isolation=["process", *([] if self._able.reason else [ROOTED])],
            clone="reflink or copy",
            limits=[
                *["memory", "cpu_time_limit", "max_files", "ulimits"],
                *[name for name in ("pids", "cpu") if name in self._controllers],
            ],
            not_enforced=self._without_sizes(
                gaps.of_machine(
                    self._abi,
                    self._filter,
                    rooted=not self._able.reason,
                    ports=self._has_ports(),
                    controllers=self._controllers,
                )
            ),
        )

    def groups(self) -> Mapping[str, RuleGroup]:
        return GROUPS

    def not_enforced(self, policy: SandboxPolicy) -> list[NotEnforced]:
        opens_sockets = self._opens_sockets(policy.network)
        found = gaps.of_policy(
            policy,
            self._abi,
            self._filter,
            opens_sockets=opens_sockets,
            ports=self._opens_ports(policy),
            controllers=self._controllers,
        )
        return self._without_sizes(found)

    def _without_sizes(self, found: list[NotEnforced]) -> list[NotEnforced]:
        """Less the gap that the file system closes."""
        return [gap for gap in found if self._sizes is None or gap.feature is not Feature.VOLUME_SIZE]

    def describe(self, policy: SandboxPolicy) -> Profile:
        missing = self.not_enforced(policy)
        return Profile(
            language="landlock+seccomp",
            text=render(policy, self.plan(policy), self._system(policy), missing),
            params={
                "landlock_abi": str(self._abi),
                "seccomp": "true" if self._filter else "false",
                "machine": seccomp.machine() or "unknown",
            },
            policy=msgspec.to_builtins(policy),
            not_enforced=missing,
        )

    def plan(self, policy: SandboxPolicy) -> dict[str, Any]:
        """See `enforce` for the steps. Configuration when a system folder would expose a denied path."""
        steps: list[list[Any]] = [["rlimits", _limits(policy)]]
        if not self._filter:
            steps.append(["keyring", None])
        if self._root:
            steps.append(["groups", None])
        if policy.user is not None:
            self._check_user(policy)
            steps.append(["user", [policy.user.uid, policy.user.gid]])
        steps += [["capabilities", None], ["no_new_privs", None], ["dumpable", None]]
        if self._abi:
            steps.append(["landlock", self._landlock(policy)])
        if self._filter:
            steps.append(["seccomp", self._seccomp(policy)])
        plan: dict[str, Any] = {"version": PLAN_VERSION, "platform": self.name, "steps": steps}
        if self._has_gate(policy.network):
            plan["gate"] = policy.network.api_socket
        if self._opens_ports(policy):
            network = policy.network
            plan["ports"] = granted(
                network.bind_ports, network.connect_ports, network.udp_ports, network.denied_ports
            )
        limited = _group_limits(policy.limits, self._controllers)
        if limited:
            plan["cgroup"] = limited
        if policy.isolation == ROOTED:
            user = (os.getuid(), os.getgid()) if self._able.user else None
            links = {} if self._listed else system.links()
            plan["root"] = make_root(
                policy,
                system=self._system(policy),
                links=links,
                user=user,
                net="ports" in plan,
                gated=plan.get("gate"),
            )
        return plan

    def changes_user(self) -> bool:
        return self._root and privileges.may_change_user()

    def _check_user(self, policy: SandboxPolicy) -> None:
        if policy.isolation == ROOTED and self._able.user:
            raise Unsupported(
                "isolation rootfs needs a user namespace on this machine, in which there is one user only",
                field="spec.user",
            )

    def _opens_sockets(self, network: NetworkPolicy) -> bool:
        """Whether every unix socket of the user is open: a filter cannot tell their paths apart."""
        others = [path for path in network.unix_sockets if path != network.api_socket]
        return bool(others) or (network.api_socket is not None and not self._gate)

    def _has_gate(self, network: NetworkPolicy) -> bool:
        """Whether the host API's socket is reached through the shim, and no other."""
        return network.api_socket is not None and not self._opens_sockets(network)

    def _has_ports(self) -> bool:
        """Whether a network of its own can have the granted ports of the host: Landlock must refuse the rest."""
        if self._ports is not None:
            return self._ports
        return self._gate and self._abi >= 4 and not self._able.blind

    def _opens_ports(self, policy: SandboxPolicy) -> bool:
        """Whether this container has a network of its own with granted ports of the host."""
        rooted = policy.isolation == ROOTED and policy.network.level is Network.LOCALHOST
        return rooted and self._has_ports()

    def clone_tree(self, src: Path, dst: Path, choice: CloneChoice | None = None) -> CloneReport:
        return clone_tree(src, dst, copier=copier_of(choice))

    def measure_clone(self, source: Path, target: Path) -> CloneChoice:
        return measure(source, target)

    def find_folder_limits(self, place: Path) -> None:
        self._sizes = find_limits(place)

    @property
    def folder_limits(self) -> FolderLimits | None:
        return self._sizes

    def processes(self) -> LinuxProcessTable:
        return LinuxProcessTable()

    def end_leftovers(self, marker: str, timeout_s: float) -> bool:
        """The kernel has: PDEATHSIG ends the program with its shim, and the shim with its launcher."""
        return True

    def allocated_bytes(self) -> int | None:
        return allocated_bytes()

    def default_path(self) -> str:
        return system.DEFAULT_PATH

    def search_dirs(self, policy: SandboxPolicy | None = None) -> tuple[str, ...]:
        if policy is not None and policy.isolation == ROOTED and not shows_system(policy.rootfs):
            return ()
        folders = {os.path.realpath(rule.path) for rule in system.PROGRAMS if os.path.isdir(rule.path)}
        return tuple(sorted(folders))

    def _sandbox(self) -> str:
        if self._abi:
            return f"landlock:{self._abi}"
        return "seccomp" if self._filter else "none"

    def _system(self, policy: SandboxPolicy) -> tuple[system.SystemPath, ...]:
        rules = system.listed(policy.groups) if self._listed else system.system(policy.groups).rules
        exposes = {folder: denied for denied in policy.deny for folder in _with_parents(denied)}
        for rule in rules:
            if rule.path in exposes:
                raise Configuration(
                    f"{exposes[rule.path]} lies below {rule.path}, which every container may read ({rule.reason}); "
                    "it must be moved out of there"
                )
        return rules

    def _landlock(self, policy: SandboxPolicy) -> dict[str, Any]:
        net = _RESTRICTED.get(policy.network.level, "") if self._abi >= 4 else ""
        if policy.isolation == ROOTED:
            # What is not to be seen is not there, and what may only be read is mounted so.
            everything = [["/", "rwxsi"]]
            # Whatever the program binds or connects, it asks the shim to: see `netgate`.
            ports = [] if self._opens_ports(policy) else _ports(policy.network, net)
            return {"system": [], "paths": everything, "ports": ports, "net": net, "own_proc": False}
        sockets = "s" if self._opens_sockets(policy.network) else ""
        return {
            "system": [[rule.path, rule.access] for rule in self._system(policy)],
            "paths": [[rule.path, _letters(rule, sockets)] for rule in policy.paths],
            "ports": _ports(policy.network, net),
            "net": net,
            "own_proc": True,
        }

    def _seccomp(self, policy: SandboxPolicy) -> dict[str, Any]:
        network = policy.network
        ports = self._opens_ports(policy)
        inet = {
            Network.NONE: "none",
            Network.LOCALHOST: "udp" if network.udp or ports else "tcp",
            Network.OUTBOUND: "udp",
            Network.FULL: "any",
        }[network.level]
        options = seccomp.Options(
            inet=inet,
            unix=self._opens_sockets(network),
            fastopen=network.level in (Network.OUTBOUND, Network.FULL),
            ipc="ipc" in policy.groups,
            truncate=self._abi >= 3,
            gate=self._has_gate(network),
            ports=ports,
        )._asdict()
        # A launcher that is older than this worker does not know the words.
        return {name: value for name, value in options.items() if name not in ("gate", "ports") or value}


def _with_parents(path: str) -> Iterator[str]:
    """The path and every folder above it but the root."""
    while path:
        yield path
        path = path.rpartition("/")[0]


def _controllers() -> tuple[str, ...]:
    found = cgroups.delegated_here()
    return () if found is None else found.controllers


def _group_limits(limits: Limits, controllers: tuple[str, ...]) -> dict[str, Any]:
    """What a control group can keep of these limits; empty when that is nothing, and none is needed."""
    wanted = {"memory": limits.memory_bytes, "pids": limits.pids, "cpu": limits.cpu}
    return {name: value for name, value in wanted.items() if value is not None and name in controllers}


def _ports(network: NetworkPolicy, net: str) -> list[list[Any]]:
    """[port, letters] for each port that is open; `net` are the letters that are restricted at all."""
    if network.level is Network.NONE:
        return []
    open_ports: dict[int, str] = {}
    for letter, ports in (("b", network.bind_ports), ("c", network.connect_ports)):
        for port in ports if letter in net else ():
            if port not in network.denied_ports:
                open_ports[port] = open_ports.get(port, "") + letter
    return [[port, letters] for port, letters in sorted(open_ports.items())]


def _letters(rule: PathRule, sockets: str) -> str:
    """The letters of `landlock.LETTERS`: those of a `PathRule` are among them."""
    if rule.origin == "device":
        return rule.access + "i"
    return rule.access + sockets if "w" in rule.access else rule.access


def _limits(policy: SandboxPolicy) -> list[list[Any]]:
    """[name, soft, hard, cap] for each; what the spec asks for by name is never quietly lowered."""
    limits = policy.limits
    wanted: dict[str, list[Any]] = {
        "core": ["core", 0, 0, False],
        "nofile": ["nofile", limits.max_files, limits.max_files, True],
    }
    for name, (soft, hard) in limits.ulimits.items():
        wanted[name] = [name, soft, hard, False]
    if limits.cpu_time_limit_s is not None:
        # SIGXCPU at the limit, SIGKILL a second later for a program that ignores it.
        wanted["cpu"] = ["cpu", limits.cpu_time_limit_s, limits.cpu_time_limit_s + 1, False]
    return list(wanted.values())
