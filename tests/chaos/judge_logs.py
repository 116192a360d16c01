"""The log stream: every byte once and in its place, the ends of runs, and what the programs say they printed.

The programs of a run print lines of one width, numbered from 0 on each stream (`line`), so that every byte of
a run can be computed from the number of the program, which its lines name.

The injector takes no chunk away that was not read before: what one life of the stream lacks, an earlier one had.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from typing import NamedTuple

from .history import LOGS, History, Message, Violation, Witness
from .judge_events import Events
from .judge_states import UNKNOWN_OUTCOME, Status

MAX_CHUNK = 256 * 1024
STREAMS = ("stdout", "stderr")
REASONS = frozenset({"size", "rate", "disk"})
LINE = re.compile(rb"([0-9A-HJKMNP-TV-Z]{26})\.(\d{3}) (stdout|stderr) (\d{8}) (x*)\n")


def line(instance: str, number: int, stream: str, index: int, pad: int) -> bytes:
    return f"{instance}.{number:03d} {stream} {index:08d} {'x' * pad}\n".encode()


class Key(NamedTuple):
    cid: str
    stream: str
    instance: str


class Chunk(NamedTuple):
    generation: int
    stream_seq: int
    run: int
    offset: int
    data: bytes
    lost: int
    eof: int | None
    incomplete: bool

    @property
    def end(self) -> int:
        return self.offset + len(self.data) + self.lost


class Run(NamedTuple):
    """What one run printed on one stream, as far as it was read."""

    key: Key
    run: int
    chunks: list[Chunk]
    eof: bool
    incomplete: bool

    @property
    def start(self) -> int:
        return self.chunks[0].offset

    @property
    def length(self) -> int:
        return max(chunk.end for chunk in self.chunks) - self.start


def check_logs(history: History, events: Events) -> Iterator[Violation]:
    chunks: dict[Key, list[Chunk]] = defaultdict(list)
    found: list[Violation] = []
    for message in history.logs:
        parsed = _parse(history, message, found)
        if parsed is not None:
            chunks[parsed[0]].append(parsed[1])
    yield from found
    ends = _ends_of_runs(events)
    runs: dict[tuple[str, int], dict[str, Run]] = defaultdict(dict)
    for key, line_of in chunks.items():
        yield from _check_places(history, key, line_of)
        for run in _runs(key, line_of):
            runs[key.instance, run.run][key.stream] = run
            if run.incomplete and not _is_cut(ends.get((key.instance, run.run))):
                yield Violation("incomplete without a cause", f"{key}, run {run.run}")
    yield from _check_presence(events, runs)
    yield from _check_contents(history, runs)


def _parse(history: History, message: Message, found: list[Violation]) -> tuple[Key, Chunk] | None:
    where = f"chunk {message.stream_seq} on {message.subject}"
    headers, data = message.headers, message.data
    try:
        node, cid, stream = message.subject.removeprefix(f"{history.prefix}.log.").split(".")
        key = Key(cid, stream, headers["Sandfleet-Instance"])
        run, offset = int(headers["Sandfleet-Run"]), int(headers["Sandfleet-Offset"])
        lost = int(headers.get("Sandfleet-Lost", 0))
        eof = headers.get("Sandfleet-Eof")
        message_id = headers["Nats-Msg-Id"]
    except (KeyError, ValueError) as failure:
        found.append(Violation("no chunk", f"{where}: {failure!r}"))
        return None
    name = f"{offset}+lost{lost}" if lost else f"{offset}+{len(data)}" if data else f"{offset}+eof{eof}"
    if node != history.node or stream not in STREAMS or len(data) > MAX_CHUNK or (lost and data):
        found.append(Violation("wrong chunk", f"{where}: {headers}"))
    if message_id != f"{key.instance}/{stream}/{name}":
        found.append(Violation("wrong chunk", f"{where}: the id is {message_id}"))
    if lost and headers.get("Sandfleet-Lost-Reason") not in REASONS:
        found.append(Violation("wrong chunk", f"{where}: lost to {headers.get('Sandfleet-Lost-Reason')}"))
    if eof is not None and int(eof) != run:
        found.append(Violation("wrong chunk", f"{where}: the end of run {eof} in run {run}"))
    incomplete = headers.get("Sandfleet-Incomplete") is not None
    return key, Chunk(
        message.generation, message.stream_seq, run, offset, data, lost, run if eof else None, incomplete
    )


def _check_places(history: History, key: Key, chunks: list[Chunk]) -> Iterator[Violation]:
    """Whatever the stream held at one time: each chunk begins where the one before it ended, or what stands
    between them was read before the stream lost it. One that the server refused may stand behind later ones:
    then only its place counts.
    """
    generation, reached = 0, 0
    everything = {(chunk.offset, chunk.end) for chunk in chunks}
    for life in _lives(history, chunks):
        placed = sorted(life, key=_place)
        for one, other in pairwise(life):
            if _place(other) < _place(one) and not _may_be_late(history, one):
                yield Violation("log out of order", f"{key}, generation {one.generation}, at {other.offset}")
        if placed[0].generation != generation:
            generation, reached = placed[0].generation, 0
        before: Chunk | None = None
        for chunk in placed:
            # What was purged may be told again: its id was forgotten with it.
            expected = min(reached, chunk.offset) if before is None else before.end
            if chunk.offset < expected:
                yield Violation(
                    "log bytes twice", f"{key} at {chunk.offset}, told up to {expected} (run {chunk.run})"
                )
            elif chunk.offset > expected and not (
                history.lost(LOGS) and _covered(everything, expected, chunk.offset)
            ):
                yield Violation(
                    "log bytes lost", f"{key}: {expected} to {chunk.offset} is neither there nor covered"
                )
            before = chunk
            reached = max(reached, chunk.end)
        yield from _check_ends(key, placed)


def _may_be_late(history: History, later: Chunk) -> bool:
    """Whether something before `later` can have been refused when it came first, and stand behind it."""
    return any(r.generation == later.generation and r.after < later.stream_seq for r in history.refusals)


def _covered(told: Iterable[tuple[int, int]], start: int, stop: int) -> bool:
    for offset, end in sorted(told):
        if offset <= start < end:
            start = end
    return start >= stop


def _lives(history: History, chunks: list[Chunk]) -> Iterator[list[Chunk]]:
    """The chunks, in their order in the stream, of each time between two losses."""
    purges = [loss for loss in history.lost(LOGS) if loss.what == "purged"]

    def life(chunk: Chunk) -> tuple[int, int]:
        before = [p for p in purges if p.generation == chunk.generation and p.upto < chunk.stream_seq]
        return chunk.generation, len(before)

    for _, members in groupby(chunks, key=life):
        yield list(members)


def _place(chunk: Chunk) -> tuple[int, int, int]:
    return chunk.offset, chunk.end, chunk.eof or 0


def _check_ends(key: Key, placed: list[Chunk]) -> Iterator[Violation]:
    """The end of each run once, and nothing of a run behind it."""
    run, ended = 0, 0
    for chunk in placed:
        if chunk.run < run or chunk.run <= ended:
            name = "eof twice" if chunk.eof == ended else "log of an ended run"
            yield Violation(name, f"{key}: run {chunk.run} behind {max(run, ended)}")
        run = max(run, chunk.run)
        ended = max(ended, chunk.eof or 0)


def _runs(key: Key, line_of: list[Chunk]) -> Iterator[Run]:
    by_run: dict[int, dict[tuple[int, int, int | None], Chunk]] = defaultdict(dict)
    for chunk in line_of:
        by_run[chunk.run][chunk.offset, chunk.end, chunk.eof] = chunk
    for number, found in sorted(by_run.items()):
        chunks = sorted(found.values(), key=_place)
        yield Run(
            key,
            number,
            chunks,
            eof=any(chunk.eof is not None for chunk in chunks),
            incomplete=any(chunk.incomplete for chunk in chunks),
        )


def _ends_of_runs(events: Events) -> dict[tuple[str, int], Status]:
    """How each run ended, by (instance, run)."""
    return {
        (status["instance"], status["run"]): status
        for told in events.told
        if (status := told.status) is not None and status["state"] in ("exited", "failed")
    }


def _is_cut(status: Status | None) -> bool:
    return status is not None and status["reason"] in UNKNOWN_OUTCOME


def _check_presence(events: Events, runs: dict[tuple[str, int], dict[str, Run]]) -> Iterator[Violation]:
    """Every run that ran has an end on both streams."""
    ran = {
        (status["instance"], status["run"]): status["container"]
        for told in events.told
        if (status := told.status) is not None and status["state"] == "running"
    }
    for (instance, run), cid in ran.items():
        for stream in STREAMS:
            found = runs.get((instance, run), {}).get(stream)
            if found is None or not found.eof:
                yield Violation("no eof", f"{stream} of run {run} of {cid} ({instance})")


# -- what was printed


def _check_contents(history: History, runs: dict[tuple[str, int], dict[str, Run]]) -> Iterator[Violation]:
    witnesses = {(w.instance, w.number): w for w in history.witnesses}
    unnumbered: set[str] = set()
    used: dict[tuple[str, int], int] = {}
    for (instance, run), streams in sorted(runs.items()):
        numbers = {number for found in streams.values() if (number := _number(found)) is not None}
        if len(numbers) != 1:
            if len(numbers) > 1:
                yield Violation("logs mixed up", f"{instance}, run {run}: programs {sorted(numbers)}")
            if any(found.length or found.incomplete for found in streams.values()):
                unnumbered.add(instance)
            continue
        number = numbers.pop()
        if (instance, number) in used:
            yield Violation("logs mixed up", f"{instance}: runs {used[instance, number]} and {run}")
        used[instance, number] = run
        witness = witnesses.get((instance, number))
        if witness is None:
            yield Violation("log bytes invented", f"{instance}, run {run}: there was no program {number}")
            continue
        for stream in STREAMS:
            if stream in streams:
                yield from _check_content(streams[stream], witness)
            elif getattr(witness, stream):
                yield Violation("log bytes lost", f"{instance}, run {run}: all of {stream}")
    for instance, number in witnesses.keys() - used.keys():
        witness = witnesses[instance, number]
        if (witness.stdout or witness.stderr) and instance not in unnumbered:
            yield Violation("log bytes lost", f"{instance}: all of its program {number}, {witness}")


def _number(run: Run) -> int | None:
    """Which program of the instance this was, as its lines say."""
    joined = b"".join(chunk.data for chunk in run.chunks)
    found = LINE.search(joined)
    return None if found is None else int(found[2])


def _check_content(run: Run, witness: Witness) -> Iterator[Violation]:
    instance, stream = run.key.instance, run.key.stream
    width = len(line(instance, witness.number, stream, 0, witness.pad))
    where = f"{run.key}, run {run.run}"
    printed = getattr(witness, stream)
    start = run.start
    for chunk in run.chunks:
        if chunk.data and chunk.data != _expected(instance, witness, stream, width, chunk, start):
            yield Violation("wrong log bytes", f"{where}, at {chunk.offset}")
            return
    length = run.length
    if length > (printed + 1) * width:
        yield Violation("log bytes invented", f"{where}: {length} bytes, {printed} lines of {width}")
    if run.incomplete or not run.eof:
        return
    if length < printed * width:
        yield Violation("log bytes lost", f"{where}: {length} bytes, {printed} lines of {width}")
    elif length % width:
        yield Violation("log bytes lost", f"{where}: the last line is cut, {length} bytes")
    elif witness.ended and length > printed * width:
        yield Violation("log bytes invented", f"{where}: {length} bytes, {printed} lines of {width}")


def _expected(instance: str, witness: Witness, stream: str, width: int, chunk: Chunk, start: int) -> bytes:
    begin = chunk.offset - start
    first, skip = divmod(begin, width)
    count = (skip + len(chunk.data)) // width + 1
    lines = b"".join(line(instance, witness.number, stream, first + i, witness.pad) for i in range(count))
    return lines[skip : skip + len(chunk.data)]
