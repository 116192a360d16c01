"""The launcher's beginning and end: arguments, daemon, locks, parts, loop."""

import os
import resource
import sys
import time
from typing import NamedTuple, NoReturn

from worker.launcher.capture import Capture
from worker.launcher.children import Children
from worker.launcher.container import Container
from worker.launcher.control import Control
from worker.launcher.identity import EXIT_ALREADY_RUNNING, AlreadyRunning, Place, log
from worker.launcher.launcher import Launcher
from worker.launcher.loop import Loop, Signals, handled_signals
from worker.launcher.mux import make_mux
from worker.launcher.nursery import Heritage
from worker.launcher.ports import Ports
from worker.launcher.processes import system
from worker.launcher.program import Inherited
from worker.launcher.protocol import BUILD, PROTOCOL_MAX, PROTOCOL_MIN
from worker.launcher.run import Host
from worker.launcher.sandbox import Sandboxes
from worker.launcher.segments import OpenFiles
from worker.launcher.spares import Spares

EXIT_USAGE, EXIT_FAILED = 2, 1

USAGE = (
    "usage: launcher --data-dir DIR --key-file FILE [--socket PATH] [--foreground] [--unsandboxed-for-tests]"
)


class Options(NamedTuple):
    data_dir: str
    key_file: str
    socket: str | None
    foreground: bool
    unsandboxed: bool


def parse(arguments: list[str]) -> Options:
    """ValueError with one line for what cannot be understood."""
    values: dict[str, str] = {}
    flags: set[str] = set()
    waiting = list(arguments)
    while waiting:
        name = waiting.pop(0)
        if name in ("--foreground", "--unsandboxed-for-tests"):
            flags.add(name)
        elif name in ("--data-dir", "--key-file", "--socket"):
            if not waiting:
                raise ValueError(f"{name} needs a value")
            values[name] = waiting.pop(0)
        else:
            raise ValueError(f"unknown argument {name!r}")
    for name in ("--data-dir", "--key-file"):
        if not values.get(name):
            raise ValueError(f"{name} is needed")
    return Options(
        data_dir=values["--data-dir"],
        key_file=os.path.abspath(values["--key-file"]),
        socket=values.get("--socket"),
        foreground="--foreground" in flags,
        unsandboxed="--unsandboxed-for-tests" in flags,
    )


def main(arguments: list[str]) -> int:
    try:
        options = parse(arguments)
    except ValueError as failure:
        print(f"{failure}\n{USAGE}", file=sys.stderr)
        return EXIT_USAGE
    place = Place(options.data_dir, options.socket)
    try:
        place.claim()
    except AlreadyRunning:
        print(f"a launcher runs for {place.data_dir} already", file=sys.stderr)
        return EXIT_ALREADY_RUNNING
    except OSError as failure:
        print(f"the launcher cannot use {place.data_dir}: {failure}", file=sys.stderr)
        return EXIT_FAILED
    if options.foreground:
        return serve(options, place, -1)
    ready, told = os.pipe()
    if os.fork():
        return _await_ready(ready, told)
    os.close(ready)
    os.setsid()
    os._exit(serve(options, place, told))


def _await_ready(ready: int, told: int) -> int:
    """The parent's part: end when the launcher listens, or say why it does not."""
    os.close(told)
    said = b""
    while chunk := os.read(ready, 4096):
        said += chunk
    if said == b"ready":
        return 0
    sys.stderr.write(said.decode(errors="replace") or "the launcher died while it started\n")
    return EXIT_FAILED


def serve(options: Options, place: Place, told: int) -> int:
    """Be the launcher. `told` is where the waiting parent listens, -1 without one."""
    try:
        loop = _build(options, place)
    except OSError as failure:
        _fail(told, f"the launcher cannot start in {place.data_dir}: {failure}\n")
    if told >= 0:
        os.write(told, b"ready")
        os.close(told)
    loop.run()
    place.leave()
    return 0


def _build(options: Options, place: Place) -> Loop:
    os.umask(0o077)
    os.environ.clear()
    _redirect(place, foreground=options.foreground)
    if not place.await_old_trees():
        log("processes of an earlier launcher are still alive; starting beside them")
    signals = Signals()
    table = system()
    table.hide_memory()
    table.adopt_orphans()
    table.name_process("main")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = table.descriptor_limit()
    if most > files[0]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, max(most, files[1])))
    sandboxes = Sandboxes(allow_none=options.unsandboxed)
    try:
        sandboxes.load()
    except ImportError as failure:
        log(f"no sandbox: {failure}")
    mux = make_mux()
    capture = Capture(mux, table, OpenFiles(max(64, most // 4)), log)
    loop = Loop(mux, capture, _on_bug)
    listener = place.listen()
    control = Control(loop, listener, options.key_file, table, log)
    children = Children(table, loop.timers)
    heritage = Heritage(
        launcher=os.getpid(),
        inherited=Inherited(handled_signals(), files),
        keep=(place.trees,),
        sandboxes=sandboxes,
        table=table,
    )
    spares = Spares(loop, children, heritage, log)
    containers: dict[str, Container] = {}
    host = Host(
        loop=loop,
        table=table,
        capture=capture,
        ports=Ports(loop.timers),
        children=children,
        log=log,
        tell=control.tell,
        drop=lambda cid: containers.pop(cid, None),
    )
    Launcher(host, control, signals, sandboxes, spares, containers, place.abandoned)
    own = table.find(os.getpid())
    place.describe(
        {
            "pid": os.getpid(),
            "start_time": 0 if own is None else own.start,
            "socket": place.socket,
            "protocol": [PROTOCOL_MIN, PROTOCOL_MAX],
            "build": BUILD,
            "started_at_us": time.time_ns() // 1000,
        }
    )
    return loop


def _redirect(place: Place, *, foreground: bool) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if not foreground:
        out = place.open_log()
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.close(out)


def _fail(told: int, text: str) -> NoReturn:
    os.write(2 if told < 0 else told, text.encode(errors="replace"))
    os._exit(EXIT_FAILED)


def _on_bug(bug: Exception, fd: int) -> None:
    import traceback

    log(f"bug, at descriptor {fd}: " + "".join(traceback.format_exception(bug)))
