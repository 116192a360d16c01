"""images, pull, register, tag, rmi, prune: a node's image store."""

import asyncio

import msgspec

from schemas.commands import AnyCommand, PruneImages, PullImage, RegisterImage, RemoveImage, TagImage
from schemas.events import CommandCompleted, ImageProgress
from schemas.spec import PullPolicy
from worker.bus.messages import Message
from worker.cli.app import OK
from worker.cli.context import Context
from worker.cli.failures import exit_code, sentence
from worker.cli.human import age, now, size
from worker.cli.output import Cell, Column
from worker.cli.parser import Namespace, Parser, absolute, byte_size, duration
from worker.cli.pull_view import PullView
from worker.cli.style import clean
from worker.client import FleetClient, new_id
from worker.errors import ContractError

SHORT_DIGEST = len("sha256:") + 12


def options_images(parser: Parser) -> None:
    parser.argument("-q", "--quiet", action="store_true", help="names only")


async def verb_images(context: Context, args: Namespace) -> int:
    async with context.fleet() as fleet:
        images = await fleet.images(await context.node(fleet))
    out = context.out
    if out.as_json:
        out.document(images)
        return OK
    if args.quiet:
        for image in images:
            out.line(clean(image.name))
        return OK
    at = now()
    columns = [Column("IMAGE"), Column("DIGEST"), Column("SIZE", right=True)]
    columns += [Column("CREATED", keep=True), Column("LAST USED"), Column("USED BY", right=True)]
    rows = [
        [
            image.name,
            Cell(image.digest[:SHORT_DIGEST], "dim"),
            size(image.bytes),
            age(image.created_at, at),
            age(image.last_used_at, at),
            str(image.containers) if image.containers else Cell("-", "dim"),
        ]
        for image in images
    ]
    out.table(columns, rows, empty="no images: make one with sandfleet register NAME DIRECTORY")
    return OK


def options_pull(parser: Parser) -> None:
    parser.argument("image", metavar="IMAGE")
    parser.argument(
        "--policy",
        choices=[str(policy) for policy in PullPolicy],
        default=str(PullPolicy.ALWAYS),
        metavar="POLICY",
        help="always (default), newer, if_not_present, never",
    )
    parser.argument("--auth", metavar="NAME", help="the node's secret with the registry's credentials")


async def verb_pull(context: Context, args: Namespace) -> int:
    command = PullImage(id=new_id(), image=args.image, policy=PullPolicy(args.policy), auth=args.auth)
    async with context.fleet() as fleet:
        node = await context.node(fleet)
        async with PullView(context.out, args.image) as view:
            progress = await fleet.bus.subscribe(
                fleet.subjects.progress(node), lambda message: _show_progress(view, message)
            )
            try:
                done = await fleet.command(node, None, command, on_absent=context.tell_absent)
            finally:
                await progress.stop()
    result = done.result or {}
    for warning in result.get("warnings", ()):
        context.out.warning(str(warning))
    digest = result.get("digest")
    _tell(context, done, f"{args.image}  {digest}" if digest else args.image)
    return OK


def _show_progress(view: PullView, message: Message) -> None:
    try:
        view.show(msgspec.json.decode(message.data, type=ImageProgress))
    except msgspec.DecodeError:
        return  # not for us


def options_register(parser: Parser) -> None:
    parser.argument("image", metavar="NAME", help="the image's name: demo, demo:2, localhost/web:1")
    parser.argument(
        "directory",
        metavar="DIRECTORY",
        complete="dir",
        type=absolute,
        help="on the node, below a register_roots of it",
    )
    parser.example("sandfleet register web:1 ./build")


async def verb_register(context: Context, args: Namespace) -> int:
    command = RegisterImage(id=new_id(), image=args.image, source_dir=args.directory)
    return await _node_command(context, command, f"registering {args.image}", args.image)


def options_tag(parser: Parser) -> None:
    parser.argument("source", metavar="IMAGE", complete="image")
    parser.argument("target", metavar="NEW_NAME")


async def verb_tag(context: Context, args: Namespace) -> int:
    command = TagImage(id=new_id(), source=args.source, target=args.target)
    return await _node_command(context, command, f"tagging {args.source}", args.target)


def options_rmi(parser: Parser) -> None:
    parser.argument("images", metavar="IMAGE", nargs="+", complete="image")
    parser.argument("-f", "--force", action="store_true", help="also while containers use it")


async def verb_rmi(context: Context, args: Namespace) -> int:
    async with context.fleet() as fleet:
        node = await context.node(fleet)

        async def one(image: str) -> int:
            command = RemoveImage(id=new_id(), image=image, force=args.force)
            try:
                done = await fleet.command(node, None, command, on_absent=context.tell_absent)
            except ContractError as failure:
                context.out.error(f"{image}: {sentence(failure)}")
                return exit_code(failure)
            _tell(context, done, image)
            return OK

        async with context.out.busy(f"removing {', '.join(args.images)}"):
            codes = await asyncio.gather(*(one(image) for image in dict.fromkeys(args.images)))
    return next((code for code in codes if code), OK)


def options_prune(parser: Parser) -> None:
    parser.details = (
        "Removes images that have neither a name nor a container, and all data that no image refers to. With the"
        " options named images go too, those that were not used for longest first. What a container was made from"
        " always stays."
    )
    parser.argument(
        "--older-than", type=duration, metavar="DURATION", help="also named images not used for so long (24h)"
    )
    parser.argument(
        "--keep",
        type=byte_size,
        metavar="SIZE",
        help="also named images, until the store is no larger (20Gi)",
    )


async def verb_prune(context: Context, args: Namespace) -> int:
    async with context.fleet() as fleet:
        node = await context.node(fleet)
        async with context.out.busy("removing unused images"):
            command = PruneImages(id=new_id(), older_than_s=args.older_than, keep_bytes=args.keep)
            done = await fleet.command(node, None, command, on_absent=context.tell_absent)
    result = done.result or {}
    _tell(context, done, f"{result.get('removed', 0)} removed, {size(result.get('bytes', 0))} freed")
    return OK


async def _node_command(context: Context, command: AnyCommand, doing: str, told: str) -> int:
    async with context.fleet() as fleet:
        done = await _send(context, fleet, command, doing)
    digest = (done.result or {}).get("digest")
    _tell(context, done, f"{told}  {digest}" if digest else told)
    return OK


async def _send(context: Context, fleet: FleetClient, command: AnyCommand, doing: str) -> CommandCompleted:
    node = await context.node(fleet)
    async with context.out.busy(doing):
        return await fleet.command(node, None, command, on_absent=context.tell_absent)


def _tell(context: Context, done: CommandCompleted, text: str) -> None:
    if context.out.as_json:
        context.out.json_line(done)
    else:
        context.out.line(clean(text))
