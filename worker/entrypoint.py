"""What a container runs, where and with which environment, from its spec and its image.

Under isolation `process` there is one file system. An absolute program is the host's where it exists and
the sandbox lets it run (on a Mac, platform binaries must run from their own place), else the one of that
path in the rootfs. A bare name is looked up in the spec's PATH in the same manner, entry by entry; a
relative entry is one below the rootfs. A name with a slash that is not absolute is relative to the working
directory.

Under isolation `rootfs` every path is one inside the container's root: the volumes', the image's, and where
neither has anything, what the sandbox shows of the host.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from schemas.spec import ServiceSpec
from worker.errors import ContractError, InvalidSpec, StartFailed
from worker.images.model import ImageConfig
from worker.platform.base import SandboxPolicy, VolumeMount
from worker.rootpath import locate
from worker.variables import build_env

__all__ = ["ResolvedCommand", "build_env", "resolve_command", "runnable", "shown"]

SHELLS = ("/bin/sh", "/bin/bash", "/usr/bin/sh")

_WORKDIR = "spec.command.workdir"
_SHOWN = ("sandbox.read", "sandbox.write", "device")
_PATH_ERRORS = (OSError, ValueError)


class ResolvedCommand(msgspec.Struct, frozen=True):
    """`program` is the file to execute, free of links where it is the rootfs's; `cwd` is a host path. Both are
    paths inside the root where the container has one of its own.

    `argv[0]` is the path at which the program was found: programs of many names and interpreters that look
    for their library beside themselves both read it.
    """

    program: str
    argv: list[str]
    cwd: str


def runnable(policy: SandboxPolicy, search_dirs: Iterable[str]) -> Callable[[str], bool]:
    """Whether the sandbox lets a host file run, by its canonical path."""
    folders = tuple(
        folder.rstrip("/")
        for folder in (
            policy.rootfs,
            *search_dirs,
            *(rule.path for rule in policy.paths if "x" in rule.access),
        )
    )
    denied = tuple(folder.rstrip("/") for folder in policy.deny)

    def below(path: str, tops: tuple[str, ...]) -> bool:
        return any(path == top or path.startswith(top + "/") for top in tops)

    return lambda path: below(path, folders) and not below(path, denied)


def shown(policy: SandboxPolicy, search_dirs: Iterable[str]) -> Callable[[str], bool]:
    """Whether a host file appears at its own path in a container with a root of its own."""
    folders = (*search_dirs, *(rule.path for rule in policy.paths if rule.origin in _SHOWN))

    def appears(path: str) -> bool:
        real = os.path.realpath(path)
        return any(real == folder or real.startswith(folder.rstrip("/") + "/") for folder in folders)

    return appears


def resolve_command(
    spec: ServiceSpec,
    image: ImageConfig,
    rootfs: Path,
    env_path: str,
    *,
    volumes: Sequence[VolumeMount] = (),
    may_run: Callable[[str], bool] = lambda path: True,
    rooted: bool = False,
) -> ResolvedCommand:
    """entrypoint and args of the spec; its args alone; the image's own; else a shell.

    `may_run` tells of a host file whether the sandbox lets it run; when `rooted`, of a path whether the host's
    file appears there inside the root, where neither the image nor a volume has one.

    InvalidSpec for a working directory that the spec names and the image has not; StartFailed, naming the
    program and where it was looked for, when it is missing or cannot be executed.
    """
    words, field = _words(spec, image)
    if "\0" in "".join(words):
        raise InvalidSpec("an argument cannot hold a NUL", field=field)
    workdir = spec.command.workdir or image.working_dir or "/"
    if rooted:
        cwd = os.path.normpath(f"/{workdir}").replace("//", "/")
        if not may_run(cwd):
            _working_directory(cwd, spec, rootfs, volumes)
        finder: _Finder = _RootedFinder(rootfs, volumes, cwd, may_run)
    else:
        cwd = str(_working_directory(workdir, spec, rootfs, volumes))
        finder = _Finder(rootfs, volumes, workdir, may_run)
    if not words:
        program, name = finder.shell()
        return ResolvedCommand(program, [name], cwd)
    program, name = finder.find(words[0], env_path, field)
    return ResolvedCommand(program, [name, *words[1:]], cwd)


def _words(spec: ServiceSpec, image: ImageConfig) -> tuple[list[str], str | None]:
    """The command and the field that it comes from (None: the image)."""
    command = spec.command
    if command.entrypoint:
        return [*command.entrypoint, *(command.args or ())], "spec.command.entrypoint"
    if command.args:
        return list(command.args), "spec.command.args"
    return [*(image.entrypoint or ()), *(image.cmd or ())], None


def _working_directory(workdir: str, spec: ServiceSpec, rootfs: Path, volumes: Sequence[VolumeMount]) -> Path:
    try:
        path = locate(rootfs, volumes, workdir)
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), workdir)
    except _PATH_ERRORS as failure:
        reason = f"the working directory {workdir!r} cannot be used: {_reason(failure)}"
        if spec.command.workdir:
            raise InvalidSpec(reason, field=_WORKDIR) from failure
        raise StartFailed(f"{reason} (the image names it)") from failure
    return path


class _Finder:
    """Looks for one program, and remembers what stood in the way."""

    def __init__(
        self, rootfs: Path, volumes: Sequence[VolumeMount], workdir: str, may_run: Callable[[str], bool]
    ) -> None:
        self._rootfs = rootfs
        self._volumes = volumes
        self._workdir = workdir
        self._may_run = may_run
        self._problems: list[str] = []

    def shell(self) -> tuple[str, str]:
        for path in SHELLS:
            found = self._host(path) or self._inside(path)
            if found is not None:
                return found
        raise InvalidSpec(
            "no command is given, the image has none, and no shell is in reach", field="spec.command"
        )

    def find(self, name: str, env_path: str, field: str | None) -> tuple[str, str]:
        """(file to execute, the path at which it was found). Raises StartFailed."""
        if not name:
            raise self._failed(name, "has no name", field)
        for found in self._candidates(name, env_path):
            if found is not None:
                return found
        where = (
            f"not found in PATH ({env_path})" if "/" not in name else "not found on the host or in the image"
        )
        raise self._failed(name, "; ".join(dict.fromkeys(self._problems)) or where, field)

    def _candidates(self, name: str, env_path: str) -> Iterable[tuple[str, str] | None]:
        if name.startswith("/"):
            yield self._host(name)
            yield self._inside(name)
        elif "/" in name:
            yield self._inside(f"{self._workdir}/{name}")
        else:
            for entry in env_path.split(":"):
                path = f"{entry or '.'}/{name}"
                if entry.startswith("/"):
                    yield self._host(path)
                yield self._inside(path)

    def _host(self, path: str) -> tuple[str, str] | None:
        if not self._executable(path, path):
            return None
        if not self._may_run(os.path.realpath(path)):
            self._problems.append(f"{path} of the host is not among what the sandbox lets run")
            return None
        return path, path

    def _inside(self, path: str) -> tuple[str, str] | None:
        folder, _, name = path.rpartition("/")
        try:
            found = str(locate(self._rootfs, self._volumes, path))
            shown = str(locate(self._rootfs, self._volumes, folder or "/") / name)
        except _PATH_ERRORS as failure:
            self._missed(path, failure)
            return None
        return (found, shown) if self._executable(found, path) else None

    def _executable(self, path: str, shown: str) -> bool:
        try:
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode):
                self._problems.append(f"{shown} is not a file")
            elif not os.access(path, os.X_OK):
                self._problems.append(f"{shown} is not executable")
            else:
                return True
        except _PATH_ERRORS as failure:
            self._missed(shown, failure)
        return False

    def _missed(self, path: str, failure: OSError | ValueError) -> None:
        if not isinstance(failure, FileNotFoundError | NotADirectoryError):
            self._problems.append(f"{path}: {_reason(failure)}")

    def _failed(self, name: str, reason: str, field: str | None) -> ContractError:
        return StartFailed(f"the program {name!r} cannot be run: {reason}", field=field)


class _RootedFinder(_Finder):
    """The same inside a root: a path is the image's or a volume's, else the host's where that appears."""

    def _candidates(self, name: str, env_path: str) -> Iterable[tuple[str, str] | None]:
        if "/" in name:
            places = [os.path.join(self._workdir, name)]
        else:
            places = [os.path.join(self._workdir, entry, name) for entry in env_path.split(":")]
        for place in places:
            yield self._inside(place)
            yield self._host(place)

    def _inside(self, path: str) -> tuple[str, str] | None:
        return (path, path) if super()._inside(path) is not None else None

    def _host(self, path: str) -> tuple[str, str] | None:
        return (path, path) if self._may_run(path) and self._executable(path, path) else None


def _reason(failure: OSError | ValueError) -> str:
    return (failure.strerror if isinstance(failure, OSError) else None) or str(failure)
