"""docs/seatbelt.md says what the code has: every group with every rule, and the decisions of the reference and ours."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.status import Gpu
from worker.platform.darwin.groups import BY_NAME, GROUPS
from worker.platform.darwin.groups_gpu import GPU_LEVELS
from worker.platform.darwin.rules import OLDEST_RELEASE, Rule
from worker.platform.darwin.sbpl import Sbpl

from .reference_profile import Machine, render
from .sbpl_help import BOX, DATA, ROOT, STATE, TMP, Asked, ask_spec

PAGE = Path(__file__).parents[2] / "docs" / "seatbelt.md"


def section(title: str) -> str:
    found = re.search(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"docs/seatbelt.md has no section {title}"
    return found[1]


def table_rows(text: str) -> list[tuple[str, ...]]:
    """The cells of each row but the heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines]
    heads = {number - 1 for number, row in enumerate(cells) if set("".join(row)) <= set("-: ")}
    return [row for number, row in enumerate(cells) if number not in heads and number - 1 not in heads]


# -- groups


def where(rule: Rule) -> str:
    """The filters in short: each kind once, with its values."""
    kinds: dict[str, list[str]] = {}
    for text in rule.filters:
        plain = re.fullmatch(r'\(([a-z-]+) "([^"]*)"\)', text)
        kind, value = (plain[1], plain[2]) if plain else ("", text)
        kinds.setdefault(kind, []).append("`" + value.replace("|", "\\|") + "`")
    said = [f"{kind} {' '.join(values)}".strip() for kind, values in kinds.items()]
    said += {"own": ["its rootfs and tmp"], "above": ["folders above what is granted"], "": []}[rule.reach]
    said += [f"from macOS {rule.since}"] if rule.since > OLDEST_RELEASE else []
    return "; ".join(said) or "everywhere"


def rule_rows(name: str, rules: tuple[Rule, ...]) -> Iterator[tuple[str, ...]]:
    for rule in rules:
        operations = " ".join(f"`{one}`" for one in rule.operations.split())
        yield f"`{name}`", operations, where(rule), rule.source


def group_row(name: str) -> tuple[str, ...]:
    group = BY_NAME[name]
    needs = "in every profile" if group.always else "yes" if not GROUPS[name].harmless else "no"
    return f"`{name}`", group.purpose, " ".join(f"`{one}`" for one in group.includes), needs


def test_the_page_lists_every_group() -> None:
    assert table_rows(section("Groups")) == [group_row(name) for name in BY_NAME]


def test_the_page_lists_every_rule_of_every_group_with_its_source() -> None:
    expected = [row for group in BY_NAME.values() for row in rule_rows(group.name, group.rules)]
    assert table_rows(section("Rules of the groups")) == expected


def test_the_page_lists_every_rule_of_the_gpu_levels() -> None:
    expected = [row for level, rules in GPU_LEVELS.items() for row in rule_rows(level.value, rules)]
    assert table_rows(section("Rules of the GPU levels")) == expected
    assert all(level is not Gpu.NONE or not rules for level, rules in GPU_LEVELS.items())


def test_every_source_is_explained() -> None:
    known = {row[0].strip("`") for row in table_rows(section("Sources"))}
    rules = [rule for group in BY_NAME.values() for rule in group.rules]
    rules += [rule for level in GPU_LEVELS.values() for rule in level]
    used = {word for rule in rules for word in re.findall(r"\b[A-Z]{2,4}\b(?=[ #])", rule.source)}
    assert used <= known


# -- decisions

# What a row calls its container: the reference's, and the spec of ours.
CONTAINERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({"network": "none"}, {"network": {"access": "none"}}),
    "localhost": (
        {"network": "localhost", "bind": (8080, 31000), "connect": (53, 80, 443, 8080, 31000)},
        {"endpoints": [{"name": "web", "protocol": "http", "port": 8080}]},
    ),
    "outbound": ({"network": "full"}, {"network": {"access": "outbound"}}),
    "full": ({"network": "full"}, {}),
    "metal": ({"gpu": "metal"}, {"resources": {"gpu": {"vendor": "apple"}}}),
    "mps": ({"gpu": "mps"}, {"resources": {"gpu": {"vendor": "apple", "mode": "mps"}}}),
    "volumes": (
        # The reference takes a volume's target for a path of the host, and knows no `readonly`.
        {"writable": ("/srv", "/mnt/in")},
        {
            "sandbox": {"write": ["/srv"]},
            "storage": [{"type": "bind", "source": "/srv/in", "target": "/mnt/in", "readonly": True}],
        },
    ),
    "api": ({"writable": (f"{DATA}/api.sock",)}, {"network": {"access": "localhost"}}),
    "socket": ({}, {"sandbox": {"unix_sockets": ["/private/tmp/db.sock"]}}),
}
FIELDS = {
    "mach-lookup": "name",
    "sysctl-read": "name",
    "sysctl-write": "name",
    "user-preference-read": "name",
    "iokit-get-properties": "name",
    "ipc-posix-shm-write-create": "name",
    "ipc-posix-sem-open": "name",
    "iokit-open": "class_",
    "iokit-open-service": "class_",
    "signal": "target",
    "system-socket": "domain",
}
DEVICES = {"/dev/null", "/dev/zero", "/dev/tty", "/dev/ptmx", "/dev/urandom", "/dev/ttys001"}
PLACES = {"ROOTFS": ROOT, "STATE": STATE, "TMP": TMP, "DATA": DATA, "BOX": BOX}


def decision(profile: Asked, question: str) -> str:
    """Of `OPERATION [ARGUMENT]`, where a capital word at the start of a path stands for a folder."""
    operation, _, text = question.partition(" ")
    for word, place in PLACES.items():
        text = re.sub(rf"^{word}(?=/|$)", place, text)
    argument: dict[str, Any] = {}
    if operation in FIELDS:
        kind, _, name = text.rpartition(" ")
        argument |= {FIELDS[operation]: name} | ({"kind": kind} if kind else {})
    elif operation.startswith("process-info"):
        argument["target"] = text
    elif text.startswith("/"):
        argument["path"] = text
        if text in DEVICES:
            argument["vnode"] = "CHARACTER-DEVICE"
    elif text:
        address, _, protocol = text.partition(" ")
        argument |= {"address": address} | ({"protocol": protocol} if protocol else {})
    return profile.verdict(operation, **argument).decision


@functools.cache
def profiles(container: str) -> tuple[Asked, Asked]:
    machine, spec = CONTAINERS[container]
    facts = {"api_socket": f"{DATA}/api.sock"} if container == "api" else {}
    ours = ask_spec(spec, release=26, **facts)
    return Asked(Sbpl(render(Machine(state=BOX, **machine)), {}), 26), ours


DECISIONS = table_rows(section("Decisions compared"))


@pytest.mark.parametrize("row", DECISIONS, ids=[f"{row[2]} {row[1]}" for row in DECISIONS])
def test_the_tables_decisions_are_those_that_are_made(row: tuple[str, ...]) -> None:
    category, question, container, theirs, ours, reason = row
    reference, here = profiles(container.strip("`"))
    assert decision(reference, question.strip("`")) == theirs
    assert decision(here, question.strip("`")) == ours
    assert category
    assert (theirs == ours) == (reason == ""), "a difference has a reason, and only a difference"


def test_the_table_covers_the_categories_and_names_its_differences() -> None:
    categories = list(dict.fromkeys(row[0] for row in DECISIONS))
    assert categories == ["processes", "system", "container", "volumes", "network", "unix sockets", "devices", "IPC",
                          "services", "GPU", "other"]  # fmt: skip
    assert len(DECISIONS) == len({row[1:3] for row in DECISIONS})
    for container in CONTAINERS:
        assert any(row[2].strip("`") == container for row in DECISIONS), container
    # What the reference opens and this profile keeps shut is never without a reason; see also test_s1 … s21.
    shut = [row for row in DECISIONS if (row[3], row[4]) == ("allow", "deny")]
    opened = [row for row in DECISIONS if (row[3], row[4]) == ("deny", "allow")]
    assert len(shut) > 15
    assert len(opened) > 15
