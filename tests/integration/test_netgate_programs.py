"""Programs that wait for events, serve, and come from elsewhere, in a network of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

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
)

__all__ = ["make_box", "make_child", "make_echo", "make_listening"]

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

EPOLL = """
libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == 'x86_64'
def put(epoll, one, events, data, how=1):
    event = struct.pack('=IQ' if X86 else '=I4xQ', events, data)
    if libc.epoll_ctl(epoll.fileno(), how, one.fileno(), event) < 0: raise OSError(ctypes.get_errno(), '')
def wait(epoll):
    # [(events, data)] of what is ready, after at most ten seconds
    room = ctypes.create_string_buffer(16 * 16)
    count = libc.epoll_wait(epoll.fileno(), room, 16, 10000)
    size = 12 if X86 else 16
    return [struct.unpack_from('=IQ' if X86 else '=I4xQ', room.raw, size * n) for n in range(count)]
"""


@pytest.mark.parametrize("before", [True, False], ids=["put in before", "put in after"])
@pytest.mark.parametrize("edge", [0, 1 << 31], ids=["level", "edge"])
def test_a_socket_that_is_waited_for(box: Box, echo: Echo, before: bool, edge: int) -> None:
    """As nginx and Boost.Asio do: into the set before it is connected, with any 64 bits to know it again."""
    box.connect = (echo.port,)
    code = (
        EPOLL
        + """
sets = [select.epoll(), select.epoll()]
for turn in range(3):
    one = socket.socket(); one.setblocking(False)
    data = 0xDEADBEEF00000000 + turn
    if BEFORE:
        for epoll in sets: put(epoll, one, 1 | EDGE, data)
    attempt(one.connect, ('127.0.0.1', PORT))
    if not BEFORE:
        for epoll in sets: put(epoll, one, 1 | EDGE, data)
    select.select([], [one], [])
    one.send(b'hello')
    for epoll in sets:
        ready = wait(epoll)
        while not ready[0][0] & 1: ready = wait(epoll)
        say(*(hex(where) for _, where in ready))
    say(one.recv(9))
    for epoll in sets: put(epoll, one, 4, 5, how=3)  # it can be changed, and taken out
    say([ready[1] for ready in wait(sets[0])], attempt(put, sets[1], one, 0, 0, 2), attempt(put, sets[1], one, 0, 0, 2))
    one.close()
"""
    )
    said = box.run(code, PORT=echo.port, BEFORE=before, EDGE=edge)
    assert said == [
        line
        for turn in range(3)
        for line in (f"0xdeadbeef0000000{turn}", f"0xdeadbeef0000000{turn}", "b'hello'", "[5] done ENOENT")
    ]


def test_a_server_that_is_waited_for_before_it_is_bound(box: Box) -> None:
    box.bind = (free_port(),)
    code = (
        EPOLL
        + """
epoll = select.epoll()
spare = [os.dup(0) for _ in range(200)]  # numbers that the shim does not use, and such that it does
for number in NUMBERS:
    made = socket.socket(); server = socket.socket(fileno=os.dup2(made.fileno(), number)); made.close()
    server.setsockopt(1, 2, 1)
    put(epoll, server, 1, number)
    server.bind(('127.0.0.1', PORT)); server.listen()
    open('/up%d' % number, 'w').close()
    while not any(events & 1 for events, data in wait(epoll) if data == number): pass
    one, _ = server.accept(); one.sendall(b'hello'); one.close(); server.close()
"""
    )
    numbers = (90, 20, 11, 4)
    box.start(code, PORT=box.bind[0], NUMBERS=numbers)
    for number in numbers:
        appears(box.rootfs / f"up{number}")
        with connected(box.bind[0]) as one:
            assert one.recv(9) == b"hello"
    box.answer()


ONCE = (
    EPOLL
    + """
def once():
    epoll = select.epoll()
    one = socket.socket(); one.setblocking(False)
    put(epoll, one, 1, 7)
    say_if(attempt(one.connect, ('127.0.0.1', PORT)), 'EINPROGRESS')
    select.select([], [one], []); one.send(b'x')
    while not any(events & 1 for events, _ in wait(epoll)): pass
    return one.recv(9)
def say_if(told, expected):
    if told != expected: say(told)
"""
)


def test_sets_of_a_program_started_later_and_of_threads(box: Box, echo: Echo) -> None:
    box.connect = (echo.port,)
    code = (
        ONCE
        + """
say(once())
results = []
for _ in range(4): _thread.start_new_thread(lambda: results.append(once()), ())
while len(results) < 4: time.sleep(0.005)
say(results)
if os.fork() == 0:
    say(once())
    os._exit(0)
os.wait()
"""
    )
    assert box.run(code, PORT=echo.port) == ["b'x'", str([b"x"] * 4), "b'x'"]


def test_sets_that_other_threads_close_meanwhile(box: Box, echo: Echo) -> None:
    box.connect = (echo.port,)
    code = (
        ONCE
        + """
over = []
def churns():
    while not over:
        many = [select.epoll() for _ in range(10)]
        for one in many: one.close()
for _ in range(3): _thread.start_new_thread(churns, ())
say({once() for _ in range(40)})
over.append(True)
"""
    )
    assert box.run(code, PORT=echo.port) == ["{b'x'}"]


def test_asyncio(box: Box, echo: Echo) -> None:
    box.connect = (echo.port,)
    box.bind = (free_port(),)
    code = """
async def answer(reader, writer):
    writer.write((await reader.readline()).upper()); await writer.drain(); writer.close()
async def asks(port):
    one = socket.socket(); one.setblocking(False)
    await asyncio.get_running_loop().sock_connect(one, ('127.0.0.1', port))
    reader, writer = await asyncio.open_connection(sock=one)
    writer.write(b'hello\\n'); line = await reader.readline(); writer.close()
    return line
async def main():
    one = socket.socket(); one.setsockopt(1, 2, 1); one.bind(('', BIND))
    server = await asyncio.start_server(answer, sock=one)
    say(set(await asyncio.gather(*(asks(PORT) for _ in range(30)))))
    say(set(await asyncio.gather(*(asks(BIND) for _ in range(30)))))
    open('/up', 'w').close()
    while not os.path.exists('/go'): await asyncio.sleep(0.005)
    server.close()
asyncio.run(main())
"""
    box.start(code, PORT=echo.port, BIND=box.bind[0])
    with connected(box.bind[0]) as one:
        one.sendall(b"from the host\n")
        assert one.recv(99) == b"FROM THE HOST\n"
    (box.rootfs / "go").touch()
    assert box.answer()[0] == [r"{b'hello\n'}", r"{b'HELLO\n'}"]


def test_workers_that_were_forked_share_a_port(box: Box) -> None:
    box.bind = (free_port(),)
    code = """
server = socket.socket(); server.bind(('127.0.0.1', PORT)); server.listen()
pids = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        one, _ = server.accept(); one.sendall(b'%d' % os.getpid()); one.close()
        os._exit(0)
    pids.append(pid)
for _ in pids: os.wait()
say(*pids)
"""
    box.start(code, PORT=box.bind[0])
    answers = set()
    for _ in range(3):
        with connected(box.bind[0]) as one:
            answers.add(one.recv(99).decode())
    said, _ = box.answer()
    assert answers == set(said[0].split())


def test_workers_that_share_a_port_by_option(box: Box) -> None:
    box.bind = (free_port(),)
    code = """
for n in range(2):
    if os.fork() == 0:
        server = socket.socket(); server.setsockopt(1, 15, 1); server.bind(('127.0.0.1', PORT)); server.listen()
        open('/up%d' % n, 'w').close()
        while not os.path.exists('/go'): time.sleep(0.005)
        os._exit(0)
while not (os.path.exists('/up0') and os.path.exists('/up1')): time.sleep(0.005)
plain = socket.socket()
say(attempt(plain.bind, ('127.0.0.1', PORT)))
open('/go', 'w').close()
os.wait(); os.wait()
"""
    assert box.run(code, PORT=box.bind[0]) == ["EADDRINUSE"]


THREADS = r"""
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>
static struct sockaddr_in there = {.sin_family = AF_INET};
static int right;
static void *asks(void *unused) {
    for (int turn = 0; turn < 50; turn++) {
        int one = socket(AF_INET, SOCK_STREAM, 0);
        char got;
        if (connect(one, (struct sockaddr *)&there, sizeof there) == 0 && write(one, "x", 1) == 1
            && read(one, &got, 1) == 1 && got == 'x')
            __sync_fetch_and_add(&right, 1);
        close(one);
    }
    return unused;
}
int main(int argc, char **argv) {
    pthread_t threads[8];
    there.sin_port = htons(atoi(argv[1]));
    there.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int n = 0; n < 8; n++) pthread_create(&threads[n], 0, asks, 0);
    for (int n = 0; n < 8; n++) pthread_join(threads[n], 0);
    printf("%d\n", right);
    return 0;
}
"""


def test_a_program_of_threads(box: Box, echo: Echo) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    program = box.rootfs / "threads"
    command = [compiler, "-O1", "-pthread", "-x", "c", "-o", str(program), "-"]
    subprocess.run(command, input=THREADS, text=True, check=True)
    box.connect = (echo.port,)
    assert box.run("", argv=["/threads", str(echo.port)]) == ["400"]
    assert echo.served == 400


def test_curl_of_a_server_of_the_host(box: Box, listening: Listening) -> None:
    if not os.path.exists("/usr/bin/curl"):
        pytest.skip("needs curl")
    server = listening()
    box.connect = (server.getsockname()[1],)
    box.start("", argv=["/usr/bin/curl", "-s", "-m", "10", f"http://127.0.0.1:{box.connect[0]}/"])
    one, _ = server.accept()
    with one:
        asked = one.recv(999)
        one.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello")
    assert asked.startswith(b"GET / ")
    assert box.answer()[0] == ["hello"]


NODE = """
const http = require('http'), port = Number(process.argv[1]), other = Number(process.argv[2]);
const server = http.createServer((request, answer) => {
  answer.end('hello');
  if (request.url === '/end') server.close();
});
server.listen(port, () => {
  http.get({host: '127.0.0.1', port: other, agent: false}, (answer) => console.log(answer.statusCode));
  http.get({host: '127.0.0.1', port: 1, agent: false}).on('error', (failure) => console.log(failure.code));
});
"""


def test_node_serves_and_asks(box: Box, listening: Listening) -> None:
    node = shutil.which("node")
    if node is None or not os.path.realpath(node).startswith("/usr/"):
        pytest.skip("needs node below /usr")
    server = listening()
    box.bind, box.connect = (free_port(),), (server.getsockname()[1],)
    box.start("", argv=[os.path.realpath(node), "-e", NODE, str(box.bind[0]), str(box.connect[0])])
    one, _ = server.accept()
    with one:
        one.recv(999)
        one.sendall(b"HTTP/1.0 204 No Content\r\n\r\n")
    for host in ("127.0.0.1", "::1"):
        with connected(box.bind[0], host) as client:
            client.sendall(b"GET /%s HTTP/1.0\r\n\r\n" % (b"end" if host == "::1" else b""))
            assert b"hello" in client.makefile("rb").read()
    assert sorted(box.answer()[0]) == ["204", "ECONNREFUSED"]


def test_http_server_of_python(box: Box) -> None:
    python = Path("/usr/bin/python3")
    if not python.exists():
        pytest.skip(f"needs a Python below /usr, not only {sys.executable}")
    (box.rootfs / "index.html").write_text("hello")
    box.bind = (free_port(),)
    server = (
        "import http.server as s\n"
        f"one = s.HTTPServer(('', {box.bind[0]}), s.SimpleHTTPRequestHandler)\n"
        "one.handle_request(); one.server_close()"
    )
    box.start("", argv=[str(python), "-c", server])
    with connected(box.bind[0]) as client:
        client.sendall(b"GET /index.html HTTP/1.0\r\n\r\n")
        assert client.makefile("rb").read().endswith(b"hello")
    assert '"GET /index.html HTTP/1.0" 200' in box.answer()[0][-1]
