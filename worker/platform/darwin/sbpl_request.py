"""What a profile is asked: the argument as users and JSON give it, and the request made of it."""

import msgspec

from . import sbpl_operations as operations
from .sbpl_network import Address, address
from .sbpl_paths import MAX_PATH_BYTES, folded, real_path

VNODE_TYPES = (
    "REGULAR-FILE",
    "DIRECTORY",
    "SYMLINK",
    "CHARACTER-DEVICE",
    "BLOCK-DEVICE",
    "SOCKET",
    "FIFO",
    "TTY",
)

TARGETS: dict[str, dict[str, bool | None]] = {
    "self": {"self": True, "pgrp": True, "same-sandbox": True, "others": False, "children": False},
    "children": {"children": True, "same-sandbox": True, "self": False, "pgrp": None, "others": None},
    "same-sandbox": {"same-sandbox": True, "self": None, "children": None, "pgrp": None, "others": None},
    "pgrp": {"pgrp": True, "self": False, "same-sandbox": None, "children": None, "others": None},
    "others": {"others": True, "self": False, "children": False, "same-sandbox": False, "pgrp": None},
    # Another container under an equal profile; that it counts as another sandbox is unconfirmed.
    "other-container": {"others": True, "self": False, "children": False, "same-sandbox": None, "pgrp": None},
    "initproc": {"initproc": True, "self": False, "children": False, "same-sandbox": False, "pgrp": False,
                 "others": None},
}  # fmt: skip
"""Whom a request is about: which `(target …)` match it. What is not listed does not match."""

NAME_KINDS = ("global", "local", "xpc")

# An access to one of these paths is to the link itself, not to where it leads.
_NOFOLLOW = frozenset({"file-read-metadata", "file-write-unlink"})

# Programs that macOS ships setuid; no custom sandbox may run them (CDX, BREW).
SETUID_PROGRAMS = frozenset({"/bin/ps", "/usr/bin/login", "/usr/bin/su", "/usr/bin/sudo", "/usr/bin/top"})


class Argument(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"class_": "class"}
):
    """What an operation is done to; each field where the operation has one.

    path      of a file, a program or a unix socket; the aliases /tmp, /var and /etc are resolved
    real      where `path` really leads, when a link of the user's is on the way
    vnode     one of `VNODE_TYPES`
    mode      permission bits of the file
    setuid    whether a program is setuid or setgid; without it, the system's own are known
    target    one of `TARGETS`, of signal, process-info* and the like
    name      of a service, sysctl, IPC object, attribute, property, domain, MAC policy, kernel control
    kind      of a mach name: `global` (the default), `local` or `xpc`
    class     of an IOKit object
    connection  of an IOKit object: the family it belongs to
    address   `127.0.0.1:80`, `[::1]:80`, `*:80`; the remote side of an outgoing connection, else the local
    protocol  `tcp` (the default) or `udp`
    domain, type, number   of a socket: `AF_SYSTEM`, `SOCK_STREAM`, its protocol; `number` also of a signal,
              a system call, an ioctl or fsctl command, a MAC call
    extensions   classes of the sandbox extensions that the process holds
    process, uid   the program that asks and its user
    """

    path: str | None = None
    real: str | None = None
    vnode: str | None = None
    mode: int | None = None
    setuid: bool | None = None
    target: str | None = None
    name: str | None = None
    kind: str | None = None
    class_: str | None = None
    connection: str | None = None
    address: str | None = None
    protocol: str | None = None
    domain: str | None = None
    type: str | None = None
    number: int | None = None
    extensions: tuple[str, ...] = ()
    process: str | None = None
    uid: int | None = None


class Unclear(Exception):
    """The question itself cannot be answered, whatever the profile says."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A question in the kernel's terms: `operation` canonical, `path` real, `address` parsed.

    `folded` is the path without regard to case and form.
    """

    operation: str
    argument: Argument
    path: str | None
    folded: str
    address: Address | None
    kind: str


def request(operation: str, argument: Argument) -> Request:
    """Unclear for an unknown operation and for a field that no request can have.

    A field that is missing makes the filters on it unknown.
    """
    if not operations.known(operation):
        raise Unclear(f"there is no operation {operation!r}")
    asked = operations.in_request(operation)
    if argument.vnode is not None and argument.vnode not in VNODE_TYPES:
        raise Unclear(f"{argument.vnode!r} is none of {', '.join(VNODE_TYPES)}")
    if argument.target is not None and argument.target not in TARGETS:
        raise Unclear(f"{argument.target!r} is none of {', '.join(TARGETS)}")
    if argument.kind is not None and argument.kind not in NAME_KINDS:
        raise Unclear(f"{argument.kind!r} is none of {', '.join(NAME_KINDS)}")
    for text in (argument.path, argument.real, argument.name, argument.class_, argument.connection):
        if text is not None and len(text.encode("utf-8", "surrogatepass")) > MAX_PATH_BYTES:
            raise Unclear(f"more than {MAX_PATH_BYTES} bytes are no path or name")
    path = _path(asked, argument)
    return Request(
        operation=asked,
        argument=argument,
        path=path,
        folded=folded(path or ""),
        address=_address(argument),
        kind=argument.kind or "global",
    )


def _path(asked: str, argument: Argument) -> str | None:
    path = argument.path if argument.real is None else argument.real
    if path is None:
        return None
    if not path.startswith("/") or "\0" in path:
        raise Unclear(f"{path!r} is not an absolute path")
    link = argument.vnode == "SYMLINK" or (argument.vnode is None and asked in _NOFOLLOW)
    return real_path(path, follow=not link)


def _address(argument: Argument) -> Address | None:
    if argument.address is None:
        return None
    try:
        return address(argument.address, argument.protocol)
    except ValueError as failure:
        raise Unclear(str(failure)) from failure
