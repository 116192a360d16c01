"""A hundred thousand texts that are no profiles, or hardly: none crashes the evaluator or keeps it busy.

They are made from a number, so that a failure can be made again; the law in test_evaluate_laws.py looks for
fewer with more cunning. What hangs is ended by the time limit of every test.
"""

import random
from typing import Any

import pytest

from worker.platform.darwin import sbpl_operations as operations
from worker.platform.darwin.evaluate import Argument, CompiledProfile, Rejected, compile_profile
from worker.platform.darwin.sbpl_pieces import pieces
from worker.platform.darwin.sbpl_reader import read

from .test_evaluate import ROWS
from .test_evaluate_laws import DECISIONS, PIECES, SEEDS

ROUNDS, TEXTS_EACH = 20, 5_000
SHORT, WHOLE = SEEDS[: len(ROWS)], SEEDS[len(ROWS) :]
HARMLESS = (" ", "\n", "; (deny\n", "(allow process-fork)", "(debug deny)", '(if (param "P") (allow signal))')

OPERATIONS = (*sorted(operations.PARENTS), "default", "file-raed*", "")
TEXTS = (
    "",
    "/",
    "/a/b",
    "/tmp/../..",
    "127.0.0.1:80",
    "[::1]:1",
    "*:1",
    "X",
    "a\0b",
    "\ud800",
    "é",
    "/" + "a" * 2000,
)


def odd(randomly: random.Random) -> str:
    """A character, of any plane, or a piece of the language."""
    if randomly.random() < 0.3:
        return chr(randomly.choice((randomly.randrange(128), randomly.randrange(0x110000))))
    return randomly.choice(PIECES)


def text_of(randomly: random.Random) -> str:
    kind = randomly.random()
    if kind < 0.2:
        return "".join(odd(randomly) for _ in range(randomly.randrange(60)))
    text = randomly.choice(WHOLE if kind > 0.98 else SHORT)
    if kind < 0.4:
        text = text.replace("(", "\n(")
    for _ in range(randomly.randint(1, 4)):
        harmless = randomly.random() < 0.5
        at = randomly.randrange(len(text) + 1)
        piece, cut = (
            (randomly.choice(HARMLESS), 0) if harmless else (odd(randomly), randomly.choice((0, 1, 7, 40)))
        )
        text = text[:at] + piece + text[at + cut :]
    return text


def argument_of(randomly: random.Random) -> Argument:
    fields = ("path", "real", "vnode", "target", "name", "kind", "class_", "connection", "address", "protocol",
              "domain", "type", "process")  # fmt: skip
    chosen = randomly.sample(fields, randomly.randrange(4))
    given: dict[str, Any] = {field: randomly.choice(TEXTS) for field in chosen}
    return Argument(**given, number=randomly.choice((None, 0, -1, 1 << 70)))


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_hundred_thousand_texts(number: int) -> None:
    randomly = random.Random(number)
    compiled = 0
    for _ in range(TEXTS_EACH):
        text, asked, argument = text_of(randomly), randomly.choice(OPERATIONS), argument_of(randomly)
        params = {"P": randomly.choice(TEXTS)} if randomly.random() < 0.5 else {}
        profile = profile_of(text, params)
        if profile is not None:
            compiled += 1
            found = profile.decide(asked, argument)
            assert found.decision in DECISIONS[:3]
            assert found.reason
            assert found.line is None or text.split("\n")[found.line - 1], text
            assert isinstance(profile.warnings, tuple)
        same_when_read_in_pieces(text)
    assert compiled > TEXTS_EACH // 50, "texts that compile are among them"


def profile_of(text: str, params: dict[str, str]) -> CompiledProfile | None:
    """None for one that is refused, with a reason and a line of the text."""
    try:
        return compile_profile(text, params)
    except Rejected as failure:
        refused = failure
    assert str(refused)
    assert refused.line is None or 1 <= refused.line <= text.count("\n") + 1, text
    return None


def same_when_read_in_pieces(text: str) -> None:
    """What can be read in pieces is what the reader of whole texts sees."""
    try:
        found = pieces(text)
    except Rejected:
        return
    assert [(before + form.line, shape(form)) for before, piece in found for form in piece.forms] == [
        (form.line, shape(form)) for form in read(text)
    ]


def shape(node: object) -> object:
    """A node without the lines of what is in it."""
    items = getattr(node, "items", None)
    if items is None:
        return type(node), [getattr(node, name) for name in node.__struct_fields__ if name != "line"]  # type: ignore[attr-defined]
    return [shape(item) for item in items]
