"""The launcher's beginning and end: arguments, daemon, locks, loop."""

import os
import socket
import stat
import sys
from typing import Any, NamedTuple

from worker.launcher.assembly import assemble
from worker.launcher.control import Control
from worker.launcher.identity import EXIT_ALREADY_RUNNING, AlreadyRunning, Log, Place
from worker.launcher.loop import Loop
from worker.launcher.processes import System, system
from worker.launcher.reexec import BUILD, read_tables
from worker.launcher.sandbox import Sandboxes
from worker.launcher.state import STATE_VERSION, check_tables, descriptors

EXIT_USAGE, EXIT_FAILED = 2, 1

_READY = b"ready"

USAGE = (
    "usage: launcher --data-dir DIR --key-file FILE [--socket PATH] [--build ID] [--foreground]"
    " [--unsandboxed-for-tests]"
)
_FLAGS = ("--foreground", "--unsandboxed-for-tests")
_VALUES = ("--data-dir", "--key-file", "--socket", BUILD, "--resume")


class Machine(NamedTuple):
    """What the launcher knows processes by, and a platform's name with what carries out its plans (None: this
    system's).
    """

    table: System
    enforcement: tuple[str, Any] | None = None


class Options(NamedTuple):
    """`resume` is the descriptor of the tables that a launcher before us, in this very process, left. `build` is
    what the worker that started us calls our code.
    """

    data_dir: str
    key_file: str
    socket: str | None
    foreground: bool
    unsandboxed: bool
    resume: int | None
    build: str
    arguments: list[str]


def parse(arguments: list[str]) -> Options:
    """ValueError with one line for what cannot be understood."""
    values: dict[str, str] = {}
    flags: set[str] = set()
    kept: list[str] = []
    waiting = list(arguments)
    while waiting:
        name = waiting.pop(0)
        if name in _FLAGS:
            flags.add(name)
            kept.append(name)
        elif name in _VALUES:
            if not waiting:
                raise ValueError(f"{name} needs a value")
            values[name] = waiting.pop(0)
            if name != "--resume":
                kept += [name, values[name]]
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
        resume=int(values["--resume"]) if "--resume" in values else None,
        build=values.get(BUILD, ""),
        arguments=kept,
    )


def main(arguments: list[str], machine: Machine | None = None) -> int:
    """`machine` is this one unless a caller brings another."""
    if arguments[:1] == ["--self-test"]:
        return self_test(arguments[1:])
    try:
        options = parse(arguments)
    except ValueError as failure:
        print(f"{failure}\n{USAGE}", file=sys.stderr)
        return EXIT_USAGE
    place = Place(options.data_dir, options.socket)
    host = Machine(system()) if machine is None else machine
    if options.resume is not None:
        return resume(options, place, host, options.resume)
    try:
        place.claim()
    except AlreadyRunning:
        print(f"a launcher runs for {place.data_dir} already", file=sys.stderr)
        return EXIT_ALREADY_RUNNING
    except OSError as failure:
        print(f"the launcher cannot use {place.data_dir}: {failure}", file=sys.stderr)
        return EXIT_FAILED
    if options.foreground:
        return serve(options, place, host, 2)
    ready, told = os.pipe()
    if os.fork():
        os._exit(_await_ready(ready, told))  # nothing here needs to be put in order
    os.close(ready)
    os.setsid()
    os._exit(serve(options, place, host, told))


def self_test(versions: list[str]) -> int:
    """Whether this code runs here, and reads the tables of a launcher that writes this version of them.

    That launcher leaves them on descriptor 0: what cannot be made of them now would be missed after the exec.
    """
    Sandboxes().load()
    if versions != [str(STATE_VERSION)]:
        return EXIT_FAILED
    if stat.S_ISREG(os.fstat(0).st_mode):  # an older launcher leaves none
        check_tables(read_tables(0))
    return 0


def _await_ready(ready: int, told: int) -> int:
    """The parent's part: end when the launcher listens, or say why it does not."""
    os.close(told)
    said = b""
    # Not to its end: children of the launcher may hold the pipe a moment longer.
    while said != _READY and (chunk := os.read(ready, 4096)):
        said += chunk
    if said == _READY:
        return 0
    os.write(2, said or b"the launcher died while it started\n")
    return EXIT_FAILED


def serve(options: Options, place: Place, host: Machine, told: int) -> int:
    """Be the launcher. `told` is where it says that it is ready, or why it cannot be."""
    try:
        _become_quiet(place, foreground=options.foreground)
        if not place.await_old_trees():
            _log(options)("processes of an earlier launcher are still alive; starting beside them")
        parts = _assemble(options, place, host, place.listen(), None)
    except OSError as failure:
        text = f"the launcher cannot start in {place.data_dir}: {failure}\n"
        os.write(told, text.encode(errors="replace"))
        return EXIT_FAILED
    if not options.foreground:
        os.write(told, _READY)
        os.close(told)
    _run(place, *parts)
    return 0


def resume(options: Options, place: Place, host: Machine, tables: int) -> int:
    """Be the launcher that this process was before its exec."""
    before = read_tables(tables)
    held = before["held"]
    place.lock, place.trees = held["lock"], held["trees"]
    for fd in descriptors(before):
        os.set_inheritable(fd, False)
    os.umask(0o077)
    os.environ.clear()
    parts = _assemble(options, place, host, socket.socket(fileno=held["listener"]), before)
    _log(options)("replaced by newer code")
    _run(place, *parts)
    return 0


def _run(place: Place, loop: Loop, control: Control) -> None:
    """Until the end, the leave-taking included: whoever learns of it then may start another launcher at once."""
    loop.run()
    place.leave()
    control.part()


def _assemble(
    options: Options, place: Place, host: Machine, listener: socket.socket, before: dict[str, Any] | None
) -> tuple[Loop, Control]:
    return assemble(
        place,
        listener,
        key_file=options.key_file,
        table=host.table,
        sandboxes=Sandboxes(allow_none=options.unsandboxed, enforcement=host.enforcement),
        arguments=options.arguments,
        build=options.build,
        log=_log(options),
        before=before,
    )


def _log(options: Options) -> Log:
    return Log(bounded=not options.foreground)


def _become_quiet(place: Place, *, foreground: bool) -> None:
    """Nothing of whoever started us: its environment, its files, its umask."""
    os.umask(0o077)
    os.environ.clear()
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if not foreground:
        out = place.open_log()
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.close(out)
