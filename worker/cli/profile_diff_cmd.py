"""profile diff: what two sandboxes decide differently."""

from pathlib import Path

import msgspec

from schemas.errors import InvalidSpec
from worker.answers import sandbox_of
from worker.cli.app import OK, REFUSED
from worker.cli.context import Context
from worker.cli.output import Cell, Column
from worker.cli.parser import Namespace, Parser, whole
from worker.cli.profile_options import pick, place_of, place_options, saved_profile
from worker.cli.style import Style
from worker.platform.base import Profile, SandboxPolicy
from worker.platform.darwin.describe import NEWEST_RELEASE, OLDEST_RELEASE
from worker.profile_diff import Side, as_row, differences
from worker.profiles import PLATFORMS, Place, make
from worker.questions import spoken

_STYLES: dict[str, Style] = {"allow": "good", "deny": "bad"}


def options_profile_diff(parser: Parser) -> None:
    for name in ("A", "B"):
        parser.argument(
            name.lower(),
            metavar=name,
            complete="file",
            help="a spec's file, FILE:SERVICE, or what profile show --json wrote",
        )
    parser.argument("--exit-code", action="store_true", help="end with 4 when anything differs")
    parser.argument("--b-platform", choices=PLATFORMS, help="for B (default: as for A)")
    parser.argument(
        "--b-macos",
        metavar="RELEASE",
        type=whole(OLDEST_RELEASE, NEWEST_RELEASE),
        help="for B (default: as for A)",
    )
    place_options(parser)
    parser.example("sandfleet profile diff --platform darwin web.yaml web-new.yaml")
    parser.example("sandfleet profile diff --platform linux shop.yaml:web shop.yaml:worker")
    parser.example("sandfleet profile diff --platform darwin --b-macos 12 web.yaml web.yaml")


def verb_profile_diff(context: Context, args: Namespace) -> int:
    out = context.out
    first = place_of(args)
    changes = {"platform": args.b_platform, "macos": args.b_macos}
    second = msgspec.structs.replace(first, **{name: value for name, value in changes.items() if value})
    # Both under one name: where a container's own folder lies is no difference.
    found = differences(_side(args.a, args.service, first), _side(args.b, args.service, second))
    if out.as_json:
        out.document([as_row(one) for one in found])
    else:
        rows = [
            [
                Cell(spoken(one.question)),
                Cell(one.one.decision, _STYLES.get(one.one.decision, "warn")),
                Cell(one.other.decision, _STYLES.get(one.other.decision, "warn")),
            ]
            for one in found
        ]
        columns = [Column("QUESTION"), Column("A", keep=True), Column("B", keep=True)]
        out.table(columns, rows, empty="both decide the same")
    return REFUSED if found and args.exit_code else OK


def _side(target: str, service: str | None, place: Place) -> Side:
    path = Path(target)
    saved = saved_profile(path)
    if saved is not None:
        return _saved(path, saved)
    if not path.exists() and ":" in target:
        name, _, service = target.rpartition(":")
        path = Path(name)
    _, spec = pick(path, service)
    made = make(spec, place)
    return Side(made.profile.language, made.policy, sandbox_of(made.profile, release=place.macos))


def _saved(path: Path, profile: Profile) -> Side:
    try:
        policy = msgspec.convert(profile.policy, SandboxPolicy)
        return Side(profile.language, policy, sandbox_of(profile))
    except (msgspec.ValidationError, KeyError, ValueError) as failure:
        raise InvalidSpec(f"{path} is no profile that this program can read: {failure}") from None
