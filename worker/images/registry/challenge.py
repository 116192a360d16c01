"""The `WWW-Authenticate` header (RFC 9110, 11.6.1), as registries use it."""

import re

import msgspec

MAX_HEADER = 16 * 1024

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_PARAMETER = re.compile(rf"\s*({_TOKEN})\s*=\s*({_QUOTED}|{_TOKEN})\s*(?:,|$)")
_SCHEME = re.compile(rf"[\s,]*({_TOKEN})(?:\s+|,|$)")
_ESCAPE = re.compile(r"\\(.)")


class Challenge(msgspec.Struct, frozen=True):
    """`scheme` and the parameters' names are lower case."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """All that can be read; what cannot is passed over, so any text gives some list."""
    found: list[Challenge] = []
    place, header = 0, header[:MAX_HEADER]
    while match := _SCHEME.match(header, place):
        place = match.end()
        parameters: dict[str, str] = {}
        while parameter := _PARAMETER.match(header, place):
            place = parameter.end()
            value = parameter[2]
            if value.startswith('"'):
                value = _ESCAPE.sub(r"\1", value[1:-1])
            parameters.setdefault(parameter[1].lower(), value)
        found.append(Challenge(match[1].lower(), parameters))
    return found
