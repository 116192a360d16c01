"""node.json: whose data a directory holds. It binds the node's name, its journal's epoch and the machine."""

import os
import secrets
from pathlib import Path

import msgspec

from schemas.values import NODE
from worker.errors import Configuration
from worker.machine import default_node_name

NODE_FILE_VERSION = 1
TEMPORARY = ".new"
MADE = "made-"  # begins an id that we had to make up for a machine without one


class NodeFile(msgspec.Struct, kw_only=True):
    """`epoch` is None until the journal was made, `socket_dir` while the root's own path is short enough."""

    version: int = NODE_FILE_VERSION
    name: str
    machine_id: str
    epoch: str | None = None
    socket_dir: str | None = None


def bind_node(root: Path, node: str | None, machine: str | None, hostname: str, takeover: bool) -> NodeFile:
    """node.json as it is or as it is made now; Configuration when it binds the directory to someone else."""
    path = root / "node.json"
    known = read_node_file(path)
    if known is None:
        if (root / "worker.db").exists() and not takeover:
            raise Configuration(
                f"{root} holds a journal but no node.json: put it back, or start once with --takeover"
            )
        made = machine or MADE + secrets.token_hex(16)
        fresh = NodeFile(name=node or default_node_name(hostname, made.removeprefix(MADE)), machine_id=made)
        write_node_file(root, fresh)
        return fresh
    if node is not None and node != known.name and not takeover:
        raise Configuration(
            f"{root} belongs to node {known.name!r}, not to {node!r}: use another --data-dir,"
            f" or --node {known.name}, or rename it by starting once with --takeover"
        )
    # An id that we had to make ourselves says nothing about the machine it was made on.
    moved = machine is not None and known.machine_id != machine and not known.machine_id.startswith(MADE)
    if moved and not takeover:
        raise Configuration(
            f"{root} was made on another machine: use another --data-dir, or, if it was moved here for good"
            " and no worker uses the other copy, start once with --takeover"
        )
    bound = msgspec.structs.replace(known, name=node or known.name, machine_id=machine or known.machine_id)
    if bound != known:
        write_node_file(root, bound)
    return bound


def read_node_file(path: Path) -> NodeFile | None:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        found = msgspec.json.decode(raw, type=NodeFile)
    except msgspec.DecodeError as failure:
        raise Configuration(
            f"{path} cannot be understood ({failure}): put a good copy back, or delete it and start once with"
            " --takeover"
        ) from failure
    if found.version > NODE_FILE_VERSION:
        raise Configuration(f"{path} was written by a newer worker (version {found.version}): run that one")
    if not NODE.fullmatch(found.name):
        raise Configuration(f"{path} names no valid node: put a good copy back")
    return found


def write_node_file(root: Path, content: NodeFile) -> None:
    raw = msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
    replace_file(root / "node.json", raw)


def replace_file(path: Path, content: bytes) -> None:
    """Whole or not at all, also when the power fails."""
    fresh = path.with_name(path.name + TEMPORARY)
    write_new_file(fresh, content)
    fresh.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_new_file(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(os.dup(file), "wb") as stream:
            stream.write(content)
        os.fsync(file)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)
