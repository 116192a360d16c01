"""What every attempt of the attack program should come to, as data, and the table of it for docs/security.md.

`stops` are the layers of the sandbox that stop it, each by itself, measured with plans of that one layer:

launcher     what is there under every plan: nothing is handed down, and it obeys no container
fence        the same, of isolation `process`: the launcher has shut a container's processes in, see `System.fence`
privileges   limits, no groups, no capabilities, no new privileges
landlock     files, TCP ports, signals and abstract sockets; of isolation `process`
namespaces   a root, processes, IPC, network, host name and control groups of its own; of isolation `rootfs`
seccomp      the system-call filter

Marked `*`, a layer stops programs of root's only; marked `+`, those of an ordinary user.

Where an attempt gets through, `open` says at which setting and why: the name of the feature that `not_enforced` then
has; `level` for what the network level is there to allow; `granted` for what whoever may read a file may do; `user`
for what an ordinary user has that cannot be given up. Settings are tried from the narrowest to the widest:
`ISOLATION/LEVEL`, `ISOLATION`; one that ends in ` user` holds for an ordinary user only.

`needs` are what an attempt needs to be alive outside that is not everywhere: `root`, an ordinary `user`, a `kernel`
with it, a `host` that lets it be tried. `proof` tells how it is seen to have got through: `secret`, it said what only
the other side knows; `effect`, the other side was changed; `shown` or a text, that is what it must have said; `call`,
the call itself is all.

    python -m tests.integration.attack_table     prints the table
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tests.integration.attack_rows import ROWS, SECTIONS, Row

ISOLATIONS = ("process", "rootfs")
LEVELS = ("none", "localhost", "outbound", "full")
BEGIN, END = "<!-- attempts: begin -->", "<!-- attempts: end -->"

# Layers that a plan of an isolation has; Landlock's part in `rootfs` is ports and scopes only, and not counted.
LAYERS = {
    "process": ("launcher", "landlock", "privileges", "seccomp"),
    "rootfs": ("launcher", "namespaces", "privileges", "seccomp"),
}
_IN_WORDS = {
    "launcher": "the launcher",
    "privileges": "privileges",
    "landlock": "Landlock",
    "namespaces": "namespaces",
    "seccomp": "seccomp",
}
_OF = {"*": " (for root)", "+": " (for an ordinary user)"}
_WHY = {"level": "by the level", "granted": "by the grant", "user": "for an ordinary user"}


class Judge(NamedTuple):
    """`secret` is what all secrets hold, `shown` has texts by the attempts that must say them to have got through."""

    secret: str
    shown: Mapping[str, str]

    def through(self, name: str, errno: int, said: str, effects: set[str]) -> bool:
        """Whether an attempt got through, by what it told and what was seen outside."""
        proof = ROWS[name].proof
        if proof == "effect":
            return name in effects
        if proof == "secret":
            return self.secret in said
        if proof == "call":
            return errno == 0
        return errno == 0 and self.shown.get(name, proof) in said


def opening(row: Row, isolation: str, level: str, *, root: bool) -> str | None:
    """Why an attempt gets through at a setting; None where it does not."""
    for setting in (f"{isolation}/{level}", isolation):
        for name in (setting, *([] if root else [f"{setting} user"])):
            if name in row.open:
                return row.open[name]
    return None


def stopping(row: Row, isolation: str, *, root: bool) -> set[str]:
    """The layers that stop it there, each by itself."""
    words = row.stops.split()
    named = {word.rstrip("*+") for word in words if not word.endswith("+" if root else "*")}
    if "launcher" in named or ("fence" in named and isolation == "process"):
        return set(LAYERS[isolation])  # it is always there
    return named & set(LAYERS[isolation])


def document() -> str:
    """The table, in Markdown; attempts that the same layers stop share a row."""
    lines = [BEGIN, ""]
    for section, title in SECTIONS.items():
        lines += [f"**{title}**", "", "| attempt | `process` | `rootfs` |", "|---|---|---|"]
        alike: dict[tuple[str, ...], list[str]] = {}
        for row in ROWS.values():
            if row.section == section:
                alike.setdefault(tuple(_cell(row, isolation) for isolation in ISOLATIONS), []).append(
                    row.about
                )
        lines += [f"| {' · '.join(abouts)} | {' | '.join(cells)} |" for cells, abouts in alike.items()]
        lines.append("")
    return "\n".join([*lines, END])


def _cell(row: Row, isolation: str) -> str:
    layers = LAYERS[isolation]
    stops = row.stops.replace("fence", "launcher") if isolation == "process" else row.stops
    words = [word for word in stops.split() if word.rstrip("*+") in layers]
    words.sort(key=lambda word: layers.index(word.rstrip("*+")))
    layer_names = ", ".join(_IN_WORDS[word.rstrip("*+")] + _OF.get(word[-1], "") for word in words)
    return "; ".join([*([layer_names] if layer_names else []), *_openings(row, isolation)])


def _openings(row: Row, isolation: str) -> Iterator[str]:
    reasons: dict[tuple[str, bool], list[str]] = {}
    for setting, reason in row.open.items():
        place, _, of_user = setting.partition(" ")
        named, _, level = place.partition("/")
        if named == isolation:
            reasons.setdefault((reason, bool(of_user)), []).append(level)
    for (reason, of_user), levels in reasons.items():
        where = " at " + ", ".join(levels) if levels != [""] else ""
        why = _WHY.get(reason, f"`{reason}`")
        whom = " to an ordinary user" if of_user and reason != "user" else ""
        yield f"**open**{whom}{where}: {why}"


if __name__ == "__main__":
    print(document())
