"""Batches of `profile show` and `profile check`: one JSON object a line, one answer a line, in order. Pure.

Whatever a line holds, it has one answer: a reply, or `{"error": {"code", "message", "field"}}`.
"""

import functools
from collections.abc import Callable
from typing import Any

import msgspec

from schemas.errors import ContractError, Error, InvalidCommand, InvalidSpec
from schemas.spec import ServiceSpec, decode_deployment, decode_spec
from schemas.strict import strict_json, to_struct
from schemas.values import shorten
from worker.answers import Sandbox, SeatbeltSandbox
from worker.errors import Internal, NotFound
from worker.platform.darwin.evaluate import Argument
from worker.platform.darwin.sbpl import canonical as darwin_path
from worker.policy_paths import Canonical
from worker.profiles import Place, ShowRequest, make
from worker.questions import PLAIN, Answer, RawQuestion, parse_question, raw_argument

# A line of `check` carries a whole profile beside its parameters.
MAX_LINE_BYTES = 2 * 2**20
MAX_OPERATION = 64

_DEPLOYMENT_KEYS = frozenset({"version", "deployment", "services"})
_KEPT_SANDBOXES = 256
_encode = msgspec.json.Encoder().encode

Answering = Callable[[bytes], bytes]


class CheckLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of `profile check --batch`. `macos`: names that this release does not know reject the profile.

    `text` and `params` may be left out where the command names a spec. `argument` is one word, or an object
    for a raw operation (`Argument`).
    """

    operation: str
    text: str | None = None
    params: dict[str, str] | None = None
    argument: str | dict[str, Any] | None = None
    macos: int | None = None


class Checked(msgspec.Struct, frozen=True):
    decision: str
    rule: str | None
    line: int | None
    reason: str


class Failed(msgspec.Struct, frozen=True):
    error: Error


def answer_show(line: bytes, default: Place) -> bytes:
    """The reply to one line of `show`, without the newline."""
    return _answered(line, lambda value: _show(value, default))


def answer_check(line: bytes, default: Sandbox | None, canonical: Canonical) -> bytes:
    """The reply to one line of `check`. `default` is asked by lines without a text."""
    return _answered(line, lambda value: _check(value, default, canonical))


def too_long(size: int) -> bytes:
    """The reply to a line that was not kept for its length."""
    return _failed(InvalidCommand(f"the line has more than {size} bytes"))


def _answered(line: bytes, answer: Callable[[Any], Any]) -> bytes:
    try:
        if not line.strip():
            raise InvalidCommand("the line is empty")
        return _encode(answer(strict_json(line, MAX_LINE_BYTES, error=InvalidCommand)))
    except ContractError as failure:
        return _failed(failure)
    except Exception as failure:  # a bug of ours is the answer to its line, and the next line is answered
        return _failed(Internal(f"{type(failure).__name__}: {shorten(str(failure), 200)}"))


def _failed(failure: ContractError) -> bytes:
    return _encode(Failed(failure.to_error()))


def _show(value: Any, default: Place) -> Any:
    request = to_struct(value, ShowRequest, error=InvalidCommand)
    spec, service = _spec_of(request)
    place = request.place(default)
    if service is not None:
        place = msgspec.structs.replace(place, service=service)
    return make(spec, place).profile


def _spec_of(request: ShowRequest) -> tuple[ServiceSpec, str | None]:
    """The spec, and its name where a whole deployment says it."""
    if _DEPLOYMENT_KEYS.isdisjoint(request.spec):
        return decode_spec(request.spec), None
    try:
        services = decode_deployment(request.spec).services
    except ContractError as failure:
        field = "spec" if failure.field is None else f"spec.{failure.field}"
        raise type(failure)(failure.message, field=field) from None
    names = ", ".join(services) or "none"
    if request.service is not None:
        if request.service not in services:
            raise NotFound(f"the deployment has no such service; it has {names}", field="service")
        return services[request.service], request.service
    if len(services) != 1:
        raise InvalidSpec(f"name one service of the deployment: it has {names}", field="service")
    name, spec = next(iter(services.items()))
    return spec, name


def _check(value: Any, default: Sandbox | None, canonical: Canonical) -> Checked:
    asked = to_struct(value, CheckLine, error=InvalidCommand)
    if not asked.operation or len(asked.operation) > MAX_OPERATION:
        raise InvalidCommand(f"must have 1 to {MAX_OPERATION} characters", field="operation")
    if asked.text is None:
        if default is None:
            raise InvalidCommand("missing: the profile's text", field="text")
        if asked.params is not None or asked.macos is not None:
            raise InvalidCommand("goes with a text", field="params" if asked.macos is None else "macos")
        if not isinstance(default, SeatbeltSandbox):
            if isinstance(asked.argument, dict):
                raise InvalidCommand(
                    "must be text: an object is for operations of Seatbelt", field="argument"
                )
            return _as_line(default.ask(parse_question(asked.operation, asked.argument, canonical)))
        return _as_line(_asked(default, asked, canonical))
    sandbox = _sandbox(asked.text, tuple(sorted((asked.params or {}).items())), asked.macos)
    return _as_line(_asked(sandbox, asked, darwin_path))


def _asked(sandbox: SeatbeltSandbox, asked: CheckLine, canonical: Canonical) -> Answer:
    argument = asked.argument
    if isinstance(argument, dict):
        if asked.operation in PLAIN:
            raise InvalidCommand(f"must be text: {asked.operation} is no raw operation", field="argument")
        given = to_struct(argument, Argument, field="argument", error=InvalidCommand)
        return sandbox.decide(asked.operation, given)
    question = parse_question(asked.operation, argument, canonical)
    if isinstance(question, RawQuestion):
        return sandbox.decide(question.operation, raw_argument(question.operation, question.argument))
    return sandbox.ask(question)


def _as_line(answer: Answer) -> Checked:
    return Checked(answer.decision, answer.rule, answer.line, answer.reason)


@functools.lru_cache(maxsize=_KEPT_SANDBOXES)
def _sandbox(text: str, params: tuple[tuple[str, str], ...], macos: int | None) -> SeatbeltSandbox:
    return SeatbeltSandbox(text, dict(params), release=macos)
