"""What keeps the image store small and sound: evicting after it grew, pruning, verifying and repairing."""

from typing import Any

from loguru import logger

from schemas.commands import PruneImages, VerifyImages
from schemas.errors import ContractError
from schemas.events import ImageAction
from schemas.spec import PullPolicy
from worker.images.keeping import Pruned
from worker.images.model import SECRET, ImageInfo
from worker.images.verify import Damage
from worker.journal import Tx
from worker.services import Services
from worker.work import Work, write_image

# An event has room for so many, each at most of half a KiB.
MAX_TOLD = 64
MAX_REASON = 200


async def evict(services: Services, work: Work | None = None, *, spare: str | None = None) -> None:
    """Keep to `images.max_bytes`; `spare` is the digest of what was just taken in."""
    try:
        pruned = await services.images.evict(spare=spare)
    except (ContractError, OSError) as failure:
        # Nobody waits for this: it is tried again.
        logger.error("images.max_bytes is not kept to: {}", failure)
        return
    if pruned.images:
        logger.info("{} images went, to keep to images.max_bytes", len(pruned.images))
        await services.journal.transact(lambda tx: write_pruned(tx, services, work, pruned))


async def prune(services: Services, command: PruneImages) -> tuple[dict[str, Any], Pruned]:
    """The command's result, and what is to be told beside it."""
    pruned = await services.images.prune(older_than_s=command.older_than_s, keep_bytes=command.keep_bytes)
    partial_bytes = await services.puller.drop_partial()
    return {"removed": len(pruned.images), "bytes": pruned.bytes + partial_bytes}, pruned


def write_pruned(tx: Tx, services: Services, work: Work | None, pruned: Pruned) -> None:
    for image in pruned.images:
        write_image(tx, services.subjects, work, image, ImageAction.PRUNED)


async def verify(services: Services, command: VerifyImages, work: Work) -> dict[str, Any]:
    """The command's result. What cannot be repaired does not fail it: it is told beside what is damaged."""
    found = await services.images.verify(command.image)
    for one in found.damaged:
        logger.warning("{} of {} is damaged: it {}", one.part, one.image, one.reason)
    repairs: dict[str, str | None] = {}
    if command.repair:
        for name in dict.fromkeys(one.image for one in found.damaged):
            repairs[name] = await _repair(services, work, name, [d for d in found.damaged if d.image == name])
    told = [_told(one, repairs) for one in found.damaged[:MAX_TOLD]]
    return {
        "checked": found.checked,
        "unrecorded": found.unrecorded,
        "damaged": told,
        "more": len(found.damaged) - len(told),
    }


def _told(damage: Damage, repairs: dict[str, str | None]) -> dict[str, Any]:
    error = repairs.get(damage.image)
    return {
        "image": damage.image,
        "digest": damage.digest,
        "part": damage.part[:MAX_REASON],
        "reason": damage.reason[:MAX_REASON],
        "repaired": damage.image in repairs and error is None,
        "error": error,
    }


async def _repair(services: Services, work: Work, name: str, damaged: list[Damage]) -> str | None:
    """Pull it again; the reason why that cannot be."""
    if not all(one.dropped for one in damaged):
        return "it was made of a folder of this node: register it again"
    try:
        services.check_image(name, field="image")
        there = services.images.find(name)
        auth = None if there is None else there.marks.get(SECRET)
        pulled = await services.puller.pull(name, PullPolicy.ALWAYS, auth)
    except ContractError as failure:
        return failure.message[:MAX_REASON]
    if pulled.fetched:
        await tell_pulled(services, work, pulled.image)
    return None


async def tell_pulled(services: Services, work: Work, image: ImageInfo) -> None:
    """Of an image that a registry gave; older ones may have to go for it."""
    await services.journal.transact(
        lambda tx: write_image(tx, services.subjects, work, image, ImageAction.PULLED)
    )
    await evict(services, work, spare=image.digest)
