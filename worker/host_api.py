"""The host API that containers are told of: its address, and the token each of them shows there.

The API is a program of the operator's own. Each container gets a token of its own, a JWT that says who it is,
signed with a key that the API has too. The token of a start stands in its variables; the one in the file is
renewed at half its life, by whichever worker looks after the container then. No token and no key is kept
anywhere else: not in the journal, not in `state/`, in no event and no line of the log.
"""

import asyncio
import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
from loguru import logger

from schemas.status import ContainerStatus
from worker.config import HostApiConfig
from worker.datadir import ContainerDirs
from worker.errors import Configuration, ContractError, StartFailed
from worker.log import forget_secret, register_secret
from worker.platform.base import ROOTED_API
from worker.policy_paths import overlap

ALGORITHM = "HS256"
# RFC 7518, 3.2: a key for HS256 has at least the 256 bits of its hash.
MIN_SECRET_BYTES = 32
MAX_SECRET_BYTES = 4096
TOKEN = "token"
# `sun_path` less its NUL: unix(4) of macOS, unix(7) of Linux.
_LONGEST_SOCKET = {"Darwin": 103, "Linux": 107}
# How often a token is looked at within its life, and at least.
_LOOKS = 20
_LONGEST_PAUSE_S = 15.0

_SECRET_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_FRESH = "token.new"
_FIELD = "host_api.secret_file"


class Minted(msgspec.Struct, frozen=True):
    """When a token was made: `iat` as it says itself (wall clock), and by a clock that nobody sets."""

    iat_s: int
    at_s: float


def is_due(minted: Minted, *, ttl_s: float, wall_s: float, monotonic_s: float) -> bool:
    """Whether a token is to be renewed: half its life is over by either clock.

    The wall clock is what the API judges by. It can be set, and goes on while the machine sleeps; set back
    to before the token was issued, the API would refuse a token from the future.
    """
    half_s = ttl_s / 2
    return monotonic_s - minted.at_s >= half_s or not minted.iat_s <= wall_s < minted.iat_s + half_s


def claims(status: ContainerStatus, node: str, *, iat_s: int, ttl_s: float) -> dict[str, Any]:
    """What a token says. `sub` is the service, so that one rule of the API can hold for all its replicas."""
    return {
        "sub": status.service,
        "container": status.container,
        "instance": status.instance,
        "node": node,
        "iat": iat_s,
        "exp": iat_s + int(ttl_s),
    }


def read_secret(path: Path) -> bytes:
    """The key in the file, without one newline at its end.

    Configuration, never with any of it, for what others could read or have put there, or what is no key.
    """
    try:
        fd = os.open(path, _SECRET_FLAGS)
    except OSError as failure:
        raise _wrong(path, f"cannot be read: {failure.strerror}") from failure
    try:
        _check_secret(path, os.fstat(fd))
        key = os.read(fd, MAX_SECRET_BYTES + 2).removesuffix(b"\n")
    except OSError as failure:
        raise _wrong(path, f"cannot be read: {failure.strerror}") from failure
    finally:
        os.close(fd)
    if len(key) < MIN_SECRET_BYTES:
        raise _wrong(path, f"holds {len(key)} bytes; a key for {ALGORITHM} has at least {MIN_SECRET_BYTES}")
    if len(key) > MAX_SECRET_BYTES:
        raise _wrong(path, f"is larger than {MAX_SECRET_BYTES} bytes")
    return key


def _check_secret(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _wrong(path, "is not a file")
    if found.st_uid != os.geteuid():
        raise _wrong(path, f"belongs to uid {found.st_uid}, the worker runs as uid {os.geteuid()}")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise _wrong(path, f"has mode {stat.S_IMODE(found.st_mode):04o}; others could read it, make it 0600")


def _wrong(path: Path, what: str) -> Configuration:
    return Configuration(f"the key of the host API, {path}, {what}", field=_FIELD)


class HostApi:
    """What the node's `[host_api]` gives to each container; nothing without one."""

    def __init__(
        self,
        config: HostApiConfig,
        *,
        node: str,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = config.url
        # Resolved once: what a container is told is what its sandbox was given.
        self.socket = None if config.socket is None else os.path.realpath(config.socket)
        self.ttl_s = config.ttl_s
        self._secret_file = None if config.secret_file is None else Path(config.secret_file)
        self._node = node
        self._wall = wall
        self._monotonic = monotonic
        self._key = b""
        self._minted: dict[str, Minted] = {}

    @classmethod
    def open(cls, config: HostApiConfig, *, node: str, data_root: Path) -> "HostApi":
        """Check the section as far as it can be now. Configuration for what can never work."""
        api = cls(config, node=node)
        if api.socket is not None:
            _check_socket(api.socket, str(data_root))
        if api.mints:
            if api.socket is None and api.url is None:
                raise Configuration(
                    "host_api.secret_file is set, but neither host_api.socket nor host_api.url: containers "
                    "would have a token and nobody to show it to",
                    field=_FIELD,
                )
            api._encode({}, api.key())
        return api

    @property
    def mints(self) -> bool:
        """Whether containers get a token."""
        return self._secret_file is not None

    def key(self) -> bytes:
        """The key as it is now: read at each use, so that a new one needs no restart. Configuration."""
        assert self._secret_file is not None
        key = read_secret(self._secret_file)
        if key != self._key:
            register_secret(key)
            forget_secret(self._key)
            self._key = key
        return key

    def begin(self, status: ContainerStatus, dirs: ContainerDirs, *, rooted: bool = False) -> dict[str, str]:
        """The variables of a new run, whose token stands in its file then; StartFailed when that cannot be.

        `rooted`: the container has a root of its own, and its folder another place in it.
        """
        if not self.mints:
            return self._variables(dirs, None, rooted)
        try:
            return self._variables(dirs, self._renew(status, dirs, self.key()), rooted)
        except Configuration as failure:
            raise StartFailed(failure.message, field=_FIELD) from failure
        except OSError as failure:
            raise StartFailed(f"no token can be put into {dirs.api}: {failure.strerror}") from failure

    def variables(
        self, status: ContainerStatus, dirs: ContainerDirs, *, rooted: bool = False
    ) -> dict[str, str]:
        """The same for an `exec` in a running container, with a token of its own. StartFailed."""
        if not self.mints:
            return self._variables(dirs, None, rooted)
        try:
            token, _ = self._mint(status, self.key())
        except Configuration as failure:
            raise StartFailed(failure.message, field=_FIELD) from failure
        return self._variables(dirs, token, rooted)

    def _variables(self, dirs: ContainerDirs, token: str | None, rooted: bool) -> dict[str, str]:
        """Each setting that is missing leaves out its own."""
        found: dict[str, str] = {}
        if self.socket is not None:
            found["SANDFLEET_API_SOCKET"] = found["ZLAYER_SOCKET"] = self.socket
        if self.url is not None:
            found["SANDFLEET_API_URL"] = found["ZLAYER_API_URL"] = self.url
        if token is not None:
            found["SANDFLEET_TOKEN"] = found["ZLAYER_TOKEN"] = token
            found["SANDFLEET_TOKEN_FILE"] = f"{ROOTED_API if rooted else dirs.api}/{TOKEN}"
        return found

    def renew(
        self, live: Iterable[ContainerStatus], dirs_of: Callable[[str], ContainerDirs]
    ) -> list[ContractError]:
        """Renew what is due among the containers that run; gives what went wrong.

        Every file of theirs that this worker has not written itself is due: a worker before it may have been
        dead for long, and the key may be another one.
        """
        running = {status.instance: status for status in live}
        self._minted = {known: at for known, at in self._minted.items() if known in running}
        now = {"wall_s": self._wall(), "monotonic_s": self._monotonic()}
        due = [
            status
            for instance, status in running.items()
            if instance not in self._minted or is_due(self._minted[instance], ttl_s=self.ttl_s, **now)
        ]
        if not due:
            return []
        failures: list[ContractError] = []
        try:
            key = self.key()
            for status in due:
                dirs = dirs_of(status.container)
                try:
                    self._renew(status, dirs, key)
                except OSError as failure:
                    failures.append(StartFailed(f"no token can be put into {dirs.api}: {failure.strerror}"))
        except Configuration as failure:  # the key is none: the same for all
            failures.append(failure)
        return failures

    def _renew(self, status: ContainerStatus, dirs: ContainerDirs, key: bytes) -> str:
        token, minted = self._mint(status, key)
        write_token(dirs, token)
        self._minted[status.instance] = minted
        return token

    def _mint(self, status: ContainerStatus, key: bytes) -> tuple[str, Minted]:
        minted = Minted(int(self._wall()), self._monotonic())
        return self._encode(claims(status, self._node, iat_s=minted.iat_s, ttl_s=self.ttl_s), key), minted

    def _encode(self, payload: dict[str, Any], key: bytes) -> str:
        import jwt  # here, because it takes a tenth of a second, and most workers have no host API

        try:
            return jwt.encode(payload, key, algorithm=ALGORITHM)
        except jwt.InvalidKeyError as failure:
            assert self._secret_file is not None
            raise _wrong(
                self._secret_file, "is a public key or a JWK, not the bytes of a secret"
            ) from failure


def _check_socket(path: str, data_root: str) -> None:
    field = "host_api.socket"
    if overlap(path, data_root):
        raise Configuration(
            f"host_api.socket {path} lies in the data directory, which no container may reach: move it",
            field=field,
        )
    length, longest = len(os.fsencode(path)), _LONGEST_SOCKET.get(os.uname().sysname, 103)
    if length > longest:
        raise Configuration(
            f"host_api.socket {path} has {length} bytes, and the path of a socket at most {longest}",
            field=field,
        )
    try:
        found = os.stat(path)
    except FileNotFoundError:
        logger.warning("there is no host API at {} yet; containers start all the same", path)
        return
    except OSError as failure:
        raise Configuration(f"host_api.socket {path}: {failure.strerror}", field=field) from failure
    if not stat.S_ISSOCK(found.st_mode):
        raise Configuration(f"host_api.socket {path} is no socket", field=field)


def write_token(dirs: ContainerDirs, token: str) -> None:
    """Put `token` in the place of the one before, at once and whole.

    A folder of its own, because a sandbox rule for the file would hold for the one that is replaced. The file
    is 0400, and belongs to whom the container's temporary folder belongs. OSError.
    """
    owner = os.lstat(dirs.tmp)
    with contextlib.suppress(FileExistsError):  # what stands there is looked at when it is opened
        os.mkdir(dirs.api, 0o700)
    folder = os.open(dirs.api, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):  # left by a worker that died while it wrote
            os.unlink(_FRESH, dir_fd=folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(_FRESH, flags, 0o400, dir_fd=folder)
        with os.fdopen(file, "wb") as stream:
            if owner.st_uid != os.geteuid():
                os.fchown(stream.fileno(), owner.st_uid, owner.st_gid)
                os.fchmod(folder, 0o711)
            stream.write(token.encode())
        os.rename(_FRESH, TOKEN, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)


class TokenRenewer:
    """Keeps the token files of running containers fresh. Owned by the agent, started after the adoption."""

    def __init__(
        self,
        api: HostApi,
        live: Callable[[], Iterable[ContainerStatus]],
        dirs_of: Callable[[str], ContainerDirs],
    ) -> None:
        self._api = api
        self._live = live
        self._dirs_of = dirs_of
        self._told: set[str] = set()

    async def run(self) -> None:
        """Look at once, then again and again. Ends at once when no token is minted here."""
        while self._api.mints:
            self.look()
            await asyncio.sleep(min(self._api.ttl_s / _LOOKS, _LONGEST_PAUSE_S))

    def look(self) -> None:
        """Renew what is due. In one step of the loop: no container can end and be removed meanwhile.

        What went wrong is told once, until it is over, and tried again at the next look.
        """
        failed = {failure.message for failure in self._api.renew(self._live(), self._dirs_of)}
        for message in sorted(failed - self._told):
            logger.warning("a token of the host API was not renewed: {}", message)
        for message in sorted(self._told - failed):
            logger.info("renewed again, after: {}", message)
        self._told = failed
