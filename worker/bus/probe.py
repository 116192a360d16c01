"""Before the first connect: is there a NATS server, and one that will do? Told apart, because the answer
differs:

nobody answers              Refused       a worker waits and tries again
it closes, or stays silent  Refused       a server that is going down or hangs, a proxy without one behind it
something else answers      Configuration the address is wrong
too old, no TLS, credentials missing     Configuration

A NATS server speaks first: `INFO {…}`. Some other servers wait to be spoken to, so a silent one gets a
PING, which is harmless to all and makes most of them answer in their own tongue.
"""

import asyncio
import ssl

import msgspec

from worker.bus.credentials import Server
from worker.errors import Configuration, Unavailable

MINIMUM_VERSION = (2, 12)
CONNECT_TIMEOUT_S = 5
GREETING_TIMEOUT_S = 1.0
ANSWER_TIMEOUT_S = 2.0
MAX_INFO_BYTES = 256 * 1024


class Refused(Unavailable):
    """Nobody listens there, or the name is not known (now)."""


class ServerInfo(msgspec.Struct, frozen=True):
    """What we use of the server's INFO. `handshake_first` is ours: it greeted only inside TLS."""

    version: str = ""
    server_name: str = ""
    max_payload: int = 1024 * 1024
    auth_required: bool = False
    tls_required: bool = False
    tls_available: bool = False
    headers: bool = False
    jetstream: bool = False
    handshake_first: bool = False


_info = msgspec.json.Decoder(ServerInfo)


async def probe(server: Server, *, tls: ssl.SSLContext | None, authenticated: bool) -> ServerInfo:
    """The server's INFO. Refused when nobody answers, Configuration when it is the wrong thing."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(server.host, server.port, limit=MAX_INFO_BYTES)
    except TimeoutError:
        raise Refused(f"{server.url} does not answer") from None
    except OSError as error:
        raise Refused(f"{server.url}: {_reason(error)}") from None
    try:
        line = await _first_line(reader, writer, server, quiet=tls is not None)
    finally:
        await _close(writer)
    if line is None:
        assert tls is not None
        line = await _first_line_inside_tls(server, tls)
        return _judge(
            msgspec.structs.replace(_parse(line, server), handshake_first=True), server, authenticated
        )
    info = _parse(line, server)
    if tls is not None and not (info.tls_required or info.tls_available):
        raise Configuration(f"the NATS server at {server.url} offers no TLS, which is configured here")
    return _judge(info, server, authenticated)


async def _first_line(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, server: Server, *, quiet: bool
) -> bytes | None:
    """None for silence where a TLS handshake may be expected first."""
    try:
        async with asyncio.timeout(GREETING_TIMEOUT_S):
            return await _line(reader, server)
    except TimeoutError:
        if quiet:
            return None
    try:
        writer.write(b"PING\r\n")
        await writer.drain()
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await _line(reader, server)
    except TimeoutError:
        raise Refused(f"{server.url} accepts connections but does not greet as a NATS server does") from None
    except OSError:
        raise _closed(server) from None


async def _line(reader: asyncio.StreamReader, server: Server) -> bytes:
    try:
        line = await reader.readline()
    except (ValueError, asyncio.LimitOverrunError):
        raise _no_nats(server, "it sends something else") from None
    except OSError:
        raise _closed(server) from None
    if not line:
        raise _closed(server)
    return line


async def _first_line_inside_tls(server: Server, tls: ssl.SSLContext) -> bytes:
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(
                server.host, server.port, limit=MAX_INFO_BYTES, ssl=tls, server_hostname=server.name
            )
    except ssl.SSLError as error:
        raise Configuration(f"{server.url}: TLS failed: {error.reason or error}", field="nats.tls") from None
    except (TimeoutError, OSError):
        raise _no_nats(server, "it neither greets nor speaks TLS") from None
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            line = await reader.readline()
    except (TimeoutError, ValueError):
        raise _no_nats(server, "it does not greet inside TLS") from None
    except OSError:
        line = b""
    finally:
        await _close(writer)
    if not line:
        raise Configuration(
            f"{server.url} closes TLS connections at once: does it want a client certificate?",
            field="nats.tls.cert",
        )
    return line


def _parse(line: bytes, server: Server) -> ServerInfo:
    verb, _, body = line.strip().partition(b" ")
    if verb != b"INFO":
        raise _no_nats(server, f"it says {_printable(line)}")
    try:
        return _info.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _no_nats(server, "its INFO cannot be read") from None


def _judge(info: ServerInfo, server: Server, authenticated: bool) -> ServerInfo:
    check_version(info.version, server.url)
    if info.auth_required and not authenticated:
        raise Configuration(
            f"the NATS server at {server.url} wants credentials: "
            "set nats.creds, nkey, token_file or a user in url",
            field="nats",
        )
    return info


def check_version(version: str, url: str) -> None:
    """Configuration for a server older than the contract needs (atomic batches)."""
    numbers = version.lstrip("v").split("-")[0].split(".")
    try:
        known = (int(numbers[0]), int(numbers[1]))
    except (ValueError, IndexError):
        raise Configuration(f"the server at {url} does not tell its version ({version[:40]!r})") from None
    if known < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        raise Configuration(
            f"the NATS server at {url} is version {version[:40]}: "
            f"{wanted} or newer is needed (atomic batches)"
        )


def _closed(server: Server) -> Refused:
    return Refused(f"{server.url} closed the connection before it greeted as a NATS server does")


def _no_nats(server: Server, why: str) -> Configuration:
    return Configuration(f"{server.url} is no NATS server: {why}", field="nats.url")


def _printable(line: bytes) -> str:
    return repr(line[:40].decode("latin-1").strip())


def _reason(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"  # asyncio's own text lists every address it tried
    return error.strerror or str(error)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    try:
        await writer.wait_closed()
    except OSError:
        return  # it is closed either way
