"""What layers become on disk: contents, attributes, whiteouts, and the order of layers."""

import gzip
import hashlib
import io
import os
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.errors import PullFailed, ResourceExhausted
from worker.images.trees import remove_tree
from worker.images.unpack import LayerFile, Mismatch, UnpackCancelled, UnpackLimits, unpack_layers

from . import hostile_archives as made
from .hostile_archives import (
    GZIP,
    TAR,
    ZSTD,
    Layer,
    file,
    folder,
    hard_link,
    pax,
    symlink,
    tar,
    zstd_compress,
)
from .unpack_help import Tree, look, snapshot, unpack
from .unprivileged import as_nobody, needs_root

NS = 1_000_000_000


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def takes_xattrs(folder: Path) -> bool:
    if not hasattr(os, "setxattr"):
        return False
    try:
        os.setxattr(folder, "user.probe", b"1")
    except OSError:
        return False
    os.removexattr(folder, "user.probe")
    return True


class TestAttributes:
    def test_modes_times_and_contents(self, tmp_path: Path) -> None:
        report = unpack(
            tmp_path,
            tar(
                folder(b"./", mode=0o750, mtime=11),
                folder(b"d/", mode=0o755, mtime=12),
                pax((b"mtime", b"1700000000.123456789")),
                file(b"d/f", b"hello", mode=0o751),
                symlink(b"d/l", b"/etc/passwd", mtime=13),
                hard_link(b"h", b"d/f", mode=0o600, mtime=99),
            ),
        )
        tree = snapshot(tmp_path / "dest")
        assert tree[""][:3] == (stat.S_IFDIR, 0o750, 11 * NS)
        assert tree["d"][:3] == (stat.S_IFDIR, 0o755, 12 * NS)
        assert tree["d/f"][:4] == (stat.S_IFREG, 0o751, 1700000000_123456789, b"hello")
        assert tree["d/l"][2:4] == (13 * NS, "/etc/passwd")
        assert tree["h"] == tree["d/f"]
        assert (tmp_path / "dest/h").stat().st_ino == (tmp_path / "dest/d/f").stat().st_ino
        assert (report.files, report.directories, report.symlinks, report.hard_links) == (1, 2, 1, 1)
        assert (report.entries, report.bytes, report.skipped, report.notes) == (5, 5, 0, ())

    def test_directories_that_no_entry_describes(self, tmp_path: Path) -> None:
        unpack(tmp_path, tar(file(b"a/b/c", b"x")))
        tree = snapshot(tmp_path / "dest")
        assert [tree[path][:3] for path in ("", "a", "a/b")] == [(stat.S_IFDIR, 0o755, 0)] * 3

    def test_a_directory_described_after_its_content(self, tmp_path: Path) -> None:
        unpack(tmp_path, tar(file(b"a/b", b"x"), folder(b"a/", mode=0o700, mtime=5), file(b"a/c")))
        assert snapshot(tmp_path / "dest")["a"][:3] == (stat.S_IFDIR, 0o700, 5 * NS)

    def test_a_directory_described_twice_counts_once_more(self, tmp_path: Path) -> None:
        lower = tar(folder(b"a/", mode=0o755, mtime=5), file(b"a/b", b"x"))
        unpack(tmp_path, lower, tar(folder(b"a/", mode=0o711, mtime=6)))
        tree = snapshot(tmp_path / "dest")
        assert tree["a"][:3] == (stat.S_IFDIR, 0o711, 6 * NS)
        assert tree["a/b"][3] == b"x"

    def test_a_change_below_leaves_a_directory_as_its_layer_made_it(self, tmp_path: Path) -> None:
        lower = tar(folder(b"a/", mode=0o555, mtime=5), file(b"a/b", b"x"))
        unpack(tmp_path, lower, tar(file(b"a/.wh.b"), file(b"a/c", b"y")))
        tree = snapshot(tmp_path / "dest")
        assert tree["a"][:3] == (stat.S_IFDIR, 0o555, 5 * NS)
        assert "a/b" not in tree

    @pytest.mark.parametrize("keep", [False, True])
    def test_bits_that_give_rights(self, tmp_path: Path, keep: bool) -> None:
        layer = tar(file(b"f", mode=0o6755), folder(b"d/", mode=0o2775), folder(b"t/", mode=0o1777))
        report = unpack(tmp_path, layer, keep_setuid=keep)
        tree = snapshot(tmp_path / "dest")
        assert tree["f"][1] == (0o6755 if keep else 0o755)
        assert tree["d"][1] == (0o2775 if keep else 0o775)
        assert tree["t"][1] == 0o1777
        assert len(report.notes) == (0 if keep else 2)

    def test_big_numbers(self, tmp_path: Path) -> None:
        entry = file(
            b"f",
            b"x",
            uid=made.base256(2**31 + 5, 8),
            size=made.base256(1, 12),
            mtime=made.base256(-5, 12),
        )
        unpack(tmp_path, tar(entry))
        assert snapshot(tmp_path / "dest")["f"][2] == -5 * NS

    @needs_root
    def test_owners(self, tmp_path: Path) -> None:
        entries = (
            folder(b"d/", uid=7, gid=8),
            file(b"f", uid=9, gid=10),
            symlink(b"l", b"f", uid=11, gid=12),
        )
        layer = tar(*entries, pax((b"uid", b"70000")), file(b"p"))

        def owners() -> list[tuple[int, int]]:
            found = [os.lstat(tmp_path / "dest" / name) for name in ("d", "f", "l", "p")]
            return [(info.st_uid, info.st_gid) for info in found]

        unpack(tmp_path, layer, keep_owners=True)
        assert owners() == [(7, 8), (9, 10), (11, 12), (70000, 0)]
        unpack(tmp_path, layer)
        assert owners() == [(0, 0)] * 4

    @needs_root
    def test_an_owner_out_of_range(self, tmp_path: Path) -> None:
        entry = file(b"f", uid=made.base256(2**32 - 1, 8))
        with pytest.raises(PullFailed, match="'f': its owner 4294967295:0 is out of range"):
            unpack(tmp_path, tar(entry), keep_owners=True)
        unpack(tmp_path, tar(entry))

    def test_extended_attributes(self, tmp_path: Path) -> None:
        if not takes_xattrs(tmp_path):
            pytest.skip("the file system keeps no attributes")
        attributes = pax((b"SCHILY.xattr.user.a", b"\0\n=1"), (b"SCHILY.xattr.user.b", b""))
        lower = tar(attributes, file(b"f", mode=0o444), attributes, folder(b"d/"), attributes, folder(b"./"))
        unpack(tmp_path, lower, tar(pax((b"SCHILY.xattr.user.c", b"3")), folder(b"d/"), folder(b".")))
        tree = snapshot(tmp_path / "dest")
        assert tree["f"][4] == [("user.a", b"\0\n=1"), ("user.b", b"")]
        assert tree["d"][4] == [("user.c", b"3")]
        assert tree[""][4] == []

    def test_an_attribute_that_the_file_system_cannot_hold(self, tmp_path: Path) -> None:
        if not takes_xattrs(tmp_path):
            pytest.skip("the file system keeps no attributes")
        try:
            os.setxattr(tmp_path, "user.big", bytes(60_000))
            pytest.skip("the file system keeps large attributes")
        except OSError:
            pass
        with pytest.raises(PullFailed, match=r"'f': its extended attributes .* cannot be kept here"):
            unpack(tmp_path, tar(pax((b"SCHILY.xattr.user.big", bytes(60_000))), file(b"f")))

    @needs_root
    def test_capabilities_only_where_setuid_is_allowed(self, tmp_path: Path) -> None:
        # vfs_cap_data, revision 2, cap_net_raw permitted and effective (linux/capability.h).
        value = bytes.fromhex("0100000200200000000000000000000000000000")
        layer = tar(pax((b"SCHILY.xattr.security.capability", value)), file(b"ping", b"x", mode=0o755))
        unpack(tmp_path, layer, keep_setuid=True)
        assert os.getxattr(tmp_path / "dest/ping", "security.capability") == value
        report = unpack(tmp_path, layer)
        assert os.listxattr(tmp_path / "dest/ping") == []
        assert "'security.capability'" in report.notes[0]

    def test_global_headers(self, tmp_path: Path) -> None:
        layer = tar(
            pax((b"mtime", b"5"), (b"comment", b"by git"), kind=b"g"),
            file(b"a"),
            pax((b"mtime", b"6")),
            file(b"b"),
            pax((b"mtime", b"")),
            file(b"c", mtime=7),
        )
        unpack(tmp_path, layer)
        tree = snapshot(tmp_path / "dest")
        assert [tree[name][2] for name in "abc"] == [5 * NS, 6 * NS, 7 * NS]

    @needs_root
    def test_a_worker_that_is_not_root_can_read_what_it_owns(self, tmp_path: Path) -> None:
        def run(home: Path) -> None:
            layer = tar(
                folder(b"shut/", mode=0o000),
                file(b"shut/shadow", b"s", mode=0o000),
                folder(b"ro/", mode=0o555),
                file(b"ro/f", b"x", mode=0o444),
                hard_link(b"h", b"shut/shadow"),
            )
            upper = tar(file(b"ro/g", b"y"), file(b"shut/.wh.shadow"), hard_link(b"shut/i", b"ro/f"))
            unpack(home, layer, upper, keep_owners=True)
            tree = snapshot(home / "dest")
            assert {path: facts[1] for path, facts in tree.items() if path} == {
                "shut": 0o500,
                "shut/i": 0o444,
                "ro": 0o555,
                "ro/f": 0o444,
                "ro/g": 0o644,
                "h": 0o400,
            }
            remove_tree(home / "dest")

        as_nobody(run, tmp_path)


class TestLayers:
    def test_whiteouts(self, tmp_path: Path) -> None:
        lower = tar(file(b"a", b"1"), file(b"d/x", b"2"), file(b"d/y/z", b"3"), file(b"e/f", b"4"))
        report = unpack(tmp_path, lower, tar(file(b".wh.a"), file(b"d/.wh.y"), file(b"d/.wh.none")))
        assert sorted(snapshot(tmp_path / "dest")) == ["", "d", "d/x", "e", "e/f"]
        assert report.whiteouts == 3

    @pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
    def test_opaque_hides_lower_layers_only(self, tmp_path: Path, first: bool) -> None:
        """The example of layer.md, both ways."""
        lower = tar(folder(b"a/"), folder(b"a/b/"), folder(b"a/b/c/"), file(b"a/b/c/bar", b"1"), file(b"a/q"))
        marker = [file(b"a/.wh..wh..opq")]
        rest = [folder(b"a/b/"), folder(b"a/b/c/"), file(b"a/b/c/foo", b"2")]
        upper = tar(folder(b"a/"), *(marker + rest if first else rest + marker))
        unpack(tmp_path, lower, upper)
        assert sorted(snapshot(tmp_path / "dest")) == ["", "a", "a/b", "a/b/c", "a/b/c/foo"]

    @pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
    def test_a_directory_whited_out_and_made_again(self, tmp_path: Path, first: bool) -> None:
        lower = tar(file(b"a/old", b"1"), file(b"a/both", b"1"))
        marker, again = [file(b".wh.a")], [folder(b"a/", mode=0o700), file(b"a/both", b"2")]
        unpack(tmp_path, lower, tar(*(marker + again if first else again + marker)))
        assert sorted(snapshot(tmp_path / "dest")) == ["", "a", "a/both"]
        assert look(tmp_path / "dest", "a/both") == b"2"

    def test_whiteouts_of_the_lowest_layer_hide_nothing(self, tmp_path: Path) -> None:
        unpack(tmp_path, tar(file(b"a", b"1"), file(b".wh.a"), file(b".wh..wh..opq")))
        assert look(tmp_path / "dest", "a") == b"1"

    def test_a_whiteout_of_the_second_layer_does_not_reach_the_third(self, tmp_path: Path) -> None:
        unpack(tmp_path, tar(file(b"a", b"1")), tar(file(b".wh.a")), tar(file(b"a", b"3")))
        assert look(tmp_path / "dest", "a") == b"3"

    def test_the_third_hides_what_the_second_made(self, tmp_path: Path) -> None:
        unpack(tmp_path, tar(), tar(file(b"d/a", b"2")), tar(file(b"d/b"), file(b"d/.wh..wh..opq")))
        assert sorted(snapshot(tmp_path / "dest")) == ["", "d", "d/b"]

    def test_types_replace_one_another(self, tmp_path: Path) -> None:
        lower = tar(file(b"a/x/y"), file(b"b", b"1"), symlink(b"c", b"a"), file(b"d", b"1"), folder(b"e/"))
        upper = tar(
            file(b"a", b"2"), folder(b"b/"), folder(b"c/"), symlink(b"d", b"b"), hard_link(b"e", b"a")
        )
        unpack(tmp_path, lower, upper)
        dest = tmp_path / "dest"
        assert [look(dest, name) for name in "abcde"] == [b"2", "/", "/", "-> b", b"2"]

    def test_a_directory_that_is_a_link_below(self, tmp_path: Path) -> None:
        """As in images whose /lib moved to /usr/lib, and packages that still bring /lib/x."""
        lower = tar(folder(b"usr/lib/"), symlink(b"lib", b"usr/lib"), symlink(b"abs", b"/usr"))
        upper = tar(file(b"lib/x", b"1"), file(b"abs/lib/y", b"2"), hard_link(b"abs/z", b"lib/x"))
        unpack(tmp_path, lower, upper, tar(file(b"lib/.wh.y"), hard_link(b"usr/h", b"abs/lib/x")))
        tree = snapshot(tmp_path / "dest")
        assert sorted(tree) == ["", "abs", "lib", "usr", "usr/h", "usr/lib", "usr/lib/x", "usr/z"]
        assert tree["usr/h"][3] == b"1"

    def test_hard_links_across_layers_are_parted_by_a_new_file(self, tmp_path: Path) -> None:
        unpack(tmp_path, tar(file(b"a", b"1")), tar(hard_link(b"d/b", b"a")), tar(file(b"a", b"3")))
        assert (look(tmp_path / "dest", "a"), look(tmp_path / "dest", "d/b")) == (b"3", b"1")

    def test_twice_is_the_same_tree(self, tmp_path: Path) -> None:
        layers = tar(file(b"a/b/c", b"1"), folder(b"q/")), tar(file(b"a/b/d"), file(b"a/.wh.b"), file(b"n/e"))
        unpack(tmp_path, *layers)
        first = snapshot(tmp_path / "dest")
        unpack(tmp_path, *layers)
        assert snapshot(tmp_path / "dest") == first

    def test_deeper_than_descriptors_are_held(self, tmp_path: Path) -> None:
        deep = b"/".join(b"%d" % n for n in range(100))
        lower = tar(
            folder(b"0/", mtime=5), file(deep + b"/f", b"1"), file(b"0/1/g"), hard_link(b"h", deep + b"/f")
        )
        unpack(tmp_path, lower, tar(file(b"0/1/2/.wh.3")))
        tree = snapshot(tmp_path / "dest")
        assert sorted(tree) == ["", "0", "0/1", "0/1/2", "0/1/g", "h"]
        assert (tree["0"][2], tree["h"][3]) == (5 * NS, b"1")

    @pytest.mark.parametrize("entry", [file(b"top/0"), symlink(b"top/0", b"x"), hard_link(b"top/0", b"f")])
    def test_in_place_of_a_deep_tree(self, tmp_path: Path, entry: bytes) -> None:
        """While the tree is deleted, descriptors of where it stands are given up and opened again."""
        deep = b"/".join(b"%d" % n for n in range(100))
        unpack(tmp_path, tar(file(b"f"), file(b"top/" + deep)), tar(entry))
        assert sorted(snapshot(tmp_path / "dest")) == ["", "f", "top", "top/0"]

    def test_case_is_kept_apart_where_it_is(self, tmp_path: Path) -> None:
        unpack(tmp_path, tar(file(b"A", b"1"), file(b"a", b"2")))
        assert (look(tmp_path / "dest", "A"), look(tmp_path / "dest", "a")) == (b"1", b"2")

    def test_another_spelling_after_a_whiteout(self, tmp_path: Path) -> None:
        layers = (tar(file(b"Lib/a", b"1")), tar(file(b".wh.Lib"), file(b"lib/a", b"2"), file(b"lib/b")))
        unpack(tmp_path, *layers, case_insensitive=True)
        assert sorted(snapshot(tmp_path / "dest")) == ["", "lib", "lib/a", "lib/b"]


class TestBlobs:
    ARCHIVE = tar(file(b"a", bytes(range(256)) * 8000), file(b"b", b"x" * 3_000_000))

    @pytest.mark.parametrize(
        ("blob", "media_type"),
        [
            (ARCHIVE, TAR),
            (ARCHIVE, "application/vnd.docker.image.rootfs.diff.tar"),
            (gzip.compress(ARCHIVE), "application/vnd.docker.image.rootfs.diff.tar.gzip"),
            (gzip.compress(ARCHIVE) + bytes(200_000), GZIP),
            (made.gzip_members(ARCHIVE[:700], b"", ARCHIVE[700:5000], ARCHIVE[5000:], b""), GZIP),
            (zstd_compress(ARCHIVE), ZSTD),
            (zstd_compress(ARCHIVE[:5000]) + zstd_compress(b"") + zstd_compress(ARCHIVE[5000:]), ZSTD),
            # Skippable frames, as zstd:chunked has them (RFC 8878 3.1.2).
            (zstd_compress(ARCHIVE) + b"\x50\x2a\x4d\x18\x04\0\0\0abcd", ZSTD),
            (b"\x5e\x2a\x4d\x18\x04\0\0\0abcd" + zstd_compress(ARCHIVE), ZSTD),
            (ARCHIVE + bytes(10_240 - 1024), TAR),
        ],
        ids=range(10),
    )
    def test_every_form(self, tmp_path: Path, blob: bytes, media_type: str) -> None:
        report = unpack(tmp_path, Layer(blob, media_type))
        assert look(tmp_path / "dest", "a") == bytes(range(256)) * 8000
        assert look(tmp_path / "dest", "b") == b"x" * 3_000_000
        assert len(report.diff_ids) == 1
        if blob[:1] != b"a":
            assert report.diff_ids == (digest(self.ARCHIVE),)

    def test_a_proven_blob_may_lack_its_end_and_its_type(self, tmp_path: Path) -> None:
        data = file(b"a", b"x")
        report = unpack(tmp_path, Layer(gzip.compress(data), TAR, digest(data)))
        assert look(tmp_path / "dest", "a") == b"x"
        assert report.notes == (
            "layer 1 of 1: its media type says tar, and it is gzip",
            "layer 1 of 1: cut off: it has no end marker",
        )

    def test_sha512(self, tmp_path: Path) -> None:
        data = tar(file(b"a", b"x"))
        proof = f"sha512:{hashlib.sha512(data).hexdigest()}"
        assert unpack(tmp_path, Layer(data, TAR, proof)).diff_ids == (proof,)

    def test_the_wrong_layer(self, tmp_path: Path) -> None:
        with pytest.raises(Mismatch, match="layer 2 of 2: its content is sha256:"):
            unpack(tmp_path, tar(), Layer(tar(file(b"a")), TAR, digest(b"")))

    def test_a_blob_that_is_not_there(self, tmp_path: Path) -> None:
        (tmp_path / "dest").mkdir()
        layer = LayerFile(path=tmp_path / "none", media_type=TAR)
        with pytest.raises(PullFailed, match="layer 1 of 1: No such file"):
            unpack_layers([layer], tmp_path / "dest")

    @pytest.mark.parametrize("kind", ["directory", "fifo", "link"])
    def test_a_blob_that_is_no_file(self, tmp_path: Path, kind: str) -> None:
        (tmp_path / "dest").mkdir()
        path = tmp_path / "blob"
        if kind == "directory":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            (tmp_path / "real").write_bytes(tar())
            path.symlink_to("real")
        with pytest.raises(PullFailed, match="layer 1 of 1"):
            unpack_layers([LayerFile(path=path, media_type=TAR)], tmp_path / "dest")


class TestDestination:
    def test_must_be_there_and_empty(self, tmp_path: Path) -> None:
        with pytest.raises(PullFailed, match="cannot unpack into"):
            unpack_layers([], tmp_path / "none")
        (tmp_path / "f").touch()
        with pytest.raises(PullFailed, match="is not empty"):
            unpack_layers([], tmp_path)

    def test_must_not_be_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        with pytest.raises(PullFailed, match="cannot unpack into"):
            unpack_layers([], tmp_path / "link")

    def test_no_layers_make_an_empty_tree(self, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        assert unpack_layers([], tmp_path / "d").entries == 0
        assert snapshot(tmp_path / "d")[""][1:3] == (0o755, 0)


class TestCallingOff:
    LAYERS = (
        tar(*[file(b"d/%d" % n, b"x") for n in range(50)], file(b"big", bytes(3 << 20))),
        tar(file(b".wh.d"), file(b"e")),
    )

    @contextmanager
    def steps(self, after: int) -> Iterator[Any]:
        calls = 0

        def cancelled() -> bool:
            nonlocal calls
            calls += 1
            return calls > after

        yield cancelled

    @pytest.mark.parametrize("after", [0, 1, 30, 53])
    def test_at_any_step(self, tmp_path: Path, after: int) -> None:
        with self.steps(after) as cancelled, pytest.raises(UnpackCancelled, match="called off"):
            unpack(tmp_path, *self.LAYERS, cancelled=cancelled)
        assert look(tmp_path / "dest", "e") is None

    def test_inside_what_is_skipped(self, tmp_path: Path) -> None:
        """Nothing is made of it, so nothing else would ask."""
        layer = gzip.compress(tar(made.header(b".wh.x", size=64 << 20), bytes(64 << 20)))
        with self.steps(20) as cancelled, pytest.raises(UnpackCancelled):
            unpack(tmp_path, Layer(layer, GZIP), cancelled=cancelled)

    @pytest.mark.parametrize("marker", [b"d/.wh..wh..opq", b".wh.d", b"d/0/.wh..wh..opq"])
    def test_whiteouts_again_and_again_look_once(self, tmp_path: Path, marker: bytes) -> None:
        def calls(times: int) -> int:
            count = 0

            def cancelled() -> bool:
                nonlocal count
                count += 1
                return False

            own = [folder(b"d/%d/%d/" % (n // 20, n)) for n in range(100)]
            again = [file(marker), file(b"d/.wh.%d" % (len(own) // 40))] * times
            unpack(tmp_path, tar(), tar(*own, *again), cancelled=cancelled)
            return count

        assert calls(50) - calls(1) == 2 * 49


class TestLimits:
    def test_what_is_just_allowed(self, tmp_path: Path) -> None:
        layer = tar(file(b"a/b/c", b"1234"), symlink(b"s", b"12345"))
        bounds = UnpackLimits(bytes=len(layer), entries=2, depth=3, name_bytes=1, path_bytes=5, link_bytes=5)
        unpack(tmp_path, layer, limits=bounds)

    @pytest.mark.parametrize("bound", ["bytes", "entries", "depth", "name_bytes", "path_bytes", "link_bytes"])
    def test_one_less_is_not(self, tmp_path: Path, bound: str) -> None:
        layer = tar(file(b"a/b/cc", b"1234"), symlink(b"s", b"12345"))
        just = {
            "bytes": len(layer),
            "entries": 2,
            "depth": 3,
            "name_bytes": 2,
            "path_bytes": 6,
            "link_bytes": 5,
        }
        unpack(tmp_path, layer, limits=UnpackLimits(**just))
        just[bound] -= 1
        with pytest.raises(ResourceExhausted):
            unpack(tmp_path, layer, limits=UnpackLimits(**just))

    def test_notes_are_few(self, tmp_path: Path) -> None:
        report = unpack(tmp_path, tar(*[made.header(b"p%d" % n, made.FIFO) for n in range(500)]))
        assert report.skipped == 500
        assert len(report.notes) == 9
        assert report.notes[-1] == "492 more: a fifo, left out"


# Random trees there and back

_name = st.one_of(
    st.sampled_from(["a", "b", "c", "A", "b.c", "-x", "ä", "\udce9", "x" * 120]),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8),
).filter(
    lambda name: name not in (".", "..") and not name.startswith(".wh.") and len(os.fsencode(name)) < 250
)
_mode = st.integers(0, 0o777)
_time = st.integers(0, 2**33 * NS)
_leaf = st.one_of(
    st.tuples(st.just("f"), _mode, _time, st.binary(max_size=1500)),
    st.tuples(st.just("l"), st.just(0o777), _time, st.sampled_from(["a", "/etc", "../..", "x" * 200])),
)
_node: st.SearchStrategy[Any] = st.recursive(
    _leaf,
    lambda inner: st.tuples(st.just("d"), _mode, _time, st.dictionaries(_name, inner, max_size=5)),
    max_leaves=12,
)
_tree = st.dictionaries(_name, _node, max_size=5)
_Node = tuple[str, int, int, Any]


def expected(nodes: dict[str, _Node]) -> Tree:
    """What `snapshot` says of a tree, with a top of mode 0755 and time 1."""
    kinds = {"f": stat.S_IFREG, "l": stat.S_IFLNK, "d": stat.S_IFDIR}
    tree: Tree = {"": (stat.S_IFDIR, 0o755, NS, None, [])}

    def add(path: str, node: _Node) -> None:
        kind, mode, mtime, content = node
        tree[path] = (kinds[kind], mode, mtime, None if kind == "d" else content, [])
        if kind == "d":
            for name, child in content.items():
                add(f"{path}/{name}", child)

    for name, node in nodes.items():
        add(name, node)
    return tree


def members(nodes: dict[str, _Node]) -> Iterator[tuple[str, _Node]]:
    for name, node in nodes.items():
        yield name, node
        if node[0] == "d":
            for below, child in members(node[3]):
                yield f"{name}/{below}", child


def archive(entries: list[tuple[str, _Node]], form: int) -> bytes:
    """By Python's writer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, errors="surrogateescape") as writer:
        for path, (kind, mode, mtime, content) in [(".", ("d", 0o755, NS, {})), *entries]:
            info = tarfile.TarInfo(path)
            info.mode, info.mtime = mode, mtime // NS
            if form == tarfile.PAX_FORMAT:
                info.pax_headers = {"mtime": f"{mtime // NS}.{mtime % NS:09}"}
            if kind == "f":
                info.size = len(content)
                writer.addfile(info, io.BytesIO(content))
            else:
                info.type = tarfile.DIRTYPE if kind == "d" else tarfile.SYMTYPE
                info.linkname = content if kind == "l" else ""
                writer.addfile(info)
    return out.getvalue()


def whole_seconds(tree: Tree) -> Tree:
    return {path: (*facts[:2], facts[2] // NS, *facts[3:]) for path, facts in tree.items()}


@pytest.fixture(scope="module")
def readable() -> None:
    if os.geteuid() != 0:
        pytest.skip("compares modes exactly, which only root keeps")


def _changes(old: dict[str, _Node], new: dict[str, _Node], opaque: bool) -> Iterator[tuple[str, _Node]]:
    """A layer that makes `new` of `old`, with explicit or opaque whiteouts."""
    empty: _Node = ("f", 0o644, 0, b"")
    if opaque:
        yield ".wh..wh..opq", empty
        yield from members(new)
        return
    for name in old.keys() - new.keys():
        yield f".wh.{name}", empty
    for name, node in new.items():
        before = old.get(name)
        if before is None or before[0] != "d" or node[0] != "d":
            yield from members({name: node})
            continue
        yield name, node
        for below, child in _changes(before[3], node[3], bool(node[2] % 2)):
            yield f"{name}/{below}", child


_PRIVATE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.usefixtures("readable")
class TestLaws:
    @given(_tree, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    @_PRIVATE
    def test_unpacking_undoes_packing(self, nodes: dict[str, _Node], form: int) -> None:
        with tempfile.TemporaryDirectory() as home:
            unpack(Path(home), archive(list(members(nodes)), form))
            found = snapshot(Path(home) / "dest")
        if form == tarfile.GNU_FORMAT:
            assert whole_seconds(found) == whole_seconds(expected(nodes))
        else:
            assert found == expected(nodes)

    @given(_tree, _tree, st.booleans(), st.randoms(use_true_random=False), st.booleans())
    @_PRIVATE
    def test_a_layer_makes_one_tree_of_another(
        self, old: dict[str, _Node], new: dict[str, _Node], opaque: bool, chance: Any, shuffle: bool
    ) -> None:
        """In any order in which directories come before what is in them."""
        upper = list(_changes(old, new, opaque))
        if shuffle:
            chance.shuffle(upper)
            upper.sort(key=lambda entry: entry[0].count("/"))
        with tempfile.TemporaryDirectory() as home:
            lower = archive(list(members(old)), tarfile.PAX_FORMAT)
            unpack(Path(home), lower, archive(upper, tarfile.PAX_FORMAT))
            assert snapshot(Path(home) / "dest") == expected(new)
