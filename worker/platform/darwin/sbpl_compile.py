"""From the forms of a profile to its rules: the interpreter of the evaluator.

It runs the part of Scheme that profiles of ours use (`define` of a constant, `if` and `when`, `param`,
`string-append`) and refuses the rest, loudly: a helper procedure or an import would bring in rules that
nobody here can see.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

import msgspec

from . import sbpl_filters as filters
from . import sbpl_operations as operations
from .sbpl_modifiers import ERRNOS, MODIFIERS
from .sbpl_pieces import Piece, pieces
from .sbpl_reader import Bool, Form, Node, Number, Rejected, Text, Word, read, shown
from .sbpl_values import Filter, Given, Symbol
from .sbpl_words import SIGNALS

# The compiler's limit on the patterns of one rule (NixOS/nix#4119, #12570).
MAX_PATTERN_BYTES = 65535
# Bounds of our own, on what a text may make of itself: tests in all rules, characters of strings and filters,
# bytes of regular expressions.
_MAX_FILTERS = 50_000
_MAX_MADE = 4 * 1024 * 1024
_MAX_EXPRESSION_BYTES = 16 * 1024
_KEPT_PIECES = 1024
_KEPT_FILTERS = 4096
_MAX_KEPT_TEXT = 256

Action = Literal["allow", "deny"]
Value = Text | Number | Bool | Filter | Symbol


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One action on one operation; a form that names several makes as many.

    `operation` is canonical, `written` as in the text. `filters` are joined by OR. `form` numbers the form
    that it comes from, `source` is that, and `line` the first of its lines in the profile.
    """

    action: Action
    operation: str
    written: str
    filters: tuple[Filter, ...]
    modifiers: tuple[str, ...]
    form: int
    line: int
    source: Form

    @property
    def text(self) -> str:
        """The whole form on one line."""
        return shown(self.source)


def rules(text: str, params: Mapping[str, str], *, release: int | None) -> tuple[Rule, ...]:
    """Rejected where the compiler of that release, or of any when None, refuses."""
    try:
        return _Interpreter(params, release).run(pieces(text))
    except Rejected:
        # Read as a whole, with every line's number.
        return _Interpreter(params, release).run([(0, Piece(read(text)))])


class _Made(NamedTuple):
    """The rules of some forms, their lines and numbers counted from the first; and what goes against the bounds."""

    rules: tuple[Rule, ...]
    forms: int
    filters: int
    characters: int
    expression_bytes: int


@lru_cache(maxsize=_KEPT_PIECES)
def _made_of(piece: Piece, release: int | None) -> _Made:
    """Of a settled piece; two thirds of a profile of ours are the same in the next one."""
    return _Interpreter({}, release).made(piece.forms)


class _Interpreter:
    def __init__(self, params: Mapping[str, str], release: int | None) -> None:
        self._params = params
        self._release = release
        self._constants: dict[str, Value] = {}
        self._rules: list[Rule] = []
        self._before = 0  # lines before the piece that is run
        self._forms = self._filters = self._characters = self._expression_bytes = 0

    def run(self, found: list[tuple[int, Piece]]) -> tuple[Rule, ...]:
        first = next(((before, piece.forms[0]) for before, piece in found if piece.forms), None)
        if first is None or first[1].head != "version":
            raise Rejected(
                "a profile begins with (version 1)", 1 if first is None else first[0] + first[1].line
            )
        for self._before, piece in found:
            self._piece(piece)
        if not any(rule.operation == "default" for rule in self._rules):
            raise Rejected("the profile has no rule on default")
        return tuple(self._rules)

    def made(self, forms: tuple[Form, ...]) -> _Made:
        for form in forms:
            self._directive(form)
        counts = self._forms, self._filters, self._characters, self._expression_bytes
        return _Made(tuple(self._rules), *counts)

    def _piece(self, piece: Piece) -> None:
        if piece.settled and not self._constants:
            made = _made_of(piece, self._release)
            if self._fits(made):
                self._take(made)
                return
        for form in piece.forms:
            self._directive(form)

    def _fits(self, made: _Made) -> bool:
        """Whether no bound is passed by it; else running its forms tells by which."""
        return (
            self._filters + made.filters <= _MAX_FILTERS
            and self._characters + made.characters <= _MAX_MADE
            and self._expression_bytes + made.expression_bytes <= _MAX_EXPRESSION_BYTES
        )

    def _take(self, made: _Made) -> None:
        for rule in made.rules:
            self._rules.append(
                Rule(
                    action=rule.action,
                    operation=rule.operation,
                    written=rule.written,
                    filters=rule.filters,
                    modifiers=rule.modifiers,
                    form=self._forms + rule.form,
                    line=self._before + rule.line,
                    source=rule.source,
                )
            )
        self._forms += made.forms
        self._filters += made.filters
        self._characters += made.characters
        self._expression_bytes += made.expression_bytes

    # -- forms that act

    def _directive(self, form: Form) -> None:
        match form.head:
            case "allow" | "deny":
                self._action(form)
            case "version":
                self._version(form)
            case "define":
                self._define(form)
            case "if" | "when":
                for chosen in self._chosen(form):
                    if not isinstance(chosen, Form):
                        raise Rejected(f"{shown(chosen)} stands where a rule is expected", chosen.line)
                    self._directive(chosen)
            case "debug":
                pass  # a macro that compiles to nothing
            case "import":
                raise Rejected("import brings in rules that cannot be seen here", form.line)
            case "":
                raise Rejected(f"{_short(form)} does not begin with a name", form.line)
            case name:
                raise Rejected(f"{name} is not among the forms that profiles may use here", form.line)

    def _version(self, form: Form) -> None:
        arguments = form.items[1:]
        if len(arguments) != 1 or not isinstance(arguments[0], Number):
            raise Rejected("version expects a number", form.line)
        if arguments[0].value != 1:
            raise Rejected(f"version {arguments[0].value} is not 1, the only one that is known", form.line)

    def _define(self, form: Form) -> None:
        if len(form.items) != 3 or not isinstance(form.items[1], Word):
            raise Rejected("define takes the name of a constant and its value", form.line)
        name = form.items[1].name
        if filters.known(name) or operations.known(name) or name in _RESERVED:
            raise Rejected(f"{name} is a name of the language and cannot be defined anew", form.line)
        self._constants[name] = self._value(form.items[2])

    def _chosen(self, form: Form) -> tuple[Node, ...]:
        """The forms of the branch that is taken; only #f is false."""
        if form.head == "if" and len(form.items) not in (3, 4):
            raise Rejected("if takes a condition and one or two forms", form.line)
        if len(form.items) < 3:
            raise Rejected("when takes a condition and forms", form.line)
        condition = self._value(form.items[1])
        true = not (isinstance(condition, Bool) and not condition.value)
        if form.head == "when":
            return form.items[2:] if true else ()
        return form.items[2:3] if true else form.items[3:]

    def _action(self, form: Form) -> None:
        action: Action = "allow" if form.head == "allow" else "deny"
        named: list[str] = []
        tests: list[Filter] = []
        modifiers: list[str] = []
        for item in form.items[1:]:
            if isinstance(item, Word) and operations.known(item.name):
                named.append(self._released(item))
            elif isinstance(item, Form) and item.head == "with":
                modifiers.append(self._modifier(action, item))
            else:
                value = self._value(item, unknown="operation")
                if not isinstance(value, Filter):
                    raise Rejected(f"{_short(item)} is neither an operation nor a filter", item.line)
                tests.append(value)
        if not named:
            raise Rejected(f"{action} names no operation", form.line)
        self._count(len(named), tests, form)
        self._check_fit(form, [operations.in_rule(name) for name in named], tests, modifiers)
        for name in named:
            self._rules.append(
                Rule(
                    action=action,
                    operation=operations.in_rule(name),
                    written=name,
                    filters=tuple(tests),
                    modifiers=tuple(modifiers),
                    form=self._forms,
                    line=self._before + form.line,
                    source=form,
                )
            )
        self._forms += 1

    def _released(self, word: Word) -> str:
        since = operations.SINCE.get(word.name)
        if since is not None and self._release is not None and self._release < since:
            raise Rejected(f"{word.name} is unknown before macOS {since}", word.line)
        return word.name

    def _count(self, named: int, tests: list[Filter], form: Form) -> None:
        pattern_bytes = sum(test.pattern_bytes for test in tests)
        if pattern_bytes > MAX_PATTERN_BYTES:
            raise Rejected(
                f"pattern serialization length {pattern_bytes} exceeds maximum ({MAX_PATTERN_BYTES})",
                form.line,
            )
        self._filters += named * (1 + sum(test.size for test in tests))
        if self._filters > _MAX_FILTERS:
            raise Rejected(f"the profile has more than {_MAX_FILTERS} filters", form.line)

    def _check_fit(self, form: Form, named: list[str], tests: list[Filter], modifiers: list[str]) -> None:
        # Where a filter without parts applies, all of its name do.
        kinds = {test.name if not test.parts else id(test): test for test in reversed(tests)}
        for operation in named:
            for test in reversed(kinds.values()):
                wrong = filters.misplaced(test, operation)
                if wrong:
                    raise Rejected(f"the filter {wrong} does not apply to {operation}", form.line)
            for modifier in modifiers:
                only = MODIFIERS[modifier].operation
                if only is not None and not operations.covers(only, operation):
                    raise Rejected(f"the modifier {modifier} does not apply to {operation}", form.line)

    def _modifier(self, action: Action, form: Form) -> str:
        name = form.items[1] if len(form.items) > 1 else None
        if not isinstance(name, Word) or name.name not in MODIFIERS:
            raise Rejected(f"{_short(form)} is no modifier", form.line)
        modifier = MODIFIERS[name.name]
        if modifier.action not in (None, action):
            raise Rejected(f"the modifier {name.name} does not apply to {action}", form.line)
        arguments = form.items[2:]
        given = arguments[0] if len(arguments) == 1 else None
        match modifier.takes:
            case "nothing":
                fits = not arguments
            case "signal":
                fits = isinstance(given, Word) and given.name in SIGNALS
            case "errno":
                fits = isinstance(given, Word) and given.name in ERRNOS
            case "text":
                fits = given is not None and isinstance(self._value(given), Text)
        if not fits:
            raise Rejected(f"the modifier {name.name} does not take that", form.line)
        return name.name

    # -- expressions

    def _value(self, node: Node, *, unknown: str = "name") -> Value:
        if isinstance(node, Word):
            if node.name in self._constants:
                return self._constants[node.name]
            if filters.known(node.name):
                raise Rejected(f"the filter {node.name} stands without its parentheses", node.line)
            raise Rejected(f"there is no {unknown} {node.name}", node.line)
        if not isinstance(node, Form):
            return node
        match node.head:
            case "param":
                return self._param(node)
            case "string-append":
                return self._append(node)
            case "if":
                chosen = self._chosen(node)
                return self._value(chosen[0]) if chosen else Bool(False, node.line)
            case name if filters.known(name):
                return self._filter(name, node)
            case "":
                raise Rejected(f"{_short(node)} does not begin with a name", node.line)
            case name:
                raise Rejected(f"there is no filter {name}", node.line)

    def _filter(self, name: str, form: Form) -> Filter:
        given = tuple([self._argument(item) for item in form.items[1:]])
        if len(given) == 1 and isinstance(given[0], Text) and len(given[0].value) <= _MAX_KEPT_TEXT:
            built = _built(name, given[0], form.line)
        else:
            built = filters.build(name, given, form.line)
        self._make(len(built.text) + built.pattern_bytes, form)
        if built.mode == "regex":
            self._expression_bytes += built.pattern_bytes
            if self._expression_bytes > _MAX_EXPRESSION_BYTES:
                raise Rejected(f"more than {_MAX_EXPRESSION_BYTES} bytes of regular expressions", form.line)
        return built

    def _make(self, characters: int, form: Form) -> None:
        self._characters += characters
        if self._characters > _MAX_MADE:
            raise Rejected(f"strings and filters of more than {_MAX_MADE} characters in all", form.line)

    def _argument(self, node: Node) -> Given:
        """A word that no constant has stands for itself; the filter says whether it knows it."""
        if isinstance(node, Word) and node.name not in self._constants:
            return Symbol(node.name, node.line)
        value = self._value(node)
        if isinstance(value, Bool):
            unset = isinstance(node, Form) and node.head == "param"
            raise Rejected(
                f"{_short(node)} is not set" if unset else f"{_short(node)} is no argument of a filter",
                node.line,
            )
        return value

    def _param(self, form: Form) -> Value:
        key = form.items[1] if len(form.items) == 2 else None
        if not isinstance(key, Text):
            raise Rejected("param takes the name of a parameter, a string", form.line)
        value = self._params.get(key.value)
        if value is None:
            return Bool(False, form.line)
        if "\0" in value:
            raise Rejected(f"the value of the parameter {key.value} holds a NUL character", form.line)
        return Text(value, form.line)

    def _append(self, form: Form) -> Text:
        pieces: list[str] = []
        for item in form.items[1:]:
            value = self._value(item)
            if not isinstance(value, Text):
                raise Rejected(f"string-append takes strings, not {_short(item)}", item.line)
            pieces.append(value.value)
        self._make(sum(len(piece) for piece in pieces), form)
        return Text("".join(pieces), form.line)


@lru_cache(maxsize=_KEPT_FILTERS)
def _built(name: str, given: Text, line: int) -> Filter:
    return filters.build(name, (given,), line)


_RESERVED = (
    "allow",
    "deny",
    "version",
    "debug",
    "import",
    "define",
    "if",
    "when",
    "param",
    "string-append",
    "with",
)


def _short(node: Node) -> str:
    text = shown(node)
    return text if len(text) <= 60 else text[:57] + "…"
