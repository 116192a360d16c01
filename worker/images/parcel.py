"""An opened image as what a push sends."""

from .archive_write import SavedBlob, SavedImage
from .model import MANIFEST_TYPE
from .push import Parcel
from .registry.upload import Outgoing


def parcel_of(image: SavedImage, mount_from: str | None = None) -> Parcel:
    return Parcel(
        media_type=image.media_type or MANIFEST_TYPE,
        manifest=_outgoing(image.manifest),
        blobs=tuple(_outgoing(blob) for blob in (image.config, *image.layers)),
        mount_from=mount_from,
    )


def _outgoing(blob: SavedBlob) -> Outgoing:
    return Outgoing(digest=blob.digest, size=blob.size, content=blob.content)
