"""What a pass over a mirror comes to."""

import msgspec


class Outcome(msgspec.Struct, kw_only=True):
    """What a pass did. `notes` are names that are left alone, and why; `left` counts what must wait for another
    pass; `kept_both` are the names that a container's version was given beside somebody else's."""

    uploaded: int = 0
    downloaded: int = 0
    deleted_here: int = 0
    deleted_there: int = 0
    kept_both: list[str] = []
    notes: dict[str, str] = {}
    left: int = 0
