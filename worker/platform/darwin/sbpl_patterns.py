"""The filters that hold texts: paths and names, whole, as prefixes, as folders and as regular expressions.

Sources of names, arguments and operations: 0xbf00/simbple (platform_data/catalina/filters.c, sbpl_v1.scm),
0x3c3e/sandblaster (misc/filters.json), and the profiles shipped with macOS 26.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from .sbpl_paths import MAX_PATH_BYTES, ancestors, covers, folded
from .sbpl_reader import Rejected, Text, quoted, raw_quoted
from .sbpl_regex import compiled
from .sbpl_request import Request
from .sbpl_values import Check, Filter, Given, Values
from .sbpl_words import TARGETED

Subject = Callable[[Request], str | Literal[False] | None]
"""The text that a pattern is about: False when the request is about something else, None when unsaid."""

_PATHS = ("file*", "process-exec*", "network*", "mach-priv-task-port", "qtn-user", "system-automount",
          "load-unsigned-code", "storage-class-map")  # fmt: skip
_MACH = ("mach-lookup", "mach-register", "mach-issue-extension", "mach-cross-domain-lookup",
         "mach-per-user-lookup")  # fmt: skip
_IOKIT = ("iokit-open*", "iokit-get-properties", "iokit-set-properties")
_EXTENSIONS = ("file-issue-extension", "generic-issue-extension", "iokit-issue-extension",
               "ipc-posix-issue-extension", "mach-issue-extension")  # fmt: skip


def path(request: Request) -> str | Literal[False] | None:
    return False if request.path is None and request.address is not None else request.path


def _name(request: Request) -> str | None:
    return request.argument.name


def _mach(kind: str) -> Subject:
    def subject(request: Request) -> str | Literal[False] | None:
        return request.argument.name if request.kind == kind else False

    return subject


def _control(request: Request) -> str | Literal[False] | None:
    about_other = request.path is not None or request.address is not None
    return False if about_other and request.argument.name is None else request.argument.name


def _unsaid(_request: Request) -> None:
    return None


# Base name: what it is about, and on which operations. Each also exists as NAME-prefix and NAME-regex.
_PATTERNS: dict[str, tuple[Subject, Values]] = {
    "appleevent-destination": (_name, ("appleevent-send",)),
    "boot-arg": (_name, ("boot-arg-set",)),
    "control-name": (_control, ("network*",)),
    "extension-class": (_name, _EXTENSIONS),
    "filesystem-name": (_unsaid, ("file*", "network*", "process-exec*")),
    "global-name": (_mach("global"), _MACH),
    "info-type": (_name, ("system-info",)),
    "iokit-connection": (lambda request: request.argument.connection, _IOKIT),
    "iokit-property": (_name, ("iokit-get-properties", "iokit-set-properties", "nvram-set")),
    # One filter under two names (sbpl_v1.scm).
    "iokit-registry-entry-class": (lambda request: request.argument.class_, _IOKIT),
    "iokit-user-client-class": (lambda request: request.argument.class_, _IOKIT),
    "ipc-posix-name": (_name, ("ipc-posix*",)),
    "kext-bundle-id": (_name, ("system-kext-load", "system-kext-unload")),
    "local-name": (_mach("local"), _MACH),
    "mac-policy-name": (_name, ("system-mac-syscall",)),
    "notification-name": (_name, ("darwin-notification-post", "distributed-notification-post")),
    "nvram-variable": (_name, ("nvram*",)),
    "preference-domain": (_name, ("user-preference*",)),
    "process-path": (lambda request: request.argument.process, ()),
    "right-name": (_name, ("authorization-right-obtain",)),
    "signing-identifier": (_unsaid, ()),
    "sysctl-name": (_name, ("sysctl*",)),
    "target-signing-identifier": (_unsaid, TARGETED),
    "xattr": (_name, ("file-read-xattr", "file-write-xattr")),
    "xpc-service-name": (_mach("xpc"), _MACH),
}

# Filter: (subject, mode, operations, the name that its canonical text has).
TEXTUAL: dict[str, tuple[Subject, str, Values, str]] = {
    **{
        name + suffix: (subject, mode, applies, base + suffix)
        for name, (subject, applies) in _PATTERNS.items()
        for suffix, mode in (("", "literal"), ("-prefix", "prefix"), ("-regex", "regex"))
        for base in (name.replace("iokit-user-client-class", "iokit-registry-entry-class"),)
    },
    **{
        name: (path, mode, _PATHS, canonical)
        for name, mode, canonical in (
            ("literal", "literal", "literal"),
            ("path", "literal", "literal"),
            ("path-literal", "literal", "literal"),
            ("subpath", "subpath", "subpath"),
            ("prefix", "prefix", "prefix"),
            ("path-prefix", "prefix", "prefix"),
            ("regex", "regex", "regex"),
            ("path-regex", "regex", "regex"),
            ("path-ancestors", "ancestors", "path-ancestors"),
        )
    },
    # Where a file system is mounted is nothing that a request says.
    **{
        f"mount-relative-{kind}": (_unsaid, mode, _PATHS, f"mount-relative-{kind}")
        for kind, mode in (
            ("literal", "literal"),
            ("path", "literal"),
            ("subpath", "subpath"),
            ("prefix", "prefix"),
            ("regex", "regex"),
        )
    },
}


def build(name: str, given: Sequence[Given], line: int) -> Filter:
    subject, mode, applies, canonical = TEXTUAL[name]
    values = tuple(one.value for one in given if isinstance(one, Text))
    if not values or len(values) != len(given):
        raise Rejected(f"{name} expects string arguments", line)
    doubt, patterns = None, values
    if mode == "regex":
        try:
            expressions = [compiled(value) for value in values]
        except Rejected as failure:
            raise Rejected(f"{name}: {failure}", line) from failure
        doubt = next((one.unconfirmed for one in expressions if one.unconfirmed), None)
        check = _expressions(subject, values)
    elif mode == "literal":
        check = _literals(subject, frozenset(values))
    elif mode == "ancestors":
        if not all(value.startswith("/") for value in values):
            raise Rejected("path must start with a /", line)
        # It stands for one literal for each folder, of which a long path has too many.
        if any(len(value) > MAX_PATH_BYTES for value in values):
            raise Rejected(f"path-ancestors of a path of more than {MAX_PATH_BYTES} bytes", line)
        folders = frozenset(one for value in values for one in ancestors(value))
        patterns = tuple(folders)
        check = _literals(subject, folders)
    else:
        check = _prefixes(subject, values) if mode == "prefix" else _folders(subject, values)
    return Filter(
        name=name,
        text=f"({canonical} {' '.join((raw_quoted if mode == 'regex' else quoted)(value) for value in values)})",
        check=check,
        applies=applies,
        mode=mode,
        values=values,
        pattern_bytes=sum(len(value.encode("utf-8", "surrogatepass")) for value in patterns),
        doubt=doubt,
    )


def _literals(subject: Subject, values: frozenset[str]) -> Check:
    alike = frozenset(folded(value) for value in values)

    def check(request: Request) -> bool | None:
        text = subject(request)
        if not isinstance(text, str):
            return text
        return text in values or _spelled(subject, request.folded in alike)

    return check


def _prefixes(subject: Subject, values: Values) -> Check:
    alike = tuple(folded(value) for value in values)

    def check(request: Request) -> bool | None:
        text = subject(request)
        if not isinstance(text, str):
            return text
        return text.startswith(values) or _spelled(subject, request.folded.startswith(alike))

    return check


def _folders(subject: Subject, values: Values) -> Check:
    alike = tuple(folded(value) for value in values)

    def check(request: Request) -> bool | None:
        text = subject(request)
        if not isinstance(text, str):
            return text
        if any(covers(value, text) for value in values):
            return True
        return _spelled(subject, any(covers(value, request.folded) for value in alike))

    return check


def _spelled(subject: Subject, alike: bool) -> bool | None:
    """What it comes to that a path is not the filter's, but is `alike` but for its spelling."""
    return None if alike and subject is path else False


def _expressions(subject: Subject, values: Values) -> Check:
    expressions = [compiled(value) for value in values]

    def check(request: Request) -> bool | None:
        text = subject(request)
        if not isinstance(text, str):
            return text
        found = [expression.search(text) for expression in expressions]
        return True if True in found else None if None in found else False

    return check
