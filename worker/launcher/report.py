"""The channel through which a child tells its shim how it gets on, from the fork to the exec.

Where the sandbox may ask the shim later (see `worker.platform.linux.gate`), it is a socket, because the child hands
the listener over, with what to answer by; elsewhere a pipe.
"""

import os
import re
import socket

_READ_BYTES = 256 * 1024
_PLACE = re.compile(rb"@(\d+) (\d+)")
# How many the kernel lets one message have (SCM_MAX_FD), and that more come with the next.
_MAX_DESCRIPTORS = 253
MORE = b"&"


def report_ends(sockets: bool) -> tuple[int, int]:
    """(the shim's end, the child's)."""
    if not sockets:
        return os.pipe()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return ours.detach(), theirs.detach()


def hand_over(report: int, descriptors: list[int], words: bytes) -> None:
    """Give the shim a listener, and what else it needs to answer it; they are closed here. OSError."""
    sock = _socket(report)
    try:
        for at in range(0, len(descriptors), _MAX_DESCRIPTORS):
            last = at + _MAX_DESCRIPTORS >= len(descriptors)
            socket.send_fds(sock, [words if last else MORE], descriptors[at : at + _MAX_DESCRIPTORS])
    finally:
        sock.detach()
        for fd in descriptors:
            os.close(fd)


def give_place(report: int, init: int, program: int, namespaces: list[int]) -> None:
    """Tell that others take the child's place: what holds a new container together, and the program.

    With it go the descriptors of a new container's namespaces.
    """
    sock = _socket(report)
    try:
        socket.send_fds(sock, [b"@%d %d" % (init, program)], namespaces)
    finally:
        sock.detach()


def taken_place(said: bytes) -> tuple[int, int] | None:
    """The two numbers, if that was told."""
    found = _PLACE.fullmatch(said)
    return None if found is None else (int(found[1]), int(found[2]))


def read_report_end(report: int, sockets: bool) -> tuple[bytes, list[int]]:
    """What the child said, with the descriptors that came along; b"" at the end.

    They are those of `hand_over`, or the namespaces of `give_place`.
    """
    if not sockets:
        return os.read(report, _READ_BYTES), []
    sock = _socket(report)
    try:
        said, descriptors, _, _ = socket.recv_fds(sock, _READ_BYTES, _MAX_DESCRIPTORS)
    finally:
        sock.detach()
    for fd in descriptors:
        os.set_inheritable(fd, False)
    return said, list(descriptors)


def _socket(report: int) -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, report)
