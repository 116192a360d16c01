"""profile show and profile check: what a container's sandbox is, and whether it allows an operation."""

import json

from schemas.queries import CheckReply, CheckRequest, Decision, ProfileReply, ProfileRequest
from worker.cli.app import OK, REFUSED
from worker.cli.context import Context
from worker.cli.parser import Namespace, Parser
from worker.cli.style import Style, clean

DECISION_STYLE: dict[str, Style] = {Decision.ALLOW: "good", Decision.DENY: "bad"}


def options_profile_show(parser: Parser) -> None:
    parser.argument("container", metavar="CONTAINER", complete="container")
    parser.argument("--policy", action="store_true", help="the policy the text was made of, as JSON")
    parser.example("sandfleet profile show web-0")


async def verb_profile_show(context: Context, args: Namespace) -> int:
    out = context.out
    async with context.fleet() as fleet:
        target = await context.locate(fleet, args.container)
        request = ProfileRequest(container=target.cid)
        reply = await fleet.query(target.node, "profile", request, ProfileReply)
    if out.as_json:
        out.document(reply)
        return OK
    if args.policy:
        out.line(json.dumps(reply.policy, indent=2, ensure_ascii=False))
        return OK
    for line in reply.text.rstrip("\n").split("\n"):
        out.line(clean(line))
    if reply.params:
        out.line(out.paint("\nParameters", "strong"))
        out.fields(sorted(reply.params.items()))
    if reply.not_enforced:
        out.line(out.paint("\nNot enforced here", "warn"))
        for lack in reply.not_enforced:
            out.hanging("  ", clean(f"{lack.feature}: {lack.reason}"))
    return OK


def options_profile_check(parser: Parser) -> None:
    parser.argument("container", metavar="CONTAINER", complete="container")
    parser.argument(
        "operation", metavar="OPERATION", help="read, write, exec, connect, bind, lookup, gpu, or a raw one"
    )
    parser.argument("argument", metavar="ARGUMENT", nargs="?", help="a path, host:port, port or service")
    parser.example("sandfleet profile check web-0 read /etc/passwd")
    parser.example("sandfleet profile check web-0 connect 10.0.0.1:443")


async def verb_profile_check(context: Context, args: Namespace) -> int:
    out = context.out
    async with context.fleet() as fleet:
        target = await context.locate(fleet, args.container)
        request = CheckRequest(container=target.cid, operation=args.operation, argument=args.argument)
        reply = await fleet.query(target.node, "check", request, CheckReply)
    if out.as_json:
        out.document(reply)
    else:
        style = DECISION_STYLE.get(reply.decision, "warn")
        rule = f"  {clean(reply.rule)}" if reply.rule else ""
        out.line(out.paint(clean(reply.decision), style) + rule)
    return OK if reply.decision == "allow" else REFUSED
