"""login and logout: a registry's credentials in Docker's config file or its helpers."""

import sys
from pathlib import Path

from worker.cli.app import OK
from worker.cli.background import in_thread
from worker.cli.context import Context
from worker.cli.parser import Namespace, Parser
from worker.cli.push_cmd import reach_options
from worker.cli.style import is_terminal
from worker.errors import InvalidCommand
from worker.images.registry.addresses import is_loopback_name
from worker.images.registry.channel import Dialer
from worker.images.registry.credentials import Credentials
from worker.images.registry.login import check_login, config_path, erase, registry_host, store
from worker.images.registry.patience import Patience
from worker.images.registry.reference import registry_image
from worker.images.registry.stopping import StopSignal
from worker.images.registry.transport import Http, tls_context

MAX_SECRET = 64 * 1024


def options_login(parser: Parser) -> None:
    parser.argument("registry", metavar="REGISTRY", nargs="?", default="", help="Docker Hub when not given")
    parser.argument("-u", "--username", metavar="NAME", help="asked for when not given")
    parser.argument("--password-stdin", action="store_true", help="read the password or token from stdin")
    reach_options(parser)
    parser.details = """
        The password is read from stdin, or asked for on a terminal without showing it; never from the arguments,
        where others could see it. The registry is asked first whether it is right. It is kept where docker keeps
        it: by the helper that config.json names (credsStore, credHelpers), else in that file, which only you can
        read. `push --archive` and `pack --push` use it; a node has its own (images.docker_config, or secrets).
    """
    parser.setting("DOCKER_CONFIG", "the folder of config.json (~/.docker when not set)")
    parser.example("sandfleet login ghcr.io -u me --password-stdin < token.txt")


async def verb_login(context: Context, args: Namespace) -> int:
    host = registry_host(args.registry)
    credentials = Credentials(_username(args), _password(args, host))
    path = config_path(context.env)

    def work(stop: StopSignal) -> tuple[bool, str]:
        patience = Patience()
        dialer = Dialer(tls_context(Path(args.ca) if args.ca else None), patience, stop, private=True)
        image = registry_image(f"{host}/x/x")
        plain = args.plain_http or is_loopback_name(image.hostname)
        http = Http(dialer, plain=plain, agent="sandfleet")
        try:
            asked = check_login(http, host, f"{'http' if plain else 'https'}://{image.endpoint}", credentials)
        finally:
            http.close()
        return asked, store(path, host, credentials)

    async with context.out.busy(f"logging in to {host}"):
        asked, where = await in_thread(work)
    if not asked:
        context.out.warning(f"{host} asked for no credentials, so they could not be checked")
    if context.out.as_json:
        context.out.document({"registry": host, "username": credentials.username, "kept_in": where})
    else:
        context.out.line(f"{host}  {credentials.username}")
        context.out.note(f"kept in {where}")
    return OK


def _username(args: Namespace) -> str:
    name = args.username
    if name is None:
        if args.password_stdin or not is_terminal(sys.stdin):
            raise InvalidCommand("is missing", field="--username")
        name = input("Username: ").strip()
    if not name or ":" in name or not name.isprintable():
        raise InvalidCommand("must not be empty and has no colon", field="--username")
    return str(name)


def _password(args: Namespace, host: str) -> str:
    if not args.password_stdin and is_terminal(sys.stdin):
        from getpass import getpass

        text = getpass(f"Password or token for {host} (not shown): ")
    else:
        text = sys.stdin.buffer.read(MAX_SECRET + 1).decode("utf-8", "surrogateescape").rstrip("\r\n")
    if not text or len(text) > MAX_SECRET or not text.isprintable():
        raise InvalidCommand("the password is empty, too long or holds control characters", field="password")
    return text


def options_logout(parser: Parser) -> None:
    parser.argument("registry", metavar="REGISTRY", nargs="?", default="", help="Docker Hub when not given")
    parser.setting("DOCKER_CONFIG", "the folder of config.json (~/.docker when not set)")


async def verb_logout(context: Context, args: Namespace) -> int:
    host = registry_host(args.registry)
    path = config_path(context.env)
    known = await in_thread(lambda stop: erase(path, host))
    if not known:
        context.out.note(f"there were no credentials for {host}")
    if context.out.as_json:
        context.out.document({"registry": host, "removed": known})
    elif known:
        context.out.line(host)
    return OK
