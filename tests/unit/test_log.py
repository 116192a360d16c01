import io
import json
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger

from worker.errors import Configuration
from worker.log import forget_secret, register_secret, setup_logging
from worker.redact import HIDDEN, Redactor

SECRET = "hunter2-and-more"


class Stream(io.StringIO):
    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def lines(self) -> list[str]:
        return self.getvalue().splitlines()

    def objects(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.lines()]


@pytest.fixture(autouse=True)
def everything_as_before() -> Iterator[None]:
    root = logging.root
    handlers, level, show = root.handlers[:], root.level, warnings.showwarning
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    warnings.showwarning = show
    logger.remove()
    logger.add(sys.stderr)


@pytest.fixture
def secret() -> Iterator[str]:
    register_secret(SECRET)
    yield SECRET
    forget_secret(SECRET)


def json_logs(level: str = "DEBUG") -> Stream:
    stream = Stream()
    setup_logging(level, None, stream=stream, env={})
    return stream


def terminal_logs(env: dict[str, str] | None = None) -> Stream:
    stream = Stream(terminal=True)
    setup_logging("DEBUG", None, stream=stream, env=env or {})
    return stream


# -- JSON


def test_a_json_line() -> None:
    stream = json_logs()
    logger.bind(container="web-0", seq=7, path=Path("/x")).info("started {}", "web")
    (line,) = stream.objects()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line.pop("time"))
    assert line == {
        "level": "INFO",
        "logger": __name__,
        "message": "started web",
        "extra": {"container": "web-0", "seq": 7, "path": "/x"},
        "exception": None,
    }


def test_an_exception_shows_no_values() -> None:
    stream = json_logs()
    password = "in-a-local-variable"
    try:
        _ = {"k": len(password)}["missing"]
    except KeyError:
        logger.exception("failed")
    (line,) = stream.objects()
    assert line["exception"].startswith("Traceback (most recent call last):")
    assert line["exception"].endswith("KeyError: 'missing'\n")
    assert password not in stream.getvalue().replace('password = "in-a-local-variable"', "")


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text()
            | st.binary()
            | st.complex_numbers(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers(), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=4,
    ),
    st.text(),
)
def test_whatever_is_logged_is_one_line_of_json(extra: dict[str, Any], message: str) -> None:
    stream = json_logs()
    logger.patch(lambda record: record["extra"].update(extra)).info("{}", message)
    assert len(stream.getvalue().split("\n")) == 2
    (line,) = [json.loads(part) for part in stream.getvalue().split("\n") if part]
    assert len(line["extra"]) <= len(extra)


def test_what_cannot_be_shown() -> None:
    class Bad:
        def __str__(self) -> str:
            raise RuntimeError("no")

    loop: list[Any] = []
    loop.append(loop)
    for make in (json_logs, terminal_logs):
        stream = make()
        logger.bind(bad=Bad(), loop=loop, big=1 << 80, name="\udcff").info("still there \udcff")
        assert "still there" in stream.getvalue()
        assert "Bad that cannot be shown" in stream.getvalue()
        assert stream.getvalue().encode()


def test_levels() -> None:
    stream = json_logs("warning")
    logger.info("no")
    logger.warning("yes")
    logging.getLogger("other").info("no")
    logging.getLogger("other").warning("yes")
    assert [line["message"] for line in stream.objects()] == ["yes", "yes"]
    with pytest.raises(Configuration, match="'LOUD' is no log level: must be one of TRACE"):
        setup_logging("LOUD", None)


# -- terminals


def test_a_line_on_a_terminal() -> None:
    stream = terminal_logs()
    logger.patch(lambda record: record.update({"name": "worker.bus.outbox"})).bind(seq=7).warning(
        "late by {} s", 3
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert plain != stream.getvalue()
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} WARN  bus\.outbox     late by 3 s  seq=7\n", plain)


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour(env: dict[str, str]) -> None:
    stream = terminal_logs(env)
    logger.info("plain")
    assert "\x1b" not in stream.getvalue()
    stream = terminal_logs({"NO_COLOR": "", "TERM": "xterm"})
    logger.info("coloured")
    assert "\x1b[" in stream.getvalue()


def test_the_format_can_be_chosen() -> None:
    stream = Stream(terminal=True)
    setup_logging("INFO", True, stream=stream, env={})
    logger.info("a")
    setup_logging("INFO", False, stream=(text := Stream()), env={})
    logger.info("b")
    assert stream.objects()[0]["message"] == "a"
    assert text.getvalue().endswith("b\n")
    assert "\x1b" not in text.getvalue()


def test_a_message_does_not_steer_the_terminal() -> None:
    stream = terminal_logs({"NO_COLOR": "1"})
    logger.bind(name="a\x1b[2Jb\nc").info("title \x1b]0;owned\x07\x9b2J\r <red>{x}</red>\nsecond line")
    first, second = stream.lines()
    assert "title \\x1b]0;owned\\x07\\x9b2J\\x0d <red>{x}</red>" in first
    assert second == "    second line  name=a\\x1b[2Jb c"


def test_an_exception_on_a_terminal() -> None:
    stream = terminal_logs({"NO_COLOR": "1"})
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("failed")
    assert stream.lines()[0].endswith("failed")
    assert stream.lines()[-1] == "    ValueError: broken"


# -- the standard library


def test_standard_logging_is_led_in() -> None:
    noisy = logging.getLogger("library.part")
    noisy.addHandler(logging.StreamHandler(own := io.StringIO()))
    noisy.propagate = False
    stream = json_logs()
    try:
        raise OSError("gone")
    except OSError:
        noisy.error("lost %s {braces}", "it", exc_info=True)
    noisy.log(25, "between")
    error, between = stream.objects()
    assert (error["logger"], error["level"], error["message"]) == (
        "library.part",
        "ERROR",
        "lost it {braces}",
    )
    assert error["exception"].endswith("OSError: gone\n")
    assert (between["message"], between["level"]) == ("between", "Level 25")
    assert own.getvalue() == ""


def test_a_malformed_call_of_the_standard_library_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    stream = json_logs()
    logging.getLogger("library").error("%d", "no number")
    logger.info("on")
    assert [line["message"] for line in stream.objects()] == ["on"]
    assert "Logging error" in capsys.readouterr().err


def test_warnings_are_led_in() -> None:
    stream = json_logs()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("old thing", DeprecationWarning, stacklevel=1)
    (line,) = stream.objects()
    assert (line["logger"], line["level"]) == ("py.warnings", "WARNING")
    assert re.fullmatch(r".*test_log\.py:\d+: DeprecationWarning: old thing", line["message"])


def test_lines_of_many_threads_stay_whole() -> None:
    stream = json_logs()
    threads = [threading.Thread(target=lambda: [logger.info("x" * 500) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stream.objects()) == 200


def test_a_closed_stream_ends_nothing(capsys: pytest.CaptureFixture[str], secret: str) -> None:
    stream = json_logs()
    stream.close()
    logger.info("nobody hears {}", secret)
    assert capsys.readouterr().err == ""


def test_a_line_that_cannot_be_formatted_leaks_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    def broken(*_: Any) -> str:
        raise RuntimeError(secret)

    stream = json_logs()
    monkeypatch.setattr("worker.log.json_line", broken)
    logger.info("got {}", secret)
    assert stream.getvalue() == f"a log line of {__name__} could not be formatted: RuntimeError\n"
    assert capsys.readouterr().err == ""


# -- secrets


def test_a_secret_is_in_no_line(secret: str) -> None:
    for make in (json_logs, terminal_logs):
        stream = make()
        logger.bind(url=f"nats://me:{secret}@host", deep={"a": [secret, {secret: 1}]}).info("got {}", secret)
        logging.getLogger("library").warning("sent %r", {"token": secret})
        try:
            raise ValueError(f"bad token {secret}")
        except ValueError:
            logger.exception("failed")
        assert secret not in stream.getvalue()
        assert stream.getvalue().count(HIDDEN) == 6


def test_a_number_can_be_a_secret() -> None:
    register_secret("123456")
    try:
        stream = json_logs()
        logger.bind(pin=123456, other=12345).info("x")
        assert stream.objects()[0]["extra"] == {"pin": HIDDEN, "other": 12345}
    finally:
        forget_secret("123456")


@pytest.mark.parametrize("value", ['"', "\\", "{", "1", "\n", "e"])
def test_a_strange_secret_breaks_no_json(value: str) -> None:
    register_secret(value)
    try:
        stream = json_logs()
        logger.bind(a={"b": value}).info("{}", f"<{value}>")
        (line,) = stream.objects()
        assert value.strip() == "" or value not in line["message"].replace(HIDDEN, "")
    finally:
        forget_secret(value)


def test_a_secret_is_known_in_its_other_forms() -> None:
    redactor = Redactor()
    redactor.add(b'pass "w\\rd"\n/+\xff')
    text = 'pass "w\\rd"\n/+\udcff'
    for shown in (text, repr(text), json.dumps(text), "u:pass%20%22w%5Crd%22%0A%2F%2B%FF@host"):
        assert "w" not in redactor.scrub(shown)
    key = "-----BEGIN KEY-----\nabcdefgh12345678\nshort\n-----END KEY-----\n"
    redactor.add(key)
    assert redactor.scrub("line abcdefgh12345678 of it, short") == f"line {HIDDEN} of it, short"


def test_of_two_secrets_the_longer_one_counts() -> None:
    redactor = Redactor()
    redactor.add("abc")
    redactor.add("abcdef")
    assert redactor.scrub("abcdef abc") == f"{HIDDEN} {HIDDEN}"


def test_forgetting_is_counted() -> None:
    redactor = Redactor()
    redactor.add("abc")
    redactor.add("abc")
    redactor.add("")
    redactor.discard("abc")
    assert redactor.scrub("abc") == HIDDEN
    redactor.discard("abc")
    assert redactor.scrub("abc") == "abc"
    redactor.discard("abc")
    redactor.add("abc")
    assert redactor.scrub("abc") == HIDDEN


@given(st.text(min_size=1), st.text(), st.text())
def test_no_secret_passes(value: str, before: str, after: str) -> None:
    redactor = Redactor()
    redactor.add(value)
    scrubbed = redactor.scrub(before + value + after)
    assert value not in scrubbed.replace(HIDDEN, "\0") or "\0" in value
