"""push: an image to a registry, from a node's store or from an archive here."""

import asyncio
import os
import tempfile
from pathlib import Path

import msgspec

from schemas.commands import PushImage
from schemas.events import ImagePhase, ImageProgress, LayerProgress
from worker.bus.messages import Message
from worker.cli.app import OK
from worker.cli.background import in_thread
from worker.cli.context import Context
from worker.cli.parser import Namespace, Parser
from worker.cli.pull_view import PullView
from worker.cli.style import clean
from worker.client import new_id
from worker.clock import utc_now
from worker.errors import InvalidCommand, PullFailed
from worker.images.archive import Archive, ArchivedImage
from worker.images.archive_load import open_archive
from worker.images.model import oci_platform
from worker.images.push import Parcel, Pushed, Reach, push
from worker.images.reference import parse_name
from worker.images.registry.credentials import Credentials, from_docker_config
from worker.images.registry.login import config_path
from worker.images.registry.reference import RegistryImage, registry_image
from worker.images.registry.stopping import StopSignal
from worker.images.registry.transport import tls_context
from worker.images.registry.upload import Outgoing
from worker.images.trees import remove_tree

_TELL_S = 0.25


def reach_options(parser: Parser) -> None:
    """How a registry is reached from this machine itself."""
    parser.argument(
        "--plain-http", action="store_true", help="to a registry without TLS; localhost needs no flag"
    )
    parser.argument(
        "--ca", metavar="FILE", complete="file", help="certificates to trust besides the system's"
    )


def options_push(parser: Parser) -> None:
    parser.argument("image", metavar="IMAGE", complete="image")
    parser.argument("--to", metavar="NAME", help="what to call it there; IMAGE when not given")
    parser.argument("--auth", metavar="NAME", help="the node's secret with the registry's credentials")
    with parser.section("From this machine"):
        parser.argument(
            "--archive",
            metavar="FILE",
            complete="file",
            help="push this archive as IMAGE, as you are logged in here; no node is needed",
        )
        reach_options(parser)
    parser.details = """
        The node sends it: its operator says under [policy] push what may go where, and which secret. Blobs that the
        registry has are not sent again, and what was cut goes on where it was.
    """
    parser.example("sandfleet push registry.lan/tools:1")
    parser.example("sandfleet push tools:1 --to ghcr.io/acme/tools:1 --auth ghcr")
    parser.example("sandfleet push --archive tools.tar ghcr.io/acme/tools:1", "after sandfleet login ghcr.io")


async def verb_push(context: Context, args: Namespace) -> int:
    target = args.to or args.image
    if args.archive:
        if args.to or args.auth:
            raise InvalidCommand(
                "an archive is pushed as IMAGE, by whoever is logged in here", field="--archive"
            )
        pushed = await _push_archive(context, args, target)
        _tell(context, target, pushed.digest, msgspec.to_builtins(pushed))
        return OK
    command = PushImage(id=new_id(), image=args.image, target=target, auth=args.auth)
    async with context.fleet() as fleet:
        node = await context.node(fleet)
        async with PullView(context.out, target, doing="pushing") as view:
            progress = await fleet.bus.subscribe(
                fleet.subjects.progress(node), lambda message: _show(view, message)
            )
            try:
                done = await fleet.command(node, None, command, on_absent=context.tell_absent)
            finally:
                await progress.stop()
    _tell(context, target, str((done.result or {}).get("digest")), msgspec.to_builtins(done))
    return OK


def _tell(context: Context, name: str, digest: str, document: object) -> None:
    if context.out.as_json:
        context.out.document(document)
    else:
        context.out.line(f"{clean(name)}  {digest}")


def _show(view: PullView, message: Message) -> None:
    try:
        view.show(msgspec.json.decode(message.data, type=ImageProgress))
    except msgspec.DecodeError:
        return  # not for us


async def _push_archive(context: Context, args: Namespace, target: str) -> Pushed:
    folder = _scratch()
    try:
        async with context.out.busy(f"reading {args.archive}"):
            image = await in_thread(lambda stop: _read(args.archive, folder, target, stop))
        for warning in image.plan.warnings:
            context.out.warning(warning)
        return await push_parcel(context, args, _parcel(image), target)
    finally:
        await in_thread(lambda stop: remove_tree(folder))


def _scratch() -> Path:
    return Path(os.path.realpath(tempfile.mkdtemp(prefix="sandfleet-push-")))


def _read(name: str, folder: Path, target: str, stop: StopSignal) -> ArchivedImage:
    with open_archive(Path(os.path.realpath(name))) as file:
        images = Archive.read(file, folder, stop.check).images(oci_platform())
    named = [image for image in images if target in image.names]
    if len(images) > 1 and not named:
        raise PullFailed(f"{name} has {len(images)} images, and none is called {target}", field="--archive")
    return (named or images)[0]


def _parcel(image: ArchivedImage) -> Parcel:
    plan = image.plan
    layers = {layer.digest: layer.size for layer in plan.manifest.layers}
    return Parcel(
        media_type=plan.manifest.media_type,
        manifest=Outgoing(
            digest=plan.document.digest, size=len(plan.document.content), content=plan.document.content
        ),
        blobs=(
            Outgoing(digest=plan.manifest.config.digest, size=len(plan.config), content=plan.config),
            *(Outgoing(digest=d, size=size, content=image.files[d]) for d, size in layers.items()),
        ),
    )


async def push_parcel(context: Context, args: Namespace, parcel: Parcel, name: str) -> Pushed:
    """From this machine, with the credentials of `sandfleet login` and `docker login`."""
    parse_name(name)
    image = registry_image(name)
    done = {blob.digest: 0 for blob in parcel.blobs}

    def work(stop: StopSignal) -> Pushed:
        reach = Reach(
            tls=tls_context(Path(args.ca) if args.ca else None),
            credentials=_credentials(context, image),
            plain=args.plain_http,
        )
        return push(parcel, image, reach, stop, done.__setitem__)

    async with PullView(context.out, name, doing="pushing") as view:
        watching = asyncio.create_task(_watch(view, name, parcel, done))
        try:
            return await in_thread(work)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


def _credentials(context: Context, image: RegistryImage) -> Credentials | None:
    path = config_path(context.env)
    return from_docker_config(path, image.host) if path.exists() else None


async def _watch(view: PullView, name: str, parcel: Parcel, done: dict[str, int]) -> None:
    while True:
        layers = tuple(
            LayerProgress(digest=blob.digest, bytes_done=done[blob.digest], bytes_total=blob.size)
            for blob in parcel.blobs
        )
        view.show(
            ImageProgress(
                node="",
                time=utc_now(),
                image=name,
                layers=len(layers),
                bytes_done=sum(layer.bytes_done for layer in layers),
                bytes_total=sum(layer.bytes_total for layer in layers),
                phase=ImagePhase.UPLOADING,
                by_layer=layers,
            )
        )
        await asyncio.sleep(_TELL_S)
