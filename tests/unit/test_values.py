"""Durations, sizes, names, signals, paths: what is read, and what the error names."""

import math
import re
import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.cron import check_cron
from schemas.errors import ContractError, InvalidCommand, InvalidSpec
from schemas.values import (
    KILL_SIGNALS,
    STOP_SIGNALS,
    check_argument,
    check_env_name,
    check_id,
    check_image,
    check_node,
    check_path,
    check_pool,
    check_service,
    check_ulid,
    normal_target,
    normalize_signal,
    parse_duration,
    parse_memory,
    shorten,
    signal_number,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250ms", 0.25),
        ("300ms", 0.3),
        ("5s", 5),
        ("1m30s", 90),
        ("1h 15m", 4500),
        ("2h", 7200),
        ("0", 0),
        ("0s", 0),
        ("1 min", 60),
        ("1d12h", 129600),
        ("2weeks", 1209600),
        ("1M", 2630016),
        ("1month 1 day", 2716416),
        ("10 us", 1e-5),
        (" 5s ", 5),
        (5, 5),
        (2.5, 2.5),
        (0, 0),
    ],
)
def test_duration(text: Any, seconds: float) -> None:
    assert parse_duration(text, field="x") == pytest.approx(seconds, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "5",
            "s",
            "5 x",
            "-5s",
            "1.5s",
            "5s!",
            "5S",
            "1h-2m",
            "٣s",
            "9" * 30 + "s",
            "5s\n",
            "1000000y",
        ),
        *(-1, math.nan, math.inf, -math.inf, 1e12, 10**400, True),
    ],
)
def test_no_duration(text: Any) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_duration(text, field="spec.health.interval")
    assert caught.value.field == "spec.health.interval"
    assert len(caught.value.message) < 500


@given(st.integers(0, 99999), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
def test_duration_adds_its_terms(hours: int, minutes: int, seconds: int, millis: int) -> None:
    text = f"{hours}h{minutes}m {seconds}s{millis}ms"
    expected = hours * 3600 + minutes * 60 + seconds + millis / 1000
    assert parse_duration(text, field="x") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64Ki", 65536),
        ("512Mi", 512 * 2**20),
        ("2Gi", 2**31),
        ("1Ti", 2**40),
        ("4096", 4096),
        (4096, 4096),
        ("007", 7),
    ],
)
def test_memory(text: Any, size: int) -> None:
    assert parse_memory(text, field="x") == size


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "512MB",
            "512M",
            "1.5Gi",
            "-1Mi",
            "0",
            "0Gi",
            " 1Gi",
            "1 Gi",
            "1gi",
            "Gi",
            "1Gi\n",
            "9" * 19 + "Ti",
        ),
        *(0, -1, 2**63, True),
    ],
)
def test_no_memory(text: Any) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_memory(text, field="spec.resources.memory")
    assert caught.value.field == "spec.resources.memory"


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (check_node, ["a", "Mac-Studio_7", "x" * 64], ["", "a.b", "a b", "*", ">", "x" * 65, "a\n", "ä"]),
        (check_pool, ["mac"], ["a.b"]),
        (check_id, ["01JDD", "a-b_C"], ["", "a b", "x" * 65, "a\n"]),
        (
            check_service,
            ["a", "0", "a-b", "a--b", "a" * 63],
            ["", "-a", "a-", "A", "a_b", "a" * 64, "a\n", "a.b"],
        ),
    ],
)
def test_names(check: Any, good: list[str], bad: list[str]) -> None:
    for value in good:
        assert check(value, field="f") == value
    for value in bad:
        with pytest.raises(InvalidCommand) as caught:
            check(value, field="f")
        assert caught.value.field == "f"
    with pytest.raises(InvalidSpec):
        check(bad[0], field="f", error=InvalidSpec)


def test_ulid() -> None:
    assert check_ulid("01ARZ3NDEKTSV4RRFFQ69G5FAV", field="i")
    for bad in ("", "01ARZ3NDEKTSV4RRFFQ69G5FA", "81ARZ3NDEKTSV4RRFFQ69G5FAV", "01ARZ3NDEKTSV4RRFFQ69G5FAU"):
        with pytest.raises(InvalidCommand):
            check_ulid(bad, field="i")


@pytest.mark.parametrize(
    "name",
    [
        "base",
        "web:1.0",
        "localhost/model:1.4",
        "ghcr.io/acme/cache:7",
        "reg.example.com:5000/a/b_c/d__e:v1.2-rc",
        "a@sha256:" + "0" * 64,
        "a:b@sha256:" + "f" * 64,
        "Registry.Example/a",
    ],
)
def test_image(name: str) -> None:
    assert check_image(name, field="image") == name


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            " ",
            "Web",
            "a:",
            "a/",
            "/a",
            "a//b",
            "a b",
            "../a",
            "a:b:c",
            "a@sha256:12",
            "a\n",
            "a" * 513,
            "a\0",
        ),
        *("a/../b", "a:" + "t" * 129),
    ],
)
def test_no_image(name: str) -> None:
    with pytest.raises(InvalidCommand) as caught:
        check_image(name, field="image")
    assert caught.value.field == "image"


def test_a_long_image_name_is_decided_at_once() -> None:
    with pytest.raises(InvalidCommand):
        check_image("a-" * 250 + "!", field="image")


def test_signals() -> None:
    assert normalize_signal("TERM") == normalize_signal("SIGTERM") == "SIGTERM"
    assert {normalize_signal(name[3:]) for name in KILL_SIGNALS} == set(KILL_SIGNALS)
    for name in STOP_SIGNALS:
        assert signal_number(name) == signal.Signals[name]
    assert signal_number("15") == 15
    for bad in ("", "SIG", "SIGSTOP", "SIGQUIT", "term", "9", "SIGSIGTERM", "KILL\n"):
        with pytest.raises(InvalidCommand) as caught:
            normalize_signal(bad)
        assert caught.value.field == "signal"
    for bad in ("0", "65", "-1", "SIGSTOP", "15 ", "999", "SIGNOPE"):
        with pytest.raises(InvalidSpec):
            signal_number(bad, field="stop_signal", error=InvalidSpec)


@pytest.mark.parametrize("path", ["a", "/a/b", "/a/.hidden/..b", "./a", "/ä b/c", "..."])
def test_path(path: str) -> None:
    assert check_path(path, field="p") == path


@pytest.mark.parametrize(
    "path",
    [
        *(
            "",
            "..",
            "../a",
            "/a/../b",
            "a/..",
            "a\0b",
            "a\nb",
            "a\x7fb",
            "a\x85b",
            "a\u2028b",
            "/" + "a" * 256,
        ),
        *("/a" * 2049,),
    ],
)
def test_no_path(path: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        check_path(path, field="p")
    assert caught.value.field == "p"


def test_path_rules_by_request() -> None:
    with pytest.raises(InvalidSpec):
        check_path("a", field="p", absolute=True)
    for root in ("/", "//", "/.", "."):
        with pytest.raises(InvalidSpec):
            check_path(root, field="p", below=True)
    assert normal_target("/app//data/./x/") == normal_target("app/data/x") == "app/data/x"


@given(st.text())
def test_a_path_that_passes_cannot_climb(path: str) -> None:
    try:
        check_path(path, field="p")
    except ContractError:
        return
    assert ".." not in path.split("/")
    assert not re.search(r"[\x00-\x1f\x7f]", path)


def test_words_and_env_names() -> None:
    check_argument("echo a\n\techo b\r\n", field="a")
    for bad in ("\0", "a\x1bb", "\x08"):
        with pytest.raises(InvalidSpec):
            check_argument(bad, field="a")
    check_env_name("A b.c-d", field="e")
    for bad in ("", "A=B", "A\0", "A\n"):
        with pytest.raises(InvalidSpec):
            check_env_name(bad, field="e")


@given(st.text())
def test_shorten_is_short_and_printable(text: str) -> None:
    short = shorten(text)
    assert short.isascii()
    assert short.isprintable()
    assert len(short) < 1000


@pytest.mark.parametrize(
    "text",
    ["0 30 3 * * * *", "* * * * * *", "0 0/5 * ? JAN-MAR Mon,Wed 2026", "*/10 * 1-5,7 * * 1-7", "@daily"],
)
def test_cron(text: str) -> None:
    check_cron(text, field="schedule")


@pytest.mark.parametrize(
    "text",
    [
        *("", "* * * * *", "* * * * * * * *", "60 * * * * *", "* * 24 * * *", "* * * 0 * *", "* * * * 13 *"),
        *(
            "* * * * * 8",
            "5-1 * * * * *",
            "*/0 * * * * *",
            "a * * * * *",
            "1,, * * * * *",
            "@never",
            "* " * 500,
        ),
    ],
)
def test_no_cron(text: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        check_cron(text, field="schedule")
    assert caught.value.field == "schedule"
