"""What doctor says when namespaces cannot be made: the trial decides, the kernel's settings say what to do."""

import os
from pathlib import Path

import pytest

from worker.cli import doctor_namespaces
from worker.cli.doctor_namespaces import namespaces_check


@pytest.fixture(autouse=True)
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(doctor_namespaces, "PROC", tmp_path)
    return tmp_path


def test_where_the_trial_worked_all_is_well(proc: Path) -> None:
    setting = proc / "sys/user/max_user_namespaces"
    setting.parent.mkdir(parents=True)
    setting.write_text("0\n")  # a worker that is root needs none
    assert namespaces_check("").level == "ok"


def test_where_it_failed_no_setting_makes_it_well() -> None:
    found = namespaces_check("unshare: Operation not permitted")
    assert (found.level, found.found) == ("warn", "unshare: Operation not permitted")
    assert "isolation rootfs" in found.cost
    assert "container engine" in found.do


@pytest.mark.parametrize(
    ("setting", "value", "root", "do"),
    [
        ("user/max_user_namespaces", "0", True, "max_user_namespaces=15000"),
        ("user/max_user_namespaces", "0", False, "max_user_namespaces=15000"),
        ("user/max_user_namespaces", "127", False, "container engine"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", False, "AppArmor profile"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", True, "container engine"),
        ("kernel/unprivileged_userns_clone", "0", False, "unprivileged_userns_clone=1"),
    ],
)
def test_what_to_do(
    proc: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: str, root: bool, do: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    path = proc / "sys" / setting
    path.parent.mkdir(parents=True)
    path.write_text(f"{value}\n")
    assert do in namespaces_check("refused").do
