"""pack: an image made of a folder, for a node, a registry or a file."""

import json
import os
import re
import shlex
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schemas.commands import LoadImage
from worker.cli.app import OK
from worker.cli.archive_cmd import write_file
from worker.cli.background import in_thread
from worker.cli.context import Context
from worker.cli.human import size
from worker.cli.parser import Namespace, Parser, absolute, pair
from worker.cli.push_cmd import push_parcel, reach_options
from worker.cli.style import clean
from worker.client import new_id
from worker.errors import InvalidCommand, ResourceExhausted
from worker.images.archive_write import SavedBlob, SavedImage, archive_pieces
from worker.images.model import MANIFEST_TYPE, ImageConfig
from worker.images.pack import COMPRESSIONS, GZIP, Packed, PackOptions, pack
from worker.images.parcel import parcel_of
from worker.images.reference import parse_name
from worker.images.registry.stopping import StopSignal
from worker.images.trees import remove_tree

_LATEST_S = 253402300799


def options_pack(parser: Parser) -> None:
    parser.argument("directory", metavar="DIRECTORY", complete="dir", type=absolute)
    parser.argument("image", metavar="IMAGE", help="the image's name: tools:1, registry.lan/tools:1")
    with parser.section("Where it goes"):
        parser.argument(
            "-o", "--output", metavar="FILE", complete="file", help="an archive, instead of a node"
        )
        parser.argument("--push", action="store_true", help="to the registry of IMAGE, instead of a node")
        reach_options(parser)
    with parser.section("What it says"):
        parser.argument("--entrypoint", metavar="WORDS", type=words, help="as for a shell, or a JSON list")
        parser.argument(
            "--cmd", metavar="WORDS", type=words, help="arguments, or a command without entrypoint"
        )
        parser.argument("-e", "--env", metavar="NAME=VALUE", type=pair, action="append", default=[])
        parser.argument("-w", "--workdir", metavar="PATH")
        parser.argument("-u", "--user", metavar="USER")
        parser.argument("-l", "--label", metavar="NAME=VALUE", type=pair, action="append", default=[])
        parser.argument(
            "--expose", metavar="PORT", type=port, action="append", default=[], help="8080, 53/udp"
        )
        parser.argument("--stop-signal", metavar="SIGNAL")
        parser.argument(
            "--platform", metavar="OS/ARCH", type=platform, help="this machine's by default (darwin/arm64)"
        )
    with parser.section("How it is made"):
        parser.argument("--compress", choices=COMPRESSIONS, default=GZIP)
        parser.argument(
            "--keep-times", action="store_true", help="the files' own, which else are all the same"
        )
        parser.argument("--plain-modes", action="store_true", help="755 and 644, whatever the umask was")
        parser.argument(
            "--exclude", metavar="PATTERN", action="append", default=[], help="as in a .gitignore"
        )
        parser.argument("--no-ignore-file", action="store_true", help="pass over DIRECTORY/.sandfleetignore")
    parser.details = """
        Equal folders give equal images, with one digest, whoever packs them: owners, times and the order of files do
        not count. Links, hard links, extended attributes and code signatures go along; com.apple.quarantine, setuid
        bits and what .sandfleetignore names stay behind.

        Without --output and --push the image is loaded into the node, which must be on this machine and have
        the folder of DIRECTORY below its register_roots.
    """
    parser.setting(
        "SOURCE_DATE_EPOCH", "the time of every file and of the image, in seconds (0 when not set)"
    )
    parser.example("sandfleet pack ./toolchain tools:1 --entrypoint bin/clang")
    parser.example("sandfleet pack . registry.lan/app:2 --push --exclude .git")
    parser.example("sandfleet pack ./app app:1 -o app.tar", "docker load -i app.tar reads it, too")


async def verb_pack(context: Context, args: Namespace) -> int:
    parse_name(args.image)
    if args.output and args.push:
        raise InvalidCommand("give --output or --push", field="--push")
    folder = _scratch(args)
    try:
        options = _options(args, context.env, _inside(args.directory, folder, args.output))
        async with context.out.busy(f"packing {args.directory}"):
            packed = await in_thread(lambda stop: _pack(args.directory, folder, options, stop))
        for note in packed.notes:
            context.out.warning(note)
        saved = _saved(packed, args.image)
        if args.push:
            await push_parcel(context, args, parcel_of(saved), args.image)
        elif args.output:
            target = Path(args.output)
            await in_thread(lambda stop: write_file(target, archive_pieces([saved]), stop))
        else:
            await _load(context, args.image, folder, saved)
    finally:
        await in_thread(lambda stop: remove_tree(folder))
    _tell(context, args, packed)
    return OK


def _tell(context: Context, args: Namespace, packed: Packed) -> None:
    if context.out.as_json:
        context.out.document(
            {
                "image": args.image,
                "digest": packed.digest,
                "bytes": packed.bytes,
                "entries": packed.entries,
                "layers": [
                    {"digest": layer.digest, "bytes": layer.size, "media_type": layer.media_type}
                    for layer in packed.layers
                ],
                "notes": list(packed.notes),
            }
        )
        return
    context.out.line(f"{clean(args.image)}  {packed.digest}")
    sent = sum(layer.size for layer in packed.layers)
    count = len(packed.layers)
    layers = f"{count} layer{'s' if count > 1 else ''} of {size(sent)}"
    context.out.note(f"{packed.entries} entries, {size(packed.bytes)}, as {layers}")


def _scratch(args: Namespace) -> Path:
    """Where layers and archive are made: where the archive goes, or where the node may read it."""
    if args.push:
        parent = None
    elif args.output:
        parent = Path(args.output).absolute().parent
    else:
        parent = Path(os.path.realpath(args.directory)).parent
    try:
        return Path(os.path.realpath(tempfile.mkdtemp(prefix=".sandfleet-pack-", dir=parent)))
    except OSError as failure:
        where = parent or tempfile.gettempdir()
        raise ResourceExhausted(
            f"{where} cannot be written, and layers are made there: {failure.strerror} (see --output)"
        ) from failure


def _pack(directory: str, folder: Path, options: PackOptions, stop: StopSignal) -> Packed:
    # The folder itself may be reached through links; what is in it may not.
    return pack(Path(os.path.realpath(directory)), folder, options, check=stop.check)


def _saved(packed: Packed, name: str) -> SavedImage:
    return SavedImage(
        names=(name,),
        media_type=MANIFEST_TYPE,
        manifest=SavedBlob.of(packed.manifest),
        config=SavedBlob.of(packed.config),
        layers=tuple(
            SavedBlob(digest=layer.digest, size=layer.size, content=layer.path) for layer in packed.layers
        ),
    )


async def _load(context: Context, name: str, folder: Path, saved: SavedImage) -> None:
    archive = folder / "image.tar"
    async with context.fleet() as fleet:
        node = await context.node(fleet)
        await in_thread(lambda stop: write_file(archive, archive_pieces([saved]), stop))
        command = LoadImage(id=new_id(), source_file=str(archive), image=name)
        async with context.out.busy(f"loading {name}"):
            done = await fleet.command(node, None, command, on_absent=context.tell_absent)
    for warning in (done.result or {}).get("warnings", ()):
        context.out.warning(str(warning))


def _inside(directory: str, *paths: str | Path | None) -> list[str]:
    """Patterns for what is made in the folder itself while it is packed: that is no part of it."""
    top = os.path.realpath(directory)
    real = [os.path.realpath(path) for path in paths if path]
    found = [os.path.relpath(path, top) for path in real if path.startswith(top.rstrip("/") + "/")]
    return ["/" + re.sub(r"([\\*?\[!# ])", r"\\\1", path) for path in found]


def _options(args: Namespace, env: Mapping[str, str], inside: list[str]) -> PackOptions:
    config = ImageConfig(
        entrypoint=args.entrypoint,
        cmd=args.cmd,
        env=[f"{name}={value}" for name, value in args.env],
        working_dir=args.workdir,
        user=args.user,
        stop_signal=args.stop_signal,
        labels=dict(args.label),
        exposed_ports={one: {} for one in sorted(args.expose)},
    )
    return PackOptions(
        config=config,
        platform=args.platform,
        compression=args.compress,
        time_s=None if args.keep_times else source_date(env),
        plain_modes=args.plain_modes,
        exclude=(*args.exclude, *inside),
        ignore_file=not args.no_ignore_file,
    )


def source_date(env: Mapping[str, str]) -> int:
    """SOURCE_DATE_EPOCH (reproducible-builds.org), 0 when it is not set."""
    text = env.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return 0
    if not (text.isascii() and text.isdigit()) or int(text) > _LATEST_S:
        raise InvalidCommand(f"{text[:40]!r} is no time in seconds", field="SOURCE_DATE_EPOCH")
    return int(text)


def words(text: str) -> list[str]:
    """`prog -v "a b"`, or `["prog", "-v", "a b"]`."""
    try:
        found: Any = json.loads(text) if text.lstrip().startswith("[") else shlex.split(text)
    except ValueError as failure:
        raise ArgumentTypeError(f"{text!r} cannot be split into words: {failure}") from None
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found) or not found:
        raise ArgumentTypeError(f"{text!r} is no list of words")
    return found


def platform(text: str) -> tuple[str, str, str | None]:
    """`darwin/arm64`, `linux/arm/v7`."""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(
        part.isascii() and part.isalnum() and part.islower() for part in parts
    ):
        raise ArgumentTypeError(f"{text!r} is no platform: darwin/arm64, linux/amd64, linux/arm/v7")
    return parts[0], parts[1], parts[2] if len(parts) == 3 else None


def port(text: str) -> str:
    number, slash, protocol = text.partition("/")
    known = protocol in ("tcp", "udp", "sctp") if slash else True
    if not (number.isascii() and number.isdigit() and 0 < int(number) < 65536 and known):
        raise ArgumentTypeError(f"{text!r} is no port: 8080, 53/udp")
    return f"{int(number)}/{protocol or 'tcp'}"
