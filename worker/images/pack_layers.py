"""Into which layers the entries of an image go. Pure.

Layers are fetched side by side, and a layer that did not change is not sent again. So a large tree is cut where
its names say: after enough bytes, before an entry whose name has a certain hash. A file that grows moves the
cuts behind it only up to the next such name. What is small is one layer.
"""

import hashlib
import os
from collections.abc import Sequence

from .pack_scan import Found
from .pack_tar import DIRECTORY, FILE, HARD_LINK

LEAST_BYTES = 32 << 20
# As many as docker's own stores can stack is 127; an eighth of the names are cuts.
MOST_LAYERS = 64
_CUTS = 8
_MOST = 8


def split(entries: Sequence[Found], total: int, least: int = LEAST_BYTES) -> list[list[Found]]:
    """The entries of each layer, in their order; at least one layer.

    A layer repeats the directories above its entries, as without them whoever stacks layers would make up
    their modes. All names of one file are in one layer.
    """
    while total > least * MOST_LAYERS:
        least *= 2
    layers: list[list[Found]] = [[]]
    place: dict[str, int] = {}
    directories: dict[str, Found] = {}
    known: list[set[str]] = [set()]
    size = 0
    for entry in entries:
        if entry.kind == DIRECTORY:
            directories[entry.path] = entry
        if size >= least and (size >= least * _MOST or _is_cut(entry.path)):
            layers.append([])
            known.append(set())
            size = 0
        target = place[entry.link] if entry.kind == HARD_LINK else len(layers) - 1
        _add_above(entry.path, layers[target], known[target], directories)
        if entry.kind == DIRECTORY:
            known[target].add(entry.path)
        layers[target].append(entry)
        if entry.kind == FILE:
            place[entry.path] = target
        size += entry.size
    return layers


def _add_above(path: str, layer: list[Found], known: set[str], directories: dict[str, Found]) -> None:
    missing = []
    parent = path.rpartition("/")[0]
    while parent and parent not in known:
        missing.append(directories[parent])
        known.add(parent)
        parent = parent.rpartition("/")[0]
    layer += reversed(missing)


def _is_cut(path: str) -> bool:
    return hashlib.blake2b(os.fsencode(path), digest_size=1).digest()[0] % _CUTS == 0
