"""The folder of partial blobs."""

import os
import stat
from pathlib import Path

from worker.images.ingest import KEPT_S, Ingest

DIGEST = "sha256:" + "a" * 64


def part(ingest: Ingest, digest: str, content: bytes, written: float) -> Path:
    path = ingest.path(digest)
    path.write_bytes(content)
    os.utime(path, (written, written))
    return path


def test_a_day_old_is_deleted_at_the_start(tmp_path: Path) -> None:
    ingest = Ingest.open(tmp_path / "ingest")
    assert stat.S_IMODE(ingest.folder.stat().st_mode) == 0o700
    old = part(ingest, DIGEST, b"old", 1000.0)
    new = part(ingest, DIGEST.replace("a", "b"), b"new", 1001.0)
    Ingest.open(ingest.folder, now=1000.5 + KEPT_S)
    assert (old.exists(), new.exists()) == (False, True)


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    ingest = Ingest.open(tmp_path / "ingest")
    assert ingest.present(DIGEST) == 0
    part(ingest, DIGEST, b"12345", 1000.0)
    assert ingest.present(DIGEST) == 5
    with ingest.claimed(DIGEST) as path:
        assert ingest.sweep() == 0
        assert path.read_bytes() == b"12345"
    assert ingest.sweep() == 5
    assert not path.exists()
