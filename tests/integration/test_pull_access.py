"""Who is let in, over what, and where credentials and connections may go."""

import base64
import json
import os
import ssl
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.image_maker import layer, put_image
from tests.integration.pull_help import APP, NOW, QUICK, Make, Secrets, pullers, registry, store, verified
from tests.registry_server import Registry, running
from worker.errors import Configuration, PolicyDenied, PullFailed
from worker.images.registry import channel
from worker.images.registry.addresses import NOT_PUBLIC
from worker.images.store import ImageStore

__all__ = ["pullers", "registry", "store"]  # fixtures

USERS = {"ann": "s3cret:with colon"}
BASIC = "Basic " + base64.b64encode(b"ann:s3cret:with colon").decode()


def authority(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate authority of our own, and a server's context for `localhost`."""
    folder.mkdir()

    def openssl(*argv: str) -> None:
        subprocess.run(["openssl", *argv], cwd=folder, check=True, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test ca"
    )
    openssl("req", *curve, "-keyout", "key.pem", "-out", "csr.pem", "-subj", "/CN=localhost")
    (folder / "san").write_text("subjectAltName=DNS:localhost\n")
    openssl(
        "x509", "-req", "-in", "csr.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
        "-days", "2", "-extfile", "san", "-out", "cert.pem",
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return folder / "ca.pem", context


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    return authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture
def encrypted(tls: tuple[Path, ssl.SSLContext]) -> Iterator[Registry]:
    with running(tls=tls[1]) as made:
        yield made


# -- TLS


async def test_a_private_authority(
    encrypted: Registry, tls: tuple[Path, ssl.SSLContext], store: ImageStore, pullers: Make
) -> None:
    put_image(encrypted, "app", [layer(APP)], "latest")
    name = f"{encrypted.host}/app"
    with pytest.raises(PullFailed, match="certificate is not trusted: unable to get local issuer"):
        await pullers().pull(name, NOW)
    assert encrypted.asked("manifests") == []
    assert (await pullers(images={"ca": str(tls[0])}).pull(name, NOW)).fetched
    verified(store)


async def test_a_certificate_for_another_name(
    encrypted: Registry, tls: tuple[Path, ssl.SSLContext], pullers: Make
) -> None:
    put_image(encrypted, "app", [layer(APP)], "latest")
    puller = pullers(
        images={"ca": str(tls[0])},
        policy={"images": ("registry.test:*/*",)},
        resolve=lambda host, port: ["127.0.0.1"],
    )
    with pytest.raises(PullFailed, match=r"certificate is not trusted: .*mismatch"):
        await puller.pull(f"registry.test:{encrypted.port}/app", NOW)


async def test_an_authority_that_cannot_be_read(tmp_path: Path, store: ImageStore, pullers: Make) -> None:
    (tmp_path / "ca.pem").write_text("nothing of the kind")
    for name in ("ca.pem", "missing.pem"):
        with pytest.raises(Configuration, match=rf"images\.ca: .*{name}"):
            pullers(images={"ca": str(tmp_path / name)})


async def test_plain_http_only_where_it_is_allowed(
    registry: Registry, store: ImageStore, pullers: Make
) -> None:
    put_image(registry, "app", [layer(APP)], "latest")
    host = f"registry.test:{registry.port}"
    at_home = {"resolve": lambda host, port: ["127.0.0.1"], "policy": {"images": ("registry.test:*/*",)}}
    short = msgspec.structs.replace(QUICK, connect_s=0.5, attempts=1)
    with pytest.raises(PullFailed, match="TLS"):
        await pullers(patience=short, **at_home).pull(f"{host}/app", NOW)
    assert registry.asked("manifests") == []
    assert (await pullers(images={"plain_http": (host,)}, **at_home).pull(f"{host}/app", NOW)).fetched


# -- logging in


@pytest.mark.parametrize("kind", ["basic", "bearer"])
async def test_a_secret_of_the_node(store: ImageStore, pullers: Make, kind: str) -> None:
    with running(auth=kind, users=USERS, public=("open",)) as registry:
        put_image(registry, "team/private", [layer(APP)], "latest")
        put_image(registry, "open", [layer({"free": b"1"})], "latest")
        name = f"{registry.host}/team/private"
        secrets = Secrets(
            good="ann:s3cret:with colon",
            json=json.dumps({"username": "ann", "password": "s3cret:with colon"}),
            config=json.dumps({"auths": {registry.host: {"auth": BASIC.removeprefix("Basic ")}}}),
            bad="ann:wrong",
            other=json.dumps({"auths": {"elsewhere.test": {"auth": BASIC.removeprefix("Basic ")}}}),
            nonsense="no colon",
        )
        grants = {key: ("localhost:*",) for key in (*secrets.values, "missing")}
        puller = pullers(secrets=secrets, policy={"registry_secrets": grants})
        for auth, message in (
            (None, "denies access"),
            ("bad", "denies access|credentials were refused"),
            ("other", "no credentials for localhost"),
            ("nonsense", "neither `user:password` nor JSON"),
            ("missing", "has no secret missing"),
        ):
            with pytest.raises(PullFailed, match=message) as caught:
                await puller.pull(name, NOW, auth)
            assert "wrong" not in str(caught.value)
            assert "s3cret" not in str(caught.value)
        for auth in ("good", "json", "config"):
            assert (await puller.pull(name, NOW, auth)).image.name == name
        assert (await puller.pull(f"{registry.host}/open", NOW)).fetched
        verified(store)


async def test_a_secret_goes_only_where_it_may(registry: Registry, pullers: Make) -> None:
    put_image(registry, "app", [layer(APP)], "latest")
    puller = pullers(
        secrets=Secrets(hub="a:b"), policy={"registry_secrets": {"hub": ("docker.io", "*.test")}}
    )
    with pytest.raises(PolicyDenied, match=r"may not be sent to localhost:\d+; .*registry_secrets") as caught:
        await puller.pull(f"{registry.host}/app", NOW, "hub")
    assert caught.value.field == "auth"
    assert registry.seen == []


async def test_one_token_for_all_and_a_new_one_when_it_ends(store: ImageStore, pullers: Make) -> None:
    with running(auth="bearer", public=("app",)) as registry:
        put_image(registry, "app", [layer(APP), layer({"b": b"2"}), layer({"c": b"3"})], "latest")
        puller = pullers()
        assert (await puller.pull(f"{registry.host}/app", NOW)).fetched
        assert len(registry.asked("/token")) == 1
        await store.remove(f"{registry.host}/app")
        # The registry forgets its tokens in the middle of a pull.
        fault = registry.fault("status", "GET .*/blobs/", status=401)
        fault.headers["WWW_Authenticate"] = (
            f'Bearer realm="{registry.url}/token",service="registry.test",scope="repository:app:pull"'
        )
        asked = len(registry.asked("/token"))
        with pytest.raises(PullFailed, match="denies access"):
            # The same challenge to a token that has just been given: it means no.
            await puller.pull(f"{registry.host}/app", NOW)
        assert len(registry.asked("/token")) == asked + 1


async def test_an_identity_token(tmp_path: Path, store: ImageStore, pullers: Make) -> None:
    with running(auth="bearer") as registry:
        put_image(registry, "app", [layer(APP)], "latest")
        registry.refresh_tokens["refresh-me"] = "ann"
        config = docker_config(tmp_path, {"auths": {registry.host: {"identitytoken": "refresh-me"}}})
        assert (await pullers(images={"docker_config": config}).pull(f"{registry.host}/app", NOW)).fetched
        (asked,) = registry.asked("POST /token")
        assert b"grant_type=refresh_token" in asked.body
        assert "Authorization" not in asked.headers


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"kind": "body", "status": 200, "body": b"{}"}, "gave no token"),
        ({"kind": "body", "status": 200, "body": b'{"token": "a\\nb"}'}, "gave no token"),
        ({"kind": "body", "status": 200, "body": b'{"token": 5}'}, "gave no token"),
        ({"kind": "body", "status": 200, "body": b"<html>"}, "does not answer in JSON"),
        ({"kind": "body", "status": 200, "body": b'{"token": "guess"}'}, "denies access"),
        ({"kind": "status", "status": 403}, "no access without credentials"),
        ({"kind": "status", "status": 500}, "asking for a token: 500"),
        ({"kind": "endless"}, "larger than"),
        ({"kind": "redirect", "url": "http://169.254.169.254/"}, "asking for a token: 307"),
    ],
)
async def test_a_token_server_that_fails(pullers: Make, fault: dict[str, object], message: str) -> None:
    with running(auth="bearer", public=("app",)) as registry:
        put_image(registry, "app", [layer(APP)], "latest")
        registry.fault(match="/token", times=-1, **fault)  # type: ignore[arg-type]
        with pytest.raises(PullFailed, match=message):
            await pullers().pull(f"{registry.host}/app", NOW)


@pytest.mark.parametrize(
    ("challenge", "message"),
    [
        ('Bearer realm="http://169.254.169.254/token"', "metadata"),
        ('Bearer realm="file:///etc/passwd"', "no address of a web server"),
        ('Bearer service="x"', "no address of a web server"),
        ("Negotiate", "unknown kind: negotiate"),
        ("", "unknown kind: nothing"),
    ],
)
async def test_a_challenge_that_is_not_answered(
    registry: Registry, pullers: Make, challenge: str, message: str
) -> None:
    put_image(registry, "app", [layer(APP)], "latest")
    registry.fault("status", "manifests", times=-1, status=401, headers={"WWW-Authenticate": challenge})
    with pytest.raises((PullFailed, PolicyDenied), match=message):
        await pullers().pull(f"{registry.host}/app", NOW)


async def test_a_token_server_without_tls_gets_nothing_of_a_registry_with(
    encrypted: Registry, registry: Registry, tls: tuple[Path, ssl.SSLContext], pullers: Make, tmp_path: Path
) -> None:
    """`registry` plays the eavesdropper's token server."""
    put_image(encrypted, "app", [layer(APP)], "latest")
    encrypted.auth, encrypted.realm = "bearer", f"{registry.url}/token"
    name = f"registry.test:{encrypted.port}"
    config = docker_config(tmp_path, {"auths": {name: {"auth": BASIC.removeprefix("Basic ")}}})
    context = pullers(
        images={"ca": str(tls[0]), "docker_config": config},
        policy={"images": ("registry.test:*/*",)},
        resolve=lambda host, port: ["127.0.0.1"],
    )
    context._tls.check_hostname = False
    with pytest.raises(PullFailed, match="not encrypted"):
        await context.pull(f"{name}/app", NOW)
    assert registry.seen == []


# -- redirects


async def test_credentials_stay_with_their_registry(store: ImageStore, pullers: Make) -> None:
    users = {"ann": "s3cret"}
    with running(auth="basic", users=users) as registry, running() as elsewhere:
        made = layer(APP)
        put_image(registry, "app", [made], "latest")
        elsewhere.add_blob("app", made.content)
        place = f"{elsewhere.url}/v2/app/blobs/{made.digest}?X-Signature=a%2Fb%3D&x=1"
        registry.fault("redirect", f"blobs/{made.digest}", url=place)
        puller = pullers(
            secrets=Secrets(s="ann:s3cret"), policy={"registry_secrets": {"s": ("localhost:*",)}}
        )
        assert (await puller.pull(f"{registry.host}/app", NOW, "s")).fetched
        (there,) = elsewhere.seen
        assert "Authorization" not in there.headers
        assert there.path.endswith("?X-Signature=a%2Fb%3D&x=1")  # a signed address arrives as it was
        assert all("Authorization" in seen.headers for seen in registry.asked("blobs"))
        verified(store)


async def test_a_permission_that_ran_out_is_asked_for_again(store: ImageStore, pullers: Make) -> None:
    with running() as registry, running() as elsewhere:
        made = layer(APP)
        put_image(registry, "app", [made], "latest")
        elsewhere.add_blob("app", made.content)
        elsewhere.fault("status", "blobs", status=403)
        registry.fault(
            "redirect", f"blobs/{made.digest}", times=2, url=f"{elsewhere.url}/v2/app/blobs/{made.digest}"
        )
        assert (await pullers().pull(f"{registry.host}/app", NOW)).fetched
        assert len(registry.asked(f"blobs/{made.digest}")) == 2


async def test_no_way_from_tls_to_plain_http(
    encrypted: Registry, registry: Registry, tls: tuple[Path, ssl.SSLContext], pullers: Make
) -> None:
    made = layer(APP)
    put_image(encrypted, "app", [made], "latest")
    registry.add_blob("app", made.content)
    encrypted.fault(
        "redirect", f"blobs/{made.digest}", times=-1, url=f"{registry.url}/v2/app/blobs/{made.digest}"
    )
    with pytest.raises(PullFailed, match="leads away from https"):
        await pullers(images={"ca": str(tls[0])}).pull(f"{encrypted.host}/app", NOW)
    assert registry.seen == []


# -- addresses


@pytest.mark.parametrize(
    ("address", "named", "message"),
    [
        ("127.0.0.1", False, "not public; .*registry.test:5000/"),
        ("10.1.2.3", False, "not public"),
        ("169.254.169.254", True, "metadata"),
        ("::ffff:169.254.169.254", True, "metadata"),
        ("fe80::1", True, "metadata"),
        ("0.0.0.0", True, "no address of a host"),
    ],
)
async def test_addresses_that_are_refused(
    store: ImageStore, pullers: Make, address: str, named: bool, message: str
) -> None:
    policy = {"images": ("registry.test:5000/*",) if named else ("*",)}
    puller = pullers(policy=policy, resolve=lambda host, port: [address])
    with pytest.raises(PolicyDenied, match=message) as caught:
        await puller.pull("registry.test:5000/app", NOW)
    assert caught.value.field == "image"


async def test_this_machines_own_registry_must_be_named(registry: Registry, pullers: Make) -> None:
    put_image(registry, "app", [layer(APP)], "latest")
    with pytest.raises(PolicyDenied, match="not public"):
        await pullers(policy={"images": ("*",)}).pull(f"{registry.host}/app", NOW)
    assert registry.seen == []


async def test_a_registry_may_not_lead_to_the_neighbours(
    registry: Registry, store: ImageStore, pullers: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A public registry that sends the node to one of its own network's hosts."""
    made = layer(APP)
    put_image(registry, "app", [made], "latest")
    # For the test this machine's own address counts as public.
    monkeypatch.setattr(
        channel, "refused", lambda text, *, private: None if text == "127.0.0.1" else NOT_PUBLIC
    )
    addresses = {"localhost": "127.0.0.1", "printer.lan": "10.0.0.7"}
    registry.fault("redirect", f"blobs/{made.digest}", url="http://printer.lan/status")
    puller = pullers(policy={"images": ("*",)}, resolve=lambda host, port: [addresses[host]])
    with pytest.raises(PolicyDenied, match="an address that is not public"):
        await puller.pull(f"{registry.host}/app", NOW)


# -- docker's configuration


def docker_config(folder: Path, document: object) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(document))
    path.chmod(0o600)
    return str(path)


def helper(folder: Path, name: str, script: str) -> None:
    path = folder / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


async def test_dockers_config(tmp_path: Path, store: ImageStore, pullers: Make) -> None:
    with running(auth="basic", users=USERS) as registry:
        put_image(registry, "app", [layer(APP)], "latest")
        name = f"{registry.host}/app"
        entry = {"auth": BASIC.removeprefix("Basic ")}
        config = docker_config(tmp_path, {"auths": {f"https://{registry.host}/v1/": entry}})
        assert (await pullers(images={"docker_config": config}).pull(name, NOW)).fetched
        os.chmod(config, 0o666)
        with pytest.raises(PullFailed, match="can be written by others"):
            await pullers(images={"docker_config": config}).pull(name, NOW)


async def test_a_credential_helper(
    tmp_path: Path, store: ImageStore, pullers: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SANDFLEET_NATS_TOKEN", "not for helpers")
    with running(auth="basic", users=USERS) as registry:
        put_image(registry, "app", [layer(APP)], "latest")
        config = docker_config(tmp_path, {"credHelpers": {registry.host: "vault"}, "credsStore": "none"})
        answer = json.dumps({"Username": "ann", "Secret": USERS["ann"]})
        helper(
            tmp_path,
            "vault",
            f'test "$1" = get && read host; test "$host" = {registry.host} || exit 3\n'
            f"env > {tmp_path}/seen\necho '{answer}'",
        )
        assert (await pullers(images={"docker_config": config}).pull(f"{registry.host}/app", NOW)).fetched
        assert "not for helpers" not in (tmp_path / "seen").read_text()
        verified(store)
