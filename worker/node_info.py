"""What a node says of its machine and of itself."""

import os
import platform
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version

from schemas.node import API_VERSION, ApiInfo, Capabilities, NodeInfo, NodeState
from worker.config import NodeConfig

PACKAGE = "sandfleet"


def package_version() -> str:
    """The installed version, or `0+source` for a tree that was never installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "0+source"


class NodeDescription:
    """Gathered once; only the state and the used slots change."""

    def __init__(
        self,
        config: NodeConfig,
        *,
        node: str,
        epoch: Callable[[], str],
        boot: str,
        insecure: bool,
        capabilities: Capabilities,
        features: frozenset[str],
        slots: int,
        slots_used: Callable[[], int],
        started_at: datetime,
    ) -> None:
        self._config = config
        self._node = node
        self._epoch = epoch
        self._boot = boot
        self._insecure = insecure
        self._capabilities = capabilities
        self._features = sorted(features)
        self._slots = slots
        self._slots_used = slots_used
        self._started_at = started_at
        self._version = package_version()
        self._uname = platform.uname()
        self._memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def info(self, state: NodeState) -> NodeInfo:
        gpus = [level for level in self._capabilities.gpu if level != "none"]
        return NodeInfo(
            node=self._node,
            epoch=self._epoch(),
            boot=self._boot,
            version=self._version,
            api=ApiInfo(version=API_VERSION, features=self._features),
            hostname=self._uname.node,
            os=self._uname.system.lower(),
            os_version=self._uname.release,
            arch=self._uname.machine,
            cpus=os.cpu_count() or 1,
            memory_bytes=self._memory_bytes,
            gpus=gpus,
            labels=dict(self._config.labels),
            pools=list(self._config.pools),
            slots=self._slots,
            slots_used=self._slots_used(),
            state=state,
            insecure=self._insecure,
            capabilities=self._capabilities,
            started_at=self._started_at,
        )
