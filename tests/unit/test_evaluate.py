"""The decision matrix of the facts on Seatbelt, row by row, and how the evaluator explains itself."""

from typing import Any

import pytest

from worker.platform.darwin.evaluate import Argument, Verdict, evaluate

B = "(version 1)(deny default)"
ROOT = "/private/var/w/c1/rootfs"
HOSTILE = '/private/x") (allow default) ("'

Asked = tuple[str, dict[str, Any], str]


def verdict(
    text: str,
    operation: str,
    params: dict[str, str] | None = None,
    release: int | None = None,
    **argument: Any,
) -> Verdict:
    return evaluate(text, params or {}, operation, Argument(**argument), release=release)


def path(operation: str, where: str, expected: str, **more: Any) -> Asked:
    return operation, {"path": where, **more}, expected


def address(operation: str, where: str, expected: str) -> Asked:
    return operation, {"address": where}, expected


A12 = f'{B}(allow file-read* (subpath "/a"))(deny file-read* (subpath "/a/s"))'
A16 = f'{B}(allow file-read* (subpath "/a"))(deny file-read-data (literal "/a/k"))'
A19 = f'{B}(deny file-write-setugid)(allow file* (subpath "/a"))'
A22 = '(version 1)(allow default)(deny file-write*)(allow file-write* (subpath "/a"))'
A24 = f'{B}(allow file-write* (require-all (subpath "/a") (require-not (subpath "/a/.git"))))'
A31 = f'{B}(allow file-read* file-write* (subpath (param "ROOT")))'
A36 = f'{B}(allow file-read* file-write* (subpath "{ROOT}"))(deny file-write* (subpath "{ROOT}/ro"))'
A37 = f'{B}(allow file-read* file-write* (subpath "{ROOT}"))(deny file-read* (literal "{ROOT}/k"))'
A41 = f"{B}(deny process-info*)(allow process-info* (target same-sandbox))"
A45 = f'{B}(allow mach-lookup (global-name "X"))'
A51 = f'{B}(allow network-outbound (remote ip "localhost:8080"))'
A59 = f'{B}(allow network-outbound (remote ip))(deny network-outbound (remote ip "localhost:*"))'

ROWS: list[tuple[int, str, list[Asked]]] = [
    (1, B, [path("file-read-data", "/private/etc/hosts", "deny")]),
    (2, "(version 1)", [path("file-read-data", "/a", "reject"), ("process-fork", {}, "reject")]),
    (
        3,
        '(version 1)(allow file-read* (subpath "/a"))(deny default)',
        [path("file-read-data", "/a/x", "allow")],
    ),
    (4, f'{B}(allow file-read* (subpath "/a/b"))', [path("file-read-data", "/a/b", "allow")]),
    (5, f'{B}(allow file-read* (subpath "/a/b"))', [path("file-read-data", "/a/bc", "deny")]),
    (6, f'{B}(allow file-read* (prefix "/a/b"))', [path("file-read-data", "/a/bc", "allow")]),
    (7, f'{B}(allow file-read* (literal "/a/b"))', [path("file-read-data", "/a/b/c", "deny")]),
    (8, f'{B}(allow file-read* (subpath "/a/b/"))', [path("file-read-data", "/a/b/c", "deny")]),
    (
        9,
        f'{B}(allow file-read* (subpath "/tmp/x"))',
        [
            path("file-read-data", "/tmp/x/f", "deny"),
            path("file-read-data", "/tmp/x/f", "deny", real="/private/tmp/x/f"),
        ],
    ),
    (10, f'{B}(allow file-read* (subpath "/private/tmp/x"))', [path("file-read-data", "/tmp/x/f", "allow")]),
    (11, f'{B}(allow file-read-metadata (literal "/tmp"))', [path("file-read-metadata", "/tmp", "allow")]),
    (12, A12, [path("file-read-data", "/a/s/k", "deny")]),
    (
        13,
        f'{B}(deny file-read* (subpath "/a/s"))(allow file-read* (subpath "/a"))',
        [path("file-read-data", "/a/s/k", "allow")],
    ),
    (
        14,
        f'{B}(deny file-read* (subpath "/a"))(allow file-read* (subpath "/a/b"))',
        [path("file-read-data", "/a/b/k", "allow")],
    ),
    (
        15,
        f'{B}(allow file-read-data (subpath "/a"))(deny file-read* (literal "/a/k"))',
        [path("file-read-data", "/a/k", "allow")],
    ),
    (16, A16, [path("file-read-data", "/a/k", "deny")]),
    (17, A16, [path("file-read-metadata", "/a/k", "allow")]),
    (
        18,
        f'{B}(allow file-write* (subpath "/a"))(deny file-write*)',
        [path("file-write-data", "/a/f", "allow")],
    ),
    (19, A19, [path("file-write-setugid", "/a/f", "deny")]),
    (20, A19, [path("file-write-data", "/a/f", "allow")]),
    (21, f"{B}(allow process-fork)(deny process-fork)", [("process-fork", {}, "deny")]),
    (22, A22, [path("file-write-create", "/b/f", "deny")]),
    (23, A22, [path("file-read-data", "/b/f", "allow")]),
    (24, A24, [path("file-write-data", "/a/.git/config", "deny")]),
    (25, A24, [path("file-write-data", "/a/src/x", "allow")]),
    (26, f'{B}(allow file-read* (literal "/a") (literal "/b"))', [path("file-read-data", "/b", "allow")]),
    (
        27,
        f'{B}(allow file-read-data (require-all (literal "/dev/null") (vnode-type CHARACTER-DEVICE)))',
        [
            path("file-read-metadata", "/dev/null", "deny"),
            path("file-read-data", "/dev/null", "allow", vnode="CHARACTER-DEVICE"),
            path("file-read-data", "/dev/null", "deny", vnode="REGULAR-FILE"),
            path("file-read-data", "/dev/null", "unknown"),
        ],
    ),
    (
        28,
        f'{B}(allow file-read-metadata (path-ancestors "/a/b/c"))',
        # That P itself is not among them: libsandbox's own definition leaves the last one out.
        [
            path("file-read-metadata", "/a/b", "allow"),
            path("file-read-metadata", "/", "allow"),
            path("file-read-metadata", "/a/b/c", "deny"),
        ],
    ),
    (
        29,
        f'{B}(allow file-read* (regex #"^/dev/ttys[0-9]+$"))',
        [path("file-read-data", "/dev/ttys001", "allow"), path("file-read-data", "/dev/ttys001x", "deny")],
    ),
    (30, f'{B}(allow file-read* (regex #"/secret"))', [path("file-read-data", "/a/secretary", "allow")]),
    (34, f'{B}(allow file-read* (subpath (param "NOPE")))', [path("file-read-data", "/a", "reject")]),
    (35, f'{B}(allow file-read* (subpath "/a\\"b"))', [path("file-read-data", '/a"b/c', "allow")]),
    (
        36,
        A36,
        [
            path("file-write-unlink", f"{ROOT}/ro/f", "deny"),
            path("file-write-create", f"{ROOT}/g", "allow"),
        ],
    ),
    (
        37,
        A37,
        [
            path("file-read-data", f"{ROOT}/k", "deny"),
            path("file-write-unlink", f"{ROOT}/k", "allow"),
            path("file-write-create", f"{ROOT}/j", "allow"),
            path("file-read-data", f"{ROOT}/j", "allow"),
        ],
    ),
    (38, f'{B}(allow process-exec (subpath "{ROOT}"))', [path("process-exec", "/bin/sh", "deny")]),
    (
        39,
        f"{B}(allow process-exec)",
        [
            path("process-exec", "/usr/bin/sudo", "deny", setuid=True),
            path("process-exec", "/usr/bin/sudo", "deny"),
            path("process-exec", "/a/tool", "deny", mode=0o4755),
            path("process-exec", "/a/tool", "allow"),
        ],
    ),
    (40, B, [("process-info-pidinfo", {"target": "others"}, "allow")]),
    (41, A41, [("process-info-pidinfo", {"target": "others"}, "deny")]),
    (42, A41, [("process-info-pidinfo", {"target": "children"}, "allow")]),
    (
        43,
        f"{B}(allow process-info-pidinfo)(deny process-info*)",
        [("process-info-pidinfo", {"target": "others"}, "allow")],
    ),
    (44, f"{B}(allow signal (target same-sandbox))", [("signal", {"target": "others"}, "deny")]),
    (
        45,
        A45,
        [("mach-lookup", {"name": "X"}, "allow"), ("mach-lookup", {"name": "X", "kind": "xpc"}, "deny")],
    ),
    (
        46,
        f'{B}(allow mach-lookup (xpc-service-name-prefix "com.a."))',
        [("mach-lookup", {"name": "com.a.B", "kind": "xpc"}, "allow")],
    ),
    (
        47,
        f'{B}(allow sysctl-read (sysctl-name-prefix "hw."))',
        [
            ("sysctl-read", {"name": "hw.ncpu"}, "allow"),
            ("sysctl-read", {"name": "kern.procargs2.1"}, "deny"),
        ],
    ),
    (
        48,
        f'{B}(allow sysctl-read)(deny sysctl-read (sysctl-name-regex "procargs"))',
        [
            ("sysctl-read", {"name": "kern.procargs2.1"}, "deny"),
            ("sysctl-read", {"name": "kern.ostype"}, "allow"),
            ("process-info-pidinfo", {"target": "others"}, "allow"),
        ],
    ),
    (
        49,
        f'{B}(allow iokit-open (iokit-user-client-class "AGXDeviceUserClient"))',
        [
            ("iokit-open-user-client", {"class_": "AGXDeviceUserClient"}, "allow"),
            ("iokit-open-user-client", {"class_": "IOHIDUserClient"}, "deny"),
            ("iokit-open", {"class_": "AGXDeviceUserClient"}, "allow"),
        ],
    ),
    (
        50,
        f'{B}(allow ipc-posix-shm (ipc-posix-name "/x"))',
        [
            ("ipc-posix-shm-read-data", {"name": "/x"}, "allow"),
            ("ipc-posix-shm-write-create", {"name": "/x"}, "allow"),
            ("ipc-posix-shm", {"name": "/x"}, "allow"),
            ("ipc-posix-shm-read-data", {"name": "/y"}, "deny"),
        ],
    ),
    (
        51,
        A51,
        [
            address("network-outbound", "127.0.0.1:8080", "allow"),
            address("network-outbound", "[::1]:8080", "allow"),
        ],
    ),
    (
        52,
        A51,
        [
            address("network-outbound", "127.0.0.1:8081", "deny"),
            address("network-outbound", "10.0.0.1:8080", "deny"),
        ],
    ),
    (53, A51, [address("network-outbound", "[::ffff:127.0.0.1]:8080", "deny")]),
    (
        54,
        f'{B}(allow network-outbound (remote ip "127.0.0.1:80"))',
        [address("network-outbound", "127.0.0.1:80", "reject")],
    ),
    (
        54,
        f'{B}(allow network-outbound (remote ip "example.com:443"))',
        [address("network-outbound", "example.com:443", "reject")],
    ),
    (
        55,
        f'{B}(allow network-outbound (remote ip "localhost:0"))',
        [address("network-outbound", "127.0.0.1:1", "reject")],
    ),
    (
        56,
        f'{B}(allow network-outbound (local ip "*:*"))',
        [address("network-outbound", "93.184.216.34:443", "allow")],
    ),
    (
        57,
        f'{B}(allow network-bind (local ip "*:9000"))',
        [address("network-bind", "*:9000", "allow"), address("network-inbound", "*:9000", "deny")],
    ),
    (
        58,
        f"{B}(allow network-inbound (local ip))",
        [address("network-bind", "*:9000", "allow"), address("network-inbound", "*:9000", "allow")],
    ),
    (
        59,
        A59,
        [
            address("network-outbound", "127.0.0.1:22", "deny"),
            address("network-outbound", "1.1.1.1:53", "allow"),
        ],
    ),
    (
        60,
        f'{B}(allow file-write* (literal "/private/tmp/s.sock"))',
        [path("network-outbound", "/private/tmp/s.sock", "deny")],
    ),
    (
        61,
        f'{B}(allow network-outbound (literal "/private/tmp/s.sock"))',
        [path("network-outbound", "/private/tmp/s.sock", "allow")],
    ),
    (
        62,
        f"{B}(allow network-outbound (remote ip))",
        [path("network-outbound", "/private/var/run/mDNSResponder", "deny")],
    ),
    (
        63,
        f"{B}(allow network-outbound)",
        [path("network-outbound", "/private/var/run/docker.sock", "allow")],
    ),
    (
        64,
        f'{B}(allow network-inbound (local ip "localhost:*"))',
        [
            address("network-inbound", "0.0.0.0:8080", "unknown"),
            address("network-inbound", "192.168.1.5:8080", "unknown"),
            address("network-inbound", "127.0.0.1:8080", "allow"),
        ],
    ),
    (69, f'{B}(allow file-raed* (subpath "/a"))', [path("file-read-data", "/a", "reject")]),
]


@pytest.mark.parametrize(
    ("text", "operation", "argument", "expected"),
    [
        pytest.param(text, *asked, id=f"{row}-{number}")
        for row, text, questions in ROWS
        for number, asked in enumerate(questions)
    ],
)
def test_the_matrix(text: str, operation: str, argument: dict[str, Any], expected: str) -> None:
    found = verdict(text, operation, **argument)
    assert found.decision == expected, found


class TestParameters:
    def test_row_31_a_path_is_a_parameter(self) -> None:
        found = verdict(A31, "file-write-create", {"ROOT": ROOT}, path=f"{ROOT}/etc/x")
        assert found.decision == "allow"

    def test_row_32_a_value_is_data(self) -> None:
        assert verdict(A31, "file-write-data", {"ROOT": HOSTILE}, path="/b").decision == "deny"
        assert verdict(A31, "file-write-data", {"ROOT": HOSTILE}, path=f"{HOSTILE}/f").decision == "allow"

    def test_row_33_formatted_into_the_text_it_is_not(self) -> None:
        text = f'{B}(allow file-read* file-write* (subpath "{HOSTILE}"))'
        assert verdict(text, "file-write-data", path="/b").decision == "reject"
        widened = (
            f'{B}(allow file-read* (subpath "/private/x"))(allow default)(deny file-read* (subpath "/y"))'
        )
        assert verdict(widened, "file-write-data", path="/b").decision == "allow"
