"""What all tests share: which nats-server they use, said once at the top of the report."""

import pytest

from tests.broker import BROKER, VARIABLE


def pytest_report_header() -> str:
    return f"nats-server: {BROKER} ({VARIABLE})"


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """`-n auto` with an address is one process: there is one server, and tests empty it."""
    return 0 if BROKER.form == "address" else None
