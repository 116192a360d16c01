"""Which registry an image's name means, and what to ask it for.

The short forms are Docker's: `alpine` is `docker.io/library/alpine:latest`. A first part with a dot, a colon
or an upper-case letter, or `localhost`, is a registry's host; anything else belongs to Docker Hub.
"""

import re

import msgspec

from worker.errors import InvalidCommand, PullFailed

from ..reference import DIGEST, parse_reference

DOCKER_HUB = "docker.io"
# Docker Hub answers under another name than the one it is known by.
_ENDPOINTS = {DOCKER_HUB: "registry-1.docker.io"}
_ALIASES = {"index.docker.io": DOCKER_HUB, "registry-1.docker.io": DOCKER_HUB}

_HOST_LIKE = re.compile(r"(?:localhost|[^/]*[.:A-Z][^/]*)/")
_HOST = re.compile(r"(?P<name>[a-z0-9.-]+)(?::(?P<port>[0-9]+))?")


class RegistryImage(msgspec.Struct, frozen=True):
    """An image where it comes from. `host` is lower case, with its port where one was written."""

    host: str
    repository: str
    tag: str
    digest: str | None

    @property
    def endpoint(self) -> str:
        """The `host[:port]` to connect to."""
        return _ENDPOINTS.get(self.host, self.host)

    @property
    def hostname(self) -> str:
        return self.host.partition(":")[0]

    @property
    def reference(self) -> str:
        """What stands in the manifest's URL: the digest where there is one, else the tag."""
        return self.digest or self.tag

    def __str__(self) -> str:
        mark = f"@{self.digest}" if self.digest else f":{self.tag}"
        return f"{self.host}/{self.repository}{mark}"


def registry_image(name: str, *, field: str = "image") -> RegistryImage:
    """Raises InvalidCommand for what is no name, PullFailed for one that no registry can be asked for."""
    if DIGEST.fullmatch(name):
        raise PullFailed(f"{name} is a digest and names no registry", field=field)
    parsed = parse_reference(name, field=field)
    if parsed.digest is not None and DIGEST.fullmatch(parsed.digest) is None:
        algorithm = parsed.digest.partition(":")[0]
        raise PullFailed(f"{name}: digests of the kind {algorithm} are not supported, sha256 is", field=field)
    host, _, path = parsed.repository.partition("/")
    if not _HOST_LIKE.match(name):
        host, path = DOCKER_HUB, parsed.repository
    host = _ALIASES.get(host, host)
    if host == DOCKER_HUB and "/" not in path:
        path = f"library/{path}"
    _check_host(host, name, field)
    return RegistryImage(host, path, parsed.tag, parsed.digest)


def _check_host(host: str, name: str, field: str) -> None:
    match = _HOST.fullmatch(host)
    port = None if match is None else match["port"]
    if match is None or (port is not None and not 0 < int(port) < 65536):
        raise InvalidCommand(f"{name[:200]} names no usable registry: {host[:100]!r}", field=field)
