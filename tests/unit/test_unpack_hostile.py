"""Every hostile archive is refused or defused, and nothing beside the tree changes."""

import os
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.errors import PullFailed, ResourceExhausted
from worker.images.trees import remove_tree
from worker.images.unpack import UnpackLimits

from . import hostile_archives as archives
from .hostile_archives import HOSTILE, Case
from .unpack_help import plant_canary, surroundings, try_case, unpack, write_layers
from .unprivileged import as_nobody, needs_root

_BOUNDS = UnpackLimits(bytes=1 << 20, entries=200)


def test_there_are_enough() -> None:
    assert len(HOSTILE) >= 60
    assert len({case.name for case in HOSTILE}) == len(HOSTILE)


@pytest.mark.parametrize("harm", ["write", "chmod", "link", "add", "delete", "touch"])
def test_the_canary_sings(harm: str, tmp_path: Path) -> None:
    canary = plant_canary(tmp_path)
    before = surroundings(tmp_path)
    precious = canary / "precious"
    if harm == "write":
        precious.write_bytes(b"do not twitch")
    elif harm == "chmod":
        precious.chmod(0o600)
    elif harm == "link":
        os.link(precious, tmp_path / "elsewhere")
    elif harm == "add":
        (tmp_path / "new").touch()
    elif harm == "delete":
        precious.unlink()
    else:
        os.utime(canary / "sub")
    assert surroundings(tmp_path) != before


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.name)
def test_as_this_user(case: Case, tmp_path: Path) -> None:
    held = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert try_case(case, tmp_path) is None
    if held:
        assert len(os.listdir("/proc/self/fd")) == held


@needs_root
def test_all_as_nobody(tmp_path: Path) -> None:
    def run(home: Path) -> None:
        wrong = {}
        for case in HOSTILE:
            folder = home / case.name
            folder.mkdir()
            said = try_case(case, folder)
            if said is not None:
                wrong[case.name] = said
        assert not wrong

    as_nobody(run, tmp_path)


# Archives that nobody thought of

_NAMES = (
    "a b a/b a/b/c b/a ./a/ /a b/c b/c/d canary/precious canary A . a/c a/c/b ../canary/precious "
    ".wh.a a/.wh.b .wh..wh..opq a/.wh..wh..opq .wh.. b/.wh.a"
)
_names = st.sampled_from(_NAMES.encode().split())
_targets = st.sampled_from(
    [
        b"a",
        b"b",
        b"a/b",
        b"/",
        b".",
        b"..",
        b"../canary",
        b"../canary/precious",
        b"/a",
        b"../../a",
        b"b/c",
        b"",
    ]
)
_kinds = st.sampled_from([b"0", b"0", b"1", b"2", b"2", b"3", b"5", b"5", b"6"])


@st.composite
def _entries(draw: st.DrawFn) -> bytes:
    kind = draw(_kinds)
    data = draw(st.binary(max_size=20)) if kind == b"0" else b""
    mode = draw(st.sampled_from([0, 0o400, 0o555, 0o644, 0o777, 0o6755]))
    entry = archives.file(draw(_names), data, kind=kind, link=draw(_targets), mode=mode)
    return (archives.pax((b"path", draw(_names))) if draw(st.integers(0, 9)) == 0 else b"") + entry


_layers = st.lists(
    st.lists(_entries(), max_size=8).map(lambda parts: archives.tar(*parts)), min_size=1, max_size=4
)


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    """A hostile archive with some bytes changed; the checksums of its headers are put right again."""
    case = draw(st.sampled_from(HOSTILE))
    data = bytearray(case.build(b"/nonexistent")[0].data[: 64 << 10])
    if not data:
        return b""
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = struct.pack("8s", b"%06o\0 " % sum(data[at : at + 512]))
    return bytes(data)


def _survives(layers: list[archives.Layer], case_insensitive: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        plant_canary(home)
        write_layers(home, layers)
        before = surroundings(home)
        try:
            unpack(home, *layers, case_insensitive=case_insensitive, limits=_BOUNDS)
        except (PullFailed, ResourceExhausted):
            pass
        finally:
            remove_tree(home / "dest")
        (home / "dest").mkdir()
        assert surroundings(home) == before


@given(_layers, st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_sequence_of_entries(layers: list[bytes], case_insensitive: bool) -> None:
    _survives([archives.Layer(layer) for layer in layers], case_insensitive)


@given(_damaged(), st.sampled_from([archives.TAR, archives.GZIP, archives.ZSTD]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_damage(data: bytes, media_type: str) -> None:
    _survives([archives.Layer(data, media_type), archives.Layer(data)], False)


@given(st.binary(max_size=2000), st.sampled_from([b"", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"]))
@settings(max_examples=100, deadline=None)
def test_any_bytes(data: bytes, magic: bytes) -> None:
    _survives([archives.Layer(magic + data, archives.GZIP)], False)
