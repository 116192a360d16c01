"""pack, save, load, push, login and export on the command line, as far as no node is needed."""

import json
import tarfile
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worker.cli.app import run
from worker.cli.pack_cmd import platform, port, source_date, words
from worker.errors import InvalidCommand


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    top = tmp_path / "app"
    (top / "bin").mkdir(parents=True)
    (top / "bin/run").write_bytes(b"#!/bin/sh\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    return top


def packed(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert run(["pack", *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def config_of(archive: Path) -> dict[str, Any]:
    with tarfile.open(archive) as opened:
        blobs = {m.name: opened.extractfile(m) for m in opened if m.isfile()}
        docker = json.load(blobs["manifest.json"])  # type: ignore[arg-type]
        found: dict[str, Any] = json.load(blobs[docker[0]["Config"]])  # type: ignore[arg-type]
    return found


def test_an_archive_and_what_it_says(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = packed(
        capsys, "app", "app:1", "-o", "app.tar", "--entrypoint", "bin/run -x", "--cmd", '["a b"]', "-e", "A=1=2",
        "-e", "B=", "-w", "/w", "-u", "1000", "-l", "k=v", "--expose", "80", "--expose", "53/udp",
        "--stop-signal", "SIGINT", "--platform", "darwin/arm64",
    )  # fmt: skip
    assert (told["image"], told["entries"], told["bytes"], told["notes"]) == ("app:1", 2, 10, [])
    document = config_of(Path("app.tar"))
    assert (document["os"], document["architecture"], document["created"]) == (
        "darwin",
        "arm64",
        "1970-01-01T00:00:00Z",
    )
    assert document["config"] == {
        "Entrypoint": ["bin/run", "-x"], "Cmd": ["a b"], "Env": ["A=1=2", "B="], "WorkingDir": "/w", "User": "1000",
        "StopSignal": "SIGINT", "Labels": {"k": "v"}, "ExposedPorts": {"53/udp": {}, "80/tcp": {}},
    }  # fmt: skip
    assert sorted(path.name for path in tree.parent.iterdir()) == ["app", "app.tar"]


def test_the_digest_is_the_same_from_within(
    tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What packing makes in the folder itself is no part of it."""
    outside = packed(capsys, "app", "app:1", "-o", "app.tar")
    monkeypatch.chdir(tree)
    for name in ("app.tar", "[odd] *name.tar"):
        for _ in range(2):
            assert packed(capsys, ".", "app:1", "-o", name)["digest"] == outside["digest"]
        assert sorted(path.name for path in tree.iterdir()) == sorted([name, "bin"])
        (tree / name).unlink()


def test_the_time_comes_from_outside(
    tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = packed(capsys, "app", "app:1", "-o", "a.tar")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert packed(capsys, "app", "app:1", "-o", "b.tar")["digest"] != plain["digest"]
    assert config_of(Path("b.tar"))["created"] == "2023-11-14T22:13:20Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "tomorrow")
    assert run(["pack", "app", "app:1", "-o", "c.tar"]) == 2
    assert "SOURCE_DATE_EPOCH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["pack", "missing", "app:1", "-o", "x.tar"], 4, "cannot pack"),
        (["pack", "app", "App:1:2", "-o", "x.tar"], 2, "App:1:2"),
        (["pack", "app", "app@sha256:" + "0" * 64, "-o", "x.tar"], 2, "digest"),
        (["pack", "app", "app:1", "-o", "x.tar", "--push"], 2, "--output or --push"),
        (["pack", "app", "app:1", "-o", "no/such/x.tar"], 4, "cannot be written"),
        (["pack", "app", "app:1", "-o", "x.tar", "--platform", "mac"], 2, "no platform"),
        (["pack", "app", "app:1", "-o", "x.tar", "--expose", "0"], 2, "no port"),
        (["pack", "app", "app:1", "-o", "x.tar", "--entrypoint", '"'], 2, "words"),
        (["pack", "app", "app:1", "-o", "x.tar", "--exclude", "[z-a]"], 2, "pattern 1"),
        (["push", "--archive", "missing.tar", "ghcr.io/a/b:1"], 4, "missing.tar"),
        (["push", "--archive", "x", "--auth", "hub", "ghcr.io/a/b:1"], 2, "logged in"),
        (["login", "registry", "-u", "me", "--password-stdin"], 2, "Docker Hub"),
        (["login", "ghcr.io", "--password-stdin"], 2, "--username"),
        (["login", "ghcr.io", "-u", "a:b", "--password-stdin"], 2, "colon"),
    ],
)
def test_refusals(
    tree: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, said: str
) -> None:
    assert run(argv) == code
    err = capsys.readouterr().err
    assert said in err, err
    assert "Traceback" not in err
    assert sorted(path.name for path in tree.parent.iterdir()) == ["app"]


def test_a_logout_of_nobody(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["logout", "ghcr.io"]) == 0
    assert "no credentials" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("convert", "good", "bad"),
    [
        (words, {"a -b 'c d'": ["a", "-b", "c d"], '["a", ""]': ["a", ""]}, ["", "[1]", "[", "'"]),
        (
            platform,
            {"darwin/arm64": ("darwin", "arm64", None), "linux/arm/v7": ("linux", "arm", "v7")},
            ["", "x", "a/b/c/d", "A/b", "a/"],
        ),
        (port, {"80": "80/tcp", "0080/udp": "80/udp"}, ["", "0", "65536", "x", "80/", "80/x", "-1"]),
    ],
)
def test_options(convert: Callable[[str], Any], good: dict[str, Any], bad: list[str]) -> None:
    assert {text: convert(text) for text in good} == good
    for text in bad:
        with pytest.raises(ArgumentTypeError):
            convert(text)


def test_source_dates() -> None:
    assert [source_date(env) for env in ({}, {"SOURCE_DATE_EPOCH": ""}, {"SOURCE_DATE_EPOCH": "5"})] == [
        0,
        0,
        5,
    ]
    for text in ("-1", "1.5", "٣", "9" * 20):
        with pytest.raises(InvalidCommand):
            source_date({"SOURCE_DATE_EPOCH": text})
