"""A profile and what it answers: the one place where questions meet the rules of a platform.

The command line, its batches and the queries of a node all ask here.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import msgspec

from schemas.errors import InvalidCommand
from worker.platform.base import ROOTED, Driver, Profile, SandboxPolicy
from worker.platform.darwin import sbpl_operations
from worker.platform.darwin.evaluate import Argument, CompiledProfile, Rejected, compile_profile
from worker.platform.linux import landlock, system
from worker.platform.linux.decide import FAMILIES, KINDS, SCOPES, Confinement
from worker.platform.linux.ruling import Ruling
from worker.profiles import linux_rules
from worker.questions import (
    PLAIN,
    Answer,
    FileQuestion,
    GpuQuestion,
    LookupQuestion,
    PortQuestion,
    Question,
    RawQuestion,
    SocketQuestion,
    requests,
)

SBPL = "sbpl"
LINUX_RAW = (
    *landlock.FS_RIGHTS,
    "connect_tcp",
    "bind_tcp",
    "connect_udp",
    "bind_udp",
    "socket",
    "syscall",
    *SCOPES,
)
# A node of the kernel's graphics, which stands for all GPUs.
GPU_DEVICE = "/dev/dri/renderD128"


class Sandbox(Protocol):
    """A profile that can be asked."""

    def ask(self, question: Question) -> Answer:
        """InvalidCommand for a raw operation that the platform has not."""


def sandbox_of(
    profile: Profile,
    *,
    release: int | None = None,
    driver: Driver | None = None,
    links: Mapping[str, str] | None = None,
) -> Sandbox:
    """What answers for a profile, also for one that another machine gave.

    With the `driver` of the machine it is of, the system's files are those that this host has; else those of
    the list. `links` are paths that questions may use for others: those of the spec that were links. Volumes
    are found where the rootfs has them. msgspec.ValidationError or KeyError for a profile that is not ours.
    """
    policy = msgspec.convert(profile.policy, SandboxPolicy)
    found = dict(links or {})
    if policy.isolation != ROOTED:
        found |= {policy.rootfs + volume.target: volume.source for volume in policy.volumes}
    if profile.language == SBPL:
        return SeatbeltSandbox(profile.text, profile.params, release=release, links=found)
    if driver is not None:
        known = system.system(policy.groups).rules
        return LinuxSandbox(
            Confinement(profile, driver.plan(policy), policy, known, {**system.links(), **found})
        )
    has_filter = profile.params.get("seccomp") == "true"
    plan = linux_rules(int(profile.params["landlock_abi"]), has_filter).plan(policy)
    return LinuxSandbox(Confinement(profile, plan, policy, system.listed(policy.groups), found))


class SeatbeltSandbox:
    """Compiled at the first question; one that the compiler would refuse answers `reject` to all."""

    def __init__(
        self,
        text: str,
        params: Mapping[str, str],
        *,
        release: int | None = None,
        links: Mapping[str, str] | None = None,
    ) -> None:
        self._text = text
        self._params = params
        self._release = release
        self._links = links or {}
        self._compiled: CompiledProfile | Rejected | None = None

    def compiled(self) -> CompiledProfile:
        """Raises Rejected."""
        if self._compiled is None:
            try:
                self._compiled = compile_profile(self._text, self._params, release=self._release)
            except Rejected as failure:
                self._compiled = failure
        if isinstance(self._compiled, Rejected):
            raise self._compiled
        return self._compiled

    def ask(self, question: Question) -> Answer:
        if isinstance(question, RawQuestion) and not sbpl_operations.known(question.operation):
            raise no_operation(question.operation, "Seatbelt has (file-read-data, mach-lookup, …)")
        return together(self.decide(*request) for request in requests(question))

    def decide(self, operation: str, argument: Argument) -> Answer:
        """The answer to one raw operation."""
        if argument.path is not None and argument.real is None:
            real = past_links(argument.path, self._links)
            if real != argument.path:
                argument = msgspec.structs.replace(argument, real=real)
        try:
            verdict = self.compiled().decide(operation, argument)
        except Rejected as failure:
            return Answer("reject", None, failure.line, str(failure))
        return Answer(verdict.decision, verdict.rule, verdict.line, verdict.reason)


class LinuxSandbox:
    def __init__(self, confinement: Confinement) -> None:
        self._confinement = confinement

    def ask(self, question: Question) -> Answer:
        rulings = _rulings(self._confinement, question)
        return together(
            Answer(ruling.decision, ruling.rule, self._confinement.line(ruling.rule), ruling.reason)
            for ruling in rulings
        )


def together(answers: Iterable[Answer]) -> Answer:
    """Of several needs: the first that is denied, else the first that is not sure, else the first."""
    found = list(answers)
    for decision in ("reject", "deny", "unknown"):
        for answer in found:
            if answer.decision == decision:
                return answer
    return found[0]


def past_links(path: str, links: Mapping[str, str]) -> str:
    for link in sorted(links, key=len, reverse=True):
        if path == link or path.startswith(link + "/"):
            return links[link] + path[len(link) :]
    return path


def no_operation(name: str, others: str) -> InvalidCommand:
    return InvalidCommand(
        f"there is no operation {name}: say {', '.join(PLAIN)} or one that {others}", field="operation"
    )


def _rulings(asked: Confinement, question: Question) -> Iterable[Ruling]:
    match question:
        case FileQuestion(word=word, path=path):
            right = {"read": "read_file", "write": "write_file", "exec": "execute"}[word]
            return [asked.file(right, path)]
        case SocketQuestion(word="connect"):
            return [asked.unix(question.path)]
        case SocketQuestion(path=path):
            return [asked.unix(path, serve=True), asked.file("make_sock", path)]
        case PortQuestion(word="bind", port=port, udp=udp):
            return [asked.bind(port, udp=udp)]
        case PortQuestion(port=port, udp=udp):
            # libc looks names up over UDP.
            named = [asked.connect(53, udp=True)] if question.named else []
            return [asked.connect(port, udp=udp, local=question.local), *named]
        case LookupQuestion():
            return [Ruling("deny", None, "Mach services are those of a Mac")]
        case GpuQuestion():
            return [asked.file("read_file", GPU_DEVICE), asked.file("write_file", GPU_DEVICE)]
    return [_raw(asked, question)]


def _raw(asked: Confinement, question: RawQuestion) -> Ruling:
    """An operation of `LINUX_RAW`: PATH for rights to files, PORT, `FAMILY/TYPE`, a system call's name."""
    operation, argument = question.operation, question.argument or ""
    if operation in landlock.FS_RIGHTS:
        if not argument.startswith("/"):
            raise InvalidCommand(f"{operation} takes an absolute path", field="argument")
        return asked.file(operation, argument)
    if operation in ("connect_tcp", "bind_tcp", "connect_udp", "bind_udp"):
        if not (argument.isascii() and argument.isdecimal() and len(argument) <= 5):
            raise InvalidCommand(f"{operation} takes a port", field="argument")
        word, _, protocol = operation.partition("_")
        decide = asked.connect if word == "connect" else asked.bind
        return decide(int(argument), udp=protocol == "udp")
    if operation == "socket":
        family, _, kind = argument.partition("/")
        if family not in FAMILIES or kind not in KINDS:
            families, kinds = "|".join(FAMILIES), "|".join(KINDS)
            raise InvalidCommand(f"socket takes FAMILY/TYPE: {families} / {kinds}", field="argument")
        return asked.socket(family, kind, 0)
    if operation == "syscall":
        if not argument:
            raise InvalidCommand("syscall takes the name of a system call", field="argument")
        return asked.call(argument)
    if operation in SCOPES:
        return asked.scope(operation)
    raise no_operation(operation, f"Linux has ({', '.join(LINUX_RAW)})")
