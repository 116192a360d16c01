"""That this release compiles our profiles, and decides as the evaluator says."""

import ctypes
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest

from worker.platform.darwin.evaluate import Argument, compile_profile
from worker.platform.darwin.groups import GROUPS
from worker.platform.darwin.seatbelt import Filter, parameters

from .conftest import Note
from .mac_help import Box, a_folder, compiles, confined, driver, every_level, seatbelt

pytestmark = pytest.mark.darwin

LEVELS = dict(every_level())
LIBSANDBOX = "/usr/lib/libsandbox.1.dylib"


@pytest.fixture
def box() -> Iterator[Box]:
    with a_folder() as folder:
        yield Box(folder)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_compiles(box: Box, level: str) -> None:
    assert compiles(driver().plan(box.policy(**LEVELS[level]))) is None


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_every_group_compiles(box: Box, group: str) -> None:
    assert compiles(driver().plan(box.policy(groups=(group,)))) is None


def test_all_groups_together_compile(box: Box) -> None:
    assert compiles(driver().plan(box.policy(groups=tuple(sorted(GROUPS))))) is None


@pytest.mark.parametrize(
    "text",
    [
        '(version 1)(deny default)(allow file-raed* (literal "/"))',
        '(version 1)(deny default)(allow network-outbound (remote ip "127.0.0.1:80"))',
        '(version 1)(deny default)(allow network-outbound (remote ip "localhost:0"))',
        '(version 1)(deny default)(allow file-read* (subpath (param "NOPE")))',
        "(version 1)(deny default",
    ],
)
def test_what_the_evaluator_rejects_is_refused(box: Box, text: str, note: Note) -> None:
    said = compiles({**driver().plan(box.policy()), "profile": text, "params": []})
    note(f"refusal of {text}", said)
    assert said is not None


def test_what_entering_costs(box: Box, note: Note) -> None:
    """Decides whether compiling ahead would pay: docs/adr/0009."""
    plan = driver().plan(box.policy(**LEVELS["outbound, gpu metal_compute"]))
    whole = []
    for _ in range(10):
        began = time.perf_counter()
        assert compiles(plan) is None
        whole.append((time.perf_counter() - began) * 1000)
    note("fork, enter and exit, ms (median of 10)", round(statistics.median(whole), 3))
    bare = []
    for _ in range(10):
        began = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        bare.append((time.perf_counter() - began) * 1000)
    note("fork and exit, ms (median of 10)", round(statistics.median(bare), 3))
    note("profile, bytes", len(plan["profile"]))
    note("compile alone, ms (median of 10)", _compile_ms(plan))


def _compile_ms(plan: dict[str, Any]) -> float | str:
    """Of sandbox_compile_string, whose result is dropped; or why it could not be asked."""
    try:
        library = ctypes.CDLL(LIBSANDBOX, use_errno=True)
        compile_string, create, set_param, free = (
            getattr(library, f"sandbox_{name}")
            for name in ("compile_string", "create_params", "set_param", "free_profile")
        )
    except (OSError, AttributeError) as missing:
        return str(missing)
    create.restype = compile_string.restype = ctypes.c_void_p
    set_param.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
    compile_string.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)]
    free.argtypes = [ctypes.c_void_p]
    kept = parameters(plan["params"])  # set_param does not copy
    given = create()
    for at in range(0, len(plan["params"]), 2):
        set_param(given, kept[at], kept[at + 1])
    took = []
    for _ in range(10):
        error = ctypes.c_void_p()
        began = time.perf_counter()
        made = compile_string(plan["profile"].encode(), given, ctypes.byref(error))
        took.append((time.perf_counter() - began) * 1000)
        if not made:
            return "sandbox_compile_string refused it"
        free(made)
    return round(statistics.median(took), 3)


# -- the decision matrix, against sandbox_check


def places(box: Box) -> list[str]:
    """Existing canonical paths, inside and outside of every kind of grant."""
    (box.rootfs / "bin").mkdir()
    for file in (box.rootfs / "bin" / "tool", box.tmp / "file", box.state / "exit.json"):
        file.write_text("x")
    system = [
        *(
            "/",
            "/private/etc/hosts",
            "/private/etc/passwd",
            "/private/etc/master.passwd",
            "/bin/sh",
            "/bin/ls",
        ),
        *(
            "/usr/bin/env",
            "/usr/bin/sudo",
            "/usr/lib/dyld",
            "/usr/share/zoneinfo/UTC",
            "/dev/null",
            "/dev/zero",
        ),
        *("/System/Library/CoreServices/SystemVersion.plist", "/Applications", "/Library", "/Users"),
        *("/private/var/run/mDNSResponder", "/private/var/db", "/opt", "/usr/local", os.path.expanduser("~")),
    ]
    own = [box.rootfs, box.rootfs / "bin" / "tool", box.tmp / "file", box.state / "exit.json", box.root]
    return [path for path in [*system, *map(str, own)] if os.path.lexists(path)]


OPERATIONS = (
    *("file-read-data", "file-read-metadata", "file-write-data", "file-write-create", "file-write-unlink"),
    *("process-exec", "file-map-executable"),
)
SERVICES = (
    *("com.apple.logd", "com.apple.trustd", "com.apple.trustd.agent", "com.apple.SecurityServer"),
    *(
        "com.apple.system.opendirectoryd.libinfo",
        "com.apple.MTLCompilerService",
        "com.apple.windowserver.active",
    ),
    *("com.apple.coreservices.launchservicesd", "com.apple.SystemConfiguration.DNSConfiguration"),
    *("com.apple.cfprefsd.daemon", "com.apple.pasteboard.1", "com.apple.tccd.system"),
)


@pytest.mark.parametrize("level", LEVELS)
def test_decisions_are_the_evaluators(box: Box, level: str, note: Note) -> None:
    plan = driver().plan(box.policy(**LEVELS[level]))
    params = dict(zip(plan["params"][::2], plan["params"][1::2], strict=True))
    profile = compile_profile(plan["profile"], params, release=driver().release)
    questions = [(op, path, Filter.PATH, Argument(path=path)) for op in OPERATIONS for path in places(box)]
    for service in SERVICES:
        global_name = Argument(name=service, kind="global")
        questions.append(("mach-lookup", service, Filter.GLOBAL_NAME, global_name))
        xpc = Argument(name=service, kind="xpc")
        questions.append(("mach-lookup", service, Filter.XPC_SERVICE_NAME, xpc))
    asked = seatbelt()
    differ: list[str] = []
    unknown = 0
    with confined(plan) as pid:
        for operation, value, kind, argument in questions:
            told = profile.decide(operation, argument)
            if told.decision == "unknown":
                unknown += 1
                continue
            real = "allow" if asked.may(pid, operation, value, kind) else "deny"
            if real != told.decision:
                differ.append(
                    f"{operation} {value} ({kind.name}): {real}, not {told.decision} by {told.rule}"
                )
    note(f"decisions: {level}", {"asked": len(questions), "unknown": unknown, "differ": differ})
    assert differ == []


def test_answers_without_a_value(box: Box, note: Note) -> None:
    with confined(driver().plan(box.policy())) as pid:
        note("process-fork by sandbox_check", seatbelt().may(pid, "process-fork"))
        assert seatbelt().confined(pid)
    assert not seatbelt().confined(os.getpid())
