"""The pure rules of s3 volumes: names, sources, secrets, and what becomes of an object."""

import itertools
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import InvalidSpec
from schemas.spec import S3Storage
from worker.volume_s3.decide import READONLY, TABLE, Action, Side, decide
from worker.volume_s3.keys import MAX_KEY_BYTES, conflict_path, fold, folders_of, path_of, unusable
from worker.volume_s3.source import AMAZON, credentials_of, mirror_name, source_of
from worker.volume_s3.transfer import _mtime_ns

INSTANCE = "01J0000000000000000000000A"


def storage(**fields: object) -> S3Storage:
    return S3Storage(**{"bucket": "bucket", "target": "/data", **fields})  # type: ignore[arg-type]


# -- names


@given(
    st.text(max_size=300) | st.lists(st.sampled_from(["..", ".", "", "a", "ü", "\x00", "-"])).map("/".join)
)
def test_a_usable_key_stays_below_the_folder(key: str) -> None:
    if unusable(key) is None:
        top = "/mirror/files"
        assert os.path.normpath(f"{top}/{key}") == f"{top}/{key}"
        assert key.split("/")[-1] not in ("", ".", "..")
        assert "\0" not in key


@given(st.text(max_size=40), st.text(max_size=40))
def test_paths_come_back_as_keys(prefix: str, path: str) -> None:
    assert path_of(prefix + path, prefix) == (path or None)


@given(st.lists(st.text("aé/.x", min_size=1, max_size=300), min_size=1, max_size=5).map("/".join))
def test_the_name_beside_is_usable_where_the_name_is(path: str) -> None:
    if unusable(path) is None:
        beside = conflict_path(path, INSTANCE)
        assert unusable(beside) is None
        assert beside != path
        assert beside.endswith(f".conflict-{INSTANCE.lower()}")


def test_a_name_beside_fits_whatever_the_folder() -> None:
    path = "/".join(["f" * 200] * 5) + "/" + "n" * 15
    assert len(path.encode()) <= MAX_KEY_BYTES
    assert unusable(conflict_path(path, INSTANCE)) is None


def test_folding() -> None:
    assert fold("Straße/É", True) == fold("STRASSE/e\u0301", True)
    assert fold("A", False) != fold("a", False)
    assert folders_of("a/b/c") == ["a", "a/b"]


# -- what becomes of an object

SIDES = list(itertools.product(Side, Side))


def test_every_pair_is_decided() -> None:
    assert set(TABLE) == set(READONLY) == set(SIDES)


@pytest.mark.parametrize(("here", "there"), SIDES)
@pytest.mark.parametrize("fetching", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_nothing_that_only_one_side_has_is_lost(here: Side, there: Side, fetching: bool, kept: bool) -> None:
    action = decide(here, there, fetching=fetching, kept=kept)
    if here is Side.CHANGED and not (kept and there is Side.CHANGED):
        assert action in (Action.UPLOAD, Action.KEEP_BOTH)
    if there is Side.CHANGED:
        assert action in (Action.DOWNLOAD, Action.NOTHING, Action.KEEP_BOTH)
    if action is Action.DELETE_THERE:
        assert (here, there) == (Side.ABSENT, Side.SAME)
    if action is Action.DELETE_HERE:
        assert (here, there) == (Side.SAME, Side.ABSENT)
    if not fetching:
        assert action not in (Action.DOWNLOAD, Action.DELETE_HERE)


@pytest.mark.parametrize(("here", "there"), SIDES)
def test_a_read_only_mirror_never_writes(here: Side, there: Side) -> None:
    assert decide(here, there, fetching=False, readonly=True) is Action.NOTHING
    fetched = decide(here, there, fetching=True, readonly=True)
    assert fetched not in (Action.UPLOAD, Action.KEEP_BOTH, Action.DELETE_THERE)


# -- sources and secrets


def test_a_source_and_its_defaults() -> None:
    plain = source_of(storage(), field="f")
    assert (plain.endpoint, plain.origin, plain.region, plain.path_style) == (
        None,
        AMAZON,
        "us-east-1",
        False,
    )
    assert (plain.prefix, plain.credentials, plain.interval_s) == ("", None, 60.0)
    full = source_of(
        storage(
            prefix="/a/b/",
            endpoint="https://S3.Example.net",
            region="eu-1",
            credentials="$S:key",
            sync_interval="5m",
            readonly=True,
        ),
        field="f",
    )
    assert (full.prefix, full.origin, full.path_style) == ("a/b/", "https://s3.example.net:443", True)
    assert (full.region, full.credentials, full.interval_s, full.readonly) == ("eu-1", "key", 300.0, True)
    assert full.url == "s3://bucket/a/b/"
    assert (
        source_of(storage(endpoint="http://[::1]:9000/", path_style=False), field="f").origin
        == "http://[::1]:9000"
    )


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"bucket": "a/b"}, "f.bucket"),
        ({"bucket": ".."}, "f.bucket"),
        ({"bucket": "arn:aws:s3:::x"}, "f.bucket"),
        ({"endpoint": "ftp://host"}, "f.endpoint"),
        ({"endpoint": "host:9000"}, "f.endpoint"),
        ({"endpoint": "https://user:secret@host"}, "f.endpoint"),
        ({"endpoint": "https://host/path"}, "f.endpoint"),
        ({"endpoint": "https://host?query"}, "f.endpoint"),
        ({"endpoint": "https://host:99999"}, "f.endpoint"),
        ({"endpoint": "https://ho st"}, "f.endpoint"),
        ({"endpoint": "https://[::1"}, "f.endpoint"),
        ({"region": "a b"}, "f.region"),
    ],
)
def test_sources_that_are_refused(fields: dict[str, object], where: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        source_of(storage(**fields), field="f")
    assert caught.value.field == where
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("AKID:sec:ret\n", None),
        ('{"access_key_id": "AKID", "secret_access_key": "sec:ret"}', None),
        ('{"AccessKeyId": "AKID", "SecretAccessKey": "sec:ret", "SessionToken": "t"}', "t"),
    ],
)
def test_forms_of_a_secret(text: str, token: str | None) -> None:
    found = credentials_of(text, "s3")
    assert (found.access_key_id, found.secret_access_key, found.session_token) == ("AKID", "sec:ret", token)
    assert "sec:ret" not in f"{found!r} {found}"


@pytest.mark.parametrize(
    "text", ["", "onlykey", ":x", "x:", "{", "{}", '{"access_key_id": "verysecret"}', "[1]"]
)
def test_what_is_no_secret_is_not_shown(text: str) -> None:
    with pytest.raises(ValueError, match="the secret s3") as caught:
        credentials_of(text, "s3")
    assert "verysecret" not in str(caught.value)


def test_the_name_of_a_mirror_is_that_of_a_volume() -> None:
    assert mirror_name(INSTANCE, 12) == f"s3-{INSTANCE.lower()}-12"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1700000000.25", 1_700_000_000_250_000_000),
        ("0", 0),
        ("1700000000.1234567891", 1_700_000_000_123_456_789),
        ("-1", None),
        ("1e9", None),
        ("9" * 12, None),
        ("", None),
        ("1.x", None),
        ("١", None),
    ],
)
def test_times_out_of_metadata(text: str, expected: int | None) -> None:
    assert _mtime_ns(text) == expected


def test_the_library_is_loaded_by_the_first_mirror_only() -> None:
    program = "import sys, worker.agent; print([m for m in sys.modules if m.split('.')[0] in ('botocore', 'urllib3')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
