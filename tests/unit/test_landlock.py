"""Landlock's numbers by ABI, and rulesets built on the kernel's real interface (never enforced here)."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.platform.linux import landlock, libc
from worker.platform.linux.landlock import FS_RIGHTS, LETTERS, access_mask, handled_fs

ABI = landlock.abi()
needs_landlock = pytest.mark.skipif(ABI == 0, reason="this kernel has no Landlock")

# linux/landlock.h: LANDLOCK_ACCESS_FS_*
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15


@pytest.mark.parametrize(
    ("version", "rights"),
    [(1, 0x1FFF), (2, 0x3FFF), (3, 0x7FFF), (4, 0x7FFF), (5, 0xFFFF), (6, 0xFFFF), (9, 0xFFFF)],
)
def test_every_right_of_an_abi_is_handled(version: int, rights: int) -> None:
    assert handled_fs(version) == rights


def test_masks() -> None:
    assert access_mask("r", 6, directory=True) == READ_FILE | READ_DIR
    assert access_mask("rx", 6, directory=False) == READ_FILE | EXECUTE
    assert access_mask("rw", 6, directory=False) == READ_FILE | WRITE_FILE | TRUNCATE
    assert access_mask("rw", 2, directory=False) == READ_FILE | WRITE_FILE
    assert access_mask("w", 2, directory=True) & REFER
    assert not access_mask("w", 1, directory=True) & REFER
    assert access_mask("rwi", 5, directory=False) & IOCTL_DEV
    assert access_mask("rwi", 4, directory=False) == READ_FILE | WRITE_FILE | TRUNCATE


def test_nothing_grants_the_making_of_devices() -> None:
    granted = {right for rights in LETTERS.values() for right in rights}
    assert granted == FS_RIGHTS.keys() - {"make_char", "make_block"}


@pytest.fixture
def rulesets() -> Iterator[list[int]]:
    made: list[int] = []
    yield made
    for fd in made:
        os.close(fd)


@needs_landlock
@pytest.mark.parametrize("version", range(1, ABI + 1))
def test_the_kernel_takes_the_rules_of_every_abi_up_to_its_own(
    version: int, tmp_path: Path, rulesets: list[int]
) -> None:
    (tmp_path / "file").touch()
    files = landlock.file_rules(version)
    rulesets.append(files)
    assert not os.get_inheritable(files)
    system = [("/usr", "rx"), ("/dev/null", "rwi"), ("/no/such/place", "r")]
    landlock.allow_paths(files, system, version, missing_ok=True)
    landlock.allow_paths(files, [(str(tmp_path), "rwxs"), (str(tmp_path / "file"), "rwx")], version)
    if version >= 4:
        rulesets.append(landlock.port_rules("bc", [(80, "bc"), (443, "c")]))


@needs_landlock
def test_a_path_that_is_missing_is_named(tmp_path: Path, rulesets: list[int]) -> None:
    rulesets.append(landlock.file_rules(ABI))
    with pytest.raises(FileNotFoundError) as caught:
        landlock.allow_paths(rulesets[0], [(f"{tmp_path}/none", "r")], ABI)
    assert caught.value.filename == f"{tmp_path}/none"


@needs_landlock
def test_no_descriptor_is_left_open_by_a_failure(tmp_path: Path, rulesets: list[int]) -> None:
    rulesets.append(landlock.file_rules(ABI))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        landlock.allow_paths(rulesets[0], [("/usr", "r"), (f"{tmp_path}/none", "r")], ABI)
    if ABI >= 4:
        with pytest.raises(OSError, match="Invalid argument"):
            landlock.port_rules("b", [(80, "c")])
    assert len(os.listdir("/proc/self/fd")) == before


def _openat2_missing(number: int, *args: object) -> int:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.mark.parametrize("kernel", ["with openat2", "without openat2"])
def test_a_plain_path_is_opened_and_a_link_anywhere_in_it_is_not(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "without openat2":
        monkeypatch.setattr(landlock, "syscall", _openat2_missing)
    real = Path(os.path.realpath(tmp_path))
    (real / "a" / "b").mkdir(parents=True)
    (real / "a" / "file").touch()
    (real / "link").symlink_to("a")
    (real / "a" / "last").symlink_to("b")
    before = set(os.listdir("/proc/self/fd"))
    for good in ("a", "a/b", "a/file", "a//b/"):
        fd = landlock.open_plain(f"{real}/{good}")
        assert os.path.samestat(os.fstat(fd), os.stat(real / good))
        os.close(fd)
    for bad in ("link/b", "a/last", "link"):
        with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
            landlock.open_plain(f"{real}/{bad}")
    with pytest.raises(FileNotFoundError):
        landlock.open_plain(f"{real}/none")
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_walk_takes_no_step_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "syscall", _openat2_missing)
    with pytest.raises(OSError, match=r"no \.\."):
        landlock.open_plain(f"{os.path.realpath(tmp_path)}/..")


@pytest.mark.parametrize(("number", "version"), [(errno.ENOSYS, 0), (errno.EOPNOTSUPP, 0)])
def test_a_kernel_without_landlock(monkeypatch: pytest.MonkeyPatch, number: int, version: int) -> None:
    def refuse(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(landlock, "syscall", refuse)
    assert landlock.abi() == version


def test_a_raw_call_that_fails_is_an_os_error() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        libc.prctl(-1)
