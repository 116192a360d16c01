"""What a container of isolation `rootfs` finds in its root, as a list of mounts (see `mounts`). Pure.

The image's files are the root. Where an image has no system of its own, the host's appears read-only in the
places where it has nothing, the same files as under isolation `process`; an image with a system gets the
host's names of networks only, where it has none. Granted host paths appear at their own places, volumes at
their targets.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from schemas.status import Network
from worker.platform.base import ROOTED_API, ROOTED_TMP, PathRule, SandboxPolicy

from . import mounts
from .libc import O_PATH
from .system import SystemPath

# Every image needs the host's, and none can know it.
_NAMES = ("/etc/resolv.conf", "/etc/hosts")
_OWN_PLACES = ("/dev/", "/proc/", "/proc", "/dev")


def make_root(
    policy: SandboxPolicy,
    *,
    system: Iterable[SystemPath],
    links: Mapping[str, str],
    user: tuple[int, int] | None,
    net: bool = False,
    gated: str | None = None,
) -> dict[str, Any]:
    """The `root` of a plan. `system` and `links` are the host's; `user` needs a user namespace. With `net` it has a
    network of its own, as always at the level `none`.

    The socket `gated` is reached from outside (see `gate`): it need not be in here, nor anywhere yet.
    """
    wanted: list[list[Any]] = [
        *mounts.dev_mounts(),
        ["tmpfs", mounts.SHARED_MEMORY, policy.limits.memory_bytes or 0, mounts.SHARED_MODE, "rw"],
        ["bind", ROOTED_TMP, policy.tmp, "rw"],
    ]
    for path in (*(rule.path for rule in system), mounts.ALTERNATIVES):
        if not path.startswith(_OWN_PLACES):
            wanted.append(["fill", path, path, "always" if path in _NAMES else "bare"])
    wanted += [["link", path, text, "bare"] for path, text in sorted(links.items())]
    wanted += [_granted(rule) for rule in policy.paths if rule.origin not in ("rootfs", "tmp", "volume")]
    wanted += [["bind", socket, socket, "rw"] for socket in policy.network.unix_sockets if socket != gated]
    for volume in sorted(policy.volumes, key=lambda one: len(one.target)):
        if volume.kind == "tmpfs":
            mode = 0o1777 if volume.mode is None else volume.mode
            wanted.append(["tmpfs", volume.target, volume.size_bytes or 0, mode, "exec"])
        else:
            wanted.append(["bind", volume.target, volume.source, "ro" if volume.readonly else "rw"])
    return {
        "user": None if user is None else list(user),
        "net": net or policy.network.level is Network.NONE,
        "hostname": policy.container,
        "path": policy.rootfs,
        "mounts": wanted,
    }


def shows_system(rootfs: str) -> bool:
    """Whether the host's system appears in the container of this rootfs."""
    fd = os.open(rootfs, O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return mounts.is_bare(fd)
    finally:
        os.close(fd)


def _granted(rule: PathRule) -> list[Any]:
    if rule.origin == "host_api":
        return ["bind", ROOTED_API, rule.path, "data"]
    if rule.origin == "device":
        return ["bind", rule.path, rule.path, "dev"]
    access = "rw" if "w" in rule.access else "ro" if "x" in rule.access else "data"
    return ["bind", rule.path, rule.path, access]
