"""A stand-in for the log stream: keeps what it is given, knows ids for two minutes, and judges the result."""

from dataclasses import dataclass, field

from tests.unit.capture_writer import CaptureWriter
from worker.log_chunks import EOF, INSTANCE, LOST, LOST_REASON, MESSAGE_ID, OFFSET, RUN

WINDOW_US = 120_000_000


@dataclass
class Stored:
    headers: dict[str, str]
    data: bytes = b""

    @property
    def size(self) -> int:
        return len(self.data)


@dataclass
class LogServer:
    """One subject."""

    messages: list[Stored] = field(default_factory=list)
    ever: list[Stored] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)

    def store(self, headers: dict[str, str], data: bytes, now_us: int) -> None:
        name = headers[MESSAGE_ID]
        if now_us - self.ids.get(name, -WINDOW_US) >= WINDOW_US:
            self.messages.append(Stored(dict(headers), data))
            self.ever.append(self.messages[-1])
            self.ids[name] = now_us

    def last(self) -> Stored | None:
        return self.messages[-1] if self.messages else None

    def of(self, instance: str) -> list[Stored]:
        return [message for message in self.ever if message.headers[INSTANCE] == instance]


def judge(messages: list[Stored], writer: CaptureWriter, *, ordered: bool = True) -> None:
    """Every byte that was captured is there once and right, or said to be lost; so is every end of a run."""
    seen, lost, gone = bytearray(writer.end), bytearray(writer.end), bytearray(writer.end)
    for start, stop in [(0, writer.deleted_to), *((start, stop) for start, stop, _ in writer.lost)]:
        gone[start:stop] = b"\1" * (stop - start)
    ends: list[int] = []
    reached = 0
    for message in messages:
        offset, run = int(message.headers[OFFSET]), int(message.headers[RUN])
        length = int(message.headers.get(LOST, "0"))
        stop = offset + length + message.size
        assert not ordered or offset >= reached, "out of order"
        reached = max(reached, stop)
        assert reached <= writer.end
        if length:
            assert not message.data
            assert message.headers[LOST_REASON] in ("size", "rate", "disk")
            assert gone.count(0, offset, stop) == 0, f"bytes of {offset}+{length} are there"
            lost[offset:stop] = b"\1" * length
        else:
            assert message.data == writer.content[offset:stop]
            assert seen.count(1, offset, stop) == 0, f"bytes of {offset}+{message.size} twice"
            seen[offset:stop] = b"\1" * message.size
            starts = [at for at, ended in writer.ends if ended < run]
            assert offset >= max(starts, default=0), "output of a run before the one before ended"
            stops = [at for at, ended in writer.ends if ended == run]
            assert stop <= min(stops, default=writer.end), "two runs in one chunk"
        if EOF in message.headers:
            assert message.headers[EOF] == str(run)
            assert (stop, run) in writer.ends or not message.size
            ends.append(run)
    missing = [at for at in range(writer.end) if not seen[at] and not lost[at]] if 0 in seen else []
    assert not missing, f"{len(missing)} bytes are missing, from {missing[0]} on"
    assert not any(map(bool.__and__, map(bool, seen), map(bool, lost))), "bytes are there and called lost"
    assert len(ends) == len(set(ends)), "an end of a run twice"
    assert not ordered or ends == sorted(ends)
    assert {run for at, run in writer.ends if at > writer.deleted_to} <= set(ends)
