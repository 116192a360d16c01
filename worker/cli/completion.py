"""Shell completion: a script for each shell, and the answers to its questions.

The script calls `sandfleet --completing WORD…`: the words after the program's name, the last one unfinished.
Each answer is a line `VALUE<TAB>DESCRIPTION`; the line `:files` or `:dirs` leaves it to the shell.
"""

import asyncio
from collections.abc import Iterable

from worker.cli.app import BY_NAME, FAMILIES, OK, Verb, make_parser
from worker.cli.context import Context
from worker.cli.output import Output
from worker.cli.parser import Namespace, Parser

ASK_TIMEOUT_S = 1.5

BASH = """\
_sandfleet() {
    local IFS=$'\\n' line
    COMPREPLY=()
    while read -r line; do
        case "$line" in
            :files) COMPREPLY+=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}")); compopt -o filenames ;;
            :dirs) COMPREPLY+=($(compgen -d -- "${COMP_WORDS[COMP_CWORD]}")); compopt -o filenames ;;
            *) COMPREPLY+=("${line%%$'\\t'*}") ;;
        esac
    done < <(sandfleet --completing "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _sandfleet sandfleet
"""
ZSH = """\
#compdef sandfleet
_sandfleet() {
    local line; local -a described
    while IFS= read -r line; do
        case "$line" in
            :files) _files ;;
            :dirs) _files -/ ;;
            *) described+=("${${line%%$'\\t'*}//:/\\\\:}:${line#*$'\\t'}") ;;
        esac
    done < <(sandfleet --completing "${(@)words[2,CURRENT]}" 2>/dev/null)
    (( $#described )) && _describe 'sandfleet' described
}
compdef _sandfleet sandfleet
"""
FISH = """\
function __sandfleet
    set -l words (commandline -opc) (commandline -ct)
    for line in (sandfleet --completing $words[2..] 2>/dev/null)
        switch $line
            case ':files'
                __fish_complete_path (commandline -ct)
            case ':dirs'
                __fish_complete_directories (commandline -ct)
            case '*'
                echo $line
        end
    end
end
complete -c sandfleet -f -a '(__sandfleet)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def options_completion(parser: Parser) -> None:
    parser.argument("shell", metavar="SHELL", choices=list(SCRIPTS), help="bash, zsh or fish")
    parser.example("source <(sandfleet completion bash)", "in ~/.bashrc")
    parser.example("source <(sandfleet completion zsh)", "in ~/.zshrc, after compinit")
    parser.example("sandfleet completion fish > ~/.config/fish/completions/sandfleet.fish")


def verb_completion(context: Context, args: Namespace) -> int:
    context.out.line(SCRIPTS[args.shell].rstrip("\n"))
    return OK


def print_candidates(words: list[str]) -> int:
    """Answer a shell. Whatever goes wrong, it gets no candidates and no noise."""
    try:
        found = candidates(words or [""])
    except Exception:
        return OK
    for line in found:
        print(line)
    return OK


def candidates(words: list[str]) -> list[str]:
    """What may stand in place of the last word."""
    *before, last = words
    family = before[0] if before and before[0] in FAMILIES else None
    if family in BY_NAME and " ".join(before[:2]) not in BY_NAME:
        family = None  # `images` alone is a verb too
    if not before:
        heads = {name.partition(" ")[0]: _summary(name) for name in BY_NAME}
        heads |= {name: _summary(name) for name in BY_NAME.keys() & FAMILIES}
        return _matching(last, ((name, text) for name, text in heads.items()))
    if family is not None and len(before) == 1:
        subs = (
            (name.split(" ", 1)[1], verb.summary)
            for name, verb in BY_NAME.items()
            if name.startswith(family + " ")
        )
        return _matching(last, subs)
    name = " ".join(before[:2]) if family is not None else before[0]
    verb = BY_NAME.get(name)
    return [] if verb is None else _of_verb(verb, before[2 if family is not None else 1 :], last)


def _summary(name: str) -> str:
    verb = BY_NAME[name]
    if " " not in name:
        return verb.summary
    return ", ".join(
        other.split(" ", 1)[1] for other in BY_NAME if other.startswith(name.partition(" ")[0] + " ")
    )


def _of_verb(verb: Verb, before: list[str], last: str) -> list[str]:
    parser = make_parser(verb)
    flags = {
        flag: action
        for actions in parser.sections.values()
        for action in actions
        for flag in action.option_strings
    }
    pending = flags.get(before[-1]) if before else None
    if pending is not None and pending.nargs != 0:
        if pending.choices is not None:
            return _matching(last, ((str(choice), "") for choice in pending.choices))
        return _of_kind(parser.completes.get(pending.dest), last, before)
    if verb.tail:
        _, tail = parser.split_command([*before, last])
        if tail:
            return [":files"]
    if last.startswith("-"):
        return _matching(
            last, ((flag, action.help or "") for flag, action in flags.items() if flag not in before)
        )
    positionals = [action for action in parser.sections.get("Arguments", ()) if not action.option_strings]
    given = [word for word in _positional_words(parser, before)]
    for action in positionals:
        if action.nargs in ("*", "+") or not given:
            if action.choices is not None:
                return _matching(last, ((str(choice), "") for choice in action.choices))
            return _of_kind(parser.completes.get(action.dest), last, before)
        given = given[1:]
    return []


def _positional_words(parser: Parser, words: list[str]) -> list[str]:
    found, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word.startswith("-"):
            skip = parser.takes_next(word)
        else:
            found.append(word)
    return found


def _of_kind(kind: str | None, last: str, before: list[str]) -> list[str]:
    if kind == "file" or (kind == "target" and ("--platform" in before or "." in last or "/" in last)):
        return [":files"]
    if kind == "dir":
        return [":dirs"]
    if kind is None:
        return []
    found = asyncio.run(_ask(kind, before))
    extra = [":files"] if kind == "image" and ("/" in last or not last) else []
    return _matching(last, found) + extra


async def _ask(kind: str, before: list[str]) -> list[tuple[str, str]]:
    """Names out of the fleet, as long as it answers at once."""
    chosen = {flag: before[at + 1] for at, flag in enumerate(before[:-1]) if flag.startswith("--")}
    context = Context(
        Output(as_json=True),
        nats=chosen.get("--nats"),
        creds=chosen.get("--creds"),
        node=chosen.get("--node"),
    )
    if kind == "secret":
        from worker.cli.secrets_cmd import secrets_dir
        from worker.secret_files import NAME

        args = Namespace(data_dir=chosen.get("--data-dir"), config=chosen.get("--config"))
        return [(path.name, "") for path in secrets_dir(context, args).iterdir() if NAME.fullmatch(path.name)]
    async with asyncio.timeout(ASK_TIMEOUT_S), context.fleet() as fleet:
        present = [presence.node for presence in await fleet.nodes()]
        if kind == "node":
            return [(node, "") for node in present]
        nodes = [context.chosen_node] if context.chosen_node else present
        if kind == "image":
            listed = await asyncio.gather(*(fleet.images(node) for node in nodes))
            return sorted({(image.name, "image") for images in listed for image in images})
        if kind == "volume":
            kept = await asyncio.gather(*(fleet.volumes(node) for node in nodes))
            return sorted({(volume.name, volume.kind) for volumes in kept for volume in volumes})
        statuses = await asyncio.gather(*(fleet.containers(node) for node in nodes))
        return sorted((status.container, str(status.state)) for page in statuses for status in page)


def _matching(last: str, found: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{value}\t{text}" if text else value for value, text in found if value.startswith(last)]
