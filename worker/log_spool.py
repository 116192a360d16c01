"""The capture files of removed containers, kept until they are sent: `{data_dir}/spool/<instance>/` and a
`meta.json`.

`meta.json` is written before the first file is moved in and deleted after the last one, so that a crash at
any point leaves a folder that the next worker can go on with.
"""

import os
import shutil
from pathlib import Path

import msgspec
from loguru import logger

from worker.capture_files import capture_files, move_capture_files

_META = "meta.json"


class SpoolMeta(msgspec.Struct, frozen=True, kw_only=True):
    """Whose files these are; `run` is the newest one."""

    cid: str
    instance: str
    run: int


class Spool:
    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, instance: str) -> Path:
        return self._root / instance

    def put(self, meta: SpoolMeta, state_dir: Path) -> Path:
        """Move the capture files of an instance here. OSError; may then be tried again."""
        folder = self.folder(meta.instance)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = folder / "meta.new"
        fresh.write_bytes(msgspec.json.encode(meta))
        fresh.chmod(0o600)
        fresh.replace(folder / _META)
        move_capture_files(state_dir, folder)
        return folder

    def take_back(self, instance: str, state_dir: Path) -> None:
        """The container is there after all: the worker died in the middle of its removal."""
        folder = self.folder(instance)
        if folder.is_dir():
            move_capture_files(folder, state_dir)
            self.drop(instance)

    def drop(self, instance: str) -> None:
        """Delete what was sent."""
        folder = self.folder(instance)
        if not folder.exists():
            return
        for name in capture_files(folder):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder)

    def entries(self) -> list[SpoolMeta]:
        """What a dead worker left, oldest instance first."""
        found = []
        try:
            names = sorted(os.listdir(self._root))
        except FileNotFoundError:
            return []
        for name in names:
            folder = self._root / name
            if not folder.is_dir():
                continue
            if not capture_files(folder):
                self.drop(name)
                continue
            try:
                meta = msgspec.json.decode((folder / _META).read_bytes(), type=SpoolMeta)
            except (OSError, msgspec.DecodeError) as failure:
                logger.error("{} is kept, but nobody knows whose log it is: {}", folder, failure)
                continue
            found.append(meta)
        return found
