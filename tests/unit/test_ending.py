"""What a worker does when the launcher does not forget a run."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from schemas.errors import ContractError
from worker import ending
from worker.ending import Ender
from worker.errors import Conflict, NotFound, ResourceExhausted, Unavailable

FULL = ResourceExhausted("the end of the output is not written: the disk is full")


class Launcher:
    def __init__(self, *answers: ContractError | None) -> None:
        self.answers = list(answers)

    async def forget(self, cid: str, instance: str) -> None:
        answer = self.answers.pop(0)
        if answer is not None:
            raise answer


def ender(launcher: Launcher) -> Ender:
    return Ender(cast("Any", SimpleNamespace(launcher=launcher)))


@pytest.mark.parametrize("answer", [None, NotFound("none"), Unavailable("gone"), Conflict("its next run")])
async def test_nothing_more_is_to_be_done(answer: ContractError | None) -> None:
    launcher = Launcher(answer, answer)
    assert await ender(launcher).forget("a-0", "I") is None
    await ender(launcher)._let_go("a-0", "I")
    assert launcher.answers == []


async def test_a_full_disk_ends_nobody_who_only_tidies_up() -> None:
    assert await ender(Launcher(FULL)).forget("a-0", "I") is FULL


async def test_a_remove_waits_for_the_end_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "WRITTEN_POLL_S", 0)
    launcher = Launcher(FULL, FULL, None)
    await ender(launcher)._let_go("a-0", "I")
    assert launcher.answers == []
    monkeypatch.setattr(ending, "WRITTEN_TIMEOUT_S", -1)
    with pytest.raises(ResourceExhausted) as caught:
        await ender(Launcher(FULL))._let_go("a-0", "I")
    assert caught.value is FULL
