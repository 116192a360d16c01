"""profile show and profile check: what a sandbox is, and whether it allows an operation.

Of a container, asked of its node; or of a spec, worked out here for a node of either platform. Exit codes of
check: 0 allowed, 4 denied, 5 unknown.
"""

import json
from collections.abc import Coroutine
from typing import Any

import msgspec

from schemas.errors import InvalidCommand
from schemas.queries import CheckReply, CheckRequest, Decision, ProfileReply, ProfileRequest
from worker.cli.app import NO_ANSWER, OK, REFUSED
from worker.cli.context import Context
from worker.cli.output import Output
from worker.cli.parser import Namespace, Parser, UsageError
from worker.cli.profile_options import names_spec, place_of, place_options, run_batch, spec_of
from worker.cli.style import Style, clean
from worker.platform.base import Profile, SandboxPolicy
from worker.policy_words import in_words
from worker.profile_batch import answer_check, answer_show
from worker.profile_check import check, offline
from worker.profiles import Place, canonical_on, make, rules_of

DECISION_STYLE: dict[str, Style] = {Decision.ALLOW: "good", Decision.DENY: "bad"}
EXIT_CODES: dict[str, int] = {Decision.ALLOW: OK, Decision.DENY: REFUSED}

Verb = int | Coroutine[Any, Any, int]


def options_profile_show(parser: Parser) -> None:
    parser.argument(
        "target", metavar="TARGET", nargs="?", complete="target", help="a container, or a spec's file"
    )
    parser.argument("--policy", action="store_true", help="only the policy, as JSON")
    parser.argument("--text", action="store_true", help="only the profile's own text")
    parser.argument("--batch", action="store_true", help="a JSON object on each line of stdin")
    place_options(parser)
    parser.example("sandfleet profile show web-0", "a container's, from its node")
    parser.example("sandfleet profile show --platform darwin --macos 14 web.yaml")
    parser.example("sandfleet profile show --platform darwin --batch < specs.jsonl")


def verb_profile_show(context: Context, args: Namespace) -> Verb:
    if args.batch:
        if args.target is not None:
            raise UsageError("--batch reads specs from stdin, not from a file", verb="profile show")
        place = place_of(args)
        run_batch(context.out, lambda line: answer_show(line, place))
        return OK
    if args.target is None:
        raise UsageError("TARGET is missing", verb="profile show")
    if not names_spec(args):
        return _show_container(context, args)
    spec, place = spec_of(args, place_of(args))
    made = make(spec, place)
    if spec.resources.gpu is not None and not place.gpu_enabled:
        context.out.note("without its GPU; a node that lends none refuses this spec (resources.gpu)", "warn")
    _print(context.out, args, made.profile, _headline(place, made.policy))
    return OK


async def _show_container(context: Context, args: Namespace) -> int:
    async with context.fleet() as fleet:
        target = await context.locate(fleet, args.target)
        request = ProfileRequest(container=target.cid)
        reply = await fleet.query(target.node, "profile", request, ProfileReply)
    _print(context.out, args, msgspec.convert(reply, Profile, from_attributes=True), None)
    return OK


def _headline(place: Place, policy: SandboxPolicy) -> str:
    system = (
        f"macOS {place.macos}" if place.platform == "darwin" else f"Linux with Landlock ABI {place.landlock}"
    )
    return f"{policy.container} on {system}, isolation {policy.isolation}"


def _print(out: Output, args: Namespace, profile: Profile, headline: str | None) -> None:
    if out.as_json:
        out.document(profile)
        return
    if args.policy:
        out.line(json.dumps(profile.policy, indent=2, ensure_ascii=False))
        return
    if not args.text:
        _print_words(out, profile, headline)
    for line in profile.text.rstrip("\n").split("\n"):
        out.line(clean(line))
    if args.text:
        return
    if profile.params:
        out.line(out.paint("\nParameters", "strong"))
        out.fields((name, clean(value)) for name, value in sorted(profile.params.items()))
    if profile.not_enforced:
        out.line(out.paint("\nNot enforced here", "warn"))
        for lack in profile.not_enforced:
            out.hanging("  ", clean(f"{lack.feature}: {lack.reason}"))


def _print_words(out: Output, profile: Profile, headline: str | None) -> None:
    """A node that is newer than this program may send a policy that is not understood: then only its text."""
    try:
        policy = msgspec.convert(profile.policy, SandboxPolicy)
    except msgspec.ValidationError:
        return
    if headline is not None:
        out.line(out.paint(clean(headline), "strong"))
    for heading, rows in in_words(policy):
        out.line(out.paint(f"\n{heading}", "strong"))
        out.fields((f"  {clean(name)}", clean(text)) for name, text in rows)
    out.line(out.paint(f"\nProfile ({clean(profile.language)})", "strong"))


def options_profile_check(parser: Parser) -> None:
    parser.argument(
        "target", metavar="TARGET", nargs="?", complete="target", help="a container, or a spec's file"
    )
    parser.argument(
        "operation",
        metavar="OPERATION",
        nargs="?",
        help="read, write, exec, connect, bind, lookup, gpu, or one of the platform's own",
    )
    parser.argument(
        "argument", metavar="ARGUMENT", nargs="?", help="a path, host:port, port or service; or a JSON object"
    )
    parser.argument("--batch", action="store_true", help="a JSON object on each line of stdin")
    place_options(parser)
    parser.example("sandfleet profile check web-0 read /etc/passwd", "of a container's node")
    parser.example("sandfleet profile check web-0 connect 10.0.0.1:443")
    parser.example("sandfleet profile check --platform darwin web.yaml lookup com.apple.trustd")
    parser.example("sandfleet profile check --batch < questions.jsonl")


def verb_profile_check(context: Context, args: Namespace) -> Verb:
    if args.batch:
        return _check_batch(context, args)
    if args.target is None or args.operation is None:
        missing = "TARGET" if args.target is None else "OPERATION"
        raise UsageError(f"{missing} is missing", verb="profile check")
    if not names_spec(args):
        return _check_container(context, args)
    spec, place = spec_of(args, place_of(args))
    reply = check(
        spec,
        offline(place),
        args.operation,
        args.argument,
        canonical=canonical_on(place.platform),
        groups=rules_of(place).groups(),
    )
    return _told(context.out, reply)


async def _check_container(context: Context, args: Namespace) -> int:
    async with context.fleet() as fleet:
        target = await context.locate(fleet, args.target)
        request = CheckRequest(container=target.cid, operation=args.operation, argument=args.argument)
        reply = await fleet.query(target.node, "check", request, CheckReply)
    return _told(context.out, reply)


def _check_batch(context: Context, args: Namespace) -> int:
    if args.operation is not None:
        raise UsageError("--batch reads the questions from stdin", verb="profile check")
    place = place_of(args)
    sandbox = None
    if args.target is not None:
        if not names_spec(args):
            raise InvalidCommand(
                f"{args.target} is no spec's file: a batch asks profiles and specs", field="TARGET"
            )
        spec, place = spec_of(args, place)
        attempts = offline(place)
        sandbox = attempts.open(attempts.profile(spec))
    canonical = canonical_on(place.platform)
    run_batch(context.out, lambda line: answer_check(line, sandbox, canonical))
    return OK


def _told(out: Output, reply: CheckReply) -> int:
    code = EXIT_CODES.get(reply.decision, NO_ANSWER)
    if out.as_json:
        out.document(reply)
        return code
    rule = f"  {clean(reply.rule)}" if reply.rule else ""
    out.line(out.paint(clean(reply.decision), DECISION_STYLE.get(reply.decision, "warn")) + rule)
    where = "" if reply.line is None else f"line {reply.line}: "
    if reply.reason:
        out.hanging("  ", clean(where + reply.reason))
    for remedy in reply.would_allow or ():
        out.hanging("  ", clean(f"would allow it: {remedy}"))
    if reply.would_allow is not None and not reply.would_allow:
        out.hanging("  ", "no single change of the spec that was tried would allow it")
    return code
