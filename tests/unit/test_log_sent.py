"""The record of what was sent: read back after a kill, made small, and no obstacle when the disk is full."""

import errno
import os
from pathlib import Path

import pytest

from worker.log_chunks import START, Cut, Position, Resume, What
from worker.log_sent import Flights, SentLog

A, B = ("01JD00000000000000000000A1", "stdout"), ("01JD00000000000000000000A1", "stderr")
ONE = Cut(What.DATA, 0, 10, 1)
TWO = Cut(What.LOST, 10, 5, 1, reason="rate")
THREE = Cut(What.DATA, 15, 7, 1, eof=True, incomplete=True)
END = Cut(What.EOF, 22, 0, 2, eof=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sent.log"


def reopened(path: Path) -> dict[tuple[str, str], Flights]:
    log = SentLog(path)
    try:
        return log.open()
    finally:
        log.close()


class TestFlights:
    def test_the_position_waits_for_the_oldest(self) -> None:
        flights = Flights()
        for cut in (ONE, TWO, THREE):
            assert flights.send(cut, 5)
        assert not flights.send(TWO, 9)
        flights.ack(TWO)
        assert flights.position == START
        assert flights.tail == TWO.after
        flights.ack(ONE)
        assert flights.position == TWO.after
        assert flights.tail == ONE.after
        flights.ack(THREE)
        assert flights.position == flights.tail == Position(22, 1)
        assert not flights.waiting

    def test_the_age_is_that_of_the_oldest_unacknowledged(self) -> None:
        flights = Flights()
        assert flights.oldest_us is None
        flights.send(ONE, 5)
        flights.send(TWO, 9)
        assert flights.oldest_us == 5
        flights.ack(ONE)
        assert flights.oldest_us == 9

    def test_the_journal_may_know_more(self) -> None:
        flights = Flights()
        flights.send(ONE, 1)
        flights.send(TWO, 1)
        flights.advance(ONE.after)
        assert flights.position == flights.tail == ONE.after
        assert [flight.cut for flight in flights.waiting] == [TWO]

    def test_a_decision_is_taken_over(self) -> None:
        flights = Flights()
        for cut in (ONE, TWO, THREE):
            flights.send(cut, 1)
        flights.resume(Resume(THREE.after, ONE.after, (TWO, THREE)))
        assert flights.position == ONE.after
        assert [flight.cut for flight in flights.waiting] == [TWO, THREE]
        flights.resume(Resume(Position(3, 0), Position(3, 0), doubtful=True))
        assert (flights.position, list(flights.waiting)) == (Position(3, 0), [])


class TestFile:
    def test_what_was_sent_is_there_after_a_kill(self, path: Path) -> None:
        log = SentLog(path)
        assert log.open() == {}
        for at, cut in enumerate((ONE, TWO, THREE, END)):
            log.sent(A, cut, at)
        log.acked(A, ONE)
        log.sent(B, ONE, 7)  # writes the acknowledgement too
        log.acked(A, TWO)  # dies with the process
        log._acks.clear()
        log.close()
        found = reopened(path)
        assert [(f.cut, f.time_us, f.acked) for f in found[A].waiting] == [
            (TWO, 1, False),
            (THREE, 2, False),
            (END, 3, False),
        ]
        assert found[A].position == ONE.after
        assert [f.cut for f in found[B].waiting] == [ONE]

    def test_it_begins_anew_with_what_is_left(self, path: Path) -> None:
        log = SentLog(path)
        log.open()
        flights = Flights(Position(100, 3))
        for cut in (ONE, TWO, THREE):
            log.sent(A, cut, 1)
        late = Cut(What.DATA, 100, 10, 4)
        later = Cut(What.DATA, 110, 10, 4)
        flights.send(late, 50)
        flights.send(later, 60)
        flights.ack(later)
        log.rewrite([(A, flights)])
        assert log.size == path.stat().st_size
        log.close()
        found = reopened(path)[A]
        assert (found.position, found.tail) == (Position(100, 3), later.after)
        assert [(f.cut, f.time_us, f.acked) for f in found.waiting] == [(late, 50, False), (later, 60, True)]

    def test_nothing_left_is_an_empty_file(self, path: Path) -> None:
        log = SentLog(path)
        log.open()
        log.sent(A, ONE, 1)
        log.rewrite([])
        assert path.read_bytes() == b""
        before = path.stat().st_ino
        log.rewrite([])
        assert path.stat().st_ino == before
        assert path.stat().st_mode & 0o777 == 0o600
        log.close()

    def test_a_torn_record_is_cut_off(self, path: Path) -> None:
        log = SentLog(path)
        log.open()
        log.sent(A, ONE, 1)
        log.close()
        with path.open("ab") as file:
            file.write(b"half a rec")
        log = SentLog(path)
        assert [f.cut for f in log.open()[A].waiting] == [ONE]
        log.sent(A, TWO, 2)
        log.close()
        assert [f.cut for f in reopened(path)[A].waiting] == [ONE, TWO]

    def test_garbage_is_no_crash(self, path: Path) -> None:
        path.write_bytes(os.urandom(4096))
        reopened(path)

    def test_a_full_disk_stops_nothing(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        log = SentLog(path)
        log.open()
        log.sent(A, ONE, 1)

        def full(*args: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            log.sent(A, TWO, 2)
        log.sent(A, THREE, 3)  # a record after a gap would be worse than none
        flights = Flights()
        flights.send(THREE, 3)
        log.rewrite([(A, flights)])
        log.sent(A, END, 4)
        log.close()
        assert [f.cut for f in reopened(path)[A].waiting] == [THREE, END]

    def test_no_folder_no_file(self, tmp_path: Path) -> None:
        log = SentLog(tmp_path / "none" / "sent.log")
        assert log.open() == {}
        log.sent(A, ONE, 1)
        log.acked(A, ONE)
        log.rewrite([])
        log.close()
