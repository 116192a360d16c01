"""What a container is told of its volumes: `SANDFLEET_VOLUME_<NAME>`, the path at which it finds each. Pure."""

import re
from collections.abc import Iterable

from worker.platform.base import VolumeMount

PREFIX = "SANDFLEET_VOLUME_"
_OTHER = re.compile(r"[^A-Z0-9]")


def volume_variables(volumes: Iterable[VolumeMount], *, rooted: bool) -> dict[str, str]:
    """In the order of the spec. A named volume is called by its name, another by the last part of its target, with
    `_` for all but letters and digits; whoever comes second with a name gets `_2`.

    With a root of its own the container finds a volume at its target, else at the folder itself: an absolute target
    means the host's there.
    """
    found: dict[str, str] = {}
    for volume in volumes:
        name = PREFIX + _OTHER.sub("_", (volume.name or volume.target.rpartition("/")[2]).upper())
        variable, count = name, 1
        while variable in found:
            count += 1
            variable = f"{name}_{count}"
        found[variable] = volume.target if rooted else volume.source
    return found
