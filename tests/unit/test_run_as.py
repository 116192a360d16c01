"""Becoming a container's user: in the plans of both platforms, and for real where this is root."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.spec import ImageSpec, ServiceSpec
from worker.errors import ContractError, Unsupported
from worker.images.model import ImageConfig
from worker.platform.base import RunAs
from worker.platform.darwin import enforce as darwin_enforce
from worker.platform.darwin.driver import DarwinDriver
from worker.platform.darwin.enforce import EnforceError, Enforcer
from worker.platform.linux import driver as linux_driver
from worker.platform.linux.able import Able
from worker.platform.linux.driver import LinuxDriver
from worker.services import Services

from . import test_darwin_driver, test_linux_driver
from .fake_kqueue import names
from .fake_libsystem import FakeSystem, build
from .unprivileged import needs_root

USER = RunAs(uid=4711, gid=4712)

linux_policy = test_linux_driver.policy
darwin_policy = test_darwin_driver.policy


def root_driver(**given: Any) -> LinuxDriver:
    return test_linux_driver.made(abi=7, filter=True, root=True, **given)


def test_the_step_stands_between_groups_and_capabilities() -> None:
    plan = root_driver().plan(linux_policy(user=USER))
    named = [name for name, _ in plan["steps"]]
    assert named[:4] == ["rlimits", "groups", "user", "capabilities"]
    assert dict(plan["steps"])["user"] == [4711, 4712]
    assert "user" not in dict(root_driver().plan(linux_policy())["steps"])


def test_the_profile_shows_it() -> None:
    text = root_driver().describe(linux_policy(user=USER)).text
    assert "user 4711 4712" in text
    assert root_driver().describe(linux_policy(user=USER)).policy["user"] == {"uid": 4711, "gid": 4712}


def test_a_root_in_a_user_namespace_has_one_user(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = root_driver(rooted=True)
    driver.plan(linux_policy(user=USER))
    monkeypatch.setattr(driver, "_able", Able(user=True, reason=""))
    with pytest.raises(Unsupported) as failure:
        driver.plan(linux_policy(user=USER, isolation="rootfs"))
    assert failure.value.field == "spec.user"


def test_who_may_change_users(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not test_linux_driver.NEW.changes_user()
    monkeypatch.setattr(linux_driver.privileges, "may_change_user", lambda: True)
    assert root_driver().changes_user()
    monkeypatch.setattr(linux_driver.privileges, "may_change_user", lambda: False)
    assert not root_driver().changes_user()


_CHILD = """
import os, sys
from worker.platform.linux import enforce
read, write = os.pipe()
os.dup2(write, 1)
enforce.apply({"version": 1, "platform": "linux", "steps": [
    ["groups", None], ["user", [4711, 4712]], ["capabilities", None], ["no_new_privs", None], ["dumpable", None]]})
owner = os.fstat(1)
told = open("/proc/self/status").read()
for attempt in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.chown("/", 0, 0)):
    try:
        attempt()
    except PermissionError:
        continue
    told += "it became more again\\n"
sys.stderr.write(told + f"pipe {owner.st_uid}:{owner.st_gid}\\n")
"""


@needs_root
def test_nothing_of_root_is_left() -> None:
    made = subprocess.run(
        [sys.executable, "-c", _CHILD],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    told = dict(line.split(":", 1) for line in made.stderr.splitlines() if ":" in line)
    assert told["Uid"].split() == ["4711"] * 4
    assert told["Gid"].split() == ["4712"] * 4
    assert told["Groups"].split() == []
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(told[name], 16) == 0, name
    assert "more again" not in made.stderr
    assert "pipe 4711:4712" in made.stderr


class _Changes:
    def __init__(self, able: bool) -> None:
        self.able = able

    def changes_user(self) -> bool:
        return self.able


@pytest.mark.parametrize(
    ("able", "asked", "image", "expected"),
    [
        (True, None, None, None),
        (True, None, "4711:12", RunAs(uid=4711, gid=12)),
        (True, "4711:12", "4712", RunAs(uid=4711, gid=12)),
        # A worker that may not change users runs what an image says as itself; a spec that insists is refused.
        (False, None, "4711:12", None),
        (False, "4711:12", None, "unsupported"),
        (False, str(os.geteuid()), "4711", None),
        (False, f"{os.geteuid()}:{os.getegid()}", None, None),
        (True, str(os.geteuid()), "4711", None),
        (True, "nobody-there", None, "invalid_spec"),
        (True, None, "nobody-there", "create_failed"),
    ],
)
def test_who_it_is_to_be(
    tmp_path: Path, able: bool, asked: str | None, image: str | None, expected: RunAs | str | None
) -> None:
    node: Any = SimpleNamespace(driver=_Changes(able))
    spec = ServiceSpec(image=ImageSpec(name="app"), user=asked)

    def ask() -> RunAs | None:
        return Services.run_as(node, spec, ImageConfig(user=image), tmp_path)

    if not isinstance(expected, str):
        assert ask() == expected
        return
    with pytest.raises(ContractError) as failure:
        ask()
    assert failure.value.code == expected
    assert failure.value.field == (None if asked is None else "spec.user")


@pytest.fixture
def system(tmp_path_factory: pytest.TempPathFactory) -> FakeSystem:
    return FakeSystem(build(tmp_path_factory.getbasetemp()))


def test_on_a_mac_it_happens_before_the_sandbox(system: FakeSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = DarwinDriver(system.library, release=15, kqueue=names)
    plan = driver.plan(darwin_policy(user=USER))
    assert plan["user"] == [4711, 4712]
    assert "user" not in driver.plan(darwin_policy())
    done: list[Any] = []
    for call in ("setgroups", "setgid", "setuid"):
        monkeypatch.setattr(os, call, lambda value, call=call: done.append((call, value)))
    enter = darwin_enforce.SandboxEntry.enter
    monkeypatch.setattr(
        darwin_enforce.SandboxEntry,
        "enter",
        lambda self, *given: (done.append("sandbox"), enter(self, *given)),
    )
    Enforcer(str(system.path)).apply({**plan, "limits": []})
    assert done == [("setgroups", [4712]), ("setgid", 4712), ("setuid", 4711), "sandbox"]


def test_on_a_mac_a_refusal_is_told(system: FakeSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = DarwinDriver(system.library, release=15, kqueue=names).plan(darwin_policy(user=USER))

    def refuse(value: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setgroups", refuse)
    with pytest.raises(EnforceError) as failure:
        Enforcer(str(system.path)).apply({**plan, "limits": []})
    assert (failure.value.step, failure.value.errno) == ("user", 1)
