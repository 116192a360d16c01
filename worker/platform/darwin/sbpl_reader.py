"""From the text of a Seatbelt profile to its forms: the reader of the evaluator.

The language is that of TinyScheme as libsandbox embeds it, less everything that no profile of ours needs:
block comments, quoted symbols, characters, vectors and real numbers are refused. Reading takes time linear
in the text and never nests deeper than `MAX_DEPTH`.
"""

import re
from collections.abc import Iterator

import msgspec

# Four times what a profile should have at most (sbpl_warnings.py).
MAX_TEXT = 256 * 1024
MAX_DEPTH = 64

_SPACE = " \\t\\n\\r\\f\\v"
_SKIPPED = re.compile(rf"(?:[{_SPACE}]++|;[^\n]*+)*+")
_TOKEN = re.compile(
    rf"""{_SKIPPED.pattern}
    (?:(?P<open>\()
    | (?P<close>\))
    | (?P<raw>\#"[^"\\]*+(?:\\.[^"\\]*+)*+")
    | (?P<text>"[^"\\]*+(?:\\.[^"\\]*+)*+")
    | (?P<word>(?!\#")[^{_SPACE}()";]++)
    | (?P<end>\Z))""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z%][A-Za-z0-9*_?!-]*")
_DECIMAL = re.compile(r"[+-]?[0-9]{1,18}")
_RADIX = re.compile(r"#(?:b[01]{1,62}|o[0-7]{1,20}|d[0-9]{1,18}|x[0-9A-Fa-f]{1,15})")
_BASES = {"b": 2, "o": 8, "d": 10, "x": 16}


class Rejected(Exception):
    """The compiler would refuse this profile, so that nothing runs; `line` counts from 1."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


class Word(msgspec.Struct, frozen=True):
    """A symbol: the name of an operation, a filter, a constant."""

    name: str
    line: int


class Text(msgspec.Struct, frozen=True):
    """A string; `raw` when written `#"…"`, in which a backslash is an ordinary character."""

    value: str
    line: int
    raw: bool = False


class Number(msgspec.Struct, frozen=True):
    value: int
    line: int
    written: str


class Bool(msgspec.Struct, frozen=True):
    value: bool
    line: int


class Form(msgspec.Struct, frozen=True):
    """A list; `line` is that of its opening parenthesis."""

    items: "tuple[Node, ...]"
    line: int

    @property
    def head(self) -> str:
        """The name that it begins with, or nothing."""
        first = self.items[0] if self.items else None
        return first.name if isinstance(first, Word) else ""


Node = Word | Text | Number | Bool | Form


def read(text: str) -> tuple[Form, ...]:
    """The forms of a profile in their order. Rejected for text that is none."""
    if len(text) > MAX_TEXT:
        raise Rejected(f"the profile has {len(text)} characters; {MAX_TEXT} are the most that are read")
    top: list[Form] = []
    # The open forms, outermost first: where each begins and what it holds so far.
    stack: list[tuple[int, list[Node]]] = []
    line = 1
    for kind, piece, line in tokens(text):
        if kind == "open":
            if len(stack) == MAX_DEPTH:
                raise Rejected(f"forms nest more than {MAX_DEPTH} deep", line)
            stack.append((line, []))
        elif kind == "close":
            if not stack:
                raise Rejected("a closing parenthesis without an opening one", line)
            begun, items = stack.pop()
            form = Form(tuple(items), begun)
            if stack:
                stack[-1][1].append(form)
            else:
                top.append(form)
        else:
            atom = atom_of(kind, piece, line)
            if not stack:
                raise Rejected(f"{shown(atom)} stands outside of any form", line)
            stack[-1][1].append(atom)
    if stack:
        raise Rejected("a parenthesis that opens here is never closed", stack[-1][0])
    return tuple(top)


def shown(node: Node) -> str:
    """A form or an atom as one line of text."""
    match node:
        case Word():
            return node.name
        case Text():
            return raw_quoted(node.value) if node.raw else quoted(node.value)
        case Number():
            return node.written
        case Bool():
            return "#t" if node.value else "#f"
    return f"({' '.join(shown(one) for one in node.items)})"


def quoted(value: str) -> str:
    """A string as the language writes it; a newline in it stays one line."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("\n", "\\n").replace("\r", "\\r") + '"'


def raw_quoted(value: str) -> str:
    escaped = value.replace('"', '\\"')
    return '#"' + escaped.replace("\n", "\\n").replace("\r", "\\r") + '"'


def tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """Kind, text and line of each token; space and comments left out."""
    if "\0" in text:
        # The compiler takes a C string: it would see the part before it only.
        raise Rejected("a NUL character ends the text here", text.count("\n", 0, text.index("\0")) + 1)
    position, line = 0, 1
    for match in _TOKEN.finditer(text):
        if match.start() != position:
            skipped = _SKIPPED.match(text, position)
            begun = skipped.end() if skipped else position
            raise Rejected("a string that begins here never ends", line + text.count("\n", position, begun))
        kind = str(match.lastgroup)
        start, begun, position = position, match.start(kind), match.end()
        if begun > start:
            line += text.count("\n", start, begun)
        if kind == "end":
            return
        yield kind, match[kind], line
        if kind in ("text", "raw"):
            line += text.count("\n", begun, position)


def atom_of(kind: str, piece: str, line: int) -> Node:
    if kind == "text":
        return Text(_unescaped(piece[1:-1], line), line)
    if kind == "raw":
        return Text(piece[2:-1].replace('\\"', '"'), line, raw=True)
    if _NAME.fullmatch(piece):
        return Word(piece, line)
    if piece in ("#t", "#f"):
        return Bool(piece == "#t", line)
    if _DECIMAL.fullmatch(piece):
        return Number(int(piece), line, piece)
    if _RADIX.fullmatch(piece):
        return Number(int(piece[2:], _BASES[piece[1]]), line, piece)
    if piece[0] in "#'`,|[]{}+-.0123456789" or not piece.isprintable():
        raise Rejected(f"{piece[:40]!r} is nothing that profiles are written with", line)
    return Word(piece, line)


def _unescaped(body: str, line: int) -> str:
    r"""Only `\\` and `\"` are known to be read alike on all releases."""

    def replaced(match: re.Match[str]) -> str:
        if match[1] not in '\\"':
            raise Rejected(f"what the escape \\{match[1]!s} means in a string is unconfirmed", line)
        return match[1]

    return _ESCAPE.sub(replaced, body) if "\\" in body else body
