"""What a worker has loaded when it says that it is ready: not what only some containers, queries or operators need."""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.acceptance.harness import Fleet, Worker, until

# Asked for by nobody who only starts, stops, adopts and ships: each family by modules that load the rest of it.
NOT_YET = {
    "evaluators": ("worker.answers", "worker.profiles", "worker.remedies", "worker.platform.darwin.evaluate"),
    "registries": (
        "worker.images.fetching",
        "worker.images.registry.client",
        "worker.images.registry.transport",
    ),
    "archives": ("worker.images.unpack", "worker.images.pack", "worker.images.archive", "worker.images.push"),
    "s3 volumes": ("worker.volume_s3.client", "worker.volume_s3.sync"),
    "the command line's client": ("worker.client", "worker.client_streams"),
}
# Installed or not, and a good part of a second each.
HEAVY = ("botocore", "http.client", "nkeys", "nacl", "rich", "typer", "yaml", "jwt", "httpx", "pydantic")

# A worker that writes down what it has loaded when it is sent SIGUSR2.
PROBE = """
import json, os, signal, sys
out = sys.argv.pop(1)
def tell(*_):
    with open(out + ".new", "w") as file:
        json.dump(sorted(sys.modules), file)
    os.rename(out + ".new", out)
signal.signal(signal.SIGUSR2, tell)
from worker.__main__ import main
main()
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a Mac loads the rules of a Mac")


class ProbedWorker(Worker):
    @property
    def told(self) -> Path:
        return self.folder / "loaded.json"

    def argv(self, *extra: str) -> list[str]:
        return [sys.executable, "-c", PROBE, str(self.told), *super().argv(*extra)[1:]]

    async def loaded(self) -> set[str]:
        assert self.process is not None
        self.told.unlink(missing_ok=True)
        os.kill(self.process.pid, signal.SIGUSR2)
        await until(self.told.exists, what="the list of modules")
        return set(json.loads(self.told.read_text()))


async def test_a_worker_that_is_ready_has_loaded_what_it_needs_and_no_more() -> None:
    fleet = Fleet()
    fleet.worker = ProbedWorker(fleet.worker.folder, fleet.server, fleet.worker.node)
    async with fleet:
        at_ready = await fleet.worker.loaded()
        assert "worker.serving" in at_ready  # it is a list of what is loaded
        families = {name: sorted(at_ready.intersection(modules)) for name, modules in NOT_YET.items()}
        assert families == {name: [] for name in NOT_YET}
        assert at_ready.isdisjoint(HEAVY)
        # What was put off is there when it is asked for.
        spec = {"image": {"name": "no-image"}, "command": {"args": ["/bin/true"]}}
        shown = await fleet.client.query("profile", service="a", replica=0, spec=spec)
        assert shown["text"], shown
        checked = await fleet.client.query(
            "check", service="a", replica=0, spec=spec, operation="read", argument="/etc/shadow"
        )
        assert checked["decision"] == "deny", checked
        pulled = await fleet.client.do(None, "pull_image", image="127.0.0.1:1/none:1", policy="always")
        assert pulled["error"]["code"] in ("pull_failed", "policy_denied"), pulled
        later = await fleet.worker.loaded()
        assert {"worker.answers", "worker.images.fetching"} <= later


@pytest.mark.parametrize("module", sorted(module for family in NOT_YET.values() for module in family))
def test_the_names_above_are_names_of_modules(module: str) -> None:
    assert importlib.util.find_spec(module) is not None
