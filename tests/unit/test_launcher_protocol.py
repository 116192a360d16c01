"""Frames: what is cut out of any byte stream, and that no bytes crash a decoder."""

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.launcher.protocol import (
    HEADER_BYTES,
    FrameBuffer,
    ProtocolError,
    Refused,
    decode_body,
    encode_frame,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
MESSAGES = st.dictionaries(st.text(), VALUES, max_size=5)


def _all(frames: FrameBuffer) -> list[dict[str, Any]]:
    found = []
    while (body := frames.next()) is not None:
        found.append(decode_body(body))
    return found


@given(st.lists(MESSAGES, max_size=5), st.lists(st.integers(1, 50), min_size=1))
def test_frames_survive_any_cut(messages: list[dict[str, Any]], sizes: list[int]) -> None:
    data = b"".join(map(encode_frame, messages))
    frames = FrameBuffer()
    found: list[dict[str, Any]] = []
    at = 0
    while at < len(data):
        for size in sizes:
            frames.feed(data[at : at + size])
            at += size
            found += _all(frames)
    assert found == messages


@given(st.binary(max_size=300))
def test_no_bytes_crash_it(data: bytes) -> None:
    frames = FrameBuffer(max_frame=100)
    frames.feed(data)
    with contextlib.suppress(ProtocolError):
        while (body := frames.next()) is not None:
            with contextlib.suppress(ProtocolError):
                assert isinstance(decode_body(body), dict)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"7",
        b"null",
        b'"x"',
        b"{",
        b"\xff",
        b"{} {}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 100_000,
    ],
)
def test_bodies_that_are_no_object(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_body(body)


def test_a_giant_is_refused_before_it_came() -> None:
    frames = FrameBuffer(max_frame=10)
    frames.feed((11).to_bytes(HEADER_BYTES, "big"))
    with pytest.raises(ProtocolError, match="11 bytes"):
        frames.next()
    frames.max_frame = 11
    assert frames.next() is None


def test_refusals_keep_their_step() -> None:
    refused = Refused("start_failed", "exec: no", step="exec", errno=2)
    assert refused.to_wire() == {"code": "start_failed", "message": "exec: no", "step": "exec", "errno": 2}
