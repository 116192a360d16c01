"""volume ls, create, rm, inspect: a node's named volumes, and the mirrors of its s3 volumes."""

import asyncio

from schemas.commands import CreateVolume, RemoveVolume
from schemas.queries import VolumeEntry, VolumeState
from worker.cli.app import OK
from worker.cli.context import Context
from worker.cli.failures import exit_code, sentence
from worker.cli.human import age, now, size, stamp
from worker.cli.output import Cell, Column
from worker.cli.parser import Namespace, Parser
from worker.cli.style import clean
from worker.client import new_id
from worker.errors import ContractError

WORDS = {
    VolumeState.MIRRORING: "in use",
    VolumeState.WAITING: "not written back yet",
    VolumeState.WRITTEN_BACK: "written back",
}


def options_volume_ls(parser: Parser) -> None:
    parser.argument("-q", "--quiet", action="store_true", help="names only")


async def verb_volume_ls(context: Context, args: Namespace) -> int:
    async with context.fleet() as fleet:
        volumes = await fleet.volumes(await context.node(fleet))
    out = context.out
    if out.as_json:
        out.document(volumes)
        return OK
    if args.quiet:
        for volume in volumes:
            out.line(clean(volume.name))
        return OK
    at = now()
    columns = [Column("VOLUME", keep=True), Column("KIND"), Column("SIZE", right=True)]
    columns += [Column("CREATED"), Column("USED BY"), Column("STATE")]
    rows = [
        [
            clean(volume.name),
            clean(volume.kind),
            _size(volume),
            age(volume.created_at, at),
            clean(", ".join(volume.containers)) if volume.containers else Cell("-", "dim"),
            _state(volume),
        ]
        for volume in volumes
    ]
    out.table(
        columns, rows, empty="no volumes: a spec makes those that it names, or sandfleet volume create NAME"
    )
    return OK


def _size(volume: VolumeEntry) -> str:
    return size(volume.bytes) if volume.complete else f"> {size(volume.bytes)}"


def _state(volume: VolumeEntry) -> Cell:
    if volume.error:
        return Cell(clean(volume.error), "bad")
    if volume.state is None:
        return Cell("-", "dim")
    return Cell(clean(WORDS.get(volume.state, str(volume.state))), "")


def options_volume_create(parser: Parser) -> None:
    parser.argument("name", metavar="NAME", help="lower-case letters, digits and -")
    parser.argument(
        "--size",
        metavar="SIZE",
        help='how much it is to hold, such as "2Gi": remembered; see not_enforced in sandfleet info',
    )
    parser.details = "A volume that is there already is left as it is, unless another size is asked for."
    parser.example("sandfleet volume create data", "then: sandfleet run -v data:/data IMAGE")


async def verb_volume_create(context: Context, args: Namespace) -> int:
    command = CreateVolume(id=new_id(), name=args.name, size=args.size)
    async with context.fleet() as fleet:
        node = await context.node(fleet)
        async with context.out.busy(f"creating {args.name}"):
            done = await fleet.command(node, None, command, on_absent=context.tell_absent)
    if context.out.as_json:
        context.out.json_line(done)
    else:
        there = "" if (done.result or {}).get("created", True) else "  was there already"
        context.out.line(clean(f"{args.name}{there}"))
    return OK


def options_volume_rm(parser: Parser) -> None:
    parser.argument("names", metavar="NAME", nargs="+", complete="volume")
    parser.argument(
        "-f",
        "--force",
        action="store_true",
        help="also what an s3 volume's bucket has not got yet: it is lost",
    )
    parser.details = "Deletes all that is in it. One that a container uses, in whatever state, is refused."


async def verb_volume_rm(context: Context, args: Namespace) -> int:
    async with context.fleet() as fleet:
        node = await context.node(fleet)

        async def one(name: str) -> int:
            command = RemoveVolume(id=new_id(), name=name, force=args.force)
            try:
                done = await fleet.command(node, None, command, on_absent=context.tell_absent)
            except ContractError as failure:
                context.out.error(f"{name}: {sentence(failure)}")
                return exit_code(failure)
            if context.out.as_json:
                context.out.json_line(done)
            else:
                context.out.line(clean(name))
            return OK

        async with context.out.busy(f"removing {', '.join(args.names)}"):
            codes = await asyncio.gather(*(one(name) for name in dict.fromkeys(args.names)))
    return next((code for code in codes if code), OK)


def options_volume_inspect(parser: Parser) -> None:
    parser.argument("names", metavar="NAME", nargs="+", complete="volume")


async def verb_volume_inspect(context: Context, args: Namespace) -> int:
    code = OK
    async with context.fleet() as fleet:
        node = await context.node(fleet)
        for number, name in enumerate(dict.fromkeys(args.names)):
            try:
                found = await fleet.volumes(node, name)
            except ContractError as failure:
                context.out.error(sentence(failure))
                code = code or exit_code(failure)
                continue
            for volume in found:
                if context.out.as_json:
                    context.out.json_line(volume)
                    continue
                if number:
                    context.out.line()
                _describe(context, volume)
    return code


def _describe(context: Context, volume: VolumeEntry) -> None:
    out = context.out
    out.line(out.paint(clean(volume.name), "strong"))
    files = f"{volume.files} files" + ("" if volume.complete else ", at least")
    rows: list[tuple[str, Cell | str | None]] = [
        ("kind", volume.kind),
        ("mirrors", volume.source),
        ("target", volume.target),
        ("state", None if volume.state is None else WORDS.get(volume.state, str(volume.state))),
        ("error", volume.error and Cell(clean(volume.error), "bad")),
        ("size", f"{size(volume.bytes)} ({files})"),
        ("made for", size(volume.size_bytes) if volume.size_bytes is not None else None),
        ("created", stamp(volume.created_at)),
        ("used by", ", ".join(volume.containers) or "-"),
    ]
    rows += [("left alone", f"{path}: {why}") for path, why in (volume.notes or {}).items()]
    out.fields((name, clean(value) if isinstance(value, str) else value) for name, value in rows if value)
