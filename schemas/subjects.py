"""Every subject of the contract. Nothing else builds or parses one.

A subject is `<prefix>.<kind>.<node or pool>.…`. In the place of a container, `_` stands for the node itself.
Builders refuse a part that would change the shape of the subject, so that no name can become a wildcard.
"""

import re
from enum import StrEnum

import msgspec

from .errors import InvalidCommand
from .values import SERVICE, check_id, check_node, check_pool, check_service, shorten

DEFAULT_PREFIX = "sandfleet.v1"
NODE_ITSELF = "_"
MAX_REPLICA = 2**32 - 1
STREAMS = ("stdout", "stderr")
CONTAINER_EVENTS = ("state", "health", "command", "job")
NODE_EVENTS = ("node", "command", "image")
DIRECTIONS = ("in", "out")

_CID = re.compile(rf"({SERVICE.pattern})-(0|[1-9][0-9]{{0,9}})")
_VERB = re.compile(r"[a-z][a-z0-9_]{0,63}")
_PREFIX = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")


class Kind(StrEnum):
    COMMAND = "cmd"
    JOB = "job"
    EVENT = "evt"
    LOG = "log"
    STAT = "stat"
    PROGRESS = "progress"
    RPC = "rpc"
    EXEC = "exec"


class Parsed(msgspec.Struct, frozen=True):
    """What a subject names. Only the parts of its kind are set; `cid` null is the node itself."""

    kind: Kind
    node: str | None = None
    cid: str | None = None
    service: str | None = None
    replica: int | None = None
    verb: str | None = None
    event: str | None = None
    stream: str | None = None
    pool: str | None = None
    job_id: str | None = None
    session: str | None = None
    direction: str | None = None


def parse_cid(cid: str, *, field: str = "container") -> tuple[str, int]:
    """(service, replica) of a container name."""
    match = _CID.fullmatch(cid)
    if match is None or int(match[2]) > MAX_REPLICA:
        raise InvalidCommand(
            f"{shorten(cid)} is no container name: must be {{service}}-{{replica}}", field=field
        )
    return match[1], int(match[2])


def build_cid(service: str, replica: int, *, field: str = "service") -> str:
    check_service(service, field=field)
    if isinstance(replica, bool) or not 0 <= replica <= MAX_REPLICA:
        raise InvalidCommand(f"replica {replica} is not between 0 and {MAX_REPLICA}", field="replica")
    return f"{service}-{replica}"


class Subjects:
    def __init__(self, prefix: str = DEFAULT_PREFIX) -> None:
        if _PREFIX.fullmatch(prefix) is None:
            raise InvalidCommand(f"{shorten(prefix)} is no subject prefix", field="prefix")
        self.prefix = prefix
        self._lead = prefix + "."

    # -- one subject

    def command(self, node: str, cid: str | None, verb: str) -> str:
        return self._join("cmd", check_node(node), _container(cid), _check_verb(verb))

    def job(self, pool: str, job_id: str) -> str:
        return self._join("job", check_pool(pool), check_service(job_id, field="job_id"))

    def state(self, node: str, cid: str) -> str:
        return self._event(node, cid, "state")

    def health(self, node: str, cid: str) -> str:
        return self._event(node, cid, "health")

    def command_event(self, node: str, cid: str | None) -> str:
        return self._event(node, cid, "command")

    def job_event(self, node: str, cid: str) -> str:
        return self._event(node, cid, "job")

    def node_event(self, node: str) -> str:
        return self._event(node, None, "node")

    def image_event(self, node: str) -> str:
        return self._event(node, None, "image")

    def log(self, node: str, cid: str, stream: str) -> str:
        return self._join("log", check_node(node), _container(cid), _one_of(stream, STREAMS, "stream"))

    def stat(self, node: str, cid: str) -> str:
        return self._join("stat", check_node(node), _container(cid))

    def progress(self, node: str) -> str:
        return self._join("progress", check_node(node), "image")

    def rpc(self, node: str, verb: str) -> str:
        return self._join("rpc", check_node(node), _check_verb(verb))

    def exec_in(self, node: str, session: str) -> str:
        return self._join("exec", check_node(node), check_id(session, field="session"), "in")

    def exec_out(self, node: str, session: str) -> str:
        return self._join("exec", check_node(node), check_id(session, field="session"), "out")

    # -- many subjects; null is every node

    def commands_of(self, node: str | None = None) -> str:
        return self._all("cmd", node)

    def events_of(self, node: str | None = None) -> str:
        return self._all("evt", node)

    def container_events_of(self, node: str, cid: str | None) -> str:
        """Every event of one container, or of the node itself."""
        return self._join("evt", check_node(node), _container(cid), ">")

    def logs_of(self, node: str | None = None, cid: str | None = None) -> str:
        if node is None or cid is None:
            return self._all("log", node)
        return self._join("log", check_node(node), _container(cid), "*")

    def stats_of(self, node: str | None = None) -> str:
        return self._all("stat", node)

    def progress_of(self, node: str | None = None) -> str:
        return self._all("progress", node)

    def rpc_of(self, node: str) -> str:
        return self._join("rpc", check_node(node), "*")

    def exec_in_of(self, node: str) -> str:
        """What a node subscribes to for the frames of all its sessions."""
        return self._join("exec", check_node(node), "*", "in")

    def jobs_of(self, pool: str | None = None) -> str:
        return self._join("job", ">") if pool is None else self._join("job", check_pool(pool), "*")

    # -- and back

    def parse(self, subject: str) -> Parsed:
        """What `subject` names; InvalidCommand names the part that is wrong.

        Whether the verb exists, and is one for a container or for the node, is the decoder's business.
        """
        if not subject.startswith(self._lead):
            raise InvalidCommand(f"{shorten(subject)} is not below {self.prefix}", field="subject")
        kind, *parts = subject[len(self._lead) :].split(".")
        match kind, parts:
            case "cmd", [node, container, verb]:
                cid, service, replica = _parse_container(container)
                return Parsed(Kind.COMMAND, check_node(node), cid, service, replica, verb=_check_verb(verb))
            case "job", [pool, job_id]:
                return Parsed(Kind.JOB, pool=check_pool(pool), job_id=check_service(job_id, field="job_id"))
            case "evt", [node, container, event]:
                cid, service, replica = _parse_container(container)
                _one_of(event, NODE_EVENTS if cid is None else CONTAINER_EVENTS, "event")
                return Parsed(Kind.EVENT, check_node(node), cid, service, replica, event=event)
            case "log", [node, container, stream]:
                service, replica = parse_cid(container)
                _one_of(stream, STREAMS, "stream")
                return Parsed(Kind.LOG, check_node(node), container, service, replica, stream=stream)
            case "stat", [node, container]:
                service, replica = parse_cid(container)
                return Parsed(Kind.STAT, check_node(node), container, service, replica)
            case "progress", [node, "image"]:
                return Parsed(Kind.PROGRESS, check_node(node))
            case "rpc", [node, verb]:
                return Parsed(Kind.RPC, check_node(node), verb=_check_verb(verb))
            case "exec", [node, session, direction]:
                check_id(session, field="session")
                _one_of(direction, DIRECTIONS, "direction")
                return Parsed(Kind.EXEC, check_node(node), session=session, direction=direction)
        raise InvalidCommand(f"{shorten(subject)} has not the shape of any subject", field="subject")

    def _event(self, node: str, cid: str | None, event: str) -> str:
        return self._join("evt", check_node(node), _container(cid), event)

    def _all(self, kind: str, node: str | None) -> str:
        return self._join(kind, ">") if node is None else self._join(kind, check_node(node), ">")

    def _join(self, *parts: str) -> str:
        return self._lead + ".".join(parts)


def _container(cid: str | None) -> str:
    if cid is None:
        return NODE_ITSELF
    parse_cid(cid)
    return cid


def _parse_container(part: str) -> tuple[str | None, str | None, int | None]:
    if part == NODE_ITSELF:
        return None, None, None
    return part, *parse_cid(part)


def _check_verb(verb: str) -> str:
    if _VERB.fullmatch(verb) is None:
        raise InvalidCommand(f"{shorten(verb)} is no verb", field="verb")
    return verb


def _one_of(value: str, allowed: tuple[str, ...], what: str) -> str:
    if value not in allowed:
        raise InvalidCommand(f"{shorten(value)} is none of {' '.join(allowed)}", field=what)
    return value
