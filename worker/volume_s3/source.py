"""What an `s3` volume mirrors and who may read it there: out of a spec and a secret. Pure."""

import re
from typing import Any
from urllib.parse import urlsplit

import msgspec

from schemas.errors import InvalidSpec
from schemas.spec import S3Storage

DEFAULT_REGION = "us-east-1"
AMAZON = "https://s3.amazonaws.com:443"
SECRET_REFERENCE = "$S:"

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_REGION = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")
_PORTS = {"http": 80, "https": 443}


class S3Source(msgspec.Struct, frozen=True, kw_only=True):
    """`prefix` is empty or ends with a slash. `endpoint` None is Amazon's own for the region. `credentials` is the
    name of a secret of the node; None asks without a signature. `interval_s` is between two write-backs."""

    bucket: str
    prefix: str
    endpoint: str | None
    region: str
    path_style: bool
    credentials: str | None
    readonly: bool
    interval_s: float

    @property
    def origin(self) -> str:
        """Where it is, as the node's policy names it: scheme, host and port."""
        return AMAZON if self.endpoint is None else self.endpoint

    @property
    def url(self) -> str:
        """For people."""
        return f"s3://{self.bucket}/{self.prefix}"


class S3Credentials(msgspec.Struct, frozen=True):
    access_key_id: str
    secret_access_key: str
    session_token: str | None = None

    def __repr__(self) -> str:
        return "S3Credentials(…)"

    __str__ = __repr__


def source_of(item: S3Storage, *, field: str) -> S3Source:
    """What a storage entry of a spec names. InvalidSpec, with the field below `field`."""
    if _BUCKET.fullmatch(item.bucket) is None:
        raise InvalidSpec("is no name of a bucket", field=f"{field}.bucket")
    if item.region is not None and _REGION.fullmatch(item.region) is None:
        raise InvalidSpec("is no name of a region", field=f"{field}.region")
    prefix = (item.prefix or "").strip("/")
    endpoint = None if not item.endpoint else _endpoint(item.endpoint, f"{field}.endpoint")
    return S3Source(
        bucket=item.bucket,
        prefix=f"{prefix}/" if prefix else "",
        endpoint=endpoint,
        region=item.region or DEFAULT_REGION,
        path_style=endpoint is not None if item.path_style is None else item.path_style,
        credentials=(item.credentials or "").removeprefix(SECRET_REFERENCE) or None,
        readonly=item.readonly,
        interval_s=item.sync_interval_s,
    )


def _endpoint(text: str, field: str) -> str:
    """`scheme://host:port` with the port always there, so that patterns mean what they say."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise InvalidSpec("is no address", field=field) from None
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    if parts.scheme not in _PORTS or _HOST.fullmatch(host) is None:
        raise InvalidSpec("must be http:// or https:// with a host, and a port if need be", field=field)
    if parts.username is not None or parts.query or parts.fragment or parts.path not in ("", "/"):
        raise InvalidSpec("must have no user, path or query", field=field)
    return f"{parts.scheme}://{host.lower()}:{port or _PORTS[parts.scheme]}"


def credentials_of(text: str, name: str) -> S3Credentials:
    """A secret's value: `ACCESS_KEY_ID:SECRET_ACCESS_KEY`, or JSON with `access_key_id`, `secret_access_key` and
    perhaps `session_token`. ValueError, without any of it."""
    where = f"the secret {name}"
    if not text.lstrip().startswith("{"):
        key, colon, secret = text.strip().partition(":")
        if not (key and colon and secret):
            raise ValueError(f"{where} is neither `ACCESS_KEY_ID:SECRET_ACCESS_KEY` nor JSON")
        return S3Credentials(key, secret)
    try:
        found: Any = msgspec.json.decode(text.encode("utf-8", "surrogateescape"))
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise ValueError(f"{where} is no JSON") from None
    # As the aws command line writes them, too.
    plain = {str(key).lower().replace("_", ""): value for key, value in found.items()}
    name_of_key, word, token = (plain.get(n) for n in ("accesskeyid", "secretaccesskey", "sessiontoken"))
    if not (isinstance(name_of_key, str) and name_of_key and isinstance(word, str) and word):
        raise ValueError(f"{where} has no access_key_id and secret_access_key")
    return S3Credentials(name_of_key, word, token if isinstance(token, str) and token else None)


def mirror_name(instance: str, index: int) -> str:
    """The name of the mirror of a container's storage entry; one that a volume may have, too."""
    return f"s3-{instance.lower()}-{index}"
