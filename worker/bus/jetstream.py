"""JetStream over the Bus: the API as JSON, a stream's newest message, publishing with an acknowledgement.

await bus.js.api("STREAM.INFO.SANDFLEET_EVT")             any API call; JetStreamError, NoResponders, …
await bus.js.stream_info("SANDFLEET_EVT")                 StreamInfo; JetStreamError 10059 when there is none
await bus.js.last_message("SANDFLEET_EVT", "P.evt.n.>")   the newest message of a pattern, or None
await bus.js.publish(subject, data, headers)              PubAck once stored
"""

from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from worker.bus.failures import JetStreamError
from worker.bus.messages import Headers, Message, StreamMessage, parse_time
from worker.errors import Unavailable

if TYPE_CHECKING:
    from worker.bus.connection import Bus

API_TIMEOUT_S = 5.0
DEFAULT_PREFIX = "SANDFLEET"

NO_MESSAGE = 404


class PubAck(msgspec.Struct, frozen=True):
    stream: str = ""
    seq: int = 0
    duplicate: bool = False


class _ApiFailure(msgspec.Struct, frozen=True):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _PubReply(msgspec.Struct, frozen=True):
    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: _ApiFailure | None = None


class StreamInfo(msgspec.Struct, frozen=True):
    """`deleted` is filled when it was asked for: sequences between first and last that are gone."""

    created: str
    first_seq: int
    last_seq: int
    messages: int
    bytes: int
    num_deleted: int
    deleted: frozenset[int]
    config: dict[str, Any]
    first_time: datetime | None = None
    last_time: datetime | None = None

    @property
    def max_age_s(self) -> float:
        """0 for no limit."""
        return int(self.config.get("max_age", 0)) / 1e9

    @property
    def max_bytes(self) -> int:
        """0 for no limit."""
        return max(0, int(self.config.get("max_bytes", 0)))


class StreamNames(msgspec.Struct, frozen=True):
    """The names of the contract's streams under a `stream_prefix`."""

    prefix: str = DEFAULT_PREFIX

    @property
    def commands(self) -> str:
        return f"{self.prefix}_CMD"

    @property
    def jobs(self) -> str:
        return f"{self.prefix}_JOB"

    @property
    def events(self) -> str:
        return f"{self.prefix}_EVT"

    @property
    def logs(self) -> str:
        return f"{self.prefix}_LOG"

    @property
    def stats(self) -> str:
        return f"{self.prefix}_STAT"

    @property
    def nodes_bucket(self) -> str:
        return f"{self.prefix}_NODES"

    @property
    def nodes(self) -> str:
        """The stream behind the bucket."""
        return f"KV_{self.nodes_bucket}"


_pub_reply = msgspec.json.Decoder(_PubReply)


class JetStream:
    def __init__(self, bus: "Bus", *, domain: str | None) -> None:
        self._bus = bus
        self.prefix = f"$JS.{domain}.API" if domain else "$JS.API"
        # A domain's KV subjects hang below its API prefix (the server maps them).
        self.kv_prefix = f"{self.prefix}.$KV" if domain else "$KV"

    async def api(self, call: str, request: Any = None, *, timeout: float = API_TIMEOUT_S) -> dict[str, Any]:
        """The reply's JSON. `call` is what follows the API prefix, such as `STREAM.INFO.SANDFLEET_EVT`."""
        body = b"" if request is None else msgspec.json.encode(request)
        reply = await self._bus.request(f"{self.prefix}.{call}", body, timeout)
        try:
            answer = msgspec.json.decode(reply.data)
        except msgspec.DecodeError:
            raise Unavailable(f"JetStream's answer to {call} cannot be read") from None
        if not isinstance(answer, dict):
            raise Unavailable(f"JetStream's answer to {call} cannot be read")
        error = answer.get("error")
        if isinstance(error, dict):
            raise JetStreamError(
                int(error.get("code", 0)),
                int(error.get("err_code", 0)),
                str(error.get("description", "")),
                subject=call,
            )
        return answer

    async def stream_info(
        self, stream: str, *, deleted: bool = False, timeout: float = API_TIMEOUT_S
    ) -> StreamInfo:
        request = {"deleted_details": True} if deleted else None
        answer = await self.api(f"STREAM.INFO.{stream}", request, timeout=timeout)
        state = answer.get("state", {})
        return StreamInfo(
            created=str(answer.get("created", "")),
            first_seq=int(state.get("first_seq", 0)),
            last_seq=int(state.get("last_seq", 0)),
            messages=int(state.get("messages", 0)),
            bytes=int(state.get("bytes", 0)),
            num_deleted=int(state.get("num_deleted", 0)),
            deleted=frozenset(state.get("deleted") or ()),
            config=answer.get("config", {}),
            first_time=_time(state.get("first_ts")),
            last_time=_time(state.get("last_ts")),
        )

    async def last_message(
        self, stream: str, pattern: str, *, timeout: float = API_TIMEOUT_S
    ) -> StreamMessage | None:
        """The newest message whose subject matches `pattern`, from any replica: it may be a little behind."""
        reply = await self._bus.request(f"{self.prefix}.DIRECT.GET.{stream}.{pattern}", b"", timeout)
        if reply.status == NO_MESSAGE:
            return None
        if reply.status:
            raise JetStreamError(reply.status, 0, reply.description or "direct get failed", subject=pattern)
        headers = dict(reply.headers)
        try:
            return StreamMessage(
                subject=headers.pop("Nats-Subject"),
                data=reply.data,
                stream_seq=int(headers.pop("Nats-Sequence")),
                time=parse_time(headers.pop("Nats-Time-Stamp")),
                headers=headers,
            )
        except (KeyError, ValueError):
            raise Unavailable(f"the answer about the newest message of {pattern} cannot be read") from None

    async def publish(
        self, subject: str, data: bytes, headers: Headers | None = None, *, timeout: float = API_TIMEOUT_S
    ) -> PubAck:
        """Store a message. NoResponders: no stream listens (now)."""
        return read_ack(await self._bus.request(subject, data, timeout, headers=headers))


def read_ack(reply: Message) -> PubAck:
    """A publish's acknowledgement, or JetStreamError."""
    try:
        ack = _pub_reply.decode(reply.data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Unavailable("the acknowledgement of a publish cannot be read") from None
    if ack.error is not None:
        raise JetStreamError(ack.error.code, ack.error.err_code, ack.error.description)
    return PubAck(ack.stream, ack.seq, ack.duplicate)


def _time(text: object) -> datetime | None:
    """A server's time; None for the year 1, which is how it says that there is none."""
    if not isinstance(text, str) or text.startswith("0001-"):
        return None
    return msgspec.convert(text, datetime)
