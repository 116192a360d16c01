"""save and load: images as archives, to and from docker, podman, skopeo and apple/container."""

import os
from collections.abc import Iterator
from pathlib import Path

from schemas.commands import LoadImage
from schemas.queries import SaveRequest
from worker.cli.app import OK
from worker.cli.context import Context
from worker.cli.download import fetch_to, output_options
from worker.cli.parser import Namespace, Parser, absolute
from worker.cli.style import clean
from worker.client import new_id
from worker.client_downloads import Download
from worker.errors import Internal, ResourceExhausted
from worker.images.registry.stopping import StopSignal


def options_save(parser: Parser) -> None:
    parser.argument("images", metavar="IMAGE", nargs="+", complete="image")
    output_options(parser)
    parser.details = """
        The archive is an OCI image layout that docker, podman, skopeo and apple/container load, too. An image
        that was pulled or loaded is written as it came, with its digest; one that was registered is packed.
    """
    parser.example("sandfleet save tools:1 -o tools.tar")
    parser.example("sandfleet save tools:1 | ssh build1 docker load")


async def verb_save(context: Context, args: Namespace) -> int:
    async with context.fleet() as fleet:
        node = await context.node(fleet)
        images = list(dict.fromkeys(args.images))
        download = Download(
            fleet,
            node,
            "save",
            lambda session, offset, acked: SaveRequest(
                session=session, images=images, offset=offset, acked=acked
            ),
        )
        return await fetch_to(context, args, download, f"saving {', '.join(images)}")


def options_load(parser: Parser) -> None:
    parser.argument(
        "file",
        metavar="FILE",
        complete="file",
        type=absolute,
        help="on the node, below a register_roots of it",
    )
    parser.argument("--name", metavar="IMAGE", help="what to call the image, whatever the archive calls it")
    parser.details = "Reads OCI archives and what docker save writes, also compressed with gzip or zstd."
    parser.example("docker save web:1 -o web.tar && sandfleet load ./web.tar")


async def verb_load(context: Context, args: Namespace) -> int:
    command = LoadImage(id=new_id(), source_file=args.file, image=args.name)
    async with context.fleet() as fleet:
        node = await context.node(fleet)
        async with context.out.busy(f"loading {args.file}"):
            done = await fleet.command(node, None, command, on_absent=context.tell_absent)
    if context.out.as_json:
        context.out.document(done)
        return OK
    result = done.result or {}
    for warning in result.get("warnings", ()):
        context.out.warning(str(warning))
    for image in result.get("images", ()):
        context.out.line(f"{clean(str(image.get('image')))}  {image.get('digest')}")
    return OK


def write_file(path: Path, pieces: Iterator[bytes], stop: StopSignal) -> None:
    """All of it or nothing, in the place of what is there. Blocking; ResourceExhausted, Internal, CalledOff."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with fresh.open("xb") as out:
            for piece in pieces:
                stop.check()
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(path)
    except OSError as failure:
        raise ResourceExhausted(f"{path} cannot be written: {failure.strerror}") from failure
    except ValueError as failure:
        raise Internal(str(failure)) from failure
    finally:
        fresh.unlink(missing_ok=True)
