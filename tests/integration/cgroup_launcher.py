"""A launcher whose control groups lie in a folder of the test's: `python -I -S cgroup_launcher.py FOLDER HOW …`.

The rest are the launcher's own arguments. With HOW `laid-out` the folder only looks like control groups: this
process makes and takes away the files that the kernel would, and nobody keeps a limit. What a group held when it was
taken away is a line of JSON in FOLDER.removed. With HOW `real` the folder is a control group of the kernel's.
"""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "cgroup.procs": "",
    "cgroup.subtree_control": "",
    "cgroup.controllers": "cpuset cpu io memory pids\n",
    "cgroup.type": "domain\n",
    "cgroup.events": "populated 0\nfrozen 0\n",
    "cgroup.kill": "",
    "memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\n",
    "memory.max": "",
    "memory.oom.group": "",
    "memory.swap.max": "",
    "pids.max": "",
    "cpu.max": "",
}
mkdir, rmdir = os.mkdir, os.rmdir


def make_packages() -> None:
    for name in ("worker", "worker.launcher", "worker.platform", "worker.platform.linux"):
        package = type(sys)(name)
        package.__path__ = [str(ROOT.joinpath(*name.split(".")))]
        sys.modules[name] = package


if __name__ == "__main__":
    make_packages()
from worker.launcher.main import Machine, main  # noqa: E402
from worker.launcher.processes import system  # noqa: E402
from worker.platform.linux import enforce  # noqa: E402
from worker.platform.linux.cgroups import Cgroups  # noqa: E402


def lay_out(folder: str) -> None:
    for name, text in FILES.items():
        Path(folder, name).write_text(text)


class LaidOut:
    """mkdir and rmdir as they are below `top`, where the kernel has its files in every folder."""

    def __init__(self, top: str) -> None:
        self._top = top
        os.mkdir = self._mkdir  # type: ignore[assignment]
        os.rmdir = self._rmdir  # type: ignore[assignment]

    def _mkdir(self, path: str, mode: int = 0o777) -> None:
        mkdir(path, mode)
        if path.startswith(self._top + "/"):
            lay_out(path)

    def _rmdir(self, path: str) -> None:
        if path.startswith(self._top + "/"):
            if "populated 1" in Path(path, "cgroup.events").read_text():
                raise OSError(errno.EBUSY, "Device or resource busy", path)
            held = {name: Path(path, name).read_text() for name in FILES}
            with open(f"{self._top}.removed", "a", encoding="utf-8") as file:
                file.write(json.dumps({"group": os.path.basename(path), **held}) + "\n")
            for name in FILES:
                os.unlink(f"{path}/{name}")
        rmdir(path)


class Enforcement:
    """This system's, with other groups."""

    def __init__(self, top: str) -> None:
        self._top = top

    def __getattr__(self, name: str) -> Any:
        return getattr(enforce, name)

    def open_groups(self, name: str) -> Cgroups:
        return Cgroups.open(self._top, name)


if __name__ == "__main__":
    folder, how, *arguments = sys.argv[1:]
    if how == "laid-out":
        LaidOut(folder)
    enforce.settle()
    sys.exit(main(arguments, Machine(system(), ("linux", Enforcement(folder)))))
