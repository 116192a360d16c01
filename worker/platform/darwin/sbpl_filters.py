"""The filters of Seatbelt rules: one door to build them, and those that join others or name addresses.

Matching is three-valued: None where the request does not say enough or no source says what happens.
"""

import hashlib
from collections.abc import Sequence

from . import sbpl_network as network
from . import sbpl_operations as operations
from . import sbpl_patterns
from .sbpl_patterns import TEXTUAL, path
from .sbpl_reader import Rejected, Text, quoted
from .sbpl_request import Request
from .sbpl_values import Check, Filter, Given, Symbol
from .sbpl_words import NUMERIC, SYMBOLIC, build_numeric, build_symbolic

# Bounds of what one rule may hold, so that no text makes matching long: filters that `define` repeats count
# each time.
MAX_FILTERS = 10_000
MAX_NESTING = 64

_MAX_TEXT = 2_000

_COMPOUND = ("require-all", "require-any", "require-not")


def known(name: str) -> bool:
    return name in TEXTUAL or name in SYMBOLIC or name in NUMERIC or name in _COMPOUND or name in _OTHERS


_OTHERS = ("extension", "local", "remote", "from", "to")


def build(name: str, given: Sequence[Given], line: int) -> Filter:
    """Rejected for a filter that does not exist or arguments that it does not take."""
    if name in TEXTUAL:
        return sbpl_patterns.build(name, given, line)
    if name in SYMBOLIC:
        return build_symbolic(name, given, line)
    if name in NUMERIC:
        return build_numeric(name, given, line)
    if name in _COMPOUND:
        return joined(name, given, line)
    if name == "extension":
        return _extension(given, line)
    if name in ("local", "from", "remote", "to"):
        return _side({"from": "local", "to": "remote"}.get(name, name), given, line)
    raise Rejected(f"there is no filter {name}", line)


def misplaced(filter_: Filter, operation: str) -> str | None:
    """The name of a filter in this one that does not apply to the operation; None when all do."""
    if filter_.name in _COMPOUND:
        return next((bad for part in filter_.parts if (bad := misplaced(part, operation))), None)
    if not filter_.applies:
        return None
    if operation == "default":
        return filter_.name
    fits = any(
        operations.covers(root, operation) or operations.covers(operation, root) for root in filter_.applies
    )
    return None if fits else filter_.name


def joined(name: str, given: Sequence[Given], line: int) -> Filter:
    parts = tuple(one for one in given if isinstance(one, Filter))
    if not parts or len(parts) != len(given) or (name == "require-not" and len(parts) != 1):
        raise Rejected(f"{name} expects {'one filter' if name == 'require-not' else 'filters'}", line)
    size = 1 + sum(part.size for part in parts)
    depth = 1 + max(part.depth for part in parts)
    if size > MAX_FILTERS:
        raise Rejected(f"more than {MAX_FILTERS} filters in one", line)
    if depth > MAX_NESTING:
        raise Rejected(f"filters nest more than {MAX_NESTING} deep", line)
    return Filter(
        name=name,
        text=_text(name, parts),
        check={"require-all": _all(parts), "require-any": _any(parts), "require-not": _not(parts[0])}[name],
        parts=parts,
        size=size,
        depth=depth,
        pattern_bytes=sum(part.pattern_bytes for part in parts),
    )


def _text(name: str, parts: tuple[Filter, ...]) -> str:
    """One for all orders; a long one is known by its digest."""
    inner = " ".join(sorted({part.text for part in parts}))
    if len(inner) > _MAX_TEXT:
        inner = "… " + hashlib.blake2b(inner.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"({name} {inner})"


def _all(parts: tuple[Filter, ...]) -> Check:
    def check(request: Request) -> bool | None:
        result: bool | None = True
        for part in parts:
            found = part.check(request)
            if found is False:
                return False
            if found is None:
                result = None
        return result

    return check


def _any(parts: tuple[Filter, ...]) -> Check:
    def check(request: Request) -> bool | None:
        result: bool | None = False
        for part in parts:
            found = part.check(request)
            if found:
                return True
            if found is None:
                result = None
        return result

    return check


def _not(part: Filter) -> Check:
    def check(request: Request) -> bool | None:
        found = part.check(request)
        return None if found is None else not found

    return check


def _extension(given: Sequence[Given], line: int) -> Filter:
    values = tuple(one.value for one in given if isinstance(one, Text))
    if not values or len(values) != len(given):
        raise Rejected("extension expects string arguments", line)
    text = f"(extension {' '.join(quoted(value) for value in values)})"
    return Filter(
        name="extension",
        text=text,
        check=lambda request: any(value in request.argument.extensions for value in values),
        mode="extension",
        values=values,
    )


def _side(name: str, given: Sequence[Given], line: int) -> Filter:
    """`(remote tcp "localhost:80")`, `(local ip)`, `(remote unix-socket (path-literal "/s"))`."""
    if not given or not isinstance(given[0], Symbol):
        raise Rejected(f"{name} expects a protocol", line)
    protocol, rest = given[0].name, given[1:]
    if protocol in ("unix-socket", "unix"):
        return _unix(name, rest, line)
    if len(rest) > 1 or not all(isinstance(one, Text) for one in rest):
        raise Rejected(f"{name} expects string argument", line)
    written = rest[0].value if rest and isinstance(rest[0], Text) else None
    wanted = network.pattern(protocol, written, line)
    return Filter(
        name=name,
        text=f"({name} {protocol}{'' if written is None else ' ' + quoted(written)})",
        check=_remote(wanted) if name == "remote" else _local(wanted),
        applies=("network*",),
        mode="address",
        values=(protocol, wanted.host, "*" if wanted.port is None else str(wanted.port)),
    )


def _remote(wanted: network.Pattern) -> Check:
    def check(request: Request) -> bool | None:
        if request.address is None:
            return _not_ip(request)
        # On the accepting side such a filter compiles without a known effect (NIX#11270).
        return network.matches_remote(wanted, request.address) if _outgoing(request) else None

    return check


def _local(wanted: network.Pattern) -> Check:
    def check(request: Request) -> bool | None:
        if request.address is None:
            return _not_ip(request)
        if _outgoing(request):
            return network.matches_unbound(wanted)
        return network.matches_local(wanted, request.address)

    return check


def _not_ip(request: Request) -> bool | None:
    """False for a unix socket or a kernel control; None when the request names nothing at all."""
    return None if request.path is None and request.argument.name is None else False


def _outgoing(request: Request) -> bool:
    return request.operation not in ("network-inbound", "network-bind")


def _unix(name: str, given: Sequence[Given], line: int) -> Filter:
    parts = tuple(one for one in given if isinstance(one, Filter))
    if len(parts) != len(given) or len(parts) > 1:
        raise Rejected(f"{name} unix-socket expects one filter on a path at most", line)
    if parts and TEXTUAL.get(parts[0].name, (None,))[0] is not path:
        raise Rejected(f"{name} unix-socket expects a filter on a path", line)
    inner = parts[0].check if parts else None

    def check(request: Request) -> bool | None:
        if request.path is None:
            return None if request.address is None and request.argument.name is None else False
        return True if inner is None else inner(request)

    return Filter(
        name=name,
        text=f"({name} unix-socket{''.join(' ' + part.text for part in parts)})",
        check=check,
        applies=("network*",),
        mode="unix",
        parts=parts,
        size=1 + sum(part.size for part in parts),
        pattern_bytes=sum(part.pattern_bytes for part in parts),
    )
