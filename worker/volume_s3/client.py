"""One bucket, through botocore, which is loaded here and nowhere else: when the first mirror works.

Blocking; threads may share it. It uses what it is given and nothing of the worker's own: no variables, no files of
the aws command line, no credentials of the machine. Each call is one attempt: `patience` tries again.
"""

import functools
import io
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import msgspec

from worker.images.registry.addresses import refused

from .failures import Changed, Missing, S3Failure, Stopped, Unable
from .source import S3Credentials, S3Source

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 120.0
MAX_ANSWER_BYTES = 16 << 20
CHUNK_BYTES = 256 << 10
POOL = 10
PAGE = 1000

TOKEN = "sandfleet-token"  # whose upload it is: metadata that tells our own version from a stranger's
MTIME = "mtime"  # seconds since 1970, with a fraction, as rclone writes it
EXECUTABLE = "sandfleet-executable"

# A session makes one client at a time.
_MAKING = threading.Lock()
_CODE = re.compile(r"[A-Za-z0-9.]{1,64}")
_SYSTEM_ROOTS = "/etc/ssl/cert.pem"
_AGAIN = frozenset(
    (
        *(
            "SlowDown",
            "InternalError",
            "ServiceUnavailable",
            "RequestTimeout",
            "Throttling",
            "ThrottlingException",
        ),
        *(
            "RequestLimitExceeded",
            "OperationAborted",
            "XAmzContentSHA256Mismatch",
            "BadDigest",
            "IncompleteBody",
        ),
    )
)
_MEANS = {
    "NoSuchBucket": "there is no such bucket",
    "AccessDenied": "the credentials do not allow it",
    "AllAccessDisabled": "the bucket is closed",
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the session token has expired",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "AuthorizationHeaderMalformed": "the region is wrong",
    "PermanentRedirect": "the bucket is at another endpoint or in another region",
}


Body = IO[bytes] | io.RawIOBase


class RemoteObject(msgspec.Struct, frozen=True):
    key: str
    etag: str
    size: int


class RemoteHead(msgspec.Struct, frozen=True):
    etag: str
    size: int
    metadata: dict[str, str]


class Download:
    """An object's bytes, from where they were asked for. Close it."""

    def __init__(self, body: Any, head: RemoteHead) -> None:
        self._body = body
        self.head = head

    def chunks(self) -> Iterator[bytes]:
        """S3Failure when they break off."""
        left = self.head.size
        with _told("read"):
            while chunk := self._body.read(CHUNK_BYTES):
                left -= len(chunk)
                yield chunk
        if left:
            raise S3Failure("the object broke off", again=True)

    def close(self) -> None:
        self._body.close()


class S3Client:
    def __init__(
        self,
        source: S3Source,
        credentials: S3Credentials | None,
        *,
        ca: Path | None = None,
        private: bool = False,
        stopped: threading.Event | None = None,
    ) -> None:
        """`ca` is trusted in the place of the system's roots. `private`: the operator named the server, so its address
        need not be public. Once `stopped`, every call raises Stopped."""
        self._source = source
        self._credentials = credentials
        self._ca = ca
        self._private = private
        self._stopped = threading.Event() if stopped is None else stopped
        self._lock = threading.Lock()
        self._parts: tuple[Any, Any] | None = None

    def close(self) -> None:
        if self._parts is not None:
            for part in self._parts:
                part.close()

    def _connected(self) -> tuple[Any, Any]:
        """What carries requests, and the client. Made by the first call: a pass may find nothing to ask."""
        with self._lock:
            if self._parts is None:
                self._parts = _connect(
                    self._source, self._credentials, self._ca, self._send, private=self._private
                )
            return self._parts

    def _call(self, operation: str, **arguments: Any) -> Any:
        _, client = self._connected()
        with _told(operation):
            return getattr(client, operation)(
                Bucket=self._source.bucket, **{k: v for k, v in arguments.items() if v is not None}
            )

    def _send(self, request: Any, **_: Any) -> Any:
        """What botocore would do itself, but an answer that is no object is read up to a limit and no further."""
        if self._stopped.is_set():
            raise Stopped
        wants_stream = request.stream_output
        request.stream_output = True
        answer = self._connected()[0].send(request)
        if wants_stream and answer.status_code < 300:
            return answer
        return type(answer)(answer.url, answer.status_code, answer.headers, _Read(answer.raw))

    # -- calls

    def page(self, token: str | None) -> tuple[list[RemoteObject], str | None]:
        """Objects below the prefix, and how to ask for those after them. S3Failure for what cannot be a list."""
        page = self._call(
            "list_objects_v2", Prefix=self._source.prefix, ContinuationToken=token, MaxKeys=PAGE
        )
        objects = []
        for found in page.get("Contents", ()):
            key, etag, size = found.get("Key"), found.get("ETag"), found.get("Size")
            if not (isinstance(key, str) and isinstance(etag, str) and isinstance(size, int) and size >= 0):
                raise S3Failure("the server's list of objects makes no sense")
            objects.append(RemoteObject(key, etag.strip('"'), size))
        if not page.get("IsTruncated"):
            return objects, None
        following = page.get("NextContinuationToken")
        if not following or following == token:
            raise S3Failure("the server's list of objects has no end")
        return objects, str(following)

    def head(self, key: str) -> RemoteHead | None:
        try:
            return _head(self._call("head_object", Key=key))
        except Missing:
            return None

    def get(self, key: str, etag: str, offset: int = 0) -> Download:
        """That very version, from `offset` on. Changed, Missing, S3Failure."""
        ranged = f"bytes={offset}-" if offset else None
        found = self._call("get_object", Key=key, IfMatch=f'"{etag}"', Range=ranged)
        download = Download(found["Body"], _head(found))
        if download.head.etag != etag:
            download.close()
            raise Changed
        if ranged and not str(found.get("ContentRange", "")).startswith(f"bytes {offset}-"):
            download.close()
            raise S3Failure("the server cannot go on in the middle of an object", again=True)
        return download

    def put(
        self,
        key: str,
        body: Body,
        md5: str,
        metadata: dict[str, str],
        expected: str | None,
    ) -> str:
        """Write an object; its ETag. `expected` is the version to replace, empty for none, None for any.

        Changed when there is another one.
        """
        return _etag(
            self._call("put_object", Key=key, Body=body, ContentMD5=md5, Metadata=metadata, **_only(expected))
        )

    def begin_parts(self, key: str, metadata: dict[str, str]) -> str:
        return str(self._call("create_multipart_upload", Key=key, Metadata=metadata)["UploadId"])

    def put_part(self, key: str, upload: str, number: int, body: Body, md5: str) -> str:
        made = self._call(
            "upload_part", Key=key, UploadId=upload, PartNumber=number, Body=body, ContentMD5=md5
        )
        return _etag(made)

    def end_parts(self, key: str, upload: str, etags: list[str], expected: str | None) -> str:
        parts = [{"PartNumber": number, "ETag": f'"{etag}"'} for number, etag in enumerate(etags, 1)]
        made = self._call(
            "complete_multipart_upload",
            Key=key,
            UploadId=upload,
            MultipartUpload={"Parts": parts},
            **_only(expected),
        )
        return _etag(made)

    def abort_parts(self, key: str, upload: str) -> None:
        with suppress(Missing):
            self._call("abort_multipart_upload", Key=key, UploadId=upload)

    def delete(self, key: str, expected: str | None) -> None:
        """Delete that version, None any. Changed; one that is gone already is fine."""
        with suppress(Missing):
            self._call("delete_object", Key=key, IfMatch=None if expected is None else f'"{expected}"')


class _Read:
    """The body of an answer as `AWSResponse` wants it: read already, and small."""

    def __init__(self, raw: Any) -> None:
        end = time.monotonic() + ANSWER_TIMEOUT_S
        self._content = b""
        try:
            for chunk in raw.stream(CHUNK_BYTES):
                self._content += chunk
                if len(self._content) > MAX_ANSWER_BYTES:
                    raise S3Failure("the server's answer is too long")
                if time.monotonic() > end:
                    raise S3Failure("the server's answer takes too long", again=True)
        except BaseException:
            raw.close()
            raise

    def stream(self) -> Iterator[bytes]:
        yield self._content


class _told:
    """Failures of botocore and below as ours."""

    def __init__(self, operation: str) -> None:
        self._doing = operation.replace("_", " ")

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, failure: BaseException | None, __: object) -> None:
        if failure is None:
            return
        from botocore import exceptions as b
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        if isinstance(failure, b.ClientError):
            raise _refused(failure.response, self._doing) from failure
        if isinstance(failure, b.HTTPClientError | b.ConnectionError | b.IncompleteReadError | HTTPError):
            cause = failure.kwargs.get("error") if isinstance(failure, b.HTTPClientError) else None
            if isinstance(cause, Stopped | S3Failure):
                raise cause
            raise S3Failure(f"{self._doing}: {_connection(failure)}", again=True) from failure
        if isinstance(failure, b.FlexibleChecksumError):
            raise S3Failure(f"{self._doing}: the bytes that came are damaged", again=True) from failure
        # The library trusts servers to answer in the right shape, and stumbles over one that does not.
        if isinstance(failure, ResponseParserError | TypeError | ValueError | LookupError | AttributeError):
            raise S3Failure(f"{self._doing}: the server's answer is no answer of S3", again=True) from failure
        if isinstance(failure, b.BotoCoreError):
            raise S3Failure(f"{self._doing}: {type(failure).__name__}") from failure


def _refused(response: Any, doing: str) -> S3Failure:
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = str(response.get("Error", {}).get("Code", ""))
    code = code if _CODE.fullmatch(code) else str(status)
    if status == 412 or code in ("PreconditionFailed", "ConditionalRequestConflict"):
        return Changed()
    if code in ("NoSuchKey", "NoSuchUpload", "404", "NotFound"):
        return Missing(f"{doing}: there is no such object")
    if status == 304:
        return Changed()
    if status == 501 or code == "NotImplemented":
        return Unable(f"{doing}: the server does not know this")
    again = status >= 500 or status in (408, 429) or code in _AGAIN
    known = _MEANS.get(code)
    words = (
        f"{known} ({code})"
        if known
        else f"{code}, status {status}"
        if code != str(status)
        else f"status {status}"
    )
    return S3Failure(f"{doing}: {words}", again=again)


def _connection(failure: BaseException) -> str:
    name = type(failure).__name__
    return {
        "EndpointConnectionError": "the server cannot be reached",
        "ConnectTimeoutError": "the server cannot be reached in time",
        "ReadTimeoutError": "the server says nothing",
        "ConnectionClosedError": "the connection was cut",
        "IncompleteReadError": "the connection was cut",
        "SSLError": "the server's certificate is not trusted",
    }.get(name, f"the connection failed ({name})")


def _head(found: Any) -> RemoteHead:
    size = found.get("ContentLength")
    if not isinstance(size, int) or size < 0:
        raise S3Failure("the server does not say how long an object is")
    metadata = {str(k).lower(): str(v) for k, v in (found.get("Metadata") or {}).items()}
    return RemoteHead(_etag(found), size, metadata)


def _etag(found: Any) -> str:
    etag = found.get("ETag")
    if not isinstance(etag, str) or not etag.strip('"'):
        raise S3Failure("the server gives an object no ETag")
    return etag.strip('"')


def _only(expected: str | None) -> dict[str, str]:
    if expected is None:
        return {}
    return {"IfMatch": f'"{expected}"'} if expected else {"IfNoneMatch": "*"}


def _connect(
    source: S3Source,
    credentials: S3Credentials | None,
    ca: Path | None,
    send: Callable[..., Any],
    *,
    private: bool,
) -> tuple[Any, Any]:
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.httpsession import URLLib3Session

    verify: str | bool = True
    roots = ca or ssl.get_default_verify_paths().cafile or _SYSTEM_ROOTS
    if ca is not None or Path(roots).exists():
        verify = str(roots)
    config = Config(
        signature_version=UNSIGNED if credentials is None else None,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path" if source.path_style else "virtual"},
        proxies={},
        # Not every server knows the newer checksums; each body is sent with its MD5.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_supported",
    )
    with _MAKING:
        client = _session().create_client(
            "s3",
            region_name=source.region,
            endpoint_url=source.endpoint,
            aws_access_key_id=None if credentials is None else credentials.access_key_id,
            aws_secret_access_key=None if credentials is None else credentials.secret_access_key,
            aws_session_token=None if credentials is None else credentials.session_token,
            config=config,
        )
    client.meta.events.register("before-send.s3", send)
    http = URLLib3Session(
        verify=verify, proxies={}, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S), max_pool_connections=POOL
    )
    # The manager of connections makes its pools of these.
    http._manager.pool_classes_by_scheme = _pools(private)
    return http, client


@functools.cache
def _session() -> Any:
    """What clients are made of: reading what it knows of S3 costs half a second, so it is kept. It holds no secret."""
    import botocore.session
    from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES

    # No variable and no file of the machine's own user has a say.
    alone = {
        name: (None, None, default, convert)
        for name, (_, _, default, convert) in BOTOCORE_DEFAUT_SESSION_VARIABLES.items()
    }
    for name in ("config_file", "credentials_file"):
        alone[name] = (None, None, "/dev/null", None)
    return botocore.session.Session(session_vars=alone)


def _pools(private: bool) -> dict[str, Any]:
    """As botocore's own, but a connection to an address that may not be used ends before a byte is sent on it.

    The address is that of the connection itself: what a name meant when it was looked up before does not count.
    """
    from botocore.awsrequest import (
        AWSHTTPConnection,
        AWSHTTPConnectionPool,
        AWSHTTPSConnection,
        AWSHTTPSConnectionPool,
    )

    class Checked:
        def _new_conn(self) -> Any:
            made = super()._new_conn()  # type: ignore[misc]
            why = refused(made.getpeername()[0], private=private)
            if why is not None:
                made.close()
                raise S3Failure(
                    f"the server is at {why}; a pattern of policy.s3_endpoints that names it allows that"
                )
            return made

    plain = type("Plain", (Checked, AWSHTTPConnection), {})
    secure = type("Secure", (Checked, AWSHTTPSConnection), {})
    return {
        "http": type("PlainPool", (AWSHTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("SecurePool", (AWSHTTPSConnectionPool,), {"ConnectionCls": secure}),
    }
