"""Error codes of the contract, the wire form of an error, and the exception every decoder here raises."""

from enum import StrEnum
from typing import Any

import msgspec

MAX_MESSAGE_BYTES = 4096


class OpenEnum(StrEnum):
    """A string enum that keeps a value it does not know, so that an older reader survives a newer writer."""

    @classmethod
    def _missing_(cls, value: object) -> Any:
        if not isinstance(value, str):
            return None
        member = str.__new__(cls, value)
        member._name_ = value
        member._value_ = value
        return member


class ErrorCode(OpenEnum):
    INVALID_COMMAND = "invalid_command"
    INVALID_SPEC = "invalid_spec"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    CREATE_FAILED = "create_failed"
    START_FAILED = "start_failed"
    PULL_FAILED = "pull_failed"
    POLICY_DENIED = "policy_denied"
    UNSUPPORTED = "unsupported"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    INTERRUPTED = "interrupted"
    UNAVAILABLE = "unavailable"
    CONFIGURATION = "configuration"
    INTERNAL = "internal"


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """An error as it crosses the wire. `field` is a dotted path such as `spec.resources.memory`."""

    code: ErrorCode
    message: str
    field: str | None = None


class ContractError(Exception):
    """A failure that has a code of the contract. The whole tree below it stands in `worker.errors`."""

    code: ErrorCode = ErrorCode.INTERNAL

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def to_error(self) -> Error:
        """The wire form; the message is cut to 4 KiB of UTF-8."""
        raw = self.message.encode("utf-8", "replace")
        message = (
            raw[:MAX_MESSAGE_BYTES].decode("utf-8", "ignore")
            if len(raw) > MAX_MESSAGE_BYTES
            else self.message
        )
        return Error(code=self.code, message=message, field=self.field)


class InvalidCommand(ContractError):
    code = ErrorCode.INVALID_COMMAND


class InvalidSpec(ContractError):
    code = ErrorCode.INVALID_SPEC


class Unsupported(ContractError):
    """A field or verb whose capability this node does not have."""

    code = ErrorCode.UNSUPPORTED
