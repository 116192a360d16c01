"""The sandbox that a spec would have on some node, without that node: nothing is looked up in the file system.

A path is taken as canonical once the links that every system of the kind has are written out (`/tmp` is
`/private/tmp` on a Mac), and the node grants whatever is asked. So the same profile comes out on any machine.
"""

import functools
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from schemas.errors import ContractError, InvalidCommand, InvalidSpec
from schemas.spec import BindStorage, ServiceSpec
from schemas.subjects import MAX_REPLICA, build_cid
from schemas.values import CONTROL, check_ulid
from worker.config import Config
from worker.config_model import PolicyConfig
from worker.datadir import ContainerDirs
from worker.platform.base import Profile, Rules, SandboxPolicy
from worker.platform.darwin.describe import NEWEST_RELEASE, OLDEST_RELEASE, SeatbeltRules
from worker.platform.darwin.sbpl import canonical as darwin_path
from worker.platform.linux.driver import LinuxDriver
from worker.policy import HostFacts, make_policy
from worker.policy_paths import Canonical

Platform = Literal["darwin", "linux"]
PLATFORMS: tuple[Platform, ...] = ("darwin", "linux")
NEWEST_LANDLOCK = 7
NO_INSTANCE = "0" * 26

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]

# Links that systems of the kind have.
_LINUX_LINKS = {"/var/run": "/run", "/var/lock": "/run/lock"}


class Place(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The node and container that a profile is made for. Paths are absolute, not yet canonical.

    `macos` counts for darwin, `landlock` (the ABI; with it goes a system-call filter) for linux. Without
    `gpu_enabled` the profile is that of the spec less its GPU. `api_socket` is the host API's.
    """

    platform: Platform = "darwin"
    service: str = "app"
    replica: Annotated[int, msgspec.Meta(ge=0, le=MAX_REPLICA)] = 0
    data_dir: str = "/var/lib/sandfleet"
    port: Port | None = None
    macos: Annotated[int, msgspec.Meta(ge=OLDEST_RELEASE, le=NEWEST_RELEASE)] = NEWEST_RELEASE
    landlock: Annotated[int, msgspec.Meta(ge=0, le=NEWEST_LANDLOCK)] = NEWEST_LANDLOCK
    gpu_enabled: bool = True
    api_socket: str | None = None
    rootfs_dir: str | None = None
    instance: str = NO_INSTANCE
    nats_ports: tuple[Port, ...] = (4222,)


class Made(msgspec.Struct, frozen=True):
    """What came of a spec."""

    spec: ServiceSpec
    policy: SandboxPolicy
    profile: Profile


def make(spec: ServiceSpec, place: Place, *, field: str = "spec") -> Made:
    """The policy and profile of `spec` at `place`.

    Raises PolicyDenied, Unsupported or InvalidSpec for the spec, CreateFailed for a profile that is too
    large, InvalidCommand, naming the field, for the place.
    """
    if not place.gpu_enabled and spec.resources.gpu is not None:
        resources = msgspec.structs.replace(spec.resources, gpu=None)
        spec = msgspec.structs.replace(spec, resources=resources)
    rules = rules_of(place)
    policy = _policy(spec, place, rules, field)
    return Made(spec, policy, rules.describe(policy))


def rules_of(place: Place) -> Rules:
    return _seatbelt(place.macos) if place.platform == "darwin" else linux_rules(place.landlock)


@functools.cache
def _seatbelt(release: int) -> SeatbeltRules:
    return SeatbeltRules(release)


@functools.cache
def linux_rules(abi: int, has_filter: bool = True) -> LinuxDriver:
    """The driver of a kernel that is not asked: with all that does not depend on these two."""
    return LinuxDriver(abi=abi, filter=has_filter, root=False, listed=True, gate=has_filter, rooted=True)


def canonical_on(platform: Platform) -> Canonical:
    """The form in which a platform's rules have a path; InvalidSpec for what is no absolute path."""
    return darwin_path if platform == "darwin" else _linux_path


def _linux_path(path: str) -> str:
    pure = PurePosixPath(path)
    if not path.startswith("/") or ".." in pure.parts:
        raise InvalidSpec(f"{path!r} is not an absolute path without `..`")
    if CONTROL.search(path):
        raise InvalidSpec(f"{path!r} holds control characters")
    text = "/" + "/".join(pure.parts[1:])
    for link, target in _LINUX_LINKS.items():
        if text == link or text.startswith(link + "/"):
            return target + text[len(link) :]
    return text


def _policy(spec: ServiceSpec, place: Place, rules: Rules, field: str) -> SandboxPolicy:
    root = _place_path(place, "data_dir", place.data_dir)
    cid = build_cid(place.service, place.replica)
    dirs = ContainerDirs(Path(root) / "containers" / cid)
    if place.rootfs_dir is not None:
        dirs.rootfs = Path(_place_path(place, "rootfs_dir", place.rootfs_dir))
    socket = None if place.api_socket is None else _place_path(place, "api_socket", place.api_socket)
    return make_policy(
        spec,
        config=_generous(place.platform),
        dirs=dirs,
        cid=cid,
        instance=check_ulid(place.instance, field="instance"),
        port=place.port,
        host=HostFacts(
            data_root=root,
            nats_ports=tuple(sorted(set(place.nats_ports))),
            api_socket=socket,
            api_tokens=socket is not None,
            canonical=functools.partial(_canonical, canonical_on(place.platform)),
        ),
        driver=rules,
        field=field,
    )


@functools.cache
def _generous(platform: Platform) -> Config:
    """A node that grants all that can be granted: what is shown is what the spec asks for."""
    groups = _seatbelt(NEWEST_RELEASE).groups() if platform == "darwin" else linux_rules(0).groups()
    return Config(policy=granting_all(groups))


def granting_all(groups: Iterable[str]) -> PolicyConfig:
    return PolicyConfig(
        bind_sources=("/",),
        read=("/",),
        write=("/",),
        groups=tuple(groups),
        mach_lookup=("*",),
        unix_sockets=("/",),
        gpu=True,
    )


def links_of(spec: ServiceSpec, policy: SandboxPolicy) -> dict[str, str]:
    """Paths that the spec names which were links, and what its sandbox has in their place."""
    found: dict[str, str] = {}
    for origin, written in (("sandbox.read", spec.sandbox.read), ("sandbox.write", spec.sandbox.write)):
        granted = [rule.path for rule in policy.paths if rule.origin == origin]
        found.update(zip(map(os.path.normpath, written), granted, strict=False))
    for item, volume in zip(spec.storage, policy.volumes, strict=False):
        if isinstance(item, BindStorage):
            found[os.path.normpath(item.source)] = volume.source
    return {link: target for link, target in found.items() if link != target}


def _canonical(of_platform: Canonical, path: str) -> str:
    """As `HostFacts.canonical` fails: with ValueError."""
    try:
        return of_platform(path)
    except ContractError as failure:
        raise ValueError(failure.message) from None


def _place_path(place: Place, field: str, path: str) -> str:
    try:
        found = canonical_on(place.platform)(path)
    except ContractError as failure:
        raise InvalidCommand(failure.message, field=field) from None
    if found == "/":
        raise InvalidCommand("must not be / itself", field=field)
    return found


# -- as one line of JSON


class ShowRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of `profile show --batch`; null stands for the default."""

    spec: dict[str, Any]
    platform: Platform | None = None
    service: str | None = None
    replica: Annotated[int, msgspec.Meta(ge=0, le=MAX_REPLICA)] | None = None
    data_dir: str | None = None
    port: Port | None = None
    macos: Annotated[int, msgspec.Meta(ge=OLDEST_RELEASE, le=NEWEST_RELEASE)] | None = None
    landlock: Annotated[int, msgspec.Meta(ge=0, le=NEWEST_LANDLOCK)] | None = None
    gpu_enabled: bool | None = None
    api_socket: str | None = None
    rootfs_dir: str | None = None
    instance: str | None = None
    nats_ports: tuple[Port, ...] | None = None

    def place(self, default: Place) -> Place:
        given = msgspec.structs.asdict(self)
        changes = {name: value for name, value in given.items() if name != "spec" and value is not None}
        return msgspec.structs.replace(default, **changes) if changes else default
