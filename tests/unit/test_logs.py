"""The shipper as a whole: queue, workers, cursors, spool, against a sink that can block, fail and die."""

import asyncio
import errno
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from schemas.errors import ContractError
from schemas.subjects import Subjects
from tests.unit.capture_writer import CaptureWriter
from tests.unit.log_server import LogServer, Stored, judge
from worker.capture_files import capture_files, write_incomplete_eof
from worker.errors import Internal, ResourceExhausted, Unavailable
from worker.journal import Journal
from worker.journal_rows import LogCursor
from worker.log_chunks import EOF, INCOMPLETE, LOST, OFFSET, RUN
from worker.log_spool import Spool
from worker.logs import WORKERS, LogShipper

A, B = "01JD00000000000000000000A1", "01JD00000000000000000000B2"
T = TypeVar("T")


class Sink:
    """Stores at once, unless its gate is shut. Whoever waits at the gate has not stored yet."""

    def __init__(self) -> None:
        self.servers: dict[str, LogServer] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self._line = asyncio.Lock()
        self.permits: asyncio.Semaphore | None = None
        self.waiting = self.most_waiting = 0
        self.waiting_bytes = 0
        self.failures: list[Exception] = []
        self.asked: list[str] = []
        self.sent_at: list[tuple[float, str, int]] = []

    def server(self, cid: str = "web-0", stream: str = "stdout") -> LogServer:
        return self.servers.setdefault(f"sandfleet.v1.log.n.{cid}.{stream}", LogServer())

    async def publish(self, subject: str, data: bytes, headers: dict[str, str]) -> None:
        self.waiting += 1
        self.waiting_bytes += len(data)
        self.most_waiting = max(self.most_waiting, self.waiting)
        try:
            async with self._line:  # in the order of the calls, as the real one
                await self.gate.wait()
            if self.permits is not None:
                await self.permits.acquire()
            if self.failures:
                raise self.failures.pop(0)
        finally:
            self.waiting -= 1
            self.waiting_bytes -= len(data)
        server = self.servers.setdefault(subject, LogServer())
        server.store(headers, data, time.time_ns() // 1000)
        self.sent_at.append((time.monotonic(), subject, len(data)))

    async def last(self, subject: str) -> Stored | None:
        self.asked.append(subject)
        await asyncio.sleep(0)
        if self.failures:
            raise self.failures.pop(0)
        return self.servers.setdefault(subject, LogServer()).last()


class MemoryJournal:
    """The cursors of a journal, without the file."""

    def __init__(self) -> None:
        self.cursors: dict[tuple[str, str], LogCursor] = {}
        self.commits = self.refused = 0
        self.broken = False

    def log_cursors(self) -> dict[tuple[str, str], LogCursor]:
        return dict(self.cursors)

    def put_log_cursor(self, instance: str, stream: str, cursor: LogCursor) -> None:
        self.cursors[instance, stream] = cursor

    def delete_log_cursors(self, instance: str) -> None:
        self.cursors = {key: cursor for key, cursor in self.cursors.items() if key[0] != instance}

    async def transact(self, function: Callable[[Any], T]) -> T:
        await asyncio.sleep(0)
        if self.broken:
            self.refused += 1
            raise ResourceExhausted("no space")
        self.commits += 1
        return function(self)

    async def read(self, function: Callable[[Any], T]) -> T:
        return function(self)


class Node:
    """A data directory and what a worker needs around its shipper; `worker()` is one life of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spool = root / "spool"
        self.spool.mkdir()
        self.sink = Sink()
        self.journal = MemoryJournal()
        self.acked: list[tuple[str, str, int]] = []

    def state(self, cid: str = "web-0") -> Path:
        folder = self.root / cid
        folder.mkdir(exist_ok=True)
        return folder

    def writer(self, cid: str = "web-0", stream: str = "stdout") -> CaptureWriter:
        return CaptureWriter(self.state(cid), stream)

    def shipper(self, journal: Any = None) -> LogShipper:
        return LogShipper(
            sink=self.sink,
            journal=journal or self.journal,
            subjects=Subjects(),
            node="n",
            spool_dir=self.spool,
            ack_output=lambda *said: self.acked.append(said),
        )

    @asynccontextmanager
    async def worker(self, journal: Any = None) -> AsyncIterator[LogShipper]:
        shipper = self.shipper(journal)
        task = asyncio.create_task(shipper.run())
        try:
            yield shipper
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


@pytest.fixture
async def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


async def until(condition: Callable[[], object], what: str = "", timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        await asyncio.sleep(0.002)


def text(server: LogServer) -> bytes:
    return b"".join(message.data for message in server.messages)


def finish(node: Node, writer: CaptureWriter, run: int = 1) -> None:
    """End the run on both streams."""
    writer.finish_run(run)
    other = "stderr" if writer.stream == "stdout" else "stdout"
    CaptureWriter(writer.folder, other).finish_run(run)


class TestShipping:
    async def test_output_of_both_streams_up_to_the_end(self, node: Node) -> None:
        out, err = node.writer(), node.writer(stream="stderr")
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            out.write(b"hello\n")
            shipper.notify([("web-0", "stdout", out.end)])
            await until(lambda: text(node.sink.server()) == b"hello\n")
            err.write(b"oops\n")
            out.finish_run(1)
            err.finish_run(1)
            assert await shipper.drained("web-0", A, 1, 5)
        judge(node.sink.server().of(A), out)
        judge(node.sink.server(stream="stderr").of(A), err)
        assert node.sink.server(stream="stderr").messages[-1].headers[EOF] == "1"

    async def test_a_first_line_is_sent_at_once(self, node: Node) -> None:
        writer = node.writer()
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            for _ in range(3):
                began = time.monotonic()
                writer.write(b"tick\n")
                shipper.notify([("web-0", "stdout", writer.end)])
                await until(lambda: len(text(node.sink.server())) == writer.end)
                assert node.sink.sent_at[-1][0] - began < 0.09
                # Silence: what comes after it is a first line again.
                await until(lambda: time.monotonic() - node.sink.sent_at[-1][0] > 0.11)

    async def test_a_chatty_stream_sends_ten_times_a_second(self, node: Node) -> None:
        writer = node.writer()
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            began = time.monotonic()
            while time.monotonic() - began < 0.55:
                writer.write(b"x\n")
                shipper.notify([("web-0", "stdout", writer.end)])
                await asyncio.sleep(0.005)
            await until(lambda: len(text(node.sink.server())) == writer.end)
        assert 3 <= len(node.sink.server().messages) <= 8
        notices = [offset for _, stream, offset in node.acked if stream == "stdout"]
        assert len(notices) <= 9
        assert notices[-1] == writer.end

    async def test_a_backlog_leaves_in_big_chunks(self, node: Node) -> None:
        writer = node.writer()
        line = b"y" * 99 + b"\n"
        for _ in range(6):
            writer.write(line * 4000)
            writer.rotate()
        finish(node, writer)
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            assert await shipper.drained("web-0", A, 1, 10)
        judge(node.sink.server().of(A), writer)
        assert len(node.sink.server().messages) <= 14
        assert node.sink.most_waiting <= 16

    async def test_runs_follow_one_another(self, node: Node) -> None:
        writer, err = node.writer(), node.writer(stream="stderr")
        async with node.worker() as shipper:
            for run in (1, 2, 3):
                shipper.attach("web-0", A, node.state(), run)
                writer.write(b"run %d\n" % run)
                writer.finish_run(run)
                err.finish_run(run)
                shipper.ended(A)
            assert await shipper.drained("web-0", A, 3, 5)
        judge(node.sink.server().of(A), writer)
        assert {m.headers[RUN] for m in node.sink.server().messages} == {"1", "2", "3"}

    async def test_a_lost_launcher(self, node: Node) -> None:
        writer = node.writer()
        writer.write(b"last words")
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            await until(lambda: text(node.sink.server()) == b"last words")
            write_incomplete_eof(node.state(), 1)
            shipper.ended(A)
            assert await shipper.drained("web-0", A, 1, 5)
        for stream in ("stdout", "stderr"):
            assert node.sink.server(stream=stream).messages[-1].headers[INCOMPLETE] == "supervisor_lost"

    async def test_not_drained_in_time(self, node: Node) -> None:
        node.writer().write(b"still running")
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            assert not await shipper.drained("web-0", A, 1, 0.05)
            assert await shipper.drained("web-1", B, 1, 0.05)  # nobody knows it: nothing is left of it

    async def test_failures_of_the_sink_are_tried_again(self, node: Node) -> None:
        writer = node.writer()
        writer.write(b"abc")
        node.sink.failures = [Unavailable("no server"), Unavailable("still none")]
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            await until(lambda: text(node.sink.server()) == b"abc")

    async def test_a_folder_that_cannot_be_read_stops_nobody_else(self, node: Node) -> None:
        broken, fine = node.writer("web-0"), node.writer("web-1")
        broken.write(b"abc")
        fine.write(b"def")
        log = next(node.state("web-0").glob("stdout*.log"))
        log.rename(log.with_suffix(".kept"))
        log.mkdir()
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state("web-0"), 1)
            shipper.attach("web-1", B, node.state("web-1"), 1)
            await until(lambda: text(node.sink.server("web-1")) == b"def")
            log.rmdir()
            log.with_suffix(".kept").rename(log)
            await until(lambda: text(node.sink.server("web-0")) == b"abc")


class TestPressure:
    async def test_a_sink_that_blocks_does_not_fill_the_memory(self, node: Node) -> None:
        writers = [node.writer(f"web-{number}") for number in range(40)]
        node.sink.gate.clear()
        async with node.worker() as shipper:
            for number, writer in enumerate(writers):
                writer.write(b"z" * 1_000_000)
                shipper.attach(f"web-{number}", f"{A[:-2]}{number:02}", writer.folder, 1)
            await until(lambda: node.sink.waiting == WORKERS)
            for _ in range(20):
                shipper.notify([(f"web-{number}", "stdout", writers[number].end) for number in range(40)])
                await asyncio.sleep(0)
            assert node.sink.waiting == WORKERS
            assert node.sink.waiting_bytes <= WORKERS * 256 * 1024
            # Meanwhile the launcher deletes what became too much.
            writers[0].rotate()
            writers[0].write(b"newest")
            writers[0].delete_oldest()
            node.sink.gate.set()
            for number, writer in enumerate(writers):
                server = node.sink.server(f"web-{number}")
                await until(lambda s=server, w=writer: s.ever and reach(s) == w.end)
        for number, writer in enumerate(writers):
            judge(node.sink.server(f"web-{number}").ever, writer)

    async def test_a_backlog_does_not_starve_a_quiet_stream(self, node: Node) -> None:
        big = [node.writer(f"big-{number}") for number in range(3)]
        quiet = node.writer("quiet-0")
        node.sink.permits = asyncio.Semaphore(0)
        async with node.worker() as shipper:
            for number, writer in enumerate(big):
                writer.write(b"z" * 20_000_000)
                shipper.attach(f"big-{number}", f"{A[:-2]}{number:02}", writer.folder, 1)
            shipper.attach("quiet-0", B, quiet.folder, 1)
            await until(lambda: node.sink.waiting == WORKERS)
            quiet.write(b"hello\n")
            shipper.notify([("quiet-0", "stdout", 6)])
            for turn in range(1, WORKERS + 5):
                node.sink.permits.release()
                await until(lambda: len(node.sink.sent_at) == turn)  # noqa: B023
            # What was under way, a turn for each backlog, then it.
            assert text(node.sink.server("quiet-0")) == b"hello\n"
            assert all(reach(node.sink.server(f"big-{n}")) < 10_000_000 for n in range(3))

    async def test_silence_costs_nothing(self, node: Node) -> None:
        async with node.worker() as shipper:
            for number in range(100):
                writer = node.writer(f"web-{number}")
                writer.write(b"up\n")
                shipper.attach(f"web-{number}", f"{A[:-3]}{number:03}", writer.folder, 1)
            await until(lambda: len(node.sink.sent_at) == 100 and node.journal.commits)
            await until(lambda: shipper._queue.idle)
            # No timer, nothing to save, and every worker waits to be called.
            assert shipper._queue.idle
            assert not shipper._cursors._to_save.is_set()
            assert len(shipper._queue._takers) == WORKERS

    async def test_open_files_are_bounded(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("worker.logs.MAX_OPEN", 4)
        writers = [node.writer(f"web-{number}") for number in range(20)]
        async with node.worker() as shipper:
            for number, writer in enumerate(writers):
                shipper.attach(f"web-{number}", f"{A[:-2]}{number:02}", writer.folder, 1)
            for _ in range(3):
                for number, writer in enumerate(writers):
                    writer.write(b"line\n")
                    writer.rotate()
                    shipper.notify([(f"web-{number}", "stdout", writer.end)])
                for number, writer in enumerate(writers):
                    server = node.sink.server(f"web-{number}")
                    await until(lambda s=server, w=writer: reach(s) == w.end)
            assert len(shipper._open) <= 4
        for number, writer in enumerate(writers):
            judge(node.sink.server(f"web-{number}").ever, writer)


def reach(server: LogServer) -> int:
    if not server.messages:
        return 0
    newest = server.messages[-1]
    return int(newest.headers[OFFSET]) + newest.size + int(newest.headers.get(LOST, "0"))


class TestRestart:
    async def test_goes_on_where_it_stopped(self, node: Node) -> None:
        writer = node.writer()
        for life in range(4):
            writer.write(b"life %d\n" % life)
            async with node.worker() as shipper:
                shipper.attach("web-0", A, node.state(), 1)
                shipper.resume_spool()
                writer.write(b"and on\n")
                shipper.notify([("web-0", "stdout", writer.end)])
                await until(lambda: reach(node.sink.server()) == writer.end)
        judge(node.sink.server().of(A), writer)
        assert node.journal.cursors[A, "stdout"].offset == writer.end

    async def test_killed_with_chunks_under_way(self, node: Node) -> None:
        writer = node.writer()
        writer.write(b"first\n")
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            await until(lambda: reach(node.sink.server()) == 6)
            node.sink.gate.clear()
            writer.write(b"q" * 700_000)
            shipper.notify([("web-0", "stdout", writer.end)])
            await until(lambda: node.sink.waiting >= 2)
        node.sink.gate.set()
        writer.write(b"after\n")
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            await until(lambda: reach(node.sink.server()) == writer.end)
        judge(node.sink.server().of(A), writer)

    async def test_nothing_new_asks_nobody(self, node: Node) -> None:
        writer = node.writer()
        writer.write(b"abc")
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            await until(lambda: reach(node.sink.server()) == 3)
        node.sink.asked.clear()
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            await until(lambda: shipper._queue.idle and node.acked.count(("web-0", "stdout", 3)) > 1)
        assert node.sink.asked == []

    async def test_a_stream_that_lost_messages_is_believed_after_a_while(
        self, node: Node, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("worker.logs.DOUBT_S", 0.01)
        writer = node.writer()
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            for text_ in (b"a", b"b"):
                writer.write(text_)
                shipper.notify([("web-0", "stdout", writer.end)])
                await until(lambda: reach(node.sink.server()) == writer.end)
        server = node.sink.server()
        del server.messages[1:]
        server.ids.clear()
        writer.write(b"c")
        node.sink.asked.clear()
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            await until(lambda: text(server) == b"abc")
        assert len(node.sink.asked) == 4

    async def test_cursors_are_saved_in_batches_and_after_trouble(
        self, node: Node, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("worker.log_cursors.SAVE_EVERY_S", 0.05)
        writers = [node.writer(f"web-{number}") for number in range(10)]
        node.journal.broken = True
        async with node.worker() as shipper:
            for number, writer in enumerate(writers):
                writer.write(b"abc")
                shipper.attach(f"web-{number}", f"{A[:-2]}{number:02}", writer.folder, 1)
            await until(lambda: len(node.sink.sent_at) == 10)
            await until(lambda: node.journal.refused > 1)
            node.journal.broken = False
            await until(lambda: len(node.journal.cursors) == 10)
            assert node.journal.commits == 1
            await until(lambda: (node.spool / "sent.log").stat().st_size == 0)

    async def test_cursors_of_strangers_are_dropped(self, node: Node) -> None:
        node.journal.cursors[B, "stdout"] = LogCursor(offset=5)
        node.journal.cursors[A, "stdout"] = LogCursor(offset=0)
        node.writer().write(b"abc")
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            shipper.resume_spool()
            await until(lambda: (B, "stdout") not in node.journal.cursors)
            assert (A, "stdout") in node.journal.cursors

    async def test_with_the_real_journal(self, node: Node, tmp_path: Path) -> None:
        writer = node.writer()
        for life in range(2):
            journal = await Journal.open(tmp_path / "worker.db", node="n")
            writer.write(b"life %d\n" % life)
            async with node.worker(journal) as shipper:
                shipper.attach("web-0", A, node.state(), 1)
                await until(lambda: reach(node.sink.server()) == writer.end)
            cursors = await journal.read(lambda tx: tx.log_cursors())
            assert cursors[A, "stdout"].offset == writer.end
            await journal.close()
        judge(node.sink.server().of(A), writer)


class TestSpool:
    async def test_what_is_unsent_is_sent_and_deleted(self, node: Node) -> None:
        writer = node.writer()
        writer.write(b"q" * 600_000)
        finish(node, writer)
        node.sink.gate.clear()
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            await until(lambda: node.sink.waiting)
            await shipper.spool("web-0", A, node.state())
            assert capture_files(node.state()) == []
            assert json.loads((node.spool / A / "meta.json").read_text())["cid"] == "web-0"
            node.sink.gate.set()
            await until(lambda: not (node.spool / A).exists())
            await until(lambda: (A, "stdout") not in node.journal.cursors and node.journal.commits)
            assert await shipper.drained("web-0", A, 1, 1)
        judge(node.sink.server().of(A), writer)

    async def test_what_is_sent_already_is_not_moved(self, node: Node) -> None:
        writer = node.writer()
        writer.write(b"abc")
        finish(node, writer)
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            assert await shipper.drained("web-0", A, 1, 5)
            await shipper.spool("web-0", A, node.state())
            assert not (node.spool / A).exists()
            await shipper.spool("web-0", A, node.state())

    async def test_the_next_worker_goes_on(self, node: Node) -> None:
        writer = node.writer()
        writer.write(b"q" * 600_000)
        finish(node, writer)
        shipper = node.shipper()
        await shipper.spool("web-0", A, node.state())
        async with node.worker() as shipper:
            assert shipper.resume_spool() == 1
            await until(lambda: not (node.spool / A).exists())
        judge(node.sink.server().of(A), writer)

    async def test_a_new_instance_waits_for_the_old_one(self, node: Node) -> None:
        old = node.writer()
        old.write(b"old")
        finish(node, old)
        node.sink.gate.clear()
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            await until(lambda: node.sink.waiting)
            await shipper.spool("web-0", A, node.state())
            new = node.writer()
            new.write(b"new")
            shipper.attach("web-0", B, node.state(), 1)
            shipper.notify([("web-0", "stdout", 3)])
            node.sink.gate.set()
            await until(lambda: len(node.sink.server().of(B)) == 1)
        order = [message.headers["Sandfleet-Instance"] for message in node.sink.server().ever]
        assert order == sorted(order)
        judge(node.sink.server().of(A), old)
        judge(node.sink.server().of(B), new)

    async def test_an_instance_that_was_replaced_without_it_is_dropped(self, node: Node) -> None:
        old = node.writer()
        old.write(b"old")
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            await until(lambda: reach(node.sink.server()) == 3)
            for name in capture_files(node.state()):
                (node.state() / name).unlink()
            new = node.writer()
            new.write(b"new output")
            shipper.attach("web-0", B, node.state(), 1)
            await until(lambda: node.sink.server().of(B))
        assert len(node.sink.server().of(A)) == 1
        judge(node.sink.server().of(B), new)

    async def test_a_removal_that_a_crash_stopped_is_taken_back(self, node: Node) -> None:
        writer = node.writer()
        writer.write(b"one")
        writer.rotate()
        writer.write(b"two")
        (node.spool / A).mkdir()
        (node.spool / A / "meta.json").write_text(json.dumps({"cid": "web-0", "instance": A, "run": 1}))
        for path in list(node.state().glob("*00000.*")):
            path.rename(node.spool / A / path.name)
        async with node.worker() as shipper:
            shipper.attach("web-0", A, node.state(), 1)
            assert shipper.resume_spool() == 0
            await until(lambda: reach(node.sink.server()) == 6)
            assert not (node.spool / A).exists()
        judge(node.sink.server().of(A), writer)

    async def test_a_spool_without_its_name_is_kept(self, node: Node) -> None:
        folder = node.spool / A
        folder.mkdir()
        (folder / "stdout.00000000000000000000.log").write_bytes(b"whose?")
        (node.spool / B).mkdir()
        async with node.worker() as shipper:
            assert shipper.resume_spool() == 0
        assert folder.exists()
        assert not (node.spool / B).exists()


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, ResourceExhausted), (errno.EIO, Internal)])
async def test_a_log_that_cannot_be_moved_away(
    node: Node, monkeypatch: pytest.MonkeyPatch, number: int, error: type[ContractError]
) -> None:
    def fails(*args: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(Spool, "put", fails)
    node.writer().write(b"abc")
    async with node.worker() as shipper:
        with pytest.raises(error, match="cannot be moved"):
            await shipper.spool("web-0", A, node.state())
