"""A stand-in for the launcher: writes capture files as the interface says, and knows what it wrote."""

from pathlib import Path

from worker.capture_files import MARK, MarkKind, segment_path


class CaptureWriter:
    """One stream. `content` is all that was ever captured, lost bytes are zeros there."""

    def __init__(self, folder: Path, stream: str = "stdout") -> None:
        self.folder, self.stream = folder, stream
        self.content = bytearray()
        self.lost: list[tuple[int, int, str]] = []
        self.ends: list[tuple[int, int]] = []
        self.bases: list[int] = []
        self.deleted_to = 0
        self.time_us = 1_000_000
        folder.mkdir(exist_ok=True)

    @property
    def end(self) -> int:
        return len(self.content)

    def write(self, data: bytes, *, marked: bool = True) -> None:
        self._ensure()
        self._append("log", data)
        if marked:
            self._mark(len(data), MarkKind.DATA)
        self.content += data

    def lose(self, length: int, reason: str = "rate") -> None:
        """As the launcher does: the mark stands at the end of a segment, the next byte begins another."""
        self._ensure()
        self._mark(length, MarkKind.LOST_RATE if reason == "rate" else MarkKind.LOST_DISK)
        self.lost.append((self.end, self.end + length, reason))
        self.content += bytes(length)

    def finish_run(self, run: int, *, incomplete: bool = False) -> None:
        self._ensure()
        self._mark(run, MarkKind.EOF_INCOMPLETE if incomplete else MarkKind.EOF)
        self.ends.append((self.end, run))

    def rotate(self) -> None:
        if self.bases and self.bases[-1] != self.end:
            self._begin()

    def delete_oldest(self) -> None:
        if len(self.bases) > 1:
            gone = self.bases.pop(0)
            self.deleted_to = self.bases[0]
            Path(segment_path(self.folder, self.stream, gone, "log")).unlink()
            Path(segment_path(self.folder, self.stream, gone, "marks")).unlink()

    def _ensure(self) -> None:
        if not self.bases:
            self._begin()

    def _begin(self) -> None:
        self.bases.append(self.end)
        self._append("log", b"")
        self._append("marks", b"")

    def _mark(self, argument: int, kind: int) -> None:
        self.time_us += 1
        self._append("marks", MARK.pack(self.end, self.time_us, argument, kind))

    def _append(self, suffix: str, data: bytes) -> None:
        with open(segment_path(self.folder, self.stream, self.bases[-1], suffix), "ab") as file:
            file.write(data)
