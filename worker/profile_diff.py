"""What two sandboxes decide differently, whatever their texts say. Pure.

The questions are a standard battery and everything that either side names: in its policy each path and a
place in it, each port on this machine and elsewhere, each socket and device; in a Seatbelt profile whatever
its rules name.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from schemas.status import Gpu
from worker import profile_battery as battery
from worker.answers import SBPL, Sandbox, SeatbeltSandbox
from worker.platform.base import SandboxPolicy
from worker.profile_samples import INSIDE, samples
from worker.questions import (
    ELSEWHERE,
    Answer,
    FileQuestion,
    GpuQuestion,
    LookupQuestion,
    PortQuestion,
    Question,
    RawQuestion,
    SocketQuestion,
    spoken,
)


class Side(NamedTuple):
    """A policy in the language of its platform, and what answers for it."""

    language: str
    policy: SandboxPolicy
    sandbox: Sandbox


class Difference(NamedTuple):
    question: Question
    one: Answer
    other: Answer


def differences(one: Side, other: Side) -> list[Difference]:
    """Every question of the set that the two answer differently, in the order of the set."""
    found = []
    for question in question_set(one, other):
        answers = one.sandbox.ask(question), other.sandbox.ask(question)
        if answers[0].decision != answers[1].decision:
            found.append(Difference(question, *answers))
    return found


def question_set(one: Side, other: Side) -> list[Question]:
    """Without repetition. Raw operations only where both sides speak the same language."""
    asked: dict[Question, None] = {}
    for side in (one, other):
        asked.update(dict.fromkeys(_named(side.policy)))
    asked.update(dict.fromkeys(_standard()))
    if one.language == other.language:
        raw: Sequence[tuple[str, str | None]] = (
            battery.RAW_DARWIN if one.language == SBPL else battery.RAW_LINUX
        )
        asked.update(dict.fromkeys(RawQuestion(operation, argument) for operation, argument in raw))
        for side in (one, other):
            if isinstance(side.sandbox, SeatbeltSandbox):
                asked.update(dict.fromkeys(samples(side.sandbox.compiled().rules)))
    return list(asked)


def questions_of_path(path: str) -> Iterator[Question]:
    """Of a folder or file, and of what a folder holds."""
    for place in (path, f"{path.rstrip('/')}/{INSIDE}"):
        yield FileQuestion("read", place)
        yield FileQuestion("write", place)
        yield FileQuestion("exec", place)


def _named(policy: SandboxPolicy) -> Iterator[Question]:
    paths = [rule.path for rule in policy.paths]
    paths += [volume.source for volume in policy.volumes] + [device.path for device in policy.devices]
    paths += [policy.rootfs, policy.tmp, policy.state_dir, *policy.deny]
    for path in dict.fromkeys(paths):
        yield from questions_of_path(path)
    network = policy.network
    for port in sorted({*network.bind_ports, *network.connect_ports, *network.denied_ports}):
        yield from _of_port(port)
    for socket in network.unix_sockets:
        yield SocketQuestion("connect", socket)
    for name in policy.mach_lookup:
        yield LookupQuestion(name)
    if policy.gpu is not Gpu.NONE:
        yield GpuQuestion()


def _of_port(port: int) -> Iterator[Question]:
    for udp in (False, True):
        yield PortQuestion("connect", "localhost", port, udp)
        yield PortQuestion("connect", ELSEWHERE, port, udp)
        yield PortQuestion("bind", "*", port, udp)


def _standard() -> Iterator[Question]:
    for path in battery.PATHS.split():
        yield FileQuestion("read", path)
        yield FileQuestion("write", path)
        yield FileQuestion("exec", path)
    for port in battery.PORTS:
        yield from _of_port(port)
    yield PortQuestion("connect", "example.com", 443)
    for socket in battery.SOCKETS.split():
        yield SocketQuestion("connect", socket)
    for name in battery.SERVICES.split():
        yield LookupQuestion(name)
        yield LookupQuestion(name, "xpc")
    yield GpuQuestion()


def as_row(difference: Difference) -> dict[str, str | None]:
    """For JSON."""
    return {
        "question": spoken(difference.question),
        "a": difference.one.decision,
        "b": difference.other.decision,
        "a_rule": difference.one.rule,
        "b_rule": difference.other.rule,
    }
