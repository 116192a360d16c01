"""Archives that want something they must not get, each by name with what has to become of it.

Made by a writer that can say anything: a header's fields are bytes or numbers that nobody checks. `HOSTILE`
has one `Case` for each function below that is marked `refused` (the error must match) or `defused` (the
tree must be as said).
"""

import base64
import gzip
import hashlib
import io
import struct
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from worker.errors import ContractError, PullFailed, ResourceExhausted
from worker.images.unpack import UnpackLimits

if sys.version_info >= (3, 14):
    from compression.zstd import compress
else:
    from backports.zstd import compress

zstd_compress = compress

TAR = "application/vnd.oci.image.layer.v1.tar"
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"

FILE, HARD, SYM, CHAR, BLOCK, DIR, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
END = bytes(1024)


# -- writing


def octal(value: int, width: int) -> bytes:
    return f"{value:0{width - 1}o}".encode() + b"\0"


def base256(value: int, width: int) -> bytes:
    if value < 0:
        return value.to_bytes(width, "big", signed=True)
    return b"\x80" + value.to_bytes(width - 1, "big")


def header(
    name: bytes,
    kind: bytes = FILE,
    *,
    size: int | bytes = 0,
    mode: int | bytes = 0o644,
    uid: int | bytes = 0,
    gid: int | bytes = 0,
    mtime: int | bytes = 1_700_000_000,
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    tail: bytes = b"",
    checksum: bytes | None = None,
) -> bytes:
    def field(value: int | bytes, width: int) -> bytes:
        return value.ljust(width, b"\0") if isinstance(value, bytes) else octal(value, width)

    block = bytearray(
        struct.pack(
            "100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12s",
            *(name, field(mode, 8), field(uid, 8), field(gid, 8), field(size, 12), field(mtime, 12)),
            *(b" " * 8, kind, link, magic, b"", b"", b"", b"", prefix, b""),
        )
    )
    if tail:
        block[345 : 345 + len(tail)] = tail
    block[148:156] = f"{sum(block):06o}".encode() + b"\0 " if checksum is None else checksum
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def file(name: bytes, data: bytes = b"", **fields: Any) -> bytes:
    return header(name, size=fields.pop("size", len(data)), **fields) + padded(data)


def folder(name: bytes, **fields: Any) -> bytes:
    return header(name, DIR, **{"mode": 0o755, **fields})


def symlink(name: bytes, target: bytes, **fields: Any) -> bytes:
    return header(name, SYM, link=target, **{"mode": 0o777, **fields})


def hard_link(name: bytes, target: bytes, **fields: Any) -> bytes:
    return header(name, HARD, link=target, **fields)


def record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x", name: bytes = b"PaxHeaders/x") -> bytes:
    return raw_pax(b"".join(record(*item) for item in records), kind=kind, name=name)


def raw_pax(data: bytes, kind: bytes = b"x", name: bytes = b"PaxHeaders/x") -> bytes:
    return header(name, kind, size=len(data)) + padded(data)


def long_name(name: bytes, kind: bytes = b"L") -> bytes:
    data = name + b"\0"
    return header(b"././@LongLink", kind, size=len(data), magic=b"ustar  \0") + padded(data)


def tar(*entries: bytes) -> bytes:
    return b"".join(entries) + END


def gnu_sparse(
    name: bytes, segments: Sequence[tuple[int, int]], real: int, data: bytes, more: int = 0
) -> bytes:
    """An old GNU sparse file with at most four segments; `more` sets its "extended" flag."""
    table = b"".join(octal(offset, 12) + octal(length, 12) for offset, length in segments)
    tail = bytes(41) + table.ljust(96, b"\0") + bytes([more]) + octal(real, 12)
    return header(name, b"S", size=len(data), magic=b"ustar  \0", tail=tail) + padded(data)


# -- cases


class Layer(NamedTuple):
    data: bytes
    media_type: str = TAR
    diff_id: str | None = None


class Case(NamedTuple):
    """`build` is given the canary's absolute path. `holds` maps paths in the tree to a file's content, to
    `-> target` of a link or to `/` for a directory; `lacks` are not there; `noted` is in the report's notes.
    """

    name: str
    build: Callable[[bytes], list[Layer]]
    refused: str | None
    error: type[ContractError]
    holds: Mapping[str, bytes | str]
    lacks: Sequence[str]
    noted: str | None
    options: dict[str, Any]


HOSTILE: list[Case] = []
Build = Callable[[bytes], bytes | list[bytes] | list[Layer]]


def refused(
    pattern: str, error: type[ContractError] = PullFailed, **options: Any
) -> Callable[[Build], Build]:
    return _case(pattern, error, {}, (), None, options)


def defused(
    holds: Mapping[str, bytes | str], *, lacks: Sequence[str] = (), noted: str | None = None, **options: Any
) -> Callable[[Build], Build]:
    return _case(None, PullFailed, holds, lacks, noted, options)


def _case(
    pattern: str | None,
    error: type[ContractError],
    holds: Mapping[str, bytes | str],
    lacks: Sequence[str],
    noted: str | None,
    options: dict[str, Any],
) -> Callable[[Build], Build]:
    def take(function: Build) -> Build:
        def build(canary: bytes) -> list[Layer]:
            built = function(canary)
            made = [built] if isinstance(built, bytes) else built
            return [Layer(item) if isinstance(item, bytes) else item for item in made]

        HOSTILE.append(Case(function.__name__, build, pattern, error, holds, lacks, noted, options))
        return function

    return take


def small(**bounds: int) -> dict[str, Any]:
    return {"limits": UnpackLimits(**bounds)}


# Names that lead out


@refused(r"layer 1 of 1, '\.\./canary/precious': .*`\.\.`")
def dotdot_name(canary: bytes) -> bytes:
    return tar(file(b"../canary/precious", b"owned"))


@refused(r"'a/b/\.\./\.\./\.\./canary/precious'")
def dotdot_after_real_directories(canary: bytes) -> bytes:
    return tar(folder(b"a/"), folder(b"a/b/"), file(b"a/b/../../../canary/precious", b"owned"))


@refused(r"'a/\.\./b': .*`\.\.`")
def dotdot_that_stays_inside(canary: bytes) -> bytes:
    return tar(folder(b"a/"), file(b"a/../b", b"x"))


@refused(r"`\.\.`")
def dotdot_directory(canary: bytes) -> bytes:
    return tar(folder(b"../canary/", mode=0o777))


@refused(r"`\.\.`")
def dotdot_by_prefix(canary: bytes) -> bytes:
    return tar(header(b"canary/precious", prefix=b".."))


@refused(r"`\.\.`")
def dotdot_by_gnu_long_name(canary: bytes) -> bytes:
    return tar(long_name(b"../canary/precious"), file(b"harmless", b"owned"))


@refused(r"`\.\.`")
def dotdot_by_pax_path(canary: bytes) -> bytes:
    return tar(pax((b"path", b"../canary/precious")), file(b"harmless", b"owned"))


@refused(r"`\.\.`")
def dotdot_by_sparse_name(canary: bytes) -> bytes:
    sparse = pax(
        (b"GNU.sparse.name", b"../canary/precious"), (b"GNU.sparse.size", b"4"), (b"GNU.sparse.map", b"0,4")
    )
    return tar(sparse, file(b"harmless", b"owns"))


@defused({"etc/shadow": b"inside", "abs": b"inside too"})
def absolute_names(canary: bytes) -> bytes:
    return tar(file(b"/etc/shadow", b"inside"), file(b"///abs", b"inside too"))


@defused({}, lacks=["../canary/owned"])
def absolute_name_of_the_canary(canary: bytes) -> bytes:
    return tar(pax((b"path", canary + b"/owned")), file(b"x", b"inside"))


@defused({"a\\..\\..\\canary\\precious": b"x", "C:\\windows": b"y"})
def windows_separators(canary: bytes) -> bytes:
    return tar(file(b"a\\..\\..\\canary\\precious", b"x"), file(b"C:\\windows", b"y"))


# Symbolic links


@defused({"out": "-> ../canary", "canary/precious": b"inside"})
def write_through_a_link_upwards(canary: bytes) -> bytes:
    return tar(symlink(b"out", b"../canary"), file(b"out/precious", b"inside"))


@defused({"out": "-> /etc", "etc/passwd": b"inside"})
def write_through_an_absolute_link(canary: bytes) -> bytes:
    return tar(symlink(b"out", b"/etc"), file(b"out/passwd", b"inside"))


@defused({}, lacks=["../canary/new"])
def write_through_a_link_to_the_canary(canary: bytes) -> bytes:
    return tar(pax((b"linkpath", canary)), symlink(b"out", b"x"), file(b"out/new", b"inside"))


@defused({"out": "-> ../canary", "canary/precious": b"inside"})
def write_through_a_link_of_the_layer_below(canary: bytes) -> list[bytes]:
    return [tar(symlink(b"out", b"../canary")), tar(file(b"out/precious", b"inside"))]


@defused({"a/b/c": "-> ../../../../../canary", "canary/precious": b"inside"})
def write_through_a_chain_of_links(canary: bytes) -> bytes:
    return tar(
        folder(b"a/b/"),
        symlink(b"a/b/c", b"../../../../../canary"),
        symlink(b"x", b"a/b"),
        symlink(b"y", b"x/c"),
        file(b"y/precious", b"inside"),
    )


@defused({"precious": b"new"})
def a_file_over_a_link(canary: bytes) -> bytes:
    return tar(symlink(b"precious", b"../canary/precious"), file(b"precious", b"new"))


@defused({"precious": b"new"})
def a_file_over_a_link_of_the_layer_below(canary: bytes) -> list[bytes]:
    return [tar(symlink(b"precious", b"../canary/precious")), tar(file(b"precious", b"new"))]


@defused({"d": "/", "d/precious": b"new"})
def a_directory_over_a_link(canary: bytes) -> bytes:
    return tar(symlink(b"d", b"../canary"), folder(b"d/", mode=0o777), file(b"d/precious", b"new"))


@refused("too many symbolic links")
def a_loop_of_links(canary: bytes) -> bytes:
    return tar(symlink(b"a", b"b"), symlink(b"b", b"a"), file(b"a/x"))


@refused("too many symbolic links")
def a_link_to_itself(canary: bytes) -> bytes:
    return tar(symlink(b"a", b"a"), file(b"a/x"))


@refused("more than 20 directories deep", ResourceExhausted, **small(depth=20))
def links_that_lead_ever_deeper(canary: bytes) -> bytes:
    down = b"/".join([b"d"] * 15)
    return tar(folder(down + b"/"), symlink(b"l", down), file(b"l/" + down + b"/x"))


@refused("too many symbolic links")
def a_link_that_walks_in_circles(canary: bytes) -> bytes:
    return tar(folder(b"d/"), long_name(b"d/../" * 800, b"K"), symlink(b"l", b""), file(b"l/x"))


@refused("leads nowhere")
def a_link_without_a_target(canary: bytes) -> bytes:
    return tar(symlink(b"l", b""))


@refused("NUL in its target")
def a_link_with_a_nul(canary: bytes) -> bytes:
    return tar(pax((b"linkpath", b"a\0../canary")), symlink(b"l", b""))


@refused("a symbolic link of 5000 bytes", ResourceExhausted)
def a_link_of_5000_bytes(canary: bytes) -> bytes:
    return tar(long_name(b"x" * 5000, b"K"), symlink(b"l", b"x"))


@refused("ends in a slash")
def a_link_named_like_a_directory(canary: bytes) -> bytes:
    return tar(symlink(b"d/", b"../canary"), file(b"d/precious", b"x"))


@refused("root of an image cannot be a symbolic link")
def the_root_as_a_link(canary: bytes) -> bytes:
    return tar(symlink(b".", b"../canary"), file(b"precious", b"x"))


@refused("without a name")
def a_link_without_a_name(canary: bytes) -> bytes:
    return tar(symlink(b"", b"../canary"), file(b"precious", b"x"))


# Hard links


@refused(r"'h'.*`\.\.`")
def hard_link_upwards(canary: bytes) -> bytes:
    return tar(hard_link(b"h", b"../canary/precious"), file(b"h", b"owned"))


@refused("not there")
def hard_link_to_the_canary(canary: bytes) -> bytes:
    return tar(pax((b"linkpath", canary + b"/precious")), hard_link(b"h", b""))


@refused("not there")
def hard_link_through_a_link_upwards(canary: bytes) -> bytes:
    return tar(symlink(b"out", b"../canary"), hard_link(b"h", b"out/precious"))


@defused({"h": "-> ../canary/precious", "s": "-> ../canary/precious"})
def hard_link_to_a_link(canary: bytes) -> bytes:
    return tar(symlink(b"s", b"../canary/precious"), hard_link(b"h", b"s"))


@defused({"s": "-> ../canary/precious", "h": b"new"})
def hard_link_to_a_link_then_a_file_over_it(canary: bytes) -> bytes:
    return tar(symlink(b"s", b"../canary/precious"), hard_link(b"h", b"s"), file(b"h", b"new"))


@defused({"a": b"old", "h": b"new"})
def a_file_over_a_hard_link_leaves_the_other_name(canary: bytes) -> list[bytes]:
    return [tar(file(b"a", b"old")), tar(hard_link(b"h", b"a"), file(b"h", b"new"))]


@refused("not there")
def hard_link_to_what_was_whited_out(canary: bytes) -> list[bytes]:
    return [tar(file(b"a", b"old")), tar(file(b".wh.a"), hard_link(b"h", b"a"))]


@refused("hard link to a directory")
def hard_link_to_a_directory(canary: bytes) -> bytes:
    return tar(folder(b"d/"), hard_link(b"h", b"d"))


@refused("hard link to itself")
def hard_link_to_itself(canary: bytes) -> bytes:
    return tar(file(b"a", b"x"), hard_link(b"a", b"./a"))


@refused("not there")
def hard_link_to_nothing(canary: bytes) -> bytes:
    return tar(hard_link(b"h", b"a"))


@refused("not there")
def hard_link_to_the_root(canary: bytes) -> bytes:
    return tar(hard_link(b"h", b"/"))


@refused("not there")
def hard_link_to_a_whiteout(canary: bytes) -> bytes:
    return tar(file(b".wh.x"), hard_link(b"h", b".wh.x"))


@refused("a hard link with 4 bytes of content")
def hard_link_with_content(canary: bytes) -> bytes:
    return tar(file(b"a", b"x"), hard_link(b"h", b"a", size=4) + padded(b"evil"))


@refused("hard link to something|No such file")
def hard_link_in_place_of_the_directory_of_its_target(canary: bytes) -> bytes:
    return tar(file(b"d/a", b"x"), hard_link(b"d", b"d/a"))


# Things that are no files


@defused({"dev/ok": b"x"}, lacks=["dev/sda", "dev/kmsg"], noted="'dev/sda': a block device, left out")
def device_nodes(canary: bytes) -> bytes:
    return tar(header(b"dev/sda", BLOCK), header(b"dev/kmsg", CHAR), file(b"dev/ok", b"x"))


@defused({}, lacks=["pipe"], noted="'pipe': a fifo, left out")
def a_fifo(canary: bytes) -> bytes:
    return tar(header(b"pipe", FIFO))


@defused({"d": "/"}, lacks=["d/x"], noted="a character device, left out")
def a_device_in_place_of_a_file_below(canary: bytes) -> list[bytes]:
    return [tar(file(b"d/x", b"old")), tar(header(b"d/x", CHAR))]


@refused("of type b'Z'")
def an_unknown_type(canary: bytes) -> bytes:
    return tar(header(b"z", b"Z"))


@refused("of type b'M'")
def a_continued_volume(canary: bytes) -> bytes:
    return tar(header(b"m", b"M"))


@refused("root of an image cannot be a file")
def the_root_as_a_file(canary: bytes) -> bytes:
    return tar(file(b"/.", b"x"))


@refused("a directory with 3 bytes of content")
def a_directory_with_content(canary: bytes) -> bytes:
    return tar(folder(b"d/", size=3) + padded(b"abc"))


@refused("a file whose name ends in a slash")
def a_file_named_like_a_directory(canary: bytes) -> bytes:
    return tar(file(b"d/", b"x"))


@defused({"su": b"#!", "d": "/"}, noted="setuid, setgid or sticky dropped")
def setuid_bits(canary: bytes) -> bytes:
    return tar(file(b"su", b"#!", mode=0o6755), folder(b"d/", mode=0o2755))


# Whiteouts


@refused("names nothing which could be deleted")
def whiteout_of_nothing(canary: bytes) -> bytes:
    return tar(file(b"d/.wh."))


@refused("names nothing which could be deleted")
def whiteout_of_the_directory_itself(canary: bytes) -> list[bytes]:
    return [tar(file(b"d/x")), tar(file(b"d/.wh.."))]


@refused("names nothing which could be deleted")
def whiteout_of_the_parent(canary: bytes) -> list[bytes]:
    return [tar(file(b"d/x")), tar(file(b".wh..."))]


@refused("below a whiteout, .wh...")
def whiteout_with_a_path(canary: bytes) -> list[bytes]:
    return [tar(file(b"d/x")), tar(file(b"d/.wh.../canary"))]


@refused(r"`\.\.`")
def whiteout_upwards(canary: bytes) -> list[bytes]:
    return [tar(file(b"d/x")), tar(file(b"../.wh.canary"))]


@defused({"canary/kept": b"k", "out": "-> .."}, lacks=["canary/precious"])
def whiteout_through_a_link_upwards(canary: bytes) -> list[bytes]:
    below = tar(symlink(b"out", b".."), file(b"canary/precious", b"p"), file(b"canary/kept", b"k"))
    return [below, tar(file(b"out/canary/.wh.precious"))]


@defused({"out": "-> ../canary"})
def opaque_through_a_link_upwards(canary: bytes) -> list[bytes]:
    return [tar(symlink(b"out", b"../canary")), tar(file(b"out/.wh..wh..opq"))]


@defused({"l": "-> ../canary"})
def whiteout_of_a_link_then_the_link_again(canary: bytes) -> list[bytes]:
    below = tar(symlink(b"l", b"../canary"))
    return [below, tar(file(b".wh.l"), symlink(b"l", b"../canary"))]


@defused({}, lacks=["l"])
def whiteout_of_a_link_to_a_directory(canary: bytes) -> list[bytes]:
    return [tar(symlink(b"l", b"../canary")), tar(file(b".wh.l"))]


@refused("a whiteout that is a directory")
def whiteout_as_a_directory(canary: bytes) -> bytes:
    return tar(folder(b".wh.x/"))


@refused("a whiteout that is a symbolic link")
def whiteout_as_a_link(canary: bytes) -> bytes:
    return tar(symlink(b".wh.x", b"../canary"))


@refused("below a whiteout, .wh..wh..opq")
def an_entry_below_an_opaque_marker(canary: bytes) -> bytes:
    return tar(folder(b"d/"), file(b"d/.wh..wh..opq/x"))


@defused({"d/new": b"n"}, lacks=["d/.wh..wh.aufs", "d/.wh..wh.plnk", "d/old"], noted="left behind by AUFS")
def leavings_of_aufs_in_an_opaque_directory(canary: bytes) -> list[bytes]:
    upper = [file(b"d/.wh..wh..opq"), file(b"d/.wh..wh.aufs"), folder(b"d/.wh..wh.plnk/")]
    upper += [file(b"d/.wh..wh.plnk/12.34"), file(b"d/new", b"n")]
    return [tar(file(b"d/old", b"o")), tar(*upper)]


@defused({"kept": b"k"}, lacks=["a", "d"])
def opaque_root(canary: bytes) -> list[bytes]:
    return [tar(file(b"a"), file(b"d/x")), tar(file(b"kept", b"k"), file(b".wh..wh..opq"))]


@defused({"a": b"same layer"})
def whiteout_of_the_same_layer(canary: bytes) -> list[bytes]:
    return [tar(), tar(file(b"a", b"same layer"), file(b".wh.a"))]


# Names


@refused("a component of its name has 256 bytes", ResourceExhausted)
def an_overlong_component(canary: bytes) -> bytes:
    return tar(pax((b"path", b"n" * 256)), file(b"x"))


@refused("its name has 5000 bytes", ResourceExhausted)
def an_overlong_name(canary: bytes) -> bytes:
    return tar(long_name(b"ab/" * 1666 + b"xy"), file(b"x"))


@refused("300 directories deep", ResourceExhausted)
def a_bottomless_name(canary: bytes) -> bytes:
    return tar(pax((b"path", b"d/" * 299 + b"x")), file(b"x"))


@refused("NUL in its name")
def a_nul_in_a_pax_name(canary: bytes) -> bytes:
    return tar(pax((b"path", b"safe\0../../canary")), file(b"x"))


@refused("NUL in its name")
def a_nul_in_a_long_name(canary: bytes) -> bytes:
    return tar(long_name(b"safe\0../canary"), file(b"x"))


@refused("without a name")
def an_empty_name(canary: bytes) -> bytes:
    return tar(file(b"", b"x"))


@defused({"a\nb": b"x", "\x1b[2J": b"y"})
def control_characters_in_names(canary: bytes) -> bytes:
    return tar(file(b"a\nb", b"x"), file(b"\x1b[2J", b"y"))


@refused(r"'\\x1b\[2Jq\\n': ")
def control_characters_stay_out_of_the_message(canary: bytes) -> bytes:
    return tar(header(b"\x1b[2Jq\n", size=b"-7"))


@defused({"caf\udce9": b"x"})
def a_name_that_is_no_utf8(canary: bytes) -> bytes:
    return tar(file(b"caf\xe9", b"x"))


@defused({"a": b"second"})
def duplicate_entries(canary: bytes) -> bytes:
    return tar(file(b"a", b"first"), file(b"./a", b"second"))


@defused({"a": b"x"}, lacks=["a/b"])
def a_file_over_a_full_directory(canary: bytes) -> bytes:
    return tar(file(b"a/b/c"), file(b"a", b"x"))


@refused("'a' in its path is no directory")
def an_entry_below_a_file(canary: bytes) -> bytes:
    return tar(file(b"a", b"x"), file(b"a/b"))


# Names that a Mac takes for one


@refused("'readme': this file system takes it for 'README'", case_insensitive=True)
def names_that_differ_by_case(canary: bytes) -> bytes:
    return tar(file(b"README", b"1"), file(b"readme", b"2"))


@refused("takes it for 'README'", case_insensitive=True)
def names_that_differ_by_case_across_layers(canary: bytes) -> list[bytes]:
    return [tar(file(b"README", b"1")), tar(file(b"readme", b"2"))]


@refused("takes it for", case_insensitive=True)
def names_that_differ_by_normalisation(canary: bytes) -> bytes:
    return tar(file("caf\u00e9".encode(), b"1"), file("cafe\u0301".encode(), b"2"))


@refused("takes it for", case_insensitive=True)
def names_that_differ_by_a_zero_width_joiner(canary: bytes) -> bytes:
    return tar(folder(b"x.git/"), file("x.g\u200dit".encode(), b"2"))


@refused("takes it for 'Lib'", case_insensitive=True)
def a_link_and_a_directory_that_differ_by_case(canary: bytes) -> bytes:
    return tar(symlink(b"Lib", b"../canary"), file(b"lib/precious", b"x"))


@refused("takes it for 'd/a'", case_insensitive=True)
def a_hard_link_by_another_case(canary: bytes) -> bytes:
    return tar(file(b"d/a", b"x"), hard_link(b"h", b"d/A"))


@refused("no UTF-8", case_insensitive=True)
def no_utf8_for_a_mac(canary: bytes) -> bytes:
    return tar(file(b"caf\xe9", b"x"))


# Damage


@refused("cut off: 3 bytes of its content are missing")
def cut_off_in_content(canary: bytes) -> bytes:
    return header(b"a", size=8) + b"12345"


@refused("cut off: it ends inside a header")
def cut_off_in_a_header(canary: bytes) -> bytes:
    return file(b"a", b"x") + header(b"b")[:300]


@refused("no end marker")
def cut_off_between_entries(canary: bytes) -> bytes:
    return file(b"a", b"x")


@refused("no entry behind it")
def cut_off_after_a_pax_header(canary: bytes) -> bytes:
    return tar(pax((b"path", b"x")))


@refused("no end marker")
def an_empty_blob(canary: bytes) -> bytes:
    return b""


@refused("checksum")
def a_wrong_checksum(canary: bytes) -> bytes:
    return tar(header(b"a", checksum=b"000000\0 "))


@refused("checksum")
def no_archive_at_all(canary: bytes) -> bytes:
    return b"#!/bin/sh\necho owned\n".ljust(1024, b"x")


@refused("something behind the archive's end")
def a_second_archive_behind_the_end(canary: bytes) -> bytes:
    return tar(file(b"a", b"x")) + tar(file(b"../canary/precious", b"owned"))


@refused("something behind the archive's end")
def an_entry_behind_one_block_of_zeros(canary: bytes) -> bytes:
    return bytes(512) + tar(file(b"a", b"x"))


@refused("size in its header is no number")
def a_size_with_a_sign(canary: bytes) -> bytes:
    return tar(header(b"a", size=b"-0000000001"))


@refused("size in its header is no number")
def a_size_as_python_would_read_it(canary: bytes) -> bytes:
    return tar(header(b"a", size=b"0o0_10"))


@refused("size in its header is out of range")
def a_negative_size(canary: bytes) -> bytes:
    return tar(header(b"a", size=base256(-1, 12)))


@refused("size in its header is out of range")
def a_size_of_2_to_the_80(canary: bytes) -> bytes:
    return tar(header(b"a", size=base256(2**80, 12)))


@refused("more than 1000000 bytes", ResourceExhausted, **small(bytes=1_000_000))
def a_huge_size_without_content(canary: bytes) -> bytes:
    return tar(header(b"a", size=base256(2**62, 12)))


@refused("size in its pax header is no number")
def a_negative_pax_size(canary: bytes) -> bytes:
    return tar(pax((b"size", b"-1")), header(b"a"))


# Extended headers


@refused("an extended header of 2097152 bytes", ResourceExhausted)
def an_overlong_pax_header(canary: bytes) -> bytes:
    return tar(header(b"PaxHeaders/a", b"x", size=2 << 20) + bytes(2 << 20), file(b"a"))


@refused("an extended header of 68719476735 bytes", ResourceExhausted)
def a_long_name_of_64_gib(canary: bytes) -> bytes:
    return tar(header(b"././@LongLink", b"L", size=2**36 - 1))


@refused("two extended headers of one kind")
def long_names_without_end(canary: bytes) -> bytes:
    return tar(*[long_name(b"n")] * 5000, file(b"a"))


@refused("two extended headers of one kind")
def pax_headers_without_end(canary: bytes) -> bytes:
    return tar(*[pax((b"mtime", b"1"))] * 5000, file(b"a"))


@refused("more than 200 headers", ResourceExhausted, **small(entries=100))
def global_headers_without_end(canary: bytes) -> bytes:
    return tar(*[pax((b"comment", b"x"), kind=b"g")] * 300, file(b"a"))


@refused("has no length")
def a_pax_record_without_a_length(canary: bytes) -> bytes:
    return tar(raw_pax(b"path=x\n"), file(b"a"))


@refused("does not end where it says")
def a_pax_record_that_is_too_long(canary: bytes) -> bytes:
    return tar(raw_pax(b"99 path=x\n"), file(b"a"))


@refused("has no length")
def a_pax_record_of_negative_length(canary: bytes) -> bytes:
    return tar(raw_pax(b"-5 path=x\n"), file(b"a"))


@refused("does not end where it says")
def a_pax_record_of_no_length(canary: bytes) -> bytes:
    return tar(raw_pax(b"0 path=x\n"), file(b"a"))


@refused("has no key")
def a_pax_record_without_a_key(canary: bytes) -> bytes:
    return tar(raw_pax(record(b"", b"x")), file(b"a"))


@refused("mtime in its pax header is no time")
def a_pax_time_that_is_none(canary: bytes) -> bytes:
    return tar(pax((b"mtime", b"1e400")), file(b"a"))


@defused({"a": b"x", "b": b"y"})
def times_beyond_every_clock(canary: bytes) -> bytes:
    far = tar(pax((b"mtime", b"9" * 20)), file(b"a", b"x"))[:-1024]
    return tar(far, file(b"b", b"y", mtime=base256(-(2**62), 12)))


@refused("sets 'path' for all")
def a_global_path(canary: bytes) -> bytes:
    return tar(pax((b"path", b"../canary/precious"), kind=b"g"), file(b"a"))


@refused("sets 'size' for all")
def a_global_size(canary: bytes) -> bytes:
    return tar(pax((b"size", b"0"), kind=b"g"), file(b"a", b"x" * 600))


@refused("bytes of extended attributes", ResourceExhausted)
def overlong_attributes(canary: bytes) -> bytes:
    return tar(pax((b"SCHILY.xattr.user.big", b"x" * 600_000)), file(b"a"))


@refused("attribute whose name is empty, too long or has a NUL")
def an_attribute_with_a_nul(canary: bytes) -> bytes:
    return tar(pax((b"SCHILY.xattr.user.a\0b", b"x")), file(b"a"))


@defused({"a": b"x"}, noted="'security.capability'")
def attributes_of_the_kernel(canary: bytes) -> bytes:
    capability = base64.b64decode("AQAAAgAgAAAAAAAAAAAAAAAAAAA=")
    names = (
        b"security.capability",
        b"security.selinux",
        b"trusted.overlay.opaque",
        b"system.posix_acl_access",
    )
    return tar(pax(*[(b"SCHILY.xattr." + name, capability) for name in names]), file(b"a", b"x"))


# Sparse files


@refused("out of order or leaves the file")
def a_sparse_map_that_leaves_the_file(canary: bytes) -> bytes:
    return tar(gnu_sparse(b"s", [(0, 4), (100, 4)], 50, b"aaaabbbb"))


@refused("out of order or leaves the file")
def a_sparse_map_that_overlaps(canary: bytes) -> bytes:
    return tar(gnu_sparse(b"s", [(0, 4), (2, 4)], 50, b"aaaabbbb"))


@refused("stands for 8 bytes, and 4 are stored")
def a_sparse_map_of_more_than_is_stored(canary: bytes) -> bytes:
    return tar(gnu_sparse(b"s", [(0, 8)], 50, b"aaaa"))


@refused("files of the image have more than", ResourceExhausted)
def a_sparse_file_of_4_eib(canary: bytes) -> bytes:
    numbers = ((b"GNU.sparse.size", str(2**62).encode()), (b"GNU.sparse.map", b"0,4"))
    return tar(pax(*numbers), file(b"s", b"aaaa"))


@refused("cut off: it ends inside a sparse map")
def a_sparse_map_that_never_ends(canary: bytes) -> bytes:
    return gnu_sparse(b"s", [(0, 4)], 50, b"", more=1)


@refused("more than 100000 segments", ResourceExhausted)
def a_sparse_map_of_a_billion(canary: bytes) -> bytes:
    numbers = ((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"9"))
    return tar(pax(*numbers), file(b"s", padded(b"1000000000\n")))


@refused("sparse map is longer than its content")
def a_sparse_map_longer_than_its_content(canary: bytes) -> bytes:
    numbers = ((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"9"))
    return tar(pax(*numbers), file(b"s", padded(b"90\n")))


@refused("sparse map is out of order")
def a_sparse_map_with_lengths_only(canary: bytes) -> bytes:
    numbers = ((b"GNU.sparse.size", b"9"), (b"GNU.sparse.numbytes", b"4"), (b"GNU.sparse.numbytes", b"4"))
    return tar(pax(*numbers), file(b"s", b"aaaa"))


@refused("format that is not supported")
def a_sparse_file_of_star(canary: bytes) -> bytes:
    return tar(header(b"s", b"S"))


# Too much


def bomb(mib: int) -> bytes:
    return tar(header(b"zeros", size=mib << 20), bytes(mib << 20))


@refused("decompression bomb", ResourceExhausted, **small(ratio_floor=1 << 20))
def a_gzip_bomb(canary: bytes) -> list[Layer]:
    return [Layer(gzip.compress(bomb(8), 9), GZIP)]


@refused("decompression bomb", ResourceExhausted, **small(ratio_floor=1 << 20))
def a_zstd_bomb(canary: bytes) -> list[Layer]:
    return [Layer(zstd_compress(bomb(8)), ZSTD)]


@refused("unpack to more than 2097152 bytes", ResourceExhausted, **small(bytes=2 << 20))
def a_bomb_in_what_is_left_out(canary: bytes) -> list[Layer]:
    return [Layer(gzip.compress(tar(header(b".wh.x", size=8 << 20), bytes(8 << 20))), GZIP)]


@refused("unpack to more than", ResourceExhausted, **small(bytes=3 << 20))
def a_bomb_in_pieces(canary: bytes) -> list[Layer]:
    return [Layer(gzip.compress(bomb(1)), GZIP)] * 5


@refused("more than 1000 entries", ResourceExhausted, **small(entries=1000))
def too_many_entries(canary: bytes) -> bytes:
    return tar(*[header(b"f%d" % n) for n in range(1100)])


@refused("more than 1000 entries", ResourceExhausted, **small(entries=1000))
def too_many_entries_in_several_layers(canary: bytes) -> list[bytes]:
    return [tar(*[header(b"%d/f%d" % (layer, n)) for n in range(300)]) for layer in range(4)]


@refused("compressed frames", ResourceExhausted, **small(entries=1000))
def too_many_gzip_members(canary: bytes) -> list[Layer]:
    return [Layer(gzip.compress(b"") * 1500 + gzip.compress(tar()), GZIP)]


@refused("zstd stream is damaged", PullFailed, **small(window_bytes=1 << 20))
def a_zstd_window_that_takes_all_memory(canary: bytes) -> list[Layer]:
    # RFC 8878 3.1.1: magic, a descriptor without content size, a window of 2^31 bytes, one raw last block.
    return [Layer(b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([21 << 3]) + b"\x01\x00\x00", ZSTD)]


@refused("no room left on the disk", ResourceExhausted, **small(reserve_bytes=1 << 60))
def more_than_the_disk_has(canary: bytes) -> bytes:
    return tar(*[header(b"f%d" % n) for n in range(600)])


# Compression and digests


@refused("cut off: its gzip stream has no end")
def a_gzip_blob_that_is_cut_off(canary: bytes) -> list[Layer]:
    return [Layer(gzip.compress(tar(file(b"a", bytes(range(256)) * 99)))[:-20], GZIP)]


@refused("cut off: its zstd stream has no end")
def a_zstd_blob_that_is_cut_off(canary: bytes) -> list[Layer]:
    return [Layer(zstd_compress(tar(file(b"a", bytes(range(256)) * 99)))[:-20], ZSTD)]


@refused("gzip stream is damaged")
def a_gzip_blob_with_a_wrong_checksum(canary: bytes) -> list[Layer]:
    blob = bytearray(gzip.compress(tar(file(b"a", b"x"))))
    blob[-8] ^= 1
    return [Layer(bytes(blob), GZIP)]


@refused("something else behind frame 1")
def garbage_behind_gzip(canary: bytes) -> list[Layer]:
    return [Layer(gzip.compress(tar(file(b"a", b"x"))) + b"owned", GZIP)]


@refused("followed by something that is no gzip stream")
def garbage_behind_zeros_behind_gzip(canary: bytes) -> list[Layer]:
    return [Layer(gzip.compress(tar(file(b"a", b"x"))) + bytes(300_000) + b"owned", GZIP)]


@refused("something else behind frame 1")
def garbage_behind_zstd(canary: bytes) -> list[Layer]:
    return [Layer(zstd_compress(tar(file(b"a", b"x"))) + b"owned!!!", ZSTD)]


@refused("something behind the archive's end")
def a_second_archive_in_a_second_gzip_member(canary: bytes) -> list[Layer]:
    return [Layer(gzip.compress(tar(file(b"a", b"x"))) + gzip.compress(tar(file(b"b", b"y"))), GZIP)]


@refused("media type says gzip, and it is tar")
def a_media_type_that_lies(canary: bytes) -> list[Layer]:
    return [Layer(tar(file(b"a", b"x")), GZIP)]


@refused("compressed with xz")
def a_format_that_no_layer_has(canary: bytes) -> list[Layer]:
    return [Layer(b"\xfd7zXZ\0" + bytes(600), TAR)]


@refused("no layer that can be unpacked")
def a_media_type_that_is_no_layer(canary: bytes) -> list[Layer]:
    return [Layer(tar(), "application/vnd.oci.image.config.v1+json")]


@refused("the image's config says 'sha256:0000")
def content_of_another_digest(canary: bytes) -> list[Layer]:
    return [Layer(tar(file(b"a", b"x")), TAR, "sha256:" + "0" * 64)]


@refused("uses 'md5', which is not supported")
def a_digest_of_a_broken_kind(canary: bytes) -> list[Layer]:
    return [Layer(tar(), TAR, "md5:" + hashlib.md5(tar(), usedforsecurity=False).hexdigest())]


@refused("gzip stream is damaged")
def gzip_that_is_no_gzip(canary: bytes) -> list[Layer]:
    return [Layer(b"\x1f\x8b" + zlib.compress(tar()), GZIP)]


def gzip_members(*parts: bytes) -> bytes:
    """Each part in a member of its own."""
    out = io.BytesIO()
    for part in parts:
        out.write(gzip.compress(part, mtime=0))
    return out.getvalue()
