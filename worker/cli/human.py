"""Sizes, ages and states as people read them. Pure."""

from datetime import UTC, datetime

from schemas.status import ContainerStatus, State
from worker.cli.output import Cell
from worker.cli.style import Style

STATE_STYLE: dict[str, Style] = {
    State.RUNNING: "good",
    State.PENDING: "warn",
    State.INITIALIZING: "warn",
    State.STOPPING: "warn",
    State.FAILED: "bad",
    State.EXITED: "",
    State.REMOVED: "dim",
}
DASH = Cell("-", "dim")


def now() -> datetime:
    return datetime.now(UTC)


def size(count: int | None) -> str:
    """`0 B`, `512 B`, `4.0 KiB`, `12.3 MiB`."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def span(seconds: float) -> str:
    """The two greatest units: `250ms`, `3s`, `1m 5s`, `2h 10m`, `4d 3h`."""
    if seconds < 0:
        seconds = 0
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    whole = int(seconds)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    parts = [
        f"{value}{unit}" for value, unit in ((days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")) if value
    ]
    return " ".join(parts[:2])


def brief(seconds: float) -> str:
    """The greatest unit alone: `now`, `3s`, `5m`, `2h`, `4d`."""
    if seconds < 1:
        return "now"
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "m"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{int(seconds // divisor)}{unit}"
    return f"{int(seconds // 86400)}d"


def age(moment: datetime | None, at: datetime | None = None) -> str:
    """`3m ago`, `now`."""
    if moment is None:
        return "-"
    text = brief(((at or now()) - moment).total_seconds())
    return text if text == "now" else f"{text} ago"


def clock(moment: datetime) -> str:
    """Local time of day to the millisecond, with the date when it is not today."""
    local = moment.astimezone()
    text = local.strftime("%H:%M:%S.") + f"{local.microsecond // 1000:03d}"
    return text if local.date() == datetime.now().astimezone().date() else f"{local:%Y-%m-%d} {text}"


def rfc3339(moment: datetime) -> str:
    """UTC, always to the microsecond, so that lines sort."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def stamp(moment: datetime | None) -> str:
    """RFC 3339 in UTC to the second, and how long ago."""
    if moment is None:
        return "-"
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}  ({age(moment)})"


def state_cell(status: ContainerStatus) -> Cell:
    """`running`, `exited 0`, `exited SIGKILL`, `failed`."""
    text = str(status.state)
    style = STATE_STYLE.get(status.state, "")
    if status.state == State.EXITED and status.exit_code is not None:
        text = f"exited {exit_name(status.exit_code)}"
        style = "dim" if status.exit_code == 0 else "bad"
        if status.exit_code != 0 and status.reason in ("stopped", "killed"):
            style = "dim"
    return Cell(text, style)


def exit_name(code: int) -> str:
    """An exit status as a number, a signal by its name."""
    import signal

    if code >= 0:
        return str(code)
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def since_cell(status: ContainerStatus, at: datetime) -> Cell:
    """Since when the container is in its state."""
    moment = status.finished_at or status.started_at or status.created_at
    if status.state in (State.RUNNING, State.STOPPING):
        moment = status.started_at or status.created_at
    elif status.state in (State.PENDING, State.INITIALIZING):
        moment = status.created_at
    return Cell(age(moment, at), "" if status.state == State.RUNNING else "dim")
