"""What the parts of the runtime share: built by the agent and handed down."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import msgspec

from schemas.errors import InvalidSpec
from schemas.spec import ServiceSpec, SpecFeature, unsupported_fields
from schemas.status import ContainerStatus, Stats
from schemas.subjects import Subjects
from worker.config import Config
from worker.datadir import ContainerDirs, DataDir
from worker.entrypoint import runnable, shown
from worker.errors import (
    ContractError,
    CreateFailed,
    PolicyDenied,
    PullFailed,
    ResourceExhausted,
    Unsupported,
)
from worker.host_api import HostApi
from worker.ids import new_ulid
from worker.images.accounts import read_accounts, run_as
from worker.images.cloning import MeasuredCloner
from worker.images.model import ImageConfig, oci_platform
from worker.images.pull import Puller
from worker.images.store import ImageStore
from worker.images.transfers import Transfers
from worker.images.trees import remove_tree
from worker.journal import Journal
from worker.logs import LogShipper, write_incomplete_eof
from worker.owners import hand_over
from worker.platform.base import ROOTED, Driver, RunAs, SandboxPolicy
from worker.policy import HostFacts, check_image, make_policy
from worker.policy_paths import Forbidden, Missing, NotGranted, granted_path
from worker.records import ContainerRecord
from worker.secret_files import SecretFiles
from worker.stats import Target
from worker.supervisor import ExitRecord, Launcher, read_exit_record
from worker.volume_s3.mirrors import Mirrors
from worker.volumes import make_sources, mount_volumes

P = ParamSpec("P")
T = TypeVar("T")

LEFTOVER_PREFIX = ".gone-"
_encode = msgspec.json.Encoder().encode


@dataclass(slots=True, eq=False)
class Services:
    """The parts a container's work needs. `launcher` is replaced when its process died."""

    config: Config
    node: str
    subjects: Subjects
    journal: Journal
    data: DataDir
    driver: Driver
    images: ImageStore
    cloner: MeasuredCloner
    puller: Puller
    transfers: Transfers
    logs: LogShipper
    launcher: Launcher
    host: HostFacts
    secrets: SecretFiles
    host_api: HostApi
    mirrors: Mirrors
    boot_id: str
    features: frozenset[str]
    slots: int
    threads: ThreadPoolExecutor
    draining: bool = False
    on_record: Callable[[str, ContainerRecord | None], None] = field(default=lambda cid, record: None)
    remove_later: Callable[[str], None] = field(default=lambda cid: None)
    measure: Callable[[Target], Awaitable[Stats | None]] | None = None
    attach_launcher: Callable[[], Awaitable[None]] | None = None
    container_count: Callable[[], int] = field(default=lambda: 0)
    live_count: Callable[[], int] = field(default=lambda: 0)
    server_ports: Callable[[], frozenset[int]] = field(default=frozenset)
    _plans: dict[str, tuple[SandboxPolicy, dict[str, Any]]] = field(default_factory=dict)
    _search_dirs: tuple[str, ...] | None = None
    _image_configs: dict[str, ImageConfig] = field(default_factory=dict)

    async def in_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call in the runtime's own threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, partial(call, *args, **kwargs))

    # -- policy

    def grant(self, config: Config) -> None:
        """Go by the policy of `config` from now on: for what is asked or begun after this."""
        self.config = config
        for part in (self.puller, self.transfers, self.mirrors):
            part.grant(config)

    def make_policy(
        self,
        spec: ServiceSpec,
        cid: str,
        instance: str,
        port: int | None,
        run: int = 0,
        *,
        user: RunAs | None = None,
        config: Config | None = None,
    ) -> SandboxPolicy:
        """The container's sandbox under the node's policy of now: a grant that was taken back counts.

        With `config`, under that of a node that grants something else.
        """
        made = make_policy(
            spec,
            config=self.config if config is None else config,
            dirs=self.data.container(cid),
            cid=cid,
            instance=instance,
            port=port,
            host=self._facts(),
            driver=self.driver,
            run=run,
        )
        return made if user is None else msgspec.structs.replace(made, user=user)

    def _facts(self) -> HostFacts:
        """With the ports of the servers that the worker has heard of: any of them may be the next that it obeys."""
        ports = {*self.host.nats_ports, *self.server_ports()}
        return msgspec.structs.replace(self.host, nats_ports=tuple(sorted(ports)))

    def policy_of(self, record: ContainerRecord) -> SandboxPolicy:
        status = record.status
        return self.make_policy(
            record.spec, status.container, status.instance, status.port, status.run, user=record.user
        )

    def plan(self, policy: SandboxPolicy) -> dict[str, Any]:
        """The launcher's plan for a policy, kept per instance while the policy is the same."""
        known = self._plans.get(policy.instance)
        if known is not None and known[0] == policy:
            return known[1]
        plan = self.driver.plan(policy)
        self._plans[policy.instance] = (policy, plan)
        return plan

    def may_run(self, policy: SandboxPolicy) -> Callable[[str], bool]:
        """See `resolve_command`. The system's folders are looked up once."""
        if policy.isolation == ROOTED:
            return shown(policy, self.driver.search_dirs(policy))
        if self._search_dirs is None:
            self._search_dirs = self.driver.search_dirs()
        return runnable(policy, self._search_dirs)

    def check_image(self, name: str, *, field: str = "spec.image.name") -> None:
        check_image(name, self.config, field=field)

    def check_platform(self, spec: ServiceSpec) -> None:
        """Raises Unsupported for a spec that asks for another system or processor."""
        if spec.platform is None:
            return
        system, arch = oci_platform()
        here = ("macos" if system == "darwin" else system, arch)
        if (spec.platform.os.value, spec.platform.arch.value) != here:
            raise Unsupported(
                f"this node is {'/'.join(here)}, not {spec.platform.os}/{spec.platform.arch}",
                field="spec.platform",
            )

    def check_features(self, spec: ServiceSpec) -> None:
        """Raises Unsupported for a field that this node cannot honour. A `user` is looked at by `run_as`."""
        lacking = unsupported_fields(spec, self.features | {SpecFeature.USER})
        if lacking:
            raise Unsupported(f"this node cannot honour spec.{lacking[0]}", field=f"spec.{lacking[0]}")

    def run_as(self, spec: ServiceSpec, image: ImageConfig, root: Path) -> RunAs | None:
        """The user of a container, when it is not the worker's own; `root` has the image's files. Blocking.

        InvalidSpec, Unsupported and CreateFailed say whose user it is that cannot be had. A worker that is not
        root, or may not change users, runs what an image says as itself.
        """
        asked = spec.user or (image.user if self.driver.changes_user() else None)
        if not asked:
            return None
        try:
            found = run_as(asked, *read_accounts(root))
        except ValueError as failure:
            if spec.user is not None:
                raise InvalidSpec(str(failure), field="spec.user") from None
            raise CreateFailed(f"the image is to run as {asked[:80]}: {failure}") from None
        me = RunAs(uid=os.geteuid(), gid=os.getegid())
        if found == me or (found.uid == me.uid and ":" not in asked):
            return None
        if not self.driver.changes_user():
            raise Unsupported(
                f"containers of this node run as uid {me.uid}: its worker may not change users",
                field="spec.user",
            )
        return found

    def check_slots(self) -> None:
        """Raises ResourceExhausted when the node may hold no more containers."""
        most = self.config.policy.max_containers
        if most is not None and self.container_count() > most:
            raise ResourceExhausted(
                f"this node holds {most} containers already; "
                + self.config.how_to_allow("max_containers", str(most + 1))
            )

    def register_source(self, source_dir: str) -> Path:
        """The folder that `register_image` may read. PolicyDenied outside of the node's `register_roots`."""
        try:
            roots = self.config.policy.register_roots
            protected = (self.host.data_root, *self.host.protected)
            return Path(granted_path(source_dir, roots, protected, self.host.canonical))
        except NotGranted as failure:
            raise PolicyDenied(
                f"{failure}; {self.config.how_to_allow('register_roots', source_dir)}", field="source_dir"
            ) from None
        except Forbidden as failure:
            raise PolicyDenied(str(failure), field="source_dir") from None
        except Missing as failure:
            raise PullFailed(str(failure), field="source_dir") from None

    def archive_source(self, source_file: str) -> Path:
        """The file that `load_image` may read: below the `register_roots`, as a folder that is registered."""
        try:
            return self.register_source(source_file)
        except ContractError as failure:
            failure.field = "source_file"
            raise

    def image_config(self, digest: str | None) -> ImageConfig:
        if digest is None:
            return ImageConfig()
        known = self._image_configs.get(digest)
        if known is None:
            known = self._image_configs[digest] = self.images.config(digest)
        return known

    # -- files of a container (blocking: call in a thread)

    def write_container_files(
        self, dirs: ContainerDirs, record: ContainerRecord, policy: SandboxPolicy, image: ImageConfig
    ) -> SandboxPolicy:
        """What stands in `state/` for a person to read, and the volumes' places in the rootfs.

        Gives the policy with the user that spec and image ask for, who owns the container's files then.
        """
        policy = msgspec.structs.replace(policy, user=self.run_as(record.spec, image, dirs.rootfs))
        try:
            if policy.isolation == ROOTED:
                make_sources(policy.volumes, self.driver.folder_limits)
            else:
                mount_volumes(policy.volumes, dirs.rootfs, self.driver.folder_limits)
            _write(dirs.state / "config.json", _encode(record.spec))
            profile = self.driver.describe(policy)
            name = "sandbox.sb" if profile.language == "sbpl" else "sandbox.json"
            text = profile.text.encode() if profile.language == "sbpl" else _encode(profile)
            _write(dirs.state / name, text)
            hand_over(policy, dirs, self.data)
        except OSError as failure:
            raise CreateFailed(f"{failure.filename or dirs.root}: {failure.strerror}") from failure
        return policy

    def new_container(self, dirs: ContainerDirs, cid: str) -> None:
        """Make a container's directories, in the place of any that are there."""
        self.sweep_container(cid)
        dirs.make()

    def sweep_container(self, cid: str) -> None:
        """Delete a container's directory, or a stale one of that name. The name is free at once."""
        root = self.data.container(cid).root
        gone = self.data.containers / f"{LEFTOVER_PREFIX}{new_ulid()}"
        try:
            os.rename(root, gone)
        except FileNotFoundError:
            return
        remove_tree(gone)

    def sweep_strangers(self, known: set[str]) -> None:
        """Delete directories of containers that the journal does not know: a dead worker's half-done work."""
        for entry in os.scandir(self.data.containers):
            if entry.name not in known:
                remove_tree(Path(entry.path))

    def read_exit(self, state_dir: Path, status: ContainerStatus) -> ExitRecord | None:
        """The exit record that a launcher left on disk, if it is of this run."""
        found = read_exit_record(state_dir)
        if found is None or found.instance != status.instance or found.run != status.run:
            return None
        return found

    def incomplete_logs(self, cid: str, instance: str, run: int) -> None:
        """Mark both streams as cut off: what stood in the pipes is gone with the launcher."""
        state = self.data.container(cid).state
        if state.is_dir():
            write_incomplete_eof(state, run)
            self.logs.ended(instance)

    def dropped(self, instance: str) -> None:
        """An instance is gone: forget what was kept for it."""
        self._plans.pop(instance, None)


def _write(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
