"""The file by which a running `dev` is found: the user's own, and never a dead one's."""

import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from worker.cli.devfile import DevFile, DevLock, dev_data_dir, directory, find
from worker.errors import Configuration

FILE = DevFile(
    url="nats://127.0.0.1:4333",
    token="a/b c",
    node="mac",
    pid=1,
    started=datetime(2026, 1, 1, tzinfo=UTC),
    data_dir="/data",
)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)}


def test_a_running_one_is_found_and_an_ended_one_is_not(env: dict[str, str]) -> None:
    assert find(env) is None
    lock = DevLock.take(env)
    assert find(env) is None
    lock.publish(FILE)
    assert find(env) == FILE
    lock.close()
    assert find(env) is None
    assert not (directory(env) / "dev.json").exists()


def test_only_its_user_may_read_it(env: dict[str, str]) -> None:
    lock = DevLock.take(env)
    lock.publish(FILE)
    folder = directory(env)
    assert stat.S_IMODE((folder / "dev.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in sorted(folder.iterdir())] == ["dev.json", "dev.lock"]
    lock.close()


def test_what_a_killed_one_left_behind_is_ignored(env: dict[str, str]) -> None:
    folder = directory(env)
    folder.mkdir(mode=0o700)
    (folder / "dev.json").write_text(json.dumps({"url": "nats://127.0.0.1:1"}))
    (folder / "dev.lock").touch()
    assert find(env) is None
    DevLock.take(env).close()


def test_a_second_one_is_told_who_runs(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.cli.devfile.LOCK_TRIES", 2)
    first = DevLock.take(env)
    first.publish(FILE)
    with pytest.raises(Configuration, match=r"already running \(pid 1, since 2026-01-01 00:00 UTC\)"):
        DevLock.take(env)
    first.close()


def test_the_lock_ends_with_its_process(env: dict[str, str]) -> None:
    program = (
        "import sys; from worker.cli.devfile import DevLock; import os;"
        "lock = DevLock.take(dict(os.environ)); print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **env},
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        (directory(env) / "dev.json").write_bytes(b"half {")
        assert find(env) is None
        child.kill()
        child.wait()
        DevLock.take(env).close()
    finally:
        child.kill()
        child.communicate()


def test_the_token_is_quoted_in_the_url() -> None:
    assert FILE.url_with_token() == "nats://a%2Fb%20c@127.0.0.1:4333"


def test_without_a_runtime_directory_it_stands_beside_the_data(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": "relative"}
    assert directory(env) == dev_data_dir(env) / "run"
    assert dev_data_dir(env).name == "sandfleet-dev"
