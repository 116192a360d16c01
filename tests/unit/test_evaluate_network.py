"""Addresses and sockets: what filters on either side match, and what no measurement settles."""

from typing import Any

import pytest

from worker.platform.darwin.evaluate import Argument, evaluate

B = "(version 1)(deny default)"


def allows(filter_: str, operation: str, **argument: Any) -> str:
    return evaluate(f"{B}(allow {operation} {filter_})", {}, operation, Argument(**argument)).decision


def test_a_denied_bind_tells_what_it_rests_on() -> None:
    """Reports on whether the port of a bind filter is enforced differ."""
    granted = f'{B}(allow network-bind network-inbound (local ip "*:80"))'
    for text, operation, doubted in (
        (granted, "network-bind", True),
        (granted, "network-inbound", False),
        (f"{B}(allow network-bind (local udp))", "network-bind", False),
        (B, "network-bind", False),
    ):
        found = evaluate(text, {}, operation, Argument(address="*:81"))
        assert found.decision == "deny"
        assert ("unconfirmed" in found.reason) is doubted, text
    assert "unconfirmed" not in evaluate(granted, {}, "network-bind", Argument(address="*:80")).reason


class TestNetwork:
    @pytest.mark.parametrize(
        ("filter_", "address", "protocol", "expected"),
        [
            ('remote ip "localhost:80"', "127.0.0.1:80", None, "allow"),
            ('remote ip "localhost:80"', "localhost:80", "udp", "allow"),
            ('remote ip "localhost:*"', "[::1]:80", None, "allow"),
            ('remote ip "localhost:*"', "[0:0:0:0:0:0:0:1]:80", None, "allow"),
            ('remote ip "localhost:*"', "0.0.0.0:80", None, "allow"),
            ('remote ip "localhost:*"', "[::]:80", None, "unknown"),
            ('remote ip "localhost:*"', "127.0.0.2:80", None, "deny"),
            ('remote ip "localhost:*"', "[::ffff:127.0.0.1]:80", None, "deny"),
            ('remote ip "localhost:*"', "192.168.1.5:80", None, "deny"),
            ('remote ip "localhost:*"', "example.com:80", None, "deny"),
            ('remote tcp "*:443"', "1.1.1.1:443", None, "allow"),
            ('remote tcp "*:443"', "1.1.1.1:443", "udp", "deny"),
            ('remote udp "*:*"', "1.1.1.1:443", "udp", "allow"),
            ("remote udp", "1.1.1.1:443", "tcp", "deny"),
            ("remote ip", "[2001:db8::1]:443", None, "allow"),
            ("remote ip4", "[2001:db8::1]:443", None, "deny"),
            ("remote tcp6", "[2001:db8::1]:443", None, "allow"),
            ("remote tcp4", "example.com:443", None, "unknown"),
            ("to ip", "1.1.1.1:443", None, "allow"),
            ("local ip", "1.1.1.1:443", None, "allow"),
            ('local ip "localhost:*"', "1.1.1.1:443", None, "allow"),
            ('local ip "*:80"', "1.1.1.1:443", None, "unknown"),
            ("remote unix-socket", "1.1.1.1:443", None, "deny"),
        ],
    )
    def test_outgoing(self, filter_: str, address: str, protocol: str | None, expected: str) -> None:
        assert allows(f"({filter_})", "network-outbound", address=address, protocol=protocol) == expected

    @pytest.mark.parametrize(
        ("filter_", "address", "expected"),
        [
            ('local ip "*:80"', "*:80", "allow"),
            ('local ip "*:80"', "0.0.0.0:80", "allow"),
            ('local ip "*:80"', "127.0.0.1:81", "deny"),
            ('local ip "localhost:80"', "127.0.0.1:80", "allow"),
            ('local ip "localhost:80"', "[::1]:80", "allow"),
            ('local ip "localhost:80"', "*:80", "unknown"),
            ('local ip "localhost:80"', "192.168.1.5:80", "unknown"),
            ('local ip "localhost:80"', "*:81", "deny"),
            ('local udp "localhost:80"', "*:80", "deny"),
            ("from ip", "*:80", "allow"),
            ("remote ip", "*:80", "unknown"),
        ],
    )
    @pytest.mark.parametrize("operation", ["network-bind", "network-inbound"])
    def test_incoming(self, operation: str, filter_: str, address: str, expected: str) -> None:
        assert allows(f"({filter_})", operation, address=address) == expected

    @pytest.mark.parametrize(
        ("filter_", "expected"),
        [
            ("remote unix-socket", "allow"),
            ("local unix-socket", "allow"),
            ('remote unix-socket (path-literal "/private/s")', "allow"),
            ('remote unix (subpath "/private")', "allow"),
            ('remote unix-socket (literal "/private/t")', "deny"),
            ('subpath "/private"', "allow"),
            ("remote ip", "deny"),
            ("vnode-type SOCKET", "unknown"),
        ],
    )
    def test_unix_sockets(self, filter_: str, expected: str) -> None:
        assert allows(f"({filter_})", "network-outbound", path="/private/s") == expected

    def test_a_request_that_names_nothing(self) -> None:
        for filter_ in ("remote ip", "remote unix-socket", 'literal "/a"', "local ip"):
            assert allows(f"({filter_})", "network-outbound") == "unknown"

    def test_a_kernel_control(self) -> None:
        assert allows('(control-name "com.apple.net")', "network-outbound", name="com.apple.net") == "allow"
        assert allows('(control-name "com.apple.net")', "network-outbound", address="1.1.1.1:1") == "deny"
        assert allows("(remote ip)", "network-outbound", name="com.apple.net") == "deny"

    def test_binding_answers_to_inbound(self) -> None:
        text = f'{B}(allow network-inbound (local ip "*:80"))(deny network-bind (local ip "*:80"))'
        assert evaluate(text, {}, "network-bind", Argument(address="*:80")).decision == "deny"
        assert evaluate(text, {}, "network-inbound", Argument(address="*:80")).decision == "allow"
