"""Queries about sandboxes: a container's profile, what it decides, what it refused.

Apart from the others, and loaded when first asked: it brings along the rules and evaluators of two platforms.
"""

import asyncio
from functools import cache

import msgspec

from schemas import queries as q
from schemas.errors import InvalidCommand, Unsupported
from schemas.spec import ServiceSpec
from schemas.subjects import build_cid
from worker.answers import sandbox_of
from worker.config import Config
from worker.errors import NotFound
from worker.platform.base import Profile, RunAs, SandboxPolicy
from worker.platform.darwin.unified_log import LogOutput, UnifiedLog
from worker.profile_check import Attempts, check
from worker.profiles import NO_INSTANCE, canonical_on, granting_all, links_of
from worker.records import ContainerRecord
from worker.refusals import Whose, report
from worker.runtime import Runtime, target_of
from worker.services import Services

NO_RECORD = (
    "no record of refusals can be read here: Linux tells them only to its audit log, which takes root and "
    "kernel 6.15. Ask with sandfleet profile check, or run the program under strace"
)


class SandboxQueries:
    def __init__(self, services: Services, runtime: Runtime, *, log: UnifiedLog | None) -> None:
        """`log`: where a Mac's refusals are read, if not from its own unified log. Other systems keep no record."""
        self._services = services
        self._runtime = runtime
        self._log = log or (UnifiedLog() if services.driver.name == "darwin" else None)
        self._explaining = asyncio.Lock()

    async def profile(self, request: q.ProfileRequest) -> Profile:
        subject = self._subject(request)
        return self._services.driver.describe(subject.policy())

    async def check(self, request: q.CheckRequest) -> q.CheckReply:
        """In a thread: a denial is followed by a dozen further profiles, to find what would allow it."""
        return await self._services.in_thread(self._check, self._subject(request), request)

    def _check(self, subject: "_Subject", request: q.CheckRequest) -> q.CheckReply:
        driver = self._services.driver
        return check(
            subject.spec,
            self._attempts(subject),
            request.operation,
            request.argument,
            canonical=canonical_on("darwin" if driver.name == "darwin" else "linux"),
            groups=driver.groups(),
        )

    def _attempts(self, subject: "_Subject") -> Attempts:
        services = self._services
        driver = services.driver
        generous = msgspec.structs.replace(services.config, policy=granting_all(driver.groups()))
        links = links_of(subject.spec, subject.policy())
        return Attempts(
            lambda spec: driver.describe(subject.policy(spec)),
            lambda profile: sandbox_of(profile, driver=driver, links=links),
            generous=lambda spec: driver.describe(subject.policy(spec, generous)),
        )

    async def denials(self, request: q.DenialsRequest) -> q.DenialsReply:
        """One at a time: macOS takes a second or more to search its log, and the evaluator as long."""
        if self._log is None:
            raise Unsupported(NO_RECORD, field="verb")
        subject = self._subject(q.ProfileRequest(container=request.container))
        record = self._record(request.container)
        target = target_of(record)
        services = self._services
        pids: tuple[int, ...] = ()
        if target is not None:
            pids = await services.in_thread(lambda: services.driver.processes().members(target.shim_pid))
        whose = Whose(subject.instance, pids, record.status.started_at)
        output = await self._log.read(subject.instance, pids=pids, last_s=request.since_s)
        async with self._explaining:
            return await services.in_thread(self._report, subject, output, whose)

    def _report(self, subject: "_Subject", output: LogOutput, whose: Whose) -> q.DenialsReply:
        # Made when it is needed: refusals can also be told of a spec that the node does not take any more.
        attempts = cache(lambda: self._attempts(subject))
        groups = self._services.driver.groups()
        return report(output, whose, subject.spec, groups, lambda spec: attempts().with_grants(spec))

    def _record(self, cid: str) -> ContainerRecord:
        record = self._runtime.known(cid).record
        if record is None:
            raise NotFound(f"there is no container {cid}", field="container")
        return record

    def _subject(self, request: q.ProfileRequest) -> "_Subject":
        """The container that is there, or what the request's spec would be."""
        services = self._services
        if request.container is not None:
            record = self._record(request.container)
            status = record.status
            return _Subject(
                services,
                record.spec,
                request.container,
                status.instance,
                status.port,
                status.run,
                record.user,
            )
        if request.spec is None or request.service is None:
            raise InvalidCommand("give a container, or a service and a spec", field="container")
        cid = build_cid(request.service, request.replica)
        return _Subject(services, request.spec, cid, NO_INSTANCE, None)


class _Subject(msgspec.Struct, frozen=True):
    """What a question about a sandbox is about."""

    services: Services
    spec: ServiceSpec
    cid: str
    instance: str
    port: int | None
    run: int = 0
    user: RunAs | None = None

    def policy(self, spec: ServiceSpec | None = None, config: Config | None = None) -> SandboxPolicy:
        """Of its spec, or of a changed one, on this node or one that grants something else."""
        return self.services.make_policy(
            self.spec if spec is None else spec,
            self.cid,
            self.instance,
            self.port,
            self.run,
            user=self.user,
            config=config,
        )
