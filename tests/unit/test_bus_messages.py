"""Wire details without a wire: acknowledgement subjects, times, headers, addresses, credentials, permissions."""

import inspect
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client

from worker.bus.credentials import (
    connect_options,
    has_credentials,
    learned_servers,
    parse_servers,
    tls_context,
    wants_tls,
)
from worker.bus.failures import JetStreamError
from worker.bus.messages import Message, check_headers, check_pattern, from_nats, parse_ack, parse_time
from worker.bus.permissions import config_block, node_permissions
from worker.bus.rpc import header_text
from worker.bus.wire import WireClient
from worker.errors import Configuration, Internal


@dataclass
class Tls:
    ca: str | None = None
    cert: str | None = None
    key: str | None = None


@dataclass
class Settings:
    url: str = "nats://127.0.0.1:4222"
    creds: str | None = None
    nkey: str | None = None
    token_file: str | None = None
    tls: Tls | None = field(default_factory=Tls)
    insecure: bool = False
    domain: str | None = None
    replicas: int = 1
    stream_prefix: str = "SANDFLEET"


# -- acknowledgement subjects


def test_an_acknowledgement_subject() -> None:
    ack = parse_ack("$JS.ACK.SANDFLEET_CMD.n1.2.17.5.1764000000123456789.3")
    assert ack is not None
    assert (ack.stream, ack.consumer, ack.deliveries) == ("SANDFLEET_CMD", "n1", 2)
    assert (ack.stream_seq, ack.consumer_seq, ack.pending) == (17, 5, 3)
    assert ack.time == datetime.fromtimestamp(1764000000, UTC).replace(microsecond=123456)


def test_an_acknowledgement_subject_with_a_domain() -> None:
    ack = parse_ack("$JS.ACK.site.Abc123.SANDFLEET_CMD.n1.1.17.5.1764000000000000000.0.rAnD")
    assert ack is not None
    assert (ack.stream, ack.consumer, ack.stream_seq) == ("SANDFLEET_CMD", "n1", 17)


@given(st.one_of(st.text(), st.from_regex(r"\$JS\.ACK(\.[a-z0-9-]{0,5}){0,14}", fullmatch=True)))
def test_no_reply_subject_crashes_it(reply: str) -> None:
    parse_ack(reply)


# -- times


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-24T03:31:39.228339211Z", datetime(2026, 11, 24, 3, 31, 39, 228339, UTC)),
        ("2026-11-24T03:31:39.2Z", datetime(2026, 11, 24, 3, 31, 39, 200000, UTC)),
        ("2026-11-24T03:31:39Z", datetime(2026, 11, 24, 3, 31, 39, 0, UTC)),
        ("2026-11-24T04:31:39.5+01:00", datetime(2026, 11, 24, 3, 31, 39, 500000, UTC)),
        ("2026-11-24T03:31:39", datetime(2026, 11, 24, 3, 31, 39, 0, UTC)),
    ],
)
def test_times_of_the_server(text: str, expected: datetime) -> None:
    assert parse_time(text) == expected


@given(st.text())
def test_other_text_is_no_time(text: str) -> None:
    try:
        parse_time(text)
    except ValueError:
        return


# -- headers


def test_the_size_of_headers_is_what_goes_over_the_wire() -> None:
    headers = {"Nats-Msg-Id": "a/b/0+5", "X": ""}
    wire = b"NATS/1.0\r\n" + b"".join(f"{k}: {v}\r\n".encode() for k, v in headers.items()) + b"\r\n"
    assert check_headers(headers) == len(wire)
    assert check_headers(None) == check_headers({}) == 0


@pytest.mark.parametrize(
    "bad", [{"K": "a\nb"}, {"K": "a\r"}, {"K": "ä"}, {"K": "\x00"}, {"a b": ""}, {"": ""}]
)
def test_what_a_header_cannot_carry(bad: dict[str, str]) -> None:
    with pytest.raises(Internal):
        check_headers(bad)


@pytest.mark.parametrize("subject", ["a", "a.b", "a.*.c", "a.>", ">", "*", "$JS.x", "a.b-c_d"])
def test_subjects_to_subscribe_to(subject: str) -> None:
    check_pattern(subject)


@pytest.mark.parametrize("subject", ["", ".", "a.", ".a", "a..b", "a b", "a\r\nSUB", "a.>.b", "a*", "a.b>"])
def test_no_subjects_to_subscribe_to(subject: str) -> None:
    with pytest.raises(Internal):
        check_pattern(subject)


def test_a_status_is_told_from_a_message() -> None:
    message = from_nats("inbox", "", b"", {"Status": "404", "Description": "No Messages"})
    assert (message.status, message.description) == (404, "No Messages")
    assert from_nats("s", "", b"x", {"Status": "404"}).status == 0
    assert from_nats("s", "", b"", {"Status": "x"}).status == 0
    assert from_nats("s", "r", b"x", None) == Message("s", b"x", {}, "r")


@given(st.text())
def test_the_text_of_an_error_fits_into_a_header(text: str) -> None:
    check_headers({"Nats-Service-Error": header_text(text)})


# -- addresses


@pytest.mark.parametrize(
    ("url", "expected", "secret"),
    [
        ("nats://host:4223", "nats://host:4223", {}),
        ("host", "nats://host:4222", {}),
        ("host:1", "nats://host:1", {}),
        ("tls://host/", "tls://host:4222", {}),
        ("nats://[::1]:4222", "nats://[::1]:4222", {}),
        ("nats://tok%2Fen@host", "nats://host:4222", {"token": "tok/en"}),
        ("nats://u:p%40:x@host", "nats://host:4222", {"user": "u", "password": "p@:x"}),
        ("nats://:p@host", "nats://host:4222", {"user": "", "password": "p"}),
    ],
)
def test_addresses(url: str, expected: str, secret: dict[str, str]) -> None:
    [server] = parse_servers(url)
    assert (server.url, server.secret) == (expected, secret)
    assert repr(server) == f"Server({expected})"


def test_several_addresses() -> None:
    assert [server.port for server in parse_servers("nats://a:1, b:2 ,tls://c:3")] == [1, 2, 3]


def test_servers_that_a_server_tells_of() -> None:
    known = parse_servers("tls://tok@fleet.example.org:4222")
    urls = [
        "fleet.example.org:4222",
        "10.0.0.2:4222",
        "[fd00::2]:4222",
        "b.example.org:5222",
        "b.example.org:5222",
        "x",
        "10.0.0.3:",
        "10.0.0.3:0",
        "10.0.0.3:65536",
        "10.0.0.3:\N{SUPERSCRIPT TWO}",
        ":4222",
    ]
    found = learned_servers(known, known[0], [*urls, urls[-1], "x"])
    assert [server.url for server in found] == [
        "tls://10.0.0.2:4222",
        "tls://[fd00::2]:4222",
        "tls://b.example.org:5222",
    ]
    # An address has no certificate of its own.
    assert [server.name for server in found] == ["fleet.example.org", "fleet.example.org", "b.example.org"]
    assert all(server.secret == {"token": "tok"} for server in found)


@pytest.mark.parametrize(
    "url", ["", " , ", "http://secret@host", "nats://secret@", "nats://secret@h:99999", "nats://secret@h/p"]
)
def test_no_addresses(url: str) -> None:
    with pytest.raises(Configuration) as refused:
        parse_servers(url)
    assert "secret" not in refused.value.message


# -- credentials


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(), False),
        (Settings(tls=None), False),
        (Settings(tls=Tls(ca="ca.pem")), False),
        (Settings(tls=Tls(cert="c.pem", key="c.key")), True),
        (Settings(creds="f"), True),
        (Settings(nkey="f"), True),
        (Settings(token_file="f"), True),
        (Settings(url="nats://t@h"), True),
        (Settings(url="nats://h,nats://u:p@h2"), True),
    ],
)
def test_what_counts_as_credentials(settings: Settings, expected: bool) -> None:
    assert has_credentials(settings) is expected


def test_tls_is_wanted_by_scheme_or_files(tmp_path: Path) -> None:
    assert not wants_tls(Settings())
    assert wants_tls(Settings(url="tls://h"))
    assert wants_tls(Settings(tls=Tls(ca="x")))
    assert tls_context(Settings()) is None
    assert tls_context(Settings(url="tls://h")) is not None
    (tmp_path / "ca.pem").write_text("no certificate")
    for tls in (Tls(ca=str(tmp_path / "ca.pem")), Tls(ca="missing"), Tls(cert=str(tmp_path / "ca.pem"))):
        with pytest.raises(Configuration):
            tls_context(Settings(tls=tls))


def test_files_come_before_the_url(tmp_path: Path) -> None:
    settings = Settings(url="nats://u:p@h", token_file=str(tmp_path / "token"))
    [server] = parse_servers(settings.url)
    (tmp_path / "token").write_text(" s3cret\n")
    assert connect_options(settings, server) == {"token": "s3cret"}
    (tmp_path / "token").write_text("renewed")
    assert connect_options(settings, server) == {"token": "renewed"}
    (tmp_path / "token").write_text("  \n")
    with pytest.raises(Configuration, match="is empty"):
        connect_options(settings, server)
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    with pytest.raises(Configuration, match="cannot be read"):
        connect_options(settings, server)
    assert connect_options(Settings(url="nats://u:p@h"), server) == {"user": "u", "password": "p"}


# -- permissions


def test_the_contracts_permissions_to_the_letter() -> None:
    """Copied from the contract, with P = sandfleet.v1 and one pool."""
    node, pool = "n1", "build"
    found = node_permissions(node, pools=(pool,))
    assert set(found.publish) == {
        "$JS.API.CONSUMER.CREATE.SANDFLEET_CMD.n1.sandfleet.v1.cmd.n1.>",
        "$JS.API.CONSUMER.DELETE.SANDFLEET_CMD.n1",
        "$JS.API.CONSUMER.INFO.SANDFLEET_CMD.n1",
        "$JS.API.CONSUMER.MSG.NEXT.SANDFLEET_CMD.n1",
        "$JS.ACK.SANDFLEET_CMD.n1.>",
        "$JS.API.STREAM.INFO.SANDFLEET_EVT",
        "$JS.API.STREAM.INFO.SANDFLEET_LOG",
        "$JS.API.DIRECT.GET.SANDFLEET_EVT.sandfleet.v1.evt.n1.>",
        "$JS.API.DIRECT.GET.SANDFLEET_LOG.sandfleet.v1.log.n1.>",
        "$KV.SANDFLEET_NODES.n1",
        "sandfleet.v1.evt.n1.>",
        "sandfleet.v1.log.n1.>",
        "sandfleet.v1.stat.n1.>",
        "sandfleet.v1.progress.n1.>",
        "sandfleet.v1.exec.n1.*.out",
        "$JS.API.CONSUMER.INFO.SANDFLEET_JOB.build",
        "$JS.API.CONSUMER.MSG.NEXT.SANDFLEET_JOB.build",
        "$JS.ACK.SANDFLEET_JOB.build.>",
    }
    assert set(found.subscribe) == {
        "sandfleet.v1.rpc.n1.*",
        "sandfleet.v1.exec.n1.*.in",
        "$SRV.>",
        "_INBOX_n1.>",
    }
    assert (found.max_responses, found.response_expires) == (1000, "11m")
    block = config_block(found)
    assert 'allow_responses: { max: 1000, expires: "11m" }' in block


# -- what we rely on in nats-py, beside its documented ways


def test_the_parts_of_nats_py_that_are_overridden_or_used() -> None:
    """An upgrade that renames one of them must fail here and not in the night."""
    for name in (
        "_close",
        "_flush_pending",
        "_process_info",
        "_process_pong",
        "_send_command",
        "_send_ping",
    ):
        assert inspect.iscoroutinefunction(getattr(Client, name)), name
        if name in vars(WireClient):
            ours = inspect.signature(getattr(WireClient, name)).parameters
            assert list(ours) == list(inspect.signature(getattr(Client, name)).parameters), name
    client = Client()
    for name in ("_pongs", "_pongs_received", "_pings_outstanding", "_transport"):
        assert hasattr(client, name), name


# -- errors


def test_what_jetstream_errors_mean() -> None:
    assert JetStreamError(503, 10076, "not enabled").jetstream_off
    assert JetStreamError(400, 10071, "wrong last sequence: 4").refused_sequence
    assert not JetStreamError(404, 10059, "stream not found").refused_sequence
    assert "10059" in JetStreamError(404, 10059, "stream not found", subject="STREAM.INFO.X").message
