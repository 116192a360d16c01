"""The image store: one digest for one content, names that do not collide, nothing half done."""

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.errors import (
    Configuration,
    Conflict,
    ContractError,
    CreateFailed,
    InvalidCommand,
    NotFound,
    PullFailed,
    ResourceExhausted,
)
from worker.images.layout import Layout
from worker.images.listing import write_listing
from worker.images.reference import parse_name, parse_reference
from worker.images.snapshot import calm_snapshot, take_snapshot
from worker.images.space import Space
from worker.images.store import ImageStore
from worker.platform.base import CloneReport
from worker.platform.treecopy import TreeError
from worker.platform.xattrs import system_xattrs

from .unprivileged import as_nobody, needs_root

pytestmark = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="clones with the Linux driver")


class Cloner:
    """The Linux driver's part, with a hook for what happens in the midst of it."""

    def __init__(self) -> None:
        self.during: Callable[[Path, Path], None] = lambda src, dst: None
        self.calls = 0

    def clone_tree(self, src: Path, dst: Path) -> CloneReport:
        from worker.platform.linux.clone import clone_tree

        self.calls += 1
        report = clone_tree(src, dst)
        self.during(src, dst)
        return report


@pytest.fixture
def cloner() -> Cloner:
    return Cloner()


@pytest.fixture
def opened(tmp_path: Path, cloner: Cloner) -> Iterator[Callable[..., ImageStore]]:
    with ExitStack() as stack:

        def open_store(root: Path = tmp_path / "images", **options: Any) -> ImageStore:
            store = ImageStore.open(root, cloner, **options)
            stack.callback(store.close)
            return store

        yield open_store


@pytest.fixture
def store(opened: Callable[..., ImageStore]) -> ImageStore:
    return opened()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One of everything that an image keeps."""
    top = tmp_path / "source"
    (top / "bin").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "bin" / "run").write_text("#!/bin/sh\necho hi\n")
    (top / "bin" / "run").chmod(0o755)
    (top / "data").write_bytes(os.urandom(200_000))
    os.link(top / "data", top / "bin" / "same")
    (top / "bin" / "sh").symlink_to("/bin/sh")
    (top / "dangling").symlink_to("no/where")
    (top / "closed").mkdir(mode=0o500)
    (top / os.fsdecode(b"n\xf6t utf-8\n")).write_text("x")
    os.utime(top / "data", ns=(1, 1_600_000_000_123_456_789))
    os.utime(top / "dangling", ns=(1, 1_500_000_000_000_000_001), follow_symlinks=False)
    os.utime(top / "empty", ns=(1, 1_400_000_000_000_000_001))
    return top


def shape(top: Path) -> dict[str, tuple[Any, ...]]:
    """Everything about a tree that an image must keep."""
    found: dict[str, tuple[Any, ...]] = {}
    inodes: dict[int, str] = {}
    for folder, names, files in os.walk(top):
        names.sort()
        for name in [".", *sorted(names), *sorted(files)]:
            path = os.path.normpath(os.path.join(folder, name))
            info = os.lstat(path)
            relative = os.path.relpath(path, top)
            facts: tuple[Any, ...] = (stat.S_IFMT(info.st_mode), stat.S_IMODE(info.st_mode), info.st_mtime_ns)
            if stat.S_ISLNK(info.st_mode):
                facts += (os.readlink(path),)
            elif stat.S_ISREG(info.st_mode):
                facts += (Path(path).read_bytes(), inodes.setdefault(info.st_ino, relative))
            found[relative] = facts
    return found


def copy_of(top: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", str(top), str(target)], check=True)


def python(script: str, *arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def glob(top: Path, pattern: str) -> list[Path]:
    return sorted(top.glob(pattern))


def files_below(top: Path) -> list[str]:
    return sorted(str(path.relative_to(top)) for path in top.rglob("*") if not path.is_dir())


class TestReferences:
    @pytest.mark.parametrize(
        ("left", "right"),
        [
            ("web", "web:latest"),
            ("Registry.Example.com/a/b", "registry.example.com/a/b:latest"),
            ("localhost/web:1", "localhost/web:1"),
            ("localhost:5000/web", "localhost:5000/web:latest"),
        ],
    )
    def test_the_same_image(self, left: str, right: str) -> None:
        assert parse_reference(left).key == parse_reference(right).key

    @pytest.mark.parametrize(
        ("left", "right"),
        [
            ("a/b:c", "a_b_c"),
            ("a/b:c", "a_b:c"),
            ("a-b/c", "a/b-c"),
            ("web", "docker.io/library/web"),
            ("localhost:5000/web", "localhost/web"),
            ("web:1", "web:1.0"),
            ("web:latest", "web:Latest"),
            ("a.b/c", "a.b.c"),
        ],
    )
    def test_never_the_same(self, left: str, right: str) -> None:
        assert parse_reference(left).key != parse_reference(right).key

    def test_parts(self) -> None:
        digest = "sha256:" + "a" * 64
        parsed = parse_reference(f"Ghcr.io:443/acme/web:1.2@{digest}")
        assert (parsed.repository, parsed.tag, parsed.digest) == ("ghcr.io:443/acme/web", "1.2", digest)

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "/",
            "a//b",
            "../etc",
            "a/../b",
            "UPPER",
            "web:",
            ":1",
            "a b",
            "a\nb",
            "web@sha256:xyz",
            "-a",
            "a\0",
        ],
    )
    def test_no_names(self, name: str) -> None:
        with pytest.raises(InvalidCommand) as caught:
            parse_reference(name)
        assert caught.value.field == "image"

    @pytest.mark.parametrize("name", ["web@sha256:" + "a" * 64, "sha256:" + "a" * 64])
    def test_a_digest_is_no_name_to_give(self, name: str) -> None:
        with pytest.raises(InvalidCommand):
            parse_name(name)


class TestRegister:
    async def test_everything_is_kept(self, store: ImageStore, source: Path, tmp_path: Path) -> None:
        before = shape(source)
        info = await store.register("app:1", source)
        await store.clone(info.digest, tmp_path / "root")
        assert shape(tmp_path / "root") == before
        assert shape(source) == before
        assert info.name == "app:1"
        sizes = {path.lstat().st_ino: path.lstat().st_size for path in glob(source, "**/*") if is_file(path)}
        assert info.bytes == sum(sizes.values())

    async def test_one_digest_for_one_content(
        self, opened: Callable[..., ImageStore], store: ImageStore, source: Path, tmp_path: Path
    ) -> None:
        first = await store.register("a", source)
        again = await store.register("b", source)
        copy_of(source, tmp_path / "copy")
        copied = await store.register("c", tmp_path / "copy")
        elsewhere = await opened(tmp_path / "other").register("a", source)
        assert {first.digest, again.digest, copied.digest, elsewhere.digest} == {first.digest}
        assert len(os.listdir(tmp_path / "images" / "rootfs")) == 1

    @pytest.mark.parametrize(
        "change",
        [
            lambda top: (top / "data").write_bytes(b"other"),
            lambda top: (top / "bin" / "run").chmod(0o744),
            lambda top: (top / "empty").chmod(0o711),
            lambda top: (top / "empty").rmdir(),
            lambda top: os.utime(top / "data", ns=(1, 1_600_000_000_123_456_788)),
            lambda top: os.utime(top / "empty", ns=(1, 5)),
            lambda top: os.utime(top / "dangling", ns=(1, 5), follow_symlinks=False),
            lambda top: (os.unlink(top / "dangling"), os.symlink("no/there", top / "dangling")),
            lambda top: (top / "data").rename(top / "date"),
            lambda top: (os.unlink(top / "bin" / "same"), os.link(top / "bin" / "run", top / "bin" / "same")),
            lambda top: os.setxattr(top / "data", "user.note", b"1"),
            lambda top: os.setxattr(top / "empty", "user.note", b""),
        ],
    )
    async def test_any_difference_is_another_digest(
        self, store: ImageStore, source: Path, tmp_path: Path, change: Callable[[Path], object]
    ) -> None:
        first = await store.register("app", source)
        changed = tmp_path / "changed"
        copy_of(source, changed)
        times = {path: path.lstat() for path in [changed, changed / "bin"]}
        change(changed)
        for path, info in times.items():
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
        assert (await store.register("app", changed)).digest != first.digest

    async def test_what_an_image_does_not_keep(self, store: ImageStore, source: Path, tmp_path: Path) -> None:
        plain = await store.register("app", source)
        (source / "bin" / "run").chmod(0o6755)
        (source / "empty").chmod(0o2755)
        if os.geteuid() == 0:
            os.chown(source / "data", 12345, 12345)
        os.utime(source / "data", ns=(99, (source / "data").stat().st_mtime_ns))
        dropped = await store.register("app", source)
        assert dropped.digest == plain.digest
        await store.clone(dropped.digest, tmp_path / "root")
        assert stat.S_IMODE((tmp_path / "root" / "bin" / "run").stat().st_mode) == 0o755
        assert (tmp_path / "root" / "data").stat().st_uid == os.geteuid()

    @pytest.mark.parametrize(
        ("kind", "make"),
        [
            ("fifo", os.mkfifo),
            ("socket", lambda path: bind_socket(path)),
        ],
    )
    async def test_special_files_are_named(
        self, store: ImageStore, source: Path, kind: str, make: Callable[[Path], None], cloner: Cloner
    ) -> None:
        make(source / "bin" / "odd")
        with pytest.raises(PullFailed, match=f"bin/odd: a {kind} cannot be part of an image"):
            await store.register("app", source)
        assert store.list() == []
        assert cloner.calls == 0

    @needs_root
    async def test_a_device_is_named(self, store: ImageStore, source: Path) -> None:
        os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        with pytest.raises(PullFailed, match="null: a character device"):
            await store.register("app", source)

    @needs_root
    def test_an_unreadable_file_is_named(self, tmp_path: Path) -> None:
        def run(home: Path) -> None:
            (home / "source").mkdir()
            (home / "source" / "secret").write_text("x")
            (home / "source" / "secret").chmod(0)

            async def register() -> None:
                store = ImageStore.open(home / "images", Cloner())
                with pytest.raises(PullFailed, match="secret: Permission denied"):
                    await store.register("app", source_in(home))
                store.close()

            asyncio.run(register())

        def source_in(home: Path) -> Path:
            return Path(os.path.realpath(home)) / "source"

        tmp_path.chmod(0o755)
        with reachable(tmp_path):
            as_nobody(run, tmp_path)

    @needs_root
    def test_a_read_only_tree_by_an_ordinary_user(self, tmp_path: Path) -> None:
        def run(home: Path) -> None:
            top = Path(os.path.realpath(home))
            (top / "source" / "a").mkdir(parents=True)
            (top / "source" / "a" / "f").write_text("x")
            (top / "source" / "a" / "f").chmod(0o444)
            (top / "source" / "a").chmod(0o555)
            (top / "source").chmod(0o555)

            async def register() -> None:
                store = ImageStore.open(top / "images", Cloner())
                info = await store.register("app", top / "source")
                await store.clone(info.digest, top / "root")
                await store.remove("app")
                assert os.listdir(top / "images" / "rootfs") == []
                store.close()

            asyncio.run(register())
            assert stat.S_IMODE((top / "root").stat().st_mode) == 0o555

        with reachable(tmp_path):
            as_nobody(run, tmp_path)

    async def test_a_missing_source_and_a_file(self, store: ImageStore, tmp_path: Path) -> None:
        with pytest.raises(PullFailed, match="missing") as caught:
            await store.register("app", tmp_path / "missing")
        assert caught.value.field == "source_dir"
        (tmp_path / "file").write_text("x")
        with pytest.raises(PullFailed, match="file"):
            await store.register("app", tmp_path / "file")

    async def test_no_link_on_the_way(self, store: ImageStore, source: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(source)
        for path in (tmp_path / "link", tmp_path / "link" / "bin"):
            with pytest.raises(PullFailed):
                await store.register("app", path)

    async def test_links_are_not_followed(self, store: ImageStore, tmp_path: Path) -> None:
        top = tmp_path / "linked"
        top.mkdir()
        (top / "etc").symlink_to("/etc")
        info = await store.register("app", top)
        await store.clone(info.digest, tmp_path / "root")
        assert os.readlink(tmp_path / "root" / "etc") == "/etc"
        assert info.bytes == 0

    async def test_the_store_itself_is_no_source(self, store: ImageStore, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "images", tmp_path / "images" / "rootfs"):
            with pytest.raises(PullFailed, match="overlaps"):
                await store.register("app", path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda top: (top / "data").write_bytes(b"torn"),
            lambda top: (top / "bin" / "new").write_text("x"),
            lambda top: (top / "bin" / "run").chmod(0o700),
            lambda top: (top / "dangling").unlink(),
            lambda top: (top / "empty").rmdir(),
        ],
    )
    async def test_a_source_that_changes_is_refused(
        self,
        store: ImageStore,
        source: Path,
        cloner: Cloner,
        change: Callable[[Path], object],
        tmp_path: Path,
    ) -> None:
        def during(src: Path, dst: Path) -> None:
            if src == source:
                change(source)

        cloner.during = during
        with pytest.raises(PullFailed, match="changed while it was being copied"):
            await store.register("app", source)
        assert store.list() == []
        assert os.listdir(tmp_path / "images" / "rootfs") == []
        assert os.listdir(tmp_path / "images" / "staging") == []
        cloner.during = lambda src, dst: None
        await store.register("app", source)

    async def test_a_change_put_back_is_seen_too(
        self, store: ImageStore, source: Path, cloner: Cloner
    ) -> None:
        def during(src: Path, dst: Path) -> None:
            info = (source / "data").stat()
            content = (source / "data").read_bytes()
            (source / "data").write_bytes(content[::-1])
            (source / "data").write_bytes(content)
            os.utime(source / "data", ns=(info.st_atime_ns, info.st_mtime_ns))

        cloner.during = during
        with pytest.raises(PullFailed, match="changed"):
            await store.register("app", source)

    async def test_names_with_any_bytes(self, store: ImageStore, tmp_path: Path) -> None:
        top = tmp_path / "odd"
        top.mkdir()
        for name in (
            b"\xff",
            b"\xff\xfe a",
            b"new\nline",
            b"tab\t",
            b"%41",
            b"A",
            b"-rf",
            b"a" * 255,
            "ü".encode(),
        ):
            (top / os.fsdecode(name)).write_bytes(name)
        os.symlink(b"\xff\n", os.fsencode(top) + b"/link")
        info = await store.register("app", top)
        await store.clone(info.digest, tmp_path / "root")
        assert sorted(os.listdir(os.fsencode(tmp_path / "root"))) == sorted(os.listdir(os.fsencode(top)))
        assert os.readlink(os.fsencode(tmp_path / "root") + b"/link") == b"\xff\n"

    async def test_a_name_moves_to_other_content(
        self, store: ImageStore, source: Path, tmp_path: Path
    ) -> None:
        old = await store.register("app", source)
        (source / "data").write_text("new")
        new = await store.register("app:latest", source)
        assert [(info.name, info.digest) for info in store.list()] == [("app:latest", new.digest)]
        assert store.config(old.digest).entrypoint is None
        assert store.resolve(f"app@{new.digest}").digest == new.digest
        with pytest.raises(NotFound):
            store.resolve(f"app@{old.digest}")

    async def test_names_that_could_collide(self, store: ImageStore, source: Path, tmp_path: Path) -> None:
        names = ["a/b:c", "a_b_c", "a/b_c", "a_b:c", "a/b/c"]
        digests = {}
        for name in names:
            (source / "data").write_text(name)
            digests[name] = (await store.register(name, source)).digest
        assert len(set(digests.values())) == len(names)
        assert {name: store.resolve(name).digest for name in names} == digests

    async def test_created_at_is_kept_for_what_did_not_change(
        self, opened: Callable[..., ImageStore], source: Path
    ) -> None:
        first = await opened().register("app", source)
        again = await opened().register("app", source)
        assert again.created_at == first.created_at
        assert first.created_at.tzinfo is not None


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


class reachable:
    """Lets another user pass through the folders above a test's own."""

    def __init__(self, path: Path) -> None:
        self._modes = [
            (folder, folder.stat().st_mode) for folder in [path, *path.parents] if folder != Path("/")
        ]

    def __enter__(self) -> None:
        for folder, mode in self._modes:
            if not mode & 0o001:
                folder.chmod(stat.S_IMODE(mode) | 0o001)

    def __exit__(self, *exc: object) -> None:
        for folder, mode in self._modes:
            folder.chmod(stat.S_IMODE(mode))


class TestRaces:
    async def test_many_registers_of_one_content(
        self, store: ImageStore, source: Path, tmp_path: Path
    ) -> None:
        names = [f"app-{number % 3}" for number in range(12)]
        infos = await asyncio.gather(*(store.register(name, source) for name in names))
        assert len({info.digest for info in infos}) == 1
        assert [entry.name for entry in store.list()] == ["app-0", "app-1", "app-2"]
        assert len(os.listdir(tmp_path / "images" / "rootfs")) == 1
        assert os.listdir(tmp_path / "images" / "staging") == []

    async def test_one_name_with_many_contents(self, store: ImageStore, source: Path, tmp_path: Path) -> None:
        sources = []
        for number in range(8):
            copy = tmp_path / f"source-{number}"
            copy_of(source, copy)
            (copy / "data").write_text(str(number))
            sources.append(copy)
        infos = await asyncio.gather(*(store.register("app", path) for path in sources))
        assert store.resolve("app").digest in {info.digest for info in infos}
        assert len(store.list()) == 1
        await store.prune()
        assert len(os.listdir(tmp_path / "images" / "rootfs")) == 1

    async def test_two_processes(self, store: ImageStore, source: Path, tmp_path: Path) -> None:
        script = """
            import asyncio, sys
            from pathlib import Path
            from worker.images.store import ImageStore
            from worker.platform.linux import clone
            async def main():
                store = ImageStore.open(Path(sys.argv[1]), clone)
                for number in range(6):
                    await store.register(f"name-{number}-{sys.argv[3]}", Path(sys.argv[2]))
                store.close()
            asyncio.run(main())
        """
        arguments = [str(tmp_path / "images"), str(source)]
        others = [python(script, *arguments, str(number)) for number in range(2)]
        mine = [await store.register(f"mine-{number}", source) for number in range(6)]
        for other in others:
            await asyncio.to_thread(other.communicate, timeout=30)
            assert other.returncode == 0
        assert len({info.digest for info in mine}) == 1
        assert len(store.list()) == 18
        assert len(os.listdir(tmp_path / "images" / "rootfs")) == 1

    def test_a_killed_register_leaves_only_what_is_swept(
        self, opened: Callable[..., ImageStore], source: Path, tmp_path: Path
    ) -> None:
        script = """
            import asyncio, os, sys
            from pathlib import Path
            from worker.images.store import ImageStore
            from worker.platform.linux.clone import clone_tree
            class Stuck:
                def clone_tree(self, src, dst):
                    clone_tree(src, dst)
                    print("cloned", flush=True)
                    sys.stdin.read()
            store = ImageStore.open(Path(sys.argv[1]), Stuck())
            asyncio.run(store.register("app", Path(sys.argv[2])))
        """
        arguments = [str(tmp_path / "images"), str(source)]
        with python(script, *arguments) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"cloned\n"
            # While it lives its work is not touched.
            opened()
            assert len(os.listdir(tmp_path / "images" / "rootfs")) == 1
            other.send_signal(signal.SIGKILL)
        store = opened()
        assert os.listdir(tmp_path / "images" / "rootfs") == []
        assert os.listdir(tmp_path / "images" / "staging") == []
        assert store.list() == []

    async def test_prune_while_clones_and_registers_run(
        self, store: ImageStore, source: Path, tmp_path: Path
    ) -> None:
        failures: list[BaseException] = []

        async def guarded(step: Awaitable[object]) -> None:
            try:
                await step
            except NotFound:
                pass
            except ContractError as failure:
                failures.append(failure)

        async def life(number: int) -> None:
            copy = tmp_path / f"source-{number}"
            await asyncio.to_thread(copy_of, source, copy)
            for step in range(4):
                (copy / "data").write_text(f"{number} {step}")
                info = await store.register(f"app-{number}", copy)
                await guarded(store.clone(info.digest, tmp_path / f"root-{number}-{step}"))
                await guarded(store.remove(f"app-{(number + step) % 3}", force=True))

        async def pruning(done: asyncio.Event) -> None:
            while not done.is_set():
                await store.prune()
                await asyncio.sleep(0)

        done = asyncio.Event()
        pruner = asyncio.create_task(pruning(done))
        await asyncio.gather(*(life(number) for number in range(3)))
        done.set()
        await pruner
        assert failures == []
        for root in glob(tmp_path, "root-*"):
            assert (root / "bin" / "run").read_text().startswith("#!/bin/sh")
        await store.prune()
        trees = len(os.listdir(tmp_path / "images" / "rootfs"))
        assert trees == len({entry.digest for entry in store.list()})

    async def test_a_cancelled_clone_leaves_nothing(
        self, store: ImageStore, source: Path, tmp_path: Path, cloner: Cloner
    ) -> None:
        info = await store.register("app", source)
        started, go = threading.Event(), threading.Event()

        def during(src: Path, dst: Path) -> None:
            started.set()
            assert go.wait(10)

        cloner.during = during
        (tmp_path / "container").mkdir()
        task = asyncio.create_task(store.clone(info.digest, tmp_path / "container" / "root"))
        await asyncio.to_thread(started.wait, 10)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert os.listdir(tmp_path / "container") == []
        assert store._pins[info.digest] == 0


class TestClone:
    async def test_writes_stay_where_they_are_made(
        self, store: ImageStore, source: Path, tmp_path: Path
    ) -> None:
        info = await store.register("app", source)
        one, two = tmp_path / "one", tmp_path / "two"
        await store.clone(info.digest, one)
        await store.clone(info.digest, two)
        with (one / "data").open("r+b") as file:
            file.write(b"scribble")
        (one / "bin" / "run").write_text("replaced")
        (one / "new").write_text("x")
        assert shape(two) == shape(source)
        await store.clone(info.digest, tmp_path / "three")
        assert shape(tmp_path / "three") == shape(source)

    async def test_an_unknown_digest(self, store: ImageStore, tmp_path: Path) -> None:
        for digest in ("sha256:" + "0" * 64, "", "../../etc", "sha256:../../../x"):
            with pytest.raises(NotFound):
                await store.clone(digest, tmp_path / "root")
            with pytest.raises(NotFound):
                store.config(digest)

    async def test_a_place_that_is_taken(self, store: ImageStore, source: Path, tmp_path: Path) -> None:
        info = await store.register("app", source)
        (tmp_path / "empty").mkdir()
        await store.clone(info.digest, tmp_path / "empty")
        with pytest.raises(CreateFailed, match=r"not empty|exists"):
            await store.clone(info.digest, tmp_path / "empty")
        assert shape(tmp_path / "empty") == shape(source)
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]

    async def test_too_little_space_is_said_before_anything_is_done(
        self, opened: Callable[..., ImageStore], source: Path, tmp_path: Path, cloner: Cloner
    ) -> None:
        full = opened(tmp_path / "full", space=Space(reserve_bytes=1 << 60))
        with pytest.raises(ResourceExhausted, match="left"):
            await full.register("app", source)
        assert cloner.calls == 0
        info = await opened().register("app", source)
        tight = opened(space=Space(reserve_bytes=1 << 60))
        with pytest.raises(ResourceExhausted):
            await tight.clone(info.digest, tmp_path / "root")
        assert cloner.calls == 1

    async def test_a_disk_that_fills_up(
        self, store: ImageStore, source: Path, tmp_path: Path, cloner: Cloner
    ) -> None:
        info = await store.register("app", source)

        def during(src: Path, dst: Path) -> None:
            raise TreeError("data", "No space left on device", 28)

        cloner.during = during
        with pytest.raises(ResourceExhausted):
            await store.clone(info.digest, tmp_path / "root")
        assert not (tmp_path / "root").exists()
        with pytest.raises(ResourceExhausted):
            await store.register("other", source)
        assert len(os.listdir(tmp_path / "images" / "rootfs")) == 1


class TestNames:
    async def test_tag_and_resolve(self, store: ImageStore, source: Path) -> None:
        info = await store.register("app", source)
        tagged = await store.tag("app", "registry.example/team/app:1")
        assert tagged.digest == info.digest
        assert store.resolve("registry.example/team/app:1").digest == info.digest
        assert store.resolve(info.digest).digest == info.digest
        assert store.resolve(f"app@{info.digest}").name == "app"
        with pytest.raises(NotFound):
            await store.tag("nope", "other")
        with pytest.raises(InvalidCommand) as caught:
            await store.tag("app", "Not A Name")
        assert caught.value.field == "target"

    async def test_a_tag_moves(self, store: ImageStore, source: Path) -> None:
        await store.register("one", source)
        (source / "data").write_text("two")
        two = await store.register("two", source)
        await store.tag("two", "one")
        assert store.resolve("one").digest == two.digest

    async def test_list_counts_containers(self, store: ImageStore, source: Path) -> None:
        info = await store.register("b", source)
        await store.tag("b", "a")
        for number in range(3):
            store.keep_for(f"web-{number}", info.digest)
        listed = store.list()
        assert [(entry.name, entry.containers) for entry in listed] == [("a", 3), ("b", 3)]
        assert listed[0].bytes == info.bytes

    async def test_remove(self, store: ImageStore, source: Path, tmp_path: Path) -> None:
        info = await store.register("app", source)
        await store.tag("app", "app:2")
        store.keep_for("web-0", info.digest)
        with pytest.raises(Conflict):
            await store.remove("app")
        store.let_go("web-0")
        await store.remove("app")
        assert store.resolve("app:2").digest == info.digest
        assert len(os.listdir(tmp_path / "images" / "rootfs")) == 1
        removed = await store.remove("app:2")
        assert removed.digest == info.digest
        assert os.listdir(tmp_path / "images" / "rootfs") == []
        assert os.listdir(tmp_path / "images" / "blobs" / "sha256") == []
        with pytest.raises(NotFound):
            await store.remove("app:2")

    async def test_force_keeps_what_a_container_uses(
        self, store: ImageStore, source: Path, tmp_path: Path
    ) -> None:
        info = await store.register("app", source)
        store.keep_for("web-0", info.digest)
        await store.remove("app", force=True)
        with pytest.raises(NotFound):
            store.resolve("app")
        assert store.config(info.digest).entrypoint is None
        assert (await store.prune()).images == ()
        store.let_go("web-0")
        pruned = await store.prune()
        assert [(gone.digest, gone.bytes) for gone in pruned.images] == [(info.digest, info.bytes)]
        assert os.listdir(tmp_path / "images" / "rootfs") == []

    async def test_prune_takes_what_a_crash_left(
        self, store: ImageStore, source: Path, tmp_path: Path
    ) -> None:
        kept = await store.register("app", source)
        orphan = tmp_path / "images" / "rootfs" / ("f" * 64)
        (orphan / "x").mkdir(parents=True)
        (orphan / "x" / "f").write_text("12345")
        (tmp_path / "images" / "blobs" / "sha256" / ("e" * 64)).write_text("no image")
        pruned = await store.prune()
        assert [(gone.digest, gone.bytes) for gone in pruned.images] == [("sha256:" + "f" * 64, 5)]
        assert pruned.bytes == 5 + len("no image")
        assert not orphan.exists()
        await store.clone(kept.digest, tmp_path / "root")
        assert (await store.prune()).images == ()


class TestOnDisk:
    async def test_an_oci_layout(self, store: ImageStore, source: Path, tmp_path: Path) -> None:
        info = await store.register("app:1", source)
        root = tmp_path / "images"
        assert json.loads((root / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
        index = json.loads((root / "index.json").read_text())
        assert index["schemaVersion"] == 2
        (entry,) = index["manifests"]
        assert entry["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
        assert entry["annotations"]["org.opencontainers.image.ref.name"] == "app:1"
        assert entry["digest"] == info.digest
        manifest = json.loads((root / "blobs" / "sha256" / info.digest[7:]).read_text())
        assert entry["size"] == (root / "blobs" / "sha256" / info.digest[7:]).stat().st_size
        for descriptor in [manifest["config"], *manifest["layers"]]:
            blob = root / "blobs" / "sha256" / descriptor["digest"][7:]
            assert blob.stat().st_size == descriptor["size"]
        config = json.loads((root / "blobs" / "sha256" / manifest["config"]["digest"][7:]).read_text())
        assert config["rootfs"] == {"type": "layers", "diff_ids": [manifest["layers"][0]["digest"]]}
        assert config["os"] == "linux"
        assert os.listdir(root / "rootfs") == [manifest["layers"][0]["digest"][7:]]

    async def test_it_is_found_again(self, opened: Callable[..., ImageStore], source: Path) -> None:
        info = await opened().register("app", source)
        assert opened().resolve("app") == info

    async def test_what_another_program_put_there_stays(
        self, opened: Callable[..., ImageStore], store: ImageStore, source: Path, tmp_path: Path
    ) -> None:
        root = tmp_path / "images"
        blob = b'{"schemaVersion":2,"config":{"digest":"sha256:%s"},"layers":[]}' % (b"1" * 64)
        import hashlib

        digest = hashlib.sha256(blob).hexdigest()
        (root / "blobs" / "sha256" / digest).write_bytes(blob)
        (root / "blobs" / "sha256" / ("1" * 64)).write_text("{}")
        foreign = {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": f"sha256:{digest}",
            "size": len(blob),
            "platform": {"os": "linux", "architecture": "amd64"},
            "annotations": {"org.opencontainers.image.ref.name": "theirs"},
        }
        odd = {"mediaType": 5}
        (root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [foreign, odd]}))
        await store.register("app", source)
        await store.prune()
        assert (root / "blobs" / "sha256" / digest).exists()
        assert (root / "blobs" / "sha256" / ("1" * 64)).exists()
        assert json.loads((root / "index.json").read_text())["manifests"][:2] == [foreign, odd]
        assert [entry.name for entry in store.list()] == ["app"]

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"manifests": 5}', "[" * 100_000])
    async def test_a_damaged_index_is_never_replaced(
        self, opened: Callable[..., ImageStore], tmp_path: Path, content: str
    ) -> None:
        opened()
        (tmp_path / "images" / "index.json").write_text(content)
        with pytest.raises(Configuration, match=r"index\.json"):
            opened()
        assert (tmp_path / "images" / "index.json").read_text() == content

    async def test_a_damaged_manifest_is_noticed(
        self, opened: Callable[..., ImageStore], store: ImageStore, source: Path, tmp_path: Path
    ) -> None:
        info = await store.register("app", source)
        path = tmp_path / "images" / "blobs" / "sha256" / info.digest[7:]
        path.write_bytes(path.read_bytes().replace(b"1", b"2"))
        with pytest.raises(ContractError, match="damaged"):
            opened().config(info.digest)

    async def test_a_tree_that_was_taken_away(self, store: ImageStore, source: Path, tmp_path: Path) -> None:
        info = await store.register("app", source)
        (tree,) = (tmp_path / "images" / "rootfs").iterdir()
        tree.rename(tmp_path / "elsewhere")
        with pytest.raises(NotFound, match="gone"):
            await store.clone(info.digest, tmp_path / "root")
        await store.register("app", source)
        await store.clone(info.digest, tmp_path / "root")

    def test_a_folder_that_cannot_be_used(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(Configuration):
            Layout.open(tmp_path / "file")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "index.json").write_text("{}")
        with pytest.raises(Configuration, match="not an image store"):
            Layout.open(tmp_path / "other")

    async def test_nothing_is_readable_by_others(
        self, store: ImageStore, source: Path, tmp_path: Path
    ) -> None:
        await store.register("app", source)
        for folder in (".", "rootfs", "blobs", "blobs/sha256", "staging"):
            assert stat.S_IMODE((tmp_path / "images" / folder).stat().st_mode) == 0o700
        for name in files_below(tmp_path / "images"):
            if not name.startswith("rootfs"):
                assert stat.S_IMODE((tmp_path / "images" / name).stat().st_mode) & 0o077 == 0, name


class TestSnapshot:
    def test_waits_until_times_can_tell(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_text("x")
        slept: list[float] = []
        fd = os.open(tmp_path, os.O_RDONLY)
        try:

            def sleep(seconds: float) -> None:
                slept.append(seconds)
                threading.Event().wait(seconds)

            calm_snapshot(fd, sleep)
            assert slept
            (tmp_path / "f").write_text("x")
            with pytest.raises(TreeError, match="keeps changing"):
                calm_snapshot(fd, lambda _: (tmp_path / "f").write_text("x") and None)
        finally:
            os.close(fd)

    def test_reading_changes_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "f").write_text("x")
        fd = os.open(tmp_path, os.O_RDONLY)
        try:
            before = take_snapshot(fd)
            (tmp_path / "a" / "f").read_text()
            os.listdir(tmp_path / "a")
            before.check_unchanged(take_snapshot(fd))
        finally:
            os.close(fd)


names = st.binary(min_size=1, max_size=12).filter(
    lambda raw: b"/" not in raw and b"\0" not in raw and raw not in (b".", b"..")
)
trees = st.dictionaries(names, st.binary(max_size=20), max_size=4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(left=trees, right=trees)
def test_listings_are_equal_only_for_equal_trees(
    left: dict[bytes, bytes], right: dict[bytes, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    def digest(tree: dict[bytes, bytes]) -> str:
        top = tmp_path_factory.mktemp("tree")
        for name, content in tree.items():
            path = os.path.join(os.fsencode(top), name)
            if content[:1] == b"l" and b"\0" not in content:
                os.symlink(content, path)
                os.utime(path, ns=(0, 0), follow_symlinks=False)
                continue
            if content[:1] == b"d":
                os.mkdir(path)
            else:
                fd = os.open(path, os.O_CREAT | os.O_WRONLY)
                os.write(fd, content)
                os.close(fd)
            os.chmod(path, 0o700)
            os.utime(path, ns=(0, 0))
        os.utime(top, ns=(0, 0))
        fd = os.open(top, os.O_RDONLY)
        try:
            with open(os.devnull, "wb") as nowhere:
                return write_listing(fd, nowhere, system_xattrs()).digest
        finally:
            os.close(fd)

    def normal(tree: dict[bytes, bytes]) -> dict[bytes, bytes]:
        return {name: b"d" if content[:1] == b"d" else content for name, content in tree.items()}

    assert (digest(left) == digest(right)) == (normal(left) == normal(right))
