"""What a filter is, and what it is built of."""

from collections.abc import Callable

import msgspec

from .sbpl_reader import Number, Text
from .sbpl_request import Request

Check = Callable[[Request], bool | None]
Values = tuple[str, ...]


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """A test of a request, or several joined by `require-all`, `require-any` or `require-not`.

    `text` is canonical: parameters replaced, so that equal filters have equal texts. `mode` and `values`
    are those of a filter on a path (`literal`, `subpath`, `prefix`, `regex`), a name or an address.
    `applies` are the operations it may stand on, with what is below them; empty for every one. `size` and
    `depth` count the tests below; `pattern_bytes` goes against the compiler's limit.
    """

    name: str
    text: str
    check: Check
    applies: Values = ()
    mode: str = ""
    values: Values = ()
    parts: "tuple[Filter, ...]" = ()
    size: int = 1
    depth: int = 1
    pattern_bytes: int = 0
    doubt: str | None = None


class Symbol(msgspec.Struct, frozen=True):
    """A word that is a value of itself, as in `(target self)`."""

    name: str
    line: int


Given = Text | Number | Symbol | Filter
