"""The filter's program, run by an interpreter of classic BPF as the kernel would, on both architectures."""

import errno
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.platform.linux import seccomp
from worker.platform.linux.seccomp import AUDIT_ARCH, Options, Rule
from worker.platform.linux.syscall_table import FIRST_UNKNOWN, NUMBERS

ALLOW = 0
ARCHES = ("x86_64", "aarch64")

NONE = Options()
TCP = Options(inet="tcp")
UDP = Options(inet="udp", fastopen=True)
ANY = Options(inet="any", fastopen=True)
UNIX = Options(unix=True)
GATE = Options(inet="tcp", gate=True)
PORTS = Options(inet="udp", ports=True)

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_ALG, AF_VSOCK = 1, 2, 10, 16, 17, 38, 40
STREAM, DGRAM, RAW, SEQPACKET = 1, 2, 3, 5
CLOEXEC, NONBLOCK = 0o2000000, 0o4000
FASTOPEN = 0x20000000
HIGH = 1 << 32


def run(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """The verdict: 0 to allow, ASK, else an errno. Fails on anything that the kernel's checker would refuse."""
    code = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    assert 0 < len(code) <= 4096
    data = struct.pack("<iIQ6Q", number, arch, 0, *(a & (2**64 - 1) for a in (*arguments, *[0] * 6)[:6]))
    at = accumulator = 0
    while True:
        operation, yes, no, k = code[at]
        at += 1
        if operation == 0x20:
            assert k % 4 == 0
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif operation == 0x54:
            accumulator &= k
        elif operation == 0x05:
            at += k
        elif operation == 0x15:
            at += yes if accumulator == k else no
        elif operation == 0x35:
            at += yes if accumulator >= k else no
        elif operation == 0x06:
            if k == 0x7FFF0000:
                return ALLOW
            if k == 0x7FC00000:
                return seccomp.ASK
            assert k & 0xFFFF0000 == 0x00050000, hex(k)
            return k & 0xFFFF
        else:
            raise AssertionError(f"operation {operation:#x}")


def verdict(options: Options, arch: str, call: str, *arguments: int) -> int | None:
    """None where the architecture has no such call."""
    number = NUMBERS[call][ARCHES.index(arch)]
    if number is None:
        return None
    return run(seccomp.assemble(options, arch), AUDIT_ARCH[arch], number, *arguments)


CASES: list[tuple[Options, str, tuple[int, ...], int]] = [
    (NONE, "ptrace", (0,), errno.EPERM),
    (NONE, "bpf", (), errno.EPERM),
    (NONE, "keyctl", (1,), errno.EPERM),
    (NONE, "mount", (), errno.EPERM),
    (NONE, "io_uring_setup", (), errno.ENOSYS),
    (NONE, "clone3", (), errno.ENOSYS),
    (NONE, "openat2", (), errno.ENOSYS),
    (NONE, "clone", (0x11,), ALLOW),  # SIGCHLD: fork
    (NONE, "clone", (0x3D0F00,), ALLOW),  # a thread
    (NONE, "clone", (0x10000000 | 0x11,), errno.EPERM),  # CLONE_NEWUSER
    (NONE, "clone", (HIGH | 0x10000000,), errno.EPERM),
    (NONE, "clone", (0x00020000,), errno.EPERM),  # CLONE_NEWNS
    (NONE, "unshare", (0x400,), ALLOW),  # CLONE_FILES
    (NONE, "unshare", (0x40000000,), errno.EPERM),  # CLONE_NEWNET
    (NONE, "unshare", (0x80,), errno.EPERM),  # CLONE_NEWTIME
    (NONE, "prlimit64", (0, 7), ALLOW),
    (NONE, "prlimit64", (4711, 7), errno.EPERM),
    (NONE, "setpriority", (0, 0, 5), ALLOW),
    (NONE, "setpriority", (2, 0, 5), errno.EPERM),
    (NONE, "personality", (0xFFFFFFFF,), ALLOW),
    (NONE, "personality", (0,), ALLOW),
    (NONE, "personality", (0x20008,), ALLOW),
    (NONE, "personality", (0x0040000,), errno.EPERM),  # ADDR_NO_RANDOMIZE
    (NONE, "ioctl", (0, 0x5401), ALLOW),  # TCGETS
    (NONE, "ioctl", (0, 0x5412), errno.EPERM),
    (NONE, "ioctl", (0, HIGH | 0x5412), errno.EPERM),
    (NONE, "ioctl", (0, 0x541C), errno.EPERM),
    (NONE, "chmod", (0, 0o755), ALLOW),
    (NONE, "chmod", (0, 0o4755), errno.EPERM),
    (NONE, "fchmod", (0, 0o2755), errno.EPERM),
    (NONE, "fchmodat", (0, 0, 0o644), ALLOW),
    (NONE, "fchmodat", (0, 0, 0o4644), errno.EPERM),
    (NONE, "fchmodat2", (0, 0, 0o6644), errno.EPERM),
    (NONE, "mknodat", (0, 0, 0o104755), errno.EPERM),
    (NONE, "open", (0, 0, 0o4755), ALLOW),  # without O_CREAT the mode is whatever the register held
    (NONE, "open", (0, 0o101, 0o4755), errno.EPERM),
    (NONE, "open", (0, 0o101, 0o755), ALLOW),
    (NONE, "openat", (0, 0, 0o102, 0o2755), errno.EPERM),
    (NONE, "openat", (0, 0, 0o20200002, 0o4700), errno.EPERM),  # O_TMPFILE
    (NONE, "openat", (0, 0, 0o2000000, 0xFFFF), ALLOW),
    (NONE, "shmget", (), errno.EPERM),
    (NONE._replace(ipc=True), "shmget", (), ALLOW),
    (NONE, "truncate", (), ALLOW),
    (NONE._replace(truncate=False), "truncate", (), errno.EPERM),
    # sockets
    (NONE, "socket", (AF_INET, STREAM, 0), errno.EACCES),
    (NONE, "socket", (AF_UNIX, STREAM, 0), errno.EACCES),
    (NONE, "socket", (AF_NETLINK, RAW, 0), errno.EACCES),
    (NONE, "socketpair", (AF_UNIX, STREAM | CLOEXEC | NONBLOCK, 0), ALLOW),
    (NONE, "socketpair", (AF_UNIX, SEQPACKET, 0), ALLOW),
    (NONE, "socketpair", (AF_UNIX, DGRAM, 0), errno.EACCES),
    (NONE, "socketpair", (AF_UNIX, RAW, 0), errno.EACCES),
    (NONE, "socketpair", (30, STREAM, 0), errno.EACCES),  # AF_TIPC
    (UNIX, "socket", (AF_UNIX, DGRAM, 0), ALLOW),
    (UNIX, "socketpair", (AF_UNIX, DGRAM, 0), ALLOW),
    (UNIX, "socket", (AF_INET, STREAM, 0), errno.EACCES),
    (TCP, "socket", (AF_INET, STREAM | CLOEXEC, 0), ALLOW),
    (TCP, "socket", (AF_INET6, STREAM, 6), ALLOW),
    (TCP, "socket", (HIGH | AF_INET, STREAM, 6), ALLOW),
    (TCP, "socket", (HIGH | AF_UNIX, STREAM, 0), errno.EACCES),
    (TCP, "socket", (AF_INET, DGRAM, 0), errno.EACCES),
    (TCP, "socket", (AF_INET, STREAM, 132), errno.EACCES),  # SCTP
    (TCP, "socket", (AF_INET, STREAM, 262), errno.EACCES),  # MPTCP
    (TCP, "socket", (AF_INET, STREAM, 256), errno.EACCES),  # SMC
    (TCP, "socket", (AF_INET, RAW, 6), errno.EACCES),
    (TCP, "socket", (AF_NETLINK, RAW, 0), ALLOW),
    (TCP, "socket", (AF_NETLINK, RAW, 4), errno.EACCES),  # SOCK_DIAG
    (TCP, "socket", (43, STREAM, 0), errno.EACCES),  # AF_SMC
    (TCP, "setsockopt", (3, 6, 31), errno.ENOENT),  # TCP_ULP
    (TCP, "setsockopt", (3, HIGH | 6, HIGH | 31), errno.ENOENT),
    (TCP, "setsockopt", (3, 6, 1), ALLOW),
    (TCP, "setsockopt", (3, 1, 31), ALLOW),
    (UDP, "setsockopt", (3, 6, 31), errno.ENOENT),
    (ANY, "setsockopt", (3, 6, 31), ALLOW),
    (UDP, "socket", (43, STREAM, 0), errno.EACCES),  # AF_SMC
    (UDP, "socket", (AF_INET6, STREAM, 256), errno.EACCES),  # SMC
    (ANY, "socket", (43, STREAM, 0), errno.EACCES),  # AF_SMC
    (UDP, "socket", (AF_INET, DGRAM | NONBLOCK, 17), ALLOW),
    (UDP, "socket", (AF_INET6, DGRAM, 0), ALLOW),
    (UDP, "socket", (AF_INET, DGRAM, 1), errno.EACCES),  # ICMP
    (UDP, "socket", (AF_INET, 6, 33), errno.EACCES),  # DCCP
    (ANY, "socket", (AF_INET, RAW, 1), ALLOW),
    (ANY, "socket", (AF_PACKET, RAW, 0), errno.EACCES),
    (ANY, "socket", (AF_ALG, SEQPACKET, 0), errno.EACCES),
    (ANY, "socket", (AF_VSOCK, STREAM, 0), errno.EACCES),
    (GATE, "socket", (AF_UNIX, STREAM | CLOEXEC | NONBLOCK, 0), seccomp.ASK),
    (GATE, "socket", (HIGH | AF_UNIX, STREAM, 0), seccomp.ASK),
    (GATE, "socket", (AF_UNIX, DGRAM, 0), errno.EACCES),
    (GATE, "socket", (AF_UNIX, RAW, 0), errno.EACCES),  # datagrams by another name
    (GATE, "socket", (AF_UNIX, SEQPACKET, 0), errno.EACCES),
    (GATE, "socket", (AF_INET, STREAM, 0), ALLOW),
    (GATE, "socketpair", (AF_UNIX, STREAM, 0), ALLOW),
    (GATE, "socketpair", (AF_UNIX, DGRAM, 0), errno.EACCES),
    (GATE, "connect", (3, 0, 16), seccomp.ASK),
    (GATE, "seccomp", (1, 0), ALLOW),  # a filter of the program's own
    (GATE, "seccomp", (1, 8 | 1), errno.EPERM),  # with a listener
    (GATE, "seccomp", (HIGH | 1, HIGH | 8), errno.EPERM),
    (GATE._replace(unix=True), "socket", (AF_UNIX, DGRAM, 0), ALLOW),
    (GATE._replace(unix=True), "connect", (3, 0, 16), ALLOW),
    (TCP, "connect", (3, 0, 16), ALLOW),
    (PORTS, "connect", (3, 0, 16), seccomp.ASK),
    (PORTS, "bind", (3, 0, 16), seccomp.ASK),
    (PORTS, "listen", (3, 5), seccomp.ASK),
    (PORTS, "epoll_create", (1,), seccomp.ASK),
    (PORTS, "epoll_create1", (0,), seccomp.ASK),
    (PORTS, "seccomp", (1, 8), errno.EPERM),
    (PORTS, "socket", (AF_INET, DGRAM, 0), ALLOW),
    (PORTS, "socket", (AF_INET, RAW, 0), errno.EACCES),
    (PORTS, "socket", (AF_UNIX, STREAM, 0), errno.EACCES),
    (PORTS._replace(gate=True), "socket", (AF_UNIX, STREAM, 0), seccomp.ASK),
    (PORTS._replace(unix=True), "socket", (AF_UNIX, STREAM, 0), ALLOW),
    (PORTS._replace(unix=True), "connect", (3, 0, 16), seccomp.ASK),
    (PORTS, "setsockopt", (3, 6, 1), ALLOW),
    (PORTS, "setsockopt", (3, 1, 31), ALLOW),
    (PORTS, "setsockopt", (3, 6, 31), errno.ENOENT),  # TCP_ULP
    (PORTS, "setsockopt", (3, HIGH | 6, HIGH | 31), errno.ENOENT),
    (PORTS, "sendto", (3, 0, 0, FASTOPEN), errno.EOPNOTSUPP),
    (TCP, "sendto", (3, 0, 0, 0x4000), ALLOW),
    (TCP, "sendto", (3, 0, 0, FASTOPEN), errno.EOPNOTSUPP),
    (TCP, "sendmsg", (3, 0, FASTOPEN | 0x4000), errno.EOPNOTSUPP),
    (TCP, "sendmmsg", (3, 0, 1, FASTOPEN), errno.EOPNOTSUPP),
    (UDP, "sendto", (3, 0, 0, FASTOPEN), ALLOW),
]


@pytest.mark.parametrize(("options", "call", "arguments", "expected"), CASES)
def test_verdict(options: Options, call: str, arguments: tuple[int, ...], expected: int) -> None:
    verdicts = {verdict(options, arch, call, *arguments) for arch in ARCHES}
    assert verdicts - {None} == {expected}


@pytest.mark.parametrize("arch", ARCHES)
def test_calls_that_no_rule_names_are_allowed(arch: str) -> None:
    named = {numbers[ARCHES.index(arch)] for numbers in NUMBERS.values()}
    program = seccomp.assemble(NONE, arch)
    for number in range(FIRST_UNKNOWN):
        if number not in named:
            assert run(program, AUDIT_ARCH[arch], number) == ALLOW, number


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("options", [NONE, TCP, UDP, ANY, UNIX, GATE, PORTS])
def test_the_program_says_what_the_rules_say(options: Options, arch: str) -> None:
    """A plain reading of the rules, one after the other, against the search tree."""
    program = seccomp.assemble(options, arch)
    samples = [
        (0,) * 6,
        (1,) * 6,
        (2,) * 6,
        (2**32 - 1,) * 6,
        (16, 3, 0, FASTOPEN, 0, 0),
        (1, 0o101, 0o4755, 0, 0, 0),
    ]
    for call, numbers in NUMBERS.items():
        number = numbers[ARCHES.index(arch)]
        if number is not None:
            for arguments in samples:
                expected = plain(seccomp.rules(options), call, arguments)
                assert run(program, AUDIT_ARCH[arch], number, *arguments) == expected, (call, arguments)


def plain(rules: tuple[Rule, ...], call: str, arguments: tuple[int, ...]) -> int:
    for rule in rules:
        if call in rule.calls.split() and holds(rule, arguments):
            return rule.verdict
    return ALLOW


def holds(rule: Rule, arguments: tuple[int, ...]) -> bool:
    return all(((arguments[c.argument] & c.mask & 0xFFFFFFFF) == c.value) is c.equal for c in rule.when)


def examples(rule: Rule) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Arguments for which the rule holds, without and with bits that the kernel cuts off, and such that break one check
    each.
    """
    fitting = [0] * 6
    # Of two checks of one argument, equality decides.
    for check in sorted(rule.when, key=lambda check: check.equal):
        bit = check.mask & -check.mask
        value = check.value if check.equal else (check.value ^ bit) & 0xFFFFFFFF
        kept = fitting[check.argument] & ~check.mask if check.equal else fitting[check.argument]
        fitting[check.argument] = kept | value
    yield tuple(fitting), True
    yield tuple(HIGH | value for value in fitting), True
    if not rule.when:
        yield (0x00040000,) * 6, True  # past whatever is allowed before
    for check in rule.when:
        broken = list(fitting)
        if check.equal:
            broken[check.argument] ^= check.mask & -check.mask
        else:
            broken[check.argument] = broken[check.argument] & ~check.mask | check.value
        yield tuple(broken), False


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("options", [NONE, TCP, UDP, ANY, UNIX, GATE, PORTS, NONE._replace(truncate=False)])
def test_each_rule_decides_where_it_holds_and_only_there(options: Options, arch: str) -> None:
    """Every rule gets arguments for which it holds, and those that miss it by one check."""
    program = seccomp.assemble(options, arch)
    rules = seccomp.rules(options)
    decided = set()
    for rule in rules:
        for call in rule.calls.split():
            number = NUMBERS[call][ARCHES.index(arch)]
            if number is None:
                decided.add(rule)  # where every call of it is missing, it has nothing to decide
                continue
            for arguments, fits in examples(rule):
                assert holds(rule, arguments) is fits, (call, rule.reason, arguments)
                expected = plain(rules, call, arguments)
                assert run(program, AUDIT_ARCH[arch], number, *arguments) == expected, (call, arguments)
                if fits and expected == rule.verdict:
                    decided.add(rule)
    assert {rule.reason for rule in rules if rule not in decided} == set()


# The kernel's own lists, as the C library's headers bring them (package linux-libc-dev). That of aarch64 is the
# generic one, with the calls that its <asm/unistd.h> asks for (arch/arm64/include/uapi/asm/unistd.h).
HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"),
    "aarch64": ("/usr/include/asm-generic/unistd.h",),
}
# From this number on a call has the same one on every architecture (Documentation/process/adding-syscalls.rst).
FIRST_COMMON = 424


def listed(arch: str) -> dict[str, int]:
    """Names and numbers of a header; skips where it is not installed."""
    path = next((path for path in map(Path, HEADERS[arch]) if path.exists()), None)
    if path is None:
        pytest.skip(f"needs {HEADERS[arch][0]} (linux-libc-dev)")
    found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)\b", path.read_text(), re.MULTILINE)
    # Where the generic list says 3264, a machine of 64 bits has the plain name.
    return {{"fadvise64_64": "fadvise64"}.get(name, name): int(number) for name, number in found}


@pytest.mark.parametrize("arch", ARCHES)
def test_the_numbers_are_those_of_the_kernels_headers(arch: str) -> None:
    header = listed(arch)
    newest = max(number for name, number in header.items() if name != "syscalls")
    ours = {name: numbers[ARCHES.index(arch)] for name, numbers in NUMBERS.items()}
    assert len(set(ours.values()) - {None}) == sum(number is not None for number in ours.values())
    wrong = {
        name: (number, header.get(name))
        for name, number in ours.items()
        if number != header.get(name) and (number is None or number <= newest)
    }
    assert not wrong


def test_calls_of_every_architecture_have_one_number() -> None:
    for name, (x86, arm) in NUMBERS.items():
        if max(x86 or 0, arm or 0) >= FIRST_COMMON:
            assert x86 == arm, name


@pytest.mark.parametrize("arch", ARCHES)
def test_other_entries_and_newer_calls_do_not_exist(arch: str) -> None:
    program = seccomp.assemble(ANY, arch)
    other = AUDIT_ARCH[ARCHES[1 - ARCHES.index(arch)]]
    assert run(program, other, 1) == errno.ENOSYS
    assert run(program, 0x40000003, 1) == errno.ENOSYS  # i386
    assert run(program, 0x40000028, 1) == errno.ENOSYS  # 32-bit ARM
    assert run(program, AUDIT_ARCH[arch], 0x40000000 | 1) == errno.ENOSYS  # x32
    assert run(program, AUDIT_ARCH[arch], FIRST_UNKNOWN) == errno.ENOSYS
    assert run(program, AUDIT_ARCH[arch], -1) == errno.ENOSYS


def test_every_rule_names_known_calls_and_gives_a_reason() -> None:
    for options in (NONE, TCP, UDP, ANY, UNIX, GATE, PORTS):
        for rule in seccomp.rules(options):
            assert set(rule.calls.split()) <= NUMBERS.keys()
            assert rule.reason
    used = {
        call
        for options in (NONE, NONE._replace(truncate=False), GATE, PORTS)
        for r in seccomp.rules(options)
        for call in r.calls.split()
    }
    assert used == NUMBERS.keys()
