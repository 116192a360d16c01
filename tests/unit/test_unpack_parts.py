"""The pure parts of unpacking: numbers, records, times, names, spellings."""

import contextlib
import os
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.images.decompress import compression_of, detect
from worker.images.name_index import NameIndex, fold
from worker.images.tar_headers import check_segments, number, parse_header, pax_records, pax_time
from worker.images.unpack_model import BadArchive, TooMuch, UnpackLimits, shown
from worker.images.whiteouts import Meaning, components, place_of

from . import hostile_archives as made

LIMITS = UnpackLimits()


class TestNumbers:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            (b"0000644\0", 0o644),
            (b"    644 ", 0o644),
            (b"77777777", 0o77777777),
            (b"\0" * 8, 0),
            (b"       \0", 0),
            (b"\x80" + (5).to_bytes(11, "big"), 5),
            (b"\x80" + (2**63 - 1).to_bytes(11, "big"), 2**63 - 1),
        ],
    )
    def test_read(self, field: bytes, value: int) -> None:
        assert number(field, "size") == value

    @pytest.mark.parametrize(
        "field",
        [
            b"0000648\0",
            b"0x00001\0",
            b"+000001\0",
            b"1_00000\0",
            b"12\x0034\0\0\0",
            b"\xc0" + bytes(11),
            b"\xff" * 12,
            b"\x80" + (2**63).to_bytes(11, "big"),
            "٣".encode().ljust(8, b"\0"),
        ],
    )
    def test_refused(self, field: bytes) -> None:
        with pytest.raises(BadArchive, match="the size in its header"):
            number(field, "size")

    @given(st.integers(-(2**62), 2**63 - 1))
    def test_base_256_there_and_back(self, value: int) -> None:
        assert number(made.base256(value, 12), "mtime", True) == value


class TestHeaders:
    def test_prefix_of_ustar_and_of_nobody_else(self) -> None:
        assert parse_header(made.header(b"f", prefix=b"dir")).name == b"dir/f"
        assert parse_header(made.header(b"f", prefix=b"dir", magic=b"ustar  \0")).name == b"f"
        assert parse_header(made.header(b"f", prefix=b"dir", magic=bytes(8))).name == b"f"

    def test_the_times_of_star_are_no_name(self) -> None:
        # star(1): a prefix of 131 bytes, then atime and ctime, and `tar\0` at the very end.
        tail = b"p" * 131 + b"00000000001 00000000002 " + bytes(8) + b"tar\0"
        assert parse_header(made.header(b"f", tail=tail)).name == b"p" * 131 + b"/f"

    @given(st.binary(min_size=512, max_size=512))
    def test_any_block(self, block: bytes) -> None:
        with contextlib.suppress(BadArchive):
            parse_header(block)


class TestPax:
    @given(st.lists(st.tuples(st.binary(min_size=1, max_size=20), st.binary(max_size=200))))
    def test_records_there_and_back(self, records: list[tuple[bytes, bytes]]) -> None:
        records = [(key.replace(b"=", b"."), value) for key, value in records]
        assert list(pax_records(b"".join(made.record(*item) for item in records))) == records

    @given(st.binary(max_size=100))
    def test_any_bytes(self, data: bytes) -> None:
        with contextlib.suppress(BadArchive):
            list(pax_records(data))

    @given(st.integers(-(2**34), 2**34), st.text("0123456789", max_size=20))
    def test_times_are_rounded_towards_the_past(self, whole: int, fraction: str) -> None:
        text = f"{whole}.{fraction}"
        exact = Decimal(text if fraction else str(whole)) * 10**9
        assert pax_time(text.encode(), "mtime") == int(exact.to_integral_value("ROUND_FLOOR"))

    @pytest.mark.parametrize("text", [b"", b".5", b"1e3", b"nan", b" 1", b"1,5", b"--1", b"1" * 21])
    def test_what_is_no_time(self, text: bytes) -> None:
        with pytest.raises(BadArchive, match="mtime"):
            pax_time(text, "mtime")


class TestSegments:
    def test_in_order(self) -> None:
        check_segments([(0, 4), (4, 0), (10, 6), (16, 0)], 10, 16, 9)

    @pytest.mark.parametrize(
        ("segments", "stored"), [([(4, 4), (0, 4)], 8), ([(0, 17)], 17), ([(0, 4)], 5), ([(17, 0)], 0)]
    )
    def test_refused(self, segments: list[tuple[int, int]], stored: int) -> None:
        with pytest.raises(BadArchive):
            check_segments(segments, stored, 16, 9)

    def test_too_many(self) -> None:
        with pytest.raises(TooMuch):
            check_segments([(0, 0)] * 10, 0, 16, 9)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "meaning", "parent", "last"),
        [
            (b"./", Meaning.ENTRY, (), b""),
            (b"/", Meaning.ENTRY, (), b""),
            (b"./a//b/./c/", Meaning.ENTRY, (b"a", b"b"), b"c"),
            (b"/a", Meaning.ENTRY, (), b"a"),
            (b"a/.wh.b", Meaning.WHITEOUT, (b"a",), b"b"),
            (b".wh...b", Meaning.WHITEOUT, (), b"..b"),
            (b"a/.wh..wh..opq", Meaning.OPAQUE, (b"a",), b""),
            (b".wh..wh..opq", Meaning.OPAQUE, (), b""),
            (b".wh..wh.plnk/1", Meaning.LEAVING, (b".wh..wh.plnk",), b"1"),
            (b"a/.wh..wh.aufs", Meaning.LEAVING, (b"a",), b".wh..wh.aufs"),
            (b"a/.whb", Meaning.ENTRY, (b"a",), b".whb"),
            (b"a/...", Meaning.ENTRY, (b"a",), b"..."),
        ],
    )
    def test_places(self, name: bytes, meaning: Meaning, parent: tuple[bytes, ...], last: bytes) -> None:
        assert place_of(name, LIMITS) == (meaning, parent, last)

    @given(st.binary(max_size=60))
    def test_no_component_ever_leads_away(self, name: bytes) -> None:
        try:
            parts = components(name, LIMITS)
            place = place_of(name, LIMITS)
        except BadArchive:
            return
        for part in (*parts, *place.parent):
            assert part not in (b"", b".", b"..")
            assert b"/" not in part
            assert b"\0" not in part
        assert place.name not in (b".", b"..")

    def test_shown_is_one_printable_line(self) -> None:
        assert shown(b"a\n\x1b\xff'") == r"'a\n\x1b\xff''"
        assert shown("ä" * 1000) == "'" + "ä" * 300 + "' …"


class TestCompression:
    @pytest.mark.parametrize("media_type", ["", "text/plain", "application/vnd.oci.image.layer.v1.tar+xz"])
    def test_unknown_types(self, media_type: str) -> None:
        with pytest.raises(BadArchive, match="no layer"):
            compression_of(media_type)

    @pytest.mark.parametrize(
        ("head", "kind"),
        [
            (b"", "tar"),
            (b"\x1f\x8b", "gzip"),
            (b"\x28\xb5\x2f\xfd", "zstd"),
            (b"\x50\x2a\x4d\x18", "zstd"),
            (b"\x5f\x2a\x4d\x18", "zstd"),
            (b"\x60\x2a\x4d\x18", "tar"),
            (b"\x2a\x4d\x18", "tar"),
        ],
    )
    def test_detected(self, head: bytes, kind: str) -> None:
        assert detect(head) == kind


class TestSpelling:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("a/B", "A/b"),
            ("é", "e\u0301"),
            ("É", "e\u0301"),
            ("ß", "SS"),
            ("ſ", "S"),
            ("K", "k"),
            ("a\u200db", "ab"),
            ("Ω", "ω"),
            ("ﬁ", "FI"),
            ("ᾳ", "ΑΙ"),
            ("가", "가"),
        ],
    )
    def test_taken_for_one(self, one: str, other: str) -> None:
        assert fold(one) == fold(other)

    @given(st.text(max_size=20))
    def test_stable(self, text: str) -> None:
        assert fold(fold(text)) == fold(text)
        assert fold(text.upper().lower()) == fold(text.upper())

    @pytest.mark.parametrize(("one", "other"), [("a", "b"), ("e", "é"), ("a/b", "ab"), ("i", "ı")])
    def test_told_apart(self, one: str, other: str) -> None:
        assert fold(one) != fold(other)

    def test_index(self) -> None:
        index = NameIndex(fold)
        index.record("A/b", 1)
        assert index.spelling("a/B") == "A/b"
        assert index.made_by("A/b", 1)
        assert not index.made_by("a/b", 1)
        assert not index.made_by("A/b", 2)
        index.record("a/b", 2)
        assert (index.spelling("A/b"), index.spelling("c")) == ("a/b", None)
        index.close()

    def test_index_of_names_that_are_no_utf8(self) -> None:
        index = NameIndex()
        name = os.fsdecode(b"\xff/\xed\xa0\x80")
        index.record(name, 3)
        assert index.spelling(name) == name
        assert index.made_by(name, 3)
        index.close()
