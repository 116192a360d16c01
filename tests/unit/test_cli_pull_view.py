"""What a terminal shows of a pull."""

import asyncio
from datetime import UTC, datetime

import pytest

from schemas.events import ImagePhase, ImageProgress, LayerProgress
from tests.unit.test_cli_output import Terminal, pipe, text_of
from worker.cli.output import Output
from worker.cli.pull_view import PullView

MIB = 1 << 20


def progress(image: str = "app:1", phase: ImagePhase = ImagePhase.DOWNLOADING) -> ImageProgress:
    layers = (
        LayerProgress(digest="sha256:" + "a" * 64, bytes_done=MIB, bytes_total=2 * MIB),
        LayerProgress(digest="sha256:" + "b" * 64, bytes_done=3 * MIB, bytes_total=3 * MIB),
    )
    return ImageProgress(
        node="n",
        time=datetime.now(UTC),
        image=image,
        layers=2,
        bytes_done=4 * MIB,
        bytes_total=5 * MIB,
        phase=phase,
        by_layer=layers,
    )


async def shows(terminal: Terminal, text: str) -> None:
    async with asyncio.timeout(10):
        while text not in terminal.text():
            await asyncio.sleep(0.01)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.cli.output.SPINNER_AFTER_S", 0.0)


@pytest.mark.usefixtures("at_once")
async def test_each_layer_has_its_bar() -> None:
    terminal = Terminal()
    out = Output(stdout=pipe(), stderr=terminal)
    async with PullView(out, "app:1") as view:
        await shows(terminal, "pulling app:1")
        view.show(progress(image="another"))
        view.show(progress())
        for text in ("4.0 MiB of 5.0 MiB  fetching", "aaaaaaaaaaaa", "1.0 MiB of 2.0 MiB", "bbbbbbbbbbbb"):
            await shows(terminal, text)
        assert "another" not in terminal.text()
        out.warning("the node is away")  # takes it off, and it comes back
        await shows(terminal, "the node is away")
        before = len(terminal.text())
        view.show(progress(phase=ImagePhase("later")))
        async with asyncio.timeout(10):
            while "later" not in terminal.text()[before:]:
                await asyncio.sleep(0.01)
    after = terminal.text()
    out.line("done")
    assert terminal.text() == after  # nothing is shown any more


@pytest.mark.usefixtures("at_once")
async def test_no_bars_without_a_terminal() -> None:
    stderr = pipe()
    async with PullView(Output(stdout=pipe(), stderr=stderr), "app:1") as view:
        view.show(progress())
        await asyncio.sleep(0)
    assert text_of(stderr) == ""


@pytest.mark.usefixtures("at_once")
async def test_no_bars_for_json() -> None:
    terminal = Terminal()
    async with PullView(Output(as_json=True, stdout=pipe(), stderr=terminal), "app:1") as view:
        view.show(progress())
        await asyncio.sleep(0)
    assert terminal.text() == ""


async def test_a_quick_pull_shows_nothing() -> None:
    terminal = Terminal()
    async with PullView(Output(stdout=pipe(), stderr=terminal), "app:1") as view:
        view.show(progress())
    assert terminal.text() == ""
