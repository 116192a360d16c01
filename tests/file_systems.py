"""File systems of other kinds than the disk's: made in a sparse file, mounted for the while. For root."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

# The streams of a test's server reserve 20 GiB.
IMAGE_BYTES = 64 << 30


@contextlib.contextmanager
def mounted(mkfs: list[str]) -> Iterator[Path | None]:
    """Made with the command `mkfs`; None where this system mounts none."""
    folder = Path(tempfile.mkdtemp(prefix="sandfleet-disk-"))
    image, place = folder / "image", folder / "place"
    try:
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        place.mkdir()
        made = subprocess.run([*mkfs, str(image)], capture_output=True, check=False)
        mount = ["mount", "-o", "loop", str(image), str(place)]
        if made.returncode != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            yield None
            return
        try:
            yield place
        finally:
            gone = subprocess.run(["umount", str(place)], capture_output=True, check=False, text=True)
            if gone.returncode != 0:
                subprocess.run(["umount", "--lazy", str(place)], check=True)
                raise OSError(f"something still uses it: {gone.stderr}")
    finally:
        # Not a tree: were it still mounted, nothing in it would be touched.
        image.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            place.rmdir()
            folder.rmdir()


@contextlib.contextmanager
def temporary_in(place: Path) -> Iterator[None]:
    """Temporary files are made there meanwhile."""
    before, tempfile.tempdir = tempfile.tempdir, str(place)
    try:
        yield
    finally:
        tempfile.tempdir = before
