"""The filters that hold words and numbers: whom a request is about, what kind of file, which socket.

Sources as in sbpl_patterns.py.
"""

from collections.abc import Callable, Sequence

from .sbpl_reader import Number, Rejected
from .sbpl_request import TARGETS, VNODE_TYPES, Request
from .sbpl_values import Filter, Given, Symbol, Values

TARGETED = ("signal", "process-info*", "mach-priv-task-port", "mach-task*", "mach-task-name",
             "process-codesigning", "process-codesigning-status*", "system-sched", "system-debug")  # fmt: skip
SOCKETS = ("system-socket", "network*", "socket-ioctl", "socket-option*")


def _vnode(request: Request, wanted: str) -> bool | None:
    given = request.argument.vnode
    if given is None:
        return None
    if wanted == "TTY" and given == "CHARACTER-DEVICE":
        return None
    return given == wanted or (given == "TTY" and wanted == "CHARACTER-DEVICE")


def _target(request: Request, wanted: str) -> bool | None:
    given = request.argument.target
    return None if given is None else TARGETS[given].get(wanted, False)


def _domain(request: Request, wanted: str) -> bool | None:
    given = request.argument.domain
    same = {"AF_LOCAL": "AF_UNIX"}
    return None if given is None else same.get(given, given) == same.get(wanted, wanted)


def _type(request: Request, wanted: str) -> bool | None:
    given = request.argument.type
    return None if given is None else given == wanted


def _undecided(_request: Request, _wanted: str) -> None:
    return None


_DOMAINS: tuple[str, ...] = ("AF_UNSPEC", "AF_UNIX", "AF_LOCAL", "AF_INET", "AF_ROUTE", "AF_LINK", "AF_INET6",
                             "AF_SYSTEM", "AF_NDRV", "AF_NETBIOS", "AF_PPP", "AF_UTUN", "AF_VSOCK")  # fmt: skip
_TYPES = ("SOCK_STREAM", "SOCK_DGRAM", "SOCK_RAW", "SOCK_RDM", "SOCK_SEQPACKET")
_OWNERS = ("self", "pgrp", "others", "children", "same-sandbox", "initproc")
_ATTRIBUTES = ("is-plugin", "is-installer", "is-restricted", "is-initproc", "is-platform-binary", "is-sandboxed",
               "is-apple-signed-executable")  # fmt: skip

# Filter: (test of one word, the words it takes, operations).
SYMBOLIC: dict[str, tuple[Callable[[Request, str], bool | None], Values, Values]] = {
    "vnode-type": (_vnode, VNODE_TYPES, ("file*", "network*", "process-exec*")),
    "target": (_target, _OWNERS, TARGETED),
    "socket-domain": (_domain, _DOMAINS, SOCKETS),
    "socket-type": (_type, _TYPES, SOCKETS),
    "semaphore-owner": (_undecided, _OWNERS, ("ipc-posix-sem*",)),
    "process-attribute": (_undecided, _ATTRIBUTES, ()),
}

_SIGNALS = """
HUP INT QUIT ILL TRAP ABRT EMT FPE KILL BUS SEGV SYS PIPE ALRM TERM URG STOP TSTP CONT CHLD TTIN TTOU IO XCPU
XFSZ VTALRM PROF WINCH INFO USR1 USR2
"""
SIGNALS: dict[str, int] = {f"SIG{name}": number for number, name in enumerate(_SIGNALS.split(), 1)}

# Filter: operations. Their argument is a number of the request's `number`, if it is not named here.
NUMERIC: dict[str, Values] = {
    "device-major": ("file*",),
    "device-minor": ("file*",),
    "file-mode": ("file*", "network*", "process-exec*"),
    "fsctl-command": ("system-fsctl",),
    "ioctl-command": ("file-ioctl", "socket-ioctl"),
    "iokit-method-number": ("iokit-external-method", "iokit-async-external-method"),
    "mac-syscall-number": ("system-mac-syscall",),
    "signal-number": ("signal",),
    "socket-protocol": SOCKETS,
    "syscall-number": ("syscall*",),
    "uid": (),
}


def build_symbolic(name: str, given: Sequence[Given], line: int) -> Filter:
    test, words, applies = SYMBOLIC[name]
    values = tuple(one.name for one in given if isinstance(one, Symbol))
    if not values or len(values) != len(given):
        raise Rejected(f"{name} expects names such as {words[0]}", line)
    for value in values:
        if value not in words:
            raise Rejected(f"{name} does not know {value}", line)

    def check(request: Request) -> bool | None:
        found = [test(request, value) for value in values]
        return True if True in found else None if None in found else False

    return Filter(
        name=name,
        text=f"({name} {' '.join(values)})",
        check=check,
        applies=applies,
        mode="word",
        values=values,
    )


def build_numeric(name: str, given: Sequence[Given], line: int) -> Filter:
    values: list[int] = []
    for one in given:
        if isinstance(one, Number):
            values.append(one.value)
        elif name == "signal-number" and isinstance(one, Symbol) and one.name in SIGNALS:
            values.append(SIGNALS[one.name])
        else:
            raise Rejected(f"{name} expects numbers", line)
    if not values:
        raise Rejected(f"{name} expects numbers", line)
    numbers = frozenset(values)

    def check(request: Request) -> bool | None:
        argument = request.argument
        if name == "file-mode":
            # Whether all of the bits are meant or any of them is unconfirmed for more than one bit.
            mode = argument.mode
            found = [None if mode is None else _has_bits(mode, wanted) for wanted in numbers]
            return True if True in found else None if None in found else False
        if name in ("device-major", "device-minor"):
            return None
        asked = argument.uid if name == "uid" else argument.number
        return None if asked is None else asked in numbers

    text = f"({name} {' '.join(str(number) for number in sorted(numbers))})"
    return Filter(name=name, text=text, check=check, applies=NUMERIC[name], mode="number")


def _has_bits(mode: int, wanted: int) -> bool | None:
    if mode & wanted == wanted and wanted:
        return True
    return False if mode & wanted == 0 and wanted else None
