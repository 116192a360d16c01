"""A network of its own, and the granted TCP ports of the host in it: as root and as an ordinary user."""

import socket

import pytest

from tests.integration.netgate_help import (
    WHY_NOT,
    Box,
    Echo,
    Listening,
    appears,
    connected,
    free_port,
    make_box,
    make_child,
    make_echo,
    make_listening,
    make_stranger,
    own_address,
    port_of,
    refused,
)

__all__ = ["make_box", "make_child", "make_echo", "make_listening", "make_stranger"]

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

LAN = own_address()

# A server in the container that answers one connection with `hello`, and says by what names it goes.
SERVE = """
server = socket.socket(socket.AF_INET6 if ':' in HOST else socket.AF_INET)
if ONLY_V6: server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
server.bind((HOST, PORT)); server.listen()
say(server.getsockname()[:2])
for _ in range(TIMES):
    one, peer = server.accept()
    say(peer[0], one.getsockname()[:2])
    one.sendall(b'hello')
    one.close()
"""


def hears(port: int, host: str = "127.0.0.1") -> bytes:
    with connected(port, host) as one:
        return one.recv(9)


# -- out to the host


@pytest.mark.parametrize(
    ("host", "family"),
    [
        ("127.0.0.1", "AF_INET"),
        ("0.0.0.0", "AF_INET"),
        ("::ffff:127.0.0.1", "AF_INET6"),
        ("::ffff:0.0.0.0", "AF_INET6"),
    ],
)
def test_a_granted_port_is_reached(box: Box, echo: Echo, host: str, family: str) -> None:
    box.connect = (echo.port,)
    code = """
one = socket.socket(getattr(socket, FAMILY))
one.connect((HOST, PORT))
one.sendall(b'over there'); say(one.recv(99).decode(), one.getpeername()[1] == PORT)
say(attempt(one.connect, (HOST, PORT)))
"""
    said = box.run(code, PORT=echo.port, HOST=host, FAMILY=family)
    assert said == ["over there True", "EISCONN"]
    assert echo.served == 1


def test_a_granted_port_is_reached_by_ipv6(box: Box, listening: Listening) -> None:
    six = Echo(listening(host="::1"))
    box.connect = (six.port,)
    code = """
for host in ('::1', '::'):
    one = socket.socket(socket.AF_INET6)
    one.connect((host, PORT)); one.sendall(b'x'); say(one.recv(9))
say(attempt(socket.socket().connect, ('127.0.0.1', PORT)))
"""
    assert box.run(code, PORT=six.port) == ["b'x'", "b'x'", "ECONNREFUSED"]
    six.close()


def test_other_loopback_addresses_are_the_hosts_too(box: Box, listening: Listening) -> None:
    """A name server is often at 127.0.0.53."""
    server = Echo(listening(host="127.0.0.53"))
    box.connect = (server.port,)
    code = """
one = socket.socket(); one.connect(('127.0.0.53', PORT)); one.sendall(b'x')
say(one.recv(9), one.getpeername()[0])
"""
    assert box.run(code, PORT=server.port) == ["b'x' 127.0.0.53"]
    server.close()


NOT_GRANTED = {
    "another port": "one.connect(('127.0.0.1', OTHER))",
    "another port by IPv6": "socket.socket(socket.AF_INET6).connect(('::ffff:127.0.0.1', OTHER))",
    "another port without blocking": (
        "one.setblocking(False)\n"
        "try: one.connect(('127.0.0.1', OTHER))\n"
        "except BlockingIOError:\n"
        "    select.select([], [one], [])\n"
        "    code = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)\n"
        "    if code: raise OSError(code, '')"
    ),
    "a granted port at another address": "one.connect((LAN, PORT))",
}


@pytest.mark.parametrize("what", NOT_GRANTED)
def test_what_is_not_granted_is_not_there(box: Box, listening: Listening, what: str) -> None:
    if LAN is None and "address" in what:
        pytest.skip("this machine has no other address")
    everywhere, other = Echo(listening(host="0.0.0.0")), Echo(listening())
    box.connect = (everywhere.port,)
    names = {"PORT": everywhere.port, "OTHER": other.port, "LAN": LAN}
    code = (
        "one = socket.socket()\ndef act():\n"
        + "".join(f"    {line}\n" for line in NOT_GRANTED[what].split("\n"))
        + "say(attempt(act))"
    )
    assert box.run(code, free=True, **names) == ["done"]
    alive = everywhere.served + other.served
    assert box.run(code, **names) in (["ECONNREFUSED"], ["ENETUNREACH"])
    assert everywhere.served + other.served == alive == 1
    for one in (everywhere, other):
        one.close()


def test_a_refusal_is_told_and_the_socket_goes_on(box: Box, echo: Echo) -> None:
    closed = free_port()
    box.connect = (closed, echo.port)
    code = """
for blocks in (True, False):
    one = socket.socket(); one.setblocking(blocks)
    say(attempt(one.connect, ('127.0.0.1', CLOSED)), attempt(one.connect, ('127.0.0.1', CLOSED)))
    one.setblocking(True)
    say(attempt(one.connect, ('127.0.0.1', PORT)), attempt(one.send, b'x'), one.recv(9))
"""
    expected = ["ECONNREFUSED ECONNREFUSED", "done done b'x'"]
    assert box.run(code, CLOSED=closed, PORT=echo.port) == expected * 2


def test_a_server_that_hangs_up_at_once(box: Box, listening: Listening) -> None:
    server = listening()
    box.connect = (port_of(server),)
    code = """
ends = set()
for blocks in (True, False) * 50:
    one = socket.socket(); one.setblocking(blocks)
    end = attempt(one.connect, ('127.0.0.1', PORT))
    one.setblocking(True)
    ends.add((blocks, end, one.recv(9)))
say(sorted(ends))
"""
    box.start(code, PORT=port_of(server))
    for _ in range(100):
        one, _ = server.accept()
        one.sendall(b"hello")
        one.close()
    assert box.answer()[0] == ["[(False, 'EINPROGRESS', b'hello'), (True, 'done', b'hello')]"]


def test_bad_arguments_are_refused_as_the_kernel_would(box: Box, echo: Echo) -> None:
    box.connect = box.bind = (echo.port,)
    code = """
libc = ctypes.CDLL(None, use_errno=True)
def raw(call, fd, address, length):
    ctypes.set_errno(0)
    libc[call](fd, ctypes.c_void_p(address) if isinstance(address, int) else address, length)
    return errno.errorcode.get(ctypes.get_errno(), 'done')
good = struct.pack('=H', 2) + struct.pack('!H4s', PORT, bytes([127, 0, 0, 1])) + bytes(8)
for call in ('connect', 'bind'):
    fd = socket.socket().detach()
    say(raw(call, 77, good, 16), raw(call, 0, good, 16), raw(call, fd, 16, 16), raw(call, fd, good, -1),
        raw(call, fd, good, 129), raw(call, fd, good, 8))
say(attempt(socket.socket(socket.AF_INET6).connect, ('::1', 1)))
say(libc.listen(77, 1), errno.errorcode[ctypes.get_errno()])
"""
    free = box.run(code, PORT=echo.port, free=True)
    assert free[0].split()[:2] == ["EBADF", "ENOTSOCK"]
    assert box.run(code, PORT=echo.port) == free


def test_what_a_program_had_set_is_kept(box: Box, echo: Echo) -> None:
    box.connect = (echo.port,)
    box.bind = (free_port(),)
    code = """
fcntl = ctypes.CDLL(None).fcntl
OPTIONS = [(1, 2), (1, 9), (1, 10), (1, 13), (1, 15), (1, 20), (1, 21), (6, 1), (6, 4), (6, 5), (6, 6), (6, 18), (0, 1)]
def all_of(one):
    flags = fcntl(one.fileno(), 1), fcntl(one.fileno(), 3)
    return [one.getsockopt(*option, 16) for option in OPTIONS], one.getsockopt(1, 7), one.getsockopt(1, 8), flags
for use in (lambda one: one.connect(('127.0.0.1', PORT)), lambda one: one.bind(('127.0.0.1', BIND))):
    one = socket.socket()
    say(all_of(one) == all_of(socket.socket()))
    for level, option, value in ((1, 2, 1), (1, 9, 1), (1, 10, 1), (1, 15, 1), (6, 1, 1), (6, 4, 77), (6, 5, 7),
                                 (6, 6, 3), (6, 18, 4321), (0, 1, 16), (1, 7, 99999), (1, 8, 88888)):
        one.setsockopt(level, option, value)
    one.setsockopt(1, 13, struct.pack('ii', 1, 3)); one.setsockopt(1, 20, struct.pack('qq', 5, 0))
    one.setsockopt(1, 21, struct.pack('qq', 6, 0))
    os.set_inheritable(one.fileno(), False)
    before = all_of(one)
    say(attempt(use, one), all_of(one) == before, before != all_of(socket.socket()))
    two = socket.socket(); os.set_inheritable(two.fileno(), True); two.setblocking(False)
    two.setsockopt(1, 2, 1); two.setsockopt(1, 15, 1)
    before = all_of(two)[3]
    attempt(use, two); say(all_of(two)[3] == before)
"""
    said = box.run(code, PORT=echo.port, BIND=box.bind[0])
    assert said == ["True", "done True True", "True"] * 2


def test_a_bound_socket_can_be_connected(box: Box, echo: Echo) -> None:
    box.connect = (echo.port,)
    box.bind = (free_port(),)
    code = """
for address in (('127.0.0.1', 0), ('', 0), ('127.0.0.1', OWN), ('127.0.0.1', BIND)):
    one = socket.socket(); one.bind(address)
    say(attempt(one.connect, ('127.0.0.1', PORT)), attempt(one.send, b'x'), one.recv(9))
"""
    said = box.run(code, PORT=echo.port, BIND=box.bind[0], OWN=free_port())
    assert said == ["done done b'x'"] * 4


# -- in from the host


@pytest.mark.parametrize(
    ("host", "only_v6", "named", "by"),
    [
        ("127.0.0.1", False, "127.0.0.1", ["127.0.0.1"]),
        ("0.0.0.0", False, "127.0.0.1", ["127.0.0.1"]),
        ("127.0.0.5", False, "127.0.0.5", ["127.0.0.5"]),
        ("::", False, "::", ["127.0.0.1", "::1"]),
        ("::", True, "::1", ["::1"]),
        ("::1", False, "::1", ["::1"]),
        ("::ffff:0.0.0.0", False, "::ffff:127.0.0.1", ["127.0.0.1"]),
    ],
)
def test_a_granted_port_is_served_on_loopback(
    box: Box, host: str, only_v6: bool, named: str, by: list[str]
) -> None:
    box.bind = (free_port(),)
    port = box.bind[0]
    box.start(SERVE, HOST=host, PORT=port, TIMES=len(by), ONLY_V6=only_v6)
    assert hears(port, by[0]) == b"hello"
    for other in {"127.0.0.1", "::1", *([LAN] if LAN else [])} - set(by):
        assert refused(port, other)
    for address in by[1:]:
        assert hears(port, address) == b"hello"
    said, _ = box.answer()
    assert said[0] == str((named, port))
    assert len(said) == 1 + len(by)


def test_a_port_that_the_host_uses_is_in_use(box: Box, echo: Echo) -> None:
    box.bind = (echo.port,)
    code = """
for host, family in (('', socket.AF_INET), ('127.0.0.1', socket.AF_INET), ('::', socket.AF_INET6)):
    say(attempt(socket.socket(family).bind, (host, PORT)))
"""
    assert box.run(code, PORT=echo.port) == ["EADDRINUSE"] * 3


def test_a_port_is_free_again_once_it_is_closed(box: Box) -> None:
    box.bind = (free_port(),)
    code = """
for _ in range(3):
    one = socket.socket(); one.bind(('127.0.0.1', PORT)); say(attempt(one.bind, ('127.0.0.1', PORT)))
    say(attempt(socket.socket().bind, ('127.0.0.1', PORT))); one.listen(); one.close()
"""
    assert box.run(code, PORT=box.bind[0]) == ["EINVAL", "EADDRINUSE"] * 3


def test_ports_below_1024_stay_closed(box: Box) -> None:
    """The shim could bind them; no program of a container can, under any isolation, in any network."""
    box.bind = (853,)
    box.udp = (853,)
    code = """
for kind in (1, 2): say(*(attempt(socket.socket(type=kind).bind, ('127.0.0.1', port)) for port in (853, 854)))
"""
    assert box.run(code) == ["EACCES EACCES"] * 2


# -- its own network


def test_its_own_services_are_its_own(box: Box) -> None:
    port = free_port()
    code = """
for address in (('', PORT), ('127.0.0.1', 0), None):
    server = socket.socket()
    if address: server.bind(address)
    server.listen()
    where = ('127.0.0.1', server.getsockname()[1])
    client = socket.socket(); client.connect(where)
    one, _ = server.accept(); one.send(b'inside'); say(client.recv(9))
    if address and address[1]:
        say('up')
        while not os.path.exists('/go'): time.sleep(0.005)
six = socket.socket(socket.AF_INET6); six.bind(('::', 0)); six.listen()
say(attempt(socket.socket(socket.AF_INET6).connect, ('::1', six.getsockname()[1])))
say(open('/proc/net/dev').read().count(':'))
"""
    box.start(code, PORT=port)
    assert refused(port)
    with socket.create_server(("127.0.0.1", port)):
        assert not refused(port)  # the host may use it at the same time
    (box.rootfs / "go").touch()
    said, _ = box.answer()
    assert said == ["b'inside'", "up", "b'inside'", "b'inside'", "done", "1"]


def test_its_own_full_queue_holds_nobody_else_up(box: Box, echo: Echo) -> None:
    """Each such connect would block the shim for minutes, if it waited."""
    box.connect = (echo.port,)
    code = """
server = socket.socket(); server.bind(('127.0.0.1', 0)); server.listen(0)
where = server.getsockname()
results = []
def waits():
    results.append(attempt(socket.socket().connect, where))
for _ in range(8): _thread.start_new_thread(waits, ())
for _ in range(20):
    one = socket.socket(); one.connect(('127.0.0.1', PORT)); one.send(b'x'); one.recv(9); one.close()
say(len(results) < 8)
soon = socket.socket(); soon.setsockopt(1, 21, struct.pack('qq', 0, 300000))
say(attempt(soon.connect, where))
hasty = socket.socket(); hasty.setblocking(False); say(attempt(hasty.connect, where))
server.listen(16)  # they come again at longer and longer intervals: let all of them in
while len(results) < 8: server.accept()[0].close()
say(set(results))
"""
    assert box.run(code, PORT=echo.port) == ["True", "EINPROGRESS", "EINPROGRESS", "{'done'}"]


def test_a_full_queue_of_the_hosts_is_waited_for(box: Box, listening: Listening) -> None:
    server = listening()
    server.listen(0)
    box.connect = (port_of(server),)
    code = """
where = ('127.0.0.1', PORT)
first = socket.socket(); first.connect(where)
hasty = socket.socket(); hasty.setblocking(False); say(attempt(hasty.connect, where), attempt(hasty.connect, where))
soon = socket.socket(); soon.settimeout(0.2); say(attempt(soon.connect, where))
open('/asked', 'w').close()
one = socket.socket(); one.connect(where); say(one.getpeername()[1] == PORT)
select.select([], [hasty], []); say(hasty.getsockopt(1, 4), hasty.getpeername()[1] == PORT)
"""
    box.start(code, PORT=port_of(server))
    appears(box.rootfs / "asked")
    accepting = Echo(server)
    said, _ = box.answer()
    accepting.close()
    assert said == ["EINPROGRESS EALREADY", "TimeoutError", "True", "0 True"]


# -- many, and unlucky, callers


def test_many_threads(box: Box, echo: Echo) -> None:
    box.connect = (echo.port,)
    code = """
results = []
def calls():
    for _ in range(25):
        one = socket.socket()
        results.append((attempt(one.connect, ('127.0.0.1', PORT)), attempt(one.send, b'x'), one.recv(9)))
        one.close()
for _ in range(8): _thread.start_new_thread(calls, ())
while len(results) < 200: time.sleep(0.005)
say(set(results))
"""
    assert box.run(code, PORT=echo.port) == ["{('done', 'done', b'x')}"]
    assert echo.served == 200


def test_callers_that_are_killed_leave_the_others_served(box: Box, echo: Echo) -> None:
    box.connect = (echo.port,)
    code = """
server = socket.socket(); server.bind(('127.0.0.1', 0)); server.listen(0)
for n in range(20):
    pid = os.fork()
    if pid == 0:
        where = ('127.0.0.1', PORT) if n % 2 else server.getsockname()
        while True: attempt(socket.socket().connect, where)
    attempt(socket.socket().connect, ('127.0.0.1', PORT))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
say(attempt(socket.socket().connect, ('127.0.0.1', PORT)))
"""
    assert box.run(code, PORT=echo.port) == ["done"]


def test_signals_break_no_connection(box: Box, echo: Echo) -> None:
    """A signal can meet a call before the shim has heard of it; then it is made again, as after any signal."""
    box.connect = (echo.port,)
    code = """
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, False)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
results = set()
for _ in range(100):
    one = socket.socket()
    results.add((attempt(one.connect, ('127.0.0.1', PORT)), attempt(one.send, b'x'), one.recv(9)))
signal.setitimer(signal.ITIMER_REAL, 0)
say(results)
"""
    assert box.run(code, PORT=echo.port) == ["{('done', 'done', b'x')}"]


def test_a_program_that_joins_is_in_the_same_network(box: Box, echo: Echo) -> None:
    box.connect = (echo.port,)
    box.bind = (free_port(),)
    code = "say(os.readlink('/proc/self/ns/net'))"
    more = """
one = socket.socket(); one.connect(('127.0.0.1', PORT)); one.send(b'x'); say(one.recv(9))
say(attempt(socket.socket().connect, ('127.0.0.1', OTHER)))
say(attempt(socket.socket().bind, ('127.0.0.1', BIND)))
"""
    box.start(code, join=code + more, PORT=echo.port, OTHER=free_port(), BIND=box.bind[0])
    said, joined = box.answer()
    assert joined == [said[0], "b'x'", "ECONNREFUSED", "done"]
