"""What the unified log of a Mac says about refusals, as counted denials of one container. Pure.

A report of the kernel is `[N duplicate reports for ]Sandbox: NAME(PID) deny(1) OPERATION[ ARGUMENT]`, and on
the line after it the message of the rule that decided: in our profiles `sandfleet:INSTANCE/RUN`, always. A
report that was too long ends in `<…>` and has lost that line. What launchd and other servers refuse is told
by sandboxd: the same line, then a block of `Name: value` lines and `MetaData: {…}`.

Containers choose the names of programs and files, so nothing in a message is believed beyond its place: only
the kernel (process 0) and sandboxd are heard, whatever a process writes to the log about itself; the tag is
the last line and nothing else; what is too odd to be told apart is counted as unreadable.

Sources: codex-rs/cli/src/debug_sandbox/seatbelt.rs of openai/codex; records of macOS 14.2, 15.6 and 26 in
buckle, lycaon, nub and safehouse; `log help predicates` for the fields; nolabs-ai/nono#635 for what is dropped.
"""

import re
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

TAG_PREFIX = "sandfleet:"

MAX_LINE_BYTES = 64 * 1024
MAX_NAME = 64  # a process's name has at most 32 bytes (struct proc_bsdinfo)
_CUT = "<…>"
_SANDBOXD = "/usr/libexec/sandboxd"

_TAG = re.compile(re.escape(TAG_PREFIX) + r"([A-Za-z0-9_-]{1,64})/[0-9]{1,10}")
_HEAD = re.compile(r"(?:([1-9][0-9]{0,8}) duplicate reports? for )?Sandbox(?:Violation)?: ")
_VERDICT = re.compile(r"\(([0-9]{1,10})\) (?:deny(?:\([0-9]{1,3}\))?|(allow)) ")
_OPERATION = re.compile(r"[a-z][a-z0-9-]{0,63}\*?(?:<[a-z0-9*-]{1,64}>)?")
# The styles that are no JSON: default, syslog and compact. Anything of a container's stands behind the header.
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3,6}(?:[+-][0-9]{4})? ")
_TEXT_HEAD = re.compile(
    rf"({_TIME.pattern[:-1]}) "
    r"[^():]{0,100}?\b(kernel|sandboxd)(?:\[[0-9]{1,10}(?::[0-9a-f]{1,16})?\])?:? "
    r"(?:\(Sandbox\) )?(?:\[com\.apple\.sandbox\.reporting:violation\] )?"
)


class Denial(msgspec.Struct, frozen=True, kw_only=True):
    """The same refusal, `count` times. `pid` is the newest process.

    `argument` is as macOS wrote it; when it is not `whole`, its end was cut off and it ends in `…`.
    """

    time_first: datetime
    time_last: datetime
    count: int
    process: str
    pid: int
    operation: str
    argument: str | None
    whole: bool = True


class LogReport(msgspec.Struct, frozen=True, kw_only=True):
    """Denials, the newest first, and what is known to be missing.

    `merged` counts reports of which macOS kept only the number, `cut` those that lost their end, `unreadable`
    those of this container that no sense could be made of; `lost` says that the log itself dropped messages.
    """

    denials: tuple[Denial, ...] = ()
    merged: int = 0
    cut: int = 0
    unreadable: int = 0
    lost: bool = False


class _Record(msgspec.Struct, frozen=True):
    """What is read of one line of `--style ndjson`."""

    timestamp: str = ""
    event_type: str = msgspec.field(name="eventType", default="logEvent")
    message: str | None = msgspec.field(name="eventMessage", default=None)
    process_id: int | None = msgspec.field(name="processID", default=None)
    process: str | None = msgspec.field(name="processImagePath", default=None)


class _MetaData(msgspec.Struct, frozen=True):
    """The last line of sandboxd's block."""

    operation: str
    process: str
    pid: int
    action: str = "deny"
    target: str | None = None


class _Message(NamedTuple):
    time: str
    by_kernel: bool
    text: str


class _Refusal(NamedTuple):
    """`tag` is an instance. `doubtful`: the name or the argument looks like a verdict too."""

    tag: str | None
    times: int
    process: str
    pid: int
    operation: str
    argument: str | None
    merged: bool = False
    cut: bool = False
    doubtful: bool = False


class _Unreadable(Exception):
    """A report of the sandbox, but not one of a form that is known."""


_record = msgspec.json.Decoder(_Record)
_metadata = msgspec.json.Decoder(_MetaData)
_BAD_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def read_log(
    raw: bytes, *, instance: str, pids: Collection[int] = (), since: datetime | None = None
) -> LogReport:
    """The denials of `instance` in the output of `log show` or `log stream`, in any style.

    A report without a tag (its end was cut off, or no rule decided) belongs to the container when it
    names one of `pids`, its live processes, and is not older than `since`, its start. Times without a zone
    (`--style compact`) are taken as this machine's. Raises nothing, whatever the bytes are.
    """
    messages, broken, lost = _messages(raw)
    fold = _Fold()
    for message in messages:
        try:
            refusal = _refusal(message)
            time = _moment(message.time)
        except _Unreadable:
            broken += _concerns(message.text, instance, pids)
            continue
        if refusal is None:
            continue
        if refusal.tag is None:
            if refusal.pid not in pids or (since is not None and time < since):
                continue
            if refusal.doubtful:
                broken += 1
                continue
        elif refusal.tag != instance:
            continue
        fold.add(refusal, time, by_kernel=message.by_kernel)
    return fold.report(broken, lost)


def _concerns(text: str, instance: str, pids: Collection[int]) -> bool:
    return f"{TAG_PREFIX}{instance}" in text or any(f"({pid}) " in text for pid in pids)


# -- lines to messages


def _messages(raw: bytes) -> tuple[Iterator[_Message], int, bool]:
    """The sandbox's own messages, the number of broken lines, and whether the log tells of a loss."""
    lines = raw.split(b"\n")
    if not any(line.startswith(b"{") for line in lines):
        return _of_text(raw.decode(errors="replace")), 0, False
    found: list[_Message] = []
    broken, lost = 0, False
    for line in lines:
        if not line.startswith(b"{"):
            continue  # the line that says which predicate is in use
        try:
            record = None if len(line) > MAX_LINE_BYTES else _record.decode(line)
        except _BAD_JSON:
            record = None
        if record is None:
            broken += 1
        elif record.event_type == "lossEvent":
            lost = True
        elif record.message is not None:
            if record.process_id == 0:
                found.append(_Message(record.timestamp, True, record.message))
            elif record.process == _SANDBOXD:
                found.append(_Message(record.timestamp, False, record.message))
    return iter(found), broken, lost


def _of_text(text: str) -> Iterator[_Message]:
    """Messages of the other styles: a header line, and all lines up to the next one with a time."""
    place: tuple[str, bool] | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        if _TIME.match(line):
            if place is not None:
                yield _Message(*place, "\n".join(lines).rstrip("\n"))
            head = _TEXT_HEAD.match(line)
            place = None if head is None else (head[1], head[2] == "kernel")
            lines = [] if head is None else [line[head.end() :]]
        elif place is not None:
            lines.append(line)
    if place is not None:
        yield _Message(*place, "\n".join(lines).rstrip("\n"))


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError, OSError) as failure:
        raise _Unreadable from failure


# -- messages to refusals


def _refusal(message: _Message) -> _Refusal | None:
    """None for what is no denial of a container's sandbox (`System Policy:` is macOS's own)."""
    head = _HEAD.match(message.text)
    if head is None:
        return None
    if not message.by_kernel:
        return _of_block(message.text, head)
    body, _, last = message.text.rpartition("\n")
    tag = _TAG.fullmatch(last)
    return _parsed(message.text if tag is None else body, head, None if tag is None else tag[1])


def _of_block(text: str, head: re.Match[str]) -> _Refusal | None:
    """A report of sandboxd. Its MetaData is JSON, which no file name can break out of."""
    line, _, block = text.partition("\n")
    found = _parsed(line, head, None)
    _, mark, encoded = block.rpartition("MetaData: ")
    if found is None or not mark:
        return found
    try:
        data = _metadata.decode(encoded.partition("\n")[0])
    except _BAD_JSON as failure:
        raise _Unreadable from failure
    if data.action != "deny":
        return None
    if _OPERATION.fullmatch(data.operation) is None or not 0 < data.pid < 2**31:
        raise _Unreadable
    second = _TAG.fullmatch(block.partition("\n")[0])
    trusted = second is not None and "\n" not in (data.target or "")
    return found._replace(
        tag=second[1] if second is not None and trusted else None,
        process=data.process[:MAX_NAME],
        pid=data.pid,
        operation=data.operation,
        argument=data.target or None,
        doubtful=False,
    )


def _parsed(body: str, head: re.Match[str], tag: str | None) -> _Refusal | None:
    cut = body.endswith(_CUT)
    rest = body[head.end() :].removesuffix(_CUT)
    # The first verdict ends the process's name; an argument may hold anything.
    verdict = _VERDICT.search(rest, 1, 1 + MAX_NAME + 32)
    if verdict is None:
        raise _Unreadable
    if verdict[2]:
        return None
    operation, _, argument = rest[verdict.end() :].partition(" ")
    pid = int(verdict[1])
    if _OPERATION.fullmatch(operation) is None or not 0 < pid < 2**31:
        raise _Unreadable
    return _Refusal(
        tag=tag,
        times=1 if head[1] is None else int(head[1]),
        process=rest[: verdict.start()][:MAX_NAME],
        pid=pid,
        operation=operation,
        argument=(argument + "…" if cut else argument) or None,
        merged=head[1] is not None,
        cut=cut,
        doubtful=_VERDICT.search(rest, verdict.end() - 1) is not None,
    )


# -- refusals to denials


class _Counted:
    """One denial while it grows. The kernel and sandboxd may both tell of the same refusal."""

    def __init__(self, refusal: _Refusal, time: datetime) -> None:
        self.refusal = refusal
        self.first = self.last = time
        self.by_kernel = 0
        self.by_sandboxd = 0

    def add(self, refusal: _Refusal, time: datetime, *, by_kernel: bool) -> None:
        if time >= self.last:
            self.last, self.refusal = time, refusal
        self.first = min(self.first, time)
        if by_kernel:
            self.by_kernel += refusal.times
        else:
            self.by_sandboxd += refusal.times


class _Fold:
    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str | None], _Counted] = {}
        self._merged = 0
        self._cut = 0

    def add(self, refusal: _Refusal, time: datetime, *, by_kernel: bool) -> None:
        key = (refusal.process, refusal.operation, refusal.argument)
        counted = self._found.get(key)
        if counted is None:
            counted = self._found[key] = _Counted(refusal, time)
        counted.add(refusal, time, by_kernel=by_kernel)
        self._merged += refusal.times * refusal.merged
        self._cut += refusal.cut

    def report(self, unreadable: int, lost: bool) -> LogReport:
        denials = [
            Denial(
                time_first=one.first,
                time_last=one.last,
                count=max(one.by_kernel, one.by_sandboxd),
                process=one.refusal.process,
                pid=one.refusal.pid,
                operation=one.refusal.operation,
                argument=one.refusal.argument,
                whole=not one.refusal.cut,
            )
            for one in self._found.values()
        ]
        denials.sort(key=lambda one: one.time_last, reverse=True)
        return LogReport(
            denials=tuple(denials), merged=self._merged, cut=self._cut, unreadable=unreadable, lost=lost
        )
