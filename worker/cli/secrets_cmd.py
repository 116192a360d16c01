"""secret set, ls, rm: files of mode 0600 in this node's secrets directory; `$S:name` in an env means one."""

import os
import sys
from pathlib import Path

from worker.cli.app import NOT_FOUND, OK
from worker.cli.context import Context
from worker.cli.parser import Namespace, Parser
from worker.cli.style import is_terminal
from worker.cli.worker_cmd import local_config, place_options
from worker.errors import Configuration, InvalidCommand, ResourceExhausted
from worker.secret_files import MAX_BYTES, NAME


def _options(parser: Parser) -> None:
    with parser.section("Where"):
        place_options(parser)


def options_secret_set(parser: Parser) -> None:
    parser.argument("name", metavar="NAME", complete="secret")
    _options(parser)
    parser.details = """
        The value is read from stdin, or asked for on a terminal without showing it; never from the arguments,
        where others could see it. A spec uses it as $S:NAME, once the node's [policy] secrets lists it.
    """
    parser.example("sandfleet secret set model-key < key.txt")


def verb_secret_set(context: Context, args: Namespace) -> int:
    name = check_secret_name(args.name)
    value = _value(name)
    folder = secrets_dir(context, args)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = folder / f".{name}.{os.getpid()}"
        descriptor = os.open(
            fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            with os.fdopen(descriptor, "wb") as out:
                out.write(value)
                out.flush()
                os.fsync(out.fileno())
            fresh.replace(folder / name)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
    except OSError as failure:
        raise ResourceExhausted(f"{folder / name} cannot be written: {failure.strerror}") from None
    context.out.line(name)
    return OK


def _value(name: str) -> bytes:
    if is_terminal(sys.stdin):
        from getpass import getpass

        value = getpass(f"Value of {name} (not shown): ").encode()
    else:
        value = sys.stdin.buffer.read(MAX_BYTES + 2)
    # A file's last newline is no part of the secret: it does not count, and is not given to a container.
    if len(value.removesuffix(b"\n")) > MAX_BYTES:
        raise InvalidCommand(f"a secret is at most {MAX_BYTES // 1024} KiB", field="value")
    if b"\0" in value:
        raise InvalidCommand("a secret must not hold a NUL: no variable can", field="value")
    if not value.removesuffix(b"\n"):
        raise InvalidCommand("the value is empty: nothing was stored", field="value")
    return value


def options_secret_ls(parser: Parser) -> None:
    _options(parser)


def verb_secret_ls(context: Context, args: Namespace) -> int:
    folder = secrets_dir(context, args)
    try:
        names = sorted(path.name for path in folder.iterdir() if NAME.fullmatch(path.name))
    except FileNotFoundError:
        names = []
    except OSError as failure:
        raise Configuration(f"{folder} cannot be read: {failure.strerror}") from None
    if context.out.as_json:
        context.out.document(names)
        return OK
    for name in names:
        context.out.line(name)
    if not names:
        context.out.note(f"no secrets in {folder}")
    return OK


def options_secret_rm(parser: Parser) -> None:
    parser.argument("names", metavar="NAME", nargs="+", complete="secret")
    _options(parser)


def verb_secret_rm(context: Context, args: Namespace) -> int:
    folder = secrets_dir(context, args)
    code = OK
    for name in args.names:
        try:
            (folder / check_secret_name(name)).unlink()
        except FileNotFoundError:
            context.out.error(f"there is no secret {name} in {folder}")
            code = NOT_FOUND
        except OSError as failure:
            raise Configuration(f"{folder / name} cannot be removed: {failure.strerror}") from None
        else:
            context.out.line(name)
    return code


def check_secret_name(name: str) -> str:
    if NAME.fullmatch(name) is None:
        raise InvalidCommand(f"{name[:80]!r} is no name of a secret: must match {NAME.pattern}", field="name")
    return name


def secrets_dir(context: Context, args: Namespace) -> Path:
    """The secrets of the worker that is meant: by flags and configuration, else those of a running `dev`."""
    return local_config(context, args).secrets_dir
