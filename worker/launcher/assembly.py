"""The launcher's parts, built and wired: anew, or from the tables of the launcher before it."""

import os
import resource
import socket
import time
from typing import Any

from worker.launcher.capture import Capture
from worker.launcher.children import Children
from worker.launcher.container import Container, remove_group
from worker.launcher.control import Control
from worker.launcher.identity import Log, Place
from worker.launcher.launcher import Launcher
from worker.launcher.loop import Loop, Signals, handled_signals
from worker.launcher.mux import make_mux
from worker.launcher.nursery import Heritage
from worker.launcher.ports import Ports
from worker.launcher.processes import System
from worker.launcher.program import Inherited
from worker.launcher.protocol import PROTOCOL_MAX, PROTOCOL_MIN
from worker.launcher.reexec import Parts, Replacement
from worker.launcher.run import Groups, Host
from worker.launcher.sandbox import Sandboxes
from worker.launcher.segments import OpenFiles
from worker.launcher.spares import Spares
from worker.launcher.state import restore_container
from worker.launcher.timers import Timers

_MIN_OPEN_STREAMS = 64


def assemble(
    place: Place,
    listener: socket.socket,
    *,
    key_file: str,
    table: System,
    sandboxes: Sandboxes,
    arguments: list[str],
    build: str,
    log: Log,
    before: dict[str, Any] | None = None,
) -> tuple[Loop, Control]:
    """The loop of a launcher that owns `place` and listens already, and who speaks for it. `before` are the tables of
    one before it. `build` is what the worker calls this code.
    """
    signals = Signals()
    table.hide_memory()
    table.adopt_orphans()
    table.heed_hidden_signals()
    table.name_process("main")
    facts = _first_facts() if before is None else before["facts"]
    most = _raise_descriptor_limit(table)
    try:
        sandboxes.load()
    except ImportError as failure:
        log(f"no sandbox: {failure}")
    mux = make_mux()
    # A stream has two files and, with its pipe and its share of a shim's socket, three more descriptors.
    capture = Capture(mux, table, OpenFiles(max(_MIN_OPEN_STREAMS, most // 5)), log)
    loop = Loop(mux, capture, lambda bug, fd: _log_bug(log, bug, fd))
    children = Children(table, loop.timers)
    ports = Ports(loop.timers)
    control = Control(loop, listener, key_file, table, log)
    containers: dict[str, Container] = {}
    host = Host(
        loop=loop,
        table=table,
        capture=capture,
        ports=ports,
        children=children,
        log=log,
        tell=control.tell,
        drop=lambda cid: containers.pop(cid, None),
        groups=_open_groups(place, sandboxes, log),
    )
    heritage = Heritage(
        launcher=os.getpid(),
        inherited=Inherited(handled_signals(), tuple(facts["files"])),
        keep=(place.trees,),
        sandboxes=sandboxes,
        table=table,
    )
    if before is not None:
        _restore(before, host, heritage, containers)
    if host.groups is not None:
        _clear_leftovers(host.groups, {c.run.group for c in containers.values()}, loop.timers, log)
    spares = Spares(loop, children, heritage, log)
    replacement = Replacement(
        Parts(
            containers=containers,
            ports=ports,
            children=children,
            control=control,
            spares=spares,
            timers=loop.timers,
            arguments=arguments,
            facts=facts,
            held={"lock": place.lock, "trees": place.trees, "listener": listener.fileno()},
            unnamed_file=place.unnamed_file,
            log=log,
        )
    )
    own = table.find(os.getpid())
    described = {
        "build": build,
        "pid": os.getpid(),
        "start_time": 0 if own is None else own.start,
        "started_at_us": facts["started_at_us"],
        "cgroup": [] if host.groups is None else list(host.groups.controllers),
    }
    Launcher(host, control, signals, sandboxes, spares, containers, replacement, described, place.abandoned)
    place.describe({**described, "socket": place.socket, "protocol": [PROTOCOL_MIN, PROTOCOL_MAX]})
    return loop, control


def _open_groups(place: Place, sandboxes: Sandboxes, log: Log) -> Groups | None:
    """Named by the data directory, which no two launchers share."""
    found = os.fstat(place.lock)
    try:
        groups: Groups | None = sandboxes.groups(f"sandfleet-{found.st_dev:x}-{found.st_ino:x}")
    except OSError as failure:
        log(f"no control groups: {failure}")
        return None
    return groups


def _clear_leftovers(groups: Groups, known: set[str], timers: Timers, log: Log) -> None:
    """Take away the control groups of runs whose launcher is gone, with whoever still lives there."""
    for name in groups.names():
        group = groups.find(name)
        if name not in known and group is not None:
            group.kill()
            remove_group(group, timers, log)


def _first_facts() -> dict[str, Any]:
    """What only the first launcher of this process can know."""
    return {"started_at_us": time.time_ns() // 1000, "files": resource.getrlimit(resource.RLIMIT_NOFILE)}


def _restore(
    before: dict[str, Any], host: Host, heritage: Heritage, containers: dict[str, Container]
) -> None:
    for port in before["ports"]:
        sock = None if port["fd"] < 0 else socket.socket(fileno=port["fd"])
        host.ports.put(port["cid"], port["port"], sock, lent=port["lent"])
        if sock is None and not port["lent"]:
            host.ports.retake(port["cid"])
    for state in before["containers"]:
        container = restore_container(state, host, heritage, host.capture)
        containers[container.cid] = container


def _raise_descriptor_limit(table: System) -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = table.descriptor_limit()
    if most > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(most, soft)


def _log_bug(log: Log, bug: Exception, fd: int) -> None:
    """Where it happened, written out by hand: this must not import or open anything."""
    places = []
    step = bug.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        places.append(f"{os.path.basename(code.co_filename)}:{step.tb_lineno} {code.co_name}")
        step = step.tb_next
    log(f"bug, at descriptor {fd}: {type(bug).__name__}: {bug} ({' > '.join(places)})")
