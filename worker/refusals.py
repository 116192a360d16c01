"""What a Mac's log says that a container was refused, and what of its spec would allow it.

Nothing is suggested that was not tried: the spec is changed and the evaluator asked again (`worker.remedies`).
"""

import re
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from functools import partial
from typing import Literal, NamedTuple

import msgspec

from schemas.errors import ContractError
from schemas.queries import DenialEntry, DenialsReply
from schemas.spec import ServiceSpec
from worker.answers import Sandbox
from worker.platform.base import RuleGroup
from worker.platform.darwin.denials import Denial, LogReport, read_log
from worker.platform.darwin.unified_log import LogOutput
from worker.questions import ELSEWHERE, Answer, LookupQuestion, PortQuestion, Question, RawQuestion
from worker.remedies import would_allow

MAX_DENIALS = 200
MAX_REPLY_BYTES = 512 * 1024
# Each takes a profile for every change that is tried, about 10 ms a profile.
MAX_EXPLAINED = 40
# Of what a record may mean, so many are told apart in words.
_TOLD = 2
_KEPT_SANDBOXES = 64

LOWER_BOUND = (
    "macOS does not record every refusal, least of all of programs that Apple did not make: "
    "what is not listed may have been refused all the same"
)

_PORT = re.compile(r"(?:remote|local):(\S*):([0-9]{1,5})")
_IOCTL = re.compile(r"path:(.*?)(?: ioctl-command:.*)?", re.DOTALL)
_KIND = re.compile(r"(.*) \((xpc|local|per-pid|global)\)")
_SOCKET = re.compile(r"domain:([0-9]{1,3}) type:([0-9]{1,3}) protocol:([0-9]{1,5})")
# <sys/socket.h> of macOS
_DOMAINS = {1: "AF_UNIX", 2: "AF_INET", 17: "AF_ROUTE", 30: "AF_INET6", 32: "AF_SYSTEM"}
_TYPES = {1: "SOCK_STREAM", 2: "SOCK_DGRAM", 3: "SOCK_RAW"}

# The sandbox of a changed spec, and what the node's operator would have to grant first, if anything.
Build = Callable[[ServiceSpec], tuple[Sandbox, str | None]]


class Whose(NamedTuple):
    """Whose refusals are looked for: live processes, and since when the container runs."""

    instance: str
    pids: Collection[int] = ()
    since: datetime | None = None


def report(
    output: LogOutput,
    whose: Whose,
    spec: ServiceSpec,
    groups: Mapping[str, RuleGroup],
    build: Build,
) -> DenialsReply:
    """The reply to the query `denials`. Takes seconds where there is much to explain: call it in a thread."""
    read = read_log(output.raw, instance=whose.instance, pids=whose.pids, since=whose.since)
    explainer = Explainer(spec, groups, build)
    entries = []
    size = 0
    for number, denial in enumerate(read.denials[:MAX_DENIALS]):
        entry = DenialEntry(
            time_first=denial.time_first,
            time_last=denial.time_last,
            count=denial.count,
            process=denial.process,
            pid=denial.pid,
            operation=denial.operation,
            argument=denial.argument,
            allow=explainer.allow(denial) if number < MAX_EXPLAINED else None,
        )
        size += len(msgspec.json.encode(entry))
        if size > MAX_REPLY_BYTES:
            break
        entries.append(entry)
    missing = _missing(read, output.cut, left_out=len(read.denials) - len(entries))
    remarks = [*missing]
    if len(entries) > MAX_EXPLAINED:
        remarks.append(f"what would allow it was worked out for the newest {MAX_EXPLAINED} only")
    if explainer.allowed:
        remarks.append(
            f"{explainer.allowed} of these the sandbox of now allows: the spec or the node's policy changed, "
            "or the evaluator is wrong"
        )
    return DenialsReply(denials=entries, complete=not missing, note="; ".join([*remarks, LOWER_BOUND]))


def _missing(read: LogReport, older_dropped: bool, *, left_out: int) -> list[str]:
    """What is known not to be told."""
    found = []
    if read.merged:
        found.append(f"macOS merged {read.merged} reports into others (its limit of reports)")
    if read.cut:
        found.append(f"{read.cut} reports were too long and lost their end")
    if read.unreadable:
        found.append(f"{read.unreadable} reports could not be read")
    if read.lost:
        found.append("the log dropped messages")
    if older_dropped:
        found.append("the log was too large: only its newest part was read")
    if left_out:
        found.append(f"{left_out} older ones are left out")
    return found


class Explainer:
    """`allowed` counts the refused things that the sandbox of `spec` allows: they contradict the evaluator."""

    def __init__(self, spec: ServiceSpec, groups: Mapping[str, RuleGroup], build: Build) -> None:
        self.allowed = 0
        self._spec = spec
        self._groups = groups
        self._build = build
        # Every refusal tries the same groups. By the text of the spec, as a spec has no hash.
        self._built: dict[bytes, tuple[Sandbox, str | None]] = {}

    def allow(self, denial: Denial) -> str | None:
        """Changes of the spec that would allow it, in words; None when none does or it is not fully known."""
        if not denial.whole:
            return None
        try:
            refused = self._refused(denial)
        except ContractError:
            return None  # an operation that no rule is about, or a spec that is not granted any more
        if not refused:
            self.allowed += 1
            return None
        told: dict[str, None] = {}
        for question in refused:
            found = would_allow(self._spec, question, self._groups, partial(self._attempt, question))
            told |= dict.fromkeys(found[:1])
        return " or ".join(list(told)[:_TOLD]) or None

    def _refused(self, denial: Denial) -> list[Question]:
        """What the record can mean: of the readings that the sandbox does not allow, the likeliest."""
        for readings in questions(denial.operation, denial.argument):
            found = [one for one in readings if self._attempt(one, self._spec)[0].decision != "allow"]
            if found:
                return found
        return []

    def _attempt(self, question: Question, spec: ServiceSpec) -> tuple[Answer, str | None]:
        key = msgspec.json.encode(spec)
        if key not in self._built:
            if len(self._built) == _KEPT_SANDBOXES:
                self._built.pop(next(reversed(self._built)))  # the groups came first and are asked for again
            self._built[key] = self._build(spec)
        sandbox, condition = self._built[key]
        return sandbox.ask(question), condition


def questions(operation: str, argument: str | None) -> tuple[tuple[Question, ...], ...]:
    """What may have been asked for when macOS wrote this, the likelier readings first.

    It tells neither the host nor the protocol of a connection, nor the kind of a Mach name.
    """
    text = argument or ""
    if operation.startswith("network-") and (found := _PORT.fullmatch(text)) and int(found[2]) <= 65535:
        return _of_port(operation, found[1], int(found[2]))
    if operation == "mach-lookup" and text:
        kind = _KIND.fullmatch(text)
        if kind is not None and kind[2] in ("xpc", "local", "global"):
            return ((LookupQuestion(kind[1], kind[2]),),)
        return ((LookupQuestion(text, "global"),), (LookupQuestion(text, "local"),))
    return ((RawQuestion(operation, _object(operation, text)),),)


def _of_port(operation: str, host: str, port: int) -> tuple[tuple[Question, ...], ...]:
    word: Literal["connect", "bind"] = "connect" if operation == "network-outbound" else "bind"
    hosts = [host] if host != "*" else (["localhost", ELSEWHERE] if word == "connect" else ["*"])
    return tuple(tuple(PortQuestion(word, one, port, udp) for one in hosts) for udp in (False, True))


def _object(operation: str, text: str) -> str | None:
    """The argument of a raw operation as JSON: nothing in the text can be read as anything but a value."""
    family = operation.partition("-")[0]
    fields: dict[str, str | int]
    if not text:
        return None
    if found := _IOCTL.fullmatch(text):
        fields = {"path": found[1]}
    elif operation.startswith(("file-", "process-exec", "network-")):
        fields = {"path": text}
    elif operation == "signal" or operation.startswith(("process-info", "mach-task", "mach-priv")):
        fields = {"target": text.partition(" ")[0]}
    elif family == "iokit" and "open" in operation:
        fields = {"class": text}
    elif found := _SOCKET.fullmatch(text):
        domain, kind = int(found[1]), int(found[2])
        fields = {"number": int(found[3])}
        fields |= {"domain": _DOMAINS[domain]} if domain in _DOMAINS else {}
        fields |= {"type": _TYPES[kind]} if kind in _TYPES else {}
    else:
        fields = {"name": text}
    return msgspec.json.encode(fields).decode()
