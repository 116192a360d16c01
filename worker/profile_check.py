"""One question about one spec or container, whoever asks: the command line or the query `check` of a node. Pure
but for what the attempt's maker does.
"""

from collections.abc import Callable, Mapping

from schemas.queries import CheckReply, Decision
from schemas.spec import ServiceSpec
from worker.answers import Sandbox, sandbox_of
from worker.errors import Internal, PolicyDenied
from worker.platform.base import Profile, RuleGroup
from worker.policy_paths import Canonical
from worker.profiles import Place, make
from worker.questions import Answer, PortQuestion, Question, parse_question
from worker.remedies import would_allow

# The profile of a spec; raises what `make_policy` raises.
Describe = Callable[[ServiceSpec], Profile]
Open = Callable[[Profile], Sandbox]


class Attempts:
    """Sandboxes of a spec and of its changes.

    `describe` is the node as it is; `generous` the same node if it granted everything, to tell what the
    operator would have to grant first.
    """

    def __init__(self, describe: Describe, open_: Open, *, generous: Describe | None = None) -> None:
        self._describe = describe
        self._open = open_
        self._generous = generous

    def profile(self, spec: ServiceSpec) -> Profile:
        return self._describe(spec)

    def open(self, profile: Profile) -> Sandbox:
        return self._open(profile)

    def with_grants(self, spec: ServiceSpec) -> tuple[Sandbox, str | None]:
        """The sandbox, and what must be granted before the node takes the spec."""
        try:
            return self._open(self._describe(spec)), None
        except PolicyDenied as refusal:
            if self._generous is None:
                raise
            return self._open(self._generous(spec)), refusal.message


def offline(place: Place) -> Attempts:
    """Of a node that is only thought of."""
    return Attempts(
        lambda spec: make(spec, place).profile,
        lambda profile: sandbox_of(profile, release=place.macos),
    )


def check(
    spec: ServiceSpec,
    attempts: Attempts,
    operation: str,
    argument: str | None,
    *,
    canonical: Canonical,
    groups: Mapping[str, RuleGroup],
) -> CheckReply:
    """Whether the sandbox of `spec` allows it, and for a denial what would.

    InvalidCommand for what is no question; Internal for a profile that no compiler would take.
    """
    question = parse_question(operation, argument, canonical)
    profile = attempts.profile(spec)
    answer = attempts.open(profile).ask(question)
    if answer.decision == "reject":
        raise Internal(f"line {answer.line} of the profile would be refused: {answer.reason}")
    remedies: list[str] | None = None
    if answer.decision == Decision.DENY and _is_the_nodes(question, profile):
        remedies = []
    elif answer.decision == Decision.DENY:

        def attempt(changed: ServiceSpec) -> tuple[Answer, str | None]:
            sandbox, condition = attempts.with_grants(changed)
            return sandbox.ask(question), condition

        remedies = would_allow(spec, question, groups, attempt)
    return CheckReply(
        decision=Decision(answer.decision),
        rule=answer.rule,
        line=answer.line,
        reason=answer.reason,
        would_allow=remedies,
    )


def _is_the_nodes(question: Question, profile: Profile) -> bool:
    """A port that no spec shall have, also where a level opens it for want of a better filter."""
    return isinstance(question, PortQuestion) and question.port in profile.policy["network"]["denied_ports"]
