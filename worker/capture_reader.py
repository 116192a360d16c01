"""Read one stream of capture files from an offset on, while the launcher writes, rotates and deletes them.

`span()` says what stands next: data, a lost range, or the end of a run. `read()` gets the bytes of a data
span and `commit()` moves past it. Only marks are believed, so that no byte is seen before its capture was
complete. Nothing is held in memory between two calls but a place in a segment; the files may be closed at
any time and are opened again.
"""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from worker.capture_files import EOF_KINDS, MARK, MarkKind, Segment, list_segments, segment_path

_DATA = int(MarkKind.DATA)
_DISK = int(MarkKind.LOST_DISK)
_REASONS = {int(MarkKind.LOST_RATE): "rate", _DISK: "disk"}


class RunEnd(NamedTuple):
    run: int
    incomplete: bool


class Place(NamedTuple):
    """A mark's place in its segment: where it stands, where its bytes stand, which offset it should have."""

    mark: int
    data: int
    expected: int


class Span(NamedTuple):
    """What stands next at `offset`.

    Data has `times`: (offset, unix µs) of each captured read in it, the first at the span's own offset.
    `full`: cut at the limit. `last`: nothing was marked after it yet in its segment. `end`: the end of a run
    that follows at once, or, with no bytes, is meant itself. `lost`: the reason why `length` bytes are
    missing. The other fields are the reader's.
    """

    offset: int
    length: int
    times: Sequence[tuple[int, int]] = ()
    lost: str | None = None
    end: RunEnd | None = None
    full: bool = False
    last: bool = False
    position: int = 0
    place: Place | None = None
    near: Place | None = None

    @property
    def stop(self) -> int:
        return self.offset + self.length


class _Piece(NamedTuple):
    """What one mark says of the offsets that are not read yet. Pieces follow one another without a gap."""

    kind: int
    start: int
    stop: int
    value: int  # unix µs of data, number of an ended run
    position: int
    place: Place


class CaptureReader:
    """`offset` is the next byte to be read; the ends of runs up to `eof_run` are behind it."""

    __slots__ = (
        "_base",
        "_clear_run",
        "_clear_to",
        "_place",
        "_segment",
        "_stream",
        "eof_run",
        "folder",
        "offset",
    )

    def __init__(self, folder: Path, stream: str, offset: int = 0, eof_run: int = 0) -> None:
        self.folder = folder
        self._stream = stream
        self._segment: Segment | None = None
        self.seek(offset, eof_run)

    def seek(self, offset: int, eof_run: int) -> None:
        self.close()
        self.offset, self.eof_run = offset, eof_run
        self._base: int | None = None
        self._place = Place(0, 0, 0)
        self._clear_to, self._clear_run = -1, 0

    def close(self) -> None:
        """Give the descriptors back; the place is kept."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    @property
    def began(self) -> bool:
        """Whether there was anything to open yet."""
        return self._base is not None

    def span(self, limit: int, *, thorough: bool = True) -> Span | None:
        """What stands next, at most `limit` bytes of data; None when nothing after the offset is marked yet.

        Without `thorough` the folder is not listed, and a segment that does not begin where the one before
        ends (after a failed write of the launcher) is not seen.
        """
        while True:
            segment = self._segment
            if segment is None:
                opened = self._open()
                if not isinstance(opened, Segment):
                    return opened
                segment = self._segment = opened
            span = self._in_segment(segment, limit)
            if span is not None:
                return span
            base = self._next_base(segment, thorough)
            if base is None:
                return None
            # Only now are the marks of this segment known to be complete.
            span = self._in_segment(segment, limit)
            if span is not None:
                return span
            if base > self.offset:
                return Span(self.offset, base - self.offset, lost="size" if segment.deleted() else "disk")
            self._enter(base)

    def read(self, span: Span) -> bytes:
        """The bytes of the data span that `span()` gave last. Fewer when a crash of the machine cut the
        file.
        """
        if self._segment is None:
            raise ValueError("the span is not the reader's last one")
        return self._segment.read(span.position, span.length)

    def commit(self, span: Span, length: int | None = None) -> None:
        """Move past a span, or past the first `length` bytes of a data span."""
        if length is None or length == span.length:
            self.offset = span.stop
            if span.end is not None:
                self.eof_run = span.end.run
            if span.place is not None:
                self._place = span.place
            return
        self.offset = span.offset + length
        if span.near is not None and span.near.expected <= self.offset:
            self._place = span.near

    def continues(self, span: Span) -> bool:
        """Whether what follows a span of data stands in the next file already."""
        return span.last and os.path.exists(segment_path(self.folder, self._stream, span.stop, "log"))

    def run_of(self, span: Span, newest: int) -> int:
        """The run to which a span belongs; `newest` is the run that was begun last.

        Output is that of the run whose end comes next. Where no end is marked, it is the newest run's: the
        end of a run is marked before the next one is begun.
        """
        if span.end is not None:
            return span.end.run
        if newest <= self.eof_run + 1:
            return self.eof_run + 1
        if span.stop > self._clear_to:
            self._clear_to, self._clear_run = self._look_ahead(span, newest)
        return self._clear_run

    # -- segments

    def _open(self) -> Segment | Span | None:
        """The segment of the offset, a span for what is missing before the next one, None when there is
        none.
        """
        if self._base is not None:
            segment = Segment.open(self.folder, self._stream, self._base)
            if segment is not None:
                return segment
        bases = list_segments(self.folder, self._stream)
        # Where a segment begins at the offset, the one before may end with marks that are not read yet.
        at = sum(base < self.offset for base in bases)
        for base in bases[max(at - 1, 0) :]:
            segment = Segment.open(self.folder, self._stream, base)
            if segment is None:
                continue  # deleted since it was listed, or still being made
            if base > self.offset:
                segment.close()
                return Span(self.offset, base - self.offset, lost="size")
            self._enter(base)
            return segment
        return None

    def _next_base(self, segment: Segment, thorough: bool) -> int | None:
        if self.offset > segment.base:
            following = Segment.open(self.folder, self._stream, self.offset)
            if following is not None:
                following.close()
                return self.offset
        if not thorough and not segment.deleted():
            return None
        return next((b for b in list_segments(self.folder, self._stream) if b > segment.base), None)

    def _enter(self, base: int) -> None:
        self.close()
        self._base = base
        self._place = Place(0, 0, base)

    # -- marks

    def _in_segment(self, segment: Segment, limit: int) -> Span | None:
        """Join what stands at the offset, as far as it is of one kind."""
        joining = _Joining(self.offset, limit, self._place)
        place = self._place
        for block in segment.blocks(place.mark):
            if len(block) == MARK.size and joining.kind is None:
                # A quiet stream: one read since the last look.
                offset, time_us, length, kind = MARK.unpack(block)
                if kind == _DATA and offset == place.expected == self.offset and length < limit:
                    behind = Place(place.mark + MARK.size, place.data + length, offset + length)
                    times = [(offset, time_us)]
                    return Span(
                        offset, length, times, last=True, position=place.data, place=behind, near=place
                    )
            words = memoryview(block).cast("Q")
            reached = words[-4] + words[-2]
            # Reads that follow one another without anything between them are taken together.
            if not any(words[3::4]) and words[0] == place.expected and sum(words[2::4]) == reached - words[0]:
                span = joining.reads(words, reached, place)
                place = Place(place.mark + len(block), place.data + reached - words[0], reached)
                if span is not None:
                    return span
                continue
            pieces, place = self._pieces(block, place)
            for piece in pieces:
                span = joining.piece(piece)
                if span is not None:
                    return span
        return joining.rest(place)

    def _pieces(self, block: bytes, place: Place) -> tuple[list[_Piece], Place]:
        """The pieces of a block of marks that begins at `place`, and the place behind it."""
        found = []
        mark_at, data_at, expected = place
        for offset, time_us, argument, kind in MARK.iter_unpack(block):
            here = Place(mark_at, data_at, expected)
            mark_at += MARK.size
            begin = max(expected, self.offset)
            if kind > _DISK:
                if kind in EOF_KINDS and argument > self.eof_run:
                    found.append(_Piece(kind, begin, begin, argument, 0, here))
                continue
            if offset > begin:
                # The mark of what stood here could not be written.
                found.append(_Piece(_DISK, begin, offset, 0, 0, here))
                begin = offset
            stop = offset + argument
            expected = max(expected, stop)
            position = data_at + begin - offset
            if kind == _DATA:
                data_at += argument
            if stop > begin:
                found.append(_Piece(kind, begin, stop, time_us, position, here))
        return found, Place(mark_at, data_at, expected)

    def _look_ahead(self, span: Span, newest: int) -> tuple[int, int]:
        """(offset, run): what stands before that offset is that run's."""
        reached = span.stop
        bases = list_segments(self.folder, self._stream)
        at = sum(base <= self.offset for base in bases)
        for base in bases[max(at - 1, 0) :]:
            segment = Segment.open(self.folder, self._stream, base)
            if segment is None:
                continue
            try:
                ends, segment_end = segment.run_ends(self._place.mark if base == self._base else 0)
            finally:
                segment.close()
            for mark in ends:
                if mark.argument > self.eof_run:
                    return max(mark.offset, reached), mark.argument
            reached = max(reached, segment_end)
        return reached, newest


class _Joining:
    """Joins the marks behind `start` to one span; `reads` and `piece` give it when something else follows."""

    __slots__ = ("kind", "limit", "near", "place", "position", "start", "stop", "times")

    def __init__(self, start: int, limit: int, place: Place) -> None:
        self.start = self.stop = start
        self.limit = limit
        self.kind: int | None = None
        self.position = 0
        self.place = self.near = place
        self.times: list[tuple[int, int]] = []

    def reads(self, words: memoryview, reached: int, place: Place) -> Span | None:
        """A block of marks of reads that follow one another; words are offset, time, length, kind."""
        if reached <= self.start:
            return None
        if self.kind not in (None, _DATA):
            return self.span()
        offsets = words[::4]
        first = bisect_right(offsets, self.stop) - 1
        after = bisect_left(offsets, self.start + self.limit)
        if self.kind is None:
            self.kind = _DATA
            self.position = place.data + self.start - place.expected
        if after <= first:
            return self.span(full=True)
        self.times += zip(offsets[first:after], words[1::4][first:after], strict=True)
        if self.times[0][0] < self.start:
            self.times[0] = (self.start, self.times[0][1])
        near = bisect_right(offsets, self.start + self.limit - self.limit // 8) - 1
        if near >= 0:
            self.near = _place_of(place, offsets, near)
        self.place = _place_of(place, offsets, after - 1)
        if reached - self.start >= self.limit:
            self.stop = self.start + self.limit
            return self.span(full=True)
        self.stop = reached
        return None

    def piece(self, piece: _Piece) -> Span | None:
        if self.kind is None:
            if piece.kind > _DISK:
                return Span(self.start, 0, end=_run_end(piece), place=piece.place)
            self.kind, self.position = piece.kind, piece.position
        elif piece.kind != self.kind:
            return self.span(end=_run_end(piece) if self.kind == _DATA and piece.kind > _DISK else None)
        self.place = piece.place
        self.stop = piece.stop
        if self.kind == _DATA:
            self.times.append((piece.start, piece.value))
            if piece.start <= self.start + self.limit - self.limit // 8:
                self.near = piece.place
            if self.stop - self.start >= self.limit:
                self.stop = self.start + self.limit
                return self.span(full=True)
        return None

    def span(self, *, end: RunEnd | None = None, full: bool = False) -> Span:
        return self._span(self.place, end=end, full=full)

    def rest(self, behind: Place) -> Span | None:
        """What there is when no marks are left; `behind` is the place after the last one."""
        return None if self.kind is None else self._span(behind, last=True)

    def _span(
        self, place: Place, *, end: RunEnd | None = None, full: bool = False, last: bool = False
    ) -> Span:
        return Span(
            self.start,
            self.stop - self.start,
            times=self.times,
            lost=None if self.kind is None else _REASONS.get(self.kind),
            end=end,
            full=full,
            last=last,
            position=self.position,
            place=place,
            near=self.near,
        )


def _place_of(first: Place, offsets: memoryview, index: int) -> Place:
    """The place of one mark of a block of reads whose first stands at `first`."""
    offset = offsets[index]
    return Place(first.mark + index * MARK.size, first.data + offset - first.expected, offset)


def _run_end(piece: _Piece) -> RunEnd:
    return RunEnd(piece.value, piece.kind == MarkKind.EOF_INCOMPLETE)
