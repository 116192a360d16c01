"""One fleet for the tests of a module; those that kill things make their own."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.acceptance.harness import Fleet

CONFIG = """
[node]
labels = {rack = "a"}
stats_interval_s = 0.5

[policy]
register_roots = ["{images}"]
read = ["{prefix}"]
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet(CONFIG) as made:
        await made.register("base")
        yield made


@pytest.fixture
def cid(request: pytest.FixtureRequest) -> str:
    """A container name of the test's own."""
    words = "".join(c if c.isalnum() else "-" for c in request.node.name.lower()).strip("-")
    return f"{words[:50].strip('-')}-0"
