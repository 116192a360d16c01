"""The verbs that need no server: secrets, schema, completion, doctor's checks, and errors as sentences."""

import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.errors import ContractError, ErrorCode
from worker import errors
from worker.bus.failures import JetStreamError, NoAnswer, NoResponders, NotConnected
from worker.cli import doctor_checks
from worker.cli.app import BY_NAME, run
from worker.cli.completion import SCRIPTS, candidates
from worker.cli.doctor_checks import (
    cgroup_check,
    data_dir_checks,
    files_check,
    kernel_checks,
    machine_checks,
)
from worker.cli.doctor_server import judge_clock
from worker.cli.failures import exit_code, sentence


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No server, no running dev, a data directory of the test's own."""
    for name in [name for name in os.environ if name.startswith("SANDFLEET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("SANDFLEET_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("SANDFLEET_NATS_URL", "nats://127.0.0.1:1")
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# -- secrets


def test_secrets_are_set_listed_and_removed(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, b"s3cret\n")
    assert run(["secret", "set", "model-key"]) == 0
    path = home / "data" / "secrets" / "model-key"
    assert path.read_bytes() == b"s3cret\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    feed(monkeypatch, b"\xff\x00"[:1])
    assert run(["secret", "set", "model-key"]) == 0
    assert path.read_bytes() == b"\xff"
    assert run(["secret", "ls"]) == 0
    assert run(["secret", "ls", "--json"]) == 0
    assert capsys.readouterr().out == 'model-key\nmodel-key\nmodel-key\n["model-key"]\n'
    assert run(["secret", "rm", "model-key", "nope"]) == 3
    assert not path.exists()
    assert [path.name for path in path.parent.iterdir()] == []
    assert "there is no secret nope" in capsys.readouterr().err


def test_secrets_stand_where_the_configuration_says(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = home / "node.toml"
    config.write_text('[secrets]\ndir = "keys"\n')
    feed(monkeypatch, b"x")
    assert run(["secret", "set", "a", "--config", str(config)]) == 0
    assert (home / "keys" / "a").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("../x", b"x", "no name of a secret"),
        ("", b"x", "no name of a secret"),
        ("a", b"", "empty"),
        ("a", b"\n", "empty"),
        ("a", b"x\0y", "NUL"),
        ("a", b"x" * (64 * 1024 + 1), "at most 64 KiB"),
    ],
)
def test_a_secret_that_no_container_could_get_is_refused(
    name: str, value: bytes, message: str, home: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    feed(monkeypatch, value)
    assert run(["secret", "set", "--", name]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not (home / "data").exists()


# -- schema


def test_the_schema_is_written_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    assert run(["schema", "export", "--check", str(target)]) == 4
    assert "sandfleet schema export" in capsys.readouterr().err
    assert run(["schema", "export", str(target)]) == 0
    assert "asyncapi.json" in capsys.readouterr().out
    assert run(["schema", "export", "--check", str(target)]) == 0
    assert capsys.readouterr().out == "up to date\n"
    (target / "asyncapi.json").write_text("{}")
    assert run(["schema", "export", "--check", "--json", str(target)]) == 4
    assert json.loads(capsys.readouterr().out)["stale"] == ["asyncapi.json"]


# -- completion


def values(*words: str) -> list[str]:
    return [line.partition("\t")[0] for line in candidates(list(words))]


def test_verbs_and_their_second_words_are_offered() -> None:
    assert {"run", "ps", "profile", "secret", "dev"} <= set(values(""))
    assert values("st") == ["start", "stop", "stats"]
    assert values("profile", "") == ["show", "check", "diff", "lint"]
    assert values("secret", "r") == ["rm"]
    assert values("nope", "") == []


def test_options_choices_and_files_are_offered() -> None:
    assert values("stop", "--t") == ["--timeout"]
    assert values("stop", "--timeout", "") == []
    assert "--timeout" not in values("stop", "--timeout", "5", "web-0", "--")
    assert values("completion", "") == ["bash", "zsh", "fish"]
    assert "running" in values("ps", "--state", "")
    assert values("ps", "--creds", "") == [":files"]
    assert values("register", "demo", "") == [":dirs"]
    assert values("exec", "web-0", "ls", "") == [":files"]
    assert values("profile", "show", "--po") == ["--policy", "--port"]
    assert values("profile", "show", "--platform", "") == ["darwin", "linux"]


def test_names_are_asked_for_and_nothing_is_said_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--completing", "stop", ""]) == 0
    assert run(["--completing"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "ps\t" in said.out


@pytest.mark.parametrize("shell", list(SCRIPTS))
def test_scripts_are_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "sandfleet --completing" in capsys.readouterr().out


def test_the_script_of_bash_completes(tmp_path: Path) -> None:
    program = tmp_path / "sandfleet"
    program.write_text(
        "#!/bin/sh\nexec " + sys.executable + ' -c "import sys; from worker.cli.app import run; '
        'sys.exit(run(sys.argv[1:]))" "$@"\n'
    )
    program.chmod(0o755)
    script = (
        SCRIPTS["bash"]
        + 'COMP_WORDS=(sandfleet profile ""); COMP_CWORD=2; _sandfleet; echo "${COMPREPLY[@]}"\n'
        'COMP_WORDS=(sandfleet sto); COMP_CWORD=1; _sandfleet; echo "${COMPREPLY[@]}"'
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    said = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    assert said.stdout == "show check diff lint\nstop\n"


# -- doctor


def test_doctor_says_what_each_lack_costs(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    assert run(["doctor"]) == 4
    said = capsys.readouterr()
    assert max(len(line) for line in said.out.splitlines()) <= 80
    assert "FAIL  server" in said.out
    assert "costs: nothing can be commanded" in " ".join(said.out.split())
    assert "made at the first start" in " ".join(said.out.split())
    assert run(["doctor", "--json"]) == 4
    findings = json.loads(capsys.readouterr().out)
    assert {finding["level"] for finding in findings} <= {"ok", "warn", "fail"}
    assert all(finding["cost"] for finding in findings if finding["level"] != "ok")
    assert not (home / "data").exists()


def test_the_machine_can_be_looked_at() -> None:
    checks = {finding.check for finding in machine_checks()}
    assert {"sandbox", "descriptors"} <= checks


def test_the_data_directory_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    root.mkdir(mode=0o700)
    assert next(iter(data_dir_checks(root))).level == "ok"
    root.chmod(0o755)
    assert next(iter(data_dir_checks(root))).do == f"chmod 700 {root}"
    (tmp_path / "file").touch()
    assert next(iter(data_dir_checks(tmp_path / "file"))).level == "fail"
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "belongs to user" in next(iter(data_dir_checks(root))).found


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, level in ((0, "fail"), (2**29, "warn"), (2**40, "ok")):
        usage = type("Usage", (), {"free": free, "total": 2**41, "used": 0})()
        monkeypatch.setattr(doctor_checks.shutil, "disk_usage", lambda place, usage=usage: usage)
        assert list(data_dir_checks(tmp_path))[-1].level == level


def test_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for hard, level in ((256, "fail"), (4096, "warn"), (65536, "ok"), (-1, "ok")):
        monkeypatch.setattr(doctor_checks.resource, "getrlimit", lambda which, hard=hard: (hard, hard))
        assert files_check().level == level


@pytest.mark.parametrize(
    ("skew", "doubt", "level", "found"),
    [
        (0.0, 0.001, "ok", "within 1ms of the server's"),
        (5.0, 4.5, "ok", "within 4s of the server's"),
        (2.0, 0.0, "warn", "2s ahead of the server's"),
        (-90.0, 0.0, "fail", "1m 30s behind the server's"),
    ],
)
def test_clocks(skew: float, doubt: float, level: str, found: str) -> None:
    finding = judge_clock(skew, doubt)
    assert (finding.level, finding.found) == (level, found)


def test_kernel_features_that_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of which nothing is known: each lack names its price."""
    monkeypatch.setattr(doctor_checks, "PROC", tmp_path / "proc")
    monkeypatch.setattr(doctor_checks, "CGROUPS", tmp_path / "cgroup")
    assert [finding.check for finding in kernel_checks("none")] == ["landlock", "seccomp"]
    assert cgroup_check().level == "warn"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/mine\n")
    (tmp_path / "cgroup/mine").mkdir(parents=True)
    (tmp_path / "cgroup/cgroup.controllers").touch()
    assert "not delegated" in cgroup_check().found
    (tmp_path / "cgroup/mine/cgroup.procs").touch()
    (tmp_path / "cgroup/mine/cgroup.controllers").write_text("cpu memory\n")
    assert "without pids" in cgroup_check().found
    (tmp_path / "cgroup/mine/cgroup.controllers").write_text("cpu memory pids\n")
    assert cgroup_check().level == "ok"


# -- errors


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (errors.NotFound("x"), 3),
        (errors.Conflict("x"), 4),
        (errors.InvalidCommand("x"), 2),
        (errors.InvalidSpec("x"), 4),
        (errors.Unavailable("a node's own"), 4),
        (errors.Configuration("x"), 4),
        (NoAnswer("x"), 5),
        (NoResponders("x"), 5),
        (NotConnected("x"), 5),
        (JetStreamError(503, 1, "x"), 4),
    ],
)
def test_exit_codes(failure: ContractError, code: int) -> None:
    assert exit_code(failure) == code


def test_sentences_name_the_field_once() -> None:
    assert sentence(errors.InvalidSpec("must be positive", field="spec.cpu")) == "spec.cpu: must be positive"
    assert sentence(errors.InvalidSpec("spec.cpu is bad", field="spec.cpu")) == "spec.cpu is bad"
    assert sentence(errors.Internal("oops")) == "oops; the worker's log says more"
    assert sentence(errors.Conflict("")) == str(ErrorCode.CONFLICT)


def test_a_bug_of_ours_is_one_line_and_can_be_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("worker.cli.completion.SCRIPTS", {})
    assert run(["completion", "bash"]) == 2
    monkeypatch.setattr("worker.cli.schema_cmd.Path", None)
    assert run(["schema", "export"]) == 4
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: a bug of ours: TypeError")
    monkeypatch.setenv("SANDFLEET_DEBUG", "1")
    with pytest.raises(TypeError):
        run(["schema", "export"])


def test_a_reader_that_goes_away_ends_it_quietly(tmp_path: Path) -> None:
    line = f"{sys.executable} -m worker --help | head -1; echo ${{PIPESTATUS[0]}}"
    said = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert said.stdout.startswith("Usage: sandfleet COMMAND")
    assert said.stderr == ""


def test_help_and_version_need_no_framework() -> None:
    program = (
        "import sys; from worker.cli.app import run; run(['--version']); run(['--help']);"
        "print([name for name in ('nats', 'rich', 'msgspec', 'asyncio', 'uvloop') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "[]"


def test_every_verb_has_its_functions() -> None:
    from importlib import import_module

    for verb in BY_NAME.values():
        module = import_module(f"worker.cli.{verb.module}")
        assert callable(getattr(module, f"verb_{verb.function}"))
