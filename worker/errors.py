"""The error tree. Every failure that may reach a user is one of these, each with its code of the contract.

ContractError                      (schemas.errors)
├── InvalidCommand                 invalid_command      a command, query or subject that cannot be understood
├── InvalidSpec                    invalid_spec         a spec that breaks a rule of the contract
├── Unsupported                    unsupported          understood, but this node cannot do it
├── NotFound                       not_found            no such container, image, command, volume
├── Conflict                       conflict             the state, instance or a later command forbids it
├── CreateFailed                   create_failed        rootfs, directory or profile could not be made
├── StartFailed                    start_failed         a named step between fork and exec failed
├── PullFailed                     pull_failed          an image could not be fetched or registered
├── PolicyDenied                   policy_denied        the node's operator has not granted it
├── ResourceExhausted              resource_exhausted   disk, ports, descriptors, container slots
├── DeadlineExceeded               deadline_exceeded    too late to begin, or still working at the timeout
├── Interrupted                    interrupted          a crash left the outcome unknown
├── Unavailable                    unavailable          the launcher or the server does not answer now
├── Configuration                  configuration        the worker cannot run as configured; it exits
│   └── Fenced                     configuration        another worker owns this node's name
└── Internal                       internal             a bug of ours
"""

import errno

from schemas.errors import ContractError, Error, ErrorCode, InvalidCommand, InvalidSpec, Unsupported

__all__ = [
    "Configuration",
    "Conflict",
    "ContractError",
    "CreateFailed",
    "DeadlineExceeded",
    "Fenced",
    "Internal",
    "Interrupted",
    "InvalidCommand",
    "InvalidSpec",
    "NotFound",
    "PolicyDenied",
    "PullFailed",
    "ResourceExhausted",
    "StartFailed",
    "Unavailable",
    "Unsupported",
    "from_wire",
]


class NotFound(ContractError):
    code = ErrorCode.NOT_FOUND


class Conflict(ContractError):
    code = ErrorCode.CONFLICT


class CreateFailed(ContractError):
    code = ErrorCode.CREATE_FAILED


class StartFailed(ContractError):
    code = ErrorCode.START_FAILED


class PullFailed(ContractError):
    code = ErrorCode.PULL_FAILED


class PolicyDenied(ContractError):
    """The message ends by saying which key of which file would allow it."""

    code = ErrorCode.POLICY_DENIED


class ResourceExhausted(ContractError):
    code = ErrorCode.RESOURCE_EXHAUSTED


class DeadlineExceeded(ContractError):
    code = ErrorCode.DEADLINE_EXCEEDED


class Interrupted(ContractError):
    code = ErrorCode.INTERRUPTED


class Unavailable(ContractError):
    code = ErrorCode.UNAVAILABLE


class Configuration(ContractError):
    """The worker exits with one line and a non-zero code."""

    code = ErrorCode.CONFIGURATION


class Fenced(Configuration):
    """Another worker publishes under this node's name."""


class Internal(ContractError):
    code = ErrorCode.INTERNAL


_BY_CODE: dict[ErrorCode, type[ContractError]] = {
    kind.code: kind
    for kind in (
        InvalidCommand,
        InvalidSpec,
        Unsupported,
        NotFound,
        Conflict,
        CreateFailed,
        StartFailed,
        PullFailed,
        PolicyDenied,
        ResourceExhausted,
        DeadlineExceeded,
        Interrupted,
        Unavailable,
        Configuration,
        Internal,
    )
}


def from_wire(error: Error) -> ContractError:
    """The exception for an error that a node sent. A code that is not known here is kept."""
    failure = _BY_CODE.get(error.code, ContractError)(error.message, field=error.field)
    failure.code = error.code
    return failure


def is_out_of_space(code: int | None) -> bool:
    """Whether an errno says that the disk, or the user's part of it, is full."""
    return code in (errno.ENOSPC, errno.EDQUOT)


def unforeseen(verb: str, failure: Exception) -> ContractError:
    """What a command ends in when something fails that nobody has a word for: the disk, or a bug of ours."""
    if isinstance(failure, OSError) and is_out_of_space(failure.errno):
        where = f" ({failure.filename})" if failure.filename else ""
        return ResourceExhausted(f"{verb} failed: the disk is full{where}")
    return Internal(f"{verb} failed: {failure!r}")
