"""Reading the worker's configuration: the file, above it the environment, above that the flags.

Every error names the key and the place where its value was written. A URL is never part of a message: it may
hold a password.
"""

import difflib
import math
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from schemas.errors import ContractError
from schemas.values import CONTROL, NODE, parse_duration, parse_memory
from worker.config_model import (
    ISOLATIONS,
    KEEP,
    LEVELS,
    STOP,
    Config,
    HostApiConfig,
    ImagesConfig,
    NatsConfig,
    NodeConfig,
    PolicyConfig,
    SecretsConfig,
    Section,
    TlsConfig,
    VolumesConfig,
)
from worker.errors import Configuration
from worker.settings import BY_KEY, CONFIG_VARIABLE, SECTIONS, SETTINGS, Kind, Setting, parse_text

__all__ = [
    "SETTINGS",
    "Config",
    "HostApiConfig",
    "ImagesConfig",
    "NatsConfig",
    "NodeConfig",
    "PolicyConfig",
    "SecretsConfig",
    "TlsConfig",
    "VolumesConfig",
    "load_config",
]

MAX_FILE_BYTES = 1 << 20
MAX_LABELS = 64
MAX_LABEL_BYTES = 8192
MAX_REPLICAS = 5
MAX_SLOTS = 100_000
# A token says its times in whole seconds, and is renewed at half its life. One that lives long is a password.
MIN_TTL_S = 2.0
MAX_TTL_S = 30 * 86400.0

_VARIABLES = {setting.env: setting for setting in SETTINGS}
_NAMESPACES = tuple(
    f"SANDFLEET_{name}_" for name in ("NATS", "NODE", "SECRETS", "HOST_API", "IMAGES", "POLICY")
)
REGISTRY = re.compile(r"[a-z0-9.-]+(?::[0-9]{1,5})?")
MAX_PARALLEL = 32
_STREAM_PREFIX = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LOCATION = re.compile(r" - at `\$([^`]*)`$")


def load_config(
    path: Path | None, env: Mapping[str, str], flags: Mapping[str, Any], *, system: str | None = None
) -> Config:
    """Everything put together. `path` None: the file that SANDFLEET_CONFIG names, or none.

    `flags` has dotted keys such as `nats.url`; None stands for a flag that was not given. `system` is
    `os.uname().sysname` unless a test says otherwise.
    """
    if path is None and env.get(CONFIG_VARIABLE):
        path = Path(env[CONFIG_VARIABLE])
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    source = ""
    if path is not None:
        path = path.expanduser().absolute()
        source = str(path)
        for key, value in _from_file(path):
            values[key], origins[key] = value, source
    for setting, value in _from_environment(env):
        values[setting.key], origins[setting.key] = value, setting.env
    for setting, value in _from_flags(flags):
        values[setting.key], origins[setting.key] = value, setting.flag or setting.key
    if "policy.gpu" not in values:
        values["policy.gpu"] = (system or os.uname().sysname) == "Darwin"
    folder = None if path is None else path.parent
    typed = {
        key: _typed(BY_KEY[key], value, origins.get(key, ""), folder if origins.get(key) == source else None)
        for key, value in values.items()
    }
    config = _build(typed, source, origins)
    tls = config.nats.tls
    if tls is not None and (tls.cert is None) != (tls.key is None):
        key = "nats.tls.key" if tls.cert is not None else "nats.tls.cert"
        raise Configuration(f"{source or 'configuration'}: {key} is missing beside the other one", field=key)
    return config


# -- where values come from


def _from_file(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise Configuration(f"{path} is no file")
            if found.st_mode & stat.S_IWOTH:
                raise Configuration(
                    f"{path} can be written by everybody, who could then grant the host to containers:"
                    " chmod o-w it"
                )
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as failure:
        raise Configuration(f"{path} cannot be read: {failure.strerror}") from failure
    if len(raw) > MAX_FILE_BYTES:
        raise Configuration(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        data = tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as failure:
        raise Configuration(f"{path} is no UTF-8 text (byte {failure.start})") from failure
    except (tomllib.TOMLDecodeError, RecursionError) as failure:
        raise Configuration(f"{path} is no TOML: {str(failure)[:200] or 'nested too deeply'}") from failure
    yield from _flattened(data, "", str(path))


def _flattened(data: dict[str, Any], prefix: str, source: str) -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        key = f"{prefix}{name}"
        if "." in name:
            raise Configuration(f"{source}: unknown key {key!r}: in quotes it is one word", field=key)
        if key in BY_KEY:
            yield key, value
        elif key not in SECTIONS:
            raise Configuration(f"{source}: unknown key {key!r}{_hint(key)}", field=key)
        elif not isinstance(value, dict):
            raise Configuration(f"{source}: {key} is a section: write [{key}]", field=key)
        else:
            yield from _flattened(value, f"{key}.", source)


def _from_environment(env: Mapping[str, str]) -> Iterator[tuple[Setting, Any]]:
    for variable, text in sorted(env.items()):
        setting = _VARIABLES.get(variable)
        if setting is None:
            if variable.startswith(_NAMESPACES):
                near = difflib.get_close_matches(variable, _VARIABLES, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise Configuration(f"unknown variable {variable}{hint}", field=variable)
        elif text:
            yield setting, _parsed(setting, text, variable)


def _from_flags(flags: Mapping[str, Any]) -> Iterator[tuple[Setting, Any]]:
    for key, value in flags.items():
        if key not in BY_KEY:
            raise Configuration(f"unknown key {key!r}{_hint(key)}", field=key)
        setting = BY_KEY[key]
        if isinstance(value, str):
            yield setting, _parsed(setting, value, setting.flag or key)
        elif value is not None:
            yield setting, str(value) if isinstance(value, Path) else value


def _parsed(setting: Setting, text: str, origin: str) -> Any:
    try:
        return parse_text(setting, text)
    except ValueError as failure:
        raise _wrong(origin, setting.key, str(failure)) from None


def _hint(key: str) -> str:
    name = key.rpartition(".")[2]
    elsewhere = [known for known in BY_KEY if known.rpartition(".")[2] == name]
    known = [*SECTIONS, *BY_KEY] if "." in key else SECTIONS
    near = elsewhere or difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


# -- types and rules


def _fields_of(section: type[Section], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, kind in get_type_hints(section).items():
        if kind == TlsConfig | None:
            yield from _fields_of(TlsConfig, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


_SECTION_TYPES: dict[str, type[Section]] = {
    "nats": NatsConfig,
    "node": NodeConfig,
    "secrets": SecretsConfig,
    "host_api": HostApiConfig,
    "images": ImagesConfig,
    "volumes": VolumesConfig,
    "policy": PolicyConfig,
}
_TYPES = {
    key: kind for name, section in _SECTION_TYPES.items() for key, kind in _fields_of(section, f"{name}.")
}


def _typed(setting: Setting, value: Any, origin: str, folder: Path | None) -> Any:
    try:
        if setting.kind is Kind.SECONDS and isinstance(value, str):
            value = parse_duration(value, field=setting.key)
        value = msgspec.convert(value, _TYPES[setting.key])
        _check_text(value)
        if setting.kind is Kind.PATH:
            value = _path(value, folder)
        if setting.kind is Kind.PATHS:
            value = tuple(_absolute(part, place) for place, part in enumerate(value))
        rule = _RULES.get(setting.key)
        if rule is not None:
            rule(value)
    except msgspec.ValidationError as failure:
        text = str(failure)
        where = _LOCATION.search(text)
        place = where[1] if where else ""
        text = _LOCATION.sub("", text).replace("`", "")
        raise _wrong(origin, f"{setting.key}{place}", text[:1].lower() + text[1:]) from None
    except ContractError as failure:
        raise _wrong(origin, setting.key, failure.message) from None
    except ValueError as failure:
        raise _wrong(origin, setting.key, str(failure)) from None
    return value


def _wrong(origin: str, key: str, message: str) -> Configuration:
    return Configuration(f"{origin}: {key}: {message}", field=key)


def _check_text(value: Any) -> None:
    if isinstance(value, str):
        if CONTROL.search(value):
            raise ValueError("has a control character")
    elif isinstance(value, dict):
        _check_text([*value, *value.values()])
    elif isinstance(value, tuple | list):
        for part in value:
            _check_text(part)


def _path(text: str | None, folder: Path | None) -> str:
    if not text:
        raise ValueError("is empty")
    path = Path(os.path.expanduser(text))
    return os.path.abspath(path if folder is None else folder / path)


def _absolute(text: str, place: int) -> str:
    if not text.startswith("/") or ".." in text.split("/"):
        raise ValueError(f"entry {place + 1} is no absolute path without `..`")
    return os.path.normpath("/" + text.lstrip("/"))


def _one_of(*known: str) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        for part in (value,) if isinstance(value, str) else value:
            if part not in known:
                raise ValueError(f"{str(part)[:80]!r} is none of {', '.join(known)}")

    return check


def _between(least: float, most: float) -> Callable[[Any], None]:
    def check(value: float | None) -> None:
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            raise ValueError(f"must be from {least:g} to {most:g}")

    return check


def _matching(pattern: re.Pattern[str], what: str) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        for part in (value,) if isinstance(value, str) else value or ():
            if not pattern.fullmatch(part):
                raise ValueError(f"{part[:80]!r} is no {what}: must match {pattern.pattern}")

    return check


def _check_labels(labels: dict[str, str]) -> None:
    if len(labels) > MAX_LABELS:
        raise ValueError(f"there are {len(labels)} labels, {MAX_LABELS} are the most")
    if sum(len(f"{name}{value}".encode()) for name, value in labels.items()) > MAX_LABEL_BYTES:
        raise ValueError(f"the labels are larger than {MAX_LABEL_BYTES >> 10} KiB in all")


def _check_size(value: str | int) -> None:
    parse_memory(value, field="size")


def _check_url(value: str) -> None:
    if not value.strip():
        raise ValueError("is empty")


_RULES: Mapping[str, Callable[[Any], None]] = {
    "nats.url": _check_url,
    "nats.domain": _matching(NODE, "domain"),
    "nats.replicas": _between(1, MAX_REPLICAS),
    "nats.stream_prefix": _matching(_STREAM_PREFIX, "prefix of stream names"),
    "node.name": _matching(NODE, "node name"),
    "node.labels": _check_labels,
    "node.pools": _matching(NODE, "pool name"),
    "node.slots": _between(1, MAX_SLOTS),
    "node.isolation": _one_of(*ISOLATIONS),
    "node.stats_interval_s": _between(0.1, 3600),
    "node.on_shutdown": _one_of(KEEP, STOP),
    "host_api.ttl_s": _between(MIN_TTL_S, MAX_TTL_S),
    "images.plain_http": _matching(REGISTRY, "registry"),
    "images.max_parallel": _between(1, MAX_PARALLEL),
    "policy.network": _one_of(*(level.value for level in LEVELS)),
    "policy.isolation": _one_of(*ISOLATIONS),
    "images.max_bytes": _check_size,
    "policy.max_memory": _check_size,
    "policy.max_containers": _between(0, 1_000_000),
}


def _build(values: dict[str, Any], source: str, origins: dict[str, str]) -> Config:
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTION_TYPES}
    tls: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tls if section == "nats.tls" else sections[section])[name] = value
    if tls:
        sections["nats"]["tls"] = TlsConfig(**tls)
    return Config(
        nats=NatsConfig(**sections["nats"]),
        node=NodeConfig(**sections["node"]),
        secrets=SecretsConfig(**sections["secrets"]),
        host_api=HostApiConfig(**sections["host_api"]),
        images=ImagesConfig(**sections["images"]),
        volumes=VolumesConfig(**sections["volumes"]),
        policy=PolicyConfig(**sections["policy"]),
        source=source,
        origins=origins,
    )
