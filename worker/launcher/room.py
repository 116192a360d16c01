"""Keeping some descriptors free, so that the launcher can always look, signal, record and answer."""

import errno
import os
import resource

from worker.launcher.protocol import EXHAUSTED, Refused

RESERVED = 64
PER_RUN = 8  # a shim's two sockets and two pipes, and later two files for each stream


def require_descriptors(coming: int) -> None:
    """Refused `resource_exhausted` when `coming` more descriptors would take of the last RESERVED.

    The system gives the lowest free number, so the number of a new one tells how many are in use.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = os.dup(0)
        os.close(used)
    except OSError:
        used = limit
    if used + coming > limit - RESERVED:
        raise Refused(
            EXHAUSTED, f"the launcher has too few descriptors left (its limit is {limit})", errno=errno.EMFILE
        )
