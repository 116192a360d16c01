"""The parts of a ServiceSpec about its life: health, init, errors, restart."""

# ruff: noqa: RUF012 (msgspec copies an empty default)

from enum import StrEnum
from typing import Annotated, Any

import msgspec

from .spec_parts import U32, Duration, Part, PortOrAuto, seconds_or
from .values import parse_duration


class TcpCheck(Part, frozen=True, kw_only=True, tag_field="type", tag="tcp"):
    """Port 0 is the assigned port, else the first target port that is not UDP."""

    port: PortOrAuto


class HttpCheck(Part, frozen=True, kw_only=True, tag_field="type", tag="http"):
    url: str
    expect_status: Annotated[int, msgspec.Meta(ge=100, le=599)] = 200


class CommandCheck(Part, frozen=True, kw_only=True, tag_field="type", tag="command"):
    """One shell string."""

    command: str


class HealthSpec(Part, frozen=True, kw_only=True):
    start_grace: Duration | None = None
    interval: Duration | None = None
    timeout: Duration | None = None
    retries: U32 = 3
    check: TcpCheck | HttpCheck | CommandCheck

    @property
    def start_grace_s(self) -> float:
        return seconds_or(self.start_grace, 5.0, "health.start_grace")

    @property
    def interval_s(self) -> float:
        return seconds_or(self.interval, 10.0, "health.interval")

    @property
    def timeout_s(self) -> float:
        return seconds_or(self.timeout, 5.0, "health.timeout")


IMPLICIT_HEALTH = HealthSpec(start_grace="5s", check=TcpCheck(port=0))


class InitFailure(StrEnum):
    FAIL = "fail"
    WARN = "warn"
    CONTINUE = "continue"


class InitStep(Part, frozen=True, kw_only=True):
    id: str
    uses: str
    with_: dict[str, Any] = msgspec.field(default_factory=dict, name="with")
    retry: U32 | None = None
    timeout: Duration | None = None
    on_failure: InitFailure = InitFailure.FAIL

    @property
    def timeout_s(self) -> float:
        return seconds_or(self.timeout, 300.0, "init.steps.timeout")


class InitSpec(Part, frozen=True, kw_only=True):
    steps: list[InitStep] = []


class InitErrorAction(StrEnum):
    FAIL = "fail"
    RESTART = "restart"
    BACKOFF = "backoff"


class PanicAction(StrEnum):
    RESTART = "restart"
    SHUTDOWN = "shutdown"
    ISOLATE = "isolate"


class OnInitFailure(Part, frozen=True, kw_only=True):
    action: InitErrorAction = InitErrorAction.FAIL


class OnPanic(Part, frozen=True, kw_only=True):
    action: PanicAction = PanicAction.RESTART


class ErrorsSpec(Part, frozen=True, kw_only=True):
    on_init_failure: OnInitFailure = OnInitFailure()
    on_panic: OnPanic = OnPanic()


class LifecycleSpec(Part, frozen=True, kw_only=True):
    delete_on_exit: bool = False


class RestartKind(StrEnum):
    NO = "no"
    ON_FAILURE = "on_failure"
    ALWAYS = "always"
    UNLESS_STOPPED = "unless_stopped"


class RestartPolicy(Part, frozen=True, kw_only=True):
    """`max_attempts` null is for ever."""

    kind: RestartKind
    max_attempts: U32 | None = None
    delay: Duration | None = None

    @property
    def delay_s(self) -> float | None:
        return None if self.delay is None else parse_duration(self.delay, field="restart_policy.delay")
