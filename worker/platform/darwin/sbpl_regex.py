"""The regular expressions of Seatbelt filters, matched in time linear in the text.

Expressions come from outside, so that a backtracking engine is out of the question: this one numbers the
characters of an expression (Glushkov's construction) and keeps the set of those that the text may have
reached as the bits of an integer. It works on UTF-8 bytes, as the kernel does.

The syntax is what shipped profiles use, close to POSIX ERE: `. [] [^] () | * + ? ^ $` and a backslash before
punctuation. Whether `\\d`, `{2,3}` or `[[:alpha:]]` mean anything is unconfirmed: such an expression
compiles, and whether it matches is unknown.
"""

from functools import lru_cache

from .sbpl_reader import Rejected

MAX_PATTERN_BYTES = 1024
_MAX_GROUPS = 32
_MAX_CACHED_STEPS = 512

# Two symbols beyond the bytes: where the text begins and where it ends.
_BEGIN, _END = 256, 257
_ANY = frozenset(range(256))


class _Unconfirmed(Exception):
    """The expression uses syntax whose meaning no source confirms."""


class Regex:
    """An expression, searched for anywhere in a text unless it is anchored."""

    def __init__(self, pattern: str) -> None:
        """Rejected for an expression that is none, or longer than `MAX_PATTERN_BYTES`."""
        self.pattern = pattern
        data = pattern.encode("utf-8", "surrogatepass")
        if len(data) > MAX_PATTERN_BYTES:
            raise Rejected(f"a regular expression of {len(data)} bytes; {MAX_PATTERN_BYTES} are the most")
        self.unconfirmed: str | None = None
        try:
            self._automaton: _Automaton | None = _Parser(data).automaton()
        except _Unconfirmed as reason:
            self.unconfirmed, self._automaton = str(reason), None
        self._steps: dict[tuple[int, int], int] = {}

    def search(self, text: str) -> bool | None:
        """None where it is unknown."""
        automaton = self._automaton
        if automaton is None:
            return None
        if automaton.nullable:
            return True
        state, steps, last = 0, self._steps, automaton.last
        for symbol in (_BEGIN, *text.encode("utf-8", "surrogatepass"), _END):
            key = (state, symbol)
            reached = steps.get(key)
            if reached is None:
                if len(steps) >= _MAX_CACHED_STEPS:
                    steps.clear()
                reached = steps[key] = automaton.step(state, symbol)
            if reached & last:
                return True
            if not reached and automaton.anchored:
                return False
            state = reached
        return False


@lru_cache(maxsize=128)
def compiled(pattern: str) -> Regex:
    return Regex(pattern)


class _Automaton:
    """Positions of an expression as bits: which may come first, which follow each, which may be the last."""

    def __init__(self) -> None:
        self.accepts: list[frozenset[int]] = []
        self.follow: list[int] = []
        self.first = self.last = 0
        self.nullable = False
        self.anchored = False  # only at the beginning of the text
        self._by_symbol: dict[int, int] = {}

    def step(self, state: int, symbol: int) -> int:
        reached = (self.first | self._after(state)) & self._takes(symbol)
        while symbol in (_BEGIN, _END):
            # An anchor takes no room: those that follow it hold as well.
            more = reached | self._after(reached) & self._takes(symbol)
            if more == reached:
                break
            reached = more
        return reached

    def _after(self, state: int) -> int:
        reachable = 0
        for position in _bits(state):
            reachable |= self.follow[position]
        return reachable

    def _takes(self, symbol: int) -> int:
        mask = self._by_symbol.get(symbol)
        if mask is None:
            mask = self._by_symbol[symbol] = sum(
                1 << position for position, accepted in enumerate(self.accepts) if symbol in accepted
            )
        return mask


class _Part:
    """A piece of an expression: whether it may match nothing, and its first and last positions."""

    __slots__ = ("first", "last", "nullable")

    def __init__(self, nullable: bool, first: int = 0, last: int = 0) -> None:
        self.nullable, self.first, self.last = nullable, first, last


class _Parser:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._groups = 0
        self._automaton = _Automaton()

    def automaton(self) -> _Automaton:
        whole = self._alternatives()
        if self._at < len(self._data):
            raise Rejected("a ) without a ( in a regular expression")
        result = self._automaton
        result.nullable, result.first, result.last = whole.nullable, whole.first, whole.last
        begin = frozenset({_BEGIN})
        result.anchored = all(result.accepts[position] == begin for position in _bits(result.first))
        return result

    def _peek(self) -> str:
        return chr(self._data[self._at]) if self._at < len(self._data) else ""

    def _alternatives(self) -> _Part:
        part = self._sequence()
        while self._peek() == "|":
            self._at += 1
            other = self._sequence()
            part = _Part(part.nullable or other.nullable, part.first | other.first, part.last | other.last)
        return part

    def _sequence(self) -> _Part:
        part = _Part(nullable=True)
        while self._peek() not in ("", "|", ")"):
            other = self._repeated()
            self._join(part.last, other.first)
            part = _Part(
                part.nullable and other.nullable,
                part.first | other.first if part.nullable else part.first,
                part.last | other.last if other.nullable else other.last,
            )
        return part

    def _join(self, earlier: int, later: int) -> None:
        follow = self._automaton.follow
        for position in _bits(earlier):
            follow[position] |= later

    def _repeated(self) -> _Part:
        part = self._single()
        sign = self._peek()
        if sign == "{":
            raise _Unconfirmed("a { in a regular expression")
        if sign and sign in "*+?":
            self._at += 1
            if sign != "?":
                self._join(part.last, part.first)
            part = _Part(part.nullable or sign != "+", part.first, part.last)
            if self._peek() and self._peek() in "*+?{":
                raise _Unconfirmed("one repetition on another in a regular expression")
        return part

    def _single(self) -> _Part:
        sign = self._peek()
        self._at += 1
        if sign in "*+?":
            raise Rejected(f"a {sign} with nothing to repeat in a regular expression")
        if sign == "{":
            raise _Unconfirmed("a { in a regular expression")
        if sign == "(":
            return self._group()
        if sign == "[":
            return self._position(self._brackets())
        if sign == ".":
            return self._position(_ANY)
        if sign == "^":
            return self._position(frozenset({_BEGIN}))
        if sign == "$":
            return self._position(frozenset({_END}))
        if sign == "\\":
            return self._position(frozenset({self._escaped()}))
        return self._position(frozenset({ord(sign)}))

    def _position(self, accepted: frozenset[int]) -> _Part:
        automaton = self._automaton
        automaton.accepts.append(accepted)
        automaton.follow.append(0)
        bit = 1 << (len(automaton.accepts) - 1)
        return _Part(False, bit, bit)

    def _group(self) -> _Part:
        self._groups += 1
        if self._groups > _MAX_GROUPS:
            raise Rejected(f"groups of a regular expression nest more than {_MAX_GROUPS} deep")
        if self._peek() == "?":
            raise _Unconfirmed("a (? in a regular expression")
        part = self._alternatives()
        if self._peek() != ")":
            raise Rejected("a ( that is never closed in a regular expression")
        self._at += 1
        self._groups -= 1
        return part

    def _escaped(self) -> int:
        if self._at >= len(self._data):
            raise Rejected("a regular expression ends with a backslash")
        byte = self._data[self._at]
        self._at += 1
        if chr(byte).isalnum():
            raise _Unconfirmed(f"\\{chr(byte)} in a regular expression")
        return byte

    def _brackets(self) -> frozenset[int]:
        negated = self._peek() == "^"
        self._at += negated
        accepted: set[int] = set()
        begun = self._at
        while True:
            if self._at >= len(self._data):
                raise Rejected("a [ that is never closed in a regular expression")
            if self._peek() == "]" and self._at > begun:
                self._at += 1
                break
            low = self._in_brackets()
            high = low
            if self._peek() == "-" and self._data[self._at + 1 : self._at + 2] not in (b"", b"]"):
                self._at += 1
                high = self._in_brackets()
                if high < low:
                    raise Rejected(f"the range {chr(low)}-{chr(high)} runs backwards in a regular expression")
            accepted.update(range(low, high + 1))
        return _ANY - accepted if negated else frozenset(accepted)

    def _in_brackets(self) -> int:
        if self._data[self._at : self._at + 2] in (b"[:", b"[=", b"[."):
            raise _Unconfirmed("a named class in a regular expression")
        byte = self._data[self._at]
        self._at += 1
        if byte > 127:
            raise _Unconfirmed("a character beyond ASCII in the brackets of a regular expression")
        return self._escaped() if byte == ord("\\") else byte


def _bits(mask: int) -> list[int]:
    """The positions of the bits that are set."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found
