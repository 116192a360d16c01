"""A mirror and its bucket: what goes where, what is kept when both have changed, and what a hostile side can do."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.s3_help import KEYS, Bucket, Fault, FaultProxy, Request, moto, needs_moto
from worker.volume_s3.client import S3Client
from worker.volume_s3.failures import NoRoom, S3Failure, Stopped
from worker.volume_s3.files import MirrorTree
from worker.volume_s3.outcome import Outcome
from worker.volume_s3.source import S3Source
from worker.volume_s3.state import MirrorState
from worker.volume_s3.sync import MirrorPass

pytestmark = needs_moto

INSTANCE = "01J0000000000000000000000A"
BESIDE = f".conflict-{INSTANCE.lower()}"
PART = 5 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture
def bucket(server: str) -> Bucket:
    return Bucket(server, f"b-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def proxy(server: str) -> Iterator[FaultProxy]:
    with FaultProxy(server).running() as made:
        yield made


class Mirror:
    """One mirror as the worker keeps it."""

    def __init__(self, folder: Path, source: S3Source) -> None:
        self.folder = folder
        self.files = folder / "files"
        self.source = source
        self.stopped = threading.Event()
        for path in (folder, self.files, folder / "incoming"):
            path.mkdir(exist_ok=True)

    def _with(self, use: Callable[[MirrorPass], Any], **settings: Any) -> Any:
        tree = MirrorTree(self.files, self.folder / "incoming")
        state = MirrorState(self.folder)
        client = S3Client(self.source, KEYS, private=True, stopped=self.stopped)
        fields: dict[str, Any] = {
            "fetching": False,
            "owned": True,
            "part_bytes": PART,
            "first_s": 0.001,
            **settings,
        }
        try:
            return use(
                MirrorPass(
                    source=self.source,
                    client=client,
                    state=state,
                    tree=tree,
                    instance=INSTANCE,
                    stopped=self.stopped,
                    **fields,
                )
            )
        finally:
            client.close()
            state.close()
            tree.close()

    def fetch(self, **settings: Any) -> Outcome:
        return self._with(MirrorPass.run, fetching=True, **settings)

    def push(self, **settings: Any) -> Outcome:
        return self._with(MirrorPass.run, **settings)

    def changed(self) -> bool:
        return bool(self._with(MirrorPass.has_changes))

    def write(self, path: str, text: str | bytes) -> Path:
        place = self.files / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text.encode() if isinstance(text, str) else text)
        return place

    def tree(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.files)): path.read_bytes()
            for path in sorted(self.files.rglob("*"))
            if path.is_file() and not path.is_symlink()
        }


@pytest.fixture
def mirror(tmp_path: Path, bucket: Bucket, proxy: FaultProxy) -> Mirror:
    return Mirror(tmp_path / "mirror", bucket.source(proxy.url))


def test_it_is_fetched_and_what_is_written_goes_back(mirror: Mirror, bucket: Bucket) -> None:
    bucket.put("a.txt", "one")
    bucket.put("deep/er/b.txt", "two", mtime="1700000000.25", sandfleet_executable="1")
    bucket.put("deep/er/empty", "")
    assert mirror.fetch().downloaded == 3
    assert mirror.tree() == {"a.txt": b"one", "deep/er/b.txt": b"two", "deep/er/empty": b""}
    found = (mirror.files / "deep/er/b.txt").stat()
    assert found.st_mtime_ns == 1_700_000_000_250_000_000
    assert found.st_mode & 0o777 == 0o755
    assert not mirror.changed()
    mirror.write("a.txt", "changed")
    mirror.write("new/c.txt", "three").chmod(0o755)
    (mirror.files / "deep/er/b.txt").unlink()
    assert mirror.changed()
    done = mirror.push()
    assert (done.uploaded, done.deleted_there, done.kept_both) == (2, 1, [])
    assert bucket.keys() == ["a.txt", "deep/er/empty", "new/c.txt"]
    assert bucket.get("a.txt") == b"changed"
    assert bucket.request("HEAD", "new/c.txt")[1]["x-amz-meta-sandfleet-executable"] == "1"
    again = mirror.push()
    assert (again.uploaded, again.downloaded, again.deleted_there) == (0, 0, 0)
    assert not mirror.changed()


# -- both sides change


def test_where_both_have_changed_both_are_kept(mirror: Mirror, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put("d/a.txt", "base")
    mirror.fetch()
    bucket.put("d/a.txt", "theirs")
    mirror.write("d/a.txt", "ours")
    done = mirror.push(owned=False)
    assert done.kept_both == [f"d/a.txt{BESIDE}"]
    assert bucket.get("d/a.txt") == b"theirs"
    assert bucket.get(f"d/a.txt{BESIDE}") == b"ours"
    assert mirror.tree() == {"d/a.txt": b"ours"}  # not touched while it runs
    puts = proxy.count("PUT")
    assert mirror.push().kept_both == []
    assert proxy.count("PUT") == puts
    mirror.write("d/a.txt", "ours again")
    mirror.push()
    assert bucket.get(f"d/a.txt{BESIDE}") == b"ours again"
    mirror.fetch()
    assert mirror.tree() == {"d/a.txt": b"theirs", f"d/a.txt{BESIDE}": b"ours again"}
    assert not mirror.changed()


def test_before_a_start_both_are_kept_too(mirror: Mirror, bucket: Bucket) -> None:
    bucket.put("a", "base")
    mirror.fetch()
    mirror.write("a", "ours")
    mirror.write("new", "ours")
    bucket.put("a", "theirs")
    bucket.put("new", "theirs")
    done = mirror.fetch()
    assert sorted(done.kept_both) == [f"a{BESIDE}", f"new{BESIDE}"]
    assert mirror.tree() == {"a": b"theirs", "new": b"theirs"}
    assert bucket.get(f"a{BESIDE}") == bucket.get(f"new{BESIDE}") == b"ours"


def test_a_change_beats_a_deletion(mirror: Mirror, bucket: Bucket) -> None:
    for name in ("here", "there"):
        bucket.put(name, "base")
    mirror.fetch()
    mirror.write("here", "changed here")
    bucket.delete("here")
    (mirror.files / "there").unlink()
    bucket.put("there", "changed there")
    mirror.push()
    assert bucket.get("here") == b"changed here"
    assert bucket.get("there") == b"changed there"
    mirror.fetch()
    assert mirror.tree() == {"here": b"changed here", "there": b"changed there"}


def test_what_is_deleted_in_the_bucket_goes_at_the_next_start(mirror: Mirror, bucket: Bucket) -> None:
    bucket.put("d/gone", "x")
    bucket.put("kept", "x")
    mirror.fetch()
    bucket.delete("d/gone")
    assert mirror.push().deleted_there == 0
    assert (mirror.files / "d/gone").exists()
    assert mirror.fetch().deleted_here == 1
    assert os.listdir(mirror.files) == ["kept"]


def test_the_same_bytes_on_both_sides_are_no_conflict(
    mirror: Mirror, bucket: Bucket, proxy: FaultProxy
) -> None:
    bucket.put("a", "same")
    mirror.write("a", "same")
    done = mirror.fetch()
    assert (done.uploaded, done.downloaded, done.kept_both) == (0, 0, [])
    assert not mirror.changed()


def test_somebody_who_writes_in_between_is_not_overwritten(
    mirror: Mirror, bucket: Bucket, proxy: FaultProxy
) -> None:
    bucket.put("a", "base")
    mirror.fetch()
    mirror.write("a", "ours")
    mirror.write("b", "ours")

    def plan(request: Request) -> Fault | None:
        if request.method == "PUT" and request.path.endswith(("/a", "/b")):
            return Fault(before=lambda: bucket.put(request.path[-1], "theirs") and None)
        return None

    proxy.plan = plan
    assert sorted(mirror.push().kept_both) == [f"a{BESIDE}", f"b{BESIDE}"]
    assert bucket.get("a") == bucket.get("b") == b"theirs"
    assert bucket.get(f"a{BESIDE}") == bucket.get(f"b{BESIDE}") == b"ours"


def test_a_deletion_does_not_hit_a_newer_version(mirror: Mirror, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put("a", "base")
    mirror.fetch()
    (mirror.files / "a").unlink()

    def plan(request: Request) -> Fault | None:
        return Fault(before=lambda: bucket.put("a", "newer") and None) if request.method == "DELETE" else None

    proxy.plan = plan
    assert mirror.push().deleted_there == 0
    assert bucket.get("a") == b"newer"
    proxy.plan = lambda request: None
    mirror.fetch()
    assert mirror.tree() == {"a": b"newer"}


@pytest.mark.parametrize("server_says", ["not implemented", "nothing"])
def test_a_server_without_conditions(
    mirror: Mirror, bucket: Bucket, proxy: FaultProxy, server_says: str
) -> None:
    """One says that it knows none, one acts as if there were none: what was seen in the list holds then."""

    def plan(request: Request) -> Fault | None:
        asked = {"if-match", "if-none-match"} & request.headers.keys()
        if request.method not in ("PUT", "DELETE") or not asked:
            return None
        return (
            Fault(status=501, code="NotImplemented")
            if server_says == "not implemented"
            else Fault(drop_headers=("if-match", "if-none-match"))
        )

    for name in ("a", "b", "c"):
        bucket.put(name, "base")
    mirror.fetch()
    proxy.plan = plan
    bucket.put("b", "theirs")
    mirror.write("a", "ours")
    mirror.write("b", "ours")
    mirror.write("new", "ours")
    (mirror.files / "c").unlink()
    done = mirror.push()
    assert done.kept_both == [f"b{BESIDE}"]
    assert bucket.keys() == ["a", "b", f"b{BESIDE}", "new"]
    assert [bucket.get(k) for k in ("a", "b", f"b{BESIDE}", "new")] == [b"ours", b"theirs", b"ours", b"ours"]


# -- hostile keys and hostile files


HOSTILE = [
    "../evil",
    "/abs",
    "//",
    "a//b",
    "a/./b",
    "x/../../y",
    "..",
    "ctl\x01x",
    "tab\tx",
    "del\x7f",
    "f",
    "sub//",
    "n" * 256,
    "/".join("d" * 101),
]


def test_no_key_leaves_the_folder(mirror: Mirror, bucket: Bucket) -> None:
    for key in (*HOSTILE, "f/g", "good", "back\\slash", "-rf", "ünï", "a b/ c"):
        bucket.put(key, "x")
    before = sorted(p.name for p in mirror.folder.parent.iterdir())
    done = mirror.fetch()
    assert set(mirror.tree()) == {"f/g", "good", "back\\slash", "-rf", "ünï", "a b/ c"}
    assert sorted(p.name for p in mirror.folder.parent.iterdir()) == before
    assert sorted(os.listdir(mirror.folder)) == ["files", "incoming", "state.db"]
    assert set(done.notes) == {key.removesuffix("/") if key == "//x" else key for key in HOSTILE}
    # Nor are they taken for deleted.
    mirror.write("good", "changed")
    mirror.push()
    assert set(HOSTILE) <= set(bucket.keys())


def test_folders_of_their_own(mirror: Mirror, bucket: Bucket) -> None:
    bucket.put("empty/dir/", "")
    bucket.put("file", "x")
    bucket.put("file/", "")
    done = mirror.fetch()
    assert (mirror.files / "empty/dir").is_dir()
    assert (mirror.files / "file").is_dir()
    assert done.notes == {"file": "there is a folder of that name"}
    mirror.push()
    assert bucket.keys() == ["empty/dir/", "file", "file/"]


def test_where_case_does_not_tell_names_apart(mirror: Mirror, bucket: Bucket) -> None:
    """As on APFS; here only the rule can be tried, not the file system."""
    for key in ("Case", "case", "e\u0301", "é", "Dir/x", "dir/y"):
        bucket.put(key, key)
    done = mirror.fetch(folding=True)
    assert set(mirror.tree()) == {"Case", "e\u0301", "Dir/x", "dir/y"}
    assert set(done.notes) == {"case", "é"}
    # Such a file system gives the name back as it was first written.
    (mirror.files / "dir/y").rename(mirror.files / "Dir/y")
    done = mirror.push(folding=True)
    assert (done.uploaded, done.deleted_there) == (0, 0)
    assert set(bucket.keys()) == {"Case", "case", "e\u0301", "é", "Dir/x", "dir/y"}


def test_links_and_other_things_are_not_followed(mirror: Mirror, bucket: Bucket, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    bucket.put("was-a-file", "x")
    mirror.fetch()
    (mirror.files / "link").symlink_to(outside / "secret")
    (mirror.files / "folder").symlink_to(outside)
    os.mkfifo(mirror.files / "fifo")
    (mirror.files / "was-a-file").unlink()
    (mirror.files / "was-a-file").symlink_to(outside / "secret")
    (mirror.files / b"bad\xff".decode("utf-8", "surrogateescape")).write_text("x")
    (mirror.files / "new\nline").write_text("x")
    done = mirror.push()
    assert bucket.keys() == ["was-a-file"]
    assert done.notes == {
        "link": "it is a link",
        "folder": "it is a link",
        "fifo": "it is a fifo",
        "was-a-file": "it is a link",
        "bad\udcff": "the name is not UTF-8",
        "new\nline": "there are control characters in the name",
    }
    # What the bucket has below a name that is a link here has no place, and none is found through the link.
    bucket.put("folder/planted", "x")
    done = mirror.fetch()
    assert os.listdir(outside) == ["secret"]
    assert "folder/planted" in done.notes


def test_only_what_is_below_the_prefix(mirror: Mirror, bucket: Bucket, proxy: FaultProxy) -> None:
    for key in ("data/a", "data2/a", "data", "other"):
        bucket.put(key, "x")
    mirror.source = bucket.source(proxy.url, prefix="data/")
    mirror.fetch()
    assert mirror.tree() == {"a": b"x"}
    (mirror.files / "a").unlink()
    mirror.write("b", "y")
    mirror.push()
    assert bucket.keys() == ["data", "data/b", "data2/a", "other"]


def test_a_read_only_mirror_is_what_the_bucket_has(mirror: Mirror, bucket: Bucket, proxy: FaultProxy) -> None:
    for key in ("a", "b", "c"):
        bucket.put(key, key)
    mirror.source = bucket.source(proxy.url, readonly=True)
    mirror.fetch()
    mirror.write("a", "touched")
    (mirror.files / "b").unlink()
    mirror.write("planted", "x")
    bucket.put("c", "newer")
    assert mirror.push() == Outcome()
    mirror.fetch()
    assert mirror.tree() == {"a": b"a", "b": b"b", "c": b"newer"}
    assert not [r for r in proxy.seen if r.method in ("PUT", "POST", "DELETE")]


# -- what networks, servers and killed workers do


def test_a_huge_object_goes_in_parts_and_comes_back(
    mirror: Mirror, bucket: Bucket, proxy: FaultProxy
) -> None:
    content = os.urandom(12 << 20)
    mirror.write("big", content)
    mirror.push()
    assert proxy.count("PUT", "partNumber=") == 3
    assert bucket.get("big") == content
    (mirror.files / "big").unlink()
    cut: list[str] = []

    def plan(request: Request) -> Fault | None:
        if request.method == "GET" and request.path.endswith("/big") and len(cut) < 7:
            cut.append(request.headers.get("range", ""))
            return Fault(cut_after=1_500_000)
        return None

    proxy.plan = plan
    other = Mirror(mirror.folder.parent / "other", mirror.source)
    other.fetch()
    assert (other.files / "big").read_bytes() == content
    assert len(cut) == 7
    assert cut[0] == ""
    assert all(c.startswith("bytes=") for c in cut[1:])


def test_parts_that_fail_are_sent_again_and_a_changed_file_leaves_none(
    mirror: Mirror, bucket: Bucket, proxy: FaultProxy
) -> None:
    place = mirror.write("big", os.urandom(11 << 20))
    failed: list[str] = []

    def plan(request: Request) -> Fault | None:
        if "partNumber=2" in request.query and not failed:
            failed.append(request.query)
            return Fault(status=503)
        if "partNumber=3" in request.query:
            return Fault(before=lambda: os.utime(place))
        return None

    proxy.plan = plan
    done = mirror.push(owned=False)
    assert (done.uploaded, done.left) == (0, 1)
    assert failed
    assert bucket.keys() == []
    assert proxy.count("DELETE", "uploadId=") == 1
    proxy.plan = lambda request: None
    assert mirror.push().uploaded == 1
    assert bucket.get("big") == place.read_bytes()


def test_an_upload_whose_answer_is_lost_is_known_again(
    mirror: Mirror, bucket: Bucket, proxy: FaultProxy
) -> None:
    bucket.put("a", "base")
    mirror.fetch()
    mirror.write("a", "ours")
    lost: list[Request] = []

    def plan(request: Request) -> Fault | None:
        if request.method == "PUT" and not lost:
            lost.append(request)
            return Fault(lose_answer=True)
        return None

    proxy.plan = plan
    done = mirror.push()
    assert (done.uploaded, done.kept_both) == (1, [])
    assert lost
    assert bucket.keys() == ["a"]
    assert bucket.get("a") == b"ours"


@pytest.mark.parametrize("size", [100, 11 << 20])
def test_a_worker_that_dies_after_an_upload_finds_it(
    mirror: Mirror, bucket: Bucket, proxy: FaultProxy, size: int
) -> None:
    """The server has it, nobody was told, and from then on nothing answers: as good as killed."""
    bucket.put("a", "base")
    mirror.fetch()
    content = os.urandom(size)
    mirror.write("a", content)
    dead = threading.Event()

    def plan(request: Request) -> Fault | None:
        last = request.method == ("POST" if size > PART else "PUT") and "uploads" not in request.query
        if last and not dead.is_set():
            dead.set()
            return Fault(lose_answer=True)
        return Fault(status=503) if dead.is_set() else None

    proxy.plan = plan
    with pytest.raises(S3Failure) as caught:
        mirror.push()
    assert caught.value.again
    proxy.plan = lambda request: None
    done = mirror.push()
    assert (done.uploaded, done.kept_both) == (0, [])
    assert bucket.keys() == ["a"]
    assert bucket.get("a") == content
    assert not mirror.changed()


def test_a_server_that_is_down_fails_the_pass_and_nothing_is_lost(
    mirror: Mirror, bucket: Bucket, proxy: FaultProxy
) -> None:
    bucket.put("a", "base")
    mirror.fetch()
    for number in range(40):
        mirror.write(f"n{number}", "x")
    proxy.plan = lambda request: Fault(status=503) if request.method == "PUT" else None
    with pytest.raises(S3Failure, match="SlowDown") as caught:
        mirror.push()
    assert caught.value.again
    assert proxy.count("PUT") < 40 * 5
    proxy.plan = lambda request: None
    assert mirror.push().uploaded == 40


def test_an_answer_with_a_wrong_etag_makes_no_conflict(
    mirror: Mirror, bucket: Bucket, proxy: FaultProxy
) -> None:
    proxy.plan = lambda request: Fault(etag='"0123"') if request.method == "PUT" else None
    mirror.write("a", "one")
    mirror.push()
    mirror.write("a", "two")
    done = mirror.push()
    assert (done.uploaded, done.kept_both) == (1, [])
    assert bucket.get("a") == b"two"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>no</html>", "no answer of S3|makes no sense"),
        (b"", ""),
        (
            b"<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"
            b"</ListBucketResult>",
            "no end",
        ),
        (b"<ListBucketResult><Contents><Key>a</Key></Contents></ListBucketResult>", "makes no sense"),
        (b"<ListBucketResult>" + b" " * (17 << 20) + b"</ListBucketResult>", "too long"),
    ],
    ids=["html", "empty", "endless", "half", "huge"],
)
def test_a_list_that_is_none(
    mirror: Mirror, bucket: Bucket, proxy: FaultProxy, body: bytes, words: str
) -> None:
    """Whatever it says, the folder and what it has that the bucket has not stay."""
    mirror.write("ours", "x")
    proxy.plan = lambda request: Fault(body=body) if "list-type=2" in request.query else None
    if words and b"html" not in body:
        with pytest.raises(S3Failure, match=words):
            mirror.push()
    else:
        mirror.push()
    assert mirror.tree() == {"ours": b"x"}


def test_several_pages(mirror: Mirror, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.volume_s3.client.PAGE", 3)
    for number in range(10):
        bucket.put(f"d{number % 3}/n{number}", str(number))
    assert mirror.fetch().downloaded == 10


def test_it_stops_at_once_when_told(mirror: Mirror, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put("slow", os.urandom(8 << 20))
    under_way = threading.Event()

    def plan(request: Request) -> Fault | None:
        if request.path.endswith("/slow"):
            under_way.set()
            return Fault(slow_s=0.05)
        return None

    proxy.plan = plan
    ended: list[BaseException] = []

    def fetch() -> None:
        try:
            mirror.fetch()
        except Stopped as failure:
            ended.append(failure)

    thread = threading.Thread(target=fetch)
    thread.start()
    assert under_way.wait(20)
    mirror.stopped.set()
    thread.join(20)
    assert ended
    assert mirror.tree() == {}
    mirror.stopped.clear()
    proxy.plan = lambda request: None
    assert mirror.fetch().downloaded == 1


# -- the folder


def test_a_folder_that_was_lost_deletes_nothing(mirror: Mirror, bucket: Bucket) -> None:
    bucket.put("a", "x")
    mirror.fetch()
    mirror.files.rename(mirror.folder / "moved")
    mirror.files.mkdir()
    assert mirror.push().deleted_there == 0
    assert bucket.keys() == ["a"]
    assert mirror.fetch().downloaded == 1


def test_a_damaged_state_is_set_aside(mirror: Mirror, bucket: Bucket) -> None:
    bucket.put("a", "x")
    bucket.put("b", "x")
    mirror.fetch()
    mirror.write("b", "changed")
    (mirror.folder / "state.db").write_bytes(b"no database at all" * 1000)
    done = mirror.push()
    assert done.kept_both == [f"b{BESIDE}"]
    assert bucket.keys() == ["a", "b", f"b{BESIDE}"]
    assert (mirror.folder / "state.db.damaged").exists()


def test_a_file_whose_times_do_not_tell_is_read(mirror: Mirror, bucket: Bucket) -> None:
    place = mirror.write("a", "one")
    mirror.push()
    state = MirrorState(mirror.folder)
    base = state.base("a")
    assert base is not None
    assert base.racy  # it was written a moment ago
    place.write_text("two")
    found = place.stat()
    stamp = type(base.stamp)(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    state.know("a", type(base)(path="a", etag=base.etag, stamp=stamp, md5=base.md5, racy=True))
    state.close()
    assert mirror.push().uploaded == 1
    assert bucket.get("a") == b"two"


def test_touched_but_not_changed_is_not_sent(mirror: Mirror, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put("a", "x")
    mirror.fetch()
    os.utime(mirror.files / "a", (1, 1))
    assert mirror.push().uploaded == 0
    assert proxy.count("PUT") == 0


def test_what_is_written_while_it_is_sent_goes_with_the_next_pass(
    mirror: Mirror, bucket: Bucket, proxy: FaultProxy
) -> None:
    place = mirror.write("a", "one")
    proxy.plan = lambda request: (
        Fault(before=lambda: place.write_text("twotwo") and None) if request.method == "PUT" else None
    )
    mirror.push(owned=False)
    proxy.plan = lambda request: None
    assert mirror.push(owned=False).uploaded == 1
    assert bucket.get("a") == b"twotwo"


def test_a_bucket_that_does_not_fit_is_not_begun(
    mirror: Mirror, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("a", "x" * 100)
    monkeypatch.setattr(MirrorTree, "free_bytes", lambda self: 64 << 20)
    with pytest.raises(NoRoom, match="64 MiB left"):
        mirror.fetch()
    assert mirror.tree() == {}


@pytest.mark.parametrize(
    ("code", "status", "words", "again"),
    [
        ("AccessDenied", 403, "do not allow", False),
        ("NoSuchBucket", 404, "no such bucket", False),
        ("SignatureDoesNotMatch", 403, "secret key is wrong", False),
        ("InternalError", 500, "InternalError", True),
        ("<b>bold</b>", 400, "no answer of S3", True),
    ],
)
def test_refusals_in_words(
    mirror: Mirror, proxy: FaultProxy, code: str, status: int, words: str, again: bool
) -> None:
    proxy.plan = lambda request: Fault(status=status, code=code)
    with pytest.raises(S3Failure, match=words) as caught:
        mirror.fetch()
    assert caught.value.again is again
    assert "not-a-real-key" not in str(caught.value)


def test_nobody_there(mirror: Mirror, bucket: Bucket) -> None:
    mirror.source = bucket.source("http://127.0.0.1:1")
    with pytest.raises(S3Failure, match="cannot be reached") as caught:
        mirror.fetch()
    assert caught.value.again


def test_nothing_of_this_machine_has_a_say(
    bucket: Bucket, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither variables nor files of the aws command line, and without a secret no signature."""
    config = tmp_path / "config"
    config.write_text(
        "[default]\nendpoint_url = http://127.0.0.1:1\naws_access_key_id = mine\naws_secret_access_key = mine\n"
    )
    for name, value in {
        "AWS_CONFIG_FILE": str(config),
        "AWS_SHARED_CREDENTIALS_FILE": str(config),
        "AWS_PROFILE": "nobody",
        "AWS_ACCESS_KEY_ID": "mine",
        "AWS_SECRET_ACCESS_KEY": "mine",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "HTTP_PROXY": "http://127.0.0.1:1",
        "http_proxy": "http://127.0.0.1:1",
    }.items():
        monkeypatch.setenv(name, value)
    for keys in (KEYS, None):
        client = S3Client(bucket.source(proxy.url), keys, private=True)
        client.head("a")
        client.close()
    signed, unsigned = proxy.seen
    assert "Credential=AKIDEXAMPLE/" in signed.headers["authorization"]
    assert "authorization" not in unsigned.headers


def test_an_address_that_is_not_public_must_be_named(bucket: Bucket, proxy: FaultProxy) -> None:
    """By the address that was connected to, whatever the name; not a byte is sent."""
    for url in (proxy.url, proxy.url.replace("127.0.0.1", "localhost")):
        client = S3Client(bucket.source(url), KEYS)
        with pytest.raises(S3Failure, match="not public") as caught:
            client.page(None)
        client.close()
        assert not caught.value.again
    assert proxy.seen == []


def test_memory_stays_bounded(mirror: Mirror, bucket: Bucket) -> None:
    """A file of 48 MiB goes up with less than half of it in memory."""
    import tracemalloc

    mirror.write("big", os.urandom(48 << 20))
    mirror.changed()
    tracemalloc.start()
    try:
        mirror.push()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20
