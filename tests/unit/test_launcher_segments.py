"""Capture files as the launcher writes them and the worker's reader reads them."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.capture_files import list_segments, write_incomplete_eof
from worker.capture_reader import CaptureReader
from worker.launcher.segments import MARK, OpenFiles, SegmentWriter


class Files:
    """A state folder with one stream's writer, and what a reader makes of it."""

    def __init__(self, folder: Path, max_bytes: int | None = None, *, limit: int = 8) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.pool = OpenFiles(limit)
        self.troubles: list[str] = []
        self.clock = 0
        self.writer = self.open()

    def open(self) -> SegmentWriter:
        return SegmentWriter(str(self.folder), "stdout", self.max_bytes, self.pool, self.troubles.append)

    def append(self, data: bytes) -> None:
        self.clock += 1
        self.writer.append(memoryview(data), self.clock)

    def finish(self, run: int) -> bool:
        return self.writer.finish_run(run, self.clock)

    def read(self) -> tuple[bytes, list[tuple[int, int, str]], list[int], int]:
        """(bytes, lost ranges, ended runs, end)."""
        data, lost, ends = b"", [], []
        reader = CaptureReader(self.folder, "stdout")
        while (span := reader.span(1 << 20)) is not None:
            if span.lost is not None:
                lost.append((span.offset, span.length, span.lost))
            elif span.length:
                data += reader.read(span)
            if span.end is not None:
                ends.append(span.end.run)
            reader.commit(span)
        reader.close()
        return data, lost, ends, reader.offset


def test_bytes_losses_and_ends(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.append(b"one\n")
    files.writer.lose(10)
    files.append(b"two\n")
    assert files.finish(1)
    files.append(b"three\n")
    files.writer.lose(5)
    assert files.finish(2)
    files.writer.close()
    assert files.read() == (b"one\ntwo\nthree\n", [(4, 10, "rate"), (24, 5, "rate")], [1, 2], 29)
    assert files.writer.end == 29
    assert files.troubles == []


def test_a_silent_run_has_its_end(tmp_path: Path) -> None:
    files = Files(tmp_path)
    for run in range(1, 2000):
        assert files.finish(run)
    files.append(b"at last")
    files.writer.close()
    data, lost, ends, end = files.read()
    assert (data, lost, end) == (b"at last", [], 7)
    assert ends[-1] == 1999
    assert list_segments(tmp_path, "stdout") == [0]


def test_marks_alone_never_stall_it(tmp_path: Path) -> None:
    files = Files(tmp_path, 8192)
    for run in range(1, 1000):
        files.finish(run)
    for _ in range(20):
        files.append(b"x" * 700)
    files.writer.close()
    assert files.writer.end == 14_000


def test_size_bound_holds_at_every_moment(tmp_path: Path) -> None:
    most = 600_000
    files = Files(tmp_path, most)
    total = 0
    for number in range(300):
        data = bytes([number % 251]) * (1 + number * 37 % 20_000)
        files.append(data)
        total += len(data)
        on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert on_disk <= most
    files.writer.close()
    data, lost, _, end = files.read()
    assert end == total
    assert lost == [(0, total - len(data), "size")]
    assert len(data) > most // 3


def test_one_chunk_greater_than_all(tmp_path: Path) -> None:
    files = Files(tmp_path, 100_000)
    chunk = os.urandom(400_000)
    files.append(chunk)
    files.writer.close()
    data, lost, _, end = files.read()
    assert end == len(chunk)
    assert data == chunk[lost[0][1] :]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 100_000


def test_another_writer_goes_on(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.append(b"first")
    files.finish(1)
    files.writer.close()
    files.writer = files.open()
    files.append(b"second")
    files.finish(2)
    files.writer.close()
    assert files.read() == (b"firstsecond", [], [1, 2], 11)
    assert list_segments(tmp_path, "stdout") == [0]


@pytest.mark.parametrize("damage", ["unmarked bytes", "half a mark", "both", "no marks", "worker ended it"])
def test_what_a_killed_launcher_left(tmp_path: Path, damage: str) -> None:
    files = Files(tmp_path)
    files.append(b"first")
    files.writer.close()
    log, marks = (tmp_path / f"stdout.{0:020d}.{kind}" for kind in ("log", "marks"))
    if damage in ("unmarked bytes", "both", "worker ended it"):
        log.write_bytes(log.read_bytes() + b"tail")
    if damage in ("half a mark", "both"):
        marks.write_bytes(marks.read_bytes() + b"\1" * 13)
    if damage == "no marks":
        marks.unlink()
    if damage == "worker ended it":
        write_incomplete_eof(tmp_path, 1)
    files.writer = files.open()
    files.append(b"second")
    files.finish(2)
    files.writer.close()
    data, lost, ends, end = files.read()
    assert data.endswith(b"second")
    assert end == files.writer.end
    assert len(data) + sum(length for _, length, _ in lost) == end
    if damage == "worker ended it":
        assert (data, lost, ends) == (b"firsttailsecond", [], [1, 2])


def test_a_cut_first_mark_in_an_empty_segment(tmp_path: Path) -> None:
    (tmp_path / f"stdout.{0:020d}.log").touch()
    (tmp_path / f"stdout.{0:020d}.marks").write_bytes(b"\1" * 5)
    files = Files(tmp_path)
    files.append(b"new")
    files.writer.close()
    assert files.read() == (b"new", [], [], 3)


def test_the_pool_closes_the_oldest(tmp_path: Path) -> None:
    pool = OpenFiles(3)
    writers = []
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        writers.append(SegmentWriter(str(folder), "stdout", None, pool, pytest.fail))
    for _ in range(2):
        for writer in writers:
            before = len(os.listdir("/dev/fd"))
            writer.append(memoryview(b"x"), 1)
            assert len(os.listdir("/dev/fd")) <= before + 2
    assert sum(writer._log >= 0 for writer in writers) == 3
    for writer in writers:
        writer.close()
        assert writer.end == 2


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    files = Files(tmp_path / "missing")
    files.append(b"lost")
    assert not files.finish(1)
    assert len(files.troubles) == 1, "told once"
    (tmp_path / "missing").mkdir()
    files.writer._retry_at = 0.0
    files.append(b"kept")
    assert files.finish(1)
    files.writer.close()
    assert files.read() == (b"kept", [(0, 4, "disk")], [1], 8)


def test_a_deleted_segment_begins_anew(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.append(b"first")
    files.writer.close()
    for path in tmp_path.iterdir():
        path.unlink()
    files.append(b"second")
    files.writer.close()
    assert list_segments(tmp_path, "stdout") == [5]
    assert files.read() == (b"second", [(0, 5, "size")], [], 11)


class FaultyDisk:
    """os.write that obeys a script: how many bytes go through, or an errno."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script: list[tuple[str, int]] = []
        self._real: Callable[[int, Any], int] = os.write
        monkeypatch.setattr(os, "write", self._write)

    def _write(self, fd: int, data: Any) -> int:
        if not self.script:
            return self._real(fd, data)
        kind, value = self.script.pop(0)
        if kind == "fail":
            raise OSError(value, os.strerror(value))
        if kind == "real":
            return self._real(fd, data)
        return self._real(fd, data[:value])


@pytest.mark.parametrize(
    ("script", "stored", "lost"),
    [
        ([("fail", errno.ENOSPC)], 0, 10),
        ([("fail", errno.EIO)], 0, 10),
        ([("cut", 4), ("fail", errno.ENOSPC), ("real", 0), ("fail", errno.ENOSPC)], 4, 6),
        ([("cut", 4), ("fail", errno.EINTR), ("real", 0), ("real", 0)], 10, 0),
        ([("cut", 10), ("fail", errno.ENOSPC)], 0, 10),
        ([("cut", 10), ("cut", 7)], 0, 10),
        ([("cut", 4), ("cut", 6)], 10, 0),
    ],
)
def test_disk_errors_are_counted_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: list[tuple[str, int]], stored: int, lost: int
) -> None:
    files = Files(tmp_path)
    files.append(b"before")
    disk = FaultyDisk(monkeypatch)
    disk.script = script
    files.append(b"0123456789")
    assert disk.script == []
    files.append(b"dropped at once" if lost else b"")
    files.writer._retry_at = 0.0
    files.append(b"after")
    files.finish(1)
    files.writer.close()
    data, gaps, ends, end = files.read()
    lost += 15 if lost else 0
    assert data == b"before" + b"0123456789"[:stored] + b"after"
    assert gaps == ([(6 + stored, lost, "disk")] if lost else [])
    assert (ends, end) == ([1], 6 + stored + lost + 5)
    assert len(files.troubles) == (1 if lost else 0)


def test_an_end_that_cannot_be_marked_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(tmp_path)
    files.append(b"x")
    disk = FaultyDisk(monkeypatch)
    disk.script = [("fail", errno.ENOSPC)]
    assert not files.finish(1)
    assert files.finish(1)
    files.writer.close()
    assert files.read() == (b"x", [], [1], 1)


STEPS = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=3000),
        st.integers(1, 5000),
        st.sampled_from(["finish", "reopen", "close"]),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.sampled_from([None, 9000, 70_000]))
def test_whatever_happens_the_reader_agrees(
    tmp_path_factory: pytest.TempPathFactory, steps: list[object], max_bytes: int | None
) -> None:
    files = Files(tmp_path_factory.mktemp("segments"), max_bytes)
    stream: list[int | None] = []
    run = 0
    for step in steps:
        if isinstance(step, bytes):
            files.append(step)
            stream += step
        elif isinstance(step, int):
            files.writer.lose(step)
            stream += [None] * step
        else:
            run += 1
            files.finish(run)
            if step != "finish":
                files.writer.close()
            if step == "reopen":
                files.writer = files.open()
    run += 1
    files.finish(run)
    files.writer.close()
    data, lost, ends, end = files.read()
    assert end == len(stream)
    gone = {at for offset, length, _ in lost for at in range(offset, offset + length)}
    assert bytes(b for at, b in enumerate(stream) if at not in gone and b is not None) == data
    assert all(stream[at] is not None for at in range(end) if at not in gone)
    rated = {at for o, n, why in lost if why == "rate" for at in range(o, o + n)}
    assert all(stream[at] is None for at in rated)
    assert ends[-1] == run


def test_the_record_has_32_bytes() -> None:
    assert MARK.size == 32
