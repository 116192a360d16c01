"""The modifiers of Seatbelt rules, `(with …)`, as data.

Sources: 0x3c3e/sandblaster (misc/modifiers.json: which action takes which) and the profiles shipped with
macOS 26. None changes a decision but `no-sandbox`, under which a setuid program may run.
"""

from typing import Literal

import msgspec

Takes = Literal["nothing", "signal", "errno", "text"]


class Modifier(msgspec.Struct, frozen=True):
    """`action` is the one that takes it; None for both."""

    action: Literal["allow", "deny"] | None
    takes: Takes = "nothing"
    operation: str | None = None


MODIFIERS: dict[str, Modifier] = {
    "authority": Modifier(None),
    "errno": Modifier("deny", "errno"),
    "grant": Modifier("allow"),
    "message": Modifier(None, "text"),
    "no-approval-prompt": Modifier("allow"),
    "no-callout": Modifier(None),
    "no-log": Modifier("deny"),
    "no-profile": Modifier("allow", operation="process-exec*"),
    "no-report": Modifier("deny"),
    "no-sandbox": Modifier("allow", operation="process-exec*"),
    "no-times": Modifier("allow", operation="file-read*"),
    "partial-symbolication": Modifier(None),
    "report": Modifier("allow"),
    "send-signal": Modifier(None, "signal"),
    "sip-override": Modifier(None),
    "telemetry": Modifier(None),
    "telemetry-backtrace": Modifier(None),
    "user-approval": Modifier("allow"),
}

# <sys/errno.h> of macOS; what rules answer with.
_ERRNOS = """
EPERM ENOENT ESRCH EINTR EIO ENXIO E2BIG ENOEXEC EBADF ECHILD EDEADLK ENOMEM EACCES EFAULT ENOTBLK EBUSY
EEXIST EXDEV ENODEV ENOTDIR EISDIR EINVAL ENFILE EMFILE ENOTTY ETXTBSY EFBIG ENOSPC ESPIPE EROFS EMLINK
EPIPE EAGAIN ENOTSUP EOPNOTSUPP EADDRINUSE EADDRNOTAVAIL ENETDOWN ENETUNREACH ECONNABORTED ECONNRESET
ECONNREFUSED ELOOP ENAMETOOLONG EHOSTUNREACH ENOTEMPTY EDQUOT ENOSYS EAUTH ECANCELED ENOATTR
"""
ERRNOS = frozenset(_ERRNOS.split())
