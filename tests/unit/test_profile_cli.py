"""The profile verbs as a person or a script calls them, without a node."""

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from worker.cli.app import BY_NAME, make_parser, run
from worker.cli.completion import candidates
from worker.platform.darwin.evaluate import Argument
from worker.profile_batch import CheckLine
from worker.profiles import ShowRequest
from worker.questions import PLAIN

SHOP = """
version: v1
deployment: shop
services:
  web:
    image: {name: "web:1"}
    endpoints: [{name: http, protocol: http, port: 8080}]
  work:
    image: {name: "work:1"}
    network: {access: none}
    sandbox: {read: [/opt/data]}
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No server, and a working directory with a lone spec and a deployment."""
    for name in [name for name in os.environ if name.startswith("SANDFLEET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("SANDFLEET_NATS_URL", "nats://127.0.0.1:1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.yaml").write_text(SHOP)
    (tmp_path / "app.json").write_text(
        json.dumps({"image": {"name": "app:1"}, "sandbox": {"read": ["/opt/data"]}})
    )
    return tmp_path


class Said:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def do(*words: str, stdin: bytes = b"") -> Said:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = run(["profile", *words])
        out, err = capfd.readouterr()
        return Said(code, out, err)

    return do


# -- show


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_show(say: Any, platform: str) -> None:
    said = say("show", "--platform", platform, "app.json")
    assert (said.code, said.err) == (0, "")
    for word in (
        "app-0 on",
        "Files",
        "/opt/data",
        "Network",
        "full",
        "Never",
        "launcher.key",
        "Not enforced",
    ):
        assert word in said.out, word
    reply = say("show", "--platform", platform, "--json", "app.json").json
    assert list(reply) == ["language", "text", "params", "policy", "not_enforced"]
    assert reply["text"].strip() in said.out
    text = say("show", "--platform", platform, "--text", "app.json").out
    assert text == reply["text"]
    assert json.loads(say("show", "--platform", platform, "--policy", "app.json").out) == reply["policy"]


def test_show_takes_the_place(say: Any) -> None:
    words = ["--platform", "darwin", "--macos", "13", "--data-dir", "/data", "--service", "web", "--replica", "2",
             "--port", "30001", "--nats-port", "4333", "--nats-port", "4334", "--api-socket", "/run/api.sock",
             "--rootfs", "/images/web", "--instance", "01JD8Z6M0000000000000000AB"]  # fmt: skip
    policy = say("show", *words, "--json", "shop.yaml").json["policy"]
    assert policy["container"] == "web-2"
    assert policy["tmp"] == "/data/containers/web-2/tmp"
    assert policy["rootfs"] == "/images/web"
    assert policy["network"]["bind_ports"] == [8080, 30001]
    assert policy["network"]["denied_ports"] == [4333, 4334]
    assert policy["network"]["unix_sockets"] == ["/run/api.sock"]
    assert "macOS 13" in say("show", *words, "shop.yaml").out


def test_show_without_a_platform_is_this_machines(say: Any) -> None:
    language = say("show", "--json", "app.json").json["language"]
    assert language == ("sbpl" if sys.platform == "darwin" else "landlock+seccomp")


def test_no_gpu_is_told(say: Any, home: Path) -> None:
    spec = {"image": {"name": "app:1"}, "resources": {"gpu": {"count": 1, "vendor": "apple"}}}
    (home / "gpu.json").write_text(json.dumps(spec))
    assert say("show", "--platform", "darwin", "--json", "gpu.json").json["policy"]["gpu"] == "metal_compute"
    said = say("show", "--platform", "darwin", "--no-gpu", "--json", "gpu.json")
    assert said.json["policy"]["gpu"] == "none"
    assert "resources.gpu" in said.err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["show", "--platform", "darwin", "nowhere.yaml"], 3, "nowhere.yaml"),
        (["show", "--platform", "darwin", "shop.yaml"], 2, "web, work"),
        (["show", "--platform", "darwin", "--service", "nope", "shop.yaml"], 3, "nope"),
        (["show", "--platform", "beos", "app.json"], 2, "beos"),
        (["show", "--platform", "darwin", "--macos", "11", "app.json"], 2, "12"),
        (["show", "--platform", "darwin", "--data-dir", "relative", "app.json"], 2, "relative"),
        (["show"], 2, "TARGET"),
        (["show", "--batch", "app.json"], 2, "stdin"),
        (["show", "web-0"], 5, "127.0.0.1:1"),
        (["check", "app.json"], 2, "OPERATION"),
        (["check", "--platform", "darwin", "app.json", "read"], 2, "PATH"),
        (["check", "--platform", "darwin", "app.json", "frob", "/x"], 2, "frob"),
        (["check", "--batch", "app.json", "read"], 2, "stdin"),
        (["check", "--batch", "web-0"], 2, "web-0"),
        (["check", "web-0", "gpu"], 5, "127.0.0.1:1"),
        (["diff", "app.json", "nowhere.json"], 3, "nowhere.json"),
        (["lint", "nowhere.json"], 3, "nowhere.json"),
    ],
)
def test_what_goes_wrong(say: Any, words: list[str], code: int, text: str) -> None:
    said = say(*words)
    assert said.code == code, said.err
    assert text in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_spec_that_no_node_takes(say: Any, home: Path) -> None:
    (home / "bad.yaml").write_text('image: {name: "a:1"}\nsandbox: {read: [/]}\n')
    said = say("show", "--platform", "darwin", "bad.yaml")
    assert said.code == 4
    assert "sandbox.read[0]" in said.err


# -- check


@pytest.mark.parametrize(
    ("words", "code", "decision"),
    [
        (["read", "/opt/data/x"], 0, "allow"),
        (["write", "/opt/data/x"], 4, "deny"),
        (["file-read-data", "/opt/data/x"], 0, "allow"),
        (["file-read-data", '{"path": "/opt/data/x", "vnode": "FIFO"}'], 0, "allow"),
        # Whom the signal is for is not said.
        (["signal"], 5, "unknown"),
    ],
)
def test_check(say: Any, words: list[str], code: int, decision: str) -> None:
    said = say("check", "--platform", "darwin", "app.json", *words)
    assert said.code == code, said.out
    assert said.out.startswith(decision)
    reply = say("check", "--platform", "darwin", "--json", "app.json", *words)
    assert reply.code == code
    assert list(reply.json) == ["decision", "rule", "line", "reason", "would_allow"]
    assert reply.json["decision"] == decision


def test_check_says_what_would_allow_it(say: Any) -> None:
    said = say("check", "--platform", "linux", "app.json", "write", "/opt/data/x")
    assert "would allow it: sandbox.write: [/opt/data/x]" in said.out
    said = say("check", "--platform", "linux", "app.json", "syscall", "ptrace")
    assert "no single change of the spec" in said.out


# -- diff and lint


def test_diff(say: Any) -> None:
    same = say("diff", "--platform", "darwin", "app.json", "app.json", "--exit-code")
    assert (same.code, same.out) == (0, "QUESTION  A  B\n" if same.out else "")
    said = say("diff", "--platform", "darwin", "shop.yaml:web", "shop.yaml:work")
    assert said.code == 0
    assert "read /opt/data/some-file" in said.out
    rows = say("diff", "--platform", "darwin", "--json", "--exit-code", "shop.yaml:web", "shop.yaml:work")
    assert rows.code == 4
    wanted = {row["question"]: (row["a"], row["b"]) for row in rows.json}
    assert wanted["connect localhost:8080"] == ("allow", "deny")
    assert wanted["read /opt/data/some-file"] == ("deny", "allow")
    assert not [q for q in wanted if "containers/" in q], "where a container lies is no difference"


def test_diff_between_releases_and_platforms(say: Any) -> None:
    assert say("diff", "--platform", "darwin", "--b-macos", "12", "--json", "app.json", "app.json").code == 0
    rows = say("diff", "--platform", "darwin", "--b-platform", "linux", "--json", "app.json", "app.json").json
    assert "lookup com.apple.logd" in {row["question"] for row in rows}


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_diff_reads_what_show_wrote(say: Any, home: Path, platform: str) -> None:
    (home / "saved.json").write_text(say("show", "--platform", platform, "--json", "app.json").out)
    assert say("diff", "--platform", platform, "--json", "app.json", "saved.json").json == []
    (home / "broken.json").write_text(
        '{"language": "klingon", "text": "", "params": {}, "policy": {}, "not_enforced": []}'
    )
    said = say("diff", "--platform", platform, "app.json", "broken.json")
    assert said.code == 4
    assert "broken.json" in said.err


def test_lint(say: Any, home: Path) -> None:
    said = say("lint", "--platform", "darwin", "app.json")
    assert said.code == 0
    assert "warning" in said.out
    assert "network.access" in said.out
    assert "1 warning" in said.err
    assert say("lint", "--platform", "darwin", "--strict", "app.json").code == 4
    assert say("lint", "--platform", "darwin", "--strict", "--service", "work", "shop.yaml").code == 0
    (home / "bad.yaml").write_text(
        'image: {name: "a:1"}\nnetwork: {access: none}\nsandbox: {write: [/etc/x]}\n'
    )
    said = say("lint", "--platform", "linux", "--json", "bad.yaml")
    assert said.code == 4
    assert [(f["service"], f["severity"], f["rule"], f["field"]) for f in said.json] == [
        ("bad", "error", "writes-system", "sandbox.write[0]")
    ]


# -- batches


def test_show_batch(say: Any) -> None:
    lines = [
        b'{"spec": {"image": {"name": "a:1"}}, "service": "one"}',
        b"nonsense",
        b'{"spec": {"image": {"name": "a:1"}}, "service": "two", "platform": "linux"}',
        b'{"spec": {"image": {"name": "a:1"}}, "replica": 3}',
    ]
    said = say("show", "--batch", "--platform", "darwin", "--service", "three", stdin=b"\n".join(lines))
    assert said.code == 0
    answers = said.lines
    assert [answer.get("language") for answer in answers] == ["sbpl", None, "landlock+seccomp", "sbpl"]
    assert [answer["policy"]["container"] for answer in answers if "policy" in answer] == [
        "one-0",
        "two-0",
        "three-3",
    ]
    assert answers[1]["error"]["code"] == "invalid_command"


def test_check_batch_asks_what_show_gave(say: Any) -> None:
    shown = say(
        "show", "--batch", "--platform", "darwin", stdin=b'{"spec": {"image": {"name": "a:1"}}}\n'
    ).lines[0]
    lines = [
        {"text": shown["text"], "params": shown["params"], "operation": "read", "argument": "/bin/sh"},
        {
            "text": shown["text"],
            "params": shown["params"],
            "operation": "file-read-data",
            "argument": {"path": "/x"},
        },
        {"operation": "read", "argument": "/x"},
    ]
    said = say("check", "--batch", stdin="\n".join(map(json.dumps, lines)).encode())
    assert said.code == 0
    assert [line.get("decision") for line in said.lines] == ["allow", "deny", None]


def test_check_batch_of_a_spec(say: Any) -> None:
    lines = (
        b'{"operation": "read", "argument": "/opt/data/x"}\n{"operation": "syscall", "argument": "ptrace"}\n'
    )
    said = say("check", "--batch", "--platform", "linux", "app.json", stdin=lines)
    assert [line["decision"] for line in said.lines] == ["allow", "deny"]


def test_an_empty_batch_has_no_answers(say: Any) -> None:
    said = say("check", "--batch")
    assert (said.code, said.out, said.err) == (0, "", "")


# -- the shell


def test_a_spec_is_completed_as_a_file() -> None:
    assert candidates(["profile", "show", "--platform", "darwin", ""]) == [":files"]
    assert candidates(["profile", "check", "./a"]) == [":files"]
    assert candidates(["profile", "lint", ""]) == [":files"]
    assert candidates(["profile", "show", "--platform", ""]) == ["darwin", "linux"]


# -- the page


def test_the_page_names_every_field_option_and_finding() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "profiles.md").read_text()
    fields = [
        field.encode_name
        for kind in (Argument, ShowRequest, CheckLine)
        for field in msgspec.structs.fields(kind)
    ]
    source = (root / "worker" / "profile_lint.py").read_text()
    findings = re.findall(r'Finding\(\s*(?:severity|"\w+"(?: if [^,]*)?),\s*"([a-z-]+)"', source)
    assert len(set(findings)) > 12
    options = [
        flag for flag in make_parser(BY_NAME["profile lint"]).page(colour=False).split() if flag[:2] == "--"
    ]
    for name in {*fields, *findings, *PLAIN}:
        assert re.search(rf"`[^`\n]*\b{re.escape(name)}\b[^`\n]*`", page), name
    for option in {flag.rstrip(",") for flag in options} - {"--help", "--json"}:
        assert f"`{option}" in page, option
