"""Specs and sandboxes for the tests of the profile verbs."""

from typing import Any

from schemas.queries import CheckReply
from schemas.spec import ServiceSpec, decode_spec
from worker.answers import Sandbox, sandbox_of
from worker.profile_check import check, offline
from worker.profiles import Made, Place, canonical_on, make, rules_of
from worker.questions import Answer, Question, parse_question

PLATFORMS = ("darwin", "linux")


def spec(**fields: Any) -> ServiceSpec:
    return decode_spec({"image": {"name": "web:1"}, **fields})


def made(platform: str = "darwin", *, place: dict[str, Any] | None = None, **fields: Any) -> Made:
    return make(spec(**fields), Place(platform=platform, **(place or {})))  # type: ignore[arg-type]


def sandbox(platform: str = "darwin", **fields: Any) -> Sandbox:
    return sandbox_of(made(platform, **fields).profile)


def question(platform: str, operation: str, argument: str | None = None) -> Question:
    return parse_question(operation, argument, canonical_on(platform))  # type: ignore[arg-type]


def asked(platform: str, operation: str, argument: str | None = None, **fields: Any) -> Answer:
    return sandbox(platform, **fields).ask(question(platform, operation, argument))


def checked(platform: str, operation: str, argument: str | None = None, **fields: Any) -> CheckReply:
    """What `profile check` answers, remedies included."""
    place = Place(platform=platform)  # type: ignore[arg-type]
    return check(
        spec(**fields),
        offline(place),
        operation,
        argument,
        canonical=canonical_on(place.platform),
        groups=rules_of(place).groups(),
    )
