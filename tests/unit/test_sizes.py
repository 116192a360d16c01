"""Folders that the file system holds to a size: numbers and layouts beside the kernel's headers, and project quotas by
a stand-in for the kernel. (test_volume_sizes does it for real, with subvolumes.)
"""

import ctypes
import errno
import fcntl
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from worker.platform.linux import sizes

HEADERS = """
#include <stddef.h>
#include <stdio.h>
#include <linux/btrfs.h>
#include <linux/fs.h>
#include <linux/quota.h>
int main(void) {
  printf("%lu %lu %lu %lu ", BTRFS_IOC_SUBVOL_CREATE, BTRFS_IOC_QGROUP_LIMIT, FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR);
  printf("%u %u ", QCMD(Q_GETQUOTA, PRJQUOTA), QCMD(Q_SETQUOTA, PRJQUOTA));
  printf("%d %d %d ", BTRFS_QGROUP_LIMIT_MAX_RFER, FS_XFLAG_PROJINHERIT, QIF_BLIMITS);
  printf("%zu %zu ", sizeof(struct fsxattr), sizeof(struct if_dqblk));
  printf("%zu %zu\\n", offsetof(struct fsxattr, fsx_projid), offsetof(struct if_dqblk, dqb_valid));
}
"""


@pytest.fixture
def headers(tmp_path: Path) -> list[int]:
    compiler = shutil.which("cc")
    if compiler is None or not all(
        Path(f"/usr/include/linux/{n}.h").exists() for n in ("btrfs", "fs", "quota")
    ):
        pytest.skip("no C compiler, or no headers of the kernel")
    (tmp_path / "h.c").write_text(HEADERS)
    subprocess.run([compiler, "-o", str(tmp_path / "h"), str(tmp_path / "h.c")], check=True)
    return [int(word) for word in subprocess.check_output([str(tmp_path / "h")]).split()]


def test_numbers_and_layouts(headers: list[int]) -> None:
    ours = [sizes._SUBVOL_CREATE, sizes._QGROUP_LIMIT, sizes._GET_ATTRIBUTES, sizes._SET_ATTRIBUTES]
    ours += [sizes._GET_QUOTA, sizes._SET_QUOTA]
    ours += [sizes._MAX_REFERENCED, sizes._INHERIT_PROJECT, sizes._SPACE_LIMIT]
    ours += [sizes._ATTRIBUTES.size, sizes._QUOTA.size, 3 * 4, 8 * 8]
    assert ours == headers


class Kernel:
    """Project quotas of one file system. `refuses` is the errno that a limit is refused with."""

    def __init__(self, taken: set[int], refuses: int = 0) -> None:
        self.taken = taken
        self.refuses = refuses
        self.limits: dict[int, int] = {}
        self.projects: list[tuple[int, int]] = []

    def ioctl(self, fd: int, request: int, argument: bytes) -> bytes:
        if request == sizes._GET_ATTRIBUTES:
            return struct.pack("=5I8s", 0x40, 0, 0, 0, 0, b"")
        if request != sizes._SET_ATTRIBUTES:
            raise OSError(errno.ENOTTY, "not of this file system")
        flags, _, _, project, _, _ = struct.unpack("=5I8s", argument)
        self.projects.append((flags, project))
        return argument

    def syscall(self, number: int, fd: int, command: int, project: int, data: Any) -> int:
        assert number == 443
        if command == sizes._SET_QUOTA:
            if self.refuses:
                raise OSError(self.refuses, os.strerror(self.refuses))
            hard, soft, *_, valid = struct.unpack("=8QI4x", data.raw)
            assert hard == soft
            assert valid == 1
            self.limits[project] = hard
        elif project in self.taken:
            ctypes.memmove(data, struct.pack("=8QI4x", 0, 0, 4096, 0, 0, 1, 0, 0, 0), 72)
        elif not self.taken:
            raise OSError(errno.ENOENT, "nothing is known of it")
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel({1 << 30})
    monkeypatch.setattr(fcntl, "ioctl", lambda *args: made.ioctl(*args))
    monkeypatch.setattr(sizes, "syscall", lambda *args: made.syscall(*args))
    return made


@pytest.mark.parametrize("taken", [set[int](), {1 << 30}], ids=["xfs says ENOENT", "ext4 says zero"])
def test_a_folder_gets_a_project_that_is_free(
    tmp_path: Path, kernel: Kernel, taken: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.taken = taken
    numbers = iter([1 << 30, (1 << 30) + 5])
    monkeypatch.setattr(random, "randint", lambda low, high: next(numbers))
    sizes.Projects().make(tmp_path / "one", 1025, 0o750)
    project = (1 << 30) + 5 if taken else 1 << 30
    assert kernel.limits == {project: 2}
    assert kernel.projects == [(0x240, project)]
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o750


def test_nothing_is_left_of_one_that_cannot_be_held(tmp_path: Path, kernel: Kernel) -> None:
    kernel.refuses = errno.ESRCH  # quotas are off
    with pytest.raises(ProcessLookupError):
        sizes.Projects().make(tmp_path / "one", 1 << 20, 0o700)
    assert list(tmp_path.iterdir()) == []
    assert sizes.find_limits(tmp_path / "tried") is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_said_to_be_held_and_is_not(tmp_path: Path, kernel: Kernel) -> None:
    """Quotas that are counted and not enforced: all calls work, and so does writing too much."""
    assert sizes.find_limits(tmp_path / "tried") is None
    assert len(kernel.limits) == 1
    assert list(tmp_path.iterdir()) == []
