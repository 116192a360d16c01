"""Image references: `[registry/]name[:tag][@digest]`.

A name is kept as it was written; two names are the same image where `key` agrees. A missing tag is
`latest`, and a registry's host name knows no case. Nothing else is made equal: `web` and
`docker.io/library/web` are two images, since what a node registers by itself comes from no registry.
"""

import re

import msgspec

from schemas.errors import ContractError
from schemas.values import check_image
from worker.errors import InvalidCommand

DEFAULT_TAG = "latest"

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Reference(msgspec.Struct, frozen=True):
    """`repository` is what stands before tag and digest, its host in lower case."""

    repository: str
    tag: str
    digest: str | None

    @property
    def key(self) -> str:
        """Equal for equal images, and only for these. A digest says which, whatever tag stands before it."""
        return f"{self.repository}:{self.tag}" if self.digest is None else f"{self.repository}@{self.digest}"


def parse_reference(
    name: str, *, field: str = "image", error: type[ContractError] = InvalidCommand
) -> Reference:
    check_image(name, field=field, error=error)
    rest, _, digest = name.partition("@")
    repository, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        repository, tag = rest, ""
    host, slash, path = repository.partition("/")
    if slash and (host == "localhost" or re.search(r"[.:A-Z]", host)):
        repository = f"{host.lower()}/{path}"
    return Reference(repository, tag or DEFAULT_TAG, digest.lower() or None)


def parse_name(name: str, *, field: str = "image", error: type[ContractError] = InvalidCommand) -> Reference:
    """A name to give to an image: one that fixes the content itself cannot be given."""
    parsed = parse_reference(name, field=field, error=error)
    if parsed.digest is not None or DIGEST.fullmatch(name):
        raise error(f"{name} names a digest; give a name with or without a tag", field=field)
    return parsed
