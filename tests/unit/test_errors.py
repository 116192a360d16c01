import errno
import os

import pytest

from worker.errors import Internal, ResourceExhausted, unforeseen


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_bug(number: int) -> None:
    told = unforeseen("tag_image", OSError(number, os.strerror(number), "/data/images/index.json"))
    assert isinstance(told, ResourceExhausted)
    assert told.message == "tag_image failed: the disk is full (/data/images/index.json)"


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "disk error"), KeyError("x")])
def test_everything_else_is(failure: Exception) -> None:
    assert isinstance(unforeseen("stop", failure), Internal)
