"""What a person sees of a pull or push: a line for the image and one for each layer on its way."""

import asyncio
from typing import TYPE_CHECKING

from schemas.events import ImagePhase, ImageProgress
from worker.cli import output
from worker.cli.human import size
from worker.cli.output import Output
from worker.cli.style import clean, is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_DIGEST = slice(len("sha256:"), len("sha256:") + 12)
_WORDS = {
    ImagePhase.RESOLVING: "asking the registry",
    ImagePhase.DOWNLOADING: "fetching",
    ImagePhase.UNPACKING: "unpacking",
    ImagePhase.PACKING: "packing",
    ImagePhase.UPLOADING: "sending",
    ImagePhase.DONE: "done",
}


class PullView:
    """Bars on stderr once the pull has taken a moment; nothing where stderr is no terminal, or with --json."""

    def __init__(self, out: Output, image: str, *, doing: str = "pulling") -> None:
        self._out = out
        self._image = image
        self._doing = doing
        self._wanted = is_terminal(out.stderr) and not out.as_json
        self._display: Progress | None = None
        self._lines: dict[str, TaskID] = {}
        self._last: ImageProgress | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> "PullView":
        if self._wanted:
            self._out.cover(self)
            self._timer = asyncio.get_running_loop().call_later(output.SPINNER_AFTER_S, self._start)
        return self

    async def __aexit__(self, *failure: object) -> None:
        self.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._wanted:
            self._out.cover(None)

    def show(self, progress: ImageProgress) -> None:
        """The newest that the node told. Another image's is passed over."""
        if progress.image != self._image:
            return
        self._last = progress
        if self._display is not None:
            self._fill(self._display)

    def clear(self) -> None:
        """Off the terminal, for what is printed now. It comes back with the next news."""
        if self._display is not None:
            self._display.stop()
            self._display = None
            self._timer = asyncio.get_running_loop().call_later(output.SPINNER_AFTER_S, self._start)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        console = Console(file=self._out.stderr, highlight=False, markup=False)
        self._display = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._lines = {}
        self._fill(self._display)
        self._display.start()

    def _fill(self, display: "Progress") -> None:
        last = self._last
        if last is None:
            self._line(display, "", f"{self._doing} {clean(self._image)}", 0, None, "")
            return
        phase = _WORDS.get(last.phase, str(last.phase)) if last.phase is not None else ""
        share = f"{size(last.bytes_done)} of {size(last.bytes_total)}" if last.bytes_total else ""
        detail = "  ".join(filter(None, (share, clean(phase))))
        self._line(
            display, "", f"{self._doing} {clean(self._image)}", last.bytes_done, last.bytes_total, detail
        )
        for layer in last.by_layer:
            done, total = layer.bytes_done, layer.bytes_total
            detail = size(total) if done >= total else f"{size(done)} of {size(total)}"
            self._line(display, layer.digest, clean(layer.digest[_DIGEST]), done, total, detail)

    def _line(
        self, display: "Progress", key: str, text: str, done: int, total: int | None, detail: str
    ) -> None:
        line = self._lines.get(key)
        if line is None:
            self._lines[key] = display.add_task(text, completed=done, total=total, detail=detail)
        else:
            display.update(line, completed=done, total=total, detail=detail)
