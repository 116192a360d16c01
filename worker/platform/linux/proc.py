"""Process trees from /proc: which processes a container has, and what they use together. Source: proc(5).

Memory is what would be freed if the tree ended and was never in a file: anonymous pages, shared memory, swap.
A page that several of its processes have is counted once where that can matter, as the kernel's proportional
figures do; those walk every page and cost a millisecond and more, so they are asked for only where processes
share: after a fork without exec, or with shared memory.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from worker.platform.base import TreeSample

_TICK_USEC = 1_000_000 // os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
# So many trees are looked up one by one; for more, one scan of all processes is cheaper.
_MAX_WALKS = 64
_GONE = (FileNotFoundError, ProcessLookupError)
_BOUND_FIELDS = (b"RssAnon", b"RssShmem", b"VmSwap", b"HugetlbPages")
_EXACT_FIELDS = (b"Pss_Anon", b"Pss_Shmem", b"SwapPss", b"Private_Hugetlb", b"Shared_Hugetlb")


class ProcessStat(NamedTuple):
    """What /proc/<pid>/stat tells. Times are clock ticks; `image` is equal only after a fork without exec."""

    pid: int
    parent: int
    state: bytes
    own_ticks: int
    reaped_ticks: int
    threads: int
    start: int
    resident_bytes: int
    image: tuple[bytes, bytes]

    @property
    def alive(self) -> bool:
        """A leader that has ended while other threads go on is shown as a zombie too."""
        return self.state not in (b"Z", b"X") or self.threads > 1


class LinuxProcessTable:
    """One look at the machine's processes; what was read once is not read again."""

    def __init__(self) -> None:
        self._stats: dict[int, ProcessStat | None] = {}
        self._children: dict[int, list[int]] | None = None
        self._swap_used: bool | None = None
        self._walks = 0 if os.path.exists(f"/proc/self/task/{os.getpid()}/children") else _MAX_WALKS

    def tree(self, root_pid: int, marker: str = "") -> TreeSample | None:
        root, members = self._find(root_pid)
        if root is None:
            return None
        living = [member for member in members if member.alive]
        io = [_io(member.pid) for member in living]
        known = [one for one in io if one is not None]
        files = [_open_files(member.pid) for member in living]
        return TreeSample(
            # What the shim has reaped was of this tree too.
            cpu_usec=(root.reaped_ticks + sum(m.own_ticks + m.reaped_ticks for m in members)) * _TICK_USEC,
            memory_bytes=_memory(living, limit=None),
            processes=len(living),
            threads=sum(member.threads for member in living),
            open_files=None if None in files else sum(count for count in files if count is not None),
            read_bytes=sum(read for read, _ in known) if len(known) == len(io) else None,
            write_bytes=sum(write for _, write in known) if len(known) == len(io) else None,
        )

    def memory(self, root_pid: int, limit: int | None = None, marker: str = "") -> int | None:
        root, members = self._find(root_pid)
        if root is None:
            return None
        living = [member for member in members if member.alive]
        # Everything resident, files too: read already, and mostly far below the limit.
        resident = sum(member.resident_bytes for member in living)
        if limit is not None and resident <= limit and not self._swaps():
            return resident
        return _memory(living, limit)

    def members(self, root_pid: int, marker: str = "") -> tuple[int, ...]:
        return tuple(member.pid for member in self._find(root_pid)[1] if member.alive)

    def alive(self, pid: int, start_time: int) -> bool:
        stat = self._stat(pid)
        return stat is not None and stat.alive and stat.start == start_time

    def _find(self, root_pid: int) -> tuple[ProcessStat | None, list[ProcessStat]]:
        """The root and everything below it, dead but not yet reaped ones included."""
        if self._children is None:
            self._walks += 1
            if self._walks > _MAX_WALKS:
                self._scan()
        root = self._stat(root_pid)
        if root is None or not root.alive:
            return None, []
        members: list[ProcessStat] = []
        waiting = list(self._children_of(root))
        while waiting:
            stat = self._stat(waiting.pop())
            if stat is not None:
                if stat.parent != root_pid or not _is_init(stat.pid):
                    members.append(stat)
                waiting += self._children_of(stat)
        return root, members

    def _swaps(self) -> bool:
        """Whether any memory of the machine is swapped out."""
        if self._swap_used is None:
            raw = _read("/proc/meminfo")
            self._swap_used = _number(raw, b"\nSwapTotal:") > _number(raw, b"\nSwapFree:")
        return self._swap_used

    def _scan(self) -> None:
        self._stats = {pid: _read_stat(pid) for pid in _pids()}
        self._children = {}
        for stat in self._stats.values():
            if stat is not None:
                self._children.setdefault(stat.parent, []).append(stat.pid)

    def _stat(self, pid: int) -> ProcessStat | None:
        if pid not in self._stats and self._children is None:
            self._stats[pid] = _read_stat(pid)
        return self._stats.get(pid)

    def _children_of(self, stat: ProcessStat) -> Iterable[int]:
        if self._children is not None:
            return self._children.get(stat.pid, ())
        if not stat.alive:
            return ()
        threads = [stat.pid] if stat.threads == 1 else _threads(stat.pid)
        listed = (_read(f"/proc/{stat.pid}/task/{thread}/children", whole=True) for thread in threads)
        return [int(pid) for raw in listed if raw for pid in raw.split()]


def allocated_bytes() -> int | None:
    """All memory that the kernel has handed out since boot; None where it does not count.

    Every page that makes a process grow is handed out first (only pages of the huge-page pool are not), so a
    tree cannot have grown by more than this did.
    """
    raw = _read("/proc/vmstat", whole=True)
    pages = [int(line.split()[1]) for line in (raw or b"").splitlines() if line.startswith(b"pgalloc_")]
    return sum(pages) * _PAGE if pages else None


def _memory(members: list[ProcessStat], limit: int | None) -> int:
    bounds = {member.pid: _bound(member.pid) for member in members}
    total = sum(sum(parts) for parts in bounds.values())
    if limit is not None and total <= limit:
        return total
    images = [member.image for member in members]
    for member in members:
        anonymous, shared, *_ = bounds[member.pid]
        if (anonymous and images.count(member.image) > 1) or (shared and len(members) > 1):
            exact = _proportional(member.pid)
            if exact is not None:
                total += exact - sum(bounds[member.pid])
    return total


def _bound(pid: int) -> tuple[int, ...]:
    """Bytes of `_BOUND_FIELDS`. Readable for every process."""
    return _kilobytes(_read(f"/proc/{pid}/status"), _BOUND_FIELDS)


def _proportional(pid: int) -> int | None:
    """None where this user may not look: a program that hid its memory from others."""
    try:
        raw = _read(f"/proc/{pid}/smaps_rollup")
    except PermissionError:
        return None
    return sum(_kilobytes(raw, _EXACT_FIELDS)) if raw else None


def _kilobytes(raw: bytes | None, names: tuple[bytes, ...]) -> tuple[int, ...]:
    """Bytes for each name that stands at the beginning of a line; 0 for one that is not there."""
    return tuple(_number(raw, b"\n" + name + b":") * 1024 for name in names)


def _is_init(pid: int) -> bool:
    """Whether this child of a shim is ours too: number 1 of a process namespace, which no program can make."""
    raw = _read(f"/proc/{pid}/status") or b""
    at = raw.find(b"\nNSpid:")
    return at >= 0 and raw[at + 7 : raw.index(b"\n", at + 1)].split()[1:] == [b"1"]


def _number(raw: bytes | None, label: bytes) -> int:
    """The number behind a label. The same few lines are looked for thousands of times: no line is split."""
    at = -1 if raw is None else raw.find(label)
    if raw is None or at < 0:
        return 0
    return int(raw[at + len(label) : raw.index(b"\n", at + 1)].split()[0])


def _io(pid: int) -> tuple[int, int] | None:
    """(read, written) bytes of storage; (0, 0) for a process that is gone, None where it may not be seen."""
    try:
        raw = _read(f"/proc/{pid}/io")
    except PermissionError:
        return None
    return _number(raw, b"\nread_bytes:"), _number(raw, b"\nwrite_bytes:")


def _open_files(pid: int) -> int | None:
    folder = f"/proc/{pid}/fd"
    try:
        # Since Linux 6.2 the folder's size is the number of its entries; before, it is 0.
        return os.stat(folder).st_size or len(os.listdir(folder))
    except PermissionError:
        return None
    except _GONE:
        return 0


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _threads(pid: int) -> list[int]:
    with contextlib.suppress(*_GONE):
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    return []


def _read_stat(pid: int) -> ProcessStat | None:
    raw = _read(f"/proc/{pid}/stat")
    if not raw:
        return None
    # The name in brackets may hold anything; what follows the last one cannot.
    fields = raw[raw.rindex(b")") + 2 :].split()
    return ProcessStat(
        pid=pid,
        parent=int(fields[1]),
        state=fields[0],
        own_ticks=int(fields[11]) + int(fields[12]),
        reaped_ticks=int(fields[13]) + int(fields[14]),
        threads=int(fields[17]),
        start=int(fields[19]),
        resident_bytes=int(fields[21]) * _PAGE,
        image=(fields[23], fields[25]),
    )


def _read(path: str, *, whole: bool = False) -> bytes | None:
    """A /proc file; None when its process is gone. `whole`: one made of many records, which come in parts."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except _GONE:
        return None
    try:
        data = os.read(fd, 65536)
        while whole and (more := os.read(fd, 65536)):
            data += more
        return data
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)
