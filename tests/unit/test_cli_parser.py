"""The command line: options anywhere, commands kept as they are, one-line errors."""

import argparse
from datetime import UTC, datetime, timedelta

import pytest

from worker.cli.app import BY_NAME, VERBS, find_verb, make_parser, overview, run
from worker.cli.parser import Parser, UsageError, duration, pair, when, whole

CONNECTED = [verb for verb in BY_NAME.values()]


def command_parser() -> Parser:
    parser = Parser("exec", "Run.", command_tail=True)
    parser.argument("container", metavar="CONTAINER")
    parser.argument("-e", "--env", action="append", default=[])
    parser.argument("-i", action="store_true")
    parser.argument("-t", action="store_true")
    return parser


@pytest.mark.parametrize(
    ("words", "env", "command"),
    [
        (["web-0", "ls", "-l"], [], ["ls", "-l"]),
        (["web-0", "--", "ls", "-l"], [], ["ls", "-l"]),
        (["-e", "A=1", "web-0", "ls", "-e", "x"], ["A=1"], ["ls", "-e", "x"]),
        (["web-0", "-e", "A=1", "--", "-x"], ["A=1"], ["-x"]),
        (["web-0", "--env=A=1", "ls"], ["A=1"], ["ls"]),
        (["-eA=1", "web-0", "ls"], ["A=1"], ["ls"]),
        (["-ite", "A=1", "web-0", "ls"], ["A=1"], ["ls"]),
        (["-it", "web-0", "sh", "-c", "echo -- $0", "--", "y"], [], ["sh", "-c", "echo -- $0", "--", "y"]),
        (["--", "web-0", "ls"], [], ["ls"]),
        (["web-0"], [], []),
        (["web-0", "--"], [], []),
    ],
)
def test_the_command_is_kept_as_it_is(words: list[str], env: list[str], command: list[str]) -> None:
    args = command_parser().read(words)
    assert (args.container, args.env, args.command) == ("web-0", env, command)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "CONTAINER is missing"),
        (["--nope", "web-0"], "unknown option --nope"),
        (["web-0", "--nope", "--", "ls"], "unknown option --nope"),
        (["web-0", "-e"], "-e/--env: expected one argument"),
    ],
)
def test_a_wrong_line_is_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        command_parser().read(words)
    assert caught.value.message == message
    assert caught.value.verb == "exec"


def test_options_may_stand_between_words() -> None:
    parser = Parser("stop", "Stop.")
    parser.argument("containers", nargs="+", metavar="CONTAINER")
    parser.argument("-t", "--timeout", type=duration)
    args = parser.read(["a-0", "-t", "1m30s", "b-0"])
    assert (args.containers, args.timeout) == (["a-0", "b-0"], 90.0)


@pytest.mark.parametrize(("text", "seconds"), [("5", 5.0), ("2.5", 2.5), ("250ms", 0.25), ("1m30s", 90.0)])
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "inf", "1e3", "1.5h", "..", "1.2.3"])
def test_no_durations(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="duration"):
        duration(text)


def test_when_takes_an_age_and_a_time() -> None:
    assert when("2026-11-24T03:31:39Z") == datetime(2026, 11, 24, 3, 31, 39, tzinfo=UTC)
    assert abs(when("10m") - (datetime.now(UTC) - timedelta(minutes=10))) < timedelta(seconds=5)
    assert when("2026-11-24 03:31").tzinfo is not None
    with pytest.raises(argparse.ArgumentTypeError, match="neither a time"):
        when("yesterday")


def test_whole_numbers_have_bounds() -> None:
    assert whole(1, 65535)("80") == 80
    for text in ("0", "65536", "x", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError):
            whole(1, 65535)(text)


def test_a_lone_name_takes_its_value_from_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGION", "eu")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert pair("A=b=c") == ("A", "b=c")
    assert pair("A=") == ("A", "")
    assert pair("REGION") == ("REGION", "eu")
    for text in ("=x", "NOWHERE"):
        with pytest.raises(argparse.ArgumentTypeError):
            pair(text)


@pytest.mark.parametrize("verb", CONNECTED, ids=[verb.name for verb in CONNECTED])
@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_every_help_page_fits_its_terminal(
    verb: object, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    parser = make_parser(verb)  # type: ignore[arg-type]
    page = parser.page(colour=False)
    assert page.startswith(f"Usage: {parser.prog}")
    assert "--help" in page
    if columns == "80":
        body = page.partition("Examples")[0].splitlines()[1:]
        assert max(len(line) for line in body) <= 80


def test_the_overview_names_every_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = overview(colour=False)
    for verbs in VERBS.values():
        for verb in verbs:
            assert f"  {verb.name} " in page
    assert max(len(line) for line in page.splitlines()) <= 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pss"], "there is no command pss; did you mean ps?"),
        (["profile"], "profile: say show or check or diff or lint"),
        (["profile", "nope"], "profile: say show or check or diff or lint, not nope"),
        (["--nope"], "unknown option --nope"),
        (["stop"], "CONTAINER is missing"),
        (["stop", "--nope", "a-0"], "unknown option --nope"),
        (["logs", "a-0", "--tail", "x"], "-n/--tail: 'x' is no whole number"),
        (["exec", "a-0"], "the command is missing"),
        (["run"], "FILE|IMAGE is missing"),
    ],
)
def test_usage_errors_are_one_line_and_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {message}")
    assert said.err.count("\n") == 1
    assert "--help" in said.err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sandfleet ")
    for words in (
        [],
        ["--help"],
        ["help"],
        ["ps", "--help"],
        ["help", "profile", "show"],
        ["run", "x", "-h"],
    ):
        assert run(words) == 0
        assert capsys.readouterr().out.startswith("Usage: sandfleet")


def test_help_of_a_command_inside_exec_is_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    args = make_parser(BY_NAME["exec"]).read(["web-0", "ls", "--help"])
    assert args.command == ["ls", "--help"]
    assert not args.help


def test_common_options_may_stand_before_the_verb() -> None:
    verb, rest = find_verb(["profile", "show", "web-0"])
    assert (verb.name, rest) == ("profile show", ["web-0"])


def test_control_characters_never_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["\x1b[31mred"]) == 2
    assert "\x1b" not in capsys.readouterr().err
