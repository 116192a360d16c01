"""What of a node is on its way to the streams, as an operator reads it: a cell, some rows, a finding of doctor."""

from schemas.node import DeliveryInfo, LogBacklog, NodeInfo
from worker.cli.human import DASH, size, span
from worker.cli.output import Cell, Column, Output
from worker.cli.style import Style

# An event is in the stream within milliseconds, output within a tenth of a second: more waits for something.
LATE_S = 5.0
FAR_BYTES = 16 * 2**20
SHOWN_LOGS = 10


def waiting_cell(info: NodeInfo | None) -> Cell:
    """For a table: `-`, or what waits: `1204 events, 3.0 MiB of logs`."""
    delivery = None if info is None else info.delivery
    if delivery is None:
        return DASH
    parts = []
    if delivery.outbox_events is None:
        parts.append("unknown")
    elif delivery.outbox_events:
        parts.append(counted(delivery.outbox_events, "event"))
    if delivery.log_lag_bytes:
        parts.append(f"{size(delivery.log_lag_bytes)} of logs")
    return Cell(", ".join(parts), "warn" if complaints(delivery) else "") if parts else DASH


def delivery_rows(delivery: DeliveryInfo) -> list[tuple[str, Cell | str]]:
    lost = delivery.log_lost_bytes
    return [
        ("events", _events(delivery)),
        ("logs", Cell(_logs(delivery), "warn" if delivery.log_lag_bytes > FAR_BYTES else "")),
        (
            "lost",
            Cell(f"{size(lost)} of logs since the start", "warn") if lost else "nothing since the start",
        ),
        ("commands", f"{delivery.commands_redelivered} redelivered since the start"),
        ("connection", f"{counted(delivery.reconnects, 'reconnect')} since the start"),
    ]


def show_logs(out: Output, delivery: DeliveryInfo) -> None:
    """The containers that are furthest behind."""
    if not delivery.logs:
        return
    columns = [Column("  CONTAINER", keep=True), Column("BEHIND", right=True), Column("LOST", right=True)]
    out.line()
    out.table(columns, [_log_row(one) for one in delivery.logs[:SHOWN_LOGS]])
    more = len(delivery.logs) - SHOWN_LOGS + delivery.logs_omitted
    if more > 0:
        out.note(f"{more} more containers: see sandfleet info --json")


def complaints(delivery: DeliveryInfo) -> list[str]:
    """What of it is not as it should be."""
    found = []
    if delivery.outbox_events is None:
        found.append("its journal does not answer")
    elif delivery.oldest_event_age_s is not None and delivery.oldest_event_age_s > LATE_S:
        waiting = counted(delivery.outbox_events, "event")
        found.append(f"{waiting} unsent, the oldest for {span(delivery.oldest_event_age_s)}")
    if delivery.log_lag_bytes > FAR_BYTES:
        found.append(f"{size(delivery.log_lag_bytes)} of logs unsent")
    if delivery.log_lost_bytes:
        found.append(f"{size(delivery.log_lost_bytes)} of logs lost")
    return found


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _events(delivery: DeliveryInfo) -> Cell:
    if delivery.outbox_events is None:
        return Cell("unknown: the journal does not answer", "bad")
    if not delivery.outbox_events or delivery.oldest_event_age_s is None:
        return Cell("all sent")
    late: Style = "warn" if delivery.oldest_event_age_s > LATE_S else ""
    waiting = counted(delivery.outbox_events, "event")
    return Cell(f"{waiting} unsent, the oldest for {span(delivery.oldest_event_age_s)}", late)


def _logs(delivery: DeliveryInfo) -> str:
    return f"{size(delivery.log_lag_bytes)} unsent" if delivery.log_lag_bytes else "all sent"


def _log_row(one: LogBacklog) -> list[Cell | str]:
    lost = Cell(size(one.lost_bytes), "warn") if one.lost_bytes else DASH
    return [f"  {one.container}", size(one.lag_bytes) if one.lag_bytes else DASH, lost]
