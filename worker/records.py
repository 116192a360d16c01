"""What the journal keeps of a container: enough for a new worker to go on where the last one stopped."""

from datetime import UTC, datetime
from typing import Any

import msgspec

from schemas.spec import ServiceSpec
from schemas.status import ContainerStatus, Reason
from worker.platform.base import RunAs


class ContainerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One instance of a container.

    `spec` is the user's own, secret references unresolved. `created_by` and `started_by` are the ids of the
    commands that made the instance and its newest run: after a crash they tell a step that was done from one
    that was not. `ready` is false while the create is still working. `intent` is why we are ending the run
    (a Reason), kept so that a new worker gives the same reason. `user` and `stop_signal` are what came of spec
    and image at the create: what the container does to its own files later cannot change them.
    """

    status: ContainerStatus
    spec: ServiceSpec
    created_by: str | None = None
    started_by: str | None = None
    ready: bool = False
    intent: Reason | None = None
    shim_pid: int | None = None
    shim_start: int | None = None
    boot_id: str | None = None
    user: RunAs | None = None
    stop_signal: int | None = None

    def with_status(self, **changes: Any) -> "ContainerRecord":
        return msgspec.structs.replace(self, status=msgspec.structs.replace(self.status, **changes))


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(ContainerRecord)


def encode_record(record: ContainerRecord) -> bytes:
    return _encoder.encode(record)


def decode_record(raw: bytes) -> ContainerRecord:
    return _decoder.decode(raw)


def from_unix_us(unix_us: int) -> datetime:
    """Microseconds since 1970 as a UTC time."""
    seconds, micros = divmod(unix_us, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=micros)
