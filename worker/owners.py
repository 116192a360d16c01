"""The files of a container that runs as another user than the worker: they are its own, and it can get at them.

Everything in the rootfs belongs to that user, as it belongs to the worker's otherwise: there is no second user in a
container for whom it could be kept. Called while nothing of the container runs. Blocking; needs root.

Under isolation `process` the user reaches its files by the host's path. So the folders above them can be passed
by everybody who knows a name (0711), the container's own folder by its group only (0710); nothing is listed, and
what the node keeps for itself (images, journal, secrets, `state`) stays closed.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from worker.datadir import ContainerDirs, DataDir
from worker.errors import CreateFailed
from worker.platform.base import ROOTED, RunAs, SandboxPolicy, VolumeMount
from worker.platform.descent import OPEN_DIRECTORY, Descent
from worker.volumes import OWN_KINDS

PASSABLE = 0o711


def hand_over(policy: SandboxPolicy, dirs: ContainerDirs, data: DataDir) -> None:
    """Give the container's files to `policy.user`. CreateFailed where it could not reach them."""
    user = policy.user
    if user is None:
        return
    try:
        give_tree(dirs.rootfs, user)
        os.chown(dirs.tmp, user.uid, user.gid)
        give_volumes(policy.volumes, user)
        if policy.isolation != ROOTED:
            _open_way(user, dirs, data)
    except OSError as failure:
        raise CreateFailed(
            f"{failure.filename or dirs.root} cannot be given to uid {user.uid}: {failure.strerror}"
        ) from failure


def give_tree(path: Path, user: RunAs) -> None:
    """Everything in a tree; no link is followed. OSError."""
    walk = Descent(os.open(path, OPEN_DIRECTORY))
    try:
        pending = [_give_folder(walk, user)]
        while pending:
            if pending[-1]:
                walk.down(pending[-1].pop())
                pending.append(_give_folder(walk, user))
            else:
                pending.pop()
                if pending:
                    walk.up()
    finally:
        walk.close()


def _give_folder(walk: Descent, user: RunAs) -> list[str]:
    folders = []
    os.fchown(walk.fd, user.uid, user.gid)
    with os.scandir(walk.fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            else:
                os.chown(entry.name, user.uid, user.gid, dir_fd=walk.fd, follow_symlinks=False)
    return folders


def give_volumes(volumes: Iterable[VolumeMount], user: RunAs) -> None:
    """The folders that are ours to make, as long as nobody has put anything there. OSError."""
    for volume in volumes:
        if volume.kind not in OWN_KINDS:
            continue
        fd = os.open(volume.source, OPEN_DIRECTORY)
        try:
            if os.fstat(fd).st_uid == os.geteuid() and not os.listdir(fd):
                os.fchown(fd, user.uid, user.gid)
        finally:
            os.close(fd)


def _open_way(user: RunAs, dirs: ContainerDirs, data: DataDir) -> None:
    let_pass(data)
    os.chown(dirs.root, -1, user.gid)
    os.chmod(dirs.root, 0o710)
    own = dirs.root / "volumes"
    if own.is_dir():
        os.chmod(own, PASSABLE)
    closed = first_closed(data.root, user)
    if closed is not None:
        raise CreateFailed(
            f"uid {user.uid} cannot pass {closed}, above the container's files: move the data directory to where"
            " others may pass (/var/lib/sandfleet), or use isolation rootfs",
            field="spec.user",
        )


def let_pass(data: DataDir) -> None:
    """Open the node's own folders on the way; a new worker may have closed them. OSError."""
    for folder in (data.root, data.containers, data.volumes):
        os.chmod(folder, PASSABLE)


def first_closed(path: Path, user: RunAs) -> Path | None:
    """The first of the folders above `path` that a user may not pass through."""
    for folder in reversed(path.parents):
        found = os.stat(folder)
        if found.st_uid == user.uid:
            needed = stat.S_IXUSR
        elif found.st_gid == user.gid:
            needed = stat.S_IXGRP
        else:
            needed = stat.S_IXOTH
        if not found.st_mode & needed:
            return folder
    return None
