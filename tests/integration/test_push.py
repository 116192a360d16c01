"""Pushing to a registry that is strict, and to one that fails in all the ways registries and networks do."""

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.image_maker import config_of, layer, manifest_of
from tests.integration.pull_help import QUICK, Make, pullers, registry, store, tree_files, verified
from tests.integration.test_pull_others import DockerRegistry, docker_registry
from tests.registry_server import Registry, digest_of, running
from tests.unit.pack_help import SAMPLE, packed, plant, saved
from tests.unit.unpack_help import snapshot
from worker.errors import ContractError, Internal, PolicyDenied, PullFailed, Unavailable
from worker.images import push_blob
from worker.images.archive_write import SavedBlob, SavedImage
from worker.images.model import MANIFEST_TYPE
from worker.images.push import Parcel, Pushed, Reach, push
from worker.images.registry.credentials import Credentials
from worker.images.registry.reference import registry_image
from worker.images.registry.stopping import CalledOff, StopSignal
from worker.images.registry.transport import tls_context
from worker.images.registry.upload import Outgoing
from worker.images.store import ImageStore

__all__ = ["docker_registry", "pullers", "registry", "store"]  # fixtures

SKOPEO = shutil.which("skopeo")
MIB = 1 << 20


def outgoing(blob: SavedBlob) -> Outgoing:
    return Outgoing(digest=blob.digest, size=blob.size, content=blob.content)


def parcel_of(image: SavedImage, **more: Any) -> Parcel:
    blobs = (image.config, *image.layers)
    return Parcel(
        media_type=image.media_type,
        manifest=outgoing(image.manifest),
        blobs=tuple(map(outgoing, blobs)),
        **more,
    )


def of(content: bytes | Path) -> Outgoing:
    data = content if isinstance(content, bytes) else content.read_bytes()
    return Outgoing(digest=f"sha256:{sha256(data).hexdigest()}", size=len(data), content=content)


def big_parcel(folder: Path, *sizes: int) -> Parcel:
    """Layers of noise, from files."""
    blobs = []
    for number, size in enumerate(sizes):
        path = folder / f"blob-{number}"
        path.write_bytes(os.urandom(size))
        blobs.append(of(path))
    made = [layer({"x": b"1"})]
    config = config_of(made)
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": json.loads(manifest_of(made, config))["config"],
        "layers": [
            {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": b.digest, "size": b.size}
            for b in blobs
        ],
    }
    manifest = of(json.dumps(document).encode())
    return Parcel(media_type=MANIFEST_TYPE, manifest=manifest, blobs=(of(config), *blobs))


def send(
    parcel: Parcel, name: str, *, stop: StopSignal | None = None, tell: Any = None, **reach: Any
) -> Pushed:
    options = {"tls": tls_context(None), "patience": QUICK, **reach}
    return push(
        parcel,
        registry_image(name),
        Reach(**options),
        stop or StopSignal(),
        tell or (lambda digest, done: None),
    )


def has_all(registry: Registry, repository: str, parcel: Parcel, tag: str = "1") -> None:
    digest = registry.tags[repository][tag]
    assert digest == parcel.manifest.digest
    assert registry.manifests[repository][digest] == (parcel.media_type, parcel.manifest.content)
    for blob in parcel.blobs:
        kept = registry.blobs[repository][blob.digest]
        assert digest_of(kept if isinstance(kept, bytes) else kept.read_bytes()) == blob.digest


def patches(registry: Registry, digest_of_body: bool = False) -> list[tuple[str, int]]:
    """(Content-Range, size) of each PATCH."""
    return [(seen.headers.get("Content-Range", ""), len(seen.body)) for seen in registry.asked("^PATCH")]


# -- what arrives


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
async def test_packed_pushed_pulled_cloned(
    registry: Registry, store: ImageStore, pullers: Make, tmp_path: Path, compression: str
) -> None:
    plant(tmp_path / "tree", SAMPLE)
    image = packed(tmp_path / "tree", tmp_path / "s", time_s=None, compression=compression, least_bytes=8192)
    parcel = parcel_of(saved(image))
    name = f"{registry.host}/team/tools:1"
    done = send(parcel, name)
    assert (done.digest, done.sent, done.known) == (image.digest, len(image.layers) + 1, 0)
    assert done.bytes == sum(blob.size for blob in parcel.blobs)
    has_all(registry, "team/tools", parcel)
    pulled = await pullers().pull(name, "always")
    assert pulled.image.digest == image.digest
    await store.clone(image.digest, tmp_path / "clone")
    tree, clone = snapshot(tmp_path / "tree"), snapshot(tmp_path / "clone")
    del tree[""], clone[""]
    assert clone == tree
    verified(store)


def test_what_is_there_is_not_sent_again(registry: Registry, tmp_path: Path) -> None:
    parcel = big_parcel(tmp_path, 2 * MIB, 3 * MIB)
    name = f"{registry.host}/app:1"
    told: dict[str, int] = {}
    send(parcel, name, tell=told.__setitem__)
    assert told == {blob.digest: blob.size for blob in parcel.blobs}
    sent = len(registry.asked("^(POST|PATCH|PUT)"))
    assert send(parcel, name).known == 3
    assert len(registry.asked("^(POST|PATCH|PUT)")) == sent
    # Another tag: the blobs are asked for, the manifest is stored.
    again = send(parcel, f"{registry.host}/app:2")
    assert (again.sent, again.known) == (0, 3)
    has_all(registry, "app", parcel, "2")


def test_blobs_of_another_repository_are_mounted(registry: Registry, tmp_path: Path) -> None:
    parcel = big_parcel(tmp_path, 2 * MIB)
    for blob in parcel.blobs[:-1]:
        registry.add_blob("base", blob.content)
    done = send(msgspec_replace(parcel, mount_from="base"), f"{registry.host}/app:1")
    assert (done.mounted, done.sent) == (1, 1)
    has_all(registry, "app", parcel)


def msgspec_replace(parcel: Parcel, **changes: Any) -> Parcel:
    import msgspec

    return msgspec.structs.replace(parcel, **changes)


def test_the_manifest_comes_last(registry: Registry, tmp_path: Path) -> None:
    send(big_parcel(tmp_path, 2 * MIB, 100), f"{registry.host}/app:1")
    changing = [seen.method for seen in registry.asked("^(POST|PATCH|PUT)")]
    assert "manifests" in registry.asked("^(POST|PATCH|PUT)")[-1].path
    assert changing.count("PUT") == 4


# -- cuts, and what becomes of them


def test_a_cut_upload_goes_on_where_it_was(registry: Registry, tmp_path: Path) -> None:
    parcel = big_parcel(tmp_path, 5 * MIB)
    for at in (MIB, 2 * MIB):
        registry.fault("short", "PATCH", at=at)
    assert send(parcel, f"{registry.host}/app:1").sent == 2
    has_all(registry, "app", parcel)
    assert patches(registry) == [
        ("", MIB),
        (f"{MIB}-{5 * MIB - 1}", 2 * MIB),
        (f"{3 * MIB}-{5 * MIB - 1}", 2 * MIB),
    ]


def test_many_cuts_are_no_failure_while_it_goes_on(registry: Registry, tmp_path: Path) -> None:
    parcel = big_parcel(tmp_path, 4 * MIB)
    registry.fault("short", "PATCH", at=MIB // 4, times=QUICK.attempts * 3)
    send(parcel, f"{registry.host}/app:1")
    has_all(registry, "app", parcel)


def test_cuts_without_progress_are_given_up(registry: Registry, tmp_path: Path) -> None:
    registry.fault("short", "PATCH", at=0, times=-1)
    with pytest.raises(Unavailable, match=f"tried {QUICK.attempts} times") as failed:
        send(big_parcel(tmp_path, 2 * MIB), f"{registry.host}/app:1")
    assert failed.value.field == "target"
    assert registry.manifests == {}


def test_a_registry_that_forgets_uploads(registry: Registry, tmp_path: Path) -> None:
    """Cut each time, and nothing is left: from the start again, not for ever."""
    parcel = big_parcel(tmp_path, 2 * MIB)
    registry.fault("short", "PATCH", at=MIB, times=2)
    registry.fault("status", "GET /v2/app/blobs/uploads", status=404, times=2)
    send(parcel, f"{registry.host}/app:1")
    has_all(registry, "app", parcel)
    registry.fault("short", "PATCH", at=MIB, times=-1)
    registry.fault("status", "GET /v2/other/blobs/uploads", status=404, times=-1)
    with pytest.raises(Unavailable):
        send(parcel, f"{registry.host}/other:1")


def test_a_registry_that_is_wrong_about_how_far_it_is(registry: Registry, tmp_path: Path) -> None:
    """ECR's `Range` can stand still. The digest tells in the end, and the blob is sent anew."""
    parcel = big_parcel(tmp_path, 3 * MIB)
    registry.fault("short", "PATCH", at=2 * MIB)
    registry.fault("status", "GET /v2/app/blobs/uploads", status=204, headers={"Range": f"0-{MIB - 1}"})
    send(parcel, f"{registry.host}/app:1")
    has_all(registry, "app", parcel)
    assert patches(registry)[-1] == ("", 3 * MIB)


@pytest.mark.parametrize("refusal", [413, 416])
def test_what_is_too_large_goes_in_pieces(registry: Registry, tmp_path: Path, refusal: int) -> None:
    parcel = big_parcel(tmp_path, 9 * MIB)
    registry.fault("status", "PATCH", status=refusal)
    send(parcel, f"{registry.host}/app:1")
    has_all(registry, "app", parcel)
    assert [size for _, size in patches(registry)[1:]] == [4 * MIB, 4 * MIB, MIB]
    assert patches(registry)[2][0] == f"{4 * MIB}-{8 * MIB - 1}"


def test_pieces_are_as_large_as_the_registry_wants(registry: Registry, tmp_path: Path) -> None:
    session = {"Location": "/v2/app/blobs/uploads/aa", "OCI-Chunk-Min-Length": str(6 * MIB)}
    registry.uploads["aa"] = bytearray()
    parcel = big_parcel(tmp_path, 9 * MIB)
    registry.fault("status", "POST", status=202, headers=session, times=-1)
    registry.fault("status", "PATCH", status=413)
    small = registry.fault("status", f"HEAD .*{parcel.blobs[0].digest}", status=200, times=-1)
    registry.add_blob("app", parcel.blobs[0].content)
    send(parcel, f"{registry.host}/app:1")
    assert [size for _, size in patches(registry)[1:]] == [6 * MIB, 3 * MIB]
    assert small.times < 0


@pytest.mark.parametrize("status", [429, 500, 502, 503])
@pytest.mark.parametrize("where", ["HEAD", "POST", "PATCH", "PUT /v2/app/blobs", "PUT /v2/app/manifests"])
def test_a_registry_that_cannot_now(registry: Registry, tmp_path: Path, where: str, status: int) -> None:
    parcel = big_parcel(tmp_path, 2 * MIB)
    registry.fault("status", where, status=status, times=2, headers={"Retry-After": "0"})
    send(parcel, f"{registry.host}/app:1")
    has_all(registry, "app", parcel)


@pytest.mark.parametrize("kind", ["hang_up", "garbage", "head", "stall"])
@pytest.mark.parametrize("where", ["POST", "PATCH", "PUT"])
def test_a_broken_registry_ends_in_an_error(
    registry: Registry, tmp_path: Path, where: str, kind: str
) -> None:
    registry.fault(kind, where, times=-1, at=0)
    if kind == "stall":
        registry.faults.clear()
        registry.gate.clear()
    try:
        with pytest.raises((Unavailable, PullFailed)) as failed:
            send(big_parcel(tmp_path, 2 * MIB), f"{registry.host}/app:1")
    finally:
        registry.gate.set()
    assert failed.value.field == "target"


def test_nobody_there() -> None:
    with running() as gone:
        name = f"{gone.host}/app:1"
    with pytest.raises(Unavailable) as failed:
        send(Parcel(media_type=MANIFEST_TYPE, manifest=of(b"{}"), blobs=()), name)
    assert failed.value.field == "target"


def test_a_no_is_told(registry: Registry, tmp_path: Path) -> None:
    parcel = big_parcel(tmp_path, 2 * MIB)
    body = json.dumps({"errors": [{"code": "DENIED", "message": "read only"}]}).encode()
    for where in ("POST", "PATCH", "PUT /v2/app/manifests"):
        fault = registry.fault("status", where, status=403, body=body, times=-1)
        with pytest.raises(PullFailed, match=r"be pushed to app \(DENIED: read only\)") as failed:
            send(parcel, f"{registry.host}/app:1")
        fault.over.set()
        assert failed.value.field == "target"


def test_a_wrong_digest_back_is_refused(registry: Registry, tmp_path: Path) -> None:
    registry.fault(
        "status", "PUT /v2/app/manifests", status=201, headers={"Docker-Content-Digest": "sha256:" + "0" * 64}
    )
    with pytest.raises(PullFailed, match="stored sha256:0000"):
        send(big_parcel(tmp_path, 10), f"{registry.host}/app:1")


def test_a_damaged_blob_is_found(registry: Registry, tmp_path: Path) -> None:
    parcel = big_parcel(tmp_path, 2 * MIB)
    content = parcel.blobs[1].content
    assert isinstance(content, Path)
    content.write_bytes(b"x" * 2 * MIB)
    with pytest.raises(Internal, match="damaged: it has another digest"):
        send(parcel, f"{registry.host}/app:1")
    content.write_bytes(b"x" * MIB)
    with pytest.raises(Internal, match="shorter"):
        send(parcel, f"{registry.host}/app:1")
    assert registry.manifests == {}


def test_it_can_be_called_off(registry: Registry, tmp_path: Path) -> None:
    stop = StopSignal()
    threading.Timer(0.2, stop.set).start()
    registry.gate.clear()
    try:
        with pytest.raises(CalledOff):
            send(big_parcel(tmp_path, 2 * MIB), f"{registry.host}/app:1", stop=stop)
    finally:
        registry.gate.set()


# -- who is let in, and where it leads


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_logins(tmp_path: Path, auth: str) -> None:
    parcel = big_parcel(tmp_path, 2 * MIB, 10)
    with running(auth=auth, users={"ann": "s3cret"}) as registry:
        name = f"{registry.host}/app:1"
        send(parcel, name, credentials=Credentials("ann", "s3cret"))
        has_all(registry, "app", parcel)
        for credentials in (None, Credentials("ann", "wrong")):
            with pytest.raises(PullFailed, match=r"denies|refused|does not let|no access") as failed:
                send(parcel, f"{registry.host}/other:1", credentials=credentials)
            assert failed.value.field == "target"
            assert "wrong" not in failed.value.message
        assert "other" not in registry.manifests


def test_a_token_that_ends_is_renewed(tmp_path: Path) -> None:
    parcel = big_parcel(tmp_path, 2 * MIB, 2 * MIB)
    with running(auth="bearer", users={"ann": "s3cret"}) as registry:
        challenge = f'Bearer realm="{registry.url}/token",service="x",scope="repository:app:pull,push"'
        registry.fault("status", "PATCH", status=401, headers={"WWW-Authenticate": challenge})
        send(parcel, f"{registry.host}/app:1", credentials=Credentials("ann", "s3cret"))
        has_all(registry, "app", parcel)


def test_credentials_stay_at_the_registry(registry: Registry, tmp_path: Path) -> None:
    """The upload's address may be elsewhere: the password does not go along."""
    with running(auth="basic", users={"ann": "s3cret"}) as first:
        parcel = big_parcel(tmp_path, 2 * MIB)
        registry.uploads["aa"] = bytearray()
        elsewhere = {"Location": f"{registry.url}/v2/app/blobs/uploads/aa"}
        first.fault("status", "POST", status=202, headers=elsewhere, times=-1)
        first.add_blob("app", parcel.blobs[0].content)
        first.add_blob("app", parcel.blobs[1].content)
        first.fault("status", f"HEAD .*{parcel.blobs[1].digest}", status=404, times=-1)
        send(parcel, f"{first.host}/app:1", credentials=Credentials("ann", "s3cret"))
    assert parcel.blobs[1].digest in registry.blobs["app"]
    assert not any("Authorization" in seen.headers for seen in registry.seen)


@pytest.mark.parametrize("location", ["ftp://localhost/x", "http://[", "\x7f", "http://registry.example/x"])
def test_where_an_upload_may_not_go(registry: Registry, tmp_path: Path, location: str) -> None:
    registry.fault("status", "POST", status=202, headers={"Location": location}, times=-1)
    with pytest.raises(ContractError) as failed:
        send(
            big_parcel(tmp_path, 2 * MIB),
            f"{registry.host}/app:1",
            resolve=lambda host, port: ["169.254.169.254"] if host == "registry.example" else ["127.0.0.1"],
        )
    assert isinstance(failed.value, PullFailed | PolicyDenied)
    assert failed.value.field == "target"


# -- how much it takes


def test_memory_is_bounded(registry: Registry, tmp_path: Path) -> None:
    """A large layer, in a process of its own, against a sink that keeps nothing."""
    script = f"""
        import os, resource, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path.cwd())!r})
        from tests.integration.test_push import grown_by_push
        print(grown_by_push(Path(sys.argv[1]), {400 * MIB}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 48 * MIB


def grown_by_push(folder: Path, size: int) -> int:
    """By how much a push of a sparse blob of that size lets the process grow."""
    path = folder / "sparse"
    with path.open("wb") as file:
        file.truncate(size)
    digest = sha256()
    for _ in range(size // MIB):
        digest.update(bytes(MIB))
    blob = Outgoing(digest=f"sha256:{digest.hexdigest()}", size=size, content=path)
    sink = Sink()
    try:
        parcel = Parcel(media_type=MANIFEST_TYPE, manifest=of(b"{}"), blobs=(blob,))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        send(parcel, f"localhost:{sink.port}/app:1")
        assert sink.received == size
    finally:
        sink.close()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


class Sink:
    """Answers every step of a push and forgets what it is sent."""

    def __init__(self) -> None:
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        sink = self
        self.received = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                return None

            def _serve(self) -> None:
                left = int(self.headers.get("Content-Length", "0"))
                while left:
                    data = self.rfile.read(min(left, 65536))
                    left -= len(data)
                    if self.command == "PATCH":
                        sink.received += len(data)
                status = {"HEAD": 404, "GET": 200, "POST": 202, "PATCH": 202, "PUT": 201}[self.command]
                self.send_response(status)
                self.send_header("Location", "/upload")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET = do_POST = do_PATCH = do_PUT = _serve

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


# -- beside other people's programs


async def test_to_dockers_registry(
    docker_registry: DockerRegistry, store: ImageStore, pullers: Make, tmp_path: Path
) -> None:
    plant(tmp_path / "tree", {**SAMPLE, "noise": os.urandom(3 * MIB)})
    image = packed(tmp_path / "tree", tmp_path / "s", least_bytes=8192)
    name = f"{docker_registry.host}/team/tools:1"
    parcel = parcel_of(saved(image))
    assert send(parcel, name).sent == len(image.layers) + 1
    assert send(parcel, name).known == len(image.layers) + 1
    mounted = send(msgspec_replace(parcel, mount_from="team/tools"), f"{docker_registry.host}/other:1")
    assert (mounted.mounted, mounted.sent) == (len(image.layers) + 1, 0)
    pulled = await pullers().pull(f"{docker_registry.host}/other:1", "always")
    assert pulled.image.digest == image.digest
    assert tree_files(store, image.digest)["bin/tool"] == SAMPLE["bin/tool"][1]
    if SKOPEO is not None:
        seen = subprocess.check_output([SKOPEO, "inspect", "--tls-verify=false", f"docker://{name}"])
        assert json.loads(seen)["Digest"] == image.digest


async def test_pieces_to_dockers_registry(
    docker_registry: DockerRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would be behind a proxy that takes no more than 4 MiB at a time."""
    parcel = big_parcel(tmp_path, 9 * MIB)
    original = push_blob.Upload._attempt

    def attempt(self: Any, mount_from: str | None) -> str:
        self._piece = push_blob.PIECE_BYTES
        return original(self, mount_from)

    monkeypatch.setattr(push_blob.Upload, "_attempt", attempt)
    assert send(parcel, f"{docker_registry.host}/app:1").sent == 2
