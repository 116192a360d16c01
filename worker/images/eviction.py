"""Which images go: by age, and until the store is small enough. Pure.

Images share layers and trees, so what the end of one sets free depends on what else has gone.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta

import msgspec


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """An image with all that it reaches, each with its bytes. `used`: a container or a pull needs it."""

    digest: str
    blobs: Mapping[str, int] = {}
    trees: Mapping[str, int] = {}
    last_used: datetime
    used: bool = False

    @property
    def parts(self) -> Mapping[str, int]:
        return {**self.blobs, **self.trees}


def total_bytes(images: Iterable[Held]) -> int:
    """What images take up together."""
    return sum({part: size for image in images for part, size in image.parts.items()}.values())


def choose(
    images: Sequence[Held],
    *,
    now: datetime,
    older_than_s: float | None = None,
    keep_bytes: int | None = None,
) -> list[str]:
    """The images to delete, least recently used first; never one that is used.

    Those that were not used for `older_than_s`; with `keep_bytes` no more of them than needed to get down to that.
    With neither, none.
    """
    if older_than_s is None and keep_bytes is None:
        return []
    until = None if older_than_s is None else now - timedelta(seconds=older_than_s)
    sizes = {part: size for image in images for part, size in image.parts.items()}
    owners = Counter(part for image in images for part in image.parts)
    left = total_bytes(images)
    chosen = []
    for image in sorted(images, key=lambda one: (one.last_used, one.digest)):
        if keep_bytes is not None and left <= keep_bytes:
            break
        if image.used or (until is not None and image.last_used > until):
            continue
        chosen.append(image.digest)
        for part in image.parts:
            owners[part] -= 1
            if owners[part] == 0:
                left -= sizes[part]
    return chosen
