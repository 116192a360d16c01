"""Spec files: YAML 1.2 and JSON, whole deployments, and errors that name file, line and field."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ContractError, InvalidSpec, Unsupported
from schemas.spec import FixedScale, HttpCheck, RestartKind, unsupported_fields
from worker import specfile
from worker.specfile import MAX_FILE_BYTES, load_specs, parse_yaml

# The example of the reference system's documentation, made for both of its versions.
REFERENCE = """\
version: v1
deployment: mac-inference
services:
  cache:
    image: {name: "ghcr.io/acme/cache:7", pull_policy: if_not_present}
    endpoints: [{name: tcp, protocol: tcp, port: 6379}]
    scale: {mode: fixed, replicas: 1}
  model:
    rtype: service
    image: {name: "localhost/model:1.4", pull_policy: never}
    command: {entrypoint: [bin/serve], args: [--weights, weights/m.bin], workdir: /app}
    env: {LOG_LEVEL: info, REGION: "$E:REGION", API_KEY: "$S:model-key"}
    resources: {cpu: 2.5, memory: 2Gi, gpu: {count: 1, vendor: apple, mode: mps}}
    endpoints: [{name: http, protocol: http, port: 8080, target_port: 9000, path: /v1, expose: public}]
    scale: {mode: adaptive, min: 1, max: 4, cooldown: 1m30s, targets: {cpu: 70, rps: 200}}
    depends: [{service: cache, condition: healthy, timeout: 2m, on_timeout: warn}]
    storage:
      - {type: bind, source: /opt/weights, target: /app/weights, readonly: true}
      - {type: named, name: kv-cache, target: /app/cache, size: 5Gi}
      - {type: tmpfs, target: /app/tmp, size: 256Mi, mode: 448}
    health:
      start_grace: 30s
      interval: 10s
      timeout: 3s
      retries: 5
      check: {type: http, url: "http://127.0.0.1:9000/healthz"}
    init:
      steps:
        - {id: wait, uses: init.wait_tcp, with: {host: 127.0.0.1, port: 6379}, retry: 2, timeout: 45s}
    errors: {on_init_failure: {action: backoff}, on_panic: {action: restart}}
    restart_policy: {kind: on_failure, max_attempts: 5, delay: 2s}
    platform: {os: macos, arch: arm64}
    node_selector: {labels: {tier: gpu}, prefer_labels: {rack: a}}
    logs: {max_size_bytes: 52428800}
  sweep:
    rtype: cron
    schedule: "0 30 3 * * * *"
    image: {name: "ghcr.io/acme/sweep:2"}
"""


@pytest.fixture(params=["libyaml", "python"])
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both parsers of PyYAML, where both are there."""
    if request.param == "python":
        monkeypatch.setattr(specfile, "_LOADER", yaml.SafeLoader)


def written(folder: Path, text: str | bytes, name: str = "web.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path, kind: type[ContractError] = InvalidSpec, **options: Any) -> ContractError:
    with pytest.raises(kind) as caught:
        load_specs(path, **options)
    assert str(path) in caught.value.message
    return caught.value


@pytest.mark.usefixtures("loader")
def test_a_whole_file_of_the_reference(tmp_path: Path) -> None:
    deployment, services = load_specs(written(tmp_path, REFERENCE))
    assert deployment == "mac-inference"
    assert list(services) == ["cache", "model", "sweep"]
    assert services["cache"].scale == FixedScale(replicas=1)
    model = services["model"]
    assert model.resources.memory_bytes == 2 * 2**30
    assert model.restart_policy is not None
    assert model.restart_policy.kind is RestartKind.ON_FAILURE
    assert model.health is not None
    assert model.health.check == HttpCheck(url="http://127.0.0.1:9000/healthz")
    assert model.init.steps[0].with_ == {"host": "127.0.0.1", "port": 6379}
    assert "health" in unsupported_fields(model, frozenset())


def test_json_files_say_the_same(tmp_path: Path) -> None:
    as_json = json.dumps(parse_yaml(REFERENCE.encode()))
    assert load_specs(written(tmp_path, as_json, "a.json")) == load_specs(written(tmp_path, REFERENCE))
    assert load_specs(written(tmp_path, as_json, "b.yaml")) == load_specs(written(tmp_path, REFERENCE))
    failure = refused(written(tmp_path, '{"image": {"name": "a", "name": "b"}}', "c.json"))
    assert failure.field == "image.name"
    refused(written(tmp_path, "[" * 10_000, "d.json"))
    refused(written(tmp_path, "image: {name: a}", "e.json"))


@pytest.mark.parametrize(
    ("name", "service"), [("web.yaml", "web"), ("My Web_App.v2.yml", "my-web-app-v2"), ("A.json", "a")]
)
def test_a_lone_spec_is_named_after_its_file(tmp_path: Path, name: str, service: str) -> None:
    path = written(tmp_path, '{"image": {"name": "base"}}', name)
    deployment, services = load_specs(path)
    assert deployment is None
    assert list(services) == [service]
    assert list(load_specs(path, name="other")[1]) == ["other"]


def test_a_file_whose_name_is_no_service(tmp_path: Path) -> None:
    path = written(tmp_path, "image: {name: base}", "--.yaml")
    refused(path)
    assert list(load_specs(path, name="web")[1]) == ["web"]
    for bad in ("UP", "-"):
        assert refused(path, name=bad).field == "service"


@pytest.mark.usefixtures("loader")
def test_plain_words_by_the_core_schema() -> None:
    text = """
    no: no
    on: on
    yes: Yes
    sexagesimal: 1:30
    date: 2026-11-24
    underscore: 1_000
    merge: <<
    equals: =
    version: 1.2.3
    minus: '-'
    truth: [true, True, TRUE, false, False, FALSE]
    nothing: [~, null, Null, NULL, ]
    empty:
    decimal: [0, 12, -3, +5, 0644]
    octal: 0o755
    hexadecimal: 0xFF
    binary: 0b11
    floats: [1.5, .5, 1., 1e3, -2.5E-1, +0.0]
    quoted: ["true", '5', "~"]
    tagged: [!!str 80, !!str true, !!int 5, !!float 5, !!bool true, !!null ~, ! 5]
    block: |
      a
      b
    """
    assert parse_yaml(text.encode()) == {
        "no": "no",
        "on": "on",
        "yes": "Yes",
        "sexagesimal": "1:30",
        "date": "2026-11-24",
        "underscore": "1_000",
        "merge": "<<",
        "equals": "=",
        "version": "1.2.3",
        "minus": "-",
        "truth": [True, True, True, False, False, False],
        "nothing": [None, None, None, None],
        "empty": None,
        "decimal": [0, 12, -3, 5, 644],
        "octal": 0o755,
        "hexadecimal": 255,
        "binary": "0b11",
        "floats": [1.5, 0.5, 1.0, 1000.0, -0.25, 0.0],
        "quoted": ["true", "5", "~"],
        "tagged": ["80", "true", 5, 5.0, True, None, "5"],
        "block": "a\nb\n",
    }


@pytest.mark.usefixtures("loader")
def test_the_reference_s_tags_for_unions(tmp_path: Path) -> None:
    assert parse_yaml(b'a: !pin "id=2"\nb: !spread\nc: !bridge {name: x}') == {
        "a": {"pin": "id=2"},
        "b": "spread",
        "c": {"bridge": {"name": "x"}},
    }
    head = "image: {name: base}\n"
    for text, field in (
        ("affinity: !pin id=2", "affinity"),
        ("network_mode: !bridge {name: x}", "network_mode"),
    ):
        assert refused(written(tmp_path, head + text), Unsupported).field == field
    assert refused(written(tmp_path, head + "tty: !wild true")).field == "tty"


BOMB = (
    b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    b"b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
    b"c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
    b"e: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\n"
    b"f: [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]\n"
)
STAIRS = b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [*a%d]\n" % (n, n, n - 1) for n in range(1, 100))


@pytest.mark.usefixtures("loader")
@pytest.mark.parametrize(
    ("raw", "field", "words"),
    [
        (b"", None, "empty"),
        (b"# nothing\n", None, "empty"),
        (b"\xff", None, "UTF-8"),
        (b"a\x00b", None, "not YAML"),
        (b"a: b: c", None, "line 1"),
        (b"a: 1\n\tb: 2", None, "line 2"),
        (b"a: 1\n---\nb: 2", None, "more than one"),
        (b"a: 1\nb: 2\na: 3", "a", "twice"),
        (b"a: [{b: 1, c: 2, b: 3}]", "a[0].b", "twice"),
        (b"a: {'x': 1, x: 2}", "a.x", "twice"),
        (b"5: x", None, "quotes"),
        (b"a: {true: x}", "a", "quotes"),
        (b"? [a]\n: b", None, "quotes"),
        (b"a: .nan", "a", "no number"),
        (b"a: -.inf", "a", "no number"),
        (b"a: 1e999", "a", "no number"),
        (b"a: " + b"9" * 5000, "a", "range"),
        (b"a: !!int x", "a", "no int"),
        (b"a: !!binary aGk=", "a", "tag"),
        (b"a: !!set {x}", "a", "tag"),
        (b"a: !!python/object/apply:os.system [ls]", "a", "tag"),
        (b"a: !!timestamp 2026-11-24", "a", "tag"),
        (b"a: *nowhere", "a", "anchor"),
        (b"a: &a [*a]", "a[0]", "anchor"),
        (b"[" * 10_000, None, "nest"),
        (b"[" * 1_000_000, None, "nest"),
        (b"{a: " * 5_000, None, "nest"),
        (b"- " * 10_000, None, "nest"),
        (b"? " * 100_000, None, "nest"),
        (STAIRS, None, "nest"),
        (BOMB, None, "aliases"),
        (b"- \n" * 150_000, None, "more than"),
        (b"x" * (MAX_FILE_BYTES + 1), None, "bytes"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_bad_yaml(raw: bytes, field: str | None, words: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_yaml(raw)
    assert words in caught.value.message
    if "nest" not in words and "aliases" not in words:
        assert caught.value.field == field


@pytest.mark.usefixtures("loader")
def test_half_of_a_surrogate_pair() -> None:
    with pytest.raises(InvalidSpec):
        parse_yaml(b'a: "\\ud800"')


def test_anchors_and_aliases(tmp_path: Path) -> None:
    text = "version: v1\ndeployment: twins\nservices:\n  a: &a {image: {name: base}, tty: true}\n  b: *a\n"
    _, services = load_specs(written(tmp_path, text))
    assert services["a"] == services["b"]


@pytest.mark.usefixtures("loader")
def test_errors_name_the_line(tmp_path: Path) -> None:
    text = "image:\n  name: base\n\nresources:\n  memory: 512MB\n"
    failure = refused(written(tmp_path, text))
    assert failure.field == "resources.memory"
    assert "web.yaml:5: resources.memory: " in failure.message
    text = "image: {name: base}\nendpoints:\n- name: a\n  protocol: http\n  port: 80\n- name: b\n  port: 80\n"
    failure = refused(written(tmp_path, text))
    assert failure.field == "endpoints[1].protocol"
    assert "web.yaml:6:" in failure.message
    failure = refused(written(tmp_path, REFERENCE.replace("memory: 2Gi", "memory: lots")))
    assert failure.field == "services.model.resources.memory"
    assert "web.yaml:13:" in failure.message
    failure = refused(written(tmp_path, "image: {name: base}\nprivileged: true\n"), Unsupported)
    assert "web.yaml:2: privileged: " in failure.message
    failure = refused(written(tmp_path, "image: {name: base}\nenv:\n  A: yes\n  PORT: 80\n"))
    assert failure.field == "env.PORT"
    assert "web.yaml:4:" in failure.message


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_specs(tmp_path / "none.yaml")
    with pytest.raises(IsADirectoryError):
        load_specs(tmp_path)
    assert refused(written(tmp_path, b" " * (MAX_FILE_BYTES + 1))).field is None
    for text in ("5", "[]", "just words"):
        refused(written(tmp_path, text))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abcdefg-_.", min_size=1, max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(plain)
def test_json_is_yaml(value: Any) -> None:
    read = parse_yaml(json.dumps(value, ensure_ascii=False).encode())
    assert read == value or (isinstance(value, float) and math.isclose(read, value))


@given(st.binary(max_size=60))
def test_no_bytes_crash_it(raw: bytes) -> None:
    try:
        json.dumps(parse_yaml(raw), allow_nan=False).encode()
    except InvalidSpec as failure:
        failure.message.encode()
