"""Archives of images: what is packed is loaded and cloned the same; what is hostile is refused by name."""

import gzip
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.image_maker import config_of, layer, manifest_of
from worker.errors import ContractError, InvalidCommand, PolicyDenied, PullFailed, ResourceExhausted
from worker.images.archive import Archive
from worker.images.archive_load import Loaded, load_archive
from worker.images.archive_write import SavedImage, archive_pieces, archive_size, full_name
from worker.images.model import INDEX_TYPE, MANIFEST_TYPE, ImageConfig, oci_platform
from worker.images.registry.stopping import CalledOff, StopSignal
from worker.images.store import ImageStore
from worker.images.unpack_model import UnpackLimits
from worker.platform import driver

from .pack_help import SAMPLE, packed, plant, saved, write_archive
from .unpack_help import snapshot

SKOPEO = shutil.which("skopeo")
UMOCI = shutil.which("umoci")
HERE = oci_platform()
APP = {"app/run": b"#!/bin/sh\n", "app/data": bytes(range(256)) * 400}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    made = ImageStore.open(tmp_path / "images", driver())
    yield made
    made.close()


def load(store: ImageStore, path: Path, name: str | None = None, **more: Any) -> Loaded:
    options = {"allowed": lambda _: None, "here": HERE, "stop": StopSignal(), **more}
    return load_archive(store, path.resolve(), name, **options)


def digest_of(content: bytes) -> str:
    return f"sha256:{sha256(content).hexdigest()}"


def tar_of(files: dict[str, bytes | tarfile.TarInfo], *, compress: bool = False) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            if isinstance(content, bytes):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                archive.addfile(content)
    return gzip.compress(out.getvalue()) if compress else out.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def blob_name(content: bytes) -> str:
    return f"blobs/sha256/{sha256(content).hexdigest()}"


def layout_of(*images: tuple[bytes, bytes, list[bytes], dict[str, str]], **more: bytes) -> dict[str, Any]:
    """An OCI layout of (manifest, config, layers, annotations)."""
    files: dict[str, Any] = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', **more}
    entries = []
    for manifest, config, layers, marks in images:
        for content in (manifest, config, *layers):
            files[blob_name(content)] = content
        entries.append(
            {
                "mediaType": json.loads(manifest)["mediaType"],
                "digest": digest_of(manifest),
                "size": len(manifest),
                "annotations": marks,
            }
        )
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    return files


def app(platform: tuple[str, str] | None = None, **config: Any) -> tuple[bytes, bytes, list[bytes]]:
    made = [layer(APP), layer({"more": b"1"}, compress=False)]
    written = config_of(made, platform, **config)
    return manifest_of(made, written), written, [one.content for one in made]


def named(name: str) -> dict[str, str]:
    return {"org.opencontainers.image.ref.name": name}


def files_of(store: ImageStore, digest: str) -> dict[str, bytes]:
    root = store.layout.tree_path(store.layout.tree_of(digest).digest)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# -- pack, archive, load, clone


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
async def test_a_packed_tree_is_cloned_as_it_was(tmp_path: Path, store: ImageStore, compression: str) -> None:
    plant(tmp_path / "tree", SAMPLE)
    image = packed(
        tmp_path / "tree", tmp_path / "s", time_s=None, compression=compression, least_bytes=8192,
        config=ImageConfig(entrypoint=["/bin/tool"], env=["A=b"]),
    )  # fmt: skip
    made = write_archive(tmp_path / "app.tar", [saved(image, "tools:1", "registry.lan/tools:1")])
    loaded = load(store, made)
    assert [info.name for info in loaded.images] == ["tools:1", "registry.lan/tools:1"]
    assert {info.digest for info in loaded.images} == {image.digest}
    assert loaded.images[0].bytes == image.bytes
    assert store.config(image.digest).entrypoint == ["/bin/tool"]
    await store.clone(image.digest, tmp_path / "clone")
    tree, clone = snapshot(tmp_path / "tree"), snapshot(tmp_path / "clone")
    del tree[""], clone[""]
    assert clone == tree
    assert (tmp_path / "clone/bin/tool").stat().st_nlink == 2
    assert load(store, made).images == loaded.images


def test_equal_images_give_equal_archives(tmp_path: Path) -> None:
    made = []
    for name in ("one", "other"):
        plant(tmp_path / name, SAMPLE, start=1_600_000_000 + len(made))
        image = packed(tmp_path / name, tmp_path / f"s-{name}")
        made.append(b"".join(archive_pieces([saved(image, "a:1")])))
        assert len(made[0]) - archive_size([saved(image, "a:1")]) < 20_000
    assert made[0] == made[1]


def test_a_blob_that_changed_is_not_written(tmp_path: Path) -> None:
    plant(tmp_path / "tree", {"f": b"1"})
    image = saved(packed(tmp_path / "tree", tmp_path / "s"), "a:1")
    for mutate in (lambda path: path.write_bytes(b"short"), lambda path: path.write_bytes(bytes(9999))):
        mutate(image.layers[0].content)
        with pytest.raises(ValueError, match="damaged"):
            list(archive_pieces([image]))


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("web", "docker.io/library/web:latest"),
        ("team/web:1", "docker.io/team/web:1"),
        ("localhost:5000/web:2", "localhost:5000/web:2"),
        ("sha256:" + "0" * 64, None),
    ],
)
def test_full_names(name: str, full: str | None) -> None:
    assert full_name(name) == full


# -- what others write


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_what_docker_saved(tmp_path: Path, store: ImageStore, compress: bool, kind: bytes) -> None:
    """Before it wrote layouts: layers as they unpack, and a layer that comes twice as a link."""
    made = [layer(APP, compress=False), layer({"more": b"1"}, compress=False), layer(APP, compress=False)]
    config = config_of(made, Cmd=["/app/run"])
    target = "../aa/layer.tar" if kind == tarfile.SYMTYPE else "aa/layer.tar"
    files: dict[str, Any] = {
        "cc/layer.tar": link("cc/layer.tar", target, kind),
        "aa/layer.tar": made[0].tar,
        "bb/layer.tar": made[1].tar,
        "config.json": config,
        "repositories": b"{}",
        "manifest.json": json.dumps(
            [
                {
                    "Config": "config.json",
                    "RepoTags": ["app:1", "b@d:"],
                    "Layers": ["aa/layer.tar", "bb/layer.tar", "./cc/layer.tar"],
                }
            ]
        ).encode(),
    }
    if kind == tarfile.LNKTYPE:
        files["cc/layer.tar"] = files.pop("cc/layer.tar")
    (tmp_path / "docker.tar").write_bytes(tar_of(files, compress=compress))
    (image,) = load(store, tmp_path / "docker.tar").images
    assert image.name == "app:1"
    assert files_of(store, image.digest) == {**APP, "more": b"1"}
    assert store.config(image.digest).cmd == ["/app/run"]
    assert load(store, tmp_path / "docker.tar", "other:2").images[0].digest == image.digest


@pytest.mark.parametrize(
    ("marks", "name"),
    [
        (named("app:1"), "app:1"),
        (named("app"), "app"),
        ({**named("1"), "io.containerd.image.name": "docker.io/library/app:1"}, "docker.io/library/app:1"),
        ({**named("1"), "com.apple.containerization.image.name": "ghcr.io/a/b:1"}, "ghcr.io/a/b:1"),
        ({**named("a:1"), "io.containerd.image.name": "docker.io/library/a:1"}, "a:1"),
        ({**named("/:"), "io.containerd.image.name": "docker.io/library/a:1"}, "docker.io/library/a:1"),
    ],
)
def test_what_an_image_is_called(tmp_path: Path, store: ImageStore, marks: dict[str, str], name: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(layout_of((*app(), marks))))
    assert [info.name for info in load(store, tmp_path / "a.tar").images] == [name]


def test_names_that_are_missing(tmp_path: Path, store: ImageStore) -> None:
    other = app(Env=["A=1"])
    (tmp_path / "one.tar").write_bytes(tar_of(layout_of((*app(), {}))))
    with pytest.raises(PullFailed, match="give a name"):
        load(store, tmp_path / "one.tar")
    assert load(store, tmp_path / "one.tar", "mine:1").images[0].name == "mine:1"
    (tmp_path / "two.tar").write_bytes(tar_of(layout_of((*app(), {}), (*other, named("b:1")))))
    loaded = load(store, tmp_path / "two.tar")
    assert [info.name for info in loaded.images] == ["b:1"]
    assert loaded.warnings == ("1 images of the archive have no name and were left out",)
    with pytest.raises(InvalidCommand, match="2 images"):
        load(store, tmp_path / "two.tar", "mine:1")


def test_an_image_for_several_platforms(tmp_path: Path, store: ImageStore) -> None:
    """`docker save` lists every platform, and holds what was pulled."""
    ours, other = app(Env=["OURS=1"]), app(("plan9", "mips"))
    entries = [
        {"mediaType": MANIFEST_TYPE, "digest": digest_of(m), "size": len(m), "platform": p}
        for m, p in (
            (other[0], {"os": "plan9", "architecture": "mips"}),
            (b"absent", {"os": HERE[0], "architecture": HERE[1]}),
            (ours[0], {"os": HERE[0], "architecture": HERE[1]}),
        )
    ]
    index = json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}).encode()
    files = layout_of((*ours, {}), (*other, {}))
    files[blob_name(index)] = index
    top = {
        "mediaType": INDEX_TYPE,
        "digest": digest_of(index),
        "size": len(index),
        "annotations": named("a:1"),
    }
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [top]}).encode()
    (tmp_path / "a.tar").write_bytes(tar_of(files))
    loaded = load(store, tmp_path / "a.tar")
    assert loaded.images[0].digest == digest_of(ours[0])
    assert not loaded.warnings
    with pytest.raises(PullFailed, match="no image for plan9/arm64"):
        load(store, tmp_path / "a.tar", here=("plan9", "arm64"))


def test_all_images_of_an_archive_or_none(tmp_path: Path, store: ImageStore) -> None:
    made = [layer(APP), layer({"x": b"1"})]
    config = config_of([made[0], layer({"other": b"2"})])
    wrong = (manifest_of(made, config), config, [one.content for one in made])
    (tmp_path / "a.tar").write_bytes(tar_of(layout_of((*app(), named("good:1")), (*wrong, named("bad:1")))))
    with pytest.raises(PullFailed, match="the image's config says"):
        load(store, tmp_path / "a.tar")
    _nothing_left(store)


def test_another_platform_is_a_warning(tmp_path: Path, store: ImageStore) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(layout_of((*app(("plan9", "mips")), named("a:1")))))
    (warning,) = load(store, tmp_path / "a.tar").warnings
    assert "made for plan9/mips" in warning


# -- what is refused


def hostile() -> dict[str, tuple[Callable[[], bytes], str]]:
    """What an archive may be, and what is said of it."""
    manifest, config, layers = app()
    good = layout_of((manifest, config, layers, named("a:1")))

    def without(name: str) -> bytes:
        return tar_of({key: value for key, value in good.items() if key != name})

    def changed(name: str, content: Any) -> bytes:
        return tar_of({**good, name: content})

    def index(**entry: Any) -> bytes:
        base = {"mediaType": MANIFEST_TYPE, "digest": digest_of(manifest), "size": len(manifest)}
        return changed(
            "index.json", json.dumps({"schemaVersion": 2, "manifests": [{**base, **entry}]}).encode()
        )

    def docker(**entry: Any) -> bytes:
        base = {"Config": "c", "RepoTags": ["a:1"], "Layers": ["l"]}
        document = json.dumps([{**base, **entry}]).encode()
        return tar_of({"manifest.json": document, "c": config_of([layer(APP)]), "l": layer(APP).content})

    def other_config() -> bytes:
        wrong = config_of([layer({"other": b"x"})])
        return tar_of(
            layout_of((manifest_of([layer(APP)], wrong), wrong, [layer(APP).content], named("a:1")))
        )

    def twice() -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for content in (b"{}", b"[]"):
                info = tarfile.TarInfo("index.json")
                info.size = 2
                archive.addfile(info, io.BytesIO(content))
        return out.getvalue()

    layer_name = blob_name(layers[0])
    return {
        "empty": (lambda: b"", "no end marker"),
        "nothing in it": (lambda: tar_of({}), "neither index.json nor manifest.json"),
        "no tar": (lambda: b"hello" * 500, "checksum"),
        "cut": (lambda: tar_of(good)[:3000], "cut off"),
        "no end": (lambda: tar_of(good).rstrip(b"\0") + bytes(300), "cut off"),
        "damaged gzip": (lambda: tar_of(good, compress=True)[:-8] + bytes(8), "gzip"),
        "bzip2": (lambda: b"BZh" + bytes(600), "bzip2"),
        "a blob of another digest": (lambda: changed(layer_name, b"x" * len(layers[0])), "another digest"),
        "a layer that is missing": (lambda: without(layer_name), "is not in it"),
        "a config that is missing": (lambda: without(blob_name(config)), "is not in it"),
        "a manifest that is missing": (lambda: without(blob_name(manifest)), "is not in it"),
        "a name with ..": (lambda: changed("../../etc/cron.d/x", b"x"), "`..`"),
        "a device": (lambda: changed("null", _typed("null", tarfile.CHRTYPE)), "neither a file"),
        "a fifo": (lambda: changed("pipe", _typed("pipe", tarfile.FIFOTYPE)), "neither a file"),
        "a link for a document": (
            lambda: changed("index.json", link("index.json", "/etc/passwd")),
            "neither index.json",
        ),
        "links in a ring": (
            lambda: tar_of({"index.json": link("index.json", "b"), "b": link("b", "index.json")}),
            "neither index.json",
        ),
        "a name that comes twice": (twice, "twice"),
        "no JSON": (lambda: changed("index.json", b"hello"), "no JSON"),
        "nested JSON": (lambda: changed("index.json", b"[" * 100_000), "JSON"),
        "a key that comes twice": (
            lambda: changed("index.json", b'{"schemaVersion":2,"manifests":[],"manifests":[]}'),
            "twice",
        ),
        "no image": (lambda: changed("index.json", b'{"schemaVersion":2,"manifests":[]}'), "no image"),
        "index.json is a manifest": (lambda: changed("index.json", manifest), "index.json"),
        "a digest of another kind": (lambda: index(digest="md5:00"), "is not in it"),
        "another size": (lambda: index(size=1), "were said"),
        "another type": (lambda: index(mediaType=INDEX_TYPE), "says that it is"),
        "a config for other layers": (other_config, "the image's config says"),
        "docker: a path outside": (lambda: docker(Config="../../etc/passwd"), "is not in it"),
        "docker: an absolute path": (lambda: docker(Layers=["/etc/passwd"]), "is not in it"),
        "docker: no layers": (lambda: docker(Layers=[]), "0 layers"),
        "docker: too many layers": (lambda: docker(Layers=["l"] * 501), "501 layers"),
        "docker: the config is a layer": (lambda: docker(Config="l"), "config"),
        "docker: the layer is a config": (lambda: docker(Layers=["c"]), "layer 1 of 1"),
        "docker: no list": (lambda: tar_of({"manifest.json": b"{}"}), "manifest.json is refused"),
    }  # fmt: skip


def _typed(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    return info


@pytest.mark.parametrize("case", hostile())
def test_hostile_archives_are_refused(tmp_path: Path, store: ImageStore, case: str) -> None:
    build, said = hostile()[case]
    (tmp_path / "a.tar").write_bytes(build())
    with pytest.raises((PullFailed, InvalidCommand)) as refused:
        load(store, tmp_path / "a.tar", "a:1")
    assert said in refused.value.message, refused.value.message
    _nothing_left(store)


def _nothing_left(store: ImageStore) -> None:
    assert store.list() == []
    assert not list((store.layout.root / "staging").iterdir())
    assert not [path for path in (store.layout.root / "rootfs").iterdir() if path.name.startswith(".")]


def test_limits(tmp_path: Path) -> None:
    files = tar_of({str(number): b"x" * 100 for number in range(50)})
    for limits, said in (
        (UnpackLimits(entries=20), "more than 20 entries"),
        (UnpackLimits(bytes=10_000), "more than 10000 bytes"),
        (UnpackLimits(reserve_bytes=1 << 62), "no room"),
    ):
        folder = tmp_path / said.replace(" ", "-")
        folder.mkdir()
        with pytest.raises(ResourceExhausted, match=said):
            Archive.read(io.BytesIO(files), folder, lambda: None, limits=limits)
    bomb = gzip.compress(tar_of({"zeros": bytes(300 << 20)}), 9)
    (tmp_path / "bomb").mkdir()
    with pytest.raises(ResourceExhausted, match="bomb"):
        Archive.read(io.BytesIO(bomb), tmp_path / "bomb", lambda: None)


@pytest.mark.parametrize("what", ["missing", "link", "folder", "fifo"])
def test_what_is_no_archive_file(tmp_path: Path, store: ImageStore, what: str) -> None:
    import os

    path = tmp_path / "a.tar"
    if what == "link":
        path.symlink_to("/etc/passwd")
    elif what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    with pytest.raises(PullFailed, match=r"cannot be read|is no file") as refused:
        load_archive(
            store, tmp_path.resolve() / "a.tar", None, allowed=lambda _: None, here=HERE, stop=StopSignal()
        )
    assert refused.value.field == "source_file"


def test_a_name_that_is_not_allowed(tmp_path: Path, store: ImageStore) -> None:
    other = app(Env=["A=1"])
    files = layout_of((*app(), named("good:1")), (*other, named("bad:1")))
    (tmp_path / "a.tar").write_bytes(tar_of(files))

    def allowed(name: str) -> None:
        if name.startswith("bad"):
            raise PolicyDenied(name)

    with pytest.raises(PolicyDenied):
        load(store, tmp_path / "a.tar", allowed=allowed)
    _nothing_left(store)


def test_it_can_be_called_off(tmp_path: Path, store: ImageStore) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(layout_of((*app(), named("a:1")))))
    stop = StopSignal()
    stop.set()
    with pytest.raises(CalledOff):
        load(store, tmp_path / "a.tar", stop=stop)
    _nothing_left(store)


def test_errors_are_of_the_contract() -> None:
    assert issubclass(PullFailed, ContractError)


# -- beside other people's programs


def sample_archive(tmp_path: Path, **options: Any) -> tuple[SavedImage, Path]:
    plant(tmp_path / "tree", SAMPLE)
    image = packed(
        tmp_path / "tree", tmp_path / "s", config=ImageConfig(cmd=["/bin/tool"], labels={"l": "v"}), **options
    )
    made = saved(image, "team/app:1")
    return made, write_archive(tmp_path / "app.tar", [made])


def run(*argv: str | Path) -> bytes:
    return subprocess.run([str(word) for word in argv], check=True, capture_output=True).stdout


@pytest.mark.skipif(SKOPEO is None, reason="skopeo is not installed (a Debian package)")
@pytest.mark.parametrize("least", [32 << 20, 8192])
def test_skopeo_reads_and_writes_archives(tmp_path: Path, store: ImageStore, least: int) -> None:
    image, made = sample_archive(tmp_path, least_bytes=least)
    assert SKOPEO is not None
    for kind in ("oci-archive", "docker-archive"):
        source = f"{kind}:{made}:" + ("team/app:1" if kind == "oci-archive" else "docker.io/team/app:1")
        seen = json.loads(run(SKOPEO, "inspect", source))
        assert seen["Labels"] == {"l": "v"}
        assert len(seen["Layers"]) == len(image.layers)
        # skopeo writes both kinds; either is loaded to the tree that was packed.
        for target in ("oci-archive", "docker-archive"):
            copy = tmp_path / f"{kind}-{target}.tar"
            run(SKOPEO, "copy", "--insecure-policy", source, f"{target}:{copy}:copy/app:{kind}")
            loaded = load(store, copy).images[0]
            assert loaded.name.endswith(f"copy/app:{kind}")
            if (kind, target) == ("oci-archive", "oci-archive"):
                assert loaded.digest == image.manifest.digest
            assert store.layout.tree_of(loaded.digest).bytes == sum(
                path.stat().st_size for path in (tmp_path / "tree").rglob("*")
                if path.is_file() and not path.is_symlink() and path.name != "hard"
            )  # fmt: skip
    # The copies for docker, from either kind, are one image; the others are compressed by others.
    assert len({entry.digest for entry in store.list()}) == 3


@pytest.mark.skipif(UMOCI is None, reason="umoci is not installed (a Debian package)")
def test_umoci_unpacks_what_was_packed(tmp_path: Path) -> None:
    image, made = sample_archive(tmp_path, least_bytes=8192)
    with tarfile.open(made) as archive:
        archive.extractall(tmp_path / "layout", filter="data")
    assert UMOCI is not None
    index = json.loads((tmp_path / "layout/index.json").read_bytes())
    index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"] = "1"
    (tmp_path / "layout/index.json").write_text(json.dumps(index))
    run(UMOCI, "unpack", "--rootless", "--image", f"{tmp_path / 'layout'}:1", tmp_path / "bundle")
    tree, theirs = snapshot(tmp_path / "tree"), snapshot(tmp_path / "bundle" / "rootfs")
    del tree[""], theirs[""]
    strip = lambda found: {path: (facts[0], facts[1], facts[3]) for path, facts in found.items()}  # noqa: E731
    assert strip(theirs) == strip(tree)
    assert len(image.layers) > 1
