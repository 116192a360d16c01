"""Where log lines go: coloured and short on a terminal, JSON for everything else, and never with a secret.

Everything logs through loguru; what logs through the standard library, and Python's warnings, are led there too.
Values of variables are never shown: `diagnose` is off, and exceptions are formatted here.
"""

import contextlib
import logging
import math
import os
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

import orjson
from loguru import logger

from worker.errors import Configuration
from worker.redact import Redactor

if TYPE_CHECKING:
    from loguru import Message, Record

LEVELS = ("TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL")

_SHORT = {"SUCCESS": "OK", "WARNING": "WARN", "CRITICAL": "CRIT"}
_COLOURS = {
    "TRACE": "2",
    "DEBUG": "2",
    "INFO": "34",
    "SUCCESS": "32",
    "WARNING": "33",
    "ERROR": "31",
    "CRITICAL": "1;31",
}
_MAX_DEPTH = 6
_MAX_INT = 1 << 63
# A container's output or a user's text in a message must not steer the terminal.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}

_redactor = Redactor()
register_secret = _redactor.add
forget_secret = _redactor.discard


def setup_logging(
    level: str,
    json: bool | None,
    *,
    stream: TextIO | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Send all logging to `stream` (standard error). `json` None: JSON unless it is a terminal.

    Configuration when there is no such level.
    """
    if level.upper() not in LEVELS:
        names = ", ".join(LEVELS)
        raise Configuration(f"{level[:40]!r} is no log level: must be one of {names}", field="log_level")
    target = sys.stderr if stream is None else stream
    env = os.environ if env is None else env
    terminal = target.isatty()
    as_json = not terminal if json is None else json
    colour = terminal and not env.get("NO_COLOR") and env.get("TERM") != "dumb"

    def sink(message: "Message") -> None:
        record = message.record
        try:
            line = json_line(record, _redactor) if as_json else text_line(record, _redactor, colour=colour)
        except Exception as failure:
            # Left to loguru, the record would be printed as it is, with every secret.
            line = f"a log line of {record['name']} could not be formatted: {type(failure).__name__}\n"
        # Nobody reads a closed pipe any more; the work goes on.
        with contextlib.suppress(OSError, ValueError):
            target.write(line)
            target.flush()

    logger.remove()
    logger.add(
        sink, level=level.upper(), format=lambda record: "", colorize=False, backtrace=False, diagnose=False
    )
    _intercept_standard_library(logger.level(level.upper()).no)


def json_line(record: "Record", redactor: Redactor) -> str:
    """One line: time, level, logger, message, extra, exception; all there, null where there is nothing."""
    fields = {
        "time": _as_utc(record["time"]),
        "level": record["level"].name,
        "logger": record["name"],
        "message": record["message"],
        "extra": record["extra"],
        "exception": _exception(record),
    }
    scrubbed = {name: _plain(value, redactor, 0) for name, value in fields.items()}
    return orjson.dumps(scrubbed, option=orjson.OPT_APPEND_NEWLINE).decode()


def text_line(record: "Record", redactor: Redactor, *, colour: bool) -> str:
    """One line, more only for a message or an exception that has more."""
    level = record["level"].name
    name = (record["name"] or "").removeprefix("worker.")
    extra = "".join(f"  {key}={_text(value, redactor)}" for key, value in record["extra"].items())
    message = redactor.scrub(record["message"])
    exception = _exception(record)
    if exception is not None:
        message = f"{message}\n{redactor.scrub(exception)}"
    return "".join(
        (
            _paint(f"{record['time']:%H:%M:%S}.{record['time'].microsecond // 1000:03d}", "2", colour),
            " ",
            _paint(f"{_SHORT.get(level, level):<5}", _COLOURS.get(level, "0"), colour),
            " ",
            _paint(f"{_printable(redactor.scrub(name)):<14}", "2", colour),
            " ",
            _printable(message).rstrip("\n").replace("\n", "\n    "),
            _paint(_printable(redactor.scrub(extra)).replace("\n", " "), "2", colour) if extra else "",
            "\n",
        )
    )


def _paint(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text


def _printable(text: str) -> str:
    return _encodable(text).translate(_CONTROLS)


def _encodable(text: str) -> str:
    """Lone surrogates come from file names that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _as_utc(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _exception(record: "Record") -> str | None:
    found = record["exception"]
    if found is None or found.value is None:
        return None
    return "".join(traceback.format_exception(found.type, found.value, found.traceback))


def _plain(value: Any, redactor: Redactor, depth: int) -> Any:
    """What orjson takes, without secrets."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Mapping) and depth < _MAX_DEPTH:
        return {_text(key, redactor): _plain(part, redactor, depth + 1) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset) and depth < _MAX_DEPTH:
        return [_plain(part, redactor, depth + 1) for part in value]
    text = _text(value, redactor)
    fits = (isinstance(value, int) and -_MAX_INT <= value < _MAX_INT) or (
        isinstance(value, float) and math.isfinite(value)
    )
    # A number may be a secret too.
    return value if fits and text == str(value) else text


def _text(value: Any, redactor: Redactor) -> str:
    try:
        text = value if type(value) is str else str(value)
    except Exception as failure:
        text = f"<{type(value).__name__} that cannot be shown: {type(failure).__name__}>"
    return _encodable(redactor.scrub(text))


# -- the standard library


class _Intercept(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
            if record.name == "py.warnings":
                # "file:line: Category: text", and below it the line of source, which says nothing more.
                message = message.strip().partition("\n")[0]
            level: str | int = record.levelname if record.levelname in LEVELS else record.levelno
            named = logger.patch(lambda line: line.update({"name": record.name}))
            named.opt(exception=record.exc_info).log(level, "{}", message)
        except Exception:
            self.handleError(record)


def _intercept_standard_library(level: int) -> None:
    logging.basicConfig(handlers=[_Intercept()], level=level, force=True)
    # Libraries that brought handlers of their own would write past ours.
    for name in list(logging.root.manager.loggerDict):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.captureWarnings(True)
