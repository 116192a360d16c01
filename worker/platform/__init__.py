"""The one place that picks the platform."""

import sys

from worker.errors import Configuration

from .base import Driver


def driver() -> Driver:
    """The driver of this machine; Configuration on a platform that has none."""
    if sys.platform == "linux":
        from .linux.driver import LinuxDriver

        return LinuxDriver()
    if sys.platform == "darwin":
        from .darwin.driver import DarwinDriver

        return DarwinDriver()
    raise Configuration(f"sandfleet runs on Linux and macOS; this is {sys.platform}")
