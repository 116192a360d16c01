"""The life of a container as data: `TRANSITIONS` maps (state, trigger) to the next state.

    (none) ──create──► pending ──begin──► initializing ──spawned──► running ──stop──► stopping
                          │                    │                       │                 │
                          │ create_failed      │ start_failed          └──────exit───────┤
                          ▼                    ▼                                         ▼
                       removed ◄──remove──  failed ◄─────────────lost──────────────── exited
                                               └────────────begin (start, restart)──────┘

`cancel` is a stop (or kill, or remove) that arrives before the program runs: `pending` and `initializing`
become `exited`, a create that is still working becomes `removed`. `lost` means that the outcome of a run is
unknown: the launcher died (`supervisor_lost`) or the machine did (`node_rebooted`).
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from schemas.status import State
from worker.errors import Conflict


class Trigger(StrEnum):
    CREATE = "create"
    CREATE_FAILED = "create_failed"
    BEGIN = "begin"
    SPAWNED = "spawned"
    START_FAILED = "start_failed"
    CANCEL = "cancel"
    STOP = "stop"
    EXIT = "exit"
    LOST = "lost"
    REMOVE = "remove"


_S, _T = State, Trigger

TRANSITIONS: Mapping[tuple[State | None, Trigger], State] = MappingProxyType(
    {
        (None, _T.CREATE): _S.PENDING,
        (_S.PENDING, _T.CREATE_FAILED): _S.REMOVED,
        (_S.PENDING, _T.BEGIN): _S.INITIALIZING,
        (_S.EXITED, _T.BEGIN): _S.INITIALIZING,
        (_S.FAILED, _T.BEGIN): _S.INITIALIZING,
        (_S.INITIALIZING, _T.SPAWNED): _S.RUNNING,
        (_S.INITIALIZING, _T.START_FAILED): _S.FAILED,
        (_S.PENDING, _T.CANCEL): _S.EXITED,
        (_S.INITIALIZING, _T.CANCEL): _S.EXITED,
        (_S.RUNNING, _T.STOP): _S.STOPPING,
        (_S.RUNNING, _T.EXIT): _S.EXITED,
        (_S.STOPPING, _T.EXIT): _S.EXITED,
        (_S.INITIALIZING, _T.LOST): _S.FAILED,
        (_S.RUNNING, _T.LOST): _S.FAILED,
        (_S.STOPPING, _T.LOST): _S.FAILED,
        (_S.PENDING, _T.REMOVE): _S.REMOVED,
        (_S.INITIALIZING, _T.REMOVE): _S.REMOVED,
        (_S.RUNNING, _T.REMOVE): _S.REMOVED,
        (_S.STOPPING, _T.REMOVE): _S.REMOVED,
        (_S.EXITED, _T.REMOVE): _S.REMOVED,
        (_S.FAILED, _T.REMOVE): _S.REMOVED,
    }
)

LIVE = frozenset({_S.INITIALIZING, _S.RUNNING, _S.STOPPING})
ENDED = frozenset({_S.EXITED, _S.FAILED, _S.REMOVED})


def next_state(state: State | None, trigger: Trigger) -> State:
    """The state after `trigger`. Raises Conflict when the table has no such step."""
    try:
        return TRANSITIONS[state, trigger]
    except KeyError:
        raise Conflict(f"a container that is {state or 'not there'} cannot {trigger}") from None


class Verdict(StrEnum):
    """What a verb does in a state, before anything is tried (the contract's verb table)."""

    DO = "do"
    OK = "ok"
    WAIT = "wait"  # "after the stop": the container is stopping, this verb follows it
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"


_ROW = Mapping[State | None, Verdict]
_LIVE_DO: dict[State | None, Verdict] = {_S.INITIALIZING: Verdict.DO, _S.RUNNING: Verdict.DO}

VERBS: Mapping[str, _ROW] = MappingProxyType(
    {
        "create": {
            None: Verdict.DO,
            _S.PENDING: Verdict.CONFLICT,
            _S.INITIALIZING: Verdict.CONFLICT,
            _S.RUNNING: Verdict.CONFLICT,
            _S.STOPPING: Verdict.CONFLICT,
            _S.EXITED: Verdict.CONFLICT,
            _S.FAILED: Verdict.CONFLICT,
        },
        "start": {
            None: Verdict.NOT_FOUND,
            _S.PENDING: Verdict.DO,
            _S.INITIALIZING: Verdict.OK,
            _S.RUNNING: Verdict.OK,
            _S.STOPPING: Verdict.WAIT,
            _S.EXITED: Verdict.DO,
            _S.FAILED: Verdict.DO,
        },
        "stop": {
            None: Verdict.NOT_FOUND,
            _S.PENDING: Verdict.DO,
            **_LIVE_DO,
            _S.STOPPING: Verdict.WAIT,
            _S.EXITED: Verdict.OK,
            _S.FAILED: Verdict.OK,
        },
        "kill": {
            None: Verdict.NOT_FOUND,
            _S.PENDING: Verdict.CONFLICT,
            **_LIVE_DO,
            _S.STOPPING: Verdict.DO,
            _S.EXITED: Verdict.CONFLICT,
            _S.FAILED: Verdict.CONFLICT,
        },
        "restart": {
            None: Verdict.NOT_FOUND,
            _S.PENDING: Verdict.DO,
            **_LIVE_DO,
            _S.STOPPING: Verdict.WAIT,
            _S.EXITED: Verdict.DO,
            _S.FAILED: Verdict.DO,
        },
        "remove": {
            None: Verdict.OK,
            _S.PENDING: Verdict.DO,
            **_LIVE_DO,
            _S.STOPPING: Verdict.DO,
            _S.EXITED: Verdict.DO,
            _S.FAILED: Verdict.DO,
        },
    }
)


def verdict(verb: str, state: State | None, *, replace: bool = False, force: bool = True) -> Verdict:
    """What `verb` does to a container in `state`. `run` reads as `create`."""
    if verb == "run":
        verb = "create"
    if verb == "create" and replace:
        return Verdict.DO
    if verb == "remove" and not force and state in LIVE:
        return Verdict.CONFLICT
    return VERBS[verb][None if state is State.REMOVED else state]
