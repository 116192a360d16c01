"""Questions made of the rules of a compiled Seatbelt profile: for each thing that a rule names, one about it. Pure."""

import re
from collections.abc import Iterable, Iterator

import msgspec

from worker.platform.darwin.evaluate import CompiledProfile, Rule
from worker.questions import ELSEWHERE, LookupQuestion, Question, RawQuestion

INSIDE = "some-file"

# What a program asks for, where a rule is about a whole family of operations.
_ASKED = {
    "file*": "file-read-data",
    "file-read*": "file-read-data",
    "file-write*": "file-write-data",
    "iokit*": "iokit-open-user-client",
    "iokit-open*": "iokit-open-user-client",
    "ipc-posix*": "ipc-posix-shm-read-data",
    "ipc-posix-sem*": "ipc-posix-sem-open",
    "ipc-posix-shm*": "ipc-posix-shm-read-data",
    "ipc-posix-shm-read*": "ipc-posix-shm-read-data",
    "ipc-posix-shm-write*": "ipc-posix-shm-write-create",
    "mach*": "mach-lookup",
    "nvram*": "nvram-get",
    "process*": "process-fork",
    "process-exec*": "process-exec",
    "process-info*": "process-info-pidinfo",
    "sysctl*": "sysctl-read",
    "user-preference*": "user-preference-read",
}
# A filter with one text: the rest that makes a matching argument of it.
_ENDINGS = {
    "literal": "",
    "path": "",
    "path-literal": "",
    "subpath": f"/{INSIDE}",
    "prefix": "x",
    "sysctl-name": "",
    "sysctl-name-prefix": "x",
    "ipc-posix-name": "",
    "ipc-posix-name-prefix": "x",
    "preference-domain": "",
    "iokit-user-client-class": "",
    "iokit-registry-entry-class": "",
    "iokit-registry-entry-class-prefix": "x",
    "iokit-property": "",
}
_MACH = {
    f"{name}{suffix}": (kind, ending)
    for name, kind in (("global-name", "global"), ("local-name", "local"), ("xpc-service-name", "xpc"))
    for suffix, ending in (("", ""), ("-prefix", "x"))
}
_LEAF = re.compile(r'\(([a-z0-9-]+) "((?:[^"\\]|\\.)+)"\)')
_EXPRESSION = re.compile(r'\((regex|[a-z-]+-regex) #"((?:[^"\\]|\\.)+)"\)')
# Pieces of the expressions that profiles use, and what each matches.
_PIECES = (
    (re.compile(r"\[\^[^]]+\][+*]?"), "xx"),
    (re.compile(r"\[0-9]\{?[0-9,]*\}?[+*]?"), "1"),
    (re.compile(r"\[(.)[^]]*\][+*]?"), r"\1"),
    (re.compile(r"\(([^()|]*)(?:\|[^()]*)?\)[?+*]?"), r"\1"),
    (re.compile(r"\.[+*]"), "xx"),
    (re.compile(r"[\^$]"), ""),
    (re.compile(r"\\(.)"), r"\1"),
)
_SIDE = re.compile(r'\((remote|local) ([a-z0-9]+)(?: "([^"]+):([0-9*]+)")?\)')
_WORD = re.compile(r"\((?:target|socket-domain) ([A-Za-z0-9_-]+)\)")


def samples(rules: Iterable[Rule]) -> Iterator[Question]:
    for rule in rules:
        if rule.operation == "default":
            continue
        asked = _ASKED.get(rule.operation, rule.operation)
        if not rule.filters:
            yield RawQuestion(asked, None)
            yield RawQuestion(asked, f"/{INSIDE}")
        for test in rule.filters:
            yield from _of_filter(asked, test.text)


def differing(one: CompiledProfile, other: CompiledProfile) -> list[Rule]:
    """Rules that only one of the two has, each cut to the filters that the other has not on its operation."""
    found = []
    for here, there in ((one, other), (other, one)):
        known = {_key(rule, text) for rule in there.rules for text in _texts(rule)}
        for rule in here.rules:
            new = [text for text in _texts(rule) if _key(rule, text) not in known]
            if new:
                filters = tuple(test for test in rule.filters if test.text in new)
                found.append(msgspec.structs.replace(rule, filters=filters))
    return found


def all_sampled(rules: Iterable[Rule]) -> bool:
    """Whether a question can be made of every filter."""
    return all(
        next(_of_filter(rule.operation, test.text), None) is not None
        for rule in rules
        for test in rule.filters
    )


def _texts(rule: Rule) -> list[str]:
    return [test.text for test in rule.filters] or [""]


def _key(rule: Rule, text: str) -> tuple[str, str, str]:
    return rule.action, rule.operation, text


def _of_filter(operation: str, text: str) -> Iterator[Question]:
    for name, value in _LEAF.findall(text):
        plain = re.sub(r"\\(.)", r"\1", value)
        if name in _ENDINGS:
            yield RawQuestion(operation, plain.rstrip("/") + _ENDINGS[name] if plain != "/" else plain)
        elif name in _MACH:
            kind, ending = _MACH[name]
            yield LookupQuestion(plain + ending, kind)
    for name, expression in _EXPRESSION.findall(text):
        value = expression
        for piece, put in _PIECES:
            value = piece.sub(put, value)
        if _matches(expression, value):
            mach = _MACH.get(name.removesuffix("-regex"))
            yield RawQuestion(operation, value) if mach is None else LookupQuestion(value, mach[0])
    for side, protocol, host, port in _SIDE.findall(text):
        elsewhere = "*" if side == "local" else ELSEWHERE
        place = "127.0.0.1" if host == "localhost" else elsewhere
        number = port if port not in ("", "*") else "8080"
        yield RawQuestion(operation, f"{place}:{number}{'/udp' if protocol.startswith('udp') else ''}")
    for word in _WORD.findall(text):
        yield RawQuestion(operation, word)


def _matches(expression: str, value: str) -> bool:
    """Whether the sample is one; an expression that Python has not is not sampled."""
    try:
        return re.search(expression, value) is not None
    except re.error:
        return False
