"""The verbs, as data, and the way from a command line to an exit code.

A verb's module is imported when the verb is used. It has `options_<verb>(parser)` and
`verb_<verb>(context, args)`, which may be a coroutine and returns an exit code or None.

Exit codes: 0; the container's own for `run --wait` and `exec` (128 + n for signal n); 2 usage; 3 not found;
4 refused or failed; 5 no answer; 130 Ctrl-C; 141 the reader of a pipe is gone.
"""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from worker.cli.parser import Parser, UsageError, page_width, two_columns, wrapped
from worker.cli.style import clean, colours, paint

OK, USAGE, NOT_FOUND, REFUSED, NO_ANSWER = 0, 2, 3, 4, 5
INTERRUPTED = 130
BROKEN_PIPE = 141


@dataclass(frozen=True, slots=True)
class Verb:
    """`connects`: it takes --nats, --creds and --node. `tail`: a command may follow its first word."""

    name: str
    module: str
    summary: str
    connects: bool = True
    json: bool = True
    tail: bool = False

    @property
    def function(self) -> str:
        return self.name.replace(" ", "_")


VERBS: dict[str, tuple[Verb, ...]] = {
    "Containers": (
        Verb("run", "run_cmd", "Create and start a container from a spec file or an image.", tail=True),
        Verb("create", "run_cmd", "Create a container without starting it.", tail=True),
        Verb("start", "lifecycle_cmd", "Start containers."),
        Verb("stop", "lifecycle_cmd", "Stop containers, with SIGKILL after the timeout."),
        Verb("kill", "lifecycle_cmd", "Send a signal to containers."),
        Verb("restart", "lifecycle_cmd", "Stop containers and start them again."),
        Verb("rm", "lifecycle_cmd", "Remove containers and all that is theirs."),
        Verb("wait", "lifecycle_cmd", "Wait until containers have ended and print their exit codes."),
        Verb("ps", "containers_cmd", "List containers."),
        Verb("inspect", "containers_cmd", "Show everything about containers."),
        Verb("logs", "logs_cmd", "Show or follow what a container wrote."),
        Verb("exec", "exec_cmd", "Run a command inside a running container's sandbox.", tail=True),
        Verb("export", "export_cmd", "Write a container's files as a tar archive."),
        Verb("stats", "stats_cmd", "Measure containers now."),
        Verb("top", "stats_cmd", "Watch containers live."),
        Verb("events", "events_cmd", "Show or follow the fleet's events."),
    ),
    "Images": (
        Verb("images", "images_cmd", "List a node's images."),
        Verb("pull", "images_cmd", "Fetch an image."),
        Verb("register", "images_cmd", "Make an image of a directory on the node."),
        Verb("pack", "pack_cmd", "Make an image of a directory here: for a node, a registry or a file."),
        Verb("push", "push_cmd", "Send an image to a registry."),
        Verb("save", "archive_cmd", "Write images as an archive that docker reads, too."),
        Verb("load", "archive_cmd", "Take in the images of an archive."),
        Verb("tag", "images_cmd", "Give an image a second name."),
        Verb("rmi", "images_cmd", "Remove images."),
        Verb("prune", "images_cmd", "Remove images that no container uses."),
        Verb("images inspect", "upkeep_cmd", "Show everything about images."),
        Verb("verify", "upkeep_cmd", "Check that images are as they were taken in."),
        Verb("df", "upkeep_cmd", "Show what takes up a node's disk."),
    ),
    "Volumes": (
        Verb("volume ls", "volumes_cmd", "List a node's volumes."),
        Verb("volume create", "volumes_cmd", "Make a named volume."),
        Verb("volume rm", "volumes_cmd", "Delete volumes and all that is in them."),
        Verb("volume inspect", "volumes_cmd", "Show everything about volumes."),
    ),
    "Nodes": (
        Verb("nodes", "nodes_cmd", "List the nodes that are there."),
        Verb("info", "nodes_cmd", "Describe a node: machine, sandbox, what it cannot enforce."),
        Verb("drain", "nodes_cmd", "Let a node finish: no new work."),
        Verb("resume", "nodes_cmd", "Let a drained node accept work again."),
    ),
    "Sandboxes": (
        Verb("profile show", "profile_cmd", "Show the sandbox of a container, or the one a spec would have."),
        Verb("profile check", "profile_cmd", "Ask whether a sandbox allows an operation, and what would."),
        Verb("profile diff", "profile_diff_cmd", "Compare what two sandboxes decide.", connects=False),
        Verb(
            "profile lint", "profile_lint_cmd", "Look for grants too broad, dead or at odds.", connects=False
        ),
    ),
    "This machine": (
        Verb("dev", "dev", "Run a server and a worker here, to try things out.", connects=False, json=False),
        Verb("worker", "worker_cmd", "Run this machine's worker.", connects=False, json=False),
        Verb("setup", "worker_cmd", "Create the streams that the fleet needs."),
        Verb("doctor", "doctor", "Check this machine, the server and the streams."),
        Verb("secret set", "secrets_cmd", "Store a secret of this node.", connects=False, json=False),
        Verb("secret ls", "secrets_cmd", "List the names of this node's secrets.", connects=False),
        Verb("login", "login_cmd", "Log in to a registry, as docker does.", connects=False),
        Verb("logout", "login_cmd", "Forget a registry's credentials.", connects=False),
        Verb("secret rm", "secrets_cmd", "Delete secrets of this node.", connects=False, json=False),
        Verb("journal backup", "journal_cmd", "Copy this node's journal into one file.", connects=False),
        Verb("schema export", "schema_cmd", "Write the wire contract as JSON Schema.", connects=False),
        Verb("completion", "completion", "Print a shell's completion script.", connects=False, json=False),
    ),
}
BY_NAME = {verb.name: verb for group in VERBS.values() for verb in group}
# What is about images may also be said after that word.
ALSO = {"images verify": "verify", "images prune": "prune"}
FAMILIES = {name.partition(" ")[0] for name in BY_NAME if " " in name}

# What may stand before the verb as well as after it.
COMMON_WITH_VALUE = ("--nats", "--creds", "--node")
COMMON_FLAGS = ("--json",)


def run(argv: list[str]) -> int:
    """Do what `argv` says; the exit code. With SANDFLEET_DEBUG a bug of ours shows its traceback."""
    try:
        code = _dispatch(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except UsageError as failure:
        _fail(failure.message + _help_hint(failure))
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return BROKEN_PIPE
    except Exception as failure:
        if os.environ.get("SANDFLEET_DEBUG"):
            raise
        _fail(f"a bug of ours: {type(failure).__name__}: {failure} (SANDFLEET_DEBUG=1 shows where)")
        return REFUSED


def _dispatch(argv: list[str]) -> int:
    if "--completing" in argv[:1]:
        from worker.cli.completion import print_candidates

        return print_candidates(argv[1:])
    common, rest = _leading(argv)
    if not rest or rest[0] in ("-h", "--help", "help"):
        return _print_help(rest[1:] if rest[:1] == ["help"] else [])
    if rest[0] in ("-V", "--version"):
        print(f"sandfleet {_version()}")
        return OK
    verb, rest = find_verb(rest)
    if _asks_help(verb, rest):
        print(make_parser(verb).page(colour=colours(sys.stdout)), end="")
        return OK
    args = make_parser(verb).read([*common, *rest])
    return _perform(verb, args)


def _perform(verb: Verb, args: Any) -> int:
    from worker.cli.context import Context
    from worker.cli.failures import exit_code, sentence
    from worker.errors import ContractError

    context = Context.of(args)
    try:
        result = getattr(_module(verb), f"verb_{verb.function}")(context, args)
        if inspect.iscoroutine(result):
            import asyncio

            try:
                result = asyncio.run(result)
            except asyncio.CancelledError:
                return INTERRUPTED
    except ContractError as failure:
        context.out.error(sentence(failure))
        return exit_code(failure)
    return OK if result is None else int(result)


def find_verb(words: list[str]) -> tuple[Verb, list[str]]:
    """The verb that `words` begins with, and what follows it."""
    spelt = ALSO.get(" ".join(words[:2]))
    name, rest = (spelt, words[2:]) if spelt else (words[0], words[1:])
    if name in FAMILIES and (name not in BY_NAME or " ".join([name, *rest[:1]]) in BY_NAME.keys() - {name}):
        choices = [verb.split(" ", 1)[1] for verb in BY_NAME if verb.startswith(f"{name} ")]
        if not rest or rest[0] not in choices:
            wrong = f", not {clean(rest[0])}" if rest and not rest[0].startswith("-") else ""
            raise UsageError(f"{name}: say {' or '.join(choices)}{wrong}")
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in BY_NAME:
        if name.startswith("-"):
            raise UsageError(f"unknown option {clean(name)}")
        near = difflib.get_close_matches(name, BY_NAME, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"there is no command {clean(name)}{hint}")
    return BY_NAME[name], rest


def make_parser(verb: Verb) -> Parser:
    parser = Parser(verb.name, verb.summary, command_tail=verb.tail)
    options: Callable[[Parser], None] = getattr(_module(verb), f"options_{verb.function}")
    options(parser)
    with parser.section("Common options"):
        if verb.connects:
            parser.argument("--nats", metavar="URL", help=f"server ({_shown('SANDFLEET_NATS_URL')})")
            parser.argument(
                "--creds",
                metavar="FILE",
                complete="file",
                help=f"credentials of the NATS user ({_shown('SANDFLEET_NATS_CREDS')})",
            )
            parser.argument(
                "--node",
                metavar="NAME",
                complete="node",
                help=f"may be left out while there is one node ({_shown('SANDFLEET_NODE')})",
            )
        if verb.json:
            parser.argument("--json", action="store_true", help="print JSON")
        parser.argument("-h", "--help", action="store_true", help="show this page")
    return parser


def _shown(variable: str) -> str:
    return f"or {variable}"


def _module(verb: Verb) -> Any:
    return importlib.import_module(f"worker.cli.{verb.module}")


def _leading(argv: list[str]) -> tuple[list[str], list[str]]:
    """Common options before the verb, and the rest."""
    at = 0
    while at < len(argv):
        if argv[at] in COMMON_WITH_VALUE:
            at += 2
        elif argv[at] in COMMON_FLAGS or argv[at].startswith(tuple(f"{flag}=" for flag in COMMON_WITH_VALUE)):
            at += 1
        else:
            break
    return argv[:at], argv[at:]


def _asks_help(verb: Verb, words: list[str]) -> bool:
    if verb.tail:
        words, _ = make_parser(verb).split_command(words)
    elif "--" in words:
        words = words[: words.index("--")]
    return "-h" in words or "--help" in words


def _print_help(words: list[str]) -> int:
    colour = colours(sys.stdout)
    if words:
        verb, _ = find_verb(words)
        print(make_parser(verb).page(colour=colour), end="")
    else:
        print(overview(colour=colour), end="")
    return OK


def overview(*, colour: bool) -> str:
    """The page of `sandfleet --help`."""
    width = page_width()
    lines = [f"{paint('Usage:', 'strong', colour)} sandfleet COMMAND [OPTIONS]", ""]
    about = "Native sandboxed processes on a fleet of machines, commanded and observed over NATS."
    lines += wrapped(about, width, "  ")
    for title, verbs in VERBS.items():
        lines += ["", paint(title, "strong", colour)]
        for verb in verbs:
            lines += two_columns(verb.name, verb.summary.rstrip("."), width, colour, column=18)
    lines += ["", paint("First steps", "strong", colour)]
    for line, meaning in (
        ("sandfleet dev", "a server and a worker, until Ctrl-C"),
        ("sandfleet COMMAND --help", "options and examples"),
        ("sandfleet completion bash", "how to get completion"),
    ):
        lines += [f"  {line.ljust(28)}{paint(meaning, 'dim', colour)}"]
    lines += ["", "  Exit codes: 0 done, 2 usage, 3 not found, 4 refused or failed, 5 no answer."]
    return "\n".join(lines) + "\n"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sandfleet")
    except PackageNotFoundError:
        return "0+source"


def _help_hint(failure: UsageError) -> str:
    topic = f"{failure.verb} " if failure.verb else ""
    return f" (see sandfleet {topic}--help)"


def _fail(message: str) -> None:
    head = paint("error:", "bad", colours(sys.stderr))
    print(f"{head} {clean(message)}", file=sys.stderr)


def _silence_stdout() -> None:
    """The reader is gone: nothing more may be written, not even by the interpreter's own last flush."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, sys.stdout.fileno())
    except (OSError, ValueError):
        return  # stdout is no descriptor, or closed: there is nothing to silence
    finally:
        os.close(devnull)
