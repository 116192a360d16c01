"""What all tests share: which nats-server they use, said once at the top of the report."""

import pytest

from tests.broker import BROKER, VARIABLE

# Fixtures that give a server, in each of its forms.
SERVERS = {"nats_server", "start_server", "fleet"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--broker", action="store_true", help=f"only tests that need a nats-server, which {VARIABLE} chooses"
    )


def pytest_report_header() -> str:
    return f"nats-server: {BROKER} ({VARIABLE})"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--broker"):
        return
    others = [item for item in items if SERVERS.isdisjoint(getattr(item, "fixturenames", ()))]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """`-n auto` with an address is one process: there is one server, and tests empty it."""
    return 0 if BROKER.form == "address" else None
