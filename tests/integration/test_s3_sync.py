"""A mirror and its bucket: what goes where, what is kept when both have changed, and what a hostile side can do."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.s3_help import KEYS, Bucket, Fault, FaultProxy, Request, moto, needs_moto
from worker.volume_s3.client import S3Client
from worker.volume_s3.failures import NoRoom, S3Failure, Stopped
from worker.volume_s3.files import MirrorTree
from worker.volume_s3.source import S3Source
from worker.volume_s3.state import MirrorState
from worker.volume_s3.sync import MirrorPass, Outcome

pytestmark = needs_moto

INSTANCE = "01J0000000000000000000000A"
BESIDE = f".conflict-{INSTANCE.lower()}"
PART = 5 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture
def bucket(server: str) -> Bucket:
    return Bucket(server, f"b-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def proxy(server: str) -> Iterator[FaultProxy]:
    with FaultProxy(server).running() as made:
        yield made


class Mirror:
    """One mirror as the worker keeps it."""

    def __init__(self, folder: Path, source: S3Source) -> None:
        self.folder = folder
        self.files = folder / "files"
        self.source = source
        self.stopped = threading.Event()
        for path in (folder, self.files, folder / "incoming"):
            path.mkdir(exist_ok=True)

    def _with(self, use: Callable[[MirrorPass], Any], **settings: Any) -> Any:
        tree = MirrorTree(self.files, self.folder / "incoming")
        state = MirrorState(self.folder)
        client = S3Client(self.source, KEYS, stopped=self.stopped)
        fields: dict[str, Any] = {"fetching": False, "owned": True, "part_bytes": PART, "first_s": 0.001, **settings}
        try:
            return use(
                MirrorPass(
                    source=self.source,
                    client=client,
                    state=state,
                    tree=tree,
                    instance=INSTANCE,
                    stopped=self.stopped,
                    **fields,
                )
            )
        finally:
            client.close()
            state.close()
            tree.close()

    def fetch(self, **settings: Any) -> Outcome:
        return self._with(MirrorPass.run, fetching=True, **settings)

    def push(self, **settings: Any) -> Outcome:
        return self._with(MirrorPass.run, **settings)

    def changed(self) -> bool:
        return bool(self._with(MirrorPass.has_changes))

    def write(self, path: str, text: str | bytes) -> Path:
        place = self.files / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text.encode() if isinstance(text, str) else text)
        return place

    def tree(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.files)): path.read_bytes()
            for path in sorted(self.files.rglob("*"))
            if path.is_file() and not path.is_symlink()
        }


@pytest.fixture
def mirror(tmp_path: Path, bucket: Bucket, proxy: FaultProxy) -> Mirror:
    return Mirror(tmp_path / "mirror", bucket.source(proxy.url))


def test_it_is_fetched_and_what_is_written_goes_back(mirror: Mirror, bucket: Bucket) -> None:
    bucket.put("a.txt", "one")
    bucket.put("deep/er/b.txt", "two", mtime="1700000000.25", sandfleet_executable="1")
    bucket.put("deep/er/empty", "")
    assert mirror.fetch().downloaded == 3
    assert mirror.tree() == {"a.txt": b"one", "deep/er/b.txt": b"two", "deep/er/empty": b""}
    found = (mirror.files / "deep/er/b.txt").stat()
    assert found.st_mtime_ns == 1_700_000_000_250_000_000
    assert found.st_mode & 0o777 == 0o755
    assert not mirror.changed()
    mirror.write("a.txt", "changed")
    mirror.write("new/c.txt", "three").chmod(0o755)
    (mirror.files / "deep/er/b.txt").unlink()
    assert mirror.changed()
    done = mirror.push()
    assert (done.uploaded, done.deleted_there, done.kept_both) == (2, 1, [])
    assert bucket.keys() == ["a.txt", "deep/er/empty", "new/c.txt"]
    assert bucket.get("a.txt") == b"changed"
    assert bucket.request("HEAD", "new/c.txt")[1]["x-amz-meta-sandfleet-executable"] == "1"
    again = mirror.push()
    assert (again.uploaded, again.downloaded, again.deleted_there) == (0, 0, 0)
    assert not mirror.changed()
