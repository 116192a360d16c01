"""The launcher's tables as data, for a launcher that takes its own place: see `reexec`.

Descriptors are named by their numbers, which stay the same over exec. Read by newer code, so fields are
only ever added; STATE_VERSION changes when that is not enough.
"""

import base64
import socket
from typing import Any

from worker.launcher.capture import Capture
from worker.launcher.channel import Channel
from worker.launcher.container import Container
from worker.launcher.nursery import Heritage
from worker.launcher.protocol import CONFLICT, STREAMS, Refused
from worker.launcher.run import Host, Identity, Phase, Run
from worker.launcher.segments import SegmentWriter
from worker.launcher.spares import Shim

STATE_VERSION = 1


def container_state(container: Container) -> dict[str, Any]:
    """Refused when the container is in the middle of something that cannot be written down."""
    if container.phase not in (Phase.RUNNING, Phase.ENDED) or container.execs:
        doing = "executes a program" if container.execs else f"is {container.phase.value}"
        raise Refused(CONFLICT, f"{container.cid} {doing}")
    shim = container.shim
    if shim is not None and not shim.channel.idle:
        raise Refused(CONFLICT, f"{container.cid} has not been told all yet")
    return {
        "identity": container.identity._asdict(),
        "run": vars(container.run),
        "shim": None if shim is None else _shim_state(shim),
        "pipes": [_fd(container, name) for name in STREAMS],
        "lost": {name: list(writer.lost) for name, writer in container.writers.items()},
        "ending": container.ending.state(),
        "unwritten": container.unwritten,
    }


def _shim_state(shim: Shim) -> dict[str, Any]:
    pending = base64.b64encode(shim.channel.frames.pending).decode()
    return {"pid": shim.pid, "start": shim.start, "fd": shim.channel.fd, "pending": pending}


def _fd(container: Container, name: str) -> int:
    stream = container.streams.get(name)
    return -1 if stream is None else stream.fd


def descriptors(tables: dict[str, Any]) -> list[int]:
    """Every descriptor that the launcher's tables name."""
    fds = [*tables["held"].values()]
    fds += [port["fd"] for port in tables["ports"]]
    for container in tables["containers"]:
        fds += container["pipes"]
        if container["shim"] is not None:
            fds.append(container["shim"]["fd"])
    return [fd for fd in fds if fd >= 0]


def check_tables(tables: dict[str, Any]) -> None:
    """Raises an exception for tables that this code cannot go on with. Opens and changes nothing."""
    for port in tables["ports"]:
        _ = port["cid"], port["port"], port["fd"], port["lent"]
    for state in tables["containers"]:
        Identity(**state["identity"])
        _restore_run(Run(), state["run"])
        _ = state["lost"], state["unwritten"]
        if state["shim"] is not None:
            _ = (
                state["shim"]["pid"],
                state["ending"]["sent"],
                state["ending"]["killing"],
                state["ending"]["due"],
            )
            base64.b64decode(state["shim"]["pending"])
    descriptors(tables)
    _ = tables["facts"]["started_at_us"], tables["facts"]["files"]


def restore_container(state: dict[str, Any], host: Host, heritage: Heritage, capture: Capture) -> Container:
    """A container as it was, with its shim, its pipes and its deadlines."""
    identity = Identity(**state["identity"])
    writers = {name: _writer(capture, identity, name, *state["lost"].get(name, (0, 0))) for name in STREAMS}
    container = Container(host, identity, writers)
    _restore_run(container.run, state["run"])
    known = state["shim"]
    container.phase = Phase.ENDED if known is None else Phase.RUNNING
    if known is not None:
        channel = Channel(host.loop, socket.socket(fileno=known["fd"]), _unheard, _unheard)
        shim = Shim(heritage, known["pid"], channel, None)
        shim.pipes = tuple(state["pipes"])
        host.children.shims[shim.pid] = None
        container.attach(shim)
        container.ending.restore(state["ending"])
        channel.replay(base64.b64decode(known["pending"]))
    container.resume_writing(state["unwritten"])
    return container


def _restore_run(run: Run, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if hasattr(run, name):
            setattr(run, name, value)


def _writer(capture: Capture, identity: Identity, name: str, lost: int, kind: int) -> SegmentWriter:
    writer = capture.writer(identity.state_dir, name, identity.max_log_bytes)
    writer.load()
    writer.lost = (lost, kind)
    return writer


def _unheard(_: object) -> None:
    """Replaced before anything is heard."""
