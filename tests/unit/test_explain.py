"""The system's own answer about a live process, held against the evaluator's."""

import errno
from collections.abc import Iterator

import pytest
from loguru import logger

from worker.errors import Unavailable
from worker.platform.darwin.evaluate import Argument, compile_profile
from worker.platform.darwin.explain import Explanation, explain
from worker.platform.darwin.seatbelt import Filter

PROFILE = compile_profile(
    """(version 1)
(deny default)
(allow file-read* (subpath (param "ROOT")))
(allow file-read-data (require-all (subpath "/opt") (vnode-type DIRECTORY)))
(allow mach-lookup (global-name "com.apple.logd"))
(allow user-preference-read (preference-domain "com.apple.Metal"))
(allow network-outbound (remote ip "localhost:80"))
(allow process-fork)
""",
    {"ROOT": "/private/tmp/root"},
)


class System:
    """Answers as told and notes what it was asked."""

    def __init__(self, *, allows: bool = True, failure: OSError | None = None) -> None:
        self.asked: list[tuple[int, str, str | None, Filter]] = []
        self._allows = allows
        self._failure = failure

    def may(self, pid: int, operation: str, value: str | None, kind: Filter) -> bool:
        self.asked.append((pid, operation, value, kind))
        if self._failure is not None:
            raise self._failure
        return self._allows


def ask(system: System, operation: str, **argument: str) -> Explanation:
    return explain(7, operation, Argument(**argument), profile=PROFILE, may=system.may)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    yield lines
    logger.remove(sink)


@pytest.mark.parametrize(
    ("operation", "argument", "value", "kind"),
    [
        ("file-read-data", {"path": "/tmp/root/a"}, "/private/tmp/root/a", Filter.PATH),
        ("file-read-data", {"path": "/link/a", "real": "/private/tmp/root/a"}, "/private/tmp/root/a", Filter.PATH),
        ("file-read-data", {"path": "/tmp/root/a", "vnode": "REGULAR-FILE"}, "/private/tmp/root/a", Filter.PATH),
        ("mach-lookup", {"name": "com.apple.logd"}, "com.apple.logd", Filter.GLOBAL_NAME),
        ("mach-lookup", {"name": "x", "kind": "local"}, "x", Filter.LOCAL_NAME),
        ("mach-lookup", {"name": "x", "kind": "xpc"}, "x", Filter.XPC_SERVICE_NAME),
        ("user-preference-read", {"name": "com.apple.Metal"}, "com.apple.Metal", Filter.PREFERENCE_DOMAIN),
        ("process-fork", {}, None, Filter.NONE),
    ],
)  # fmt: skip
def test_what_the_system_is_asked(
    operation: str, argument: dict[str, str], value: str | None, kind: Filter
) -> None:
    system = System()
    told = ask(system, operation, **argument)
    assert system.asked == [(7, operation, value, kind)]
    assert told.asked
    assert told.decision == "allow"


@pytest.mark.parametrize(
    ("operation", "argument", "decision"),
    [
        ("network-outbound", {"address": "127.0.0.1:80"}, "allow"),
        ("network-outbound", {"path": "/private/var/run/syslog"}, "deny"),
        ("iokit-open-user-client", {"class_": "AGXDeviceUserClient"}, "deny"),
        ("signal", {"target": "others"}, "deny"),
        ("sysctl-read", {"name": "kern.hostname"}, "deny"),
        ("file-read-data", {"path": "/opt/a", "vnode": "DIRECTORY"}, "allow"),
        ("file-read-data", {"path": "relative"}, "unknown"),
        ("mach-lookup", {"name": "a\0b"}, "deny"),
    ],
)
def test_what_it_cannot_be_asked_is_foretold(operation: str, argument: dict[str, str], decision: str) -> None:
    system = System()
    told = ask(system, operation, **argument)
    assert system.asked == []
    assert (told.decision, told.asked, told.agrees) == (decision, False, None)


@pytest.mark.parametrize("allows", [True, False])
@pytest.mark.parametrize(("name", "foretold"), [("com.apple.logd", True), ("com.apple.trustd", False)])
def test_a_difference_is_a_fault_of_the_evaluator(
    warnings: list[str], name: str, foretold: bool, allows: bool
) -> None:
    told = ask(System(allows=allows), "mach-lookup", name=name)
    assert told.decision == ("allow" if allows else "deny")
    assert told.predicted.decision == ("allow" if foretold else "deny")
    assert told.agrees is (allows == foretold)
    assert len(warnings) == (allows != foretold)
    assert all("the evaluator is wrong" in line and name in line for line in warnings)


def test_no_foretelling_is_no_fault(warnings: list[str]) -> None:
    told = ask(System(allows=False), "file-read-data", path="/opt/a")
    assert (told.predicted.decision, told.decision, told.agrees) == ("unknown", "deny", None)
    assert warnings == []


def test_a_process_that_is_gone() -> None:
    system = System(failure=OSError(errno.ESRCH, "No such process"))
    with pytest.raises(Unavailable, match="process 7 cannot be asked: No such process"):
        ask(system, "process-fork")
