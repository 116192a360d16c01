"""The system-call filter: rules as data, an assembler for classic BPF, and the call that installs it.

Every refusal is an errno, never a kill: programs are written to cope with a kernel that says no. What no
rule names is allowed, except numbers from `FIRST_UNKNOWN` on, which get ENOSYS as they would on an older
kernel. Arguments are compared by their low 32 bits only: each compared one is an int, a mode or flags that
the kernel itself cuts to 32 bits, so a comparison of all 64 could be dodged with a bit above. Standard
library only.
"""

import ctypes
import errno
import functools
import platform
import struct
from typing import NamedTuple

from .libc import prctl, syscall
from .syscall_table import FIRST_UNKNOWN, NUMBERS

# audit.h: the token of each entry into the kernel. 32-bit and x32 entries have other tokens, or numbers
# that are out of range, and are refused whole: their numbers mean other calls.
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_ALLOW = 0
ASK = -1  # the verdict of a call that the container's shim answers, see `gate`
_RET_ALLOW = 0x7FFF0000
_RET_ASK = 0x7FC00000
_RET_ERRNO = 0x00050000
_LD_ABS, _JMP, _JEQ, _JGE, _AND, _RET = 0x20, 0x05, 0x15, 0x35, 0x54, 0x06
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SET_MODE_FILTER = 1
_NEW_LISTENER, _WAIT_KILLABLE = 8, 32
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2

_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_STREAM, _DGRAM, _SEQPACKET, _TYPE_MASK = 1, 2, 5, 0xF
_TCP, _UDP = 6, 17
_TCP_ULP = 31
_MSG_FASTOPEN = 0x20000000
_SET_LEASE = 1024
_NEW_NAMESPACES = 0x7E020000  # NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_NEW_TIME = 0x80  # clone(2) has its exit signal in these bits; only unshare and clone3 can ask for it
_SETID_BITS = 0o6000
_CREATES = (0o100, 0o20000000)  # O_CREAT, __O_TMPFILE
_ANY = 0xFFFFFFFF
_BUCKET = 8

# A program for the kernel: (code, jt, jf, k) for each instruction.
Code = list[tuple[int, int, int, int]]


class Check(NamedTuple):
    """(argument & mask) == value; with `equal=False`, !=."""

    argument: int
    mask: int
    value: int
    equal: bool = True


class Rule(NamedTuple):
    """For these calls (names, space-separated): the errno (0 allows, ASK asks) when every check holds.

    The rules of one call are tried in order; the first that holds decides, and if none does it is allowed.
    """

    calls: str
    verdict: int
    reason: str
    when: tuple[Check, ...] = ()


class Options(NamedTuple):
    """What differs between containers. `inet` is `none`, `tcp`, `udp` (and tcp) or `any`.

    `fastopen`: TCP connections may be opened by sending, which Landlock does not see. `ipc`: System V
    semaphores, shared memory and message queues, and POSIX message queues. `truncate`: truncate(2), which
    Landlock before ABI 3 lets pass. `gate`: unix sockets come from the container's shim; without effect where
    they are granted all. `ports`: granted ports are made real in the host's network, see `netgate`.
    """

    inet: str = "none"
    unix: bool = False
    fastopen: bool = False
    ipc: bool = False
    truncate: bool = True
    gate: bool = False
    ports: bool = False

    @property
    def asks(self) -> bool:
        """Whether the filter has a listener."""
        return self.ports or (self.gate and not self.unix)


# Those of `none`, `localhost` without and with an endpoint for UDP, `outbound` and `full`, and `localhost` with a
# network of its own; each with a host API.
_LEVELS = (
    Options(),
    Options(inet="tcp"),
    Options(inet="udp"),
    Options(inet="udp", fastopen=True),
    Options(inet="any", fastopen=True),
    Options(inet="udp", ports=True),
)
USUAL = (*_LEVELS, *(level._replace(gate=True) for level in _LEVELS))


def _refuse(calls: str, reason: str, *when: Check, code: int = errno.EPERM) -> Rule:
    return Rule(calls, code, reason, when)


def _allow(calls: str, reason: str, *when: Check) -> Rule:
    return Rule(calls, _ALLOW, reason, when)


ALWAYS: tuple[Rule, ...] = (
    _refuse("ptrace process_vm_readv process_vm_writev pidfd_getfd", "reads and steers other processes"),
    _refuse("process_madvise process_mrelease kcmp", "acts on or compares other processes' memory"),
    _refuse(
        "prlimit64", "sets other processes' limits, the worker's included", Check(0, _ANY, 0, equal=False)
    ),
    _refuse("setpriority", "slows all processes of a group or user", Check(0, _ANY, 0, equal=False)),
    _refuse("bpf perf_event_open lookup_dcookie", "observes the kernel and other processes"),
    _refuse("userfaultfd", "holds kernel code at a fault: the usual tool of kernel exploits"),
    _refuse("keyctl add_key request_key", "keyrings are shared by all processes of a user"),
    _refuse("mount umount2 pivot_root chroot mount_setattr", "changes the view of the file system"),
    _refuse("move_mount open_tree open_tree_attr fsopen fsconfig fsmount fspick", "the newer mount calls"),
    _refuse("statmount listmount", "tells all mounts of the host"),
    _refuse("setns", "joins another namespace"),
    _refuse("unshare", "a new user namespace opens kernel code", Check(0, _NEW_NAMESPACES, 0, equal=False)),
    _refuse("unshare", "a new time namespace", Check(0, _NEW_TIME, 0, equal=False)),
    _refuse("clone", "a new user namespace opens kernel code", Check(0, _NEW_NAMESPACES, 0, equal=False)),
    _refuse(
        "clone3",
        "its flags stand in memory, out of a filter's sight; libc then uses clone",
        code=errno.ENOSYS,
    ),
    _refuse("swapon swapoff quotactl quotactl_fd acct nfsservctl", "administers the machine"),
    _refuse(
        "init_module finit_module delete_module kexec_load kexec_file_load reboot", "replaces the kernel"
    ),
    _refuse("settimeofday clock_settime clock_adjtime adjtimex", "sets the clock"),
    _refuse("sethostname setdomainname", "renames the host"),
    _refuse("syslog", "reads the kernel's log"),
    _refuse("vhangup", "hangs up a terminal"),
    _refuse("iopl ioperm modify_ldt uselib", "old doors into the kernel that nothing needs"),
    _refuse(
        "io_uring_setup io_uring_enter io_uring_register", "does calls that no filter sees", code=errno.ENOSYS
    ),
    _refuse("name_to_handle_at open_by_handle_at", "opens files past every folder above them"),
    _refuse("fanotify_init fanotify_mark", "watches whole file systems"),
    _refuse("file_setattr", "changes attributes of files by path", code=errno.ENOSYS),
    _allow("personality", "asks only", Check(0, _ANY, 0xFFFFFFFF)),
    _allow("personality", "PER_LINUX, also with PER_LINUX32 and UNAME26", Check(0, _ANY & ~0x20008, 0)),
    _refuse("personality", "switches protections off, such as address randomisation"),
    _refuse("fcntl", "a lease stops whoever opens the file", Check(1, _ANY, _SET_LEASE), code=errno.EACCES),
    _refuse("ioctl", "TIOCSTI types into a terminal", Check(1, _ANY, 0x5412)),
    _refuse("ioctl", "TIOCLINUX pastes into a console", Check(1, _ANY, 0x541C)),
    # A program of root's makes a set-user-ID file for whoever may reach it on the host.
    _refuse("chmod fchmod", "set-user-ID file", Check(1, _SETID_BITS, 0, equal=False)),
    _refuse("fchmodat fchmodat2", "set-user-ID file", Check(2, _SETID_BITS, 0, equal=False)),
    _refuse("creat mknod", "set-user-ID file", Check(1, _SETID_BITS, 0, equal=False)),
    _refuse("mknodat", "set-user-ID file", Check(2, _SETID_BITS, 0, equal=False)),
    *(
        _refuse(
            call,
            "set-user-ID file",
            Check(flags, creates, creates),
            Check(flags + 1, _SETID_BITS, 0, equal=False),
        )
        for call, flags in (("open", 1), ("openat", 2))
        for creates in _CREATES
    ),
    _refuse("openat2", "its mode stands in memory; programs then use openat", code=errno.ENOSYS),
)

_IPC = _refuse(
    "shmget shmat shmctl shmdt msgget msgsnd msgrcv msgctl semget semop semctl semtimedop mq_open mq_unlink "
    "mq_timedsend mq_timedreceive mq_notify mq_getsetattr",
    "these objects are shared by all processes of a user",
)


_GATE = (Rule("connect", ASK, "to the host API, or on in the kernel: no unix socket here is unconnected"),)
_PORTS = (
    Rule("connect bind listen", ASK, "granted ports are the host's, others the container's own"),
    Rule("epoll_create epoll_create1", ASK, "is told only: sockets that are replaced may be in there"),
)
# By a name that stands in memory. Of the two that the kernel has, `tls` is a matter of speed; the errno is that of a
# kernel with neither.
_NO_ULP = _refuse(
    "setsockopt",
    "TCP_ULP turns a socket of TCP into one of SMC, which passes port rules by",
    Check(1, _ANY, _TCP),
    Check(2, _ANY, _TCP_ULP),
    code=errno.ENOENT,
)
_ONE_LISTENER = _refuse(
    "seccomp",
    "the shim's listener stays the only one",
    Check(0, _ANY, _SET_MODE_FILTER),
    Check(1, _NEW_LISTENER, _NEW_LISTENER),
)


def rules(options: Options) -> tuple[Rule, ...]:
    """The whole filter of one container."""
    chosen = [*ALWAYS, *_socket_rules(options)]
    if options.ports:
        chosen += _PORTS
    elif options.asks:
        chosen += _GATE
    if options.inet in ("tcp", "udp"):
        chosen.append(_NO_ULP)
    if options.asks:
        chosen.append(_ONE_LISTENER)
    if not options.ipc:
        chosen.append(_IPC)
    if not options.fastopen:
        # The errno of a kernel that has it switched off.
        for calls, flags in (("sendto sendmmsg", 3), ("sendmsg", 2)):
            chosen.append(
                _refuse(
                    calls,
                    "MSG_FASTOPEN connects without a check of the port",
                    Check(flags, _MSG_FASTOPEN, _MSG_FASTOPEN),
                    code=errno.EOPNOTSUPP,
                )
            )
    if not options.truncate:
        chosen.append(_refuse("truncate", "this kernel's Landlock does not see it"))
    return tuple(chosen)


def _socket_rules(options: Options) -> list[Rule]:
    allowed = []
    if options.unix:
        allowed.append(_allow("socket socketpair", "unix sockets are granted", Check(0, _ANY, _UNIX)))
    elif options.gate:
        stream = (Check(0, _ANY, _UNIX), Check(1, _TYPE_MASK, _STREAM))
        allowed.append(Rule("socket", ASK, "comes connected to the host API", stream))
    for kind in (_STREAM, _SEQPACKET):
        # Not datagrams (nor SOCK_RAW, the same here): such a pair can be pointed at any socket's path.
        allowed.append(
            _allow("socketpair", "a pair reaches nobody", Check(0, _ANY, _UNIX), Check(1, _TYPE_MASK, kind))
        )
    if options.inet != "none":
        allowed.append(
            _allow("socket", "routes and interfaces, to read", Check(0, _ANY, _NETLINK), Check(2, _ANY, 0))
        )
    for family in (_INET, _INET6) if options.inet != "none" else ():
        if options.inet == "any":
            allowed.append(_allow("socket", "the host's network", Check(0, _ANY, family)))
            continue
        kinds = [(_STREAM, _TCP), (_DGRAM, _UDP)] if options.inet == "udp" else [(_STREAM, _TCP)]
        for kind, protocol in kinds:
            for number in (0, protocol):
                allowed.append(
                    _allow(
                        "socket",
                        "TCP, and UDP where the level has it; MPTCP, SCTP and SMC pass port rules by",
                        Check(0, _ANY, family),
                        Check(1, _TYPE_MASK, kind),
                        Check(2, _ANY, number),
                    )
                )
    refused = _refuse("socket socketpair", "no other socket", code=errno.EACCES)
    return [*allowed, refused]


def machine() -> str | None:
    """The key of `AUDIT_ARCH` for this machine, None when the filter does not know it."""
    name = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return name if name in AUDIT_ARCH and struct.calcsize("P") == 8 else None


@functools.lru_cache(maxsize=16)
def assemble(options: Options, arch: str) -> bytes:
    """The program, as an array of struct sock_filter."""
    by_number: dict[int, list[Rule]] = {}
    column = list(AUDIT_ARCH).index(arch)
    for rule in rules(options):
        for call in rule.calls.split():
            number = NUMBERS[call][column]
            if number is not None:
                by_number.setdefault(number, []).append(rule)
    leaves = [(number, _call_code(by_number[number])) for number in sorted(by_number)]
    code: Code = [
        (_LD_ABS, 0, 0, 4),
        (_JEQ, 1, 0, AUDIT_ARCH[arch]),
        _return(errno.ENOSYS),
        (_LD_ABS, 0, 0, 0),
        (_JGE, 0, 1, FIRST_UNKNOWN),
        _return(errno.ENOSYS),
        *_search(leaves),
    ]
    assert all(jt <= 255 and jf <= 255 for _, jt, jf, _ in code)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _search(leaves: list[tuple[int, Code]]) -> Code:
    """A binary search over call numbers. Each branch ends in a return, so no jump leaves its own branch."""
    if len(leaves) <= _BUCKET:
        return _bucket(leaves)
    middle = len(leaves) // 2
    left, right = _search(leaves[:middle]), _search(leaves[middle:])
    pivot = leaves[middle][0]
    if len(left) <= 255:
        return [(_JGE, len(left), 0, pivot), *left, *right]
    return [(_JGE, 0, 1, pivot), (_JMP, 0, 0, len(left)), *left, *right]


def _bucket(leaves: list[tuple[int, Code]]) -> Code:
    """Compare one after the other; calls that are refused whatever their arguments share their returns."""
    returns = [_return(_ALLOW), *sorted({code[0] for _, code in leaves if len(code) == 1})]
    code: Code = list(returns)
    for number, own in reversed(leaves):
        if len(own) == 1:
            distance = len(code) - len(returns) + returns.index(own[0])
            code = [(_JEQ, distance, 0, number), *code]
        else:
            code = [(_JEQ, 0, len(own), number), *own, *code]
    return code


def _call_code(of_call: list[Rule]) -> Code:
    """The rules of one call, one after the other, then allow."""
    code: Code = []
    for rule in of_call:
        code += _rule_code(rule)
        if not rule.when:
            return code
    return [*code, _return(_ALLOW)]


def _rule_code(rule: Rule) -> Code:
    """Each check that fails jumps behind the rule's return; built from the end, where distances are known."""
    code: Code = [_return(rule.verdict)]
    for check in reversed(rule.when):
        beyond = len(code)
        jump = (_JEQ, 0, beyond, check.value) if check.equal else (_JEQ, beyond, 0, check.value)
        head: Code = [(_LD_ABS, 0, 0, 16 + 8 * check.argument)]
        if check.mask != _ANY:
            head.append((_AND, 0, 0, check.mask))
        code = [*head, jump, *code]
    return code


def _return(verdict: int) -> tuple[int, int, int, int]:
    if verdict == ASK:
        return (_RET, 0, 0, _RET_ASK)
    return (_RET, 0, 0, _RET_ALLOW if verdict == _ALLOW else _RET_ERRNO | verdict)


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def program(code: bytes) -> Program:
    """What `install` takes. Keeps `code` alive."""
    return Program(len(code) // 8, code)


def install(filter_program: Program, arch: str, listen: bool = False) -> int | None:
    """Put the filter on this process and all it will ever start. Cannot be undone.

    With `listen`, gives the descriptor at which what it asks is answered.
    """
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if listen:
        flags = _NEW_LISTENER | _WAIT_KILLABLE
        return syscall(_SECCOMP[arch], _SET_MODE_FILTER, flags, ctypes.byref(filter_program))
    try:
        syscall(_SECCOMP[arch], _SET_MODE_FILTER, 0, ctypes.byref(filter_program))
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(filter_program))
    return None


def supported() -> bool:
    """Whether the kernel takes filters: then a null program is refused with EFAULT, else with EINVAL."""
    if machine() is None:
        return False
    try:
        prctl(_PR_SET_SECCOMP, _MODE_FILTER, 0)
    except OSError as error:
        return error.errno == errno.EFAULT
    return True
