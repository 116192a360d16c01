"""profile lint: what in a spec's grants cannot be meant."""

from pathlib import Path

import msgspec

from worker.cli.app import OK, REFUSED
from worker.cli.context import Context
from worker.cli.parser import Namespace, Parser
from worker.cli.profile_options import all_specs, place_of, place_options
from worker.cli.style import Style, clean
from worker.profile_lint import SEVERITIES, Finding, lint

_STYLES: dict[str, Style] = {"error": "bad", "warning": "warn", "note": "dim"}


def options_profile_lint(parser: Parser) -> None:
    parser.argument("spec", metavar="SPEC", complete="file", help="a spec's file, or one of several services")
    parser.argument("--strict", action="store_true", help="end with 4 also for warnings")
    place_options(parser)
    parser.example("sandfleet profile lint web.yaml")
    parser.example("sandfleet profile lint --platform darwin --strict --json shop.yaml")


def verb_profile_lint(context: Context, args: Namespace) -> int:
    """Without --service all services of the file are looked at."""
    out, place = context.out, place_of(args)
    services = all_specs(Path(args.spec), args.service)
    found = {
        name: lint(spec, msgspec.structs.replace(place, service=name)) for name, spec in services.items()
    }
    if out.as_json:
        out.document(
            [
                {"service": name, **msgspec.structs.asdict(one)}
                for name, findings in found.items()
                for one in findings
            ]
        )
    else:
        for name, findings in found.items():
            for one in findings:
                place_of_it = clean(f"{name}: {one.field}" if one.field else name)
                head = f"{out.paint(one.severity, _STYLES[one.severity])}  {place_of_it}"
                out.line(f"{head}  {out.paint(f'[{one.rule}]', 'dim')}")
                out.hanging("  ", clean(one.message))
        _sum_up(context, [one for findings in found.values() for one in findings])
    grave = {"error", "warning"} if args.strict else {"error"}
    return REFUSED if any(one.severity in grave for findings in found.values() for one in findings) else OK


def _sum_up(context: Context, findings: list[Finding]) -> None:
    counts = [(sum(one.severity == severity for one in findings), severity) for severity in SEVERITIES]
    said = [f"{count} {severity}{'s' if count > 1 else ''}" for count, severity in counts if count]
    context.out.note(", ".join(said) or "nothing to find fault with")
