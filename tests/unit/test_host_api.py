"""The host API: what a container is told, its token, and when that is renewed."""

import asyncio
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger

from schemas.spec import decode_spec
from schemas.status import ContainerStatus, Gpu, State
from worker.config import Config, HostApiConfig, load_config
from worker.datadir import ContainerDirs
from worker.errors import Configuration, StartFailed
from worker.host_api import (
    MAX_SECRET_BYTES,
    MIN_SECRET_BYTES,
    HostApi,
    Minted,
    TokenRenewer,
    claims,
    is_due,
    read_secret,
    write_token,
)
from worker.images.model import ImageConfig
from worker.platform.base import ROOTED_API
from worker.redact import HIDDEN, Redactor
from worker.secret_files import SecretFiles
from worker.variables import build_env

KEY = bytes(range(1, 1 + MIN_SECRET_BYTES))
PEM = b"-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----\n"
NOW = 1_800_000_000.25
NAMES = {
    "SANDFLEET_API_SOCKET",
    "SANDFLEET_API_URL",
    "SANDFLEET_TOKEN",
    "SANDFLEET_TOKEN_FILE",
    "ZLAYER_SOCKET",
    "ZLAYER_TOKEN",
    "ZLAYER_API_URL",
}


def status(cid: str = "web-0", instance: str = "I" * 26, state: State = State.RUNNING) -> ContainerStatus:
    service, _, replica = cid.rpartition("-")
    return ContainerStatus(
        container=cid,
        service=service,
        replica=int(replica),
        instance=instance,
        state=state,
        image="app",
        gpu=Gpu.NONE,
    )


class Clock:
    """Both clocks; `sleep` moves both, `set` only the one on the wall."""

    def __init__(self) -> None:
        self.wall = NOW
        self.monotonic = 100.0

    def pass_s(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


class Node:
    def __init__(self, top: Path) -> None:
        self.top = top
        self.root = top / "data"
        self.secret = top / "api.key"
        self.socket = top / "api.sock"
        self.clock = Clock()
        self.put_key(KEY)

    def put_key(self, key: bytes, mode: int = 0o600) -> None:
        self.secret.unlink(missing_ok=True)
        self.secret.write_bytes(key)
        self.secret.chmod(mode)

    def dirs(self, cid: str = "web-0") -> ContainerDirs:
        dirs = ContainerDirs(self.root / "containers" / cid)
        if not dirs.root.exists():
            dirs.root.parent.mkdir(parents=True, exist_ok=True)
            dirs.make()
        return dirs

    def config(self, **changes: Any) -> HostApiConfig:
        values = {
            "url": "http://api.local",
            "socket": str(self.socket),
            "secret_file": str(self.secret),
            "ttl_s": 60.0,
        }
        return HostApiConfig(**{**values, **changes})

    def api(self, **changes: Any) -> HostApi:
        return HostApi(
            self.config(**changes),
            node="n1",
            wall=lambda: self.clock.wall,
            monotonic=lambda: self.clock.monotonic,
        )

    def opened(self, **changes: Any) -> HostApi:
        return HostApi.open(self.config(**changes), node="n1", data_root=self.root)

    def token(self, cid: str = "web-0") -> str:
        return (self.dirs(cid).api / "token").read_text()

    def said(self, token: str, key: bytes = KEY) -> dict[str, Any]:
        """The claims of a token whose signature holds; whether it has expired is another question here."""
        options: Any = {"verify_exp": False, "verify_iat": False, "require": ["exp", "iat", "sub"]}
        return jwt.decode(token, key, algorithms=["HS256"], options=options)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.fixture
def listening(node: Node) -> Iterator[Path]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(node.socket))
        yield node.socket


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged, as `LEVEL message`."""
    seen: list[str] = []
    sink = logger.add(lambda m: seen.append(f"{m.record['level'].name} {m.record['message']}"), level="DEBUG")
    yield seen
    logger.remove(sink)


# -- variables and claims


def test_a_start_is_told_everything_and_its_token_stands_in_the_file(node: Node) -> None:
    told = node.api().begin(status(), node.dirs())
    assert set(told) == NAMES
    assert told["SANDFLEET_API_SOCKET"] == told["ZLAYER_SOCKET"] == str(node.socket)
    assert told["SANDFLEET_API_URL"] == told["ZLAYER_API_URL"] == "http://api.local"
    assert told["SANDFLEET_TOKEN"] == told["ZLAYER_TOKEN"] == node.token()
    assert told["SANDFLEET_TOKEN_FILE"] == str(node.dirs().api / "token")


def test_a_token_says_who_the_container_is(node: Node) -> None:
    told = node.api().begin(status("api-v2-7"), node.dirs("api-v2-7"))
    assert jwt.get_unverified_header(told["SANDFLEET_TOKEN"]) == {"alg": "HS256", "typ": "JWT"}
    assert node.said(told["SANDFLEET_TOKEN"]) == {
        "sub": "api-v2",
        "container": "api-v2-7",
        "instance": "I" * 26,
        "node": "n1",
        "iat": int(NOW),
        "exp": int(NOW) + 60,
    }


@pytest.mark.parametrize(
    ("missing", "names"),
    [
        ({"url", "socket", "secret_file"}, set()),
        ({"url"}, NAMES - {"SANDFLEET_API_URL", "ZLAYER_API_URL"}),
        ({"socket"}, NAMES - {"SANDFLEET_API_SOCKET", "ZLAYER_SOCKET"}),
        ({"secret_file"}, NAMES - {"SANDFLEET_TOKEN", "ZLAYER_TOKEN", "SANDFLEET_TOKEN_FILE"}),
    ],
)
def test_a_setting_that_is_missing_leaves_out_its_own(node: Node, missing: set[str], names: set[str]) -> None:
    api = node.api(**dict.fromkeys(missing))
    assert set(api.begin(status(), node.dirs())) == names
    assert set(api.variables(status(), node.dirs())) == names
    assert node.dirs().api.exists() == ("SANDFLEET_TOKEN" in names)


def test_an_exec_gets_a_token_of_its_own_and_leaves_the_file(node: Node) -> None:
    api = node.api()
    first = api.begin(status(), node.dirs())
    node.clock.pass_s(10)
    second = api.variables(status(), node.dirs())
    assert set(second) == NAMES
    assert node.said(second["SANDFLEET_TOKEN"])["iat"] == int(NOW) + 10
    assert node.token() == first["SANDFLEET_TOKEN"]


def test_a_container_with_a_root_of_its_own_sees_its_token_in_another_place(node: Node) -> None:
    api = node.api()
    for told in (
        api.begin(status(), node.dirs(), rooted=True),
        api.variables(status(), node.dirs(), rooted=True),
    ):
        assert told["SANDFLEET_TOKEN_FILE"] == f"{ROOTED_API}/token"
    assert node.said(node.token())["container"] == "web-0"


def test_the_node_is_stronger_than_the_spec_but_only_in_what_it_sets(node: Node) -> None:
    api = node.api(url=None)
    env = build_env(
        decode_spec({"image": {"name": "app"}, "env": dict.fromkeys(NAMES, "forged")}),
        config=Config(),
        node="n1",
        cid="web-0",
        instance="I" * 26,
        port=None,
        tmp=Path("/box/tmp"),
        image=ImageConfig(env=["SANDFLEET_TOKEN=image"]),
        secrets=SecretFiles(node.top),
        default_path="/bin",
        host_api=api.begin(status(), node.dirs()),
        environ={},
    )
    assert {name for name in NAMES if env[name] == "forged"} == {"SANDFLEET_API_URL", "ZLAYER_API_URL"}


@given(ttl_s=st.floats(2, 30 * 86400), iat_s=st.integers(0, 1 << 33))
def test_claims_are_whole_seconds_and_never_live_longer_than_configured(ttl_s: float, iat_s: int) -> None:
    said = claims(status(), "n1", iat_s=iat_s, ttl_s=ttl_s)
    assert all(type(said[name]) is int for name in ("iat", "exp"))
    assert ttl_s - 1 < said["exp"] - said["iat"] <= ttl_s


# -- when


def test_due_at_half_its_life(node: Node) -> None:
    minted = Minted(1000, 50.0)

    def due(wall: float, monotonic: float) -> bool:
        return is_due(minted, ttl_s=60.0, wall_s=wall, monotonic_s=monotonic)

    assert not due(1000.0, 50.0)
    assert not due(1029.9, 79.9)
    assert due(1030.0, 79.9)  # the machine slept, or its clock was set forward
    assert due(1029.9, 80.0)  # the clock was set back a little
    assert due(999.9, 50.1)  # set back to before the token was issued


@given(
    ttl_s=st.floats(2, 30 * 86400),
    passed_s=st.floats(0, 1e6),
    step_s=st.floats(-1e6, 1e6),
)
def test_a_token_that_is_not_due_is_one_the_api_takes(ttl_s: float, passed_s: float, step_s: float) -> None:
    wall = NOW + passed_s + step_s
    minted = Minted(int(NOW), 0.0)
    if not is_due(minted, ttl_s=ttl_s, wall_s=wall, monotonic_s=passed_s):
        said = claims(status(), "n1", iat_s=minted.iat_s, ttl_s=ttl_s)
        assert said["iat"] <= wall < said["exp"]
        assert passed_s < ttl_s / 2


def test_renewal(node: Node) -> None:
    api = node.api()
    running = [status()]
    told = api.begin(status(), node.dirs())["SANDFLEET_TOKEN"]
    node.clock.pass_s(29)
    assert api.renew(running, node.dirs) == []
    assert node.token() == told
    node.clock.pass_s(1)
    assert api.renew(running, node.dirs) == []
    newer = node.token()
    assert node.said(newer)["iat"] == int(NOW) + 30
    node.clock.pass_s(29)
    api.renew(running, node.dirs)
    assert node.token() == newer


def test_a_worker_renews_what_the_one_before_it_wrote(node: Node) -> None:
    node.api().begin(status(), node.dirs())
    node.clock.pass_s(1)
    next_worker = node.api()
    assert next_worker.renew([status()], node.dirs) == []
    assert node.said(node.token())["iat"] == int(NOW) + 1


def test_a_container_that_had_no_token_yet_gets_one(node: Node) -> None:
    """It was started before its node had a host API."""
    node.dirs()
    assert node.api().renew([status()], node.dirs) == []
    assert node.said(node.token())["container"] == "web-0"


def test_another_key_holds_from_the_next_renewal_on(node: Node) -> None:
    api = node.api()
    api.begin(status(), node.dirs())
    other = b"o" * 40
    node.put_key(other)
    node.clock.pass_s(30)
    api.renew([status()], node.dirs)
    assert node.said(node.token(), other)["sub"] == "web"
    with pytest.raises(jwt.InvalidSignatureError):
        node.said(node.token(), KEY)


def test_only_what_runs_is_renewed_and_a_later_instance_is_another(node: Node) -> None:
    api = node.api()
    api.begin(status(), node.dirs())
    before = node.token()
    node.clock.pass_s(60)
    assert api.renew([], node.dirs) == []
    assert node.token() == before
    assert api.renew([status(instance="J" * 26)], node.dirs) == []
    assert node.said(node.token())["instance"] == "J" * 26


def test_one_that_cannot_be_written_does_not_hinder_the_others(node: Node) -> None:
    api = node.api()
    node.dirs("b-0")
    failures = api.renew([status("gone-0", "G" * 26), status("b-0", "B" * 26)], _without_making(node))
    assert [failure.code for failure in failures] == ["start_failed"]
    assert "gone-0" in failures[0].message
    assert node.said(node.token("b-0"))["sub"] == "b"


def _without_making(node: Node) -> Callable[[str], ContainerDirs]:
    return lambda cid: ContainerDirs(node.root / "containers" / cid)


@pytest.mark.parametrize(
    ("key", "mode", "text"),
    [
        (KEY, 0o644, "0644"),
        (b"", 0o600, "0 bytes"),
        (PEM, 0o600, "public key"),
    ],
)
def test_the_renewer_tells_a_failure_once_and_its_end(
    node: Node, lines: list[str], key: bytes, mode: int, text: str
) -> None:
    node.dirs()
    renewer = TokenRenewer(node.api(), lambda: [status()], node.dirs)
    node.put_key(key, mode)
    renewer.look()
    renewer.look()
    assert [line.split()[0] for line in lines] == ["WARNING"]
    assert text in lines[0]
    assert not node.dirs().api.exists()
    node.put_key(KEY)
    renewer.look()
    assert [line.split()[0] for line in lines] == ["WARNING", "INFO"]
    assert node.said(node.token())["sub"] == "web"


async def test_the_renewer_goes_on_until_it_is_cancelled(node: Node) -> None:
    looks: list[str] = []
    enough = asyncio.Event()

    def live() -> list[ContainerStatus]:
        looks.append("")
        if len(looks) == 3:
            enough.set()
        return []

    task = asyncio.create_task(TokenRenewer(node.api(ttl_s=2.0), live, node.dirs).run())
    async with asyncio.timeout(20):
        await enough.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_renewer_has_nothing_to_do_without_a_key(node: Node) -> None:
    def live() -> list[ContainerStatus]:
        raise AssertionError("nobody is asked for")

    async with asyncio.timeout(20):
        await TokenRenewer(node.api(secret_file=None), live, node.dirs).run()


# -- the file


def test_the_file_is_replaced_whole_and_is_nobodys_to_write(node: Node) -> None:
    dirs = node.dirs()
    write_token(dirs, "first")
    with (dirs.api / "token").open() as reader:
        write_token(dirs, "second")
        assert reader.read() == "first"
    assert (dirs.api / "token").read_text() == "second"
    assert stat.S_IMODE((dirs.api / "token").stat().st_mode) == 0o400
    assert stat.S_IMODE(dirs.api.stat().st_mode) == 0o700
    assert os.listdir(dirs.api) == ["token"]


def test_what_a_dead_worker_left_half_written_is_no_hindrance(node: Node) -> None:
    dirs = node.dirs()
    write_token(dirs, "first")
    (dirs.api / "token.new").write_text("fir")
    write_token(dirs, "second")
    assert os.listdir(dirs.api) == ["token"]
    assert (dirs.api / "token").read_text() == "second"


@pytest.mark.parametrize("name", ["api", "api/token", "api/token.new"])
def test_no_link_is_followed(node: Node, name: str) -> None:
    dirs = node.dirs()
    elsewhere = node.top / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    if name == "api":
        dirs.api.symlink_to(elsewhere)
        with pytest.raises(NotADirectoryError):
            write_token(dirs, "token")
    else:
        dirs.api.mkdir()
        (dirs.root / name).symlink_to(elsewhere / "kept")
        write_token(dirs, "token")
        assert (dirs.api / "token").read_text() == "token"
        assert not (dirs.api / "token").is_symlink()
    assert os.listdir(elsewhere) == ["kept"]
    assert (elsewhere / "kept").read_text() == "kept"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
def test_the_file_belongs_to_the_containers_user(node: Node) -> None:
    dirs = node.dirs()
    os.chown(dirs.tmp, 4711, 4712)
    write_token(dirs, "token")
    found = (dirs.api / "token").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (4711, 4712, 0o400)
    folder = dirs.api.stat()
    assert (folder.st_uid, stat.S_IMODE(folder.st_mode)) == (0, 0o711)  # to pass through, not to write into


def test_a_start_whose_file_cannot_be_written_fails(node: Node) -> None:
    dirs = node.dirs()
    dirs.api.write_text("in the way")
    with pytest.raises(StartFailed, match="no token can be put into"):
        node.api().begin(status(), dirs)


# -- the key


def test_a_key_is_taken_without_one_newline(node: Node) -> None:
    node.put_key(KEY + b"\n")
    assert read_secret(node.secret) == KEY
    node.put_key(KEY + b"\n\n")
    assert read_secret(node.secret) == KEY + b"\n"
    node.put_key(b"k" * MAX_SECRET_BYTES + b"\n")
    assert len(read_secret(node.secret)) == MAX_SECRET_BYTES


@pytest.mark.parametrize(
    ("key", "mode", "text"),
    [
        (b"", 0o600, "holds 0 bytes"),
        (KEY[1:] + b"\n", 0o600, "holds 31 bytes"),
        (b"k" * (MAX_SECRET_BYTES + 1), 0o600, "larger than"),
        (KEY, 0o640, "mode 0640"),
        (KEY, 0o604, "mode 0604"),
        (KEY, 0o620, "mode 0620"),
        (PEM, 0o600, "public key"),
        (b'{"kty": "oct", "k": "c2VjcmV0c2VjcmV0c2VjcmV0"}', 0o600, "JWK"),
    ],
)
def test_what_is_no_key_is_refused_at_the_start(node: Node, key: bytes, mode: int, text: str) -> None:
    node.put_key(key, mode)
    with pytest.raises(Configuration, match=text) as caught:
        node.opened()
    assert caught.value.field == "host_api.secret_file"
    assert str(node.secret) in caught.value.message
    assert len(key) == 0 or key.decode("latin-1") not in caught.value.message


@pytest.mark.parametrize("mode", [0o400, 0o600])
def test_stricter_modes_are_fine(node: Node, mode: int) -> None:
    node.put_key(KEY, mode)
    assert node.opened().mints


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "link"])
def test_a_key_is_a_file(node: Node, kind: str) -> None:
    node.secret.unlink()
    if kind == "folder":
        node.secret.mkdir()
    elif kind == "fifo":
        os.mkfifo(node.secret, 0o600)
    elif kind == "link":
        (node.top / "other").write_bytes(KEY)
        (node.top / "other").chmod(0o600)
        node.secret.symlink_to(node.top / "other")
    with pytest.raises(Configuration, match=r"api\.key"):
        node.opened()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
def test_another_users_key_is_refused(node: Node) -> None:
    os.chown(node.secret, 4711, 4711)
    with pytest.raises(Configuration, match="belongs to uid 4711"):
        node.opened()


def test_a_key_that_went_bad_fails_starts_and_execs_by_name(node: Node) -> None:
    api = node.api()
    node.put_key(b"short")
    for call in (api.begin, api.variables):
        with pytest.raises(StartFailed, match="5 bytes") as caught:
            call(status(), node.dirs())
        assert caught.value.field == "host_api.secret_file"


# -- the socket and the section


def test_a_socket_that_is_not_there_yet_is_no_hindrance(node: Node, lines: list[str]) -> None:
    assert node.opened().socket == str(node.socket)
    assert [line for line in lines if line.startswith("WARNING") and str(node.socket) in line]


def test_a_socket_that_listens(node: Node, listening: Path, lines: list[str]) -> None:
    assert node.opened().socket == str(listening)
    assert lines == []


def test_the_sockets_path_is_told_without_links(node: Node, listening: Path) -> None:
    (node.top / "link").symlink_to(node.top)
    assert node.opened(socket=str(node.top / "link" / "api.sock")).socket == str(listening)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_socket_is_refused(node: Node, kind: str) -> None:
    node.socket.mkdir() if kind == "folder" else node.socket.write_text("")
    with pytest.raises(Configuration, match="is no socket") as caught:
        node.opened()
    assert caught.value.field == "host_api.socket"


@pytest.mark.parametrize("where", ["data/api.sock", "data/containers/web-0/tmp/s", "link/api.sock", "data"])
def test_a_socket_in_the_data_directory_is_refused(node: Node, where: str) -> None:
    node.dirs()
    (node.top / "link").symlink_to(node.root)
    with pytest.raises(Configuration, match="data directory") as caught:
        node.opened(socket=str(node.top / where))
    assert caught.value.field == "host_api.socket"


@pytest.mark.parametrize("length", [103, 104, 107, 108, 300])
def test_a_path_no_socket_can_have_is_refused(length: int, tmp_path: Path) -> None:
    path = "/" + "s" * (length - 1)
    longest = {"Darwin": 103}.get(os.uname().sysname, 107)
    config = HostApiConfig(socket=path)
    if length <= longest:
        assert HostApi.open(config, node="n1", data_root=tmp_path).socket == path
    else:
        with pytest.raises(Configuration, match=f"{length} bytes"):
            HostApi.open(config, node="n1", data_root=tmp_path)


def test_a_token_needs_somebody_to_be_shown_to(node: Node) -> None:
    with pytest.raises(Configuration, match="nobody to show it to"):
        node.opened(url=None, socket=None)
    assert not HostApi.open(HostApiConfig(), node="n1", data_root=node.root).mints


@pytest.mark.parametrize(
    ("ttl", "fine"),
    [(1, False), (1.9, False), (2, True), (30 * 86400, True), ("31d", False), (2592001, False)],
)
def test_how_long_a_token_may_live(tmp_path: Path, ttl: Any, fine: bool) -> None:
    path = tmp_path / "node.toml"
    path.write_text(f"[host_api]\nttl_s = {ttl!r}\n".replace("'", '"'))
    if fine:
        assert load_config(path, {}, {}).host_api.ttl_s == ttl
    else:
        with pytest.raises(Configuration, match=r"host_api\.ttl_s"):
            load_config(path, {}, {})


# -- secrets stay out of the log


def test_tokens_and_the_key_are_kept_out_of_the_log(node: Node) -> None:
    token = node.api().begin(status(), node.dirs())["SANDFLEET_TOKEN"]
    redactor = Redactor()
    assert redactor.scrub(f"env TOKEN={token}, twice: {token!r}") == f"env TOKEN={HIDDEN}, twice: '{HIDDEN}'"
    assert redactor.scrub(f"\\n{token}\\n") == f"\\n{HIDDEN}\\n"
    redactor.add(b"k" * 40)
    assert token not in redactor.scrub(f"{'k' * 40} {token}")
    harmless = 'eyJ is how {" begins in base64, eyJ.eyJ.sig is none'
    assert redactor.scrub(harmless) == harmless


def test_the_key_is_registered_and_the_old_one_forgotten(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    redactor = Redactor()
    monkeypatch.setattr("worker.host_api.register_secret", redactor.add)
    monkeypatch.setattr("worker.host_api.forget_secret", redactor.discard)
    node.put_key(b"first-key-of-the-host-api-32-bytes\n")
    api = node.api()
    api.key()
    assert redactor.scrub("key first-key-of-the-host-api-32-bytes") == f"key {HIDDEN}"
    node.put_key(b"other-key-of-the-host-api-32-bytes\n")
    api.key()
    api.key()
    assert redactor.scrub("other-key-of-the-host-api-32-bytes") == HIDDEN
    assert "first" in redactor.scrub("first-key-of-the-host-api-32-bytes")
