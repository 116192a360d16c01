"""Bringing what a node gives in pieces into a file or to standard output."""

import os
import sys
from contextlib import aclosing
from pathlib import Path
from typing import BinaryIO

from worker.cli.app import OK
from worker.cli.context import Context
from worker.cli.human import size
from worker.cli.output import Busy
from worker.cli.parser import Namespace, Parser
from worker.cli.style import is_terminal
from worker.client_downloads import Download
from worker.errors import InvalidCommand, ResourceExhausted


def output_options(parser: Parser) -> None:
    parser.argument(
        "-o", "--output", metavar="FILE", complete="file", help="standard output when not given, or -"
    )


async def fetch_to(context: Context, args: Namespace, download: Download, doing: str) -> int:
    """The whole of it or, in a file, nothing. Tells of what is not as it was."""
    name = args.output or "-"
    if name == "-":
        if is_terminal(sys.stdout):
            raise InvalidCommand("an archive is nothing for a terminal: give -o FILE", field="--output")
        async with context.out.busy(doing) as busy:
            await _copy(download, sys.stdout.buffer, busy, doing)
            sys.stdout.buffer.flush()
    else:
        await _into_file(context, Path(name), download, doing)
    for note in download.notes:
        context.out.warning(note)
    if context.out.as_json and name != "-":
        context.out.document({"file": name, "bytes": download.total, "notes": download.notes})
    elif name != "-":
        context.out.line(f"{name}  {size(download.total)}")
    return OK


async def _into_file(context: Context, path: Path, download: Download, doing: str) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        async with context.out.busy(doing) as busy:
            with fresh.open("xb") as out:
                await _copy(download, out, busy, doing)
                out.flush()
                os.fsync(out.fileno())
            fresh.replace(path)
    except OSError as failure:
        raise ResourceExhausted(f"{path} cannot be written: {failure.strerror}") from failure
    finally:
        fresh.unlink(missing_ok=True)


async def _copy(download: Download, out: BinaryIO, busy: Busy, doing: str) -> None:
    done = 0
    async with aclosing(download.pieces()) as pieces:
        async for piece in pieces:
            out.write(piece)
            done += len(piece)
            busy.text = f"{doing}  {size(done)}"
