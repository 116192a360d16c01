"""Which way of copying trees is used in this data directory: found out by doing it once, and written down.

Found out again when the file system or the kernel is another one. Why no overlay is mounted instead stands in
docs/adr/0010.
"""

import os
import threading
from pathlib import Path
from typing import Protocol

import msgspec
from loguru import logger

from worker.node_file import replace_file
from worker.platform.base import CloneChoice, CloneReport
from worker.platform.treecopy import TreeError

NAME = "clone.json"


class ClonePlatform(Protocol):
    """The part of a driver that copies."""

    def measure_clone(self, source: Path, target: Path) -> CloneChoice: ...

    def clone_tree(self, src: Path, dst: Path, choice: CloneChoice | None = None) -> CloneReport: ...


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """`where` says for which file systems and kernel the choice was made."""

    where: str
    choice: CloneChoice


class MeasuredCloner:
    """Copies trees from `images` into `containers`. Until `choose` is done, as the platform does by itself."""

    def __init__(self, platform: ClonePlatform, images: Path, containers: Path) -> None:
        self._platform = platform
        self._images = images
        self._containers = containers
        self._lock = threading.Lock()
        self._choice: CloneChoice | None = None

    def told(self) -> str:
        """How trees are copied here, in words."""
        choice = self._choice
        if choice is None:
            return "not measured yet"
        if choice.method == "reflink" and choice.shared_from:
            return f"reflink from {choice.shared_from >> 10} KiB, copy below"
        return choice.method

    def clone_tree(self, src: Path, dst: Path) -> CloneReport:
        return self._platform.clone_tree(src, dst, self._choice)

    def choose(self) -> CloneChoice | None:
        """Read the choice of before, or make it and write it down. Blocking, about a tenth of a second.

        None, and a word in the log, when the folders cannot be written: then every create fails anyway.
        """
        with self._lock:
            if self._choice is None:
                try:
                    self._choice = self._read_or_measure()
                except (OSError, TreeError) as failure:
                    logger.warning("the ways of copying trees cannot be compared: {}", failure)
            return self._choice

    def _read_or_measure(self) -> CloneChoice:
        path, where = self._images / NAME, file_systems(self._images, self._containers)
        try:
            kept = msgspec.json.decode(path.read_bytes(), type=Kept)
            if kept.where == where:
                return kept.choice
        except (FileNotFoundError, msgspec.MsgspecError, RecursionError):
            kept = None
        choice = self._platform.measure_clone(self._images, self._containers)
        replace_file(
            path, msgspec.json.format(msgspec.json.encode(Kept(where=where, choice=choice)), indent=1)
        )
        logger.info("trees are copied by {}", choice.method)
        return choice


def file_systems(*folders: Path) -> str:
    """Equal while the folders are on the same file systems, of the same block sizes, under the same kernel."""
    found = [os.statvfs(folder) for folder in folders]
    same = "same" if len({os.stat(folder).st_dev for folder in folders}) == 1 else "apart"
    parts = [f"{one.f_fsid:x}/{one.f_bsize}" for one in found]
    return " ".join([*parts, same, os.uname().release])
