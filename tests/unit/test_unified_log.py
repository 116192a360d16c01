"""Running the log tool: what it is told, and what becomes of one that hangs, floods, fails or is not there."""

import asyncio
import json
import os
import stat
from pathlib import Path

import pytest

from worker.errors import DeadlineExceeded, Internal, Unavailable
from worker.platform.darwin.unified_log import MAX_PIDS, UnifiedLog, show_arguments

INSTANCE = "01JDDAAAAAAAAAAAAAAAAAAAAA"


def tool(folder: Path, script: str) -> str:
    path = folder / "log"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


async def read(program: str, *, time_limit_s: float = 20.0, max_bytes: int = 2**20) -> tuple[bytes, bool]:
    log = UnifiedLog(program, time_limit_s=time_limit_s, max_bytes=max_bytes)
    return tuple(await log.read(INSTANCE, pids=(7,), last_s=90))


def gone(pid_file: Path) -> bool:
    try:
        os.kill(int(pid_file.read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_the_question() -> None:
    arguments = show_arguments(INSTANCE, pids=(77, 8), last_s=89.2)
    assert arguments[:5] == ["show", "--style", "ndjson", "--last", "90s"]
    assert arguments[5] == "--predicate"
    assert arguments[6:] == [
        '((processID == 0 AND (senderImagePath CONTAINS "/Sandbox" OR '
        'subsystem == "com.apple.sandbox.reporting")) OR process == "sandboxd") AND '
        f'(eventMessage CONTAINS "sandfleet:{INSTANCE}" OR eventMessage CONTAINS "(8) deny(" '
        'OR eventMessage CONTAINS "(77) deny(")'
    ]
    assert show_arguments(INSTANCE, pids=(), last_s=0)[4] == "1s"
    assert show_arguments(INSTANCE, pids=range(1, 1000), last_s=1)[6].count("deny(") == MAX_PIDS


@pytest.mark.parametrize("instance", ["", 'x" OR 1==1 OR "', "a b", "a\n", "x" * 65, "é"])
def test_a_tag_that_is_not_ours_reaches_no_predicate(instance: str) -> None:
    with pytest.raises(Internal):
        show_arguments(instance, pids=(), last_s=1)


async def test_what_the_tool_prints_and_is_given(tmp_path: Path) -> None:
    program = tool(tmp_path, 'printf "%s\\n" "$@"; pwd; env | sort; printf "\\377\\376"')
    raw, cut = await read(program)
    lines = raw.split(b"\n")
    assert lines[0] == b"show"
    assert b"/" in lines
    assert not [line for line in lines if line.startswith((b"HOME=", b"SANDFLEET", b"PYTEST"))]
    assert lines[-1] == b"\xff\xfe"
    assert not cut


async def test_only_the_newest_of_much_is_kept(tmp_path: Path) -> None:
    record = json.dumps({"eventMessage": "x" * 990})
    script = f"i=0; while [ $i -lt 4000 ]; do echo '{record}'; i=$((i+1)); done; echo last"
    raw, cut = await read(tool(tmp_path, script), max_bytes=100_000)
    assert cut
    lines = raw.split(b"\n")
    assert lines[-2:] == [b"last", b""]
    assert {line for line in lines[:-2]} == {record.encode()}
    assert 90_000 < len(raw) <= 100_000


async def test_one_endless_line_is_not_kept(tmp_path: Path) -> None:
    raw, cut = await read(tool(tmp_path, "head -c 3000000 /dev/zero"), max_bytes=100_000)
    assert (raw, cut) == (b"", True)


@pytest.mark.parametrize("flood", ["", "yes &\n", "yes >&2 &\n"])
async def test_a_tool_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path, flood: str) -> None:
    shell, child = tmp_path / "shell", tmp_path / "child"
    program = tool(tmp_path, f"{flood}sleep 600 &\necho $! > {child}\necho $$ > {shell}\nwait\n")
    with pytest.raises(DeadlineExceeded, match="shorter time") as caught:
        await read(program, time_limit_s=1.0)
    assert caught.value.field == "since_s"
    assert gone(shell)
    async with asyncio.timeout(10):
        while not gone(child):  # init has yet to reap it
            await asyncio.sleep(0.01)


async def test_a_reading_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    shell = tmp_path / "shell"
    program = tool(tmp_path, f"echo $$ > {shell}.new; mv {shell}.new {shell}; exec sleep 600")
    reading = asyncio.create_task(read(program))
    async with asyncio.timeout(10):
        while not shell.exists():
            await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert gone(shell)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'log: Cannot run while sandboxed' >&2; exit 64", "Cannot run while sandboxed (exit 64)"),
        (
            "echo 'log: Could not open local log store: Operation not permitted' >&2; exit 64",
            "the worker's user must be one",
        ),
        ("echo '{}'; exit 3", "it ended (exit 3)"),
        ("printf 'a\\033[31m\\377b' >&2; exit 1", "a?[31m?b (exit 1)"),
        ("echo dying >&2; kill -9 $$", "dying (exit -9)"),
    ],
)
async def test_a_tool_that_fails_says_why(tmp_path: Path, script: str, words: str) -> None:
    with pytest.raises(Unavailable) as caught:
        await read(tool(tmp_path, script))
    assert words in caught.value.message
    assert len(caught.value.message) < 400


async def test_no_tool(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot be run: No such file"):
        await read(str(tmp_path / "log"))
    (tmp_path / "log").write_text("#!/bin/sh\n")
    with pytest.raises(Unavailable, match="cannot be run: Permission denied"):
        await read(str(tmp_path / "log"))


async def test_one_reading_at_a_time(tmp_path: Path) -> None:
    """Each takes a processor for a second or more on a Mac."""
    lock = tmp_path / "lock"
    log = UnifiedLog(tool(tmp_path, f"mkdir {lock} || exit 9; rmdir {lock}; echo ok"))
    async with asyncio.TaskGroup() as tasks:
        readings = [tasks.create_task(log.read(INSTANCE, pids=(), last_s=1)) for _ in range(8)]
    assert [one.result().raw for one in readings] == [b"ok\n"] * 8
