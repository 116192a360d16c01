"""What `doctor` says of isolation `rootfs`: it is tried, as the worker tries it, because what a kernel's settings allow
can still be refused by a container engine's filter, by AppArmor, or by the file system.
"""

import os
from pathlib import Path

from worker.cli.doctor_checks import Finding, lack, ok

PROC = Path("/proc")
COST = (
    "isolation rootfs is not to be had: every container shares the host's file system, as isolation process"
)


def namespaces_check(refusal: str) -> Finding:
    """`refusal`: why the trial failed, empty when it worked. The kernel's settings say what to do about it."""
    if not refusal:
        return ok("namespaces", "a container's root and process namespaces can be made")
    return lack("warn", "namespaces", refusal, COST, _remedy())


def trial() -> str:
    """Make the namespaces once, in a process of its own. Why it cannot be done; empty when it can."""
    from worker.platform.linux.able import Able  # Linux alone asks this

    return Able().reason


def _remedy() -> str:
    if _setting("sys/user/max_user_namespaces") == "0":
        return "sysctl user.max_user_namespaces=15000, or a worker that is root"
    if os.geteuid() != 0 and _setting("sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        return "an AppArmor profile with `userns`, or kernel.apparmor_restrict_unprivileged_userns=0"
    if os.geteuid() != 0 and _setting("sys/kernel/unprivileged_userns_clone") == "0":
        return "sysctl kernel.unprivileged_userns_clone=1"
    return "where a container engine refuses it: docs/operations.md, In containers"


def _setting(name: str) -> str | None:
    try:
        return (PROC / name).read_text("ascii", "replace").strip()
    except OSError:
        return None
