"""JSON and structs read without mercy: what is wrong is refused, and the error names the field.

msgspec alone lets duplicate keys pass and gives paths like `$.spec.env[...]`; the standard parser takes NaN
and lone surrogates. An error under `spec` is `invalid_spec`, any other `invalid_command`,
unless the caller says otherwise.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from .errors import ContractError, InvalidCommand, InvalidSpec
from .values import shorten

MAX_COMMAND_BYTES = 256 * 1024
MAX_DEPTH = 64
MAX_FIELD = 256
MAX_QUOTE = 200

T = TypeVar("T")

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_PLAIN_KEY = re.compile(r"[ -~]{1,64}")
_AT = re.compile(r"(.*) - at `(?:key` in `)?\$([\w.\[\]-]*)`", re.DOTALL)
_ABOUT_KEY = re.compile(r"Object (?:contains unknown|missing required) field `(.*)`", re.DOTALL)
_IN_SPEC = re.compile(r"spec(?:[.\[]|$)")
_STEP = re.compile(r"\.([\w-]+)|\[(\d+|\.\.\.)\]")


class _Repeated(Exception):
    """An object has a key twice; or a number is none."""


def invalid(message: str, field: str | None, error: type[ContractError] | None = None) -> ContractError:
    """An error of `error`, else of the class that fits the field."""
    return (error or _class_of(field))(message, field=field)


def _class_of(field: str | None) -> type[ContractError]:
    return InvalidSpec if field is not None and _IN_SPEC.match(field) else InvalidCommand


def join(*parts: str | None) -> str | None:
    """`join("spec", "env", "A")` is `spec.env.A`; empty parts are left out, an index takes no dot."""
    path = ""
    for part in parts:
        if part:
            path += part if part.startswith("[") or not path else f".{part}"
    return path[:MAX_FIELD] or None


def key_name(key: str) -> str:
    """A key as it may stand in the name of a field: short and printable."""
    return key if _PLAIN_KEY.fullmatch(key) else shorten(key, 60).strip("'\"")


# -- text -> objects -----------------------------------------------------------------------------------------


def strict_json(body: bytes, max_bytes: int, *, error: type[ContractError] | None = None) -> Any:
    """What `body` says. Size, UTF-8, depth, duplicate keys, NaN and lone surrogates are checked."""
    if len(body) > max_bytes:
        raise invalid(f"the body has {len(body)} bytes, more than {max_bytes}", None, error)
    try:
        text = str(body, "utf-8")
    except UnicodeDecodeError as failure:
        raise invalid(f"the body is not UTF-8 at byte {failure.start}", None, error) from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except _Repeated:
        raise _found_by_walking(text, error) from None
    except json.JSONDecodeError as failure:
        raise invalid(
            f"the body is not JSON: {failure.msg} at line {failure.lineno}, column {failure.colno}",
            None,
            error,
        ) from None
    except RecursionError:
        raise invalid(f"the body is nested deeper than {MAX_DEPTH} levels", None, error) from None
    except ValueError:  # more digits than int() takes
        raise invalid("the body holds a number out of range", None, error) from None
    # Counting brackets is quick; only a body that could be too deep is walked.
    if text.count("[") + text.count("{") > MAX_DEPTH:
        check_depth(value, error=error)
    if _SURROGATE.search(text):
        for path, leaf in _leaves(value):
            if isinstance(leaf, str) and not _encodes(leaf):
                raise invalid("text with half of a surrogate pair", join(*path), error)
    return value


def check_depth(value: Any, *, error: type[ContractError] | None = None) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise invalid(f"the body is nested deeper than {MAX_DEPTH} levels", None, error)


def check_plain(value: Any, field: str, *, error: type[ContractError] = InvalidSpec) -> None:
    """A value of no fixed type must be one that can be written again: finite, 64 bits, text without NUL."""
    check_depth(value, error=error)
    for path, leaf in _leaves(value):
        at = join(field, *path)
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise error("number out of range", field=at)
        if isinstance(leaf, int) and not -(2**63) <= leaf < 2**63:
            raise error("number out of range", field=at)
        if isinstance(leaf, str) and "\x00" in leaf:
            raise error("must not contain NUL", field=at)
        if leaf is not None and not isinstance(leaf, str | int | float):
            raise error(f"cannot hold a {type(leaf).__name__}", field=at)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _Repeated
    return made


def _refuse(_constant: str) -> Any:
    raise _Repeated


class _Pairs(list[tuple[str, Any]]):
    """An object whose repeated keys are kept."""


class _Constant(str):
    """NaN, Infinity or -Infinity."""


def _found_by_walking(text: str, error: type[ContractError] | None) -> ContractError:
    """Parses again, slowly, to say where the repeated key or the constant stands."""
    try:
        value = json.loads(text, object_pairs_hook=_Pairs, parse_constant=_Constant)
    except (ValueError, RecursionError):
        return invalid("the body is not JSON", None, error)
    stack: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, _Constant):
            return invalid(f"{node} is no number that JSON knows", join(*path), error)
        if isinstance(node, _Pairs):
            seen: set[str] = set()
            for key, _ in node:
                if key in seen:
                    where = join(*path, key_name(key))
                    return invalid(f"the key {shorten(key)} stands there twice", where, error)
                seen.add(key)
            stack += [((*path, key_name(key)), item) for key, item in reversed(node)]
        elif isinstance(node, list):
            stack += [((*path, f"[{at}]"), item) for at, item in reversed(list(enumerate(node)))]
    return invalid("the body is not JSON", None, error)


def _leaves(value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every scalar with its path, the keys of objects included as scalars."""
    stack: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict):
            for key, item in node.items():
                yield path, key
                stack.append(((*path, key_name(str(key))), item))
        elif isinstance(node, list):
            stack += [((*path, f"[{at}]"), item) for at, item in enumerate(node)]
        else:
            yield path, node


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# -- objects -> structs --------------------------------------------------------------------------------------


def to_struct(
    value: Any, kind: type[T], *, field: str | None = None, error: type[ContractError] | None = None
) -> T:
    """`value` as a `kind`; an error names the field below `field`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as failure:
        raise _translate(failure, value, kind, field, error) from None
    except RecursionError:
        raise invalid(f"nested deeper than {MAX_DEPTH} levels", field, error) from None


def _translate(
    failure: msgspec.ValidationError,
    value: Any,
    kind: type[Any],
    field: str | None,
    error: type[ContractError] | None,
) -> ContractError:
    text = str(failure)
    message, path = text, ""
    if (at := _AT.fullmatch(text)) is not None:
        message, path = at[1], at[2]
    steps = _concrete(text, _steps(path), value, kind)
    names = [f"[{step}]" if isinstance(step, int) else key_name(step) for step in steps]
    last = None
    if (about := _ABOUT_KEY.fullmatch(message)) is not None:
        last = key_name(about[1])
        missing = message.startswith("Object missing")
        message = f"missing {last}" if missing else f"there is no field {shorten(about[1])}"
        if missing:
            # A command without its spec is a broken command, not a broken spec.
            error = error or _class_of(join(field, *names))
    message = message.replace("`", "")
    # msgspec quotes a wrong tag or enum value whole.
    if len(message) > MAX_QUOTE or not message.isprintable():
        message = shorten(message, MAX_QUOTE)
    return invalid(message, join(field, *names, last), error)


def _steps(path: str) -> list[str | int]:
    return [
        match[1] if match[1] is not None else ("..." if match[2] == "..." else int(match[2]))
        for match in _STEP.finditer(path)
    ]


def _concrete(text: str, steps: list[str | int], value: Any, kind: type[Any]) -> list[str | int]:
    """`steps` with the key in place of each `...`: msgspec does not say which, but stops at the first."""
    done: list[str | int] = []
    for step in steps:
        if step == "...":
            node = _reach(value, done)
            if not isinstance(node, dict):
                return done
            keys = list(node)
            low, high = 1, len(keys)
            while low < high:
                middle = (low + high) // 2
                first = {key: node[key] for key in keys[:middle]}
                if _fails_like(text, _replaced(value, done, first), kind):
                    high = middle
                else:
                    low = middle + 1
            step = keys[low - 1]
            value = _replaced(value, done, {step: node[step]})
        done.append(step)
    return done


def _fails_like(text: str, value: Any, kind: type[Any]) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as failure:
        return str(failure) == text
    return False


def _reach(value: Any, steps: list[str | int]) -> Any:
    for step in steps:
        value = value[step]
    return value


def _replaced(value: Any, steps: list[str | int], new: Any) -> Any:
    """`value` with `new` at `steps`, copying only what lies on the way."""
    if not steps:
        return new
    copy = value.copy()
    copy[steps[0]] = _replaced(value[steps[0]], steps[1:], new)
    return copy
