"""The operations of Seatbelt and who answers for whom, as data.

Sources: the tables of libsandbox that 0xbf00/simbple extracted (src/platform_data/catalina/operations.c:
parents, and which operations end the search), dionthegod/XNUSandbox (sbdis/ops.txt), malus-security and
0x3c3e/sandblaster for newer names, and the operations that the profiles shipped with macOS 26 use.
"""

from functools import lru_cache

# Parent: its direct children. `default` is the root.
_TREE = """
default: appleevent-send authorization-right-obtain boot-arg-set darwin-notification-post device*
default: distributed-notification-post dynamic-code-generation file* fs-rename fs-snapshot* hid-control
default: generic-issue-extension iokit* ipc* job-creation load-unsigned-code lsopen mach* necp-client-open
default: network* nvram* opendirectory-user-modify process* pseudo-tty qtn-download qtn-sandbox qtn-user
default: signal socket-ioctl socket-option* storage-class-map syscall* sysctl* system* user-preference*
default: xpc-message-send
device*: device-camera device-microphone
file*: file-chroot file-clone file-ioctl file-issue-extension file-link file-map-executable file-mknod
file*: file-mount file-read* file-revoke file-search file-test-existence file-unmount file-write*
file-mount: file-mount-update
file-read*: file-read-data file-read-metadata file-read-xattr
file-write*: file-write-acl file-write-create file-write-data file-write-finderinfo file-write-flags
file-write*: file-write-mode file-write-owner file-write-setugid file-write-times file-write-unlink
file-write*: file-write-xattr
fs-snapshot*: fs-snapshot-create fs-snapshot-delete fs-snapshot-revert
iokit*: iokit-async-external-method iokit-external-method iokit-external-trap iokit-get-properties
iokit*: iokit-issue-extension iokit-open* iokit-set-properties
iokit-open*: iokit-open-service iokit-open-user-client
ipc*: ipc-posix* ipc-sysv*
ipc-posix*: ipc-posix-issue-extension ipc-posix-sem* ipc-posix-shm*
ipc-posix-sem*: ipc-posix-sem-create ipc-posix-sem-open ipc-posix-sem-post ipc-posix-sem-unlink
ipc-posix-sem*: ipc-posix-sem-wait
ipc-posix-shm*: ipc-posix-shm-read* ipc-posix-shm-write*
ipc-posix-shm-read*: ipc-posix-shm-read-data ipc-posix-shm-read-metadata
ipc-posix-shm-write*: ipc-posix-shm-write-create ipc-posix-shm-write-data ipc-posix-shm-write-unlink
ipc-sysv*: ipc-sysv-msg ipc-sysv-sem ipc-sysv-shm
mach*: mach-bootstrap mach-cross-domain-lookup mach-derive-port mach-host* mach-issue-extension
mach*: mach-kernel-endpoint mach-lookup mach-message-send mach-per-user-lookup mach-priv* mach-register
mach*: mach-task* mach-task-name
mach-host*: mach-host-exception-port-set mach-host-special-port-set
mach-priv*: mach-priv-host-port mach-priv-task-port
mach-task*: mach-task-inspect mach-task-read mach-task-special-port*
network*: network-inbound network-outbound
network-inbound: network-bind
nvram*: nvram-delete nvram-get nvram-set
process*: process-codesigning process-codesigning-status* process-exec* process-fork process-info*
process-codesigning: process-codesigning-blob-get process-codesigning-cdhash-get
process-codesigning: process-codesigning-entitlements-blob-get process-codesigning-identity-get
process-codesigning: process-codesigning-teamid-get process-codesigning-text-offset-get
process-codesigning-status*: process-codesigning-status-get process-codesigning-status-set
process-exec*: process-exec-interpreter
process-info*: process-info-codesignature process-info-dirtycontrol process-info-ledger
process-info*: process-info-listpids process-info-pidfdinfo process-info-pidfileportinfo
process-info*: process-info-pidinfo process-info-rusage process-info-setcontrol
socket-option*: socket-option-get socket-option-set
syscall*: syscall-mach syscall-mig syscall-unix
sysctl*: sysctl-read sysctl-write
system*: system-acct system-audit system-automount system-debug system-fcntl system-fsctl system-info
system*: system-kext* system-lcid system-mac-label system-mac-syscall system-necp-client-action
system*: system-nfssvc system-package-check system-privilege system-reboot system-sched system-set-time
system*: system-socket system-suspend-resume system-swap
system-kext*: system-kext-load system-kext-query system-kext-unload
user-preference*: user-preference-read user-preference-write
user-preference-read: managed-preference-read
"""

PARENTS: dict[str, str] = {
    child: parent
    for parent, children in (row.split(": ") for row in _TREE.split("\n") if row)
    for child in children.split()
}
"""Operation: the one that answers for it when no rule on it does.

`network-bind` answers to `network-inbound`, which is why a grant of inbound alone lets a server bind too
(libsandbox's table; measured by MXC#754)."""

# Old spellings, which still compile (libsandbox's sbpl_v1.scm; iokit-open by libsystem_sandbox).
ALIASES: dict[str, str] = {
    "file-fsctl": "system-fsctl",
    "file-issue-extension*": "file-issue-extension",
    "file-issue-extension-read": "file-issue-extension",
    "file-issue-extension-write": "file-issue-extension",
    "file-unlink": "file-write-unlink",
    "file-write-mount": "file-mount",
    "file-write-umount": "file-unmount",
    "file-write-unmount": "file-unmount",
    "iokit-open": "iokit-open*",
    "ipc-posix-sem": "ipc-posix-sem*",
    "ipc-posix-shm": "ipc-posix-shm*",
    "managed-preference*": "managed-preference-read",
    "process-exec": "process-exec*",
    "system-misc": "system*",
    "time-set": "system-set-time",
}

# What a request under an old name asks for, where that is not what a rule under it covers.
_ASKED: dict[str, str] = {"iokit-open": "iokit-open-user-client"}

# The first release that knows a name; on older ones it makes the whole profile invalid. The three iokit
# names split the old iokit-open (SRT#560; seen in requests of macOS 26 first).
SINCE: dict[str, int] = {"iokit-open*": 26, "iokit-open-service": 26, "iokit-open-user-client": 26}

ALLOWED_BY_DEFAULT = frozenset({"process-info*"})
"""Allowed under `(deny default)` unless a rule on it denies (stated by WebKit's and Firefox's profiles)."""

_UNSETTLED = """
darwin-notification-post dynamic-code-generation file-clone file-link file-test-existence
iokit-get-properties mach-cross-domain-lookup nvram* process-info-codesignature socket-ioctl
syscall-unix system-privilege
"""
UNSETTLED_BY_DEFAULT = frozenset(_UNSETTLED.split())
"""What libsandbox's table of macOS 10.15 marks as `ALLOWED_BY_DEFAULT` too, without a measurement on a
release of today. WebKit denies some of them expressly right after its `(deny default)`."""

CAVEATS: dict[str, str] = {
    "file-map-executable": "programs were seen to run without a grant of it, so a release may allow it by default"
}
"""What a denial that only a parent's rule or the default gives leaves open."""


def known(name: str) -> bool:
    return name == "default" or name in PARENTS or name in ALIASES


def in_rule(name: str) -> str:
    """The operation that a rule under this name is about."""
    return ALIASES.get(name, name)


def in_request(name: str) -> str:
    """The operation that a request under this name asks for."""
    return _ASKED.get(name) or ALIASES.get(name, name)


@lru_cache(maxsize=512)
def chain(operation: str) -> tuple[str, ...]:
    """The operation, its parent, and so on to `default`: the order in which rules are looked for."""
    nodes = [operation]
    while nodes[-1] != "default":
        nodes.append(PARENTS[nodes[-1]])
    return tuple(nodes)


@lru_cache(maxsize=4096)
def covers(outer: str, inner: str) -> bool:
    """Whether `outer` answers for `inner` when no closer rule does."""
    return outer in chain(inner)
