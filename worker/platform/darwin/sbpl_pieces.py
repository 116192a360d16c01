"""Reading many profiles that are mostly alike: what stood in one of them is not read again in the next.

Two profiles of ours share two thirds of their rules, and the lines of most others. Only success is told here:
whatever is odd is Rejected without a reason to show, and the reader of whole texts says what it is and where.
"""

import re
from functools import lru_cache

from .sbpl_reader import MAX_TEXT, Form, Node, Rejected, atom_of, tokens

# Longer ones are read each time, so that no text of a stranger stays for long.
_MAX_KEPT_PIECE = 4 * 1024
_MAX_KEPT_LINE = 512
_KEPT_PIECES = 512
_KEPT_LINES = 4096
# Together below what the reader takes.
_MAX_OPEN = 32
_MAX_NESTED = 16

_BETWEEN = re.compile(r"\n(?=\()")
_SETTLED = ("allow", "deny", "version", "debug")
_OPEN, _CLOSE = "(", ")"


class Piece:
    """Whole forms of a profile. `settled`: they mean the same in every profile, being rules without a parameter,
    and what they come to may be kept.

    Lines count from the first of the piece; those of what is inside a form may be wrong.
    """

    __slots__ = ("forms", "settled")

    def __init__(self, forms: tuple[Form, ...], *, settled: bool = False) -> None:
        self.forms = forms
        self.settled = settled


def pieces(text: str) -> list[tuple[int, Piece]]:
    """The pieces of a profile, each with the number of lines before it. Rejected for anything unusual.

    It is cut where a line begins with a parenthesis. When each part can be read by itself, none of the cuts
    was in a string or a form, so that together they are the text.
    """
    if len(text) > MAX_TEXT:
        raise Rejected("longer than what is read")
    found: list[tuple[int, Piece]] = []
    before = 0
    for part in _BETWEEN.split(text):
        found.append((before, _kept(part) if len(part) <= _MAX_KEPT_PIECE else Piece(_forms(part))))
        before += part.count("\n") + 1
    return found


@lru_cache(maxsize=_KEPT_PIECES)
def _kept(text: str) -> Piece:
    forms = _forms(text)
    return Piece(forms, settled="param" not in text and all(form.head in _SETTLED for form in forms))


def _forms(text: str) -> tuple[Form, ...]:
    top: list[Form] = []
    # The open forms, outermost first: where each begins and what it holds so far.
    stack: list[tuple[int, list[Node]]] = []
    for number, line in enumerate(text.split("\n"), 1):
        for item in _kept_line(line) if len(line) <= _MAX_KEPT_LINE else _line(line):
            if item == _OPEN:
                stack.append((number, []))
                continue
            if isinstance(item, str):
                if not stack or len(stack) > _MAX_OPEN:
                    raise Rejected("unbalanced, or too deep")
                begun, items = stack.pop()
                node: Node = Form(tuple(items), begun)
            else:
                begun, node = number, item
            if stack:
                stack[-1][1].append(node)
            elif isinstance(node, Form):
                top.append(node if node.line == begun else Form(node.items, begun))
            else:
                raise Rejected("outside of any form")
    if stack:
        raise Rejected("never closed")
    return tuple(top)


def _line(text: str) -> tuple[Node | str, ...]:
    """The line's forms and atoms, and the parentheses that it leaves open."""
    items: list[Node | str] = []
    opened: list[int] = []
    for kind, piece, _ in tokens(text):
        if kind == "open":
            if len(opened) == _MAX_NESTED:
                raise Rejected("too deep")
            opened.append(len(items))
            items.append(_OPEN)
        elif kind == "close" and opened:
            begun = opened.pop()
            # Between are nodes only: what was opened in there has been closed.
            inside: list[Node] = [one for one in items[begun + 1 :] if not isinstance(one, str)]
            items[begun:] = [Form(tuple(inside), 1)]
        else:
            items.append(_CLOSE if kind == "close" else atom_of(kind, piece, 1))
    return tuple(items)


@lru_cache(maxsize=_KEPT_LINES)
def _kept_line(text: str) -> tuple[Node | str, ...]:
    return _line(text)
