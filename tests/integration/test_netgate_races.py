"""Programs that want more of the host's network than they are granted: every known way, and every race.

`stranger` is a server of the host that nobody is granted. Each attempt is proved alive: the same code, without the
sandbox, reaches it.
"""

import socket
from typing import Any

import pytest

from tests.integration.netgate_help import (
    WHY_NOT,
    Box,
    Echo,
    Listening,
    connected,
    free_port,
    make_box,
    make_child,
    make_echo,
    make_listening,
    make_stranger,
    refused,
)

__all__ = ["make_box", "make_child", "make_echo", "make_listening", "make_stranger"]

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

# What races use: addresses and descriptors as raw bytes and numbers, which another thread changes.
RAW = """
__import__('sys').setswitchinterval(1e-5)
libc = ctypes.CDLL(None, use_errno=True)
def address(port, host='127.0.0.1', family=2):
    return struct.pack('=H', family) + struct.pack('!H4s', port, socket.inet_aton(host)) + bytes(8)
def call(name, *arguments):
    ctypes.set_errno(0)
    return errno.errorcode[ctypes.get_errno()] if libc[name](*arguments) < 0 else 'done'
UNSPECIFIC = bytes(16)
def racing(change, calls):
    # Calls `change` all the time, in a thread, while the calls are made.
    going = [True]
    def race():
        while going[0]: change()
    _thread.start_new_thread(race, ())
    try: calls()
    finally: going[0] = False
"""

# What makes a socket of the host's that is connected to nobody: `one`. PORT is granted to connect to, BIND to bind.
IDLE = {
    "bound": "one = socket.socket(); one.bind(('127.0.0.1', BIND))",
    "bound, listened and shut down": (
        "one = socket.socket(); one.bind(('127.0.0.1', BIND)); one.listen(); one.shutdown(2)"
    ),
    "disconnected": (
        "one = socket.socket(); one.connect(('127.0.0.1', PORT)); call('connect', one.fileno(), UNSPECIFIC, 16)"
    ),
    "accepted and disconnected": (
        "server = socket.socket(); server.bind(('127.0.0.1', BIND)); server.listen()\n"
        "client = socket.socket(); client.connect(('127.0.0.1', BIND)); one, _ = server.accept()\n"
        "server.close(); call('connect', one.fileno(), UNSPECIFIC, 16)"
    ),
    "shut down on its way": (
        "fill = [socket.socket() for _ in range(4)]\n"
        "for other in fill: other.setblocking(False); attempt(other.connect, ('127.0.0.1', FULL))\n"
        "one = fill[3]; one.shutdown(2); one.setblocking(True)"
    ),
}


def names(box: Box, echo: Echo, stranger: Echo, listening: Listening) -> dict[str, Any]:
    full = listening()
    full.listen(0)
    full_port = full.getsockname()[1]
    box.bind, box.connect = (free_port(),), (echo.port, full_port)
    return {
        "PORT": echo.port,
        "BIND": box.bind[0],
        "FULL": full_port,
        "STRANGER": stranger.port,
        "FREE": free_port(),
    }


@pytest.mark.parametrize("what", IDLE)
def test_an_idle_socket_of_the_hosts_reaches_nobody(
    box: Box, echo: Echo, stranger: Echo, listening: Listening, what: str
) -> None:
    given = names(box, echo, stranger, listening)
    code = RAW + IDLE[what] + "\nsay(call('connect', one.fileno(), address(STRANGER), 16))"
    box.run(code, free=True, **{**given, "BIND": free_port()})
    assert stranger.served == 1, "it is no attempt"
    # By the shim, and by the kernel itself while another thread changes what the descriptor is.
    swapped = """
harmless = socket.socket(16, 3, 0); number = os.dup(harmless.fileno()); ends = set()
def swap():
    os.dup2(one.fileno(), number); os.dup2(harmless.fileno(), number)
def calls():
    for _ in range(300):
        ends.add(call('connect', number, address(STRANGER), 16))
        ends.add(call('bind', number, address(FREE), 16))
racing(swap, calls)
say(one.getsockname()[1] == FREE, *sorted(ends))
"""
    said = box.run(code + swapped, **given)
    assert said[0] == "ECONNREFUSED"
    assert said[1].startswith("False")
    assert stranger.served == 1


@pytest.mark.parametrize("what", [what for what in IDLE if "bound" not in what])
def test_an_idle_socket_of_the_hosts_serves_nobody(
    box: Box, echo: Echo, stranger: Echo, listening: Listening, what: str
) -> None:
    given = names(box, echo, stranger, listening)
    code = (
        RAW
        + IDLE[what]
        + """
say(call('bind', one.fileno(), address(FREE), 16), call('listen', one.fileno(), 5))
port = one.getsockname()[1]
say(port)
while port and not os.path.exists(GO): time.sleep(0.005)
"""
    )
    said = box.run(code, GO="/", free=True, **{**given, "BIND": free_port()})
    assert said[0].endswith("done"), "it is no attempt"
    box.start(code, GO="/go", **given)
    (box.rootfs / "go").touch()
    said, _ = box.answer()
    assert said[0] == "EINVAL EINVAL"
    assert refused(given["FREE"])


def test_without_landlock_the_race_would_be_won(
    box: Box, echo: Echo, stranger: Echo, listening: Listening
) -> None:
    """Why the plan refuses the program all TCP: what the tests above try is no idle attempt."""
    box.landlock = False
    code = (
        RAW
        + IDLE["disconnected"]
        + """
harmless = socket.socket(16, 3, 0); number = os.dup(harmless.fileno())
def swap():
    os.dup2(one.fileno(), number); os.dup2(harmless.fileno(), number)
def calls():
    until = time.monotonic() + 20
    while time.monotonic() < until:
        call('connect', number, address(STRANGER), 16)
        try:
            if one.getpeername()[1] == STRANGER: return say('reached')
        except OSError: pass
racing(swap, calls)
"""
    )
    assert box.run(code, **names(box, echo, stranger, listening)) == ["reached"]
    stranger.has_served(1)


def test_an_address_that_changes_during_the_call(box: Box, echo: Echo, stranger: Echo) -> None:
    box.connect = (echo.port,)
    code = (
        RAW
        + """
where = ctypes.create_string_buffer(address(PORT), 16)
ends = {}
def change():
    where[2:4] = struct.pack('!H', STRANGER); where[2:4] = struct.pack('!H', PORT)
def calls():
    for _ in range(ROUNDS):
        one = socket.socket()
        end = call('connect', one.fileno(), where, 16)
        ends[end] = ends.get(end, 0) + 1
        if end == 'done' and one.getpeername()[1] != PORT: say('reached', one.getpeername())
        one.close()
racing(change, calls)
say(sorted(ends))
"""
    )
    before = 0
    for _ in range(5):
        free = box.run(code, PORT=echo.port, STRANGER=stranger.port, ROUNDS=300, free=True)
        before += sum(line.startswith("reached") for line in free)
        if before:
            break
    else:
        pytest.skip("the attack never won its race outside the sandbox: nothing would be proved")
    stranger.has_served(before)
    said = box.run(code, PORT=echo.port, STRANGER=stranger.port, ROUNDS=300)
    assert said == ["['ECONNREFUSED', 'done']"]
    assert stranger.served == before


def test_a_descriptor_that_changes_during_the_call(box: Box, echo: Echo, stranger: Echo) -> None:
    """Among a socket of its own network, one of the host's and one that calls go on for."""
    box.bind = (free_port(),)
    box.connect = (echo.port,)
    code = (
        RAW
        + """
host = socket.socket(); host.bind(('127.0.0.1', BIND))
kinds = [host, socket.socket(), socket.socket(16, 3, 0), socket.socket(type=socket.SOCK_DGRAM)]
number = os.dup(kinds[0].fileno())
def change():
    for kind in kinds: os.dup2(kind.fileno(), number)
ends = set()
def calls():
    for _ in range(400):
        for port in (STRANGER, FREE): ends.add(call('connect', number, address(port), 16))
        ends.add(call('listen', number, 5))
        ends.add(call('bind', number, address(FREE), 16))
racing(change, calls)
say('up', *sorted(ends))
while not os.path.exists('/go'): time.sleep(0.005)
"""
    )
    free = free_port()
    box.start(code, PORT=echo.port, STRANGER=stranger.port, BIND=box.bind[0], FREE=free)
    served = connected(box.bind[0])  # that alone it may listen on
    assert refused(free)
    (box.rootfs / "go").touch()
    box.answer()
    served.close()
    assert stranger.served == 0


def test_a_socket_of_the_hosts_stays_on_its_device(box: Box) -> None:
    box.bind = (free_port(),)
    code = """
one = socket.socket(socket.AF_INET6); one.bind(('::', PORT))
say(attempt(one.setsockopt, 1, 25, b'eth0'), attempt(one.setsockopt, 1, 25, b''), attempt(one.setsockopt, 1, 62, 0))
say(one.getsockopt(1, 25, 16).rstrip(bytes(1)))
"""
    assert box.run(code, PORT=box.bind[0]) == ["EPERM EPERM EPERM", "b'lo'"]


REFUSED = {
    "another kind of socket under one of TCP": ("one.setsockopt(6, 31, b'smc')", "ENOENT"),
    "a filter with a listener of its own": (
        "ask = ctypes.create_string_buffer(struct.pack('=HBBI', 6, 0, 0, 0x7FC00000), 8)\n"
        "program = ctypes.create_string_buffer(struct.pack('HxxxxxxP', 1, ctypes.addressof(ask)), 16)\n"
        "if libc.syscall(317 if os.uname().machine == 'x86_64' else 277, 1, 8, program) < 0:\n"
        "    raise OSError(ctypes.get_errno(), '')",
        "EPERM",
    ),
    "sending while connecting": ("one.sendto(b'x', 0x20000000, ('127.0.0.1', STRANGER))", "ENOTSUP"),
    "the network of the socket": ("__import__('fcntl').ioctl(host.fileno(), 0x894C)", "EPERM"),
    "a raw socket": ("socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", "EACCES"),
    "a packet socket": ("socket.socket(17, socket.SOCK_RAW)", "EACCES"),
    "diagnosis of sockets": ("socket.socket(16, socket.SOCK_RAW, 4)", "EACCES"),
    "MPTCP": ("socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)", "EACCES"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_ways_are_closed(box: Box, stranger: Echo, what: str) -> None:
    box.bind = (free_port(),)
    act, refusal = REFUSED[what]
    lines = "".join(f"    {line}\n" for line in act.split("\n"))
    code = f"""
libc = ctypes.CDLL(None, use_errno=True)
host = socket.socket(); host.bind(('127.0.0.1', BIND))
one = socket.socket()
def act():
{lines}
say(attempt(act))
"""
    assert box.run(code, BIND=box.bind[0], STRANGER=stranger.port) == [refusal]
    assert stranger.served == 0


def test_interfaces_and_routes_are_its_own(box: Box) -> None:
    code = """
say([name for _, name in socket.if_nameindex()])
say(sorted({line.split()[0] for line in open('/proc/net/tcp').read().splitlines()[1:]}))
"""
    assert box.run(code) == ["['lo']", "[]"]


def test_abstract_sockets_of_the_host_are_not_there(box: Box) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0sandfleet-test-netgate")
        server.listen()
        said = box.run("say(open('/proc/net/unix').read().count('sandfleet-test-netgate'))")
    assert said == ["0"]
