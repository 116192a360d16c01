"""The few colours, and when they are used. No rich here: help and errors must not wait for it."""

import os
import re
from typing import Literal, TextIO

Style = Literal["", "strong", "dim", "name", "good", "warn", "bad"]

ANSI: dict[Style, str] = {
    "": "",
    "strong": "1",
    "dim": "2",
    "name": "36",
    "good": "32",
    "warn": "33",
    "bad": "31",
}

# Controls and the Unicode marks that reorder a line: text from afar must not steer a terminal.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def paint(text: str, style: Style, colour: bool) -> str:
    code = ANSI[style]
    return f"\x1b[{code}m{text}\x1b[0m" if colour and code and text else text


def clean(text: str) -> str:
    """One printable line: control characters become spaces or a replacement mark."""
    return _CONTROLS.sub(lambda found: " " if found[0] in "\t\n\r\u2028\u2029" else "\ufffd", text)


def colours(stream: TextIO) -> bool:
    """Whether a stream gets colours: a terminal, and neither NO_COLOR nor TERM=dumb."""
    if os.environ.get("NO_COLOR"):
        return False
    return is_terminal(stream) and os.environ.get("TERM") != "dumb"


def is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:
        return False  # a closed stream
