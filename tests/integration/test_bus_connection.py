"""The Bus on a real server: credentials, refusals, reconnects, messages."""

import asyncio
import base64
import json
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nkeys
import pytest
from nacl.signing import SigningKey

from tests.integration.conftest import Connect, NatsSettings, ServerFactory, TlsFiles, until
from tests.integration.proxy import Proxy
from worker.bus import wire
from worker.bus.connection import Bus
from worker.bus.failures import NoAnswer, NoResponders, NotConnected
from worker.bus.messages import Message
from worker.bus.probe import Refused
from worker.bus.server import EmbeddedServer
from worker.errors import Configuration, Internal, ResourceExhausted, Unavailable

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def user_seed() -> tuple[str, str]:
    """(seed, public key) of a new NATS user."""
    seed = nkeys.encode_seed(bytes(SigningKey.generate()), nkeys.PREFIX_BYTE_USER)
    return seed.decode(), nkeys.from_seed(bytearray(seed)).public_key.decode()


@asynccontextmanager
async def listener(answer: Answer) -> AsyncIterator[str]:
    """Something on a port that is no NATS server."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"


# -- messages


async def test_publish_request_and_headers(nats_server: EmbeddedServer, connect: Connect) -> None:
    bus = await connect(nats_server, node="n1")
    got: list[Message] = []
    await bus.subscribe("a.*", got.append)
    await bus.publish("a.b", b"one", {"K": "v w"})
    await bus.publish("a.c", b"\x00\xff")
    await bus.flush()
    await until(lambda: len(got) == 2)
    assert (got[0].subject, got[0].data, got[0].headers) == ("a.b", b"one", {"K": "v w"})
    assert got[1].data == b"\x00\xff"

    async with await bus.queue("echo") as requests:
        waiting = asyncio.create_task(bus.request("echo", b"ping", 5))
        request = await requests.get(5)
        assert request.reply.startswith("_INBOX_n1.")
        await bus.publish(request.reply, request.data + b"-pong")
        assert (await waiting).data == b"ping-pong"
        with pytest.raises(NoAnswer):
            await bus.request("echo", b"", 0.05)
    with pytest.raises(NoResponders):
        await bus.request("nobody.there", b"")


async def test_what_cannot_be_sent(nats_server: EmbeddedServer, connect: Connect) -> None:
    bus = await connect(nats_server)
    for headers in ({"K": "a\r\nInjected: b"}, {"K": "ü"}, {"K y": "v"}, {"": "v"}):
        with pytest.raises(Internal):
            await bus.publish("a", b"", headers)
    for subject in ("a b", "", "a\r\nPUB x 0"):
        with pytest.raises(Internal):
            await bus.publish(subject, b"")
    with pytest.raises(Internal):
        await bus.subscribe("a..b", lambda message: None)
    # The server counts headers too, and closes the connection of one that sends more.
    with pytest.raises(ResourceExhausted):
        await bus.publish("a", bytes(bus.max_payload - 10), {"K": "v"})
    await bus.publish("a", bytes(bus.max_payload - 64), {"K": "v"})
    await bus.flush()
    assert bus.session == 1


async def test_a_bounded_queue_counts_what_it_drops(nats_server: EmbeddedServer, connect: Connect) -> None:
    bus = await connect(nats_server)
    few = await bus.queue("q", max_messages=10)
    small = await bus.queue("q", max_bytes=1000)
    for _ in range(100):
        await bus.publish("q", bytes(100))
    await bus.flush()
    await until(lambda: few.dropped == 90 and small.dropped == 90)
    assert small.dropped_bytes == 9000
    assert len([await few.get(1) for _ in range(10)]) == 10
    await few.stop()
    assert [message async for message in few] == []
    await bus.close()
    assert len([message async for message in small]) == 10


async def test_stopping_a_subscription(nats_server: EmbeddedServer, connect: Connect) -> None:
    bus = await connect(nats_server)
    got: list[Message] = []
    sub = await bus.subscribe("s", got.append)
    await sub.stop()
    await bus.publish("s", b"")
    await bus.flush()
    assert got == []
    await sub.stop()


async def test_a_failing_handler_does_not_end_the_subscription(
    nats_server: EmbeddedServer, connect: Connect
) -> None:
    bus = await connect(nats_server)
    got: list[bytes] = []

    def handler(message: Message) -> None:
        got.append(message.data)
        raise ValueError("a bug")

    await bus.subscribe("h", handler)
    await bus.publish("h", b"1")
    await bus.publish("h", b"2")
    await until(lambda: got == [b"1", b"2"])


async def test_a_cancelled_flush_leaves_the_connection_whole(
    nats_server: EmbeddedServer, connect: Connect
) -> None:
    """In nats-py the late PONG of a cancelled flush ends the read loop."""
    bus = await connect(nats_server)
    for _ in range(20):
        flush = asyncio.create_task(bus.flush())
        await asyncio.sleep(0)
        flush.cancel()
        await asyncio.gather(flush, return_exceptions=True)
    await bus.flush()
    assert bus.session == 1


# -- credentials


async def test_token_in_the_url_and_in_a_file(
    start_server: ServerFactory, connect: Connect, tmp_path: Path
) -> None:
    server = await start_server(token="s3cret/@:%")
    bus = await connect(server, node="n1", insecure=False)
    assert not bus.insecure
    assert "s3cret" not in bus.url
    plain = f"nats://127.0.0.1:{server.port}"
    (tmp_path / "token").write_text("s3cret/@:%\n")
    await connect(plain, node="n1", insecure=False, token_file=str(tmp_path / "token"))
    (tmp_path / "token").write_text("wrong")
    with pytest.raises(Configuration, match="refuses the credentials") as refused:
        await connect(plain, node="n1", token_file=str(tmp_path / "token"))
    assert "wrong" not in refused.value.message
    with pytest.raises(Configuration, match="wants credentials"):
        await connect(plain, node="n1")


async def test_user_and_password(start_server: ServerFactory, connect: Connect) -> None:
    server = await start_server(config='authorization { user: "me", password: "p@ss:/" }')
    bus = await connect(f"nats://me:p%40ss%3A%2F@127.0.0.1:{server.port}", node="n1", insecure=False)
    assert bus.connected
    with pytest.raises(Configuration, match="refuses the credentials") as refused:
        await connect(f"nats://me:other@127.0.0.1:{server.port}", retry=True)
    assert "other" not in refused.value.message


async def test_nkey(start_server: ServerFactory, connect: Connect, tmp_path: Path) -> None:
    seed, public = user_seed()
    server = await start_server(config=f"authorization {{ users: [ {{ nkey: {public} }} ] }}")
    bare, decorated, empty = tmp_path / "bare", tmp_path / "decorated", tmp_path / "empty"
    bare.write_text(seed + "\n")
    decorated.write_text(f"-----BEGIN USER NKEY SEED-----\r\n{seed}\r\n------END USER NKEY SEED------\r\n")
    empty.write_text("SUNOSEED")
    await connect(server, node="n1", insecure=False, nkey=str(bare))
    await connect(server, node="n1", insecure=False, nkey=str(decorated))
    with pytest.raises(Configuration, match="holds no NATS user seed"):
        await connect(server, node="n1", nkey=str(empty))
    with pytest.raises(Configuration, match="not there"):
        await connect(server, node="n1", nkey=str(tmp_path / "missing"))


def jwt(claims: dict[str, Any], issuer_seed: bytes) -> str:
    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    head = part(b'{"typ":"JWT","alg":"ed25519-nkey"}')
    body = part(json.dumps(claims).encode())
    pair = nkeys.from_seed(bytearray(issuer_seed))
    return f"{head}.{body}.{part(pair.sign(f'{head}.{body}'.encode()))}"


async def test_creds_file(start_server: ServerFactory, connect: Connect, tmp_path: Path) -> None:
    operator, account = (
        nkeys.encode_seed(bytes(SigningKey.generate()), prefix)
        for prefix in (nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT)
    )
    keys = {seed: nkeys.from_seed(bytearray(seed)).public_key.decode() for seed in (operator, account)}
    seed, public = user_seed()

    def claims(kind: str, subject: str, issuer: bytes, nats: dict[str, Any]) -> str:
        body = {"jti": kind, "iat": 1, "iss": keys[issuer], "sub": subject, "name": kind}
        return jwt({**body, "nats": {"type": kind, "version": 2, **nats}}, issuer)

    limits = {name: -1 for name in ("subs", "data", "payload", "imports", "exports", "conn", "leaf")}
    operator_jwt = claims("operator", keys[operator], operator, {})
    account_jwt = claims("account", keys[account], operator, {"limits": {**limits, "wildcards": True}})
    user_jwt = claims("user", public, account, {"subs": -1, "data": -1, "payload": -1, "pub": {}, "sub": {}})
    (tmp_path / "op.jwt").write_text(operator_jwt)
    server = await start_server(
        jetstream=False,
        config=f'operator: "{tmp_path / "op.jwt"}"\nresolver: MEMORY\n'
        f"resolver_preload: {{ {keys[account]}: {account_jwt} }}\n",
    )
    creds = tmp_path / "user.creds"
    creds.write_text(
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
    bus = await connect(server, node="n1", insecure=False, creds=str(creds))
    await bus.flush()
    creds.write_text("something else")
    with pytest.raises(Configuration, match="no NATS credentials file"):
        await connect(server, node="n1", creds=str(creds))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca, server and client certificates for 127.0.0.1, by openssl."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(*new, "-x509", "-days", "2", "-subj", "/CN=test ca", "-keyout", "ca.key", "-out", "ca.pem")
    for name in ("server", "client"):
        (folder / f"{name}.ext").write_text(
            "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n"
        )
        openssl(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key"),
            *("-CAcreateserial", "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.pem"),
        )
    return folder


def tls_block(folder: Path, *more: str) -> str:
    lines = (
        f'cert_file: "{folder}/server.pem"',
        f'key_file: "{folder}/server.key"',
        f'ca_file: "{folder}/ca.pem"',
        *more,
    )
    return "tls {\n" + "\n".join(lines) + "\n}\n"


@pytest.mark.parametrize("first", [False, True], ids=["upgraded", "handshake first"])
async def test_client_certificate(
    start_server: ServerFactory, connect: Connect, certificates: Path, first: bool
) -> None:
    more = ["verify: true"] + (["handshake_first: true"] if first else [])
    server = await start_server(config=tls_block(certificates, *more))
    ca = str(certificates / "ca.pem")
    mine = TlsFiles(ca=ca, cert=str(certificates / "client.pem"), key=str(certificates / "client.key"))
    url = f"tls://127.0.0.1:{server.port}"
    bus = await connect(url, node="n1", insecure=False, tls=mine)
    await bus.flush()
    with pytest.raises(Configuration, match="TLS"):
        await connect(url, tls=TlsFiles())  # a certificate that nobody we trust has signed
    with pytest.raises(Configuration, match="TLS"):
        await connect(url, tls=TlsFiles(ca=ca), retry=True)  # and none of ours


async def test_no_plain_text_where_tls_is_wanted(
    nats_server: EmbeddedServer, connect: Connect, certificates: Path
) -> None:
    with pytest.raises(Configuration, match="offers no TLS"):
        await connect(nats_server.url.replace("nats://", "tls://me:secret@"))


async def test_tls_is_used_when_it_is_only_offered(
    start_server: ServerFactory, connect: Connect, certificates: Path
) -> None:
    server = await start_server(config=tls_block(certificates) + "allow_non_tls: true")
    bus = await connect(server, tls=TlsFiles(ca=str(certificates / "ca.pem")))
    assert bus._client is not None
    transport = bus._client._transport
    assert transport is not None
    assert isinstance(transport._io_writer.get_extra_info("ssl_object"), ssl.SSLObject)  # type: ignore[attr-defined]


async def test_a_worker_without_credentials(nats_server: EmbeddedServer, connect: Connect) -> None:
    with pytest.raises(Configuration, match="--insecure"):
        await connect(nats_server, node="n1", insecure=False)
    assert (await connect(nats_server, node="n1", insecure=True)).insecure
    await connect(nats_server, insecure=False)  # a client is not a node


# -- what is no NATS server


async def test_nobody_listens(connect: Connect, unused_tcp_port: int) -> None:
    url = f"nats://127.0.0.1:{unused_tcp_port}"
    with pytest.raises(Unavailable, match="connection refused"):
        await connect(url)


async def test_a_worker_waits_for_its_server(
    start_server: ServerFactory, connect: Connect, unused_tcp_port: int
) -> None:
    waiting = asyncio.create_task(connect(f"nats://127.0.0.1:{unused_tcp_port}", node="n1", retry=True))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await start_server(port=unused_tcp_port)
    assert (await waiting).connected


@pytest.mark.parametrize(
    ("says", "match"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "no NATS server"),
        (b"\x00\x01\x02\x03" * 100_000, "no NATS server"),
        (b"INFO {broken\r\n", "no NATS server"),
        (b'INFO {"version":"2.11.9","headers":true,"max_payload":1048576}\r\n', "or newer is needed"),
        (b'INFO {"version":"weird","headers":true}\r\n', "does not tell its version"),
        (b'INFO {"version":"2.12.0","headers":true,"max_payload":65536}\r\n', "max_payload"),
    ],
    ids=["ssh", "binary", "broken", "old", "no version", "small messages"],
)
async def test_what_answers_is_wrong(connect: Connect, says: bytes, match: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        writer.close()

    async with listener(answer) as url, asyncio.timeout(5):
        with pytest.raises(Configuration, match=match):
            await connect(url, node="n1", retry=True)


async def test_a_web_server_is_found_out_by_a_ping(connect: Connect) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with listener(answer) as url, asyncio.timeout(5):
        with pytest.raises(Configuration, match="HTTP/1"):
            await connect(url, node="n1", retry=True)


async def test_a_silent_port(connect: Connect) -> None:
    ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        ended.set()

    async with listener(answer) as url, asyncio.timeout(8):
        with pytest.raises(Unavailable, match="does not greet"):
            await connect(url, node="n1")
        await ended.wait()


async def test_a_worker_waits_behind_a_proxy_whose_server_is_down(
    nats_server: EmbeddedServer, connect: Connect
) -> None:
    """It takes connections and closes them: that is no wrong address."""
    refused = asyncio.Event()
    there = False

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not there:
            refused.set()
            writer.close()
            return
        host, port = nats_server.url.removeprefix("nats://").split(":")
        server_reader, server_writer = await asyncio.open_connection(host, int(port))

        async def copy(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                to.write(data)
            to.close()

        await asyncio.gather(copy(reader, server_writer), copy(server_reader, writer))

    async with listener(pass_on) as url, asyncio.timeout(20):
        with pytest.raises(Unavailable, match="closed the connection"):
            await connect(url, node="n1")
        refused.clear()
        waiting = asyncio.create_task(connect(url, node="n1", retry=True))
        await refused.wait()
        assert not waiting.done()
        there = True
        bus = await waiting
        assert bus.connected
        await bus.close()


async def test_several_servers(nats_server: EmbeddedServer, connect: Connect, unused_tcp_port: int) -> None:
    bus = await connect(f"nats://127.0.0.1:{unused_tcp_port},{nats_server.url}")
    assert bus.url == nats_server.url


# -- broken connections


async def test_reconnect_subscriptions_and_listeners(start_server: ServerFactory, connect: Connect) -> None:
    server = await start_server()
    bus = await connect(server, node="n1")
    changes: list[bool] = []
    stop = bus.listen(changes.append)
    got: list[bytes] = []
    await bus.subscribe("keep", lambda message: got.append(message.data))
    await bus.subscribe("never", lambda message: None)
    hanging = asyncio.create_task(bus.request("never", b"", 60))
    await bus.flush()
    await server.stop(kill=True)
    with pytest.raises(NotConnected):
        await hanging
    await until(lambda: not bus.connected)
    with pytest.raises(NotConnected):
        await bus.publish("keep", b"lost")
    with pytest.raises(NotConnected):
        await bus.flush()
    await bus.subscribe("later", lambda message: got.append(b"later " + message.data))
    await server.start()
    await bus.wait_connected()
    assert (changes, bus.session) == ([False, True], 2)
    stop()
    await bus.publish("keep", b"1")
    await bus.publish("later", b"2")
    await until(lambda: len(got) == 2)
    assert sorted(got) == [b"1", b"later 2"]


async def test_a_connection_that_breaks_while_all_is_subscribed_again(
    start_server: ServerFactory, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await start_server()
    got: list[bytes] = []
    async with Proxy(server.port) as proxy:
        bus = await connect(proxy.url, node="n1")
        await bus.subscribe("first", lambda message: got.append(message.data))
        await bus.subscribe("second", lambda message: got.append(message.data))
        resume, tries = bus._resume, 0

        async def resume_and_break(client: wire.WireClient) -> None:
            nonlocal tries
            tries += 1
            await resume(client)
            if tries == 1:  # before anybody could notice
                raise Refused("it broke just then")

        monkeypatch.setattr(bus, "_resume", resume_and_break)
        await proxy.break_all()
        await until(lambda: bus.session == 2)
        await bus.publish("first", b"1")
        await bus.publish("second", b"2")
        await until(lambda: sorted(got) == [b"1", b"2"])


async def test_it_comes_back_when_the_server_closes_it_with_an_error(
    start_server: ServerFactory, connect: Connect
) -> None:
    """nats-py closes for good on most `-ERR`."""
    server = await start_server()
    bus = await connect(server)
    assert bus._client is not None
    await bus._client._send_command(b"NONSENSE\r\n")
    await bus._client._flush_pending()
    await until(lambda: bus.session == 2)
    await bus.flush()


async def test_a_peer_that_vanished_is_noticed(
    start_server: ServerFactory, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing breaks a connection to a machine that lost its power: unanswered pings do."""
    monkeypatch.setattr(wire, "PING_INTERVAL_S", 0.1)
    server = await start_server()
    async with Proxy(server.port) as proxy:
        bus = await connect(proxy.url)
        hanging = asyncio.create_task(bus.request("$SYS.none", b"", 60))
        proxy.deaf = True
        with pytest.raises((NotConnected, NoResponders)):
            await hanging
        await until(lambda: not bus.connected)
        proxy.deaf = False
        await until(lambda: bus.session == 2)
        await bus.flush()


async def test_permission_violations_are_kept(start_server: ServerFactory, connect: Connect) -> None:
    server = await start_server(
        config='authorization { users: [ { user: u, password: p, permissions: { publish: "a" } } ] }'
    )
    bus = await connect(f"nats://u:p@127.0.0.1:{server.port}")
    await bus.publish("b", b"")
    await until(lambda: bus.complaints)
    assert "permissions violation for publish to" in bus.complaints[0].lower()
    assert bus.session == 1


async def test_closing_while_the_server_is_away(start_server: ServerFactory, connect: Connect) -> None:
    server = await start_server()
    bus = await connect(server)
    await server.stop()
    await until(lambda: not bus.connected)
    waiting = asyncio.create_task(bus.wait_connected())
    await asyncio.sleep(0)
    await bus.close()
    await bus.close()
    with pytest.raises(NotConnected):
        await waiting
    with pytest.raises(NotConnected):
        await bus.wait_connected()


async def test_the_same_on_uvloop(nats_server: EmbeddedServer) -> None:
    import uvloop

    async def use() -> bytes:
        bus = await Bus.connect(NatsSettings(nats_server.url), node="n1", name="uv", retry=False)
        async with await bus.queue("uv") as queue:
            await bus.publish("uv", b"hello")
            data = (await queue.get(5)).data
        await bus.close()
        return data

    assert await asyncio.to_thread(uvloop.run, use()) == b"hello"
