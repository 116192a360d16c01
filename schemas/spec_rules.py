"""What types and ranges alone do not say about a ServiceSpec. Each rule names the field that breaks it."""

import re
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from .cron import check_cron
from .errors import InvalidSpec, Unsupported
from .node import Feature
from .spec_life import CommandCheck, HttpCheck, InitStep, TcpCheck
from .spec_model import DeploymentSpec, ServiceSpec
from .spec_network import Protocol
from .spec_parts import BindStorage, NamedStorage, S3Storage, TmpfsStorage
from .spec_place import AdaptiveScale, RType
from .spec_support import check_supported, check_supported_deployment
from .strict import check_plain, key_name
from .values import (
    check_argument,
    check_env_name,
    check_image,
    check_path,
    check_service,
    check_text,
    normal_target,
    parse_duration,
    parse_memory,
    shorten,
    signal_number,
)

MAX_LABELS = 64
MAX_LABEL_BYTES = 8192
# setrlimit(2) on Linux; macOS has fewer, which the node's own check says.
ULIMITS = (
    *("as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice"),
    *("nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack"),
)
INIT_ACTIONS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    # action: (required, optional) keys of `with`
    "init.wait_tcp": (frozenset({"host", "port"}), frozenset({"timeout"})),
    "init.wait_http": (frozenset({"url"}), frozenset({"expect_status", "timeout"})),
    "init.run": (frozenset({"command"}), frozenset({"timeout"})),
    "init.s3_push": (frozenset({"source", "bucket", "key"}), frozenset({"endpoint", "region", "timeout"})),
    "init.s3_pull": (
        frozenset({"bucket", "key", "destination"}),
        frozenset({"endpoint", "region", "timeout"}),
    ),
}
_INIT_NUMBERS = {"port": (1, 65535), "expect_status": (100, 599), "timeout": (0, 86400)}

_DEPLOYMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{2,62}")
_SECRET = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?")
_GROUP = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_MACH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")
_FEATURES = tuple(feature.value for feature in Feature)

At = Callable[[str], str]


def validate_spec(spec: ServiceSpec, *, field: str = "spec") -> None:
    """InvalidSpec for a broken rule, Unsupported for a field of the reference that has no meaning here."""

    def at(path: str) -> str:
        return f"{field}.{path}" if field else path

    check_image(spec.image.name, field=at("image.name"), error=InvalidSpec)
    _schedule(spec, at)
    _command(spec, at)
    check_env(spec.env, at("env"))
    _resources(spec, at)
    _endpoints(spec, at)
    _storage(spec, at)
    _health(spec, at)
    _init(spec, at)
    _sandbox(spec, at)
    _life(spec, at)
    check_labels(spec.labels, at("labels"))
    _placement(spec, at)
    check_supported(spec, at)


def validate_deployment(deployment: DeploymentSpec) -> None:
    """The rules of a whole document, and of each of its services."""
    if deployment.version != "v1":
        raise InvalidSpec(f"{shorten(deployment.version)} is no known version: must be v1", field="version")
    if _DEPLOYMENT.fullmatch(deployment.deployment) is None:
        raise InvalidSpec(
            "must be 3 to 63 letters, digits and '-', the first a letter or digit", field="deployment"
        )
    for name, spec in deployment.services.items():
        where = f"services.{key_name(name)}"
        check_service(name, field=where, error=InvalidSpec)
        validate_spec(spec, field=where)
    _dependencies(deployment)
    check_supported_deployment(deployment)


def check_env(env: dict[str, str], field: str) -> None:
    for name, value in env.items():
        where = f"{field}.{key_name(name)}" if name else field
        check_env_name(name, field=where)
        if "\x00" in value:
            raise InvalidSpec("must not contain NUL", field=where)
        if value.startswith("$E:"):
            check_env_name(value[3:], field=where)
        elif value.startswith("$S:"):
            _secret(value[3:], where)


def check_labels(labels: dict[str, str], field: str) -> None:
    if len(labels) > MAX_LABELS:
        raise InvalidSpec(f"{len(labels)} labels are more than {MAX_LABELS}", field=field)
    size = 0
    for key, value in labels.items():
        where = f"{field}.{key_name(key)}" if key else field
        check_text(key, field=where, limit=MAX_LABEL_BYTES)
        check_text(value, field=where, limit=MAX_LABEL_BYTES, empty=True)
        size += len(key.encode()) + len(value.encode())
    if size > MAX_LABEL_BYTES:
        raise InvalidSpec(f"{size} bytes of labels are more than {MAX_LABEL_BYTES}", field=field)


def _secret(reference: str, field: str) -> None:
    service = None
    name = reference
    if reference.startswith("@"):
        service, _, name = reference[1:].partition("/")
    if _SECRET.fullmatch(name) is None or (service is not None and _SECRET.fullmatch(service) is None):
        # Not quoted: somebody may have written the secret itself.
        raise InvalidSpec(
            "not the name of a secret: $S:name, a letter first, then [A-Za-z0-9_-]", field=field
        )
    if service is not None:
        raise Unsupported("a secret of another service is not supported", field=field)


def _schedule(spec: ServiceSpec, at: At) -> None:
    if spec.schedule is None:
        if spec.rtype is RType.CRON:
            raise InvalidSpec("missing: rtype cron needs a schedule", field=at("schedule"))
        return
    if spec.rtype is not RType.CRON:
        raise InvalidSpec(f"only rtype cron has a schedule, not {spec.rtype}", field=at("schedule"))
    check_cron(spec.schedule, field=at("schedule"))


def _command(spec: ServiceSpec, at: At) -> None:
    command = spec.command
    program_seen = False
    for name, words in (("entrypoint", command.entrypoint), ("args", command.args)):
        for index, word in enumerate(words or ()):
            where = at(f"command.{name}[{index}]")
            if program_seen:
                check_argument(word, field=where)
            else:
                check_path(word, field=where)
                program_seen = True
    if command.workdir is not None:
        check_path(command.workdir, field=at("command.workdir"))


def _resources(spec: ServiceSpec, at: At) -> None:
    resources = spec.resources
    if resources.memory is not None:
        parse_memory(resources.memory, field=at("resources.memory"))
    if resources.cpu_time_limit is not None:
        _positive(resources.cpu_time_limit, at("resources.cpu_time_limit"))
    for name, limit in spec.ulimits.items():
        where = at(f"ulimits.{key_name(name)}")
        if name not in ULIMITS:
            raise InvalidSpec(f"{shorten(name)} is none of {' '.join(ULIMITS)}", field=where)
        soft, hard = limit.pair
        if hard != -1 and (soft == -1 or soft > hard):
            raise InvalidSpec(f"soft {soft} is above hard {hard}", field=where)
    for index, device in enumerate(spec.devices):
        check_path(device.path, field=at(f"devices[{index}].path"), absolute=True, below=True)
    if spec.logs is not None and spec.logs.max_rate is not None:
        parse_memory(spec.logs.max_rate, field=at("logs.max_rate"))


def _endpoints(spec: ServiceSpec, at: At) -> None:
    names: set[str] = set()
    for index, endpoint in enumerate(spec.endpoints):
        where = at(f"endpoints[{index}]")
        check_text(endpoint.name, field=f"{where}.name", limit=128)
        if endpoint.name in names:
            raise InvalidSpec(
                f"{shorten(endpoint.name)} is the name of another endpoint", field=f"{where}.name"
            )
        names.add(endpoint.name)
        if endpoint.path is not None:
            check_text(endpoint.path, field=f"{where}.path", limit=2048)
        if endpoint.stream is not None and endpoint.stream.session_timeout is not None:
            parse_duration(endpoint.stream.session_timeout, field=f"{where}.stream.session_timeout")
        access = None if endpoint.tunnel is None else endpoint.tunnel.access
        if access is not None and access.max_ttl is not None:
            parse_duration(access.max_ttl, field=f"{where}.tunnel.access.max_ttl")


def _storage(spec: ServiceSpec, at: At) -> None:
    targets: set[str] = set()
    for index, item in enumerate(spec.storage):
        where = at(f"storage[{index}]")
        check_path(item.target, field=f"{where}.target", below=True)
        target = normal_target(item.target)
        if target in targets:
            raise InvalidSpec(
                f"{shorten(item.target)} is the target of another storage", field=f"{where}.target"
            )
        targets.add(target)
        match item:
            case BindStorage():
                check_path(item.source, field=f"{where}.source", absolute=True)
            case NamedStorage():
                check_service(item.name, field=f"{where}.name", error=InvalidSpec)
            case S3Storage():
                check_text(item.bucket, field=f"{where}.bucket", limit=255)
                for name in ("prefix", "endpoint", "region", "credentials"):
                    text = getattr(item, name)
                    if text is not None:
                        check_text(text, field=f"{where}.{name}", limit=2048, empty=True)
                if item.sync_interval is not None:
                    _positive(item.sync_interval, f"{where}.sync_interval")
        if isinstance(item, NamedStorage | TmpfsStorage) and item.size is not None:
            parse_memory(item.size, field=f"{where}.size")


def _health(spec: ServiceSpec, at: At) -> None:
    health = spec.health
    if health is None:
        return
    if health.start_grace is not None:
        parse_duration(health.start_grace, field=at("health.start_grace"))
    for name in ("interval", "timeout"):
        value = getattr(health, name)
        if value is not None:
            _positive(value, at(f"health.{name}"))
    if health.retries < 1:
        raise InvalidSpec("must be at least 1", field=at("health.retries"))
    match health.check:
        case TcpCheck(port=0):
            if all(endpoint.protocol is Protocol.UDP for endpoint in spec.endpoints):
                raise InvalidSpec("port 0 needs an endpoint that is not udp", field=at("health.check.port"))
        case HttpCheck(url=url):
            _url(url, at("health.check.url"))
        case CommandCheck(command=command):
            _shell(command, at("health.check.command"))


def _init(spec: ServiceSpec, at: At) -> None:
    ids: set[str] = set()
    for index, step in enumerate(spec.init.steps):
        where = at(f"init.steps[{index}]")
        check_text(step.id, field=f"{where}.id", limit=128)
        if step.id in ids:
            raise InvalidSpec(f"{shorten(step.id)} is the id of another step", field=f"{where}.id")
        ids.add(step.id)
        _init_step(step, where)


def _init_step(step: InitStep, where: str) -> None:
    if step.uses not in INIT_ACTIONS:
        raise InvalidSpec(
            f"{shorten(step.uses)} is none of {' '.join(sorted(INIT_ACTIONS))}", field=f"{where}.uses"
        )
    required, optional = INIT_ACTIONS[step.uses]
    for name in sorted(required - step.with_.keys()):
        raise InvalidSpec(f"missing: {step.uses} needs {name}", field=f"{where}.with.{name}")
    for name, value in step.with_.items():
        field = f"{where}.with.{key_name(name)}"
        if name not in required and name not in optional:
            raise InvalidSpec(f"{step.uses} has no {shorten(name)}", field=field)
        check_plain(value, field)
        if name in _INIT_NUMBERS:
            least, greatest = _INIT_NUMBERS[name]
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= greatest:
                raise InvalidSpec(f"must be a number from {least} to {greatest}", field=field)
        elif not isinstance(value, str) or not value:
            raise InvalidSpec("must be a text, not empty", field=field)
        elif name == "url":
            _url(value, field)
    if step.timeout is not None:
        _positive(step.timeout, f"{where}.timeout")


def _sandbox(spec: ServiceSpec, at: At) -> None:
    sandbox = spec.sandbox
    _each(sandbox.groups, at("sandbox.groups"), _GROUP, "rule group")
    _each(sandbox.mach_lookup, at("sandbox.mach_lookup"), _MACH, "Mach service")
    for name, paths in (
        ("read", sandbox.read),
        ("write", sandbox.write),
        ("unix_sockets", sandbox.unix_sockets),
    ):
        for index, path in enumerate(paths):
            check_path(path, field=at(f"sandbox.{name}[{index}]"), absolute=True)
    for index, feature in enumerate(sandbox.require):
        if feature not in _FEATURES:
            raise InvalidSpec(
                f"{shorten(feature)} is none of {' '.join(_FEATURES)}", field=at(f"sandbox.require[{index}]")
            )


def _life(spec: ServiceSpec, at: At) -> None:
    if spec.stop_signal is not None:
        signal_number(spec.stop_signal, field=at("stop_signal"), error=InvalidSpec)
    if spec.stop_grace_period is not None:
        parse_duration(spec.stop_grace_period, field=at("stop_grace_period"))
    if spec.restart_policy is not None and spec.restart_policy.delay is not None:
        parse_duration(spec.restart_policy.delay, field=at("restart_policy.delay"))
    if spec.user is not None and _USER.fullmatch(spec.user) is None:
        raise InvalidSpec("must be a user or user:group, by name or number", field=at("user"))


def _placement(spec: ServiceSpec, at: At) -> None:
    if isinstance(spec.scale, AdaptiveScale):
        if spec.scale.min > spec.scale.max:
            raise InvalidSpec(f"min {spec.scale.min} is above max {spec.scale.max}", field=at("scale.min"))
        if spec.scale.cooldown is not None:
            parse_duration(spec.scale.cooldown, field=at("scale.cooldown"))
    for index, needed in enumerate(spec.depends):
        check_service(needed.service, field=at(f"depends[{index}].service"), error=InvalidSpec)
        if needed.timeout is not None:
            parse_duration(needed.timeout, field=at(f"depends[{index}].timeout"))
    if spec.node_selector is not None:
        check_labels(spec.node_selector.labels, at("node_selector.labels"))
        check_labels(spec.node_selector.prefer_labels, at("node_selector.prefer_labels"))


def _dependencies(deployment: DeploymentSpec) -> None:
    """Each names a service of the same document, and nobody waits for himself, however long the way."""
    services = deployment.services
    for name, spec in services.items():
        for index, needed in enumerate(spec.depends):
            if needed.service not in services:
                raise InvalidSpec(
                    f"{shorten(needed.service)} is no service of this document",
                    field=f"services.{name}.depends[{index}].service",
                )
    done: set[str] = set()
    for start in services:
        # One walk into the depth over all services: `way` leads from `start` to where it is.
        way = [] if start in done else [(start, iter(enumerate(services[start].depends)))]
        while way:
            name, rest = way[-1]
            step = next(rest, None)
            if step is None:
                done.add(way.pop()[0])
                continue
            index, needed = step
            names = [each for each, _ in way]
            if needed.service in names:
                circle = " → ".join([*names[names.index(needed.service) :], needed.service][:20])
                raise InvalidSpec(
                    f"goes round in a circle: {circle}", field=f"services.{name}.depends[{index}].service"
                )
            if needed.service not in done:
                way.append((needed.service, iter(enumerate(services[needed.service].depends))))


def _positive(value: str | int | float, field: str) -> None:
    if parse_duration(value, field=field) <= 0:
        raise InvalidSpec("must be more than nothing", field=field)


def _url(url: str, field: str) -> None:
    check_text(url, field=field, limit=2048)
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or " " in url:
        raise InvalidSpec(f"{shorten(url)} is no http or https URL", field=field)


def _shell(command: str, field: str) -> None:
    if not command.strip():
        raise InvalidSpec("must not be empty", field=field)
    check_argument(command, field=field)


def _each(values: Iterable[str], field: str, rule: re.Pattern[str], what: str) -> None:
    for index, value in enumerate(values):
        if rule.fullmatch(value) is None:
            raise InvalidSpec(f"{shorten(value)} is no name of a {what}", field=f"{field}[{index}]")
