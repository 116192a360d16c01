"""What would allow a thing that a sandbox denies: changes of the spec, each tried and asked again.

Nothing is said that was not tried: a candidate is told only when the sandbox of the changed spec allows what
was asked. Candidates stand on ladders, the narrowest first; of each ladder the first that helps is told.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from schemas.errors import ContractError
from schemas.spec import (
    DeviceSpec,
    EndpointSpec,
    GpuSpec,
    NetworkAccess,
    Protocol,
    ServiceSpec,
    validate_spec,
)
from worker.platform.base import RuleGroup
from worker.questions import (
    Answer,
    FileQuestion,
    GpuQuestion,
    LookupQuestion,
    PortQuestion,
    Question,
    RawQuestion,
    SocketQuestion,
    parse_question,
    raw_argument,
)

MOST = 4

# The answer for a changed spec, and what the node's operator would have to grant first, if anything.
Attempt = Callable[[ServiceSpec], tuple[Answer, str | None]]
Change = Callable[[ServiceSpec], ServiceSpec]


class Candidate(NamedTuple):
    text: str
    change: Change


Ladder = list[Candidate]


def would_allow(
    spec: ServiceSpec, question: Question, groups: Mapping[str, RuleGroup], attempt: Attempt
) -> list[str]:
    """Changes of `spec` that allow what `question` asks, at most `MOST`; none when nothing does."""
    found: list[str] = []
    for ladder in (*_group_ladders(spec, groups, attempt), *_ladders(question)):
        for candidate in ladder:
            told = _tried(spec, candidate, attempt)
            if told is not None:
                found.append(told)
                break
        if len(found) == MOST:
            break
    return found


def _tried(spec: ServiceSpec, candidate: Candidate, attempt: Attempt) -> str | None:
    try:
        changed = candidate.change(spec)
        validate_spec(changed)
        answer, condition = attempt(changed)
    except ContractError:
        return None  # no node takes the changed spec, so it is no remedy
    if answer.decision != "allow":
        return None
    return candidate.text if condition is None else f"{candidate.text}; {condition}"


def _group_ladders(spec: ServiceSpec, groups: Mapping[str, RuleGroup], attempt: Attempt) -> Iterator[Ladder]:
    """A group only ever allows: what all of them together do not allow, none of them does."""
    absent = [name for name in groups if name not in spec.sandbox.groups]
    if _tried(spec, Candidate("", _add("groups", *absent)), attempt) is None:
        return
    for name in sorted(absent, key=lambda one: (not groups[one].harmless, one)):
        yield [Candidate(f"add `{name}` to sandbox.groups", _add("groups", name))]


def _ladders(question: Question) -> Iterator[Ladder]:
    match question:
        case FileQuestion(word=word, path=path):
            yield from _file_ladders(path, write=word == "write")
        case SocketQuestion(path=path):
            yield [Candidate(f"sandbox.unix_sockets: [{path}]", _add("unix_sockets", path))]
        case PortQuestion(word="connect"):
            yield _connect_ladder(question)
        case PortQuestion():
            yield _bind_ladder(question)
        case LookupQuestion(name=name):
            yield [Candidate(f"sandbox.mach_lookup: [{name}]", _add("mach_lookup", name))]
            yield _gpu_ladder()
        case GpuQuestion():
            yield _gpu_ladder()
        case RawQuestion():
            yield from _raw_ladders(question)


def _raw_ladders(question: RawQuestion) -> Iterator[Ladder]:
    """By what the argument names, whatever the operation."""
    text = question.argument
    argument = raw_argument(question.operation, text)
    if argument.path is not None or (text is not None and text.startswith("/")):
        path = argument.path or text or ""
        yield from _file_ladders(path, write=False)
        yield from _file_ladders(path, write=True)
        yield [Candidate(f"sandbox.unix_sockets: [{path}]", _add("unix_sockets", path))]
    if argument.address is not None:
        try:
            word = "connect" if question.operation == "network-outbound" else "bind"
            plain = parse_question(word, argument.address, lambda path: path)
        except ContractError:
            return  # an address that only the raw operation has
        if isinstance(plain, PortQuestion):
            yield _connect_ladder(plain) if word == "connect" else _bind_ladder(plain)
    if text is not None and text.isdecimal():
        plain = PortQuestion(
            "connect", "localhost", min(int(text), 65535), udp=question.operation.endswith("udp")
        )
        yield _connect_ladder(plain)
        yield _bind_ladder(plain)
    if argument.name is not None:
        yield [Candidate(f"sandbox.mach_lookup: [{argument.name}]", _add("mach_lookup", argument.name))]
    yield _gpu_ladder()
    yield [_access(level) for level in (NetworkAccess.LOCALHOST, NetworkAccess.OUTBOUND, NetworkAccess.FULL)]


def _file_ladders(path: str, *, write: bool) -> Iterator[Ladder]:
    key = "write" if write else "read"
    yield [Candidate(f"sandbox.{key}: [{path}]", _add(key, path))]
    if path.startswith("/dev/"):
        device = DeviceSpec(path=path, write=write)
        flags = "" if write else ", write: false"
        yield [
            Candidate(
                f"devices: [{{path: {path}{flags}}}]",
                lambda spec: msgspec.structs.replace(spec, devices=[*spec.devices, device]),
            )
        ]


def _connect_ladder(question: PortQuestion) -> Ladder:
    port = Candidate(f"network.connect_ports: [{question.port}]", _add_port(question.port))
    localhost, outbound, full = (
        _access(level) for level in (NetworkAccess.LOCALHOST, NetworkAccess.OUTBOUND, NetworkAccess.FULL)
    )
    if question.local:
        return [port, localhost, _both(localhost, port), outbound, _both(outbound, port), full]
    return [port, outbound, full]


def _bind_ladder(question: PortQuestion) -> Ladder:
    protocol = Protocol.UDP if question.udp else Protocol.TCP
    endpoint = Candidate(
        f"endpoints: [{{name: NAME, protocol: {protocol.value}, port: {question.port}}}]",
        _add_endpoint(protocol, question.port),
    )
    localhost, outbound, full = (
        _access(level) for level in (NetworkAccess.LOCALHOST, NetworkAccess.OUTBOUND, NetworkAccess.FULL)
    )
    return [endpoint, _both(localhost, endpoint), _both(outbound, endpoint), full]


def _gpu_ladder() -> Ladder:
    return [
        Candidate(
            f"resources.gpu: {{count: 1, vendor: apple{', mode: mps' if mode else ''}}}",
            _gpu(GpuSpec(count=1, vendor="apple", mode=mode)),
        )
        for mode in ("mps", None)
    ]


# -- changes


def _both(one: Candidate, other: Candidate) -> Candidate:
    return Candidate(f"{one.text} and {other.text}", lambda spec: other.change(one.change(spec)))


def _add(key: str, *more: str) -> Change:
    def change(spec: ServiceSpec) -> ServiceSpec:
        values = [*getattr(spec.sandbox, key), *more]
        return msgspec.structs.replace(spec, sandbox=msgspec.structs.replace(spec.sandbox, **{key: values}))

    return change


def _add_port(port: int) -> Change:
    def change(spec: ServiceSpec) -> ServiceSpec:
        ports = _unique([*spec.network.connect_ports, port])
        network = msgspec.structs.replace(spec.network, connect_ports=ports)
        return msgspec.structs.replace(spec, network=network)

    return change


def _add_endpoint(protocol: Protocol, port: int) -> Change:
    def change(spec: ServiceSpec) -> ServiceSpec:
        taken = {endpoint.name for endpoint in spec.endpoints}
        name = next(
            name for name in (f"port-{port}", f"port-{port}-{protocol.value}", "x") if name not in taken
        )
        endpoint = EndpointSpec(name=name, protocol=protocol, port=port)
        return msgspec.structs.replace(spec, endpoints=[*spec.endpoints, endpoint])

    return change


def _access(level: NetworkAccess) -> Candidate:
    def change(spec: ServiceSpec) -> ServiceSpec:
        return msgspec.structs.replace(spec, network=msgspec.structs.replace(spec.network, access=level))

    return Candidate(f"network.access: {level.value}", change)


def _gpu(gpu: GpuSpec) -> Change:
    def change(spec: ServiceSpec) -> ServiceSpec:
        return msgspec.structs.replace(spec, resources=msgspec.structs.replace(spec.resources, gpu=gpu))

    return change


def _unique(ports: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(ports))
