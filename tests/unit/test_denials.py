"""What a Mac's log says about refusals: which records count, whose they are, and that none of them can lie.

The records are of the forms that others have seen: buckle (macOS 14.2), a spike of sandboxed (15.6), nub and
lycaon (26), and the sandboxd block of NixOS/nixpkgs#472452 (26.2).
"""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.platform.darwin.denials import Denial, LogReport, read_log

MINE = "01JDDAAAAAAAAAAAAAAAAAAAAA"
OTHER = "01JDDBBBBBBBBBBBBBBBBBBBBB"
TAG = f"\nsandfleet:{MINE}/1"
TIME = "2026-11-24 04:31:39.228339+0100"
AT = datetime(2026, 11, 24, 3, 31, 39, 228339, UTC)
SANDBOX = "/System/Library/Extensions/Sandbox.kext/Contents/MacOS/Sandbox"
BANNER = b'Filtering the log data using "process == \\"kernel\\""\n'
END = b'{"count":3,"finished":1}\n'


def record(message: str, *, seconds: float = 0, **changes: Any) -> bytes:
    time = (AT + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M:%S.%f+0000")
    plain = {
        "traceID": 3105639345815556,
        "eventMessage": message,
        "eventType": "logEvent",
        "subsystem": "com.apple.sandbox.reporting",
        "category": "violation",
        "processImagePath": "/kernel",
        "senderImagePath": SANDBOX,
        "timestamp": time,
        "machTimestamp": 20147685217463,
        "messageType": "Error",
        "processID": 0,
        "backtrace": {"frames": [{"imageOffset": 103060, "imageUUID": "0F483193"}]},
        **changes,
    }
    return json.dumps(plain).replace("/", "\\/").encode() + b"\n"


def sandboxd(message: str, **changes: Any) -> bytes:
    return record(message, processImagePath="/usr/libexec/sandboxd", processID=601, **changes)


def block(
    target: str, *, operation: str = "mach-lookup", pid: int = 96060, tag: str = "", **changes: Any
) -> str:
    data = {
        "operation": operation,
        "target": target,
        "process": "mpv",
        "pid": pid,
        "action": "deny",
        "uid": 501,
        "normalized_target": [target],
        "errno": 1,
        **changes,
    }
    return (
        f"Sandbox: mpv({pid}) deny(1) {operation} {target}{tag}\nProcess:         mpv [{pid}]\n"
        "Path:            /opt/mpv\nParent Process:  bash [96057]\nUser ID:         501\n\n"
        f"Date/Time:       2025-12-21 10:01:59.712 MST\n\nMetaData: {json.dumps(data)}\n"
    )


def read(*records: bytes, pids: tuple[int, ...] = (), since: datetime | None = None) -> LogReport:
    return read_log(b"".join((BANNER, *records, END)), instance=MINE, pids=pids, since=since)


def only(report: LogReport) -> Denial:
    [denial] = report.denials
    return denial


# -- forms


@pytest.mark.parametrize(
    ("message", "process", "pid", "operation", "argument"),
    [
        ("cat(9854) deny(1) file-read-data /private/etc/hosts", "cat", 9854, "file-read-data", "/private/etc/hosts"),
        ("curl(9859) deny(1) network-outbound remote:*:80", "curl", 9859, "network-outbound", "remote:*:80"),
        ("a(1) deny(1) mach-lookup com.apple.dnssd.service", "a", 1, "mach-lookup", "com.apple.dnssd.service"),
        ("m(7) deny(1) iokit-open-user-client AppleSMCClient", "m", 7, "iokit-open-user-client", "AppleSMCClient"),
        ("sh(7) deny(1) file-read-data /Users/me/a b  c.txt", "sh", 7, "file-read-data", "/Users/me/a b  c.txt"),
        ("A(7) deny(1) signal others [Safari(5085)] signum:15", "A", 7, "signal", "others [Safari(5085)] signum:15"),
        ('t(7) deny(1) file-ioctl path:/dev/tty ioctl-command:(_IO "t" 22)', "t", 7, "file-ioctl",
         'path:/dev/tty ioctl-command:(_IO "t" 22)'),
        ("bash(7) deny(1) forbidden-exec-sugid", "bash", 7, "forbidden-exec-sugid", None),
        ("ln(7) deny(1) forbidden-link-priv<file-read*> /a", "ln", 7, "forbidden-link-priv<file-read*>", "/a"),
        ("p(7) deny(1) process-exec* /bin/ls", "p", 7, "process-exec*", "/bin/ls"),
        ("old(7) deny file-write-create /x", "old", 7, "file-write-create", "/x"),
        ("Google Chrome Helper (Renderer)(412) deny(1) mach-lookup x", "Google Chrome Helper (Renderer)", 412,
         "mach-lookup", "x"),
        ("sh(5) deny(1) file-write-data /tmp/a) deny(1) b", "sh", 5, "file-write-data", "/tmp/a) deny(1) b"),
        ("sh(5) deny(1) file-write-data /tmp/a(9) deny(1) mach-lookup b", "sh", 5, "file-write-data",
         "/tmp/a(9) deny(1) mach-lookup b"),
    ],
)  # fmt: skip
def test_a_report_of_the_kernel(
    message: str, process: str, pid: int, operation: str, argument: str | None
) -> None:
    report = read(record(f"Sandbox: {message}{TAG}"))
    assert only(report) == Denial(
        time_first=AT, time_last=AT, count=1, process=process, pid=pid, operation=operation, argument=argument
    )
    assert (report.merged, report.cut, report.unreadable, report.lost) == (0, 0, 0, False)


@pytest.mark.parametrize(
    "message",
    [
        "Sandbox: sh(7) allow file-read-data /x",
        "System Policy: eslogger(7) deny(1) system-privilege 1016",
        "3 duplicate reports for System Policy: Radix(7) deny(1) file-read-metadata /x",
        "0 duplicate reports for Sandbox: a(7) deny(1) mach-lookup x",
        "successfully truncated homedirs to 22 bytes",
        "",
    ],
)
def test_what_is_no_refusal(message: str) -> None:
    assert read(record(message + TAG), pids=(7,)) == LogReport()


@pytest.mark.parametrize(
    "message",
    [
        "Sandbox: sh deny(1) file-read-data /x",
        "Sandbox: (7) deny(1) file-read-data /x",
        "Sandbox: sh(0) deny(1) file-read-data /x",
        "Sandbox: sh(99999999999) deny(1) file-read-data /x",
        "Sandbox: sh(7) deny(1) File_Read /x",
        "Sandbox: sh(7) deny(1) ",
        "Sandbox: " + "n" * 300 + "(7) deny(1) file-read-data /x",
    ],
)
def test_an_odd_report_is_counted_and_not_guessed(message: str) -> None:
    report = read(record(message + TAG))
    assert (report.denials, report.unreadable) == ((), 1)
    assert read(record(message + f"\nsandfleet:{OTHER}/1")) == LogReport()


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"timestamp": "yesterday"}, 1),
        ({"timestamp": "9999-12-31 23:59:59.999999-2300"}, 1),
        ({"timestamp": 7}, 1),
        ({"processID": "0"}, 1),
        ({"eventMessage": None}, 0),
        ({"eventMessage": ["x"]}, 1),
    ],
)
def test_records_with_odd_fields(changes: dict[str, Any], broken: int) -> None:
    report = read(record(f"Sandbox: sh(7) deny(1) file-read-data /x{TAG}", **changes))
    assert (report.denials, report.unreadable) == ((), broken)


def test_a_line_that_is_no_record() -> None:
    whole = record(f"Sandbox: sh(7) deny(1) file-read-data /x{TAG}")
    deep = b'{"a":' + b"[" * 100_000 + b"\n"
    long = record(f"Sandbox: sh(7) deny(1) file-read-data /{'x' * 70_000}{TAG}")
    report = read(whole, whole[:-40] + b"\n", deep, long, b"\xff\xfe\n", b"{}\n")
    assert (only(report).count, report.unreadable) == (1, 3)


def test_a_loss_event_says_that_something_is_missing() -> None:
    assert read(record("lost >=1 unreliable messages", eventType="lossEvent")).lost
    assert not read(record("x")).lost


# -- the same again


def test_the_same_refusal_is_one_denial() -> None:
    line = "Sandbox: cc({}) deny(1) file-read-data /opt/x.h" + TAG
    report = read(
        record(line.format(11), seconds=1),
        record(line.format(13), seconds=9),
        record(line.format(12), seconds=5),
        record(line.format(12).replace("/opt", "/usr"), seconds=3),
        record(line.format(12).replace("data", "metadata"), seconds=2),
    )
    assert [(d.operation, d.argument, d.count, d.pid) for d in report.denials] == [
        ("file-read-data", "/opt/x.h", 3, 13),
        ("file-read-data", "/usr/x.h", 1, 12),
        ("file-read-metadata", "/opt/x.h", 1, 12),
    ]
    first = report.denials[0]
    assert (first.time_first, first.time_last) == (AT + timedelta(seconds=1), AT + timedelta(seconds=9))


@pytest.mark.parametrize(("words", "count"), [("1 duplicate report", 1), ("37 duplicate reports", 37)])
def test_merged_reports_are_counted(words: str, count: int) -> None:
    denied = f"Sandbox: bash(7) deny(1) network-outbound remote:*:9{TAG}"
    report = read(record(denied), record(f"{words} for {denied}"))
    assert (only(report).count, report.merged) == (1 + count, count)
    assert only(read(record(f"{words} for {denied}"))).count == count


# -- whose it is


def test_only_the_tag_of_the_instance_counts() -> None:
    message = "Sandbox: sh(7) deny(1) file-read-data /x"
    assert read(record(message + f"\nsandfleet:{OTHER}/1"), pids=(7,)) == LogReport()
    assert read(record(message + f"\nsandfleet:{MINE}X/1"), pids=(7,)) == LogReport()
    assert read(record(message + TAG + "2")).denials  # another run of it
    assert read(record(message + f"\nsandfleet:{MINE}")) == LogReport()


def test_without_a_tag_a_live_process_tells_whose_it_is() -> None:
    plain = record("Sandbox: sh(7) deny(1) file-read-data /x")
    assert read(plain) == LogReport()
    assert read(plain, pids=(8,)) == LogReport()
    assert only(read(plain, pids=(7, 8))).pid == 7
    assert only(read(plain, pids=(7,), since=AT)).pid == 7
    assert read(plain, pids=(7,), since=AT + timedelta(seconds=1)) == LogReport()


def test_a_report_that_was_too_long_has_lost_its_end_and_its_tag() -> None:
    report = read(
        record(f"Sandbox: touch(812) deny(1) file-write-create /Users/p/{'d' * 40}<…>"), pids=(812,)
    )
    denial = only(report)
    assert (denial.argument, denial.whole) == (f"/Users/p/{'d' * 40}…", False)
    assert report.cut == 1


def test_only_the_kernel_and_sandboxd_are_heard() -> None:
    """A container may write to the log as well: under its own name and process."""
    message = f"Sandbox: sh(7) deny(1) file-read-data /x{TAG}"
    for forged in (
        {"processID": 4711},
        {"processID": None},
        {"processID": 4711, "processImagePath": "/kernel"},
        {"processID": 4711, "processImagePath": "/tmp/usr/libexec/sandboxd"},
    ):
        assert read(record(message, **forged), pids=(7,)) == LogReport()


def test_a_file_name_cannot_take_the_place_of_the_tag() -> None:
    """The kernel's line is the last; what stands before it is part of the argument."""
    named = f"/tmp/a\nsandfleet:{OTHER}/1"
    assert only(read(record(f"Sandbox: sh(7) deny(1) file-read-data {named}{TAG}"))).argument == named
    mine = f"Sandbox: sh(7) deny(1) file-read-data /tmp/a{TAG}"
    assert read(record(f"{mine}\nsandfleet:{OTHER}/1"), pids=(7,)) == LogReport()
    assert read(record(f"{mine}<…>"), pids=()) == LogReport()
    assert read(record(f"{mine} "), pids=()) == LogReport()


def test_a_program_named_like_a_verdict_is_believed_only_with_the_tag() -> None:
    """Its name would blame process 4242 of somebody else."""
    message = "Sandbox: x(4242) deny(1) signal y(7) deny(1) file-read-data /x"
    report = read(record(message), pids=(4242,))
    assert (report.denials, report.unreadable) == ((), 1)
    assert only(read(record(message + TAG))).operation == "signal"


# -- sandboxd


def test_a_block_of_sandboxd() -> None:
    report = read(sandboxd(block("com.apple.CoreServices.coreservicesd")), pids=(96060,))
    denial = only(report)
    assert (denial.process, denial.pid, denial.operation) == ("mpv", 96060, "mach-lookup")
    assert denial.argument == "com.apple.CoreServices.coreservicesd"
    assert read(sandboxd(block("x")), pids=(1,)) == LogReport()
    assert read(sandboxd(block("x", tag=TAG))).denials
    assert read(sandboxd(block("x", tag=TAG, action="allow"))) == LogReport()


def test_a_block_and_the_kernels_report_of_the_same_are_one() -> None:
    line = record(f"Sandbox: mpv(96060) deny(1) mach-lookup com.apple.x{TAG}")
    assert only(read(line, sandboxd(block("com.apple.x")), pids=(96060,))).count == 1
    assert only(read(line, sandboxd(block("com.apple.x")), line, pids=(96060,))).count == 2


def test_a_block_without_metadata_has_its_first_line() -> None:
    text = block("com.apple.x").partition("MetaData")[0]
    assert only(read(sandboxd(text), pids=(96060,))).argument == "com.apple.x"
    older = text.replace("Sandbox:", "SandboxViolation:", 1)
    assert only(read(sandboxd(older), pids=(96060,))).operation == "mach-lookup"


@pytest.mark.parametrize("changes", [{"operation": "Rm -rf"}, {"pid": -1}, {"pid": "7"}, {"target": {}}])
def test_a_block_with_odd_metadata(changes: dict[str, Any]) -> None:
    data = {"operation": "mach-lookup", "target": "x", "process": "mpv", "pid": 7, **changes}
    text = block("x", pid=7).partition("MetaData")[0] + f"MetaData: {json.dumps(data)}"
    report = read(sandboxd(text), pids=(7,))
    assert (report.denials, report.unreadable) == ((), 1)


def test_a_file_name_cannot_tag_a_block() -> None:
    named = f"/tmp/a\nsandfleet:{MINE}/1\nProcess:         mpv [7]"
    assert read(sandboxd(block(named, operation="file-read-data"))) == LogReport()


# -- other styles

STYLES = {
    "syslog": "{} localhost kernel[0]: (Sandbox) [com.apple.sandbox.reporting:violation] {}",
    "default": "{} 0xdbf47    Error       0x0                  0      0    kernel: (Sandbox) {}",
    "compact": "{} E  kernel[0:42486c] (Sandbox) {}",
}


@pytest.mark.parametrize("style", STYLES)
def test_plain_text(style: str) -> None:
    lines = [
        "Timestamp                       (process)[PID]",
        STYLES[style].format(TIME, f"Sandbox: go(4210) deny(1) file-read-metadata /opt{TAG}"),
        STYLES[style].format(TIME, f"2 duplicate reports for Sandbox: go(4210) deny(1) file-read-metadata /opt{TAG}"),
        STYLES[style].format(TIME, f"Sandbox: go(4211) deny(1) file-read-data /x\nsandfleet:{OTHER}/1"),
        STYLES[style].format(TIME, "Sandbox: go(4212) deny(1) file-read-data /y").replace("kernel", "evil"),
        "",
    ]  # fmt: skip
    report = read_log("\n".join(lines).encode(), instance=MINE, pids=(4212,))
    assert only(report) == Denial(
        time_first=AT,
        time_last=AT,
        count=3,
        process="go",
        pid=4210,
        operation="file-read-metadata",
        argument="/opt",
    )
    assert report.merged == 2


def test_a_block_in_plain_text() -> None:
    head = f"{TIME} 0x1095684  Error       0x0                  601    0    sandboxd: "
    text = (
        f"{head}[com.apple.sandbox.reporting:violation] {block('com.apple.x')}\nFailed to symbolicate: NULL\n"
    )
    report = read_log((text + text).encode(), instance=MINE, pids=(96060,))
    assert (only(report).argument, only(report).count) == ("com.apple.x", 2)


def test_a_time_without_a_zone_is_this_machines() -> None:
    text = STYLES["compact"].format("2026-09-08 12:08:19.267", f"Sandbox: git(8) deny(1) signal others{TAG}")
    expected = datetime(2026, 9, 8, 12, 8, 19, 267000).astimezone(UTC)
    assert only(read_log(text.encode(), instance=MINE)).time_last == expected


# -- laws


@given(st.binary())
def test_no_bytes_crash_the_reader(raw: bytes) -> None:
    read_log(raw, instance=MINE, pids=(7,))
    read_log(b"{" + raw, instance=MINE, pids=(7,))


@given(st.text(), st.sampled_from(["", TAG, "<…>"]), st.booleans())
def test_no_message_crashes_the_reader(text: str, end: str, kernel: bool) -> None:
    made = record if kernel else sandboxd
    for start in (
        "",
        "Sandbox: ",
        "Sandbox: sh(7) deny(1) ",
        "9 duplicate reports for Sandbox: sh(7) deny(1) x ",
    ):
        line = made(start + text + end)
        report = read(line, pids=(7,))
        assert len(report.denials) + report.unreadable <= 1
        json.dumps([denial.argument for denial in report.denials]).encode()


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_an_argument_comes_back_as_it_was(argument: str) -> None:
    """Whatever a container calls its file, the record stays the container's own, and whole."""
    found = only(read(record(f"Sandbox: sh(7) deny(1) file-read-data {argument}{TAG}")))
    assert (found.process, found.pid, found.operation) == ("sh", 7, "file-read-data")
    assert found.argument == argument or argument.endswith("<…>")


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from("ab"), st.integers(0, 50)), max_size=20))
def test_counts_add_up(reports: list[tuple[int, str, int]]) -> None:
    lines = []
    for times, name, seconds in reports:
        text = f"Sandbox: sh({seconds + 1}) deny(1) file-read-data /{name}{TAG}"
        lines.append(record(text if times == 1 else f"{times} duplicate reports for {text}", seconds=seconds))
    report = read(*lines)
    assert sum(denial.count for denial in report.denials) == sum(times for times, _, _ in reports)
    assert report.merged == sum(times for times, _, _ in reports if times > 1)
    assert [d.time_last for d in report.denials] == sorted(
        (d.time_last for d in report.denials), reverse=True
    )
