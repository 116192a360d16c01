"""From the words of `run` and `create` to specs: a file as it is, or one made of an image and the options."""

import re
from pathlib import Path
from typing import Any

from schemas.spec import ServiceSpec, decode_spec
from schemas.values import SERVICE, check_service
from worker.cli.parser import Namespace, UsageError
from worker.errors import InvalidSpec, NotFound

SUFFIXES = (".yaml", ".yml", ".json")


def specs_of(args: Namespace, *, verb: str) -> dict[str, ServiceSpec]:
    """The specs by service name. UsageError for options that do not belong together."""
    if is_file(args.source):
        return _from_file(args, verb)
    if args.service:
        raise UsageError("--service picks from a file; an image is named with --name", verb=verb)
    name = args.name or name_of_image(args.source)
    check_service(name, field="--name")
    return {name: decode_spec(spec_of_image(args))}


def is_file(source: str) -> bool:
    return source.lower().endswith(SUFFIXES) or Path(source).is_file()


def _from_file(args: Namespace, verb: str) -> dict[str, ServiceSpec]:
    from worker.specfile import load_specs

    given = [flag for flag in _image_options(args) if flag]
    if given:
        raise UsageError(f"{given[0]} goes with an image; a file says it itself", verb=verb)
    path = Path(args.source)
    try:
        deployment, services = load_specs(path, name=args.name)
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}") from None
    except OSError as failure:
        raise InvalidSpec(f"{path} cannot be read: {failure.strerror}") from None
    if args.service:
        if args.service not in services:
            raise NotFound(f"{path} has no service {args.service}; it has {', '.join(services) or 'none'}")
        services = {args.service: services[args.service]}
    if not services:
        raise InvalidSpec(f"{path} has no services")
    if args.name and deployment is not None:
        if len(services) > 1:
            raise UsageError(
                f"{path} has {len(services)} services, --name fits one: pick it with --service", verb=verb
            )
        services = {args.name: next(iter(services.values()))}
    return services


def _image_options(args: Namespace) -> list[str | None]:
    """The options in use that a file leaves no room for."""
    return [
        "-e" if args.env else None,
        "-v" if args.volume else None,
        "-p" if args.port else None,
        "--rm" if args.rm else None,
        "--memory" if args.memory else None,
        "--cpu-time" if args.cpu_time else None,
        "--network" if args.network else None,
        "--label" if args.label else None,
        "--pull" if args.pull else None,
        "--workdir" if args.workdir else None,
        "--entrypoint" if args.entrypoint else None,
        "a command" if args.command else None,
    ]


def spec_of_image(args: Namespace) -> dict[str, Any]:
    """A spec as a file would write it; `decode_spec` judges it."""
    spec: dict[str, Any] = {"image": {"name": args.source}}
    if args.pull:
        spec["image"]["pull_policy"] = args.pull
    command: dict[str, Any] = {}
    if args.entrypoint:
        command["entrypoint"] = [args.entrypoint]
    if args.command:
        command["args"] = list(args.command)
    if args.workdir:
        command["workdir"] = args.workdir
    resources: dict[str, Any] = {}
    if args.memory:
        resources["memory"] = args.memory
    if args.cpu_time is not None:
        resources["cpu_time_limit"] = args.cpu_time
    wanted = {
        "command": command,
        "env": dict(args.env),
        "resources": resources,
        "endpoints": [_endpoint(port) for port in args.port],
        "network": {"access": args.network} if args.network else {},
        "storage": [_storage(volume) for volume in args.volume],
        "lifecycle": {"delete_on_exit": True} if args.rm else {},
        "labels": dict(args.label),
    }
    return spec | {name: value for name, value in wanted.items() if value}


def _endpoint(port: int) -> dict[str, Any]:
    return {"name": f"port-{port}", "protocol": "tcp", "port": port}


def _storage(volume: str) -> dict[str, Any]:
    """`/host/dir:/target[:ro]` is a bind, `name:/target[:ro]` a named volume."""
    source, _, rest = volume.partition(":")
    target, _, mode = rest.partition(":")
    if not source or not target or mode not in ("", "ro", "rw"):
        raise UsageError(f"-v {volume} must be SOURCE:TARGET or SOURCE:TARGET:ro")
    kind: dict[str, Any]
    if source.startswith(("/", ".", "~")):
        kind = {"type": "bind", "source": str(Path(source).expanduser().absolute())}
    else:
        kind = {"type": "named", "name": source}
    return kind | {"target": target} | ({"readonly": True} if mode == "ro" else {})


def name_of_image(image: str) -> str:
    """`cache` of `ghcr.io/acme/cache:7`. InvalidSpec when no service name can be made of it."""
    last = image.partition("@")[0].rpartition("/")[2].partition(":")[0]
    name = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:63].rstrip("-")
    if SERVICE.fullmatch(name) is None:
        raise InvalidSpec(f"no service name can be made of {image}: give one with --name")
    return name
