"""What becomes of one object, from what is known of both sides: a table, and nothing else. Pure.

Each side is seen against the version that both had at the last transfer. The rules behind the table:

- nothing that only one side has is ever lost: where both have changed, the container's version is kept beside the
  other, and the name goes to the bucket's;
- a change beats a deletion;
- while the container runs its folder is not touched: what the bucket has new comes with the next start.
"""

from enum import StrEnum
from types import MappingProxyType


class Side(StrEnum):
    """A side against the last version that both had. With no such version what is there is `changed`."""

    ABSENT = "absent"
    SAME = "same"
    CHANGED = "changed"


class Action(StrEnum):
    NOTHING = "nothing"
    DOWNLOAD = "download"
    UPLOAD = "upload"
    DELETE_HERE = "delete_here"
    DELETE_THERE = "delete_there"
    KEEP_BOTH = "keep_both"  # the container's version is uploaded under a name of its own
    FORGET = "forget"


_A, _S, _C = Side.ABSENT, Side.SAME, Side.CHANGED

# (here, there) → before a start, and while or after it runs.
TABLE = MappingProxyType(
    {
        (_A, _A): (Action.FORGET, Action.FORGET),
        (_A, _S): (Action.DELETE_THERE, Action.DELETE_THERE),
        (_A, _C): (Action.DOWNLOAD, Action.NOTHING),
        (_S, _A): (Action.DELETE_HERE, Action.NOTHING),
        (_S, _S): (Action.NOTHING, Action.NOTHING),
        (_S, _C): (Action.DOWNLOAD, Action.NOTHING),
        (_C, _A): (Action.UPLOAD, Action.UPLOAD),
        (_C, _S): (Action.UPLOAD, Action.UPLOAD),
        (_C, _C): (Action.KEEP_BOTH, Action.KEEP_BOTH),
    }
)
# A read-only mirror is what the bucket has, whatever was done to it.
READONLY = MappingProxyType(
    {
        (_A, _A): Action.FORGET,
        (_A, _S): Action.DOWNLOAD,
        (_A, _C): Action.DOWNLOAD,
        (_S, _A): Action.DELETE_HERE,
        (_S, _S): Action.NOTHING,
        (_S, _C): Action.DOWNLOAD,
        (_C, _A): Action.DELETE_HERE,
        (_C, _S): Action.DOWNLOAD,
        (_C, _C): Action.DOWNLOAD,
    }
)


def decide(here: Side, there: Side, *, fetching: bool, readonly: bool = False, kept: bool = False) -> Action:
    """`fetching`: before a start. `kept`: this very version of the container's stands beside the other already."""
    if readonly:
        return READONLY[here, there] if fetching else Action.NOTHING
    if kept and (here, there) == (Side.CHANGED, Side.CHANGED):
        return Action.DOWNLOAD if fetching else Action.NOTHING
    before, after = TABLE[here, there]
    return before if fetching else after
