"""`sandfleet dev` and the other verbs as a person uses them: whole processes, a real server, real sandboxes."""

import contextlib
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

SANDFLEET = Path(sys.executable).parent / "sandfleet"
DEADLINE_S = 30.0

pytestmark = pytest.mark.timeout(120)


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition, with a deadline."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def environment(home: Path) -> dict[str, str]:
    """A user of its own: no settings, no running dev but the one under test."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SANDFLEET_")}
    return {**env, "XDG_RUNTIME_DIR": str(home / "run"), "NO_COLOR": "1", "COLUMNS": "80"}


class Dev:
    """A running `sandfleet dev`."""

    def __init__(self, home: Path, *options: str) -> None:
        self.home = home
        self.env = environment(home)
        (home / "run").mkdir(exist_ok=True)
        self.out_path, self.err_path = home / "dev.out", home / "dev.err"
        with self.out_path.open("wb") as out, self.err_path.open("wb") as err:
            self.process = subprocess.Popen(
                [SANDFLEET, "dev", "--data-dir", home / "data", "--node", "mac", *options],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=home,
                env=self.env,
            )
        try:
            until(self.ready, "dev did not become ready")
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def ready(self) -> bool:
        assert self.process.poll() is None, self.said()
        return "Ctrl-C" in self.out_path.read_text()

    def said(self) -> str:
        return self.out_path.read_text() + self.err_path.read_text()

    def run(self, *words: object, check: bool = True, **more: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [SANDFLEET, *map(str, words)],
            capture_output=True,
            text=True,
            env=self.env,
            cwd=self.home,
            timeout=DEADLINE_S,
            **more,  # type: ignore[call-overload]
        )
        assert "Traceback" not in done.stderr, done.stderr
        if check:
            assert done.returncode == 0, done.stderr + self.said()
        return done  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def started(self, *words: object) -> Iterator["subprocess.Popen[bytes]"]:
        """A verb that goes on, killed at the end if it still does."""
        with subprocess.Popen(
            [SANDFLEET, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.env,
            cwd=self.home,
            # As in a terminal: a suite in the background of a script hands on an ignored Ctrl-C.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def left(self) -> list[str]:
        return list(processes_of(self.home).values())


def processes_of(home: Path) -> dict[int, str]:
    """Living processes that were started for this home, by their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has just ended
            if str(home) in line:
                found[int(entry.name)] = line
    return found


def make_home() -> Iterator[Path]:
    """A short path, as a unix socket's must be; whatever still runs there afterwards is ended."""
    home = Path(tempfile.mkdtemp(prefix="sandfleet-cli-"))
    yield home
    for pid in processes_of(home):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not processes_of(home), "processes that cannot be killed")
    shutil.rmtree(home, ignore_errors=True)


module_home = pytest.fixture(make_home, scope="module", name="module_home")
home = pytest.fixture(make_home, name="home")


@pytest.fixture(scope="module")
def dev(module_home: Path) -> Iterator[Dev]:
    """One `dev` with an image called `demo`."""
    dev = Dev(module_home)
    try:
        (module_home / "demo").mkdir()
        dev.run("register", "demo", "demo")
        yield dev
    finally:
        dev.end()


def test_run_wait_gives_output_and_exit_code(dev: Dev) -> None:
    done = dev.run("run", "--rm", "-w", "--name", "job", "demo", "--", "sh", "-c", "echo out; echo err >&2; exit 7",
                   check=False)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    done = dev.run("run", "--rm", "-w", "--name", "job", "demo", "--", "sh", "-c", "kill -9 $$", check=False)
    assert done.returncode == 137
    done = dev.run("run", "--rm", "-w", "--name", "job", "demo", "--", "no-such-program", check=False)
    assert done.returncode == 4
    assert "no-such-program" in done.stderr
    assert "job-0" not in dev.run("ps", "-q").stdout


def test_a_container_from_its_start_to_its_end(dev: Dev) -> None:
    assert dev.run("run", "demo", "--name", "web", "-p", "8080", "--", "sleep", "600").stdout == "web-0\n"
    listed = {one["container"]: one for one in json.loads(dev.run("ps", "--json").stdout)}
    assert listed["web-0"]["state"] == "running"
    assert listed["web-0"]["node"] == "mac"
    assert "web-0" in dev.run("ps").stdout
    again = dev.run("run", "demo", "--name", "web", "--", "sleep", "600", check=False)
    assert again.returncode == 4
    assert "--replace" in again.stderr
    pid = listed["web-0"]["pid"]
    os.kill(pid, 0)
    assert str(pid) in dev.run("inspect", "web").stdout
    assert json.loads(dev.run("stats", "--json", "web").stdout)[0]["processes"] >= 1
    done = dev.run("exec", "web", "sh", "-c", "echo $SANDFLEET_CONTAINER; exit 3", check=False)
    assert (done.returncode, done.stdout) == (3, "web-0\n")
    assert dev.run("exec", "-i", "web", "wc", "-c", input="hello").stdout.strip() == "5"
    assert dev.run("stop", "-t", "5", "web").stdout == "web-0\n"
    assert dev.run("wait", "web").stdout == "143\n"
    assert dev.run("start", "web").stdout == "web-0\n"
    dev.run("kill", "web")
    assert dev.run("wait", "web").stdout == "137\n"
    dev.run("rm", "web")
    assert dev.run("inspect", "web-0", check=False).returncode == 3
    events = [json.loads(line) for line in dev.run("events", "--json", "web-0").stdout.splitlines()]
    assert events[-1]["type"] == "command_completed"
    assert [event["status"]["state"] for event in events if event["type"] == "state_changed"][-1] == "removed"


def test_logs_are_exact_and_can_be_followed(dev: Dev) -> None:
    script = "i=0; while [ $i -lt 3000 ]; do echo line number $i of many; i=$((i+1)); done"
    wanted = b"".join(b"line number %d of many\n" % at for at in range(3000))
    dev.run("run", "demo", "--name", "writer", "--", "sh", "-c", script)
    raw = subprocess.run(
        [SANDFLEET, "logs", "-f", "--raw", "writer"], stdout=subprocess.PIPE, env=dev.env, timeout=DEADLINE_S, check=True
    ).stdout  # fmt: skip
    assert hashlib.sha256(raw).hexdigest() == hashlib.sha256(wanted).hexdigest()
    assert dev.run("logs", "writer").stdout.encode() == wanted
    assert dev.run("logs", "-n", "2", "writer").stdout.encode() == b"".join(wanted.splitlines(True)[-2:])
    assert dev.run("logs", "-f", "-n", "1", "writer").stdout.encode() == wanted.splitlines(True)[-1]
    dev.run("rm", "writer")
    assert dev.run("logs", "-n", "1", "writer-0").stdout.encode() == wanted.splitlines(True)[-1]


def test_a_reader_that_goes_away_ends_logs_quietly(dev: Dev) -> None:
    dev.run("run", "demo", "--name", "yes", "--", "sh", "-c", "while :; do echo yes; done")
    try:
        line = f"{SANDFLEET} logs -f yes | head -3; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, env=dev.env, timeout=DEADLINE_S, check=True
        )
        assert (done.stdout, done.stderr) == ("yes\nyes\nyes\n141\n", "")
    finally:
        dev.run("rm", "yes")


def test_ctrl_c_stops_what_run_wait_began(dev: Dev) -> None:
    words = ("run", "-w", "--name", "long", "demo", "--", "sh", "-c", "echo up; exec sleep 600")
    with dev.started(*words) as following:
        assert following.stdout is not None
        assert following.stdout.readline() == b"up\n"
        following.send_signal(signal.SIGINT)
        _, err = following.communicate(timeout=DEADLINE_S)
        assert following.returncode == 143
        assert b"stopping long-0" in err
    dev.run("rm", "long")


@pytest.mark.parametrize("words", [("events", "-f"), ("top", "--json", "-i", "100s")])
def test_ctrl_c_ends_what_follows_with_130(words: tuple[str, ...], dev: Dev) -> None:
    with dev.started(*words) as following:
        assert following.stdout is not None
        while words[0] == "events" and not select.select([following.stdout], [], [], 0.2)[0]:
            dev.run("tag", "demo", "demo:again")
        assert following.stdout.readline()
        following.send_signal(signal.SIGINT)
        _, err = following.communicate(timeout=DEADLINE_S)
        assert (following.returncode, err) == (130, b"")


def test_a_spec_file_with_several_services(dev: Dev) -> None:
    path = dev.home / "shop.yaml"
    path.write_text(
        "version: v1\ndeployment: shop\nservices:\n"
        "  front: {image: {name: demo}, command: {args: [sleep, '600']}, env: {KEY: very-secret}}\n"
        "  back: {image: {name: demo}, command: {args: [sleep, '600']}, labels: {tier: back}}\n"
    )
    assert sorted(dev.run("run", path).stdout.split()) == ["back-0", "front-0"]
    assert dev.run("ps", "-q", "-l", "tier=back").stdout == "back-0\n"
    shown = dev.run("inspect", "front").stdout
    assert "KEY" in shown
    assert "very-secret" not in shown
    assert "very-secret" in dev.run("inspect", "--show-env", "front").stdout
    assert "front-0" in dev.run("profile", "show", "front").stdout
    dev.run("rm", "front", "back")


def test_images_and_nodes(dev: Dev) -> None:
    dev.run("tag", "demo", "demo:2")
    assert {"demo", "demo:2"} <= {image["name"] for image in json.loads(dev.run("images", "--json").stdout)}
    dev.run("rmi", "demo:2")
    dev.run("prune")
    assert dev.run("register", "other", "/", check=False).returncode == 4
    assert dev.run("nodes", "-q").stdout == "mac\n"
    assert json.loads(dev.run("info", "--json").stdout)["node"] == "mac"
    dev.run("drain")
    assert "drained" in dev.run("nodes").stdout
    assert dev.run("run", "demo", "--name", "late", check=False).returncode == 4
    dev.run("resume")
    assert dev.run("doctor", check=False).returncode in (0, 4)
    findings = {
        one["check"]: one["level"] for one in json.loads(dev.run("doctor", "--json", check=False).stdout)
    }
    assert findings["server"] == findings["streams"] == findings["clock"] == findings["nodes"] == "ok"


def test_a_secret_reaches_the_worker_of_dev(dev: Dev) -> None:
    dev.run("secret", "set", "key", input="value\n")
    assert dev.run("secret", "ls").stdout == "key\n"
    assert (dev.home / "data" / "worker" / "secrets" / "key").read_text() == "value\n"
    dev.run("secret", "rm", "key")


def test_a_second_dev_is_refused(dev: Dev) -> None:
    done = dev.run("dev", "--data-dir", dev.home / "other", check=False)
    assert done.returncode == 4
    assert f"already running (pid {dev.process.pid}" in done.stderr
    assert not (dev.home / "other").exists()


def test_names_are_completed(dev: Dev) -> None:
    dev.run("create", "demo", "--name", "made")
    assert dev.run("--completing", "start", "ma").stdout == "made-0\tpending\n"
    assert dev.run("--completing", "rmi", "dem").stdout.startswith("demo\timage\n")
    assert dev.run("--completing", "info", "--node", "").stdout == "mac\n"
    dev.run("rm", "made")


def test_ctrl_c_leaves_nothing_behind(home: Path) -> None:
    dev = Dev(home)
    try:
        (home / "demo").mkdir()
        dev.run("register", "demo", "demo")
        stubborn = "trap 'echo no' TERM; setsid sleep 600 & while :; do sleep 1; done"
        dev.run("run", "demo", "--name", "a", "--", "sleep", "600")
        dev.run("run", "demo", "--name", "b", "--", "sh", "-c", stubborn)
        pids = [one["pid"] for one in json.loads(dev.run("ps", "--json").stdout)]
        assert len(pids) == 2
        assert (home / "run" / "sandfleet" / "dev.json").stat().st_mode & 0o777 == 0o600
        dev.process.send_signal(signal.SIGINT)
        until(lambda: "stopping" in dev.err_path.read_text(), "no word of stopping")
        assert dev.end() == 0
    finally:
        dev.end()
    assert dev.left() == []
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not (home / "run" / "sandfleet" / "dev.json").exists()
    assert "Traceback" not in dev.said()
    assert dev.run("ps", check=False).returncode == 5
    again = Dev(home)
    try:
        states = {one["container"]: one["state"] for one in json.loads(again.run("ps", "--json").stdout)}
        assert states == {"a-0": "exited", "b-0": "exited"}
    finally:
        assert again.end() == 0


def test_a_killed_dev_is_forgotten_and_a_new_one_takes_over(home: Path) -> None:
    dev = Dev(home)
    (home / "demo").mkdir()
    dev.run("register", "demo", "demo")
    dev.run("run", "demo", "--name", "a", "--", "sleep", "600")
    pid = json.loads(dev.run("ps", "--json").stdout)[0]["pid"]
    dev.process.kill()
    dev.process.wait()
    assert (home / "run" / "sandfleet" / "dev.json").exists()
    assert dev.run("ps", check=False).returncode == 5
    os.kill(pid, 0)
    again = Dev(home)
    try:
        (one,) = json.loads(again.run("ps", "--json").stdout)
        assert (one["state"], one["pid"]) == ("running", pid)
    finally:
        assert again.end() == 0
    assert again.left() == []


def test_keep_leaves_the_containers_to_the_next_one(home: Path) -> None:
    dev = Dev(home, "--keep")
    (home / "demo").mkdir()
    dev.run("register", "demo", "demo")
    dev.run("run", "demo", "--name", "a", "--", "sleep", "600")
    pid = json.loads(dev.run("ps", "--json").stdout)[0]["pid"]
    assert dev.end() == 0
    os.kill(pid, 0)
    again = Dev(home)
    try:
        assert json.loads(again.run("ps", "--json").stdout)[0]["pid"] == pid
    finally:
        assert again.end() == 0
    assert again.left() == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_refuses_in_one_line(home: Path) -> None:
    env = environment(home)
    config = home / "node.toml"
    config.write_text("[node]\nnmae = 'x'\n")
    for words, message in (
        (("--config", str(config)), "unknown key 'node.nmae'"),
        (("--nats", "nats://127.0.0.1:1"), "no NATS credentials"),
        (("--data-dir", "/proc/nope", "--insecure"), "/proc/nope"),
    ):
        done = subprocess.run(
            [SANDFLEET, "worker", "--data-dir", str(home / "data"), *words],
            capture_output=True,
            text=True,
            env=env,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 4
        assert message in done.stderr.splitlines()[-1]
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in done.stderr
