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
    """All that a worker of `node` may publish and subscribe to, and all that it needs."""
    of = subjects or Subjects()
    names = names or StreamNames()
    api = f"$JS.{domain}.API" if domain else "$JS.API"
    kv = f"{api}.$KV" if domain else "$KV"
    # With a domain the server puts the domain and the account's hash before the stream's name.
    ack = f"$JS.ACK.{domain}.*" if domain else "$JS.ACK"
    cmd, evt, log, jobs = names.commands, names.events, names.logs, names.jobs
    publish = [
        f"{api}.CONSUMER.CREATE.{cmd}.{node}.{of.commands_of(node)}",
        f"{api}.CONSUMER.DELETE.{cmd}.{node}",
        f"{api}.CONSUMER.INFO.{cmd}.{node}",
        f"{api}.CONSUMER.MSG.NEXT.{cmd}.{node}",
        f"{ack}.{cmd}.{node}.>",
        f"{api}.STREAM.INFO.{evt}",
        f"{api}.STREAM.INFO.{log}",
        f"{api}.DIRECT.GET.{evt}.{of.events_of(node)}",
        f"{api}.DIRECT.GET.{log}.{of.logs_of(node)}",
        f"{kv}.{names.nodes_bucket}.{node}",
        of.events_of(node),
        of.logs_of(node),
        of.stats_of(node),
        of.progress_of(node),
        f"{of.prefix}.exec.{node}.*.out",
    ]
    for pool in pools:
        publish += [
            f"{api}.CONSUMER.INFO.{jobs}.{pool}",
            f"{api}.CONSUMER.MSG.NEXT.{jobs}.{pool}",
            f"{ack}.{jobs}.{pool}.>",
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
