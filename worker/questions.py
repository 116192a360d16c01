"""Questions to a sandbox: plain words (`read /etc/hosts`, `connect localhost:5432`) and raw operations.

A plain question means the same on every platform; `requests` says it in the operations of Seatbelt, and
`linux_ruling` (worker.answers) in those of Linux. A raw one is an operation of the platform itself, its
argument written as one word. Pure.
"""

import ipaddress
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

from schemas.errors import ContractError, InvalidCommand
from schemas.strict import strict_json, to_struct
from worker.platform.darwin.evaluate import Argument

PLAIN = ("read", "write", "exec", "connect", "bind", "lookup", "gpu")
WRITTEN: dict[str, str] = {
    "read": "PATH",
    "write": "PATH",
    "exec": "PATH",
    "connect": "HOST:PORT or a socket's PATH",
    "bind": "PORT, HOST:PORT or a socket's PATH",
    "lookup": "SERVICE",
}

MAX_ARGUMENT = 4096
# Stands for any address that is not this machine's (RFC 5737).
ELSEWHERE = "198.51.100.1"
RESOLVER = "/private/var/run/mDNSResponder"
GPU_CLIENT = "AGXDeviceUserClient"
GPU_COMPILER = "com.apple.MTLCompilerService"

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_-]+)*\.?")
_KINDS = ("global", "local", "xpc")

Canonical = Callable[[str], str]
Request = tuple[str, Argument]


class FileQuestion(msgspec.Struct, frozen=True):
    word: Literal["read", "write", "exec"]
    path: str


class SocketQuestion(msgspec.Struct, frozen=True):
    """A unix socket by its path: to connect to it, or to serve it."""

    word: Literal["connect", "bind"]
    path: str


class PortQuestion(msgspec.Struct, frozen=True):
    """`host` is `localhost`, an IP address as written without brackets, `*` (bind: any) or a name."""

    word: Literal["connect", "bind"]
    host: str
    port: int
    udp: bool = False

    @property
    def named(self) -> bool:
        """Whether the host has to be looked up first."""
        return self.host not in ("localhost", "*") and _address(self.host) is None

    @property
    def local(self) -> bool:
        """Whether it is this machine, as the `localhost` of a sandbox rule."""
        address = _address(self.host)
        return self.host == "localhost" or (address is not None and address.is_loopback)


class LookupQuestion(msgspec.Struct, frozen=True):
    """A Mach service. `kind`: `global`, `local` or `xpc`; each is a lookup of its own."""

    name: str
    kind: str = "global"


class GpuQuestion(msgspec.Struct, frozen=True):
    """Opening the GPU and compiling for it."""


class RawQuestion(msgspec.Struct, frozen=True):
    operation: str
    argument: str | None = None


Plain = FileQuestion | SocketQuestion | PortQuestion | LookupQuestion | GpuQuestion
Question = Plain | RawQuestion


class Answer(NamedTuple):
    """`rule` is a line of the profile's text, the `line`th from 1; both null where no line decides."""

    decision: str
    rule: str | None
    line: int | None
    reason: str


def parse_question(operation: str, argument: str | None, canonical: Canonical) -> Question:
    """What is asked. InvalidCommand, its field `operation` or `argument`.

    `canonical` gives the form of an absolute path that the platform's rules are about.
    """
    if argument is not None and len(argument) > MAX_ARGUMENT:
        raise InvalidCommand(f"longer than {MAX_ARGUMENT} characters", field="argument")
    if argument is not None and _CONTROL.search(argument):
        raise InvalidCommand("must not hold control characters", field="argument")
    if operation not in PLAIN:
        return RawQuestion(operation, argument or None)
    if operation == "gpu":
        if argument:
            raise InvalidCommand("gpu takes no argument", field="argument")
        return GpuQuestion()
    if not argument:
        raise InvalidCommand(f"missing: {operation} takes {WRITTEN[operation]}", field="argument")
    match operation:
        case "read" | "write" | "exec":
            return FileQuestion(operation, as_path(argument, canonical))
        case "lookup":
            return LookupQuestion(*service_name(argument))
    word: Literal["connect", "bind"] = "connect" if operation == "connect" else "bind"
    if argument.startswith(("/", "unix:")):
        return SocketQuestion(word, as_path(argument.removeprefix("unix:"), canonical))
    return _port_question(word, argument)


def as_path(text: str, canonical: Canonical) -> str:
    try:
        return canonical(text)
    except ContractError as failure:
        raise InvalidCommand(failure.message, field="argument") from None


def service_name(text: str) -> tuple[str, str]:
    """(name, kind) of `NAME`, `local:NAME` or `xpc:NAME`."""
    kind, colon, name = text.partition(":")
    if colon and kind in _KINDS and name:
        return name, kind
    return text, "global"


def _port_question(word: Literal["connect", "bind"], text: str) -> PortQuestion:
    place, slash, protocol = text.partition("/")
    if slash and protocol not in ("tcp", "udp"):
        raise InvalidCommand(f"{protocol!r} is neither tcp nor udp", field="argument")
    host, _, number = place.rpartition(":")
    if not host:
        if word == "connect":
            raise InvalidCommand("write HOST:PORT, as in localhost:5432", field="argument")
        host = "*"
    if not (number.isascii() and number.isdecimal() and len(number) <= 5 and int(number) <= 65535):
        raise InvalidCommand(f"{number!r} is no port", field="argument")
    port = int(number)
    if port == 0 and word == "connect":
        raise InvalidCommand("nothing listens on port 0", field="argument")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if _address(host) is None:
            raise InvalidCommand(f"[{host}] is no IPv6 address", field="argument")
    elif host != "*" and _address(host) is None and not _HOST_NAME.fullmatch(host):
        raise InvalidCommand(f"{host!r} is neither a host name nor an address", field="argument")
    if host == "*" and word == "connect":
        raise InvalidCommand("connect to an address or a name, not to *", field="argument")
    if word == "bind" and host not in ("*", "localhost") and _address(host) is None:
        raise InvalidCommand("a port is bound on *, localhost or an address", field="argument")
    return PortQuestion(word, host.lower() if host.lower() == "localhost" else host, port, protocol == "udp")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


# -- in the operations of Seatbelt


def requests(question: Question) -> tuple[Request, ...]:
    """What macOS asks the profile when a program does this; each must be allowed."""
    match question:
        case FileQuestion(word="read", path=path):
            return (("file-read-data", Argument(path=path, vnode=_vnode(path))),)
        case FileQuestion(word="write", path=path):
            return (("file-write-data", Argument(path=path, vnode=_vnode(path))),)
        case FileQuestion(path=path):
            program = Argument(path=path, vnode="REGULAR-FILE")
            operations = ("process-exec", "file-map-executable", "file-read-data")
            return tuple((operation, program) for operation in operations)
        case SocketQuestion(word=word, path=path):
            operation = "network-outbound" if word == "connect" else "network-bind"
            return ((operation, Argument(path=path, vnode="SOCKET")),)
        case PortQuestion():
            return _port_requests(question)
        case LookupQuestion(name=name, kind=kind):
            return (("mach-lookup", Argument(name=name, kind=kind)),)
        case GpuQuestion():
            return (
                ("iokit-open-user-client", Argument(class_=GPU_CLIENT)),
                ("mach-lookup", Argument(name=GPU_COMPILER, kind="global")),
            )
    return ((question.operation, raw_argument(question.operation, question.argument)),)


def _port_requests(question: PortQuestion) -> tuple[Request, ...]:
    protocol = "udp" if question.udp else "tcp"
    hosts = ["127.0.0.1", "::1"] if question.host == "localhost" else [question.host]
    if question.named:
        hosts = [ELSEWHERE]
    operations = ("network-outbound",) if question.word == "connect" else ("network-bind", "network-inbound")
    if question.word == "bind" and question.udp:
        operations = ("network-bind",)  # nobody listens on a datagram socket
    asked = [
        (operation, Argument(address=_text(host, question.port), protocol=protocol))
        for operation in operations
        for host in hosts
    ]
    if question.named:
        asked.append(("network-outbound", Argument(path=RESOLVER, vnode="SOCKET")))
    return tuple(asked)


def _text(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _vnode(path: str) -> str:
    """The kind of file that a path most likely names; a profile may ask for it."""
    if path == "/" or path == "/dev/fd":
        return "DIRECTORY"
    return "CHARACTER-DEVICE" if path.startswith("/dev/") else "REGULAR-FILE"


def raw_argument(operation: str, text: str | None) -> Argument:
    """The argument of a raw operation: one word, in the field that its filters look at, or a JSON object.

    InvalidCommand for an object that is none.
    """
    if text is None:
        return Argument()
    if text.startswith("{"):
        try:
            given = strict_json(text.encode("utf-8", "surrogatepass"), MAX_ARGUMENT * 4, error=InvalidCommand)
        except InvalidCommand as failure:
            raise InvalidCommand(failure.message, field=failure.field or "argument") from None
        return to_struct(given, Argument, field="argument", error=InvalidCommand)
    family = operation.split("-")[0].rstrip("*")
    if operation.startswith("process-exec") or family in ("file", "lsopen"):
        return Argument(path=text)
    if family == "network":
        if text.startswith(("/", "unix:")):
            return Argument(path=text.removeprefix("unix:"))
        place, _, protocol = text.partition("/")
        return Argument(address=place, protocol=protocol or None)
    if operation == "signal" or operation.startswith(("process-info", "mach-priv", "mach-task")):
        return Argument(target=text)
    if family == "mach":
        name, kind = service_name(text)
        return Argument(name=name, kind=kind)
    if family == "iokit" and "open" in operation:
        return Argument(class_=text)
    if operation == "system-socket":
        return Argument(domain=text)
    if text.isascii() and text.isdecimal() and "syscall" in operation:
        return Argument(number=int(text))
    return Argument(name=text)


def spoken(question: Question) -> str:
    """The question as a person would write it."""
    match question:
        case FileQuestion(word=word, path=path) | SocketQuestion(word=word, path=path):
            return f"{word} {path}"
        case PortQuestion(word=word, host=host, port=port, udp=udp):
            place = str(port) if host == "*" else _text(host, port)
            return f"{word} {place}{'/udp' if udp else ''}"
        case LookupQuestion(name=name, kind=kind):
            return f"lookup {name}" if kind == "global" else f"lookup {kind}:{name}"
        case GpuQuestion():
            return "gpu"
    return question.operation if question.argument is None else f"{question.operation} {question.argument}"
