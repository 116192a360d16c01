"""A non-blocking socket that carries frames both ways, with bounded buffers."""

import array
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from worker.launcher.loop import Loop
from worker.launcher.mux import WRITE
from worker.launcher.protocol import MAX_FRAME, FrameBuffer, ProtocolError, decode_body, encode_frame

# One for all: what is read is copied out at once, and a new one each time would cost its pages.
_buffer = bytearray(64 * 1024)
_view = memoryview(_buffer)

MAX_WAITING = 32 * 1024 * 1024


class Channel:
    """Owns `sock`. `on_frame` gets each message; `on_closed` the reason, once, when the peer or an error
    ended it.

    A peer that does not read is dropped when MAX_WAITING bytes wait for it.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        on_frame: Callable[[dict[str, Any]], None],
        on_closed: Callable[[str], None],
        *,
        max_frame: int = MAX_FRAME,
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.fd = sock.fileno()
        self.closed = False
        self.frames = FrameBuffer(max_frame)
        self._loop = loop
        self.on_frame = on_frame
        self.on_closed = on_closed
        self._last = False
        self._parting = False
        self._deaf = False
        self._out: list[tuple[bytes, Sequence[int]]] = []
        self._waiting = 0
        loop.add(self.fd, self._ready)

    @property
    def idle(self) -> bool:
        """Whether all that was sent has gone out."""
        return not self._out

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send a frame, now or as soon as the peer reads. `fds` are passed along and closed here."""
        if self.closed or self._deaf:
            _close_all(fds)
            return
        data = encode_frame(message)
        self._waiting += len(data)
        self._out.append((data, fds))
        if len(self._out) == 1:
            self._flush()
        if self._waiting > MAX_WAITING:
            self._end("it does not read what it is sent")

    def send_last(self, message: dict[str, Any]) -> None:
        """Send a frame and close as soon as all is sent."""
        self._last = True
        self.send(message)

    def part(self) -> None:
        """Heed and say no more, but close only after the peer has: to write to a socket that is closed already is an
        error, with which the peer would lose whatever it has not read yet.
        """
        self.on_frame = _unheard
        self._deaf = self._parting = True
        if not self._out:
            self._end_of_speech()

    def _end_of_speech(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the peer is gone: reading tells

    def close(self) -> None:
        """Close without a call of `on_closed`."""
        if not self.closed:
            self.closed = True
            self._loop.remove(self.fd)
            self.sock.close()
            self._discard()

    def _discard(self) -> None:
        for _, fds in self._out:
            _close_all(fds)
        self._out.clear()
        self._waiting = 0

    def _end(self, reason: str) -> None:
        if not self.closed:
            self.close()
            self.on_closed(reason)

    def _ready(self, mask: int) -> None:
        if mask & WRITE:
            self._flush()
        if not self.closed and mask & ~WRITE:
            self._read()

    def _read(self) -> None:
        try:
            length = self.sock.recv_into(_buffer)
        except BlockingIOError:
            return
        except OSError as failure:
            self._end(str(failure))
            return
        if not length:
            self._end("end of stream")
            return
        self.replay(_view[:length])

    def replay(self, data: bytes | memoryview) -> None:
        """Take bytes as if they had been read just now."""
        self.frames.feed(data)
        try:
            while not self.closed and (body := self.frames.next()) is not None:
                self.on_frame(decode_body(body))
        except ProtocolError as failure:
            self._end(str(failure))

    def _flush(self) -> None:
        while self._out:
            data, fds = self._out[0]
            try:
                sent = self._send(data, fds)
            except BlockingIOError:
                break
            except OSError:
                # The peer is gone, but what it said before can still be read; the end follows that.
                self._deaf = True
                self._discard()
                break
            _close_all(fds)
            self._waiting -= sent
            if sent < len(data):
                self._out[0] = (data[sent:], ())
                break
            self._out.pop(0)
        if self._last and not self._out:
            self.close()
            return
        if self._parting and not self._out:
            self._end_of_speech()
        self._loop.want_write(self.fd, bool(self._out))

    def _send(self, data: bytes, fds: Sequence[int]) -> int:
        if not fds:
            return self.sock.send(data)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        return self.sock.sendmsg([data], [rights])


def _unheard(message: dict[str, Any]) -> None:
    """Nobody heeds it."""


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
