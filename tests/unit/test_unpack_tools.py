"""Layers that other programs made: GNU tar, bsdtar, umoci, where they are installed."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from worker.images.unpack import LayerFile, unpack_layers

from .unpack_help import Tree, look, snapshot

NS = 1_000_000_000
HOLE = 5 << 20


def _tool(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


def _gnu_tar() -> str | None:
    for path in filter(None, (shutil.which("tar"), shutil.which("gtar"))):
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        if "GNU tar" in said:
            return path
    return None


GNU_TAR = _gnu_tar()
BSDTAR = _tool("bsdtar")
UMOCI = _tool("umoci")

needs_gnu_tar = pytest.mark.skipif(GNU_TAR is None, reason="GNU tar is not installed")
needs_bsdtar = pytest.mark.skipif(BSDTAR is None, reason="bsdtar is not installed")
needs_umoci = pytest.mark.skipif(UMOCI is None or os.geteuid() != 0, reason="needs umoci, and root to run it")


def plant(top: Path) -> None:
    """A bit of everything."""
    (top / "d" / "e").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "d" / "f").write_bytes(b"hello")
    (top / "d" / "e" / "ünï\ncode").write_bytes(b"names")
    os.link(top / "d" / "f", top / "d" / "hard")
    (top / "link").symlink_to("/etc/passwd")
    deep = top
    for _ in range(4):
        deep = deep / ("p" * 45)
        deep.mkdir()
    (deep / ("long" * 20)).write_bytes(b"long")
    (top / "longlink").symlink_to("t" * 150)
    with open(top / "sparse", "wb") as file:
        for at in range(6):
            file.seek(at * (HOLE // 5) + 4096)
            file.write(b"%d" % at * 5000)
        file.truncate(HOLE * 2)
    (top / "d" / "e").chmod(0o555)
    (top / "d" / "f").chmod(0o4711)
    for number, path in enumerate(sorted(top.rglob("*"), key=lambda path: -len(path.parts))):
        os.utime(path, ns=(NS, (1_600_000_000 + number) * NS + 123_456_789), follow_symlinks=False)
    os.utime(top, ns=(NS, 77 * NS))


def unpacked(blob: Path, dest: Path) -> Tree:
    dest.mkdir()
    layer = LayerFile(path=blob, media_type="application/vnd.oci.image.layer.v1.tar")
    unpack_layers([layer], dest, keep_setuid=True)
    return snapshot(dest)


def whole_seconds(tree: Tree) -> Tree:
    return {path: (*facts[:2], facts[2] // NS, *facts[3:]) for path, facts in tree.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    top = tmp_path / "source"
    top.mkdir()
    plant(top)
    return top


def check(source: Path, blob: Path, exact: bool) -> None:
    dest = source.parent / "dest"
    found, wanted = unpacked(blob, dest), snapshot(source)
    assert found == wanted if exact else whole_seconds(found) == whole_seconds(wanted)
    assert (dest / "d/f").stat().st_nlink == 2


@needs_gnu_tar
@pytest.mark.parametrize("form", ["gnu", "oldgnu", "posix"])
@pytest.mark.parametrize("sparse", [[], ["-S"]], ids=["whole", "sparse"])
def test_gnu_tar(source: Path, form: str, sparse: list[str]) -> None:
    blob = source.parent / "layer.tar"
    subprocess.run([str(GNU_TAR), f"--format={form}", *sparse, "-cf", blob, "-C", source, "."], check=True)
    check(source, blob, exact=form == "posix")
    if sparse:
        assert (source.parent / "dest" / "sparse").stat().st_blocks * 512 < HOLE


@needs_gnu_tar
@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_sparse_formats_of_gnu_tar(source: Path, version: str) -> None:
    blob = source.parent / "layer.tar"
    form = ["--format=posix", "-S", f"--sparse-version={version}"]
    subprocess.run([str(GNU_TAR), *form, "-cf", blob, "-C", source, "."], check=True)
    assert blob.stat().st_size < HOLE
    check(source, blob, exact=True)


@needs_gnu_tar
@pytest.mark.parametrize("form", ["ustar", "v7"])
def test_old_formats_of_gnu_tar(source: Path, form: str) -> None:
    """These have no room for long names."""
    blob = source.parent / "layer.tar"
    subprocess.run([str(GNU_TAR), f"--format={form}", "-cf", blob, "-C", source, "d"], check=True)
    found = whole_seconds(unpacked(blob, source.parent / "dest"))
    wanted = whole_seconds(snapshot(source))
    assert {path for path in found if path} == {path for path in wanted if path.startswith("d")}
    assert all(found[path] == wanted[path] for path in found if path)


@needs_gnu_tar
def test_extended_attributes_of_gnu_tar(source: Path) -> None:
    try:
        os.setxattr(source / "d" / "f", "user.note", b"\0binary\n")
    except (OSError, AttributeError):
        pytest.skip("the file system keeps no attributes")
    blob = source.parent / "layer.tar"
    subprocess.run([str(GNU_TAR), "--format=posix", "--xattrs", "-cf", blob, "-C", source, "."], check=True)
    check(source, blob, exact=True)


@needs_bsdtar
@pytest.mark.parametrize("form", ["pax", "gnutar"])
def test_bsdtar(source: Path, form: str) -> None:
    blob = source.parent / "layer.tar"
    utf8 = {**os.environ, "LC_ALL": "C.UTF-8"}
    made = subprocess.run(
        [str(BSDTAR), f"--format={form}", "-cf", blob, "-C", source, "."], env=utf8, check=False
    )
    assert made.returncode == 0
    check(source, blob, exact=form == "pax")


class Umoci:
    """An image in an OCI layout, changed as its user would."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.image = home / "oci"
        self.run("init", "--layout", str(self.image))
        self.run("new", "--image", f"{self.image}:base")

    def run(self, *arguments: str) -> None:
        subprocess.run([str(UMOCI), *arguments], check=True, capture_output=True)

    def bundle(self, tag: str) -> Path:
        path = self.home / f"bundle-{tag}"
        self.run("unpack", "--image", f"{self.image}:{tag}", str(path))
        return path

    def repack(self, tag: str, bundle: Path) -> None:
        self.run("repack", "--image", f"{self.image}:{tag}", str(bundle))

    def layers(self, tag: str) -> list[LayerFile]:
        index = json.loads((self.image / "index.json").read_bytes())
        name = "org.opencontainers.image.ref.name"
        entry = next(item for item in index["manifests"] if item["annotations"][name] == tag)
        manifest = self._document(entry["digest"])
        config = self._document(manifest["config"]["digest"])
        pairs = zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True)
        return [
            LayerFile(path=self._blob(layer["digest"]), media_type=layer["mediaType"], diff_id=diff_id)
            for layer, diff_id in pairs
        ]

    def _blob(self, digest: str) -> Path:
        path = self.image / "blobs" / Path(*digest.split(":"))
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        return path

    def _document(self, digest: str) -> Any:
        return json.loads(self._blob(digest).read_bytes())


@needs_umoci
def test_an_image_of_umoci(tmp_path: Path) -> None:
    umoci = Umoci(tmp_path)
    bundle = umoci.bundle("base")
    plant(bundle / "rootfs")
    (bundle / "rootfs" / "gone" / "deep").mkdir(parents=True)
    (bundle / "rootfs" / "changes").write_bytes(b"1")
    umoci.repack("one", bundle)
    bundle = umoci.bundle("one")
    shutil.rmtree(bundle / "rootfs" / "gone")
    (bundle / "rootfs" / "changes").unlink()
    (bundle / "rootfs" / "changes").mkdir()
    (bundle / "rootfs" / "changes" / "new").write_bytes(b"2")
    (bundle / "rootfs" / "link").unlink()
    umoci.repack("two", bundle)
    layers = umoci.layers("two")
    assert len(layers) == 2
    (tmp_path / "dest").mkdir()
    report = unpack_layers(layers, tmp_path / "dest", keep_setuid=True)
    assert report.whiteouts >= 2
    assert look(tmp_path / "dest", "changes/new") == b"2"
    theirs = snapshot(umoci.bundle("two") / "rootfs")
    assert whole_seconds(snapshot(tmp_path / "dest")) == whole_seconds(theirs)
