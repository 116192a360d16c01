"""The name of what a pile of layers unpacks to."""

import hashlib
from typing import Any

from worker.errors import Internal

from .reference import DIGEST


def chain_id(rootfs: dict[str, Any]) -> str:
    """The ChainID of all layers (image-spec, config.md), from the `rootfs` of an image's config.

    Equal for equal piles, whatever else the images say and however their layers are compressed. Raises
    Internal when there is none.
    """
    diff_ids = rootfs.get("diff_ids")
    if not isinstance(diff_ids, list) or not diff_ids:
        raise Internal("an image's config names no layers")
    chain = ""
    for diff_id in diff_ids:
        if not isinstance(diff_id, str) or DIGEST.fullmatch(diff_id) is None:
            raise Internal(f"an image's config has {str(diff_id)[:100]!r} for a layer's digest")
        text = f"{chain} {diff_id}" if chain else diff_id
        chain = f"sha256:{hashlib.sha256(text.encode('ascii')).hexdigest()}" if chain else diff_id
    return chain
