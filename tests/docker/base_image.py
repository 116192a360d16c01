"""A stand-in for `python:3.11-slim` where no registry can be reached: an image of this machine's own files.

It has this Python under /usr/local, the shared libraries that it needs, a shell and some tools, and the wheels that
`pip install` of this project asks for, with a pip.conf that looks nowhere else. A build `FROM` it runs the same
steps as one from the real image, without a network.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

TOOLS = (
    "sh",
    "cat",
    "chmod",
    "cp",
    "env",
    "id",
    "install",
    "ls",
    "mkdir",
    "mv",
    "rm",
    "sleep",
    "stat",
    "true",
)
# Parts of the standard library that are large and not used.
_UNUSED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "tkinter", "__pycache__", "site-packages"}
_UNUSED_NATIVE = re.compile(r"_tkinter|_test|_ctypes_test|xx")
_LIBRARY = re.compile(r"^\s+(?:\S+ => )?(/\S+) \(0x", re.MULTILINE)
# Of libc, but of no program here: wheels ask for them, and for the last when a thread of Python ends.
_BESIDE_LIBC = ("libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1", "libm.so.6", "libgcc_s.so.1")
_ROOT_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/pip.conf": "[global]\nno-index = true\nfind-links = /wheels\ndisable-pip-version-check = true\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}


def wheels(project: Path, folder: Path) -> None:
    """What installing the project takes, setuptools for building it included, by pip's own settings."""
    settings = tomllib.loads((project / "pyproject.toml").read_text())
    names = [*settings["project"]["dependencies"], *settings["build-system"]["requires"]]
    pip = [sys.executable, "-m", "pip", "wheel", "-qq", "--wheel-dir", str(folder)]
    subprocess.run([*pip, "-c", str(project / "constraints.txt"), *names], check=True)


def write_base(archive: Path, wheel_folder: Path) -> None:
    """The root file system as one tar, for `docker import`."""
    with tarfile.open(archive, "w") as tar:
        for link in ("bin", "lib", "lib64", "sbin"):
            _link(tar, link, f"usr/{link}")
        for folder, mode in (
            ("tmp", 0o1777),
            ("proc", 0o755),
            ("sys", 0o755),
            ("dev", 0o755),
            ("root", 0o700),
        ):
            _folder(tar, folder, mode)
        for name, text in _ROOT_FILES.items():
            _text(tar, name, text)
        programs = [Path(found) for name in TOOLS if (found := shutil.which(name, path="/usr/bin:/bin"))]
        for program in programs:
            tar.add(program.resolve(), f"usr/bin/{program.name}")
        python = Path(sys.base_prefix)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        tar.add((python / "bin" / version).resolve(), f"usr/local/bin/{version}")
        for name in ("python3", "python"):
            _link(tar, f"usr/local/bin/{name}", version)
        modules = python / "lib" / version
        tar.add(modules, f"usr/local/lib/{version}", filter=_slim)
        natives = [path for path in modules.glob("lib-dynload/*.so") if not _UNUSED_NATIVE.match(path.name)]
        natives.append((python / "bin" / version).resolve())
        for library in libraries([*programs, *natives]):
            tar.add(Path(library).resolve(), _in_usr(library))
        certificates = Path("/etc/ssl/certs/ca-certificates.crt")
        if certificates.exists():
            tar.add(certificates, str(certificates)[1:])
        for wheel in sorted(wheel_folder.glob("*.whl")):
            tar.add(wheel, f"wheels/{wheel.name}")


def libraries(programs: Iterable[Path]) -> list[str]:
    """The shared libraries of programs, their loader included, as the loader finds them here."""
    found: set[str] = set()
    for program in programs:
        listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False)
        found.update(_LIBRARY.findall(listed.stdout))
    folders = [Path(library).parent for library in found if "/libc.so." in library]
    beside = [folder / name for folder in folders for name in _BESIDE_LIBC]
    return sorted(found | {str(path) for path in beside if path.exists()})


def _in_usr(path: str) -> str:
    """Where the loader finds a library in a system whose /lib is a link to /usr/lib, without a cache of its own."""
    if path.startswith("/usr/"):
        return path[1:]
    if path.startswith(("/lib/", "/lib64/")):
        return f"usr{path}"
    return f"usr/lib/{os.path.basename(path)}"  # of a Python with a prefix of its own


def _slim(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    name = os.path.basename(entry.name)
    if name in _UNUSED or _UNUSED_NATIVE.match(name) or name.startswith("config-") or name.endswith(".a"):
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _folder(tar: tarfile.TarFile, name: str, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    tar.addfile(entry)


def _link(tar: tarfile.TarFile, name: str, target: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    tar.addfile(entry)


def _text(tar: tarfile.TarFile, name: str, text: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(text.encode())
    tar.addfile(entry, io.BytesIO(text.encode()))
