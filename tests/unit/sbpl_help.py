"""Profiles for the tests of the profile builder, and questions to them."""

from pathlib import Path
from typing import Any

from schemas.spec import ServiceSpec, decode_spec
from schemas.status import Network
from worker.config import Config
from worker.config_model import PolicyConfig
from worker.datadir import ContainerDirs
from worker.platform.base import NetworkPolicy, PathRule, SandboxPolicy
from worker.platform.darwin.describe import SeatbeltRules
from worker.platform.darwin.evaluate import Argument, CompiledProfile, Verdict, compile_profile
from worker.platform.darwin.paths import canonical
from worker.platform.darwin.sbpl import Sbpl, build_profile
from worker.policy import HostFacts, make_policy

INSTANCE = "01J9ZZZZZZZZZZZZZZZZZZZZZZ"
DATA = "/Users/w/data"
BOX = f"{DATA}/containers/web-0"
ROOT, TMP, STATE = f"{BOX}/rootfs", f"{BOX}/tmp", f"{BOX}/state"
MARKER = f"{BOX}/marker-{INSTANCE}"
NATS = 4222
CREDS = "/Users/w/etc/node.creds"
DOCKER = "/private/var/run/docker.sock"

WRITES = (
    "file-write-data", "file-write-create", "file-write-unlink", "file-write-mode", "file-write-owner",
    "file-write-flags", "file-write-times", "file-write-xattr", "file-write-acl", "file-link",
)  # fmt: skip
READS = ("file-read-data", "file-read-metadata", "file-read-xattr", "file-clone", "file-test-existence")
RUNS = ("process-exec", "file-map-executable")


class Asked:
    """A compiled profile. Asking fails the test where the evaluator does not know."""

    def __init__(self, profile: Sbpl, release: int) -> None:
        self.text, self.params = profile.text, profile.params
        self.compiled: CompiledProfile = compile_profile(profile.text, profile.params, release=release)

    def verdict(self, operation: str, **argument: Any) -> Verdict:
        return self.compiled.decide(operation, Argument(**argument))

    def allows(self, operation: str, **argument: Any) -> bool:
        verdict = self.verdict(operation, **argument)
        assert verdict.decision in ("allow", "deny"), (operation, argument, verdict)
        return verdict.decision == "allow"

    def connects(self, address: str, protocol: str = "tcp") -> bool:
        return self.allows("network-outbound", address=address, protocol=protocol)

    def serves(self, port: int, protocol: str = "tcp") -> bool:
        """Both that a program may bind a port and that it may accept there."""
        found = {
            self.allows(operation, address=f"{host}:{port}", protocol=protocol)
            for operation in ("network-bind", "network-inbound")
            for host in ("127.0.0.1", "[::1]", "0.0.0.0")
        }
        assert len(found) == 1
        return found.pop()


def policy(*paths: PathRule, **changes: Any) -> SandboxPolicy:
    facts: dict[str, Any] = {
        "container": "web-0",
        "instance": INSTANCE,
        "run": 1,
        "rootfs": ROOT,
        "tmp": TMP,
        "state_dir": STATE,
        "paths": (PathRule(ROOT, "rwx", "rootfs"), PathRule(TMP, "rw", "tmp"), *paths),
        "marker": MARKER,
        "deny": (STATE, f"{DATA}/secrets", f"{DATA}/launcher.key", f"{DATA}/launcher.sock"),
    }
    return SandboxPolicy(**{**facts, **changes})


def built(*paths: PathRule, release: int = 15, **changes: Any) -> Sbpl:
    return build_profile(policy(*paths, **changes), release=release)


def ask(*paths: PathRule, release: int = 15, **changes: Any) -> Asked:
    return Asked(built(*paths, release=release, **changes), release)


def network(level: Network, **changes: Any) -> Asked:
    return ask(network=NetworkPolicy(level=level, **changes))


OPEN = PolicyConfig(
    bind_sources=("/",),
    read=("/",),
    write=("/",),
    unix_sockets=("/",),
    mach_lookup=("*",),
    groups=tuple(sorted(SeatbeltRules(26).groups())),
    gpu=True,
)
"""A node that grants whatever is asked for."""


def policy_of(
    spec: dict[str, Any] | ServiceSpec,
    *,
    port: int | None = 31000,
    run: int = 1,
    release: int = 15,
    grants: PolicyConfig = OPEN,
    **facts: Any,
) -> SandboxPolicy:
    """What a node makes of a spec, with nothing looked up on this machine."""
    decoded = spec if isinstance(spec, ServiceSpec) else decode_spec({"image": {"name": "app"}, **spec})
    known = {"data_root": DATA, "protected": (CREDS,), "nats_ports": (NATS,), "canonical": canonical}
    return make_policy(
        decoded,
        config=Config(policy=grants),
        dirs=ContainerDirs(Path(BOX)),
        cid="web-0",
        instance=INSTANCE,
        port=port,
        run=run,
        host=HostFacts(**{**known, **facts}),
        driver=SeatbeltRules(release),
    )


def ask_spec(spec: dict[str, Any] | ServiceSpec, *, release: int = 15, **changes: Any) -> Asked:
    made = policy_of(spec, release=release, **changes)
    return Asked(build_profile(made, release=release), release)
