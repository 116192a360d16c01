"""What of an image's configuration counts for a container, below what its spec says. Pure.

`entrypoint`, `cmd` and `working_dir` are `worker.entrypoint`'s, `env` is `worker.variables`'. Exposed ports open
nothing: they are the image's hint to whoever writes the spec.
"""

from schemas.decode import signal_number
from schemas.errors import ContractError
from schemas.spec import ServiceSpec
from schemas.spec_rules import MAX_LABEL_BYTES, MAX_LABELS
from schemas.values import CONTROL
from worker.errors import CreateFailed

from .model import ImageConfig

DEFAULT_STOP_SIGNAL = "SIGTERM"


def check_config(image: ImageConfig) -> None:
    """CreateFailed for what no program could be started with."""
    for index, item in enumerate(image.env or ()):
        name, equals, _ = item.partition("=")
        if not name or not equals or "\0" in item:
            raise CreateFailed(f"the image's variable {index} is none: {item[:80]!r} (its config, Env)")


def stop_signal(spec: ServiceSpec, image: ImageConfig) -> int:
    """The spec's, else the image's, else SIGTERM. CreateFailed for an image's that this system has not."""
    if spec.stop_signal is not None or not image.stop_signal:
        return signal_number(spec.stop_signal or DEFAULT_STOP_SIGNAL)
    try:
        return signal_number(image.stop_signal)
    except ContractError:
        raise CreateFailed(
            f"the image's stop signal {image.stop_signal[:40]!r} is none of this system;"
            " spec.stop_signal would come before it"
        ) from None


def labels(spec: ServiceSpec, image: ImageConfig) -> dict[str, str]:
    """The spec's, and below them the image's, sorted, as far as there is room.

    A status has room for 64 labels and 8 KiB. What an image has beyond it, or what is no label, is left out: no
    image may keep a spec from being told.
    """
    found = dict(spec.labels)
    size = sum(map(_size, found.items()))
    for item in sorted((image.labels or {}).items()):
        key, value = item
        if key in found or not key or CONTROL.search(key + value):
            continue
        if len(found) < MAX_LABELS and size + _size(item) <= MAX_LABEL_BYTES:
            found[key] = value
            size += _size(item)
    return found


def _size(item: tuple[str, str]) -> int:
    return sum(len(text.encode()) for text in item)
