"""Which processes a container has, where no parent keeps them together. Standard library only; pure.

macOS gives orphans to launchd and knows neither subreapers nor control groups. Four things tell whose a
process is: its parent, its session, the unique id of its first parent (which stays when it is adopted), and
the marker that its sandbox lets it read. The marker alone is exact; the others cost less, and find what
stands between a fork and its sandbox.
"""

from collections.abc import Callable, Collection, Iterable

from .libproc import Entry


def belonging(
    entries: Iterable[Entry],
    *,
    top: Entry | None,
    is_ours: Callable[[Entry], bool],
    lineage: Collection[int] = (),
    spare: Collection[int] = (),
) -> list[Entry]:
    """The processes below `top`, without itself, and without the pids `spare` and what is below these.

    `lineage` are unique ids that once belonged: whom they started belongs too. `is_ours` is asked only for
    processes that descent does not show.
    """
    known = list(entries)
    families = _Families(known)
    spared = families.reached([entry for entry in known if entry.pid in spare]) if spare else set()
    if top is not None:
        spared.add(top.unique)
    begin = [entry for entry in known if entry.unique in lineage or entry.parent_unique in lineage]
    if top is not None:
        begin += families.of(top)
    members = families.reached(begin)
    seen = members | spared
    others = [entry for entry in known if entry.unique not in seen]
    members |= families.reached([entry for entry in others if is_ours(entry)])
    members -= spared
    return [entry for entry in known if entry.unique in members]


class _Families:
    def __init__(self, entries: list[Entry]) -> None:
        self._by_ppid: dict[int, list[Entry]] = {}
        self._by_parent: dict[int, list[Entry]] = {}
        for entry in entries:
            self._by_ppid.setdefault(entry.ppid, []).append(entry)
            self._by_parent.setdefault(entry.parent_unique, []).append(entry)

    def of(self, entry: Entry) -> list[Entry]:
        """Its children, whoever is their parent now."""
        return self._by_ppid.get(entry.pid, []) + self._by_parent.get(entry.unique, [])

    def reached(self, begin: list[Entry]) -> set[int]:
        """The unique ids of these and of all below them."""
        seen = {entry.unique for entry in begin}
        waiting = list(begin)
        while waiting:
            for child in self.of(waiting.pop()):
                if child.unique not in seen:
                    seen.add(child.unique)
                    waiting.append(child)
        return seen
