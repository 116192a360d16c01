"""Who a container runs as: numbers, names of the image's own files, and files that want to do harm."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.images.accounts import MAX_FILE_BYTES, MAX_ID, USER, read_accounts, run_as
from worker.platform.base import RunAs

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
broken line
app:x:1000:1001:An app:/home/app:/bin/sh
app:x:0:0:a second one of the name:/:/bin/sh
minus:x:-1:-1::/:
huge:x:99999999999:1::/:
hex:x:0x10:1::/:
short:x:5:6
:x:7:8::/:
+::::::
n\xf6t utf-8:x:9:9::/:
"""
GROUP = b"root:x:0:\nstaff:x:50:app\nbad:x:fifty:\nstaff:x:0:\n"


@pytest.mark.parametrize(
    ("user", "uid", "gid"),
    [
        ("1000", 1000, 1001),
        ("4711", 4711, 4711),
        ("0", 0, 0),
        ("root", 0, 0),
        ("app", 1000, 1001),
        ("app:staff", 1000, 50),
        ("app:7", 1000, 7),
        ("4711:staff", 4711, 50),
        ("4711:12", 4711, 12),
        (f"{MAX_ID}", MAX_ID, MAX_ID),
    ],
)
def test_users(user: str, uid: int, gid: int) -> None:
    assert run_as(user, PASSWD, GROUP) == RunAs(uid=uid, gid=gid)


@pytest.mark.parametrize(
    ("user", "reason"),
    [
        ("nobody", "no user nobody"),
        ("app:wheel", "no group wheel"),
        ("minus", "no user minus"),
        ("huge", "no user huge"),
        ("hex", "no user hex"),
        ("short", "no user short"),
        ("app:bad", "no group bad"),
        (str(MAX_ID + 1), "numbers go up to"),
        ("9" * 30, "numbers go up to"),
        (f"1:{2**32}", "numbers go up to"),
        ("", "must be user"),
        (":5", "must be user"),
        ("a b", "must be user"),
        ("-1", "must be user"),
        ("app:", "must be user"),
        ("a:b:c", "must be user"),
        ("ä", "must be user"),
        ("+", "must be user"),
    ],
)
def test_no_users(user: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        run_as(user, PASSWD, GROUP)


@given(st.from_regex(USER, fullmatch=True), st.binary(max_size=300), st.binary(max_size=300))
def test_whatever_the_files_hold(user: str, passwd: bytes, group: bytes) -> None:
    try:
        found = run_as(user, passwd, group)
    except ValueError:
        return
    assert 0 <= found.uid <= MAX_ID
    assert 0 <= found.gid <= MAX_ID


def test_files_are_the_images(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    assert read_accounts(tmp_path) == (b"", b"")
    (tmp_path / "usr").mkdir()
    (tmp_path / "usr" / "passwd").write_bytes(PASSWD)
    # An absolute link means a file of the image.
    (tmp_path / "etc" / "passwd").symlink_to("/usr/passwd")
    (tmp_path / "etc" / "group").write_bytes(GROUP)
    assert read_accounts(tmp_path) == (PASSWD, GROUP)


def test_no_link_leads_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (tmp_path / "secret").write_text("mallory:x:4242:4242::/:\n")
    (root / "etc" / "passwd").symlink_to("../../secret")
    assert read_accounts(root) == (b"", b"")
    (root / "etc" / "passwd").unlink()
    (root / "etc" / "passwd").symlink_to("passwd")
    assert read_accounts(root) == (b"", b"")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    passwd = tmp_path / "etc" / "passwd"
    os.mkfifo(passwd)
    with pytest.raises(ValueError, match="is no file"):
        read_accounts(tmp_path)
    passwd.unlink()
    passwd.mkdir()
    with pytest.raises(ValueError, match="passwd"):
        read_accounts(tmp_path)
    passwd.rmdir()
    with passwd.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        read_accounts(tmp_path)
