"""What a container runs and with which variables; and that no path leads out of its root."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import ContractError
from schemas.spec import ServiceSpec
from worker.config import Config, PolicyConfig
from worker.entrypoint import ResolvedCommand, build_env, resolve_command, runnable
from worker.errors import InvalidSpec, StartFailed
from worker.images.model import ImageConfig
from worker.platform.base import PathRule, SandboxPolicy, VolumeMount
from worker.rootpath import MAX_DEPTH, locate, resolve_in_root
from worker.secret_files import MAX_BYTES, SecretFiles


def spec(**changes: Any) -> ServiceSpec:
    return msgspec.convert({"image": {"name": "app"}, **changes}, ServiceSpec)


def command(**parts: Any) -> ServiceSpec:
    return spec(command=parts)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    top = tmp_path / "rootfs"
    (top / "bin").mkdir(parents=True)
    (top / "app" / "bin").mkdir(parents=True)
    for name in ("bin/tool", "app/bin/serve", "app/run.sh", "bin/busybox"):
        (top / name).write_text("#!/bin/sh\n")
        (top / name).chmod(0o755)
    (top / "app" / "data").write_text("no program")
    (top / "bin" / "ls").symlink_to("/bin/busybox")
    (top / "bin" / "rel").symlink_to("../app/bin/serve")
    (top / "usr").symlink_to("/")
    return top


def resolved(
    root: Path, what: ServiceSpec, image: ImageConfig | None = None, **options: Any
) -> ResolvedCommand:
    path = options.pop("path", "/app/bin:/bin:/usr/bin")
    return resolve_command(what, image or ImageConfig(), root, path, **options)


class TestWords:
    def test_entrypoint_and_args(self, root: Path) -> None:
        found = resolved(root, command(entrypoint=["serve", "-a"], args=["x", ""]))
        assert found.argv[1:] == ["-a", "x", ""]
        assert found.program == str(root / "app/bin/serve")
        assert found.cwd == str(root)

    def test_args_alone(self, root: Path) -> None:
        image = ImageConfig(entrypoint=["/bin/tool"], cmd=["image"])
        found = resolved(root, command(args=["serve", "x"]), image)
        assert (found.program, found.argv[1:]) == (str(root / "app/bin/serve"), ["x"])

    def test_the_images_own(self, root: Path) -> None:
        found = resolved(root, command(), ImageConfig(entrypoint=["tool", "-v"], cmd=["image"]))
        assert (found.program, found.argv[1:]) == (str(root / "bin/tool"), ["-v", "image"])
        found = resolved(root, command(entrypoint=[], args=[]), ImageConfig(cmd=["tool"]))
        assert found.program == str(root / "bin/tool")

    def test_an_entrypoint_forgets_the_images_arguments(self, root: Path) -> None:
        image = ImageConfig(entrypoint=["tool"], cmd=["image"])
        assert resolved(root, command(entrypoint=["serve"]), image).argv[1:] == []

    def test_a_shell_of_the_host_first(self, root: Path) -> None:
        if not os.access("/bin/sh", os.X_OK):
            pytest.skip("this machine has no /bin/sh")
        found = resolved(root, command())
        assert (found.program, found.argv) == ("/bin/sh", ["/bin/sh"])

    def test_a_shell_of_the_root_where_the_hosts_may_not_run(self, root: Path) -> None:
        (root / "bin" / "bash").write_text("#!/bin/sh\n")
        (root / "bin" / "bash").chmod(0o755)
        found = resolved(root, command(), may_run=lambda path: False)
        assert found.program == str(root / "bin/bash")

    def test_no_shell_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(InvalidSpec, match="no shell") as caught:
            resolved(tmp_path / "empty", command(), may_run=lambda path: False)
        assert caught.value.field == "spec.command"

    def test_a_nul_is_no_argument(self, root: Path) -> None:
        for parts in ({"entrypoint": ["tool", "a\0b"]}, {"args": ["to\0ol"]}):
            with pytest.raises(InvalidSpec, match="NUL"):
                resolved(root, command(**parts))


class TestProgram:
    def test_absolute_is_the_hosts_where_it_exists(self, root: Path) -> None:
        host = os.path.realpath("/bin/sh")
        found = resolved(root, command(entrypoint=[host]))
        assert (found.program, found.argv[0]) == (host, host)

    def test_absolute_is_the_roots_where_the_host_has_none(self, root: Path) -> None:
        found = resolved(root, command(entrypoint=["/app/run.sh"]))
        assert (found.program, found.argv[0]) == (str(root / "app/run.sh"),) * 2

    def test_absolute_is_the_roots_where_the_sandbox_forbids_the_hosts(self, root: Path) -> None:
        (root / "bin" / "sh").write_text("#!/bin/sh\n")
        (root / "bin" / "sh").chmod(0o755)
        found = resolved(root, command(entrypoint=["/bin/sh"]), may_run=lambda path: False)
        assert found.program == str(root / "bin/sh")

    def test_a_link_is_followed_inside_and_keeps_its_name(self, root: Path) -> None:
        """A program of many names looks at argv[0].

        The file is the image's, not the host's of the same path.
        """
        found = resolved(root, command(entrypoint=["ls"]), path="/bin", may_run=lambda path: False)
        assert (found.program, found.argv[0]) == (str(root / "bin/busybox"), str(root / "bin/ls"))
        found = resolved(root, command(entrypoint=["rel"]))
        assert (found.program, found.argv[0]) == (str(root / "app/bin/serve"), str(root / "bin/rel"))

    def test_a_name_with_a_slash_is_relative_to_the_working_directory(self, root: Path) -> None:
        for name in ("bin/serve", "./bin/serve", "../app/bin/serve", "../../../../app/bin/serve"):
            found = resolved(root, command(entrypoint=[name], workdir="/app"))
            assert found.program == str(root / "app/bin/serve"), name
            assert found.cwd == str(root / "app")

    def test_path_goes_entry_by_entry(self, root: Path, tmp_path: Path) -> None:
        host = tmp_path / "host"
        host.mkdir()
        (host / "tool").write_text("#!/bin/sh\n")
        (host / "tool").chmod(0o755)
        what, inside = command(entrypoint=["tool"]), str(root / "bin/tool")
        assert resolved(root, what, path=f"{host}:/bin").program == str(host / "tool")

        def only_host(path: str) -> bool:
            return path.startswith(str(host))

        assert resolved(root, what, path=f"/bin:{host}", may_run=only_host).program == inside
        assert resolved(root, what, path=f"{host}:/bin", may_run=lambda path: False).program == inside

    def test_relative_entries_are_below_the_root(self, root: Path) -> None:
        assert resolved(root, command(entrypoint=["serve"]), path="app/bin").program == str(
            root / "app/bin/serve"
        )
        assert resolved(root, command(entrypoint=["serve"]), path="../../app/bin").program == str(
            root / "app/bin/serve"
        )

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("nope", r"'nope' cannot be run: not found in PATH \(/app/bin:/bin:/usr/bin\)"),
            ("/no/where", "'/no/where' cannot be run: not found on the host or in the image"),
            ("./nope", "not found"),
            ("/app/data", "/app/data is not executable"),
            ("app/data", "app/data is not executable"),
            ("/app", "/app is not a file"),
            ("", "has no name"),
            ("x" * 300, "File name too long"),
            ("/loop", "Too many levels"),
            ("/app/data/x", "not found"),
        ],
    )
    def test_what_is_wrong_is_said(self, root: Path, name: str, reason: str) -> None:
        (root / "loop").symlink_to("loop")
        with pytest.raises(StartFailed, match=reason) as caught:
            resolved(root, command(entrypoint=[name]))
        assert caught.value.field == "spec.command.entrypoint"

    def test_a_host_program_that_may_not_run_is_said(self, root: Path) -> None:
        with pytest.raises(StartFailed, match="not among what the sandbox lets run"):
            resolved(root, command(args=["/bin/sh"]), may_run=lambda path: False)

    def test_an_image_that_names_nothing_useful(self, root: Path) -> None:
        with pytest.raises(StartFailed) as caught:
            resolved(root, command(), ImageConfig(cmd=["nope"]))
        assert caught.value.field is None

    def test_names_with_any_bytes(self, root: Path) -> None:
        odd = os.fsdecode(b"\xff\xfe")
        (root / "bin" / odd).write_text("#!/bin/sh\n")
        (root / "bin" / odd).chmod(0o755)
        assert resolved(root, command(), ImageConfig(cmd=[odd])).program == str(root / "bin" / odd)


class TestRunnable:
    def test_granted_folders_only(self) -> None:
        policy = SandboxPolicy(
            container="a-0",
            instance="i",
            rootfs="/d/root",
            tmp="/d/tmp",
            state_dir="/d/state",
            paths=(
                PathRule("/d/root", "rwx", "rootfs"),
                PathRule("/opt/t", "rx", "x"),
                PathRule("/srv", "r", "x"),
            ),
            deny=("/opt/t/secret",),
        )
        may = runnable(policy, ("/usr/bin", "/bin/"))
        for path in ("/usr/bin/env", "/bin/sh", "/opt/t/x", "/d/root/bin/x"):
            assert may(path), path
        for path in ("/usr/binx", "/srv/x", "/d/tmp/x", "/opt/t/secret/x", "/home/x", "/usr/sbin/x"):
            assert not may(path), path


class TestWorkdir:
    @pytest.mark.parametrize(
        "workdir", ["/app", "app", "/app/", "/usr/app", "/../../app", "usr/usr/app/../app"]
    )
    def test_below_the_root(self, root: Path, workdir: str) -> None:
        assert resolved(root, command(args=["tool"], workdir=workdir)).cwd == str(root / "app")

    @pytest.mark.parametrize(
        "workdir", ["/nope", "/app/data", "/app/data/x", "/" + "x" * 300, "/loop", "/a\0b"]
    )
    def test_one_that_cannot_be_used(self, root: Path, workdir: str) -> None:
        (root / "loop").symlink_to("loop")
        with pytest.raises(InvalidSpec, match="working directory") as caught:
            resolved(root, command(args=["tool"], workdir=workdir))
        assert caught.value.field == "spec.command.workdir"

    def test_the_images(self, root: Path) -> None:
        assert resolved(root, command(args=["tool"]), ImageConfig(working_dir="/app")).cwd == str(
            root / "app"
        )
        with pytest.raises(StartFailed, match="the image names it"):
            resolved(root, command(args=["tool"]), ImageConfig(working_dir="/nope"))

    def test_a_volume_is_where_its_source_is(self, root: Path, tmp_path: Path) -> None:
        source = tmp_path / "volume"
        (source / "in").mkdir(parents=True)
        (source / "in" / "run").write_text("#!/bin/sh\n")
        (source / "in" / "run").chmod(0o755)
        (source / "out").symlink_to("/")
        (root / "mnt").symlink_to(source)
        volumes = (VolumeMount(kind="bind", source=str(source), target="/mnt"),)
        found = resolved(root, command(args=["./run"], workdir="/mnt/in"), volumes=volumes)
        assert (found.cwd, found.program) == (str(source / "in"), str(source / "in" / "run"))
        assert locate(root, volumes, "/mnt") == source
        assert locate(root, volumes, "/mnt/out/in") == source / "in"
        assert locate(root, volumes, "/app") == root / "app"
        with pytest.raises(FileNotFoundError):
            locate(root, (), "/mnt/in")


class TestResolveInRoot:
    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("/", ""),
            ("", ""),
            ("..", ""),
            ("/../../..", ""),
            ("/app", "app"),
            ("/usr/usr/app", "app"),
            ("bin/ls", "bin/busybox"),
            ("/bin/rel", "app/bin/serve"),
            ("/bin/../app/./bin//serve", "app/bin/serve"),
            ("/etc", "etc"),
            ("/chain", "app"),
            ("/outside/app", "app"),
        ],
    )
    def test_as_if_it_were_the_root(self, root: Path, path: str, expected: str) -> None:
        (root / "etc").mkdir()
        (root / "outside").symlink_to("../../../../..")
        (root / "chain").symlink_to("chain1")
        (root / "chain1").symlink_to("/outside/usr/app")
        assert resolve_in_root(root, path) == root / expected

    def test_errors_name_the_path(self, root: Path) -> None:
        for path, kind in (
            ("/nope/x", FileNotFoundError),
            ("/app/data/x", NotADirectoryError),
            ("/app/data/", NotADirectoryError),
            ("/app/data/..", NotADirectoryError),
        ):
            with pytest.raises(kind) as caught:
                resolve_in_root(root, path)
            assert caught.value.filename == path

    def test_too_deep_and_too_many_links(self, root: Path) -> None:
        deep = root.joinpath(*["d"] * (MAX_DEPTH + 1))
        deep.mkdir(parents=True)
        assert resolve_in_root(root, "d/" * MAX_DEPTH)
        with pytest.raises(OSError, match="too long"):
            resolve_in_root(root, "d/" * (MAX_DEPTH + 1))
        for number in range(50):
            (root / f"l{number}").symlink_to(f"l{number + 1}")
        (root / "l50").symlink_to("app")
        assert resolve_in_root(root, "/l20") == root / "app"
        with pytest.raises(OSError, match="levels of symbolic links"):
            resolve_in_root(root, "/l5")

    def test_a_link_planted_meanwhile_fails(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.stat

        def swap(name: Any, **options: Any) -> os.stat_result:
            found = real(name, **options)
            if name == "app" and not (root / "app").is_symlink():
                (root / "app").rename(root / "moved")
                (root / "app").symlink_to("/etc")
            return found

        monkeypatch.setattr(os, "stat", swap)
        with pytest.raises(OSError, match=r"Not a directory|symbolic"):
            resolve_in_root(root, "/app/passwd")

    def test_no_descriptor_is_left(self, root: Path) -> None:
        if not os.path.isdir("/proc/self/fd"):
            pytest.skip("needs /proc")
        before = len(os.listdir("/proc/self/fd"))
        for path in ("/app/bin/serve", "/nope", "/usr/usr/usr/bin/ls", "/app/data/x"):
            try:
                resolve_in_root(root, path)
            except OSError:
                continue
        assert len(os.listdir("/proc/self/fd")) == before


part = st.sampled_from(["a", "b", "c", "..", ".", "", "d"])
path_text = st.builds(
    lambda absolute, parts: ("/" if absolute else "") + "/".join(parts),
    st.booleans(),
    st.lists(part, max_size=7),
)
entry = st.one_of(st.tuples(st.just("dir"), st.none()), st.tuples(st.just("link"), path_text))


@settings(max_examples=250, deadline=None)
@given(
    tree=st.lists(st.tuples(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3), entry), max_size=10),
    path=path_text,
)
def test_a_path_never_escapes_the_rootfs(
    tree: list[tuple[list[str], tuple[str, str | None]]], path: str
) -> None:
    base = Path(os.path.realpath(tempfile.mkdtemp(prefix="root-")))
    try:
        # The same names exist outside: an escape would find something.
        for name in "abcd":
            (base / name / "a" / "b").mkdir(parents=True)
        top = base / "jail" / "root"
        top.mkdir(parents=True)
        for where, (kind, target) in tree:
            place = top.joinpath(*where)
            if os.path.lexists(place) or not os.path.realpath(place.parent).startswith(str(top)):
                continue
            try:
                if kind == "dir":
                    place.mkdir(parents=True)
                elif target:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.symlink_to(target)
            except OSError:
                continue
        try:
            found = resolve_in_root(top, path)
        except OSError:
            assert not walks(top, path)
            return
        assert found == top or top in found.parents
        assert os.path.realpath(found) == str(found)
        assert str(found) == walked(top, path)
    finally:
        shutil.rmtree(base)


def walked(top: Path, path: str) -> str | None:
    """The kernel's rules for a process whose root is `top`, written down plainly."""
    here: list[str] = []
    waiting = [piece for piece in path.split("/") if piece]
    for _ in range(3000):
        if not waiting:
            return str(top.joinpath(*here))
        name = waiting.pop(0)
        if name in (".", ".."):
            here = here[:-1] if name == ".." else here
            continue
        place = top.joinpath(*here, name)
        if place.is_symlink():
            target = os.readlink(place)
            here = [] if target.startswith("/") else here
            waiting = [piece for piece in target.split("/") if piece] + waiting
        elif place.is_dir():
            here = [*here, name]
        else:
            return None
    return None


def walks(top: Path, path: str) -> bool:
    return walked(top, path) is not None


class TestSecrets:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "secrets"
        folder.mkdir(mode=0o700)
        return folder

    def put(self, folder: Path, name: str, content: bytes, mode: int = 0o600) -> Path:
        path = folder / name
        path.write_bytes(content)
        path.chmod(mode)
        return path

    def test_one_newline_at_the_end_is_not_part_of_it(self, folder: Path) -> None:
        self.put(folder, "key", b" a\nb \n\n")
        assert SecretFiles(folder).read("key") == " a\nb \n"

    def test_a_replaced_secret_is_the_new_one(self, folder: Path) -> None:
        secrets = SecretFiles(folder)
        self.put(folder, "key", b"old")
        assert secrets.read("key") == "old"
        self.put(folder, "key", b"new")
        assert secrets.read("key") == "new"

    @pytest.mark.parametrize(
        "name", ["", ".", "..", "../key", "a/b", "a b", "-a", "1a", "a\0", "a\n", "ä", "x" * 200]
    )
    def test_names(self, folder: Path, name: str) -> None:
        with pytest.raises(StartFailed, match="no name"):
            SecretFiles(folder).read(name)

    def test_missing(self, folder: Path) -> None:
        with pytest.raises(StartFailed, match="no secret key"):
            SecretFiles(folder).read("key")

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
    def test_readable_by_others(self, folder: Path, mode: int) -> None:
        self.put(folder, "key", b"hidden", mode)
        with pytest.raises(StartFailed, match=f"mode {mode:04o}") as caught:
            SecretFiles(folder).read("key")
        assert "hidden" not in caught.value.message

    def test_links_folders_and_fifos(self, folder: Path) -> None:
        self.put(folder, "real", b"x")
        (folder / "link").symlink_to(folder / "real")
        (folder / "folder").mkdir(mode=0o600)
        os.mkfifo(folder / "fifo", 0o600)
        for name in ("link", "folder", "fifo"):
            with pytest.raises(StartFailed, match=name):
                SecretFiles(folder).read(name)

    def test_sizes_and_nul(self, folder: Path) -> None:
        self.put(folder, "big", b"x" * MAX_BYTES)
        assert len(SecretFiles(folder).read("big")) == MAX_BYTES
        self.put(folder, "big", b"x" * MAX_BYTES + b"\n")
        assert len(SecretFiles(folder).read("big")) == MAX_BYTES
        self.put(folder, "big", b"x" * (MAX_BYTES + 1))
        with pytest.raises(StartFailed, match="larger"):
            SecretFiles(folder).read("big")
        self.put(folder, "nul", b"a\0b")
        with pytest.raises(StartFailed, match="NUL"):
            SecretFiles(folder).read("nul")

    def test_any_other_bytes(self, folder: Path) -> None:
        self.put(folder, "raw", b"\xff\xfe")
        assert os.fsencode(SecretFiles(folder).read("raw")) == b"\xff\xfe"

    @pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away, which needs root")
    def test_another_users_file(self, folder: Path) -> None:
        path = self.put(folder, "key", b"x")
        os.chown(path, 65534, 65534)
        with pytest.raises(StartFailed, match="another user"):
            SecretFiles(folder).read("key")


NODE = Config(
    policy=PolicyConfig(
        env=("REGION", "UNSET"), secrets={"key": ("web", "api-*"), "gone": ("*",), "other": ("db",)}
    ),
    source="node.toml",
)


class TestVariables:
    @pytest.fixture
    def built(self, tmp_path: Path) -> Any:
        secrets = tmp_path / "secrets"
        secrets.mkdir(mode=0o700)
        (secrets / "key").write_text("s3cret\n")
        (secrets / "key").chmod(0o600)

        def build(cid: str = "web-0", port: int | None = 4711, image: Any = None, **env: str) -> Any:
            return build_env(
                spec(env=env),
                config=NODE,
                node="n1",
                cid=cid,
                instance="01J9",
                port=port,
                tmp=Path("/box/tmp"),
                image=image or ImageConfig(),
                secrets=SecretFiles(secrets),
                default_path="/usr/bin:/bin",
                environ={"REGION": "eu", "AWS_SECRET": "leaked", "HOME": "/root"},
            )

        return build

    def test_nothing_but_what_the_contract_lists(self, built: Any) -> None:
        assert built() == {
            "PATH": "/usr/bin:/bin",
            "HOME": "/box/tmp",
            "TMPDIR": "/box/tmp",
            "PORT": "4711",
            "SANDFLEET_PORT": "4711",
            "ZLAYER_PORT": "4711",
            "SANDFLEET_NODE": "n1",
            "SANDFLEET_CONTAINER": "web-0",
            "SANDFLEET_INSTANCE": "01J9",
        }

    def test_the_spec_is_stronger_than_defaults_and_weaker_than_the_node(self, built: Any) -> None:
        found = built(PORT="1", PATH="/x", HOME="/h", TMPDIR="/t", SANDFLEET_NODE="forged", ZLAYER_PORT="1")
        assert (found["PORT"], found["PATH"], found["HOME"], found["TMPDIR"]) == ("1", "/x", "/h", "/t")
        assert (found["SANDFLEET_NODE"], found["ZLAYER_PORT"]) == ("n1", "4711")

    def test_the_image_stands_between(self, built: Any) -> None:
        image = ImageConfig(env=["PATH=/img", "A=1=2", "B=image", "odd"])
        found = built(image=image, B="spec")
        assert (found["PATH"], found["A"], found["B"]) == ("/img", "1=2", "spec")

    def test_without_a_port(self, built: Any) -> None:
        assert not [name for name in built(port=None) if "PORT" in name]

    def test_values_are_taken_as_they_are(self, built: Any) -> None:
        values = {"A": "", "B": "$HOME", "C": " $E:REGION", "D": "x$S:key", "F": "a\nb"}
        found = built(**values)
        assert {name: found[name] for name in values} == values

    def test_references(self, built: Any) -> None:
        found = built(REGION="$E:REGION", KEY="$S:key")
        assert (found["REGION"], found["KEY"]) == ("eu", "s3cret")
        assert built(cid="api-v2-7", KEY="$S:key")["KEY"] == "s3cret"

    @pytest.mark.parametrize(
        ("cid", "value", "code", "text"),
        [
            ("web-0", "$E:AWS_SECRET", "policy_denied", "node.toml"),
            ("web-0", "$E:", "policy_denied", "node.toml"),
            ("web-0", "$E:UNSET", "start_failed", "no UNSET"),
            ("db-0", "$S:key", "policy_denied", "node.toml"),
            ("web-0", "$S:other", "policy_denied", "node.toml"),
            ("web-0", "$S:gone", "start_failed", "no secret gone"),
            ("web-0", "$S:@db/key", "unsupported", "other services"),
            ("web-0", "a\0b", "invalid_spec", "NUL"),
        ],
    )
    def test_what_is_refused(self, built: Any, cid: str, value: str, code: str, text: str) -> None:
        with pytest.raises(ContractError, match=text) as caught:
            built(cid=cid, X=value)
        assert caught.value.code == code
        assert caught.value.field == "spec.env.X"
        assert "s3cret" not in caught.value.message
        assert "leaked" not in caught.value.message
