"""Spec files: one ServiceSpec or a whole deployment, in YAML 1.2 or JSON.

PyYAML speaks YAML 1.1, where `no` is false, `1:30` is ninety and `0644` is octal. Only its parser is used:
it tells events one by one, so that depth and size are checked before anything is built; plain words get their
type by the core schema of YAML 1.2, as in the reference system. An error names file, line and field.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from schemas.errors import ContractError, InvalidSpec
from schemas.spec import ServiceSpec, decode_deployment, decode_spec
from schemas.strict import MAX_DEPTH, check_depth, join, key_name, strict_json
from schemas.values import SERVICE, check_service, shorten

MAX_FILE_BYTES = 2**20
# What a file may hold once each alias is written out.
MAX_VALUES = 100_000
_CORE = "tag:yaml.org,2002:"
_DOCUMENT_KEYS = frozenset({"version", "deployment", "services"})

# https://yaml.org/spec/1.2.2/#103-core-schema
_PLAIN = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
}
# The parser of libyaml is many times as fast; not every build of PyYAML has it.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_specs(path: Path, *, name: str | None = None) -> tuple[str | None, dict[str, ServiceSpec]]:
    """(deployment, services by name) of a file. A lone spec is named `name`, else after the file.

    InvalidSpec and Unsupported name file and field; OSError is the caller's to tell.
    """
    raw = _read(path)
    lines: dict[str, int] = {}
    try:
        if path.suffix.lower() == ".json":
            value = strict_json(raw, MAX_FILE_BYTES, error=InvalidSpec)
        else:
            value = parse_yaml(raw, lines)
        if isinstance(value, dict) and not _DOCUMENT_KEYS.isdisjoint(value):
            deployment = decode_deployment(value)
            return deployment.deployment, dict(deployment.services)
        service = _name_of(path) if name is None else check_service(name, error=InvalidSpec)
        return None, {service: decode_spec(value, field="")}
    except ContractError as failure:
        raise _in_file(path, failure, lines) from None


def parse_yaml(raw: bytes, lines: dict[str, int] | None = None) -> Any:
    """What one YAML document says, in the types of JSON. `lines` is filled with the line of each field."""
    if len(raw) > MAX_FILE_BYTES:
        raise InvalidSpec(f"{len(raw)} bytes are more than {MAX_FILE_BYTES}")
    try:
        text = str(raw, "utf-8")
    except UnicodeDecodeError as failure:
        raise InvalidSpec(f"not UTF-8 at byte {failure.start}") from None
    try:
        events = yaml.parse(text.removeprefix("\ufeff"), Loader=_LOADER)
        return _Reader(events, {} if lines is None else lines).document()
    except yaml.MarkedYAMLError as failure:
        mark = failure.problem_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise InvalidSpec(f"{where}{failure.problem or failure.context or 'not YAML'}") from None
    except yaml.YAMLError as failure:
        raise InvalidSpec(f"not YAML: {str(failure).splitlines()[0]}") from None


class _Reader:
    """From the parser's events to plain objects."""

    def __init__(self, events: Iterator[yaml.Event], lines: dict[str, int]) -> None:
        self._events = events
        self._lines = lines
        self._count = 0
        # By anchor: the value and how many values it holds. An alias to something unfinished finds nothing.
        self._anchors: dict[str, tuple[Any, int]] = {}

    def document(self) -> Any:
        self._next()  # the stream's start
        if isinstance(self._next(), yaml.StreamEndEvent):
            raise InvalidSpec("the file is empty")
        value = self._value(self._next(), (), 0)
        self._next()  # the document's end
        if not isinstance(self._next(), yaml.StreamEndEvent):
            raise InvalidSpec("the file holds more than one document")
        if self._anchors:
            check_depth(value, error=InvalidSpec)
        return value

    def _value(self, event: Any, path: tuple[str, ...], depth: int) -> Any:
        field = join(*path)
        if field is not None:
            self._lines.setdefault(field, event.start_mark.line + 1)
        if isinstance(event, yaml.AliasEvent):
            anchor = str(event.anchor)
            if anchor not in self._anchors:
                raise InvalidSpec(f"there is no finished anchor {shorten(anchor)}", field=field)
            value, size = self._anchors[anchor]
            self._add(size)
            return value
        if depth > MAX_DEPTH:
            raise InvalidSpec(f"nested deeper than {MAX_DEPTH} levels")
        before = self._count
        self._add(1)
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event, field)
        else:
            value = self._collection(event, path, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, self._count - before)
        return value

    def _next(self) -> Any:
        return next(self._events)

    def _add(self, count: int) -> None:
        self._count += count
        if self._count > MAX_VALUES:
            raise InvalidSpec(f"holds more than {MAX_VALUES} values once its aliases are written out")

    def _collection(self, start: Any, path: tuple[str, ...], depth: int) -> Any:
        field = join(*path)
        word = _local_tag(start.tag)
        if word is None and start.tag not in (None, "!", _CORE + "seq", _CORE + "map"):
            raise InvalidSpec(f"the tag {shorten(start.tag)} is not known here", field=field)
        if isinstance(start, yaml.SequenceStartEvent):
            made: Any = []
            while not isinstance(item := self._next(), yaml.SequenceEndEvent):
                made.append(self._value(item, (*path, f"[{len(made)}]"), depth + 1))
        else:
            made = {}
            while not isinstance(event := self._next(), yaml.MappingEndEvent):
                line = event.start_mark.line + 1
                key = self._value(event, path, depth + 1)
                if not isinstance(key, str):
                    raise InvalidSpec(f"a key on line {line} is no text: put it in quotes", field=field)
                below = (*path, key_name(key))
                self._lines[join(*below) or ""] = line
                if key in made:
                    raise InvalidSpec(f"the key {shorten(key)} stands there twice", field=join(*below))
                made[key] = self._value(self._next(), below, depth + 1)
        return made if word is None else {word: made}


def _local_tag(tag: str | None) -> str | None:
    return tag[1:] if tag is not None and tag.startswith("!") and len(tag) > 1 else None


def _scalar(event: Any, field: str | None) -> Any:
    text: str = event.value
    if not text.isascii() and not text.isprintable():
        _refuse_surrogates(text, field)
    # `!pin "id=2"` is how the library of the reference system writes `{pin: "id=2"}`; `!spread` is `spread`.
    word = _local_tag(event.tag)
    if word is not None:
        return {word: text} if text or event.style else word
    if event.tag is None or event.tag == "!":
        kind = _kind_of(text) if event.tag is None and event.implicit[0] else "str"
    else:
        kind = event.tag.removeprefix(_CORE)
        if kind != "str" and kind not in _PLAIN:
            raise InvalidSpec(f"the tag {shorten(event.tag)} is not known here", field=field)
        if kind != "str" and _PLAIN[kind].fullmatch(text) is None:
            raise InvalidSpec(f"{shorten(text)} is no {kind}", field=field)
    match kind:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return _integer(text, field)
        case "float":
            return _float(text, field)
    return text


def _kind_of(text: str) -> str:
    for kind, rule in _PLAIN.items():
        if rule.fullmatch(text) is not None:
            return kind
    return "str"


def _refuse_surrogates(text: str, field: str | None) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidSpec("text with half of a surrogate pair", field=field) from None


def _integer(text: str, field: str | None) -> int:
    """Decimal also with leading zeros: `0644` is 644, as YAML 1.2 says; octal is `0o644`."""
    if len(text) > 40:
        raise InvalidSpec("number out of range", field=field)
    if text.startswith(("0o", "0x")):
        return int(text, 0)
    return int(text)


def _float(text: str, field: str | None) -> float:
    number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(number):
        raise InvalidSpec(f"{shorten(text)} is no number that a spec can hold", field=field)
    return number


def _read(path: Path) -> bytes:
    """At most one byte more than is allowed, so that a huge or endless file is never read whole."""
    with path.open("rb") as file:
        raw = file.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise InvalidSpec(f"{path}: is larger than {MAX_FILE_BYTES} bytes")
    return raw


def _name_of(path: Path) -> str:
    """The file's name made to fit the rule of services."""
    name = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:63].rstrip("-")
    if SERVICE.fullmatch(name) is None:
        raise InvalidSpec("no service name can be made of the file's name: give one")
    return name


def _in_file(path: Path, failure: ContractError, lines: dict[str, int]) -> ContractError:
    """The same error, its message led by file, line and field."""
    field = failure.field
    line = None
    place = field or ""
    while place and line is None:
        line = lines.get(place)
        place = re.sub(r"(?:^|\.)[^.\[\]]*$|\[\d+\]$", "", place)
    where = str(path) if line is None else f"{path}:{line}"
    about = f" {field}:" if field else ""
    return type(failure)(f"{where}:{about} {failure.message}", field=field)
