"""A plan in words: what `profile show` prints on Linux."""

from collections.abc import Iterable, Sequence
from typing import Any

from schemas.node import NotEnforced
from worker.platform.base import SandboxPolicy

from . import seccomp
from .system import SystemPath

_ERRNO = {seccomp.ASK: "ask", 1: "EPERM", 2: "ENOENT", 13: "EACCES", 38: "ENOSYS", 95: "EOPNOTSUPP"}
_STEPS = {
    "keyring": "a session keyring of its own",
    "groups": "no supplementary groups",
    "user": "the spec's or the image's user, and its one group",
    "capabilities": "no capability in any set, and none to be gained",
    "no_new_privs": "no privileges from set-user-ID or file capabilities",
    "dumpable": "unreadable to other processes until its program runs",
}
OWN_PROC = "r     /proc/self  # the program's own, not its children's"
OWN_NETWORK = "else     its own loopback  # the ports above are the host's, on its loopback, by the shim"


def render(
    policy: SandboxPolicy,
    plan: dict[str, Any],
    system: Sequence[SystemPath],
    missing: Sequence[NotEnforced],
) -> str:
    """The steps of `plan` in their order, each line with its reason after `#`."""
    steps = dict(plan["steps"])
    lines = [f"# container {policy.container}, instance {policy.instance}, isolation {policy.isolation}"]
    lines += ["", "[limits]  # for each process"]
    for name, soft, hard, _ in steps["rlimits"]:
        lines.append(f"{name:<8} {_limit(soft)} {_limit(hard)}")
    if policy.limits.memory_bytes is not None:
        lines.append(
            f"memory   {policy.limits.memory_bytes}  # of all its processes, by the worker's watchdog"
        )
    lines += ["", "[privileges]"]
    for name, text in _STEPS.items():
        if name in steps:
            words = " ".join(map(str, [name, *(steps[name] or [])]))
            lines.append(f"{words:<12}  # {text}")
    landlock = steps.get("landlock")
    if "root" in plan:
        lines += _root(plan["root"])
    elif landlock is None:
        lines += ["", "[files]  # this kernel has no Landlock: whatever the worker's user may"]
    else:
        lines += _files(policy, landlock, system)
    lines += _network(policy, landlock, steps.get("seccomp"), plan.get("ports"))
    if "seccomp" in steps:
        lines += _calls(seccomp.rules(seccomp.Options(**steps["seccomp"])))
    lines += ["", "[not enforced]"]
    lines += [f"{gap.feature.value:<18}  # {gap.reason}" for gap in missing]
    return "\n".join(lines) + "\n"


def _files(policy: SandboxPolicy, landlock: dict[str, Any], system: Sequence[SystemPath]) -> list[str]:
    lines = ["", "[files]  # r read, w write, x execute, s make sockets, i ioctl; anything else is refused"]
    for (path, access), rule in zip(landlock["paths"], policy.paths, strict=True):
        lines.append(file_line(access, path, rule.origin))
    lines += [file_line(rule.access, rule.path, rule.reason) for rule in system]
    if landlock["own_proc"]:
        lines.append(OWN_PROC)
    return lines


def _root(root: dict[str, Any]) -> list[str]:
    namespaces = [
        "mount",
        "process",
        "ipc",
        "uts",
        "cgroup",
        *["user"] * bool(root["user"]),
        *["net"] * root["net"],
    ]
    lines = ["", f"[namespaces]  # of its own\n{' '.join(namespaces)}"]
    lines += ["", f"[files]  # the root is {root['path']}; what else is seen there, in this order"]
    lines += [" ".join(str(word) for word in mount) for mount in root["mounts"]]
    return lines


def port_heading(word: str, kind: str) -> str:
    """How the line begins that says which ports are open; `decide` finds it again by this."""
    return f"{word:<8} {kind}"


def file_line(access: str, path: str, reason: str) -> str:
    """The line of a rule for files; `decide` finds it again by this."""
    return f"{access:<5} {path}  # {reason}"


def _network(
    policy: SandboxPolicy,
    landlock: dict[str, Any] | None,
    options: dict[str, Any] | None,
    granted: dict[str, list[int]] | None,
) -> list[str]:
    network = policy.network
    lines = ["", f"[network]  # level {network.level.value}"]
    net = landlock["net"] if landlock is not None else ""
    if granted is not None:
        for word, kind in (("bind", "tcp"), ("bind", "udp"), ("connect", "tcp"), ("connect", "udp")):
            open_ports = " ".join(map(str, granted[word if kind == "tcp" else f"udp_{word}"]))
            lines.append(f"{port_heading(word, kind)} {open_ports or 'nothing'}")
        lines.append(OWN_NETWORK)
    for letter, word in (("b", "bind"), ("c", "connect")) if granted is None else ():
        if letter not in net:
            ports = "any port"
        else:
            ports = (
                " ".join(str(p) for p, letters in (landlock or {})["ports"] if letter in letters) or "nothing"
            )
        lines.append(f"{port_heading(word, 'tcp')} {ports}")
    if options is not None:
        kinds = {"none": "none", "tcp": "tcp", "udp": "tcp udp", "any": "all of inet"}[options["inet"]]
        lines.append(f"sockets  {kinds}{' unix' if options['unix'] else ''}, unix pairs")
        if options.get("gate"):
            lines.append(f"unix     {network.api_socket}  # the host API's, through the shim; no other")
    if network.denied_ports and "c" in net and granted is None:
        lines.append(f"never    tcp {' '.join(map(str, network.denied_ports))}  # the node's own")
    return lines


def _calls(rules: Iterable[seccomp.Rule]) -> list[str]:
    lines = [
        "",
        "[system calls]  # of one call the first rule that holds decides; what is not named is allowed",
    ]
    return [*lines, *(call_line(rule) for rule in rules)]


def call_line(rule: seccomp.Rule) -> str:
    """The line of a rule for system calls."""
    verdict = "allow" if rule.verdict == 0 else _ERRNO.get(rule.verdict, str(rule.verdict))
    when = " and ".join(_check(check) for check in rule.when)
    return f"{verdict:<11} {rule.calls}{f' if {when}' if when else ''}  # {rule.reason}"


def _check(check: seccomp.Check) -> str:
    left = f"arg{check.argument}"
    if check.mask != 0xFFFFFFFF:
        left = f"({left} & {check.mask:#x})"
    return f"{left} {'==' if check.equal else '!='} {check.value:#x}"


def _limit(value: int) -> str:
    return "infinity" if value == -1 else str(value)
