"""The switch between servers for tests."""

import pytest

from tests.broker import Address, Broker, from_environment, parse


@pytest.mark.parametrize(
    ("value", "broker"),
    [
        ("", Broker("embedded")),
        ("embedded", Broker("embedded")),
        ("testcontainers", Broker("testcontainers")),
        ("nats://127.0.0.1:4222", Broker("address", "nats://127.0.0.1:4222")),
        ("tls://me:secret@nats.example.net:4222", Broker("address", "tls://me:secret@nats.example.net:4222")),
        ("nats://[::1]:4222/", Broker("address", "nats://[::1]:4222/")),
    ],
)
def test_the_three_forms(value: str, broker: Broker) -> None:
    assert parse(value) == broker
    assert "secret" not in str(broker)


@pytest.mark.parametrize(
    "value",
    ["docker", "127.0.0.1:4222", "nats://127.0.0.1", "http://me:secret@127.0.0.1:4222", "nats://h:1/x"],
)
def test_anything_else_is_an_error(value: str) -> None:
    with pytest.raises(pytest.UsageError, match="SANDFLEET_TEST_NATS") as failure:
        from_environment({"SANDFLEET_TEST_NATS": value})
    assert "secret" not in str(failure.value)


def test_a_server_elsewhere_is_not_at_127_0_0_1() -> None:
    assert Address("test", parse("nats://localhost:4223")).port == 4223
    with pytest.raises(pytest.skip.Exception, match=r"127\.0\.0\.1"):
        _ = Address("test", parse("nats://nats.example.net:4222")).port
