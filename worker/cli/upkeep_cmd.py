"""verify, images inspect, df: whether a node's images are sound, what they say, and what takes up its disk."""

from typing import Any

from schemas import queries as q
from schemas.commands import VerifyImages
from worker.cli.app import OK, REFUSED
from worker.cli.context import Context
from worker.cli.human import age, now, size
from worker.cli.output import Cell, Column
from worker.cli.parser import Namespace, Parser
from worker.cli.style import clean
from worker.client import new_id

SHORT_DIGEST = len("sha256:") + 12


def options_verify(parser: Parser) -> None:
    parser.details = (
        "Reads every byte of every image, which takes a while. What is damaged of an image from a registry is thrown"
        " away: the next pull fetches it again. The exit code is 4 when something is damaged and not repaired."
    )
    parser.argument("image", metavar="IMAGE", nargs="?", complete="image", help="only this one")
    parser.argument("--repair", action="store_true", help="pull what is damaged again, now")


async def verb_verify(context: Context, args: Namespace) -> int:
    command = VerifyImages(id=new_id(), image=args.image, repair=args.repair)
    async with context.fleet() as fleet:
        node = await context.node(fleet)
        async with context.out.busy("reading the images"):
            done = await fleet.command(node, None, command, on_absent=context.tell_absent)
    result = done.result or {}
    damaged: list[dict[str, Any]] = list(result.get("damaged", ()))
    broken = [one for one in damaged if not one.get("repaired")] or result.get("more", 0)
    if context.out.as_json:
        context.out.json_line(done)
        return REFUSED if broken else OK
    columns = [Column("IMAGE"), Column("PART"), Column("WHAT IS WRONG"), Column("NOW", keep=True)]
    rows: list[list[Cell | str]] = [
        [clean(one["image"]), clean(one["part"]), clean(one["reason"]), _outcome(one)] for one in damaged
    ]
    if rows:
        context.out.table(columns, rows, empty="")
    if result.get("more"):
        context.out.line(f"and {result['more']} more")
    what = f"{len(damaged)} parts damaged" if damaged else "all sound"
    context.out.line(f"{result.get('checked', 0)} images read, {what}")
    return REFUSED if broken else OK


def _outcome(damage: dict[str, Any]) -> Cell:
    if damage.get("repaired"):
        return Cell("pulled again", "good")
    error = damage.get("error")
    return Cell(f"not repaired: {clean(error)}" if error else "pull it again, or --repair", "bad")


def options_images_inspect(parser: Parser) -> None:
    parser.argument("images", metavar="IMAGE", nargs="+", complete="image")


async def verb_images_inspect(context: Context, args: Namespace) -> int:
    async with context.fleet() as fleet:
        node = await context.node(fleet)
        found = [
            await fleet.query(node, "image", q.ImageRequest(image=image), q.ImageReply)
            for image in dict.fromkeys(args.images)
        ]
    context.out.document(found if len(found) > 1 or context.out.as_json else found[0])
    return OK


def options_df(parser: Parser) -> None:
    parser.argument(
        "--refresh", action="store_true", help="count now, also what was counted in the last 30 s"
    )


DF_TIMEOUT_S = 120.0


async def verb_df(context: Context, args: Namespace) -> int:
    async with context.fleet() as fleet:
        node = await context.node(fleet)
        async with context.out.busy("counting"):
            found = await fleet.query(
                node, "df", q.DfRequest(refresh=args.refresh), q.DfReply, timeout_s=DF_TIMEOUT_S
            )
    out = context.out
    if out.as_json:
        out.document(found)
        return OK
    columns = [Column("WHAT"), Column("COUNT", right=True), Column("SIZE", right=True)]
    columns += [Column("RECLAIMABLE", right=True)]
    rows: list[list[Cell | str]] = [
        ["images", str(found.images.count), size(found.images.bytes), size(found.images.reclaimable)]
    ]
    for name in ("containers", "volumes", "logs"):
        one: q.DiskUse = getattr(found, name)
        rows.append([name, str(one.count), size(one.bytes), Cell("-", "dim")])
    out.table(columns, rows, empty="")
    out.line(
        f"{size(found.free)} free of {size(found.total)}; containers are cloned by {clean(found.clone)};"
        f" counted {age(found.measured_at, now())}"
    )
    return OK
