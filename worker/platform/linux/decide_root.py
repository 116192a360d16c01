"""What a container of isolation `rootfs` finds at a path and may do there, from the mounts of its plan. Pure.

A path is the container's own: what of the host is not mounted is not there, and the rest is the image's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from . import landlock
from .ruling import Ruling

_CHANGES = frozenset({*landlock.LETTERS["w"], *landlock.LETTERS["s"]})
_LOOKS = frozenset({"read_file", "read_dir", "execute"})
_OF_DEVICES = frozenset({"read_file", "write_file", "truncate", "ioctl_dev"})
_NEVER = frozenset({"make_char", "make_block"})
_PROC = "/proc"


class Seen:
    """`lines` are those of the profile's text."""

    def __init__(self, root: Mapping[str, Any], lines: Sequence[str]) -> None:
        self._mounts: list[list[Any]] = root["mounts"]
        self._root = next((line for line in lines if line.startswith("[files]")), None)

    def file(self, right: str, path: str) -> Ruling:
        """`right` is one of `landlock.FS_RIGHTS`."""
        if right in _NEVER:
            return Ruling("deny", self._root, "no device can be made")
        if path == _PROC or path.startswith(_PROC + "/"):
            if right in _LOOKS:
                return Ruling("allow", self._root, "of its own processes, it is the container's own /proc")
            return Ruling("unknown", self._root, "what of /proc may be written depends on the file")
        mount = self._over(path)
        if mount is None:
            return Ruling("allow", self._root, "the image's own; nothing of the host is there")
        line = mount_line(mount)
        match mount[0]:
            case "bind":
                return _bound(str(mount[3]), right, line)
            case "fill" if right in _LOOKS:
                return Ruling("allow", line, "the image's own, or the host's where the image has none")
            case "fill":
                return Ruling("unknown", line, "the image's own is writable, the host's is not")
            case "devpts":
                allowed = right in _OF_DEVICES
                return Ruling("allow" if allowed else "deny", line, "terminals of its own")
        executes = mount[-1] == "exec"
        if right == "execute" and not executes:
            return Ruling("deny", line, "nothing there can be executed")
        return Ruling("allow", line, "empty at each start, and its own")

    def shows(self, path: str) -> Ruling:
        """Whether a unix socket of the host is there."""
        mount = self._over(path)
        if mount is not None and mount[0] == "bind":
            return Ruling("allow", mount_line(mount), "granted")
        return Ruling("deny", self._root, "no socket of the host is there")

    def _over(self, path: str) -> list[Any] | None:
        """What was mounted last over a path; links and folders are part of the image then."""
        over = None
        for mount in self._mounts:
            target = str(mount[1])
            if mount[0] not in ("link", "folder") and (path == target or path.startswith(target + "/")):
                over = mount
        return over


def mount_line(mount: Sequence[Any]) -> str:
    """The line of a mount, as `render` writes it."""
    return " ".join(str(word) for word in mount)


def _bound(access: str, right: str, line: str) -> Ruling:
    if access == "dev":
        allowed = right in _OF_DEVICES
        return Ruling("allow" if allowed else "deny", line, "a device: it can be read and written")
    if access == "data" and right == "execute":
        return Ruling("deny", line, "nothing there can be executed")
    if access in ("ro", "data") and right in _CHANGES:
        return Ruling("deny", line, "mounted read-only")
    return Ruling("allow", line, "granted")
