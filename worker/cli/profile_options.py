"""What the profile verbs share: the options that say for which node, and the specs and profiles that files hold."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from schemas.errors import InvalidCommand, InvalidSpec
from schemas.spec import ServiceSpec
from schemas.strict import strict_json, to_struct
from schemas.subjects import MAX_REPLICA
from worker.cli.output import Output
from worker.cli.parser import Namespace, Parser, whole
from worker.cli.specs import is_file
from worker.errors import NotFound
from worker.platform.base import Profile
from worker.platform.darwin.describe import NEWEST_RELEASE, OLDEST_RELEASE
from worker.profile_batch import MAX_LINE_BYTES, Answering, too_long
from worker.profiles import NEWEST_LANDLOCK, PLATFORMS, Place, Platform
from worker.specfile import load_specs

_CHUNK = 64 * 1024


def place_options(parser: Parser) -> None:
    """Options that say where a spec is thought to run."""
    with parser.section("The node, for a spec"):
        parser.argument(
            "--platform", choices=PLATFORMS, help="darwin or linux, whatever this machine is (default: it)"
        )
        parser.argument(
            "--macos",
            metavar="RELEASE",
            type=whole(OLDEST_RELEASE, NEWEST_RELEASE),
            help=f"{OLDEST_RELEASE} to {NEWEST_RELEASE} (default {NEWEST_RELEASE})",
        )
        parser.argument(
            "--landlock",
            metavar="ABI",
            type=whole(0, NEWEST_LANDLOCK),
            help=f"of the Linux kernel; 0 has none (default {NEWEST_LANDLOCK})",
        )
        parser.argument("--data-dir", metavar="DIR", help=f"default {Place().data_dir}")
        parser.argument("--service", metavar="NAME", help="of a file with several, and of the container")
        parser.argument("--replica", metavar="N", type=whole(0, MAX_REPLICA), help="default 0")
        parser.argument("--port", metavar="PORT", type=whole(1, 65535), help="assigned to the container")
        parser.argument("--no-gpu", action="store_true", help="leave out what resources.gpu asks for")
        parser.argument("--api-socket", metavar="PATH", help="of the node's host API")
        parser.argument(
            "--rootfs", metavar="DIR", dest="rootfs_dir", help="default: below the data directory"
        )
        parser.argument("--instance", metavar="ULID", help="default: all zeros")
        parser.argument(
            "--nats-port",
            metavar="PORT",
            dest="nats_ports",
            type=whole(1, 65535),
            action="append",
            help="of the node's NATS server, may be repeated (default 4222)",
        )


def place_of(args: Namespace) -> Place:
    given = {
        name: getattr(args, name)
        for name in (
            "macos", "landlock", "data_dir", "service", "replica", "port", "api_socket", "rootfs_dir", "instance",
        )
        if getattr(args, name) is not None
    }  # fmt: skip
    if args.nats_ports:
        given["nats_ports"] = tuple(args.nats_ports)
    return Place(platform=args.platform or this_platform(), gpu_enabled=not args.no_gpu, **given)


def this_platform() -> Platform:
    return "darwin" if os.uname().sysname == "Darwin" else "linux"


def names_spec(args: Namespace) -> bool:
    """Whether the verb's target is a spec's file rather than a container."""
    return args.target is not None and (args.platform is not None or is_file(args.target))


def spec_of(args: Namespace, place: Place) -> tuple[ServiceSpec, Place]:
    """The spec that the target names, and the place with its service."""
    service, spec = pick(Path(args.target), args.service)
    return spec, msgspec.structs.replace(place, service=service)


def pick(path: Path, service: str | None) -> tuple[str, ServiceSpec]:
    """(name, spec) of a file: the one service that it has, or the one that is meant."""
    services = all_specs(path, service)
    if len(services) > 1:
        raise InvalidCommand(f"{path} has {', '.join(services)}: pick one with --service", field="--service")
    return next(iter(services.items()))


def all_specs(path: Path, service: str | None) -> dict[str, ServiceSpec]:
    """The services of a file, or the one that is meant. NotFound, InvalidSpec."""
    try:
        deployment, services = load_specs(path)
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}") from None
    except OSError as failure:
        raise InvalidSpec(f"{path} cannot be read: {failure.strerror}") from None
    if deployment is None and service is not None:
        return {service: next(iter(services.values()))}
    if service is not None:
        if service not in services:
            raise NotFound(f"{path} has no service {service}; it has {', '.join(services) or 'none'}")
        return {service: services[service]}
    if not services:
        raise InvalidSpec(f"{path} has no services")
    return services


def saved_profile(path: Path) -> Profile | None:
    """What `profile show --json` wrote to a file, None when it holds something else."""
    if path.suffix.lower() != ".json":
        return None
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_LINE_BYTES + 1)
    except OSError:
        return None  # whoever reads it as a spec tells
    value = strict_json(raw, MAX_LINE_BYTES, error=InvalidSpec)
    if not isinstance(value, dict) or not {"language", "text"} <= value.keys():
        return None
    return to_struct(value, Profile, error=InvalidSpec)


# -- batches


def run_batch(out: Output, answer: Answering) -> None:
    """Answer each line of stdin. What has arrived is answered before more is waited for."""
    # Answers are trees and die by themselves: looking for cycles took a fifth of the time, measured.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    for lines in arriving(sys.stdin.buffer, MAX_LINE_BYTES):
        answers = [too_long(MAX_LINE_BYTES) if line is None else answer(line) for line in lines]
        if answers:
            out.raw(b"\n".join(answers) + b"\n")


def arriving(stream: BinaryIO, limit: int) -> Iterator[list[bytes | None]]:
    """The lines of a stream as they come, None for one that is longer than `limit` and was not kept."""
    pending = bytearray()
    skipping = False
    read = getattr(stream, "read1", stream.read)
    while chunk := read(_CHUNK):
        *whole_lines, rest = chunk.split(b"\n")
        lines: list[bytes | None] = []
        for piece in whole_lines:
            line = bytes(pending) + piece if pending else piece
            lines.append(None if skipping or len(line) > limit else line)
            pending.clear()
            skipping = False
        pending += rest
        if len(pending) > limit:
            pending.clear()
            skipping = True
        yield lines
    if pending or skipping:
        yield [None if skipping else bytes(pending)]
