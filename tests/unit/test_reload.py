"""A configuration read again: what takes effect, what waits for a restart, and that an error changes nothing."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loguru import logger

from worker.config import Config, load_config
from worker.reload import Reloader, compare, is_live, merge
from worker.sd_notify import Notifier
from worker.settings import BY_KEY

BEFORE = """
[nats]
url = "nats://user:password@127.0.0.1:4222"

[node]
name = "n1"

[policy]
read = ["/srv/a"]
max_containers = 5
"""
AFTER = """
[nats]
url = "nats://user:secret@127.0.0.1:4222"
tls = {ca = "/etc/ca.pem"}

[node]
name = "n1"
slots = 3
on_shutdown = "stop"

[policy]
read = ["/srv/b"]
images = ["base*"]
"""


class Node:
    """Goes by a configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.granted = 0

    def grant(self, config: Config) -> None:
        self.config = config
        self.granted += 1


class Recorder(Notifier):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    def _send(self, message: str) -> None:
        self.sent.append(message.partition("\n")[0])


@pytest.fixture
def lines() -> Iterator[list[tuple[str, str]]]:
    found: list[tuple[str, str]] = []
    number = logger.add(lambda m: found.append((m.record["level"].name, m.record["message"])))
    yield found
    logger.remove(number)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "node.toml"
    path.write_text(BEFORE)
    path.chmod(0o600)
    return path


def reader(path: Path, **flags: object) -> Callable[[], Config]:
    return lambda: load_config(path, {}, {key.replace("_", ".", 1): value for key, value in flags.items()})


async def reload(node: Node, read: Callable[[], Config]) -> list[str]:
    """One reload; what the service manager was told."""
    notifier = Recorder()
    reloader = Reloader(read, notifier)
    reloader.ask()
    task = asyncio.create_task(reloader.run(node))
    async with asyncio.timeout(10):
        while notifier.sent[-1:] != ["READY=1"]:
            await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return notifier.sent


def test_what_differs_is_named_in_the_order_of_the_settings(file: Path) -> None:
    before = reader(file)()
    file.write_text(AFTER)
    difference = compare(before, reader(file)())
    assert difference.taken == ("node.on_shutdown", "policy.read", "policy.images", "policy.max_containers")
    assert difference.waiting == ("nats.url", "nats.tls.ca", "node.slots")


def test_only_what_is_live_is_taken(file: Path) -> None:
    before = reader(file)()
    file.write_text(AFTER)
    after = reader(file)()
    merged = merge(before, after)
    assert merged.policy == after.policy
    assert merged.node.on_shutdown == "stop"
    assert merged.nats == before.nats
    assert merged.node.slots is None
    assert compare(merged, after).taken == ()
    assert compare(merged, after).waiting == ("nats.url", "nats.tls.ca", "node.slots")
    assert {key for key in merged.origins if is_live(key)} == {
        "node.on_shutdown",
        "policy.read",
        "policy.images",
    }


def test_every_key_of_the_policy_is_live_and_what_decides_who_we_are_is_not() -> None:
    assert all(is_live(key) for key in BY_KEY if key.startswith("policy."))
    assert not any(is_live(key) for key in ("nats.url", "nats.creds", "node.name", "node.data_dir"))


async def test_a_reload(file: Path, lines: list[tuple[str, str]]) -> None:
    node = Node(reader(file)())
    file.write_text(AFTER)
    assert await reload(node, reader(file)) == ["RELOADING=1", "READY=1"]
    assert node.config.policy.read == ("/srv/b",)
    assert lines == [
        (
            "INFO",
            f"{file} was read again; changed: node.on_shutdown, policy.read, policy.images, policy.max_containers",
        ),
        ("WARNING", "waits for a restart of the worker: nats.url, nats.tls.ca, node.slots"),
    ]
    assert not any("secret" in text or "password" in text for _, text in lines)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (AFTER.replace("[policy]", "[policy]\nnetwrok = []"), "policy.netwrok"),
        (AFTER.replace('"/srv/b"', '"srv"'), "policy.read"),
        (AFTER.replace("slots = 3", "slots = 0"), "node.slots"),
        (AFTER.replace("[policy]", "[policy"), "is no TOML"),
    ],
)
async def test_an_error_changes_nothing(
    file: Path, lines: list[tuple[str, str]], text: str, named: str
) -> None:
    node = Node(reader(file)())
    before = node.config
    file.write_text(text)
    assert await reload(node, reader(file)) == ["RELOADING=1", "READY=1"]
    assert node.config is before
    ((level, said),) = lines
    assert level == "ERROR"
    assert said.startswith("the policy stays as it was: ")
    assert "\n" not in said
    assert str(file) in said
    assert named in said


async def test_a_file_that_is_gone_or_open_to_all_changes_nothing(
    file: Path, lines: list[tuple[str, str]]
) -> None:
    node = Node(reader(file)())
    file.chmod(0o666)
    await reload(node, reader(file))
    file.unlink()
    await reload(node, reader(file))
    assert node.granted == 0
    assert [level for level, _ in lines] == ["ERROR", "ERROR"]


async def test_the_same_file_is_said_to_change_nothing(file: Path, lines: list[tuple[str, str]]) -> None:
    node = Node(reader(file)())
    await reload(node, reader(file))
    assert node.granted == 0
    assert lines == [("INFO", f"{file} was read again; changed: nothing that takes effect without a restart")]


async def test_a_flag_goes_on_to_stand_above_the_file(file: Path) -> None:
    read = reader(file, policy_max_containers=7)
    node = Node(read())
    file.write_text(BEFORE.replace("max_containers = 5", "max_containers = 50"))
    await reload(node, read)
    assert node.config.policy.max_containers == 7


async def test_without_a_file_there_is_nothing_to_read(lines: list[tuple[str, str]]) -> None:
    node = Node(Config())
    await reload(node, Config)
    assert node.granted == 0
    assert lines[0][0] == "WARNING"
