"""The pages say what the code has: settings, spec fields, verbs, targets, links, examples and deployment files."""

import itertools
import json
import plistlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest

from schemas.commands import CONTAINER_VERBS, NODE_VERBS
from schemas.events import AnyEvent
from schemas.queries import QUERY_VERBS
from schemas.spec import ServiceSpec, SpecFeature, decode_deployment, decode_spec, unsupported_fields
from schemas.spec_life import HealthSpec, InitSpec, LifecycleSpec, RestartPolicy
from schemas.spec_model import DeploymentSpec
from schemas.spec_network import EndpointSpec, NetworkSpec
from schemas.spec_parts import (
    CommandSpec,
    DeviceSpec,
    GpuSpec,
    ImageSpec,
    LogsSpec,
    ResourcesSpec,
    SandboxSpec,
    StorageSpec,
)
from schemas.spec_place import DependsSpec, NodeSelector, ScaleSpec, TargetPlatform
from schemas.status import Reason, State
from worker.agent import FEATURES
from worker.cli.app import BY_NAME, FAMILIES, make_parser
from worker.config import load_config
from worker.settings import BY_KEY, SETTINGS
from worker.specfile import load_specs, parse_yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
WITH_COMMANDS = sorted(
    [*PAGES, *EXAMPLES, *(ROOT / "deploy").rglob("*.conf"), *(ROOT / "deploy").rglob("*.service")]
)

FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
# What a feature is called in a spec, where that is not the feature's own name.
FIELD_OF = {
    SpecFeature.RESTART: "restart_policy",
    SpecFeature.TTL_AFTER_FINISHED: "ttl_after_finished_s",
    SpecFeature.ISOLATION_ROOTFS: "sandbox.isolation",
    SpecFeature.VOLUMES_S3: "s3",
    SpecFeature.VOLUMES_BIND: "bind",
    SpecFeature.VOLUMES_NAMED: "named",
    SpecFeature.VOLUMES_ANONYMOUS: "anonymous",
    SpecFeature.VOLUMES_TMPFS: "tmpfs",
    SpecFeature.GPU: "resources.gpu",
}
IN_WORDS = {"health": "health checks", "init": "init steps", "restart_policy": "restart policies"}
# Without a row of their own: references in `env`, and steps of `init`.
# What a node has that can have it; some of it depends on the machine or the worker's user.
BUILT = FEATURES | {
    *(SpecFeature.USER, SpecFeature.ISOLATION_ROOTFS, SpecFeature.RESOURCES_CPU, SpecFeature.RESOURCES_PIDS)
}
WITHOUT_ROW = {SpecFeature.SECRETS, SpecFeature.INIT_S3}


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCED.findall(read(page)) if kind == language]


def spans(text: str) -> list[str]:
    return SPAN.findall(FENCED.sub("", text))


def rows(text: str) -> list[list[str]]:
    """The cells of every table row."""
    lines = (line for line in text.splitlines() if line.startswith("| ") and not set(line) <= set("|-: "))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# -- settings


def test_every_setting_has_its_row() -> None:
    table = {cells[0].strip("`"): cells for cells in rows(read(DOCS / "configuration.md"))}
    for setting in SETTINGS:
        assert setting.key in table, f"{setting.key} is missing from docs/configuration.md"
        row = " ".join(table[setting.key])
        assert f"`{setting.env}`" in row, f"{setting.key}: its variable {setting.env} is missing"
        if setting.flag is not None:
            assert f"`{setting.flag}`" in row, f"{setting.key}: its flag {setting.flag} is missing"


def test_no_row_for_a_setting_that_does_not_exist() -> None:
    for cells in rows(read(DOCS / "configuration.md")):
        key = cells[0].strip("`")
        if "." in key:
            assert key in BY_KEY, f"docs/configuration.md has {key}, which is no setting"


def test_the_example_of_a_configuration_loads(tmp_path: Path) -> None:
    for number, body in enumerate(blocks(DOCS / "configuration.md", "toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(body)
        path.chmod(0o600)
        assert load_config(path, {}, {}).node.name == "mac-1"


# -- specs


def wire_names(struct: type) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(struct)]


def members(union: Any) -> tuple[type, ...]:
    return get_args(union) if get_origin(union) is Union or get_args(union) else (union,)


def documented_parts() -> Iterator[tuple[str, str]]:
    """(struct, field) of everything that the page on specs must name."""
    parts = [
        ServiceSpec,
        DeploymentSpec,
        ImageSpec,
        CommandSpec,
        ResourcesSpec,
        GpuSpec,
        EndpointSpec,
        NetworkSpec,
    ]
    parts += [
        *members(StorageSpec),
        DeviceSpec,
        LogsSpec,
        SandboxSpec,
        LifecycleSpec,
        RestartPolicy,
        HealthSpec,
    ]
    parts += [
        *members(get_type_hints(HealthSpec)["check"]),
        InitSpec,
        get_args(get_type_hints(InitSpec)["steps"])[0],
    ]
    parts += [DependsSpec, NodeSelector, TargetPlatform, *members(ScaleSpec)]
    for part in parts:
        for name in wire_names(part):
            yield part.__name__, name


@pytest.fixture(scope="module")
def spec_words() -> set[str]:
    text = read(DOCS / "specs.md")
    return {word for span in spans(text) for word in re.findall(r"[A-Za-z_][A-Za-z0-9_]*", span)} | {
        word
        for block in blocks(DOCS / "specs.md", "yaml")
        for word in re.findall(r"[A-Za-z_]\w*(?=:)", block)
    }


def test_every_field_of_a_spec_is_on_the_page(spec_words: set[str]) -> None:
    missing = [f"{struct}.{name}" for struct, name in documented_parts() if name not in spec_words]
    assert not missing, f"missing from docs/specs.md: {', '.join(missing)}"


def test_a_field_is_marked_not_yet_exactly_while_its_feature_is_missing() -> None:
    table: dict[str, str] = {}
    for cells in rows(read(DOCS / "specs.md")):
        for name in spans(cells[0]):
            table.setdefault(name, " ".join(cells[1:]))
    for feature in SpecFeature:
        if feature in WITHOUT_ROW:
            continue
        field = FIELD_OF.get(feature, str(feature))
        assert field in table, f"docs/specs.md has no row for {field}"
        says = "unsupported, not yet" in table[field]
        assert says != (feature in BUILT), f"docs/specs.md says of {field}: {table[field]!r}"


def test_the_limits_of_the_readme_name_what_is_missing() -> None:
    limits = read(ROOT / "README.md").partition("## Limits")[2].partition("\n## ")[0]
    for feature in SpecFeature:
        if feature in FEATURES or feature in WITHOUT_ROW:
            continue
        field = FIELD_OF.get(feature, str(feature))
        plain = IN_WORDS.get(field, f"`{field}")
        assert plain in limits, f"the limits in README.md do not mention {field}"


def test_yaml_in_the_pages_is_valid() -> None:
    for page in (ROOT / "README.md", DOCS / "specs.md", DOCS / "security.md"):
        for body in blocks(page, "yaml"):
            value = parse_yaml(body.encode())
            if "services" in value:
                decode_deployment(value)
            else:
                decode_spec({"image": {"name": "any:1"}} | value)


def test_the_readme_shows_the_example_as_it_is() -> None:
    (shown,) = blocks(ROOT / "README.md", "yaml")
    _, services = load_specs(ROOT / "examples" / "web.yaml")
    assert decode_spec(parse_yaml(shown.encode())) == services["web"]


# -- the wire


def test_the_page_on_events_names_every_verb_and_type() -> None:
    text = read(DOCS / "events.md")
    said = set(spans(text))
    words = {word for span in said for word in re.findall(r"[a-z_]+", span)}
    types = [str(kind.__struct_config__.tag) for kind in AnyEvent.__args__]
    for name in (*CONTAINER_VERBS, *NODE_VERBS, *types, *QUERY_VERBS, *State):
        assert str(name) in words, f"docs/events.md does not mention {name}"
    not_built = {Reason.INIT_FAILED, Reason.UNHEALTHY}
    for reason in set(Reason) - not_built:
        assert str(reason) in words, f"docs/events.md does not mention the reason {reason}"


def test_json_in_the_pages_is_json() -> None:
    for page in PAGES:
        for body in blocks(page, "json"):
            json.loads(body)


# -- links


def anchors(page: Path) -> set[str]:
    """As the usual renderers make them of headings."""
    found = set()
    for heading in HEADING.findall(FENCED.sub("", read(page))):
        plain = re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower()
        found.add(plain.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCED.sub("", read(page))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{named(page)} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(place), f"{named(page)} links to {target}: no such heading"


def test_every_decision_is_in_the_index() -> None:
    index = read(DOCS / "adr" / "README.md")
    for page in (DOCS / "adr").glob("0*.md"):
        assert f"({page.name})" in index
        assert read(page).startswith(f"# {page.name[:4]} ")


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_no_path_of_a_development_machine(page: Path) -> None:
    assert not re.search(r"/(work|root|tmp/[a-z]+try)/", read(page))


# -- commands


def command_lines(page: Path) -> Iterator[str]:
    text = read(page)
    if page.suffix != ".md":
        yield from (
            line.lstrip("# ") for line in text.splitlines() if line.startswith("#") or "ExecStart=" in line
        )
        return
    for _, body in FENCED.findall(text):
        joined = body.replace("\\\n", " ")
        yield from (line for line in joined.splitlines())
    yield from spans(text)


def uses(line: str) -> Iterator[tuple[str, list[str]]]:
    """(verb, options) of every use of the command line in a shell line."""
    line = re.sub(r"(?:^|\s)#\s.*$", "", line) if line.lstrip().startswith("$") else line
    for part in re.split(r"\||&&|;|\$\(|\)|\s{3,}", line):
        match = re.search(r"(?:^|[$#]\s|bin/|=\S+\s|[\"'])sandfleet\s+(.*)", part.strip())
        if match is None:
            continue
        words = match[1].split()
        while words and words[0].startswith("--") and words[0] != "--version":
            words = words[2:]
        if not words or not re.fullmatch(r"[a-z]+|--version|--help", words[0]):
            continue
        name = words.pop(0)
        if name in FAMILIES and words:
            name = f"{name} {words.pop(0)}"
        before = list(itertools.takewhile(lambda word: word != "--", words))
        yield (
            name,
            [word.partition("=")[0] for word in before if re.fullmatch(r"--[a-z-]+(=.*)?|-[a-z]", word)],
        )


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_verbs_and_options_exist(page: Path) -> None:
    for line in command_lines(page):
        for name, options in uses(line):
            if name in ("--version", "--help", "is", "needs"):
                continue
            families = [verb for verb in BY_NAME if verb.startswith(f"{name.partition(' ')[0]} ")]
            for one in (
                [f"{name.partition(' ')[0]} {word}" for word in name.split()[1:]] if families else [name]
            ):
                assert one in BY_NAME, f"{named(page)}: there is no verb {one!r} ({line.strip()})"
            if name in BY_NAME:
                help_page = make_parser(BY_NAME[name]).page(colour=False)
                for option in options:
                    assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_page), (
                        f"{named(page)}: sandfleet {name} has no {option} ({line.strip()})"
                    )


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", read(ROOT / "Makefile"), re.MULTILINE))
    for text in [
        *spans(read(page)),
        *(line for _, body in FENCED.findall(read(page)) for line in body.splitlines()),
    ]:
        for target in re.findall(r"^(?:\$ )?make ([a-z]+)", text):
            assert target in targets, f"{named(page)}: there is no `make {target}`"


def test_the_readme_names_every_verb_of_a_person() -> None:
    tour = read(ROOT / "README.md").partition("## A tour")[2].partition("\n## ")[0]
    for name in BY_NAME:
        assert f"`{name}`" in tour or name == "profile check", f"README.md does not mention {name}"


# -- examples


@pytest.mark.parametrize("path", EXAMPLES, ids=named)
def test_examples_are_specs_that_a_node_takes(path: Path) -> None:
    deployment, services = load_specs(path)
    assert services
    assert (deployment is not None) == (path.name == "deployment.yaml")
    for spec in services.values():
        assert unsupported_fields(spec, FEATURES) == []
        assert f"sandfleet register {spec.image.name} examples/web" in read(path), (
            "it says how to make its image"
        )
    assert (ROOT / "examples" / "web" / "index.html").is_file()


def test_there_is_an_example_of_each_kind() -> None:
    assert {path.name for path in EXAMPLES} >= {"web.yaml", "batch.yaml", "deployment.yaml"}
    assert len(load_specs(ROOT / "examples" / "deployment.yaml")[1]) == 2


# -- deployment files and dependencies


def test_the_unit_keeps_containers_alive() -> None:
    unit = read(ROOT / "deploy" / "systemd" / "sandfleet-worker.service")
    for line in (
        "Delegate=yes",
        "OOMPolicy=continue",
        "KillMode=process",
        "TasksMax=infinity",
        "LimitNOFILE=65536",
    ):
        assert f"\n{line}\n" in unit


def test_the_launchd_job_keeps_containers_alive() -> None:
    job = plistlib.loads((ROOT / "deploy" / "launchd" / "dev.sandfleet.worker.plist").read_bytes())
    assert job["AbandonProcessGroup"] is True
    assert job["Label"] == "dev.sandfleet.worker"


def test_every_dependency_has_its_line() -> None:
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    lines = {cells[0].strip("`").lower() for cells in rows(read(DOCS / "dependencies.md"))}
    for requirement in (
        *project["dependencies"],
        *itertools.chain(*project["optional-dependencies"].values()),
    ):
        name = re.split(r"[<>=!~\[ ;]", requirement)[0].lower()
        assert name in lines, f"docs/dependencies.md does not say why {name} is there"
