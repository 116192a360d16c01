"""The contract's "Permissions of a node's NATS user" as data: tests give a worker exactly these, and the
examples in `deploy/nats/` are written from them (`python -m worker.bus.permissions NODE [POOL …]`).
"""

import sys

import msgspec

from schemas.subjects import Subjects
from worker.bus.jetstream import StreamNames

MAX_RESPONSES = 1000
RESPONSE_EXPIRES = "11m"  # longer than the longest `wait` query


class Permissions(msgspec.Struct, frozen=True):
    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    max_responses: int = MAX_RESPONSES
    response_expires: str = RESPONSE_EXPIRES


def node_permissions(
    node: str,
    *,
    subjects: Subjects | None = None,
    names: StreamNames | None = None,
    pools: tuple[str, ...] = (),
    domain: str | None = None,
) -> Permissions:
    """All that a worker of `node` may publish and subscribe to, and all that it needs.

    With a `domain` each JetStream subject stands there twice: a server of that domain rewrites the prefix
    before it checks, a leaf node before it does not.
    """
    of = subjects or Subjects()
    names = names or StreamNames()
    cmd, evt, log, jobs = names.commands, names.events, names.logs, names.jobs
    calls = [
        f"CONSUMER.CREATE.{cmd}.{node}.{of.commands_of(node)}",
        f"CONSUMER.DELETE.{cmd}.{node}",
        f"CONSUMER.INFO.{cmd}.{node}",
        f"CONSUMER.MSG.NEXT.{cmd}.{node}",
        f"STREAM.INFO.{evt}",
        f"STREAM.INFO.{log}",
        f"DIRECT.GET.{evt}.{of.events_of(node)}",
        f"DIRECT.GET.{log}.{of.logs_of(node)}",
    ]
    acks = [f"{cmd}.{node}.>"]
    for pool in pools:
        calls += [f"CONSUMER.INFO.{jobs}.{pool}", f"CONSUMER.MSG.NEXT.{jobs}.{pool}"]
        acks.append(f"{jobs}.{pool}.>")
    key = f"$KV.{names.nodes_bucket}.{node}"
    publish = [*(f"$JS.API.{call}" for call in calls), *(f"$JS.ACK.{ack}" for ack in acks), key]
    if domain:
        publish += [f"$JS.{domain}.API.{call}" for call in calls]
        # The account's hash stands before the stream's name.
        publish += [f"$JS.ACK.{domain}.*.{ack}" for ack in acks]
        publish.append(f"$JS.{domain}.API.{key}")
    publish += [
        of.events_of(node),
        of.logs_of(node),
        of.stats_of(node),
        of.progress_of(node),
        f"{of.prefix}.exec.{node}.*.out",
    ]
    subscribe = [of.rpc_of(node), of.exec_in_of(node), "$SRV.>", f"_INBOX_{node}.>"]
    return Permissions(tuple(publish), tuple(subscribe))


def config_block(permissions: Permissions, *, indent: str = "") -> str:
    """The `permissions { … }` of a nats-server configuration."""

    def listed(subjects: tuple[str, ...]) -> str:
        lines = "".join(f'{indent}    "{subject}"\n' for subject in subjects)
        return f"[\n{lines}{indent}  ]"

    responses = f'{{ max: {permissions.max_responses}, expires: "{permissions.response_expires}" }}'
    return (
        f"{indent}permissions {{\n"
        f"{indent}  publish: {listed(permissions.publish)}\n"
        f"{indent}  subscribe: {listed(permissions.subscribe)}\n"
        f"{indent}  allow_responses: {responses}\n"
        f"{indent}}}\n"
    )


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m worker.bus.permissions NODE [POOL …]")
    sys.stdout.write(config_block(node_permissions(sys.argv[1], pools=tuple(sys.argv[2:]))))
