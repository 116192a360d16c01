"""ServiceSpec → SandboxPolicy, within what the node's operator grants. No I/O but through
`HostFacts.canonical`.

Every PolicyDenied names the field of the spec and ends by saying which line of which file would allow it.
"""

import math
import resource
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from schemas.errors import InvalidSpec, Unsupported
from schemas.spec import (
    AnonymousStorage,
    BindStorage,
    NamedStorage,
    NetworkAccess,
    Protocol,
    S3Storage,
    SandboxIsolation,
    ServiceSpec,
    TmpfsStorage,
)
from schemas.status import Gpu, Network
from schemas.subjects import parse_cid
from schemas.values import normal_target
from worker.config import Config
from worker.datadir import ContainerDirs
from worker.errors import PolicyDenied
from worker.platform.base import (
    ROOTED,
    Device,
    Limits,
    NetworkPolicy,
    PathRule,
    Rules,
    SandboxPolicy,
    VolumeMount,
)
from worker.policy_paths import (
    Canonical,
    Forbidden,
    Missing,
    NotGranted,
    granted_path,
    granted_socket,
    overlap,
    real_path,
)
from worker.volume_s3.source import mirror_name, source_of

# Open at `localhost` beside the container's own: names, web.
WELL_KNOWN_PORTS = (53, 80, 443)


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy must know of this machine. Paths are canonical.

    `protected` are files and folders that no container may ever reach: configuration, credentials, secrets.
    `nats_ports` are those of the servers that the worker itself uses. `api_socket` is the host API's, which every
    container is granted; with `api_tokens` each has a folder with its token to read.
    """

    data_root: str
    protected: tuple[str, ...] = ()
    nats_ports: tuple[int, ...] = ()
    api_socket: str | None = None
    api_tokens: bool = False
    canonical: Canonical = real_path


def make_policy(
    spec: ServiceSpec,
    *,
    config: Config,
    dirs: ContainerDirs,
    cid: str,
    instance: str,
    port: int | None,
    host: HostFacts,
    driver: Rules,
    run: int = 0,
    field: str = "spec",
) -> SandboxPolicy:
    """The sandbox of one container. `port` is the assigned one, None when there is no container yet; `run` counts
    its starts.

    Raises PolicyDenied, Unsupported or InvalidSpec, each naming the field.
    """
    maker = _Maker(spec, config, dirs, cid, instance, port, host, driver, field)
    policy = msgspec.structs.replace(maker.make(), run=run)
    missing = {gap.feature.value: gap.reason for gap in driver.not_enforced(policy)}
    for index, feature in enumerate(spec.sandbox.require):
        if feature in missing:
            raise Unsupported(
                f"{feature} cannot be enforced here: {missing[feature]}",
                field=f"{field}.sandbox.require[{index}]",
            )
    return policy


def check_image(name: str, config: Config, *, field: str = "spec.image.name") -> None:
    """PolicyDenied for an image whose name matches none of the node's patterns."""
    if not config.policy.may_use_image(name):
        raise PolicyDenied(
            f"this node runs no image of the name {name}; {config.how_to_allow('images', name)}", field=field
        )


class _Maker:
    """One conversion. Each method fills one part and raises for its own fields."""

    def __init__(
        self,
        spec: ServiceSpec,
        config: Config,
        dirs: ContainerDirs,
        cid: str,
        instance: str,
        port: int | None,
        host: HostFacts,
        driver: Rules,
        field: str,
    ) -> None:
        self._spec = spec
        self._config = config
        self._dirs = dirs
        self._cid = cid
        self._instance = instance
        self._port = port
        self._host = host
        self._driver = driver
        self._field = field
        sockets = () if host.api_socket is None else (host.api_socket,)
        self._protected = (host.data_root, *host.protected, *sockets)

    def make(self) -> SandboxPolicy:
        check_image(self._spec.image.name, self._config, field=f"{self._field}.image.name")
        volumes = self._volumes()
        devices = self._devices()
        return SandboxPolicy(
            container=self._cid,
            instance=self._instance,
            isolation=self._isolation(),
            rootfs=str(self._dirs.rootfs),
            tmp=str(self._dirs.tmp),
            state_dir=str(self._dirs.state),
            paths=self._paths(volumes, devices),
            volumes=volumes,
            devices=devices,
            network=self._network(),
            gpu=self._gpu(),
            groups=self._groups(),
            mach_lookup=self._mach_lookup(),
            limits=self._limits(),
            marker=self._dirs.marker(self._instance),
            require=tuple(self._spec.sandbox.require),
            tty=self._spec.tty,
            deny=self._deny(),
        )

    def _refuse(self, message: str, field: str, key: str, value: str) -> PolicyDenied:
        return PolicyDenied(
            f"{message}; {self._config.how_to_allow(key, value)}", field=f"{self._field}.{field}"
        )

    # -- files

    def _paths(self, volumes: tuple[VolumeMount, ...], devices: tuple[Device, ...]) -> tuple[PathRule, ...]:
        sandbox, policy = self._spec.sandbox, self._config.policy
        rules = [
            PathRule(str(self._dirs.rootfs), "rwx", "rootfs"),
            PathRule(str(self._dirs.tmp), "rwx", "tmp"),
        ]
        if self._host.api_tokens:
            rules.append(PathRule(str(self._dirs.api), "r", "host_api"))
        for volume in volumes:
            rules.append(PathRule(volume.source, "rx" if volume.readonly else "rwx", "volume"))
        for index, path in enumerate(sandbox.read):
            real = self._granted(path, f"sandbox.read[{index}]", "read", (*policy.read, *policy.write))
            rules.append(PathRule(real, "rx", "sandbox.read"))
        for index, path in enumerate(sandbox.write):
            real = self._granted(path, f"sandbox.write[{index}]", "write", policy.write)
            rules.append(PathRule(real, "rwx", "sandbox.write"))
        for device in devices:
            rules.append(PathRule(device.path, "rw" if device.write else "r", "device"))
        return tuple(rules)

    def _granted(self, path: str, field: str, key: str, grants: tuple[str, ...]) -> str:
        try:
            return granted_path(path, grants, self._protected, self._host.canonical)
        except NotGranted as failure:
            raise self._refuse(str(failure), field, key, path) from failure
        except Forbidden as failure:
            raise PolicyDenied(str(failure), field=f"{self._field}.{field}") from failure
        except Missing as failure:
            raise InvalidSpec(str(failure), field=f"{self._field}.{field}") from failure

    def _volumes(self) -> tuple[VolumeMount, ...]:
        """In the order of the spec. Folders of our own are named by their place in it."""
        mounts = []
        for index, item in enumerate(self._spec.storage):
            where = f"storage[{index}]"
            target = f"/{normal_target(item.target)}"
            own = str(self._dirs.root / "volumes" / str(index))
            match item:
                case BindStorage():
                    grants = self._config.policy.bind_sources
                    source = self._granted(item.source, f"{where}.source", "bind_sources", grants)
                    mount = VolumeMount(kind="bind", source=source, target=target, readonly=item.readonly)
                case NamedStorage():
                    mount = VolumeMount(
                        kind="named",
                        source=str(Path(self._host.data_root) / "volumes" / item.name),
                        target=target,
                        readonly=item.readonly,
                        size_bytes=item.size_bytes,
                        name=item.name,
                    )
                case AnonymousStorage():
                    mount = VolumeMount(kind="anonymous", source=own, target=target)
                case TmpfsStorage():
                    mount = VolumeMount(
                        kind="tmpfs", source=own, target=target, size_bytes=item.size_bytes, mode=item.mode
                    )
                case S3Storage():
                    self._check_s3(item, where)
                    name = mirror_name(self._instance, index)
                    mirror = Path(self._host.data_root) / "mirrors" / name / "files"
                    mount = VolumeMount(kind="s3", source=str(mirror), target=target, readonly=item.readonly)
            mounts.append(mount)
        if self._isolation() != ROOTED:
            self._check_nesting(mounts)
            self._check_readonly(mounts)
        return tuple(mounts)

    def _check_s3(self, item: S3Storage, where: str) -> None:
        """The worker asks the server in the container's name, so both the server and the secret must be granted."""
        source = source_of(item, field=f"{self._field}.{where}")
        if not self._config.policy.may_use_s3(source.origin):
            raise self._refuse(
                f"{source.origin} is not where s3 volumes of this node may be",
                f"{where}.endpoint",
                "s3_endpoints",
                source.origin,
            )
        service, _ = parse_cid(self._cid)
        secret = source.credentials
        if secret is not None and not self._config.policy.may_have_secret(secret, service):
            raise self._refuse(
                f"the service {service} may not have the secret {secret!r}",
                f"{where}.credentials",
                "secrets",
                secret,
            )

    def _check_nesting(self, mounts: list[VolumeMount]) -> None:
        """A volume inside another one's target would have to be made in that one's folder on the host."""
        for index, inner in enumerate(mounts):
            if any(inner.target.startswith(outer.target + "/") for outer in mounts):
                raise Unsupported(
                    f"{inner.target} lies inside another volume, which needs isolation rootfs",
                    field=f"{self._field}.storage[{index}].target",
                )

    def _check_readonly(self, mounts: list[VolumeMount]) -> None:
        """Without mounts a folder is one thing: it cannot be read-only at one target and writable at another."""
        for index, fixed in enumerate(mounts):
            for other in mounts:
                if fixed.readonly and not other.readonly and overlap(fixed.source, other.source):
                    raise Unsupported(
                        f"{fixed.target} cannot be read-only while {other.target} makes the same folder writable, "
                        "except with isolation rootfs",
                        field=f"{self._field}.storage[{index}].readonly",
                    )

    def _devices(self) -> tuple[Device, ...]:
        policy = self._config.policy
        found = []
        for index, device in enumerate(self._spec.devices):
            key, grants = ("write", policy.write) if device.write else ("read", (*policy.read, *policy.write))
            path = self._granted(device.path, f"devices[{index}].path", key, grants)
            found.append(Device(path=path, read=device.read, write=device.write))
        return tuple(found)

    def _deny(self) -> tuple[str, ...]:
        root = self._host.data_root.rstrip("/")
        own = ("worker.db", "worker.db-wal", "worker.db-shm", "worker.lock", "node.json", "launcher.key")
        folders = ("launcher.sock", "images", "spool", "secrets")
        return (
            *(f"{root}/{name}" for name in (*own, *folders)),
            str(self._dirs.state),
            *self._host.protected,
        )

    # -- network

    def _network(self) -> NetworkPolicy:
        spec, field = self._spec, "network.access"
        level = self._level()
        allowed = self._config.policy.network
        if level not in allowed:
            asked = "" if spec.network.access is not NetworkAccess.AUTO else " (`auto` here)"
            raise self._refuse(
                f"the network level {level.value}{asked} is not among this node's: {' '.join(allowed)}",
                field,
                "network",
                level.value,
            )
        api = self._host.api_socket
        sockets = (*self._unix_sockets(), *(() if api is None else (api,)))
        if level is Network.NONE:
            return NetworkPolicy(
                level=level, denied_ports=self._host.nats_ports, unix_sockets=sockets, api_socket=api
            )
        binds = self._bind_ports(level)
        connects = self._connect_ports(level)
        if level is Network.LOCALHOST:
            connects |= binds | {*WELL_KNOWN_PORTS}
        denied = {*self._host.nats_ports}
        udp = {endpoint.listen_port for endpoint in spec.endpoints if endpoint.protocol is Protocol.UDP}
        return NetworkPolicy(
            level=level,
            bind_ports=tuple(sorted(binds - denied)),
            udp_ports=tuple(sorted(udp - denied)),
            connect_ports=tuple(sorted(connects - denied)),
            denied_ports=tuple(sorted(denied)),
            unix_sockets=sockets,
            api_socket=api,
            udp=level is not Network.LOCALHOST or bool(udp),
        )

    def _level(self) -> Network:
        access = self._spec.network.access
        if access is NetworkAccess.AUTO:
            return Network.LOCALHOST if self._spec.endpoints else Network.FULL
        return Network(access.value)

    def _bind_ports(self, level: Network) -> set[int]:
        ports = set() if self._port is None else {self._port}
        for index, endpoint in enumerate(self._spec.endpoints):
            name = "port" if endpoint.target_port is None else "target_port"
            self._check_port(level, endpoint.listen_port, f"endpoints[{index}].{name}")
            ports.add(endpoint.listen_port)
        return ports

    def _connect_ports(self, level: Network) -> set[int]:
        for index, port in enumerate(self._spec.network.connect_ports):
            self._check_port(level, port, f"network.connect_ports[{index}]")
        return {*self._spec.network.connect_ports}

    def _check_port(self, level: Network, port: int, field: str) -> None:
        if port in self._host.nats_ports and level is not Network.FULL:
            raise PolicyDenied(
                f"{port} is the port of the NATS server that this node obeys: no container may use it",
                field=f"{self._field}.{field}",
            )

    def _unix_sockets(self) -> tuple[str, ...]:
        found = []
        for index, path in enumerate(self._spec.sandbox.unix_sockets):
            field = f"sandbox.unix_sockets[{index}]"
            try:
                grants = self._config.policy.unix_sockets
                found.append(granted_socket(path, grants, self._protected, self._host.canonical))
            except NotGranted as failure:
                raise self._refuse(str(failure), field, "unix_sockets", path) from failure
            except Forbidden as failure:
                raise PolicyDenied(str(failure), field=f"{self._field}.{field}") from failure
            except Missing as failure:
                raise InvalidSpec(str(failure), field=f"{self._field}.{field}") from failure
        return tuple(found)

    # -- the rest

    def _isolation(self) -> str:
        asked = self._spec.sandbox.isolation
        isolation = self._config.node.isolation if asked is SandboxIsolation.AUTO else asked.value
        if isolation not in self._driver.capabilities().isolation:
            raise Unsupported(
                f"this node has no isolation {isolation}", field=f"{self._field}.sandbox.isolation"
            )
        if isolation not in self._config.policy.isolation:
            message = f"isolation {isolation} is not among this node's"
            raise self._refuse(message, "sandbox.isolation", "isolation", isolation)
        return str(isolation)

    def _gpu(self) -> Gpu:
        gpu = self._spec.resources.gpu
        if gpu is None or gpu.count == 0:
            return Gpu.NONE
        wanted = Gpu.MPS_ONLY if gpu.mode == "mps" else Gpu.METAL_COMPUTE
        if wanted.value not in self._driver.capabilities().gpu:
            raise Unsupported("this node has no GPU for containers", field=f"{self._field}.resources.gpu")
        if not self._config.policy.gpu:
            raise self._refuse("this node lends its GPU to no container", "resources.gpu", "gpu", "true")
        return wanted

    def _groups(self) -> tuple[str, ...]:
        known = self._driver.groups()
        for index, name in enumerate(self._spec.sandbox.groups):
            field = f"sandbox.groups[{index}]"
            group = known.get(name)
            if group is None:
                raise Unsupported(
                    f"this platform has no rule group {name}; it has {' '.join(sorted(known))}",
                    field=f"{self._field}.{field}",
                )
            if not group.harmless and name not in self._config.policy.groups:
                raise self._refuse(f"the rule group {name} is not granted here", field, "groups", name)
        return tuple(dict.fromkeys(self._spec.sandbox.groups))

    def _mach_lookup(self) -> tuple[str, ...]:
        for index, name in enumerate(self._spec.sandbox.mach_lookup):
            field = f"sandbox.mach_lookup[{index}]"
            if self._driver.name != "darwin":
                raise Unsupported("Mach services are those of a Mac", field=f"{self._field}.{field}")
            if not any(fnmatchcase(name, pattern) for pattern in self._config.policy.mach_lookup):
                raise self._refuse(f"the Mach service {name} is not granted here", field, "mach_lookup", name)
        return tuple(self._spec.sandbox.mach_lookup)

    def _limits(self) -> Limits:
        resources = self._spec.resources
        cpu_time_s = resources.cpu_time_limit_s
        return Limits(
            max_files=resources.max_files,
            cpu_time_limit_s=None if cpu_time_s is None else max(1, math.ceil(cpu_time_s)),
            memory_bytes=self._memory(),
            pids=resources.pids,
            cpu=resources.cpu,
            ulimits=self._ulimits(),
        )

    def _memory(self) -> int | None:
        """What is not limited by the spec gets the node's most."""
        wanted, most = self._spec.resources.memory_bytes, self._config.policy.max_memory_bytes
        if most is None or wanted is None:
            return wanted if most is None else most
        if wanted > most:
            text = str(self._spec.resources.memory)
            raise self._refuse(
                f"{text} is more than a container may have here", "resources.memory", "max_memory", text
            )
        return wanted

    def _ulimits(self) -> dict[str, tuple[int, int]]:
        found = {}
        for name, limit in self._spec.ulimits.items():
            if not hasattr(resource, f"RLIMIT_{name.upper()}"):
                raise Unsupported(f"this system has no limit {name}", field=f"{self._field}.ulimits.{name}")
            found[name] = limit.pair
        return found
