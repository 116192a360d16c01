"""Packing: one digest for one content, whoever packs it; what was packed unpacks to the same tree."""

import json
import os
import random
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.errors import ContractError, InvalidCommand, PullFailed, ResourceExhausted
from worker.images import pack_blobs
from worker.images.model import ImageConfig
from worker.images.pack import Packed
from worker.images.pack_layers import split
from worker.images.pack_scan import Found
from worker.images.pack_tar import DIRECTORY, FILE, HARD_LINK
from worker.images.unpack import LayerFile, unpack_layers

from .pack_help import SAMPLE, FakeXattrs, has_xattrs, packed, plant
from .unpack_help import Tree, snapshot
from .unprivileged import needs_root

NS = 10**9
NAMES = st.text("abcñZ. -", min_size=1, max_size=6).filter(lambda name: name not in (".", ".."))


def unpacked(image: Packed, dest: Path, **more: Any) -> Tree:
    """The tree that a node would have, without the top, which no layer describes."""
    dest.mkdir()
    layers = [
        LayerFile(path=layer.path, media_type=layer.media_type, diff_id=layer.diff_id)
        for layer in image.layers
    ]
    unpack_layers(layers, dest, **more)
    return below(dest)


def below(top: Path) -> Tree:
    tree = snapshot(top)
    del tree[""]
    return tree


def timeless(tree: Tree, mtime_ns: int = 0) -> Tree:
    """As packing leaves it: every time is the same, and a link has no mode of its own."""
    return {path: (facts[0], facts[1], mtime_ns, *facts[3:]) for path, facts in tree.items()}


def names(image: Packed) -> list[str]:
    found = []
    for layer in image.layers:
        with tarfile.open(layer.path) as archive:
            found += archive.getnames()
    return found


# -- one digest


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    umask=st.sampled_from([0o000, 0o022, 0o027, 0o077]),
    start=st.integers(0, 2**31),
)
def test_one_digest_whatever_the_order_times_and_umask(
    tmp_path_factory: pytest.TempPathFactory, seed: int, umask: int, start: int
) -> None:
    home = tmp_path_factory.mktemp("pack")
    order = list(SAMPLE)
    random.Random(seed).shuffle(order)
    plant(home / "one", SAMPLE)
    before = os.umask(umask)
    try:
        plant(home / "other", SAMPLE, order, start=start)
        other = packed(home / "other", home / "b")
    finally:
        os.umask(before)
    one = packed(home / "one", home / "a")
    assert (one.digest, one.config, one.manifest) == (other.digest, other.config, other.manifest)
    for ours, theirs in zip(one.layers, other.layers, strict=True):
        assert ours.path.read_bytes() == theirs.path.read_bytes()


@needs_root
def test_the_owner_does_not_matter(tmp_path: Path) -> None:
    plant(tmp_path / "ours", SAMPLE)
    plant(tmp_path / "theirs", SAMPLE)
    for path in (tmp_path / "theirs").rglob("*"):
        os.chown(path, 501, 20, follow_symlinks=False)
    theirs = packed(tmp_path / "theirs", tmp_path / "b")
    assert theirs.digest == packed(tmp_path / "ours", tmp_path / "a").digest
    with tarfile.open(theirs.layers[0].path) as archive:
        assert {(m.uid, m.gid, m.uname, m.gname) for m in archive} == {(0, 0, "", "")}


def test_what_the_digest_depends_on(tmp_path: Path) -> None:
    def change(mutate: Callable[[Path], object], number: int) -> str:
        top = tmp_path / f"tree-{number}"
        plant(top, SAMPLE)
        mutate(top)
        return packed(top, tmp_path / f"s-{number}").digest

    def unlink_again(top: Path) -> None:
        content = (top / "bin/tool").read_bytes()
        (top / "lib/hard").unlink()
        (top / "lib/hard").write_bytes(content)
        (top / "lib/hard").chmod(0o755)

    changes: list[Callable[[Path], object]] = [
        lambda top: None,
        lambda top: (top / "zero").write_bytes(b"1"),
        lambda top: (top / "zero").chmod(0o600),
        lambda top: (top / "empty").chmod(0o755),
        lambda top: (top / "zero").rename(top / "Zero"),
        lambda top: (top / "more").mkdir(),
        unlink_again,
    ]
    digests = [change(mutate, number) for number, mutate in enumerate(changes)]
    assert len(set(digests)) == len(changes)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("least", [32 << 20, 4096])
def test_what_is_packed_unpacks_to_the_same_tree(tmp_path: Path, compression: str, least: int) -> None:
    plant(tmp_path / "tree", SAMPLE)
    image = packed(tmp_path / "tree", tmp_path / "s", compression=compression, least_bytes=least)
    assert (len(image.layers) > 1) == (least == 4096)
    expected = timeless(below(tmp_path / "tree"))
    assert unpacked(image, tmp_path / "dest") == expected
    dest = tmp_path / "dest"
    assert (dest / "bin/tool").stat().st_ino == (dest / "lib/hard").stat().st_ino
    again = packed(dest, tmp_path / "t", compression=compression, least_bytes=least)
    assert again.digest == image.digest


@settings(max_examples=25, deadline=None)
@given(
    tree=st.dictionaries(
        st.lists(
            st.text("abcñZ. -", min_size=1, max_size=6).filter(lambda n: n not in (".", "..")),
            min_size=1,
            max_size=3,
        ).map("/".join),
        st.one_of(st.none(), st.binary(max_size=2000), st.text("abc/.", min_size=1, max_size=20)),
        max_size=12,
    )
)
def test_any_tree_survives(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    paths = sorted(tree)
    # A path can be a directory or something else, not both.
    tree = {p: tree[p] for p in paths if not any(other.startswith(f"{p}/") for other in paths)}
    home = tmp_path_factory.mktemp("any")
    plant(home / "tree", tree)
    image = packed(home / "tree", home / "s", least_bytes=500)
    assert unpacked(image, home / "dest") == timeless(below(home / "tree"))


# -- times, modes, attributes


def test_times(tmp_path: Path) -> None:
    plant(tmp_path / "tree", SAMPLE)
    kept = packed(tmp_path / "tree", tmp_path / "a", time_s=None)
    assert unpacked(kept, tmp_path / "kept") == below(tmp_path / "tree")
    newest = max(os.lstat(path).st_mtime_ns for path in (tmp_path / "tree").rglob("*"))
    seconds = int(json.loads(kept.config)["created"][-3:-1])
    assert seconds == newest // NS % 60
    given = packed(tmp_path / "tree", tmp_path / "b", time_s=1_700_000_000)
    assert json.loads(given.config)["created"] == "2023-11-14T22:13:20Z"
    assert unpacked(given, tmp_path / "given") == timeless(below(tmp_path / "tree"), 1_700_000_000 * NS)


def test_odd_times_are_kept(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    top.mkdir()
    times = {"old": -5 * NS - 1, "zero": 0, "fine": 123_456_789, "far": 2**33 * NS}
    for name, ns in times.items():
        (top / name).write_bytes(b"")
        os.utime(top / name, ns=(ns, ns))
    image = packed(top, tmp_path / "a", time_s=None)
    tree = unpacked(image, tmp_path / "dest")
    assert {name: tree[name][2] for name in times} == times


def test_setuid_is_dropped_and_told(tmp_path: Path) -> None:
    plant(tmp_path / "tree", {"su": (0o4755, b"x"), "dir": (0o2755, None), "tmp": (0o1777, None)})
    image = packed(tmp_path / "tree", tmp_path / "a")
    assert image.notes == ("su: setuid or setgid dropped",)
    tree = unpacked(image, tmp_path / "dest", keep_setuid=True)
    assert [tree[name][1] for name in ("su", "dir", "tmp")] == [0o755, 0o755, 0o1777]


def test_plain_modes_forget_the_umask(tmp_path: Path) -> None:
    for name, modes in (("one", (0o755, 0o644, 0o700)), ("other", (0o711, 0o600, 0o777))):
        run, data, folder = modes
        plant(tmp_path / name, {"run": (run, b"1"), "data": (data, b"2"), "folder": (folder, None)})
    one = packed(tmp_path / "one", tmp_path / "a", plain_modes=True)
    assert one.digest == packed(tmp_path / "other", tmp_path / "b", plain_modes=True).digest
    tree = unpacked(one, tmp_path / "dest")
    assert [tree[name][1] for name in ("run", "data", "folder")] == [0o755, 0o644, 0o755]


def test_attributes_of_the_user_go_along(tmp_path: Path) -> None:
    if not has_xattrs(tmp_path):
        pytest.skip("this file system keeps no attributes of the user")
    top = tmp_path / "tree"
    plant(top, {"file": b"1", "dir": None})
    os.setxattr(top / "file", "user.kind", b"a\0b\nc=\xff")
    os.setxattr(top / "dir", "user.empty", b"")
    image = packed(top, tmp_path / "a")
    tree = unpacked(image, tmp_path / "dest")
    assert tree["file"][4] == [("user.kind", b"a\0b\nc=\xff")]
    assert tree["dir"][4] == [("user.empty", b"")]


def test_signatures_of_a_mac_go_along(tmp_path: Path) -> None:
    plant(tmp_path / "tree", {"script": b"#!/bin/sh\n", "dir": None})
    xattrs = FakeXattrs()
    signature = [(f"com.apple.cs.{part}", os.urandom(500)) for part in ("CodeDirectory", "CodeSignature")]
    for name in ("script", "dir"):
        fd = os.open(tmp_path / "tree" / name, os.O_RDONLY)
        xattrs.write(fd, signature)
        os.close(fd)
    image = packed(tmp_path / "tree", tmp_path / "a", xattrs=xattrs)
    there = FakeXattrs()
    unpacked(image, tmp_path / "dest", xattrs=there)
    fd = os.open(tmp_path / "dest" / "script", os.O_RDONLY)
    assert there.read(fd) == signature
    os.close(fd)
    assert len(there.kept) == 2


# -- what is refused


def test_what_cannot_be_part_of_an_image(tmp_path: Path) -> None:
    def fifo(top: Path) -> None:
        os.mkfifo(top / "odd")

    def unix_socket(top: Path) -> None:
        with socket.socket(socket.AF_UNIX) as made:
            here = os.open(top, os.O_RDONLY)
            made.bind(f"/proc/self/fd/{here}/odd")
            os.close(here)

    def whiteout(top: Path) -> None:
        (top / ".wh.odd").write_bytes(b"")

    for number, (make, word) in enumerate(
        ((fifo, "a fifo"), (unix_socket, "a socket"), (whiteout, "deletes"))
    ):
        top = tmp_path / f"tree-{number}"
        plant(top, {"sub/file": b"1"})
        make(top / "sub")
        with pytest.raises(PullFailed, match=f"sub/[.wh]*odd: .*{word}"):
            packed(top, tmp_path / f"s-{number}")
        # What is left out is no trouble.
        assert packed(top, tmp_path / f"t-{number}", exclude=("*odd",)).entries == 2


def test_names_that_a_mac_takes_for_one(tmp_path: Path) -> None:
    plant(tmp_path / "tree", {"dir/Makefile": b"1", "dir/makefile": b"2"})
    assert packed(tmp_path / "tree", tmp_path / "a", platform=("linux", "arm64", None)).entries == 3
    with pytest.raises(PullFailed, match="dir/makefile: macOS takes it for dir/Makefile"):
        packed(tmp_path / "tree", tmp_path / "b", platform=("darwin", "arm64", None))


def test_a_link_is_no_folder(tmp_path: Path) -> None:
    plant(tmp_path / "tree", {"file": b"1"})
    (tmp_path / "link").symlink_to("tree")
    (tmp_path / "s").mkdir()
    from worker.images.pack import PackOptions, pack

    for path in (tmp_path / "link", tmp_path / "missing", tmp_path / "tree" / "file"):
        with pytest.raises(PullFailed, match="cannot pack"):
            pack(path, tmp_path / "s", PackOptions())


@pytest.mark.parametrize("what", ["content", "size", "new", "gone", "mode"])
def test_a_folder_that_changes_is_refused(tmp_path: Path, what: str) -> None:
    top = tmp_path / "tree"
    plant(top, {f"file-{number}": b"x" * 1000 for number in range(20)})
    changes: dict[str, Callable[[], object]] = {
        "content": lambda: (top / "file-3").write_bytes(b"y" * 1000),
        "size": lambda: (top / "file-19").write_bytes(b"y"),
        "new": lambda: (top / "more").write_bytes(b""),
        "gone": lambda: (top / "file-9").unlink(),
        "mode": lambda: (top / "file-3").chmod(0o600),
    }
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == 20:
            changes[what]()

    from worker.images.pack import PackOptions, pack

    (tmp_path / "s").mkdir()
    with pytest.raises(PullFailed, match="changed while it was being"):
        pack(top.resolve(), tmp_path / "s", PackOptions(), check=check)


def test_too_many_attributes_are_refused(tmp_path: Path) -> None:
    plant(tmp_path / "tree", {"file": b"1"})
    for value, name, error in ((b"x" * (600 << 10), "user.big", "attributes"), (b"1", "user.a=b", "`=`")):
        xattrs = FakeXattrs()
        fd = os.open(tmp_path / "tree" / "file", os.O_RDONLY)
        xattrs.write(fd, [(name, value)])
        os.close(fd)
        with pytest.raises(PullFailed, match=f"file: .*{error}"):
            packed(tmp_path / "tree", tmp_path / name, xattrs=xattrs)


def test_no_room_is_resource_exhausted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path / "tree", {"file": b"1"})

    def full(self: object, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack_blobs.LayerWriter, "write", full)
    with pytest.raises(ResourceExhausted):
        packed(tmp_path / "tree", tmp_path / "s")


def test_it_can_be_called_off(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def check() -> None:
        raise Stop

    from worker.images.pack import PackOptions, pack

    plant(tmp_path / "tree", SAMPLE)
    (tmp_path / "s").mkdir()
    with pytest.raises(Stop):
        pack((tmp_path / "tree").resolve(), tmp_path / "s", PackOptions(), check=check)


# -- what is left out


def test_what_is_left_out(tmp_path: Path) -> None:
    tree = {
        ".git/config": b"", "src/main.c": b"", "src/main.o": b"", "build/out": b"", "src/build/keep": b"",
        "notes.o": b"", "keep.o": b"", ".sandfleetignore": b"# comment\n*.o\n!keep.o\n/build/\n",
    }  # fmt: skip
    plant(tmp_path / "tree", tree)
    image = packed(tmp_path / "tree", tmp_path / "a", exclude=(".git",))
    assert sorted(names(image)) == ["keep.o", "src", "src/build", "src/build/keep", "src/main.c"]
    plain = packed(tmp_path / "tree", tmp_path / "b", ignore_file=False)
    assert ".sandfleetignore" in names(plain)
    assert "build/out" in names(plain)


# -- the config


def test_the_config(tmp_path: Path) -> None:
    plant(tmp_path / "tree", {"run": b"1"})
    config = ImageConfig(
        entrypoint=["/run"], cmd=["-v"], env=["B=2", "A=1"], working_dir="/w", labels={"b": "2", "a": "1"}
    )
    image = packed(tmp_path / "tree", tmp_path / "a", config=config, platform=("darwin", "arm64", "v8"))
    (layer,) = image.layers
    assert json.loads(image.config) == {
        "created": "1970-01-01T00:00:00Z",
        "architecture": "arm64",
        "os": "darwin",
        "variant": "v8",
        "config": {
            "Entrypoint": ["/run"], "Cmd": ["-v"], "Env": ["B=2", "A=1"], "WorkingDir": "/w",
            "Labels": {"a": "1", "b": "2"},
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
    }  # fmt: skip
    assert list(json.loads(image.config)["config"]["Labels"]) == ["a", "b"]
    manifest = json.loads(image.manifest)
    assert manifest["layers"] == [
        {
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": layer.digest,
            "size": layer.path.stat().st_size,
        }
    ]


def test_an_empty_folder_is_an_image(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    image = packed(tmp_path / "tree", tmp_path / "a")
    assert unpacked(image, tmp_path / "dest") == {}


def test_another_zlib_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.images import pack

    plant(tmp_path / "tree", {"run": b"1"})
    monkeypatch.setattr(pack, "usual_zlib", lambda: False)
    assert "zlib" in packed(tmp_path / "tree", tmp_path / "a").notes[0]
    assert packed(tmp_path / "tree", tmp_path / "b", compression="none").notes == ()


def test_gzip_names_neither_system_nor_time(tmp_path: Path) -> None:
    plant(tmp_path / "tree", {"run": b"1"})
    image = packed(tmp_path / "tree", tmp_path / "a")
    assert image.layers[0].path.read_bytes()[:10] == b"\x1f\x8b\x08" + bytes(6) + b"\xff"


# -- layers


def entry(path: str, size: int = 0, kind: bytes = FILE, link: str = "") -> Found:
    return Found(path, kind, 0o644, size, 0, link, (0, 0), 0)


def files(count: int, size: int) -> list[Found]:
    return [entry("d", kind=DIRECTORY), *(entry(f"d/{number:04}", size) for number in range(count))]


def test_small_trees_are_one_layer() -> None:
    assert split(files(100, 10), 1000, least=1001) == [files(100, 10)]
    assert split([], 0) == [[]]


def test_layers_are_cut_by_name() -> None:
    entries = files(400, 10)
    layers = split(entries, 4000, least=100)
    assert 10 < len(layers) < 64
    assert all(layer[0].path == "d" for layer in layers)
    assert [one for layer in layers for one in layer[1:]] == entries[1:]
    # One file in the front grows: all layers but a few stay the same.
    changed = [*entries[:3], entries[3]._replace(size=25), *entries[4:]]
    others = split(changed, 4015, least=100)
    same = sum(1 for layer in others if layer in layers)
    assert same >= len(layers) - 4


def test_a_layer_has_bounds() -> None:
    layers = split(files(4000, 1000), 4_000_000, least=10)
    assert len(layers) <= 65
    sizes = [sum(one.size for one in layer) for layer in layers]
    assert max(sizes) <= 8 * 4_000_000 // 32 + 1000


def test_all_names_of_a_file_are_in_one_layer() -> None:
    entries = files(100, 10)
    entries += [entry("e", kind=DIRECTORY), entry("e/late", kind=HARD_LINK, link="d/0001")]
    layers = split(entries, 1000, least=100)
    (home,) = [layer for layer in layers if any(one.path == "d/0001" for one in layer)]
    assert [one.path for one in home if one.path.startswith("e")] == ["e", "e/late"]


def test_errors_are_of_the_contract(tmp_path: Path) -> None:
    plant(tmp_path / "tree", {"run": b"1", ".sandfleetignore": b"[z-a]\n"})
    with pytest.raises(InvalidCommand, match="sandfleetignore, pattern 1"):
        packed(tmp_path / "tree", tmp_path / "a")
    assert issubclass(InvalidCommand, ContractError)
