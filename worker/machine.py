"""Facts that tell one machine from another and one boot of it from the next, and the defaults made from them.

What only a platform's own calls can tell (macOS: the host's UUID, `kern.bootsessionuuid`) is asked through a
callable.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from worker.errors import Configuration

MACHINE_ID = Path("/etc/machine-id")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ROOT_DATA_DIR = Path("/var/lib/sandfleet")

Ask = Callable[[], str | None]


def default_data_dir(system: str, env: Mapping[str, str], uid: int) -> Path:
    """Where the data directory stands unless it is configured. `system` is `os.uname().sysname`."""
    if uid == 0:
        return ROOT_DATA_DIR
    data_home, home = env.get("XDG_DATA_HOME", ""), env.get("HOME", "")
    # A relative one is to be ignored: https://specifications.freedesktop.org/basedir-spec/latest/
    if system != "Darwin" and data_home.startswith("/"):
        return Path(data_home) / "sandfleet"
    if not home.startswith("/"):
        raise Configuration("HOME is not set: name the data directory with --data-dir", field="node.data_dir")
    below = "Library/Application Support" if system == "Darwin" else ".local/share"
    return Path(home) / below / "sandfleet"


def default_node_name(hostname: str, machine: str) -> str:
    """The host name made to fit; from the machine's id where the host has no name of its own."""
    name = re.sub(r"\.(local|localdomain|lan|home)$", "", hostname.strip().rstrip("."), flags=re.IGNORECASE)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:64].strip("-")
    if name.lower() in ("", "localhost"):
        return f"node-{re.sub(r'[^A-Za-z0-9]', '', machine)[:8].lower()}"
    return name


def machine_id(path: Path = MACHINE_ID, ask: Ask | None = None) -> str | None:
    """A stable id of this machine, None where there is none.

    A digest: machine-id(5) asks that the id itself is not handed on.
    """
    found = _read(path) if ask is None else ask()
    if found is None or not re.fullmatch(r"[0-9A-Fa-f-]{32,36}", found):
        return None
    return hashlib.sha256(b"sandfleet machine " + found.lower().encode()).hexdigest()[:32]


def machine_boot_id(path: Path = BOOT_ID, ask: Ask | None = None) -> str | None:
    """Differs after each boot of the machine; None where that cannot be told."""
    found = _read(path) if ask is None else ask()
    return found.lower() if found else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text("ascii", "replace").strip()
    except OSError:
        return None
