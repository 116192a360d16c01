"""What in a spec's grants cannot be meant: too broad, dead, at odds with each other, or dangerous. Pure.

What can be asked of the sandbox is asked: a grant is dead when the sandbox without it decides the same, and
at odds with another when what it names is denied all the same.
"""

from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import msgspec

from schemas.errors import ContractError
from schemas.spec import BindStorage, NetworkAccess, Protocol, ServiceSpec
from worker import profile_lint_lists as lists
from worker.answers import SBPL, Sandbox, SeatbeltSandbox, sandbox_of
from worker.platform.darwin.evaluate import Rejected
from worker.profile_diff import Side, differences, questions_of_path
from worker.profile_samples import INSIDE, all_sampled, differing, samples
from worker.profiles import Made, Place, canonical_on, make, rules_of
from worker.questions import FileQuestion, LookupQuestion, PortQuestion, Question, SocketQuestion, spoken

T = TypeVar("T")
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Finding(msgspec.Struct, frozen=True):
    """`field` is that of the spec, `rule` the name of what it breaks."""

    severity: Severity
    rule: str
    field: str
    message: str


def lint(spec: ServiceSpec, place: Place) -> list[Finding]:
    """Findings about a spec on a node of this kind, the worst first."""
    found = [
        *_network(spec),
        *_files(spec, place),
        *_sockets(spec, place),
        *_services(spec),
        *_groups(spec, place),
    ]
    try:
        made = make(spec, place)
    except ContractError as failure:
        field = (failure.field or "").removeprefix("spec.")
        found.append(Finding("error", str(failure.code), field, failure.message))
    else:
        found += _asked(spec, made, place)
    unique = dict.fromkeys(found)
    return sorted(unique, key=lambda one: (SEVERITIES.index(one.severity), one.field, one.rule))


# -- by reading


def _network(spec: ServiceSpec) -> Iterator[Finding]:
    access = spec.network.access
    if access is NetworkAccess.AUTO and not spec.endpoints:
        yield Finding(
            "warning",
            "auto-full",
            "network.access",
            "auto without endpoints is full, the whole network of the host: say none, localhost or outbound",
        )
    if "dns" in spec.sandbox.groups and access is NetworkAccess.NONE:
        yield Finding(
            "warning",
            "dns-leaks",
            "sandbox.groups",
            "with the group dns names can be looked up, and so data can leave, in spite of network.access none",
        )


def _files(spec: ServiceSpec, place: Place) -> Iterator[Finding]:
    grants = [(f"sandbox.read[{at}]", path, False) for at, path in enumerate(spec.sandbox.read)]
    grants += [(f"sandbox.write[{at}]", path, True) for at, path in enumerate(spec.sandbox.write)]
    grants += [
        (f"storage[{at}].source", item.source, not item.readonly)
        for at, item in enumerate(spec.storage)
        if isinstance(item, BindStorage)
    ]
    grants += [(f"devices[{at}].path", device.path, device.write) for at, device in enumerate(spec.devices)]
    for field, written, write in grants:
        try:
            path = canonical_on(place.platform)(written)
        except ContractError:
            continue  # `make` tells of it
        if write and lists.is_system(path):
            yield Finding(
                "error", "writes-system", field, f"{path} belongs to the system: nothing may write there"
            )
        elif lists.is_broad(path):
            how = "written" if write else "read"
            message = (
                f"{path} is everything of many programs and users, to be {how}: name what is needed below it"
            )
            yield Finding("warning", "too-broad", field, message)
        secret = lists.secret_in(path)
        if secret is not None:
            yield Finding("warning", "secrets", field, f"{path} holds {secret}")
        if write and lists.starts_programs(path):
            yield Finding(
                "error", "escape", field, f"what is written to {path} is run outside of the sandbox"
            )


def _sockets(spec: ServiceSpec, place: Place) -> Iterator[Finding]:
    for at, path in enumerate(spec.sandbox.unix_sockets):
        power = lists.power_of_socket(path)
        if power is not None:
            yield Finding("warning", "control-socket", f"sandbox.unix_sockets[{at}]", f"{path} {power}")
    if spec.sandbox.unix_sockets and place.platform == "linux":
        yield Finding(
            "warning",
            "all-sockets",
            "sandbox.unix_sockets",
            "on Linux one granted socket opens every one that the worker's user may connect to",
        )
    for at, endpoint in enumerate(spec.endpoints):
        if place.platform == "linux" and endpoint.listen_port < lists.FIRST_OPEN_PORT:
            name = "port" if endpoint.target_port is None else "target_port"
            message = (
                f"no container has the capability that port {endpoint.listen_port} takes on Linux, unless the "
                f"host opens it: use {lists.FIRST_OPEN_PORT} or above"
            )
            yield Finding("warning", "low-port", f"endpoints[{at}].{name}", message)


def _services(spec: ServiceSpec) -> Iterator[Finding]:
    for at, name in enumerate(spec.sandbox.mach_lookup):
        danger = lists.danger_of_service(name)
        if danger is not None:
            severity, what = danger
            yield Finding(severity, "dangerous-service", f"sandbox.mach_lookup[{at}]", f"{name} {what}")


def _groups(spec: ServiceSpec, place: Place) -> Iterator[Finding]:
    known = rules_of(place).groups()
    for at, name in enumerate(spec.sandbox.groups):
        group = known.get(name)
        if group is not None and not group.harmless:
            message = f"{name} needs the operator's grant: {group.text}"
            yield Finding("note", "needs-grant", f"sandbox.groups[{at}]", message)


# -- by asking


def _asked(spec: ServiceSpec, made: Made, place: Place) -> Iterator[Finding]:
    side = _side(made, place)
    if isinstance(side.sandbox, SeatbeltSandbox):
        try:
            compiled = side.sandbox.compiled()
        except Rejected as failure:
            yield Finding(
                "error", "rejected", "", f"macOS would refuse the profile: line {failure.line}: {failure}"
            )
            return
        for warning in compiled.warnings:
            yield Finding("warning", "profile", "", warning)
    yield from _denied(spec, made, side.sandbox)
    yield from _writable(spec, made, side.sandbox)
    yield from _dead(spec, side, place)


def _side(made: Made, place: Place) -> Side:
    return Side(made.profile.language, made.policy, sandbox_of(made.profile, release=place.macos))


def _denied(spec: ServiceSpec, made: Made, sandbox: Sandbox) -> Iterator[Finding]:
    """What the spec names and does not get."""
    for field, question in _wanted(spec, made):
        answer = sandbox.ask(question)
        if answer.decision == "deny":
            decided = f" by line {answer.line}: {answer.rule}" if answer.rule else ""
            message = f"asks for {spoken(question)}, which is denied all the same ({answer.reason}){decided}"
            yield Finding("error", "contradiction", field, message)


def _wanted(spec: ServiceSpec, made: Made) -> Iterator[tuple[str, Question]]:
    policy = made.policy
    for origin in ("sandbox.read", "sandbox.write"):
        rules = [rule for rule in policy.paths if rule.origin == origin]
        for at, rule in enumerate(rules):
            yield f"{origin}[{at}]", FileQuestion("read", rule.path)
            if "w" in rule.access:
                yield f"{origin}[{at}]", FileQuestion("write", f"{rule.path}/{INSIDE}")
    for at, volume in enumerate(policy.volumes):
        if not volume.readonly:
            yield f"storage[{at}].target", FileQuestion("write", f"{volume.source}/{INSIDE}")
    for at, endpoint in enumerate(spec.endpoints):
        udp = endpoint.protocol is Protocol.UDP
        yield f"endpoints[{at}].port", PortQuestion("bind", "*", endpoint.listen_port, udp)
    for at, port in enumerate(spec.network.connect_ports):
        yield f"network.connect_ports[{at}]", PortQuestion("connect", "localhost", port)
    for at, name in enumerate(spec.sandbox.mach_lookup):
        yield f"sandbox.mach_lookup[{at}]", LookupQuestion(name)
    for at, path in enumerate(policy.network.unix_sockets[: len(spec.sandbox.unix_sockets)]):
        yield f"sandbox.unix_sockets[{at}]", SocketQuestion("connect", path)


def _writable(spec: ServiceSpec, made: Made, sandbox: Sandbox) -> Iterator[Finding]:
    """What the spec wants to be read-only and is not."""
    wanted = [
        (f"storage[{at}].readonly", volume.source)
        for at, volume in enumerate(made.policy.volumes)
        if volume.readonly
    ]
    rules = [rule for rule in made.policy.paths if rule.origin == "sandbox.read"]
    wanted += [(f"sandbox.read[{at}]", rule.path) for at, rule in enumerate(rules)]
    for field, path in wanted:
        answer = sandbox.ask(FileQuestion("write", f"{path}/{INSIDE}"))
        if answer.decision == "allow":
            message = f"{path} is writable all the same: line {answer.line}: {answer.rule}"
            yield Finding("error" if field.startswith("storage") else "warning", "writable", field, message)


def _dead(spec: ServiceSpec, side: Side, place: Place) -> Iterator[Finding]:
    """Grants without which the sandbox decides the same."""
    for key in ("read", "write", "groups", "mach_lookup", "unix_sockets"):

        def without(rest: list[str], key: str = key) -> ServiceSpec:
            return msgspec.structs.replace(spec, sandbox=msgspec.structs.replace(spec.sandbox, **{key: rest}))

        same = _same_files if key in ("read", "write") else _same
        yield from _dead_of(f"sandbox.{key}", getattr(spec.sandbox, key), without, same, side, place)

    def without_ports(rest: list[int]) -> ServiceSpec:
        return msgspec.structs.replace(
            spec, network=msgspec.structs.replace(spec.network, connect_ports=rest)
        )

    ports = spec.network.connect_ports
    yield from _dead_of("network.connect_ports", ports, without_ports, _same, side, place)


def _dead_of(
    field: str,
    values: list[T],
    without: Callable[[list[T]], ServiceSpec],
    same: Callable[[Side, Side, str], bool],
    side: Side,
    place: Place,
) -> Iterator[Finding]:
    for at, value in enumerate(values):
        if value in values[:at]:
            yield Finding("warning", "duplicate", f"{field}[{at}]", f"{value} stands there twice")
        elif values.count(value) == 1:
            other = _side(make(without(values[:at] + values[at + 1 :]), place), place)
            if same(side, other, str(value)):
                message = f"{value} changes nothing: all that it allows is allowed, or denied, without it"
                yield Finding("warning", "dead", f"{field}[{at}]", message)


def _same_files(one: Side, other: Side, path: str) -> bool:
    """What can be read, written and executed there: that a folder stays in its place is not why it is named."""
    real = canonical_on("darwin" if one.language == SBPL else "linux")(path)
    return all(
        one.sandbox.ask(question).decision == other.sandbox.ask(question).decision
        for question in questions_of_path(real)
    )


def _same(one: Side, other: Side, _value: str) -> bool:
    """Of two Seatbelt profiles only what their differing rules are about can be decided differently."""
    if not (isinstance(one.sandbox, SeatbeltSandbox) and isinstance(other.sandbox, SeatbeltSandbox)):
        return not differences(one, other)
    rules = differing(one.sandbox.compiled(), other.sandbox.compiled())
    return all_sampled(rules) and all(
        one.sandbox.ask(question).decision == other.sandbox.ask(question).decision
        for question in samples(rules)
    )
