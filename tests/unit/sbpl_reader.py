"""Reads a Seatbelt profile back and answers questions, for the tests of the profile builder only.

The decision: among rules that name an operation and carry a filter the last match wins; else its last rule
without one; else its parent's. Knows what our profiles contain and fails on anything else.
"""

import re
from collections.abc import Iterator
from typing import Any

from worker.platform.darwin.sbpl import Sbpl

_TOKEN = re.compile(
    r'\s*(?:;[^\n]*\n?|(?P<paren>[()])|(?P<raw>#"[^"]*")|"(?P<text>[^"\\]*)"|(?P<word>[^\s()";]+))'
)
_PARENTS = {
    "file-read-data": "file-read*",
    "file-read-metadata": "file-read*",
    "file-read*": "file*",
    "file-write*": "file*",
    "process-info*": "process*",
    "process-exec": "process*",
    "process-fork": "process*",
    "process-info-pidinfo": "process-info*",
    "process-info-rusage": "process-info*",
    "sysctl-read": "sysctl*",
    "sysctl-write": "sysctl*",
    "ipc-posix-shm-read*": "ipc-posix-shm",
}


class Text(str):
    """A string of the profile, as against a word."""


def tokens(text: str) -> Iterator[Any]:
    position = 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        assert match is not None, text[position : position + 60]
        position = match.end()
        if match["paren"]:
            yield match["paren"]
        elif match["raw"]:
            yield Text(match["raw"][2:-1])
        elif match["text"] is not None:
            yield Text(match["text"])
        elif match["word"]:
            yield match["word"]


def parse(text: str) -> list[Any]:
    stack: list[list[Any]] = [[]]
    for token in tokens(text):
        if token == "(" and not isinstance(token, Text):
            stack.append([])
        elif token == ")" and not isinstance(token, Text):
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    assert len(stack) == 1, "parentheses"
    return stack[0]


class Reader:
    def __init__(self, profile: Sbpl) -> None:
        self._params = profile.params
        self.forms = parse(profile.text)
        assert self.forms[0] == ["version", "1"]
        self.rules: list[tuple[str, str, list[Any]]] = []
        for action, *rest in self.forms[1:]:
            assert action in ("allow", "deny")
            operations = [one for one in rest if isinstance(one, str)]
            filters = [one for one in rest if isinstance(one, list) and one[0] != "with"]
            assert all(not isinstance(one, Text) for one in operations)
            self.rules += [(action, operation, filters) for operation in operations]

    def allows(self, operation: str, **request: Any) -> bool:
        node: str | None = operation
        while node is not None:
            mine = [(action, filters) for action, name, filters in self.rules if name == node]
            for action, filters in reversed(mine):
                if filters and any(self._matches(one, request) for one in filters):
                    return action == "allow"
            for action, filters in reversed(mine):
                if not filters:
                    return action == "allow"
            if node == "default":
                break
            node = _PARENTS.get(node) or _wildcard(node)
        raise AssertionError("no default")

    def _matches(self, one: list[Any], request: dict[str, Any]) -> bool:
        kind, *arguments = one
        if kind in ("require-all", "require-any", "require-not"):
            found = [self._matches(part, request) for part in arguments]
            return {"require-all": all(found), "require-any": any(found), "require-not": not found[0]}[kind]
        if kind in ("remote", "local"):
            return self._matches_address(kind, arguments, request)
        value = self._value(arguments[0])
        path, name = request.get("path"), request.get("name")
        if kind == "literal":
            return path == value
        if kind == "subpath":
            assert value == "/" or not value.endswith("/")
            return path is not None and (path == value or path.startswith(value + "/"))
        if kind == "regex":
            return path is not None and re.search(value, path) is not None
        if kind == "target":
            return request.get("target") == value
        if kind == "extension":
            return False
        if kind.endswith("-prefix"):
            return request.get("kind") == kind.removesuffix("-prefix") and str(name).startswith(value)
        if kind.endswith("-regex"):
            return request.get("kind") == kind.removesuffix("-regex") and bool(re.search(value, str(name)))
        return bool(request.get("kind") == kind and name == value)

    def _matches_address(self, kind: str, arguments: list[Any], request: dict[str, Any]) -> bool:
        if kind not in request:
            return False
        protocol, host, port = request[kind]
        if arguments[0] not in ("ip", protocol):
            return False
        if len(arguments) == 1:
            return True
        wanted_host, _, wanted_port = arguments[1].rpartition(":")
        assert wanted_host in ("*", "localhost")
        # On the local side `localhost` matches any address.
        here = wanted_host == "*" or kind == "local" or host == "localhost"
        return here and wanted_port in ("*", str(port))

    def _value(self, argument: Any) -> str:
        if isinstance(argument, list):
            assert argument[0] == "param"
            return self._params[argument[1]]
        return str(argument)


def _wildcard(node: str) -> str:
    if node.endswith("*"):
        return "default"
    for depth in range(node.count("-"), 0, -1):
        parent = "-".join(node.split("-")[:depth]) + "*"
        if parent in ("file-write*", "file*", "process*", "sysctl*", "network*", "mach*", "ipc*", "iokit*"):
            return parent
    return "default"
