"""An error as one line that says what to do next, and as an exit code."""

from collections.abc import Mapping

from schemas.errors import ContractError, ErrorCode
from worker.bus.failures import JetStreamError, NoAnswer, NoResponders, NotConnected
from worker.cli.app import NO_ANSWER, NOT_FOUND, REFUSED, USAGE

SILENCE = (NoAnswer, NoResponders, NotConnected)

NEXT: Mapping[str, str] = {
    ErrorCode.RESOURCE_EXHAUSTED: "see sandfleet doctor",
    ErrorCode.INTERRUPTED: "see sandfleet inspect for what became of it",
    ErrorCode.INTERNAL: "the worker's log says more",
}


def sentence(failure: ContractError) -> str:
    """The message, the field where it does not name it, and the next step where there is a usual one."""
    text = failure.message.strip() or str(failure.code)
    if failure.field and failure.field not in text:
        text = f"{failure.field}: {text}"
    hint = NEXT.get(failure.code)
    return f"{text}; {hint}" if hint else text


def exit_code(failure: ContractError) -> int:
    if isinstance(failure, JetStreamError):
        return REFUSED
    if isinstance(failure, SILENCE):
        return NO_ANSWER
    if failure.code == ErrorCode.NOT_FOUND:
        return NOT_FOUND
    if failure.code == ErrorCode.INVALID_COMMAND:
        return USAGE
    return REFUSED
