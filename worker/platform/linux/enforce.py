"""Carries out a plan made by the Linux driver. Standard library only.

A plan is data: `{"version": 1, "platform": "linux", "steps": [[name, argument], …]}`. The steps are done in
their order, and it matters: limits are raised and groups dropped while there are capabilities; the filter
that refuses further such calls comes last.

rlimits         [[name, soft, hard, cap], …]: a name as in setrlimit(2), lower case, without RLIMIT_; -1 is
                infinity; with `cap`, no higher than this process may go
keyring         a session keyring of its own; planned where no filter refuses the calls for keyrings
groups          no supplementary groups
user            [uid, gid]: this user from here on, and of this group alone
capabilities    none in any set, and none to be gained
no_new_privs
dumpable        off until exec: no other process looks into the copy of the launcher that this still is
landlock        {system: [[path, access], …], paths: [[path, access], …], ports: [[port, access], …], net,
                own_proc}: access is letters of `landlock`; system paths may be missing; `net` are the
                letters that are restricted at all; with `own_proc` the program may read its own part of
                /proc
seccomp         {inet, unix, fastopen, ipc, truncate, gate, ports}, see `seccomp.Options`

A plan may have a `root` beside its steps (see `rooted`): then `enter` comes first, and the rest is for the process
that it returns in. `prepare` works out the calls of a plan, `apply` makes them in the child; a failing step raises
EnforceError, and the child must then not exec. Two more make starts cheap, and nothing depends on them:
`settle`, once in the launcher, and `ahead`, in a child that waits for its plan.
"""

import os
import resource
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from . import cgroups, landlock, privileges, relay, rooted, seccomp, system
from .gate import Gate
from .libc import O_PATH, prctl
from .netgate import NetGate, Outside
from .netrules import Ports
from .notify import Listener

PLAN_VERSION = 1

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38

# Descriptors that keep the kernel's entries for files in /proc alive. Landlock knows a file by its inode,
# and procfs makes a new inode whenever an entry was dropped from the cache: after memory ran short, a rule
# for /proc/meminfo would hold no more. Measured by dropping the cache.
_held: dict[str, int] = {}
_settled = False
# A ruleset with what most plans have in common.
_ahead: "Ahead | None" = None


class EnforceError(Exception):
    """A step that failed. `detail` names its object (a path, a limit) where there is one."""

    def __init__(self, step: str, number: int, detail: str) -> None:
        super().__init__(f"{step}: {detail}")
        self.step = step
        self.errno = number
        self.detail = detail


class Call(NamedTuple):
    """One call that the child makes: of a step of the plan, with everything worked out beforehand.

    A fork's first use of any page of the interpreter costs it a copy, so the child shall do little.
    """

    step: str
    function: Callable[..., object]
    arguments: tuple[Any, ...]


class Prepared(NamedTuple):
    """A plan ready to be applied to every process of one container. `close` it when no more will start."""

    calls: tuple[Call, ...]
    rulesets: tuple[int, ...]

    def close(self) -> None:
        for ruleset in self.rulesets:
            os.close(ruleset)


class Ahead(NamedTuple):
    """A ruleset with the system's paths, of use to the process `pid` alone, see `ahead`."""

    pid: int
    system: system.System
    ruleset: int


def settle() -> None:
    """Do once, in the launcher before its first fork, what every child inherits.

    An empty bounding set and a session keyring of the launcher's own; the usual filters; and the files of
    /proc that every container may read are held, as long as the launcher lives.
    """
    global _settled
    privileges.empty_bounding_set(keep_over_exec=True)
    machine = seccomp.machine()
    if machine is not None:
        privileges.new_session_keyring(machine)
        for options in seccomp.USUAL:
            seccomp.assemble(options, machine)
    _hold(path for path, _ in _paths(system.system()))
    _settled = True


def ahead(kind: dict[str, Any] | None = None, tell: rooted.Tell | None = None) -> None:
    """Make the greater part of a ruleset now, in a settled process that will be given one plan.

    For a plan with a root of `kind` its namespaces instead, see `rooted.ahead`: this returns in another process.

    Not for one that forks containers: they would share the ruleset, and each would be let into the others'
    folders, so that a fork does not use it. What fails here is left to `prepare`, which tells of it.
    """
    global _ahead
    version = landlock.abi()
    if kind is not None and tell is not None:
        rooted.ahead(kind, tell)
        if _settled and version:
            _rehearse(version)
        return
    if not _settled or version == 0 or _ahead is not None:
        return
    ruleset = landlock.file_rules(version)
    try:
        found = system.system()
        landlock.allow_paths(ruleset, _paths(found), version, missing_ok=True)
        _rehearse(version)
        _ahead = Ahead(os.getpid(), found, ruleset)
    except (OSError, EnforceError):
        os.close(ruleset)


def _rehearse(version: int) -> None:
    prepare(_rehearsal(version)).close()


def _rehearsal(version: int) -> dict[str, Any]:
    """A plan like any other: preparing it copies the pages of the interpreter that the real one will need."""
    net = "bc" if version >= 4 else ""
    rules = {"system": [], "paths": [["/", "rwx"]], "ports": [[1, net]], "net": net, "own_proc": True}
    steps: list[list[Any]] = [["rlimits", [["core", 0, 0, False]]], ["groups", None], ["capabilities", None]]
    steps += [["no_new_privs", None], ["dumpable", None], ["landlock", rules]]
    if seccomp.machine() is not None:
        steps.append(["seccomp", {}])
    return {"version": PLAN_VERSION, "steps": steps}


def prepare(plan: dict[str, Any]) -> Prepared:
    """Work out the calls of a plan, its rulesets and its filter.

    Rules hold for the files that their paths name now: prepare again for folders that were made anew.
    """
    if plan.get("version") != PLAN_VERSION:
        raise EnforceError("plan", 0, f"version {plan.get('version')} is not one that this launcher knows")
    calls: list[Call] = []
    rulesets: list[int] = []
    try:
        for name, argument in plan["steps"]:
            if name == "landlock":
                calls += _landlock(argument, rulesets)
            else:
                calls += _calls(name, argument)
    except BaseException as error:
        for ruleset in rulesets:
            os.close(ruleset)
        if isinstance(error, OSError):
            raise _failed(name, error) from error
        raise
    return Prepared(tuple(calls), tuple(rulesets))


def enter(plan: dict[str, Any], namespaces: Sequence[int], tell: rooted.Tell) -> None:
    """Go into the root of a plan that has one: a new one, or that of these namespaces; see `rooted`."""
    if namespaces:
        rooted.join(plan["root"], namespaces, tell)
    else:
        rooted.enter(plan["root"], tell)


def apply(plan: dict[str, Any], prepared: Prepared | None = None) -> int | None:
    """Confine this process for good. To be called between fork and exec, by a process of one thread.

    Gives the listener of a filter that asks: somebody outside must answer it, with `open_gate`.
    """
    ready = prepare(plan) if prepared is None else prepared
    listener = None
    for step, function, arguments in ready.calls:
        try:
            given = function(*arguments)
        except OSError as error:
            raise _failed(step, error) from error
        if step == "seccomp" and isinstance(given, int):
            listener = given
    return listener


def open_groups(name: str) -> cgroups.Cgroups | None:
    """The control groups of this launcher, in a folder of that name; None where it may make none. OSError."""
    place = cgroups.delegated_here()
    if place is None or not place.controllers:
        return None
    return cgroups.Cgroups.open(place.base, name)


def questions(plan: dict[str, Any], joined: bool) -> tuple[list[int], bytes]:
    """What `open_gate` needs beside the listener that `apply` will give: descriptors and words.

    To be called in the same process, while it may still bind any port; `joined` in one that has joined a container.
    OSError.
    """
    path = os.fsencode(plan.get("gate", ""))
    if "ports" not in plan:
        return [], path
    ports = Ports.of_plan(plan["ports"])
    return [] if joined else relay.sockets(ports), path + b"\0" + ports.packed()


def open_gate(descriptors: Sequence[int], words: bytes, first: Any = None) -> Gate | NetGate:
    """Who answers a listener, the first of the descriptors, for programs that may ask what `words` say.

    The rest of them, and the words, are those of `questions`; `first` is the first gate of the same container.
    """
    listener = Listener(descriptors[0])
    path, separated, packed = words.partition(b"\0")
    api = Gate(listener, path) if path else None
    if not separated:
        return Gate(listener, path)
    outside = first.outside if isinstance(first, NetGate) else Outside(Ports.unpack(packed))
    return NetGate(listener, outside, api, descriptors[1:])


def hold_process(pid: int) -> int:
    """A descriptor to keep while the program `pid` lives, so that it can always read its own part of /proc.

    For the reason given at `_held`; to be opened by the program's parent before the program execs.
    """
    return os.open(f"/proc/{pid}", O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _calls(name: str, argument: Any) -> list[Call]:
    if name == "rlimits":
        return [Call(name, _set_limit, (_limit(limit[0]), *limit)) for limit in argument]
    if name == "keyring":
        return [Call(name, privileges.new_session_keyring, (_machine(name),))]
    if name == "groups":
        return [Call(name, os.setgroups, ([],))] if os.getgroups() else []
    if name == "user":
        uid, gid = argument
        change = Call(name, privileges.become, (uid, gid, privileges.may_lock_bits()))
        return [Call(name, privileges.own_output, (uid, gid)), change]
    if name == "capabilities":
        emptied = [] if _settled else [Call(name, privileges.empty_bounding_set, ())]
        return [*emptied, Call(name, privileges.drop_capabilities, (privileges.may_lock_bits(),))]
    if name == "no_new_privs":
        return [Call(name, prctl, (_PR_SET_NO_NEW_PRIVS, 1))]
    if name == "dumpable":
        return [Call(name, prctl, (_PR_SET_DUMPABLE, 0))]
    if name == "seccomp":
        machine = _machine(name)
        options = seccomp.Options(**argument)
        program = seccomp.program(seccomp.assemble(options, machine))
        return [Call(name, seccomp.install, (program, machine, options.asks))]
    raise EnforceError(name, 0, "not a step that this launcher knows")


def _landlock(argument: dict[str, Any], rulesets: list[int]) -> list[Call]:
    """Two layers: what is denied by either is denied. Every ruleset made is added to `rulesets`."""
    version = landlock.abi()
    paths = tuple((path, access) for path, access in argument["system"])
    _hold(path for path, _ in paths)
    files = _take_ahead(paths)
    if files is not None:
        rulesets.append(files)
    else:
        files = landlock.file_rules(version)
        rulesets.append(files)
        landlock.allow_paths(files, paths, version, missing_ok=True)
    landlock.allow_paths(files, argument["paths"], version)
    calls = [Call("landlock", landlock.restrict, (files,))]
    if argument["own_proc"]:
        mask = landlock.access_mask("r", version, directory=True)
        calls.insert(0, Call("landlock", _allow_own_proc, (files, mask)))
    if argument["net"]:
        ports = landlock.port_rules(argument["net"], argument["ports"])
        rulesets.append(ports)
        calls.append(Call("landlock", landlock.restrict, (ports,)))
    return calls


def _take_ahead(paths: tuple[tuple[str, str], ...]) -> int | None:
    """The ruleset made ahead, if it is this process's, for just these paths, and they name the same files."""
    global _ahead
    if _ahead is None:
        return None
    found, _ahead = _ahead, None
    if found.pid == os.getpid() and _paths(found.system) == paths and not system.stale_at_start(found.system):
        return found.ruleset
    os.close(found.ruleset)
    return None


def _paths(found: system.System) -> tuple[tuple[str, str], ...]:
    return tuple((rule.path, rule.access) for rule in found.rules)


def _allow_own_proc(ruleset: int, mask: int) -> None:
    """Let the program read its own /proc folder; the ruleset is its container's own.

    The descriptor stays open until exec, so that `hold_process` finds the same entry.
    """
    own = os.open("/proc/self", O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    landlock.allow_descriptor(ruleset, own, mask)


def _limit(name: str) -> int:
    number = getattr(resource, f"RLIMIT_{name.upper()}", None)
    if not isinstance(number, int):
        raise EnforceError("rlimits", 0, f"this system has no limit named {name}")
    return number


def _set_limit(number: int, name: str, soft: int, hard: int, cap: bool) -> None:
    try:
        resource.setrlimit(number, (soft, hard))
    except ValueError as error:  # EINVAL, or EPERM: only root may raise a hard limit, and not without end
        _, ceiling = resource.getrlimit(number)
        if not cap or hard <= ceiling:
            raise EnforceError("rlimits", 1, f"{name} {soft}:{hard}: {error}") from error
        resource.setrlimit(number, (min(soft, ceiling), ceiling))


def _hold(paths: Iterable[str]) -> None:
    for path in paths:
        if path.startswith("/proc/") and path not in _held:
            try:
                _held[path] = os.open(path, O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue


def _machine(step: str) -> str:
    machine = seccomp.machine()
    if machine is None:
        raise EnforceError(step, 0, "no system-call filter for this kind of machine")
    return machine


def _failed(step: str, error: OSError) -> EnforceError:
    reason = error.strerror or str(error)
    detail = f"{error.filename}: {reason}" if error.filename else reason
    return EnforceError(step, error.errno or 0, detail)
