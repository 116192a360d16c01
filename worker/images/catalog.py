"""The names of a store's images, and what is known of each."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import msgspec

from schemas.queries import ImageEntry, ImageReply
from worker.clock import Clock
from worker.errors import Internal, NotFound

from .collect import closure
from .layout import Layout
from .model import (
    CREATED,
    FROM_INDEX,
    NATIVE,
    PULLED,
    REF_NAME,
    Descriptor,
    ImageConfig,
    ImageInfo,
    Index,
)
from .reference import DIGEST, Reference, parse_reference

_NEVER = datetime(1970, 1, 1, tzinfo=UTC)


class Catalog:
    """Everything here reads small files only, and may be called anywhere."""

    def __init__(self, layout: Layout, clock: Clock) -> None:
        self._layout = layout
        self._clock = clock
        # The image of each container that is there, by its digest.
        self._containers: dict[str, str] = {}

    @property
    def layout(self) -> Layout:
        return self._layout

    def resolve(self, name: str) -> ImageInfo:
        """The image of this name, of `name@digest`, or of a bare digest; NotFound."""
        found = self._find(self._layout.read_index(), name)
        if found is None:
            raise NotFound(f"no image {name} on this node", field="image")
        return self.info(found)

    def list(self) -> list[ImageEntry]:
        """Every name, sorted, with how many containers were made from it. One that is damaged has no bytes."""
        containers = Counter(self._containers.copy().values())
        entries = sorted(natives(self._layout.read_index()), key=lambda entry: entry.marks[REF_NAME])
        return [self._entry(entry, containers[entry.digest]) for entry in entries]

    def _entry(self, entry: Descriptor, containers: int) -> ImageEntry:
        size, used = 0, None
        with suppress(NotFound, Internal):  # `verify` tells what is wrong with it
            used = self._layout.last_used(entry.digest)
            size = self._layout.tree_of(entry.digest).bytes
        return ImageEntry(
            name=entry.marks[REF_NAME],
            digest=entry.digest,
            bytes=size,
            created_at=_created(entry),
            containers=containers,
            last_used_at=used,
        )

    def describe(self, name: str) -> ImageReply:
        """Everything about an image. NotFound."""
        index = self._layout.read_index()
        found = self._find(index, name)
        if found is None:
            raise NotFound(f"no image {name} on this node", field="image")
        document = self._layout.config(self._layout.manifest(found.digest).config.digest)
        names = [entry.marks[REF_NAME] for entry in natives(index) if entry.digest == found.digest]
        containers = sorted(cid for cid, digest in self._containers.copy().items() if digest == found.digest)
        info = self.info(found)
        return ImageReply(
            name=info.name,
            digest=info.digest,
            names=sorted(names),
            bytes=info.bytes,
            created_at=info.created_at,
            last_used_at=self._layout.last_used(found.digest),
            containers=containers,
            registered=NATIVE in found.marks,
            os=document.os,
            architecture=document.architecture,
            config=msgspec.structs.asdict(document.config or ImageConfig()),
        )

    def config(self, digest: str) -> ImageConfig:
        """What the image says about how to run it; NotFound for an unknown digest."""
        manifest = self._layout.manifest(digest)
        return self._layout.config(manifest.config.digest).config or ImageConfig()

    def _find(self, index: Index, name: str) -> Descriptor | None:
        by_digest = DIGEST.fullmatch(name) is not None
        wanted = None if by_digest else parse_reference(name)
        for entry in natives(index):
            if wanted is None:
                if entry.digest == name:
                    return entry
            elif _answers(entry, wanted):
                return entry
        return None

    def info(self, entry: Descriptor) -> ImageInfo:
        return ImageInfo(
            name=entry.marks[REF_NAME],
            digest=entry.digest,
            bytes=self._layout.tree_of(entry.digest).bytes,
            created_at=_created(entry),
        )

    def find(self, name: str) -> Descriptor | None:
        """The entry of a name, if its tree is there to be cloned. What was registered no registry can replace."""
        found = self._find(self._layout.read_index(), name)
        if found is None or NATIVE in found.marks:
            return found
        try:
            tree = self._layout.tree_of(found.digest)
        except (NotFound, Internal):
            return None  # its manifest or its config is damaged
        return found if self._layout.tree_path(tree.digest).is_dir() else None

    def is_whole(self, found: Descriptor) -> bool:
        """Whether all blobs are there, too: a damaged one was thrown away, which no clone misses."""
        blobs = closure(self._layout, found.digest, found.media_type) - {
            self._layout.tree_of(found.digest).digest
        }
        return all(self._layout.blob_path(digest).exists() for digest in blobs)

    def give_name(self, name: str, target: Descriptor) -> ImageInfo:
        """Let a name stand for an image that is here, tree and all. Under the lock of the layout."""
        index = self._layout.read_index()
        key = parse_reference(name).key
        others, created = [], self._clock()
        for raw, entry in entries(index):
            if entry is None or _reference(entry).key != key:
                others.append(raw)
            elif entry.digest == target.digest:
                created = _created(entry)
        entry = Descriptor(
            media_type=target.media_type,
            digest=target.digest,
            size=target.size,
            annotations={**target.marks, REF_NAME: name, CREATED: created.isoformat()},
        )
        self._layout.write_index(Index(manifests=[*others, msgspec.to_builtins(entry)]))
        self._layout.touch(entry.digest)
        return self.info(entry)


def entries(index: Index) -> Iterator[tuple[dict[str, Any], Descriptor | None]]:
    """Every entry as it stands, and as ours where it is."""
    for raw in index.manifests:
        try:
            entry = msgspec.convert(raw, Descriptor)
        except msgspec.ValidationError:
            yield raw, None
            continue
        ours = NATIVE in entry.marks or PULLED in entry.marks
        named = ours and REF_NAME in entry.marks
        yield raw, entry if named and DIGEST.fullmatch(entry.digest) else None


def natives(index: Index) -> list[Descriptor]:
    return [entry for _, entry in entries(index) if entry is not None]


def _reference(entry: Descriptor) -> Reference:
    return parse_reference(entry.marks[REF_NAME])


def _answers(entry: Descriptor, wanted: Reference) -> bool:
    """A digest may be the manifest's or that of the index which it was chosen from."""
    known = _reference(entry)
    if wanted.digest is not None:
        digests = (entry.digest, entry.marks.get(FROM_INDEX))
        return wanted.digest in digests and wanted.repository == known.repository
    return wanted.key == known.key


def _created(entry: Descriptor) -> datetime:
    try:
        return datetime.fromisoformat(entry.marks.get(CREATED, ""))
    except ValueError:
        return _NEVER
