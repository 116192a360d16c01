"""Values that are written as text: names, durations, sizes, signals, paths, image references.

Every function takes the dotted name of the field it reads and names it in its error.
"""

import re
import signal
from collections.abc import Mapping
from types import MappingProxyType

from .errors import ContractError, InvalidCommand, InvalidSpec

NODE = re.compile(r"[A-Za-z0-9_-]{1,64}")
SERVICE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
COMMAND_ID = NODE
ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
# What registries accept: https://github.com/distribution/reference/blob/main/regexp.go
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_DOMAIN = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*"
IMAGE = re.compile(
    rf"(?:{_DOMAIN}(?::[0-9]{{1,5}})?/)?{_COMPONENT}(?:/{_COMPONENT})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?"
    r"(?:@[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,128})?"
)
MAX_IMAGE = 512
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_ARGV_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

MAX_PATH_BYTES = 4096
MAX_PATH_PART_BYTES = 255
MAX_DURATION_S = 1e9
MAX_BYTES = 2**63 - 1

_UNITS: Mapping[str, float] = MappingProxyType(
    {
        name: seconds
        for names, seconds in (
            ("ns nsec nanos", 1e-9),
            ("us usec µs", 1e-6),
            ("ms msec millis", 1e-3),
            ("s sec secs second seconds", 1.0),
            ("m min mins minute minutes", 60.0),
            ("h hr hrs hour hours", 3600.0),
            ("d day days", 86400.0),
            ("w wk wks week weeks", 604800.0),
            ("M month months", 2630016.0),
            ("y yr yrs year years", 31557600.0),
        )
        for name in names.split()
    }
)
_TERM = re.compile(r"([0-9]{1,18}) *([A-Za-zµ]+) *")
_SIZE = re.compile(r"([0-9]{1,19})(Ki|Mi|Gi|Ti)?")
_SIZE_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

KILL_SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
# All exist on Linux and macOS, though not with the same numbers.
STOP_SIGNALS = (
    *KILL_SIGNALS,
    "SIGQUIT",
    "SIGABRT",
    "SIGALRM",
    "SIGCONT",
    "SIGPIPE",
    "SIGWINCH",
    "SIGTRAP",
    "SIGIO",
    "SIGPROF",
    "SIGVTALRM",
    "SIGXCPU",
    "SIGXFSZ",
)


def check_name(
    value: str, rule: re.Pattern[str], what: str, *, field: str, error: type[ContractError] = InvalidCommand
) -> str:
    """`value` if the whole of it fits `rule`."""
    if rule.fullmatch(value) is None:
        raise error(f"{shorten(value)} is no {what}: must match {rule.pattern}", field=field)
    return value


def check_node(value: str, *, field: str = "node", error: type[ContractError] = InvalidCommand) -> str:
    return check_name(value, NODE, "node name", field=field, error=error)


def check_pool(value: str, *, field: str = "pool", error: type[ContractError] = InvalidCommand) -> str:
    return check_name(value, NODE, "pool name", field=field, error=error)


def check_service(value: str, *, field: str = "service", error: type[ContractError] = InvalidCommand) -> str:
    """Also the rule of job ids and volume names."""
    return check_name(value, SERVICE, "service name", field=field, error=error)


def check_id(value: str, *, field: str = "id", error: type[ContractError] = InvalidCommand) -> str:
    """A command id or an exec session."""
    return check_name(value, COMMAND_ID, "id", field=field, error=error)


def check_ulid(value: str, *, field: str, error: type[ContractError] = InvalidCommand) -> str:
    if ULID.fullmatch(value) is None:
        raise error(f"{shorten(value)} is no ULID", field=field)
    return value


def check_image(value: str, *, field: str, error: type[ContractError] = InvalidCommand) -> str:
    """An OCI image reference, kept as written."""
    if len(value) > MAX_IMAGE:
        raise error(f"image reference is longer than {MAX_IMAGE} characters", field=field)
    if IMAGE.fullmatch(value) is None:
        raise error(
            f"{shorten(value)} is no image reference ([registry/]name[:tag][@digest], name in lower case)",
            field=field,
        )
    return value


def parse_duration(
    value: str | int | float, *, field: str, error: type[ContractError] = InvalidSpec
) -> float:
    """Seconds of `"250ms"`, `"1m30s"`, `"1h 15m"` or a number of seconds."""
    if isinstance(value, str):
        seconds = _duration_text(value)
        if seconds is None:
            raise error(
                f'{shorten(value)} is no duration: write "250ms", "5s", "1m30s", "2h" or a number of seconds',
                field=field,
            )
    elif isinstance(value, bool):
        raise error("expected a duration, got a boolean", field=field)
    else:
        seconds = value
    # Compared before it becomes a float, which a long int cannot; false for NaN too.
    if not 0 <= seconds <= MAX_DURATION_S:
        raise error(f"must be between 0 and {MAX_DURATION_S:.0f} seconds", field=field)
    return float(seconds)


def _duration_text(text: str) -> float | None:
    text = text.strip(" ")
    if text == "0":
        return 0.0
    at, seconds = 0, 0.0
    while at < len(text):
        term = _TERM.match(text, at)
        if term is None or term[2] not in _UNITS:
            return None
        seconds += int(term[1]) * _UNITS[term[2]]
        at = term.end()
    # Adding 0.3 s as 300 * 1e-3 leaves digits that nobody wrote.
    return round(seconds, 9) if text else None


def parse_memory(
    value: str | int, *, field: str, minimum: int = 1, error: type[ContractError] = InvalidSpec
) -> int:
    """Bytes of `"512Mi"`, `"2Gi"`, `"64Ki"`, `"1Ti"` or plain bytes (a number or its digits)."""
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match is None:
            raise error(
                f'{shorten(value)} is no size: write "512Mi", "2Gi", "64Ki", "1Ti" or plain bytes',
                field=field,
            )
        size = int(match[1]) * _SIZE_UNITS.get(match[2] or "", 1)
    elif isinstance(value, bool):
        raise error("expected a size, got a boolean", field=field)
    else:
        size = value
    if not minimum <= size <= MAX_BYTES:
        raise error(f"must be between {minimum} and {MAX_BYTES} bytes", field=field)
    return size


def normalize_signal(
    value: str,
    *,
    allowed: tuple[str, ...] = KILL_SIGNALS,
    field: str = "signal",
    error: type[ContractError] = InvalidCommand,
) -> str:
    """`"TERM"` and `"SIGTERM"` are `"SIGTERM"`."""
    name = value if value.startswith("SIG") else f"SIG{value}"
    if name not in allowed:
        raise error(f"{shorten(value)} is none of {' '.join(allowed)}", field=field)
    return name


def signal_number(value: str, *, field: str = "signal", error: type[ContractError] = InvalidCommand) -> int:
    """The number on this platform of a name of `STOP_SIGNALS`, or of a number written as text (`"15"`)."""
    if re.fullmatch(r"[0-9]{1,3}", value):
        number = int(value)
        if not 1 <= number <= 64:
            raise error(f"{value} is no signal: must be 1 to 64", field=field)
        return number
    name = normalize_signal(value, allowed=STOP_SIGNALS, field=field, error=error)
    return int(signal.Signals[name])


def check_text(
    value: str, *, field: str, limit: int, empty: bool = False, error: type[ContractError] = InvalidSpec
) -> str:
    """Text without control characters, at most `limit` characters."""
    if not value and not empty:
        raise error("must not be empty", field=field)
    if len(value) > limit:
        raise error(f"is longer than {limit} characters", field=field)
    if CONTROL.search(value):
        raise error("must not contain control characters", field=field)
    return value


def check_argument(value: str, *, field: str, error: type[ContractError] = InvalidSpec) -> str:
    """One word of a command line. A script for a shell spans lines, so tab and line ends may stand in it."""
    if _ARGV_CONTROL.search(value):
        raise error("must not contain NUL or control characters", field=field)
    return value


def check_env_name(value: str, *, field: str, error: type[ContractError] = InvalidSpec) -> str:
    if not value:
        raise error("an environment name must not be empty", field=field)
    if "=" in value or CONTROL.search(value):
        raise error("an environment name must not contain '=', NUL or control characters", field=field)
    return value


def check_path(
    value: str,
    *,
    field: str,
    absolute: bool = False,
    below: bool = False,
    error: type[ContractError] = InvalidSpec,
) -> str:
    """A path without `..`, NUL and control characters; `below`: it must not be the root itself."""
    if not value:
        raise error("a path must not be empty", field=field)
    if CONTROL.search(value):
        raise error("a path must not contain NUL or control characters", field=field)
    if len(value.encode("utf-8", "surrogatepass")) > MAX_PATH_BYTES:
        raise error(f"a path must not be longer than {MAX_PATH_BYTES} bytes", field=field)
    parts = value.split("/")
    if ".." in parts:
        raise error("a path must not contain '..'", field=field)
    if any(len(part.encode("utf-8", "surrogatepass")) > MAX_PATH_PART_BYTES for part in parts):
        raise error(f"a part of a path must not be longer than {MAX_PATH_PART_BYTES} bytes", field=field)
    if absolute and not value.startswith("/"):
        raise error(f"{shorten(value)} is no absolute path", field=field)
    if below and not normal_target(value):
        raise error("must be a place below the root, not the root itself", field=field)
    return value


def normal_target(path: str) -> str:
    """A path inside a container's root in the one form in which two can be compared: `app/data`."""
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def shorten(value: str, limit: int = 80) -> str:
    """Quoted for a message: printable ASCII, cut."""
    return ascii(value if len(value) <= limit else f"{value[:limit]}…")
