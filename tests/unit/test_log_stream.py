"""Chunks of one stream: what goes into them, when they are due, and that a kill changes nothing."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.capture_writer import CaptureWriter
from tests.unit.log_server import LogServer, Stored, judge
from worker.log_chunks import (
    EOF,
    INCOMPLETE,
    LOST,
    LOST_REASON,
    MAX_CHUNK_BYTES,
    MESSAGE_ID,
    OFFSET,
    RUN,
    TIMES,
    Chunk,
    Position,
)
from worker.log_sent import Flights, SentLog
from worker.log_stream import ENOUGH_BYTES, WINDOW_S, LogSource, LogStream

INSTANCE = "01JD00000000000000000000A1"
SUBJECTS = {"stdout": "P.log.n.web-0.stdout", "stderr": "P.log.n.web-0.stderr"}


def make_stream(folder: Path, run: int = 1) -> LogStream:
    stream = LogSource("web-0", INSTANCE, folder, run, SUBJECTS).streams["stdout"]
    stream.locate(Position(0, 0), None, 0, sure=True)
    assert stream.next(0.0) == (None, None)
    return stream


@pytest.fixture
def writer(tmp_path: Path) -> CaptureWriter:
    return CaptureWriter(tmp_path)


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[LogStream]:
    found = make_stream(tmp_path)
    yield found
    found.reader.close()


def chunk_of(stream: LogStream, now: float = 0.0) -> Chunk:
    stream.look_thoroughly()
    chunk, _ = stream.next(now)
    assert chunk is not None
    return chunk


class TestContent:
    def test_headers_of_data(self, writer: CaptureWriter, stream: LogStream) -> None:
        writer.write(b"hello\n")
        writer.write(b"world\n")
        chunk = chunk_of(stream)
        assert chunk.data == b"hello\nworld\n"
        assert chunk.headers == {
            "Sandfleet-Instance": INSTANCE,
            "Sandfleet-Run": "1",
            "Sandfleet-Offset": "0",
            "Sandfleet-Times": "0:1000001,6:1000002",
            "Nats-Msg-Id": f"{INSTANCE}/stdout/0+12",
        }

    def test_the_last_chunk_of_a_run_ends_it(self, writer: CaptureWriter, stream: LogStream) -> None:
        writer.write(b"bye")
        writer.finish_run(1, incomplete=True)
        chunk = chunk_of(stream)
        assert chunk.data == b"bye"
        assert chunk.headers[EOF] == "1"
        assert chunk.headers[INCOMPLETE] == "supervisor_lost"

    def test_an_end_that_comes_late_is_an_empty_chunk(self, writer: CaptureWriter, stream: LogStream) -> None:
        writer.write(b"bye")
        chunk_of(stream)
        writer.finish_run(1)
        chunk = chunk_of(stream)
        assert chunk.data == b""
        assert chunk.headers[MESSAGE_ID] == f"{INSTANCE}/stdout/3+eof1"
        assert (chunk.headers[OFFSET], chunk.headers[EOF]) == ("3", "1")
        assert TIMES not in chunk.headers
        assert INCOMPLETE not in chunk.headers

    def test_runs_are_not_mixed(self, writer: CaptureWriter, stream: LogStream) -> None:
        writer.write(b"one")
        writer.finish_run(1)
        writer.write(b"two")
        writer.finish_run(2)
        stream.source.run = 2
        chunks = [chunk_of(stream), chunk_of(stream)]
        assert [(c.data, c.headers[RUN], c.headers[EOF]) for c in chunks] == [
            (b"one", "1", "1"),
            (b"two", "2", "2"),
        ]

    def test_lost_bytes(self, writer: CaptureWriter, stream: LogStream) -> None:
        writer.write(b"a")
        writer.lose(1000)
        writer.rotate()
        writer.write(b"b")
        assert chunk_of(stream).data == b"a"
        lost = chunk_of(stream)
        assert lost.data == b""
        assert (lost.headers[LOST], lost.headers[LOST_REASON]) == ("1000", "rate")
        assert lost.headers[MESSAGE_ID] == f"{INSTANCE}/stdout/1+lost1000"
        after = chunk_of(stream, 1.0)
        assert (after.data, after.headers[OFFSET]) == (b"b", "1001")

    def test_the_times_are_thinned_and_keep_the_first(self, writer: CaptureWriter, stream: LogStream) -> None:
        for _ in range(1000):
            writer.write(b"x\n")
        times = chunk_of(stream).headers[TIMES].split(",")
        assert len(times) == 64
        assert times[0] == "0:1000001"
        offsets = [int(mark.split(":")[0]) for mark in times]
        assert offsets == sorted(set(offsets))
        assert offsets[-1] >= 1900

    def test_a_backlog_is_cut_after_newlines(self, writer: CaptureWriter, stream: LogStream) -> None:
        line = b"y" * 99 + b"\n"
        writer.write(line * 10_000)
        first = chunk_of(stream)
        assert MAX_CHUNK_BYTES * 7 // 8 < len(first.data) <= MAX_CHUNK_BYTES
        assert first.data.endswith(b"\n")
        second = chunk_of(stream)
        assert second.headers[TIMES] == "0:1000001"
        assert int(second.headers[OFFSET]) == len(first.data)

    def test_without_a_newline_it_is_cut_at_the_limit(self, writer: CaptureWriter, stream: LogStream) -> None:
        writer.write(b"z" * 400_000)
        assert len(chunk_of(stream).data) == MAX_CHUNK_BYTES
        assert len(chunk_of(stream).data) == 400_000 - MAX_CHUNK_BYTES

    def test_a_chunk_goes_on_in_the_next_segment(self, writer: CaptureWriter, stream: LogStream) -> None:
        writer.write(b"a line that ")
        writer.rotate()
        writer.write(b"goes on\n")
        chunk = chunk_of(stream)
        assert chunk.data == b"a line that goes on\n"
        assert chunk.headers[TIMES] == "0:1000001,12:1000002"

    def test_but_not_into_the_next_run(self, writer: CaptureWriter, stream: LogStream) -> None:
        writer.write(b"one")
        writer.finish_run(1)
        writer.rotate()
        writer.write(b"two")
        stream.source.run = 2
        assert chunk_of(stream).data == b"one"
        assert chunk_of(stream, 1.0).headers[RUN] == "2"

    def test_bytes_that_a_crash_took_are_lost_by_the_disk(
        self, writer: CaptureWriter, stream: LogStream
    ) -> None:
        writer.write(b"0123456789")
        log = next(writer.folder.glob("stdout.*.log"))
        log.write_bytes(b"0123")
        assert chunk_of(stream).data == b"0123"
        lost = chunk_of(stream, 1.0)
        assert (lost.headers[OFFSET], lost.headers[LOST], lost.headers[LOST_REASON]) == ("4", "6", "disk")


class TestTiming:
    def test_the_first_byte_goes_at_once_and_the_next_waits(
        self, writer: CaptureWriter, stream: LogStream
    ) -> None:
        writer.write(b"a")
        assert stream.delay_after_notice(1, 10.0) == 0
        chunk, look_s = stream.next(10.0)
        assert chunk is not None
        assert look_s is None
        writer.write(b"b")
        assert stream.delay_after_notice(2, 10.03) == pytest.approx(0.07)
        chunk, look_s = stream.next(10.03)
        assert chunk is None
        assert look_s is not None
        assert 0 < look_s <= 0.071
        chunk, _ = stream.next(10.0 + WINDOW_S)
        assert chunk is not None

    def test_enough_goes_at_once(self, writer: CaptureWriter, stream: LogStream) -> None:
        writer.write(b"a")
        stream.next(10.0)
        writer.write(b"b" * ENOUGH_BYTES)
        assert stream.delay_after_notice(writer.end, 10.01) == 0
        chunk, look_s = stream.next(10.01)
        assert chunk is not None
        # That was much in a short time: the next 64 KiB are expected, without a notice.
        assert look_s is not None
        assert look_s <= 0.011

    def test_half_of_it_is_looked_at_before_the_window_ends(
        self, writer: CaptureWriter, stream: LogStream
    ) -> None:
        writer.write(b"a")
        stream.next(10.0)
        writer.write(b"b" * (ENOUGH_BYTES // 2))
        assert stream.delay_after_notice(writer.end, 10.01) == pytest.approx(0.01)
        chunk, look_s = stream.next(10.02)
        assert chunk is None
        assert look_s == pytest.approx(0.02)

    def test_the_end_of_a_run_does_not_wait(self, writer: CaptureWriter, stream: LogStream) -> None:
        writer.write(b"a")
        stream.next(10.0)
        writer.write(b"b")
        writer.finish_run(1)
        chunk, look_s = stream.next(10.001)
        assert chunk is not None
        assert look_s == 0

    def test_what_a_newline_cut_leaves_is_not_forgotten(
        self, writer: CaptureWriter, stream: LogStream
    ) -> None:
        writer.write(b"x" * 70_000 + b"\npartial")
        chunk, look_s = stream.next(10.0)
        assert chunk is not None
        assert chunk.data.endswith(b"\n")
        assert look_s is not None
        assert look_s <= WINDOW_S
        chunk, _ = stream.next(10.0 + WINDOW_S)
        assert chunk is not None
        assert chunk.data == b"partial"


class World:
    """A launcher, a worker that can be killed, and a server, with a clock of their own."""

    def __init__(self, folder: Path) -> None:
        self.now_us = 1_000_000_000
        self.writer = CaptureWriter(folder / "state")
        self.server = LogServer()
        self.sent_path = folder / "sent.log"
        self.run = 1
        self.running = True
        self.journal: Position | None = None
        self.boot()

    def boot(self) -> None:
        self.in_flight: list[Chunk] = []
        self.answers: list[Chunk] = []
        self.sent = SentLog(self.sent_path)
        recovered = self.sent.open().get((INSTANCE, "stdout"))
        self.stream = LogSource("web-0", INSTANCE, self.writer.folder, self.run, SUBJECTS).streams["stdout"]
        if self.journal is not None:
            self.stream.saved = self.journal
            self.stream.flights = Flights(self.journal)
        if recovered is not None:
            recovered.advance(self.stream.saved)
            self.stream.flights = recovered

    def kill(self) -> None:
        self.stream.reader.close()
        self.sent._acks.clear()  # what was not written yet dies with the process
        self.sent.close()
        self.boot()

    def look(self) -> bool:
        """True when something was sent."""
        stream = self.stream
        self.now_us += 1_000_000
        if not stream.located:
            acked = stream.flights.position
            if not stream.nothing_new(acked):
                located = stream.locate(acked, self.server.last(), self.now_us, sure=False)
                assert located, "a server that lost nothing is doubted"
            stream.located = True
        if stream.full:
            return False
        stream.look_thoroughly()
        chunk, _ = stream.next(self.now_us / 1e6)
        if chunk is None:
            return False
        if stream.flights.send(chunk.cut, self.now_us):
            self.sent.sent(stream.key, chunk.cut, self.now_us)
        self.in_flight.append(chunk)
        return True

    def store(self, at: int) -> None:
        if self.in_flight:
            chunk = self.in_flight.pop(at % len(self.in_flight))
            self.server.store(chunk.headers, chunk.data, self.now_us)
            self.answers.append(chunk)

    def answer(self) -> None:
        if self.answers:
            chunk = self.answers.pop(0)
            self.stream.flights.ack(chunk.cut)
            self.sent.acked(self.stream.key, chunk.cut)

    def save(self) -> None:
        flights = self.stream.flights
        if not self.stream.located:
            return
        self.journal = self.stream.saved = flights.position
        left = flights.waiting or flights.position != flights.tail
        self.sent.rewrite([(self.stream.key, flights)] if left else [])

    def finish(self) -> None:
        while self.look() or self.in_flight or self.answers:
            self.store(0)
            self.answer()
        self.stream.reader.close()
        self.sent.close()

    def launch(self, operation: str, value: int) -> None:
        match operation:
            case "write" if self.running:
                self.writer.write(bytes((self.writer.end + i) * 7 % 251 for i in range(value)))
            case "lose" if self.running:
                self.writer.lose(value)
                self.writer.rotate()
            case "end" if self.running:
                self.writer.finish_run(self.run)
                self.running = False
            case "begin" if not self.running:
                self.run += 1
                self.stream.source.run = self.run
                self.running = True
            case "rotate":
                self.writer.rotate()
            case "delete":
                self.writer.delete_oldest()


def operation(*names: str) -> st.SearchStrategy[tuple[str, int]]:
    return st.tuples(st.sampled_from(names), st.integers(0, 40)).map(lambda o: (o[0], max(o[1], 1)))


LAUNCHER = operation("write", "write", "write", "lose", "end", "begin", "rotate")
WORKER = operation("look", "look", "look", "store", "store", "answer", "save", "kill")


def play(folder: Path, operations: list[tuple[str, int]], *, in_order: bool) -> World:
    world = World(folder)
    for name, value in operations:
        match name:
            case "look":
                world.look()
            case "store":
                world.store(0 if in_order else value)
            case "answer":
                world.answer()
            case "save":
                world.save()
            case "kill":
                world.kill()
            case "away":
                world.now_us += 1_000_000_000
                world.kill()
            case "evict":
                world.server.messages.clear()
            case _:
                world.launch(name, value)
    world.finish()
    return world


def test_what_is_stored_is_not_called_lost_when_its_file_is_gone(tmp_path: Path) -> None:
    """Killed before the answer was known, and the file was deleted meanwhile for its size."""
    steps = ("write", "look", "store", "rotate", "write", "look", "store", "rotate", "delete", "kill")
    world = play(tmp_path, [(step, 10) for step in steps], in_order=True)
    assert [message.headers.get(LOST) for message in world.server.of(INSTANCE)] == [None, None]
    judge(world.server.of(INSTANCE), world.writer)


def test_what_was_never_stored_is_called_lost_when_its_file_is_gone(tmp_path: Path) -> None:
    steps = ("write", "look", "rotate", "write", "rotate", "delete", "kill")
    world = play(tmp_path, [(step, 10) for step in steps], in_order=True)
    assert [message.headers.get(LOST) for message in world.server.of(INSTANCE)] == ["10", None]
    judge(world.server.of(INSTANCE), world.writer)


@given(st.lists(st.one_of(LAUNCHER, WORKER, WORKER), max_size=80))
@settings(max_examples=400, deadline=None)
def test_a_kill_at_any_point_whatever_was_stored_in_whatever_order(
    operations: list[tuple[str, int]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        world = play(Path(name), operations, in_order=False)
        judge(world.server.of(INSTANCE), world.writer, ordered=False)


@given(st.lists(st.one_of(LAUNCHER, WORKER, WORKER, operation("away", "delete")), max_size=80))
@settings(max_examples=400, deadline=None)
def test_a_kill_and_any_absence_when_the_connection_kept_its_order(
    operations: list[tuple[str, int]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        world = play(Path(name), operations, in_order=True)
        judge(world.server.of(INSTANCE), world.writer, ordered=False)


@given(st.lists(st.one_of(LAUNCHER, operation("look", "store", "answer", "save")), max_size=80))
@settings(max_examples=100, deadline=None)
def test_without_a_kill_the_order_is_kept(operations: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        world = play(Path(name), operations, in_order=True)
        judge(world.server.of(INSTANCE), world.writer, ordered=True)


class TestRestart:
    """The cases of `log_chunks.resume` by name."""

    def drain(self, world: World) -> None:
        while world.look():
            world.store(0)
            world.answer()

    def offsets(self, world: World) -> list[int]:
        return [int(message.headers[OFFSET]) for message in world.server.ever]

    def test_what_aged_out_of_the_stream_is_not_sent_again(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        world.writer.write(b"old")
        self.drain(world)
        world.save()
        world.server.messages.clear()
        world.kill()
        world.writer.write(b"new")
        world.finish()
        assert self.offsets(world) == [0, 3]

    def test_nor_when_the_newest_message_is_of_an_older_instance(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        world.writer.write(b"mine")
        self.drain(world)
        world.save()
        world.server.messages[:] = [
            Stored({"Sandfleet-Instance": "01AAA", "Sandfleet-Offset": "900", "Sandfleet-Run": "1"})
        ]
        world.kill()
        world.writer.write(b"new")
        world.finish()
        assert self.offsets(world) == [0, 4]

    def test_a_new_instance_begins_at_nought(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        world.server.messages.append(
            Stored({"Sandfleet-Instance": "01AAA", "Sandfleet-Offset": "900", "Sandfleet-Run": "1"})
        )
        world.writer.write(b"new")
        world.finish()
        assert self.offsets(world) == [0]

    def test_without_journal_and_file_the_stream_itself_tells(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        world.writer.write(b"abc")
        world.writer.finish_run(1)
        self.drain(world)
        world.sent_path.unlink()
        world.kill()
        world.writer.write(b"def")
        world.finish()
        assert self.offsets(world) == [0, 3]

    def test_a_server_that_lost_its_newest_messages_gets_them_again(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        for text in (b"a", b"b", b"c"):
            world.writer.write(text)
            self.drain(world)
        world.save()
        del world.server.messages[1:]
        world.server.ids.clear()
        world.kill()
        world.writer.write(b"d")
        assert not world.stream.locate(Position(3, 0), world.server.last(), world.now_us, sure=False)
        assert world.stream.locate(Position(3, 0), world.server.last(), world.now_us, sure=True)
        world.finish()
        assert b"".join(message.data for message in world.server.messages) == b"abcd"

    def test_a_retried_chunk_that_was_stored_last_is_no_loss(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        for text in (b"a", b"b", b"c"):
            world.writer.write(text)
            world.look()
        for at in (0, 1, 0):
            world.store(at)
        for _ in range(3):
            world.answer()
        world.save()
        world.kill()
        world.writer.write(b"d")
        world.finish()
        assert self.offsets(world) == [0, 2, 1, 3]

    def test_an_end_that_stands_before_the_segment_of_the_offset(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        world.writer.write(b"a")
        world.look()
        world.writer.finish_run(1)
        world.writer.rotate()
        world.kill()
        world.finish()
        assert [message.headers.get(EOF) for message in world.server.ever] == [None, "1"]

    def test_foreign_headers_are_nobodys(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        world.server.messages.append(Stored({"Sandfleet-Instance": INSTANCE, "Sandfleet-Offset": "x"}))
        world.writer.write(b"a")
        world.finish()
        assert self.offsets(world) == [0]
