"""Where a node's events go on after a start, a reconnect or a refused batch. Pure: facts in, a decision out.

The facts: what the journal remembers of the stream (`position`: the last message acknowledged to us, its
stream sequence S and event number E), the stream's state, and our newest message in it (`shown`).

  shown is what we stand on                                → go on
  shown is not of this journal's making                    → fenced
  shown is ours, E or newer (an acknowledgement was lost)  → all up to it is sent; go on behind it
  shown is older (also: of an epoch that this journal has left), or there is none of ours:
    nothing of this epoch was ever acknowledged            → send from the first
    the stream was made anew, or ends before S             → it lost what it had: send again what is kept
    S was evicted or purged                                → nothing is lost that was not meant to go; go on
    otherwise                                              → send again what is kept

The last case is a backup that was restored and has grown beyond S by other nodes' messages, or a replica
that lags behind: limits evict the oldest first, so an S that is neither evicted nor purged and yet is not
ours is lost. If it was a lagging replica, the stream refuses what is sent again, because every batch says
what it expects, and the question is asked anew. So a wrong view can delay an event but never store one
twice.
"""

import msgspec

from worker.journal_rows import StreamPosition


class Stream(msgspec.Struct, frozen=True):
    """`deleted`: sequences between first and last that are gone, as far as they were asked for."""

    created: str
    first_seq: int
    last_seq: int
    num_deleted: int = 0
    deleted: frozenset[int] = frozenset()


class Shown(msgspec.Struct, frozen=True):
    """The newest message below `P.evt.<node>.>`. `ours`: this very journal made it; `former`: it did so in an
    epoch that it has left since. An empty `epoch`: no event.
    """

    stream_seq: int
    epoch: str
    boot: str
    seq: int
    ours: bool
    former: bool = False


class GoOn(msgspec.Struct, frozen=True):
    """All events up to `sent` are dealt with; the next batch expects `expected` to be our newest message.

    `position` replaces the journal's, null leaves it. With `resend` the events after `sent` that are still
    kept count as not sent. `lost`: the stream does not have any more what it had acknowledged, and what is kept
    may not be all of it. `why` is for the log.
    """

    sent: int
    expected: int
    position: StreamPosition | None = None
    resend: bool = False
    lost: bool = False
    why: str = ""


class IsFenced(msgspec.Struct, frozen=True):
    why: str


Decision = GoOn | IsFenced


def decide(*, epoch: str, position: StreamPosition | None, stream: Stream, shown: Shown | None) -> Decision:
    """See above. `epoch` is the journal's own."""
    acked = position.last_event_seq if position is not None and position.last_epoch == epoch else 0
    anew = position is not None and stream.created != position.created
    if shown is not None:
        if position is not None and _stands_on(position, stream, shown):
            return GoOn(sent=acked, expected=shown.stream_seq)
        if not shown.ours and not shown.former:
            return IsFenced(_foreign(epoch, shown))
        if shown.ours and shown.seq >= acked:
            return GoOn(
                sent=shown.seq,
                expected=shown.stream_seq,
                position=position_at(stream, shown),
                lost=anew,
                why="an acknowledgement was lost" if shown.seq > acked else "",
            )
    if position is None or not acked:
        if shown is not None:  # put back from before a takeover, and nothing of this epoch was sent yet
            return GoOn(sent=0, expected=shown.stream_seq, lost=True)
        return GoOn(sent=0, expected=0, lost=anew)
    lost = _loss(position, stream)
    if lost:
        return _again(stream, shown, lost)
    if was_evicted(position, stream):
        expected = shown.stream_seq if shown is not None else 0
        return GoOn(sent=acked, expected=expected, lost=True)
    return _again(stream, shown, "the stream shows another message where our last one was")


def needs_deleted(
    *, epoch: str, position: StreamPosition | None, stream: Stream, shown: Shown | None
) -> bool:
    """Whether the list of deleted sequences could change the decision: it can be long."""
    if position is None or position.last_epoch != epoch or not stream.num_deleted:
        return False
    if shown is not None and (not shown.ours or shown.seq >= position.last_event_seq):
        return False
    return not _loss(position, stream) and not was_evicted(position, stream)


def may_be_stale(*, position: StreamPosition | None, stream: Stream, shown: Shown | None) -> bool:
    """Whether a lagging replica could have shown another's message that is older than what we stand on.

    Somebody else's message from before a takeover looks like a second worker then: ask again before
    believing it.
    """
    return (
        position is not None
        and shown is not None
        and shown.stream_seq < position.last_seq
        and not _loss(position, stream)
        and not was_evicted(position, stream)
    )


def was_evicted(position: StreamPosition, stream: Stream) -> bool:
    return position.last_seq < stream.first_seq or position.last_seq in stream.deleted


def _stands_on(position: StreamPosition, stream: Stream, shown: Shown) -> bool:
    """Ours or not: after a takeover it is the other one's last message."""
    return (
        shown.stream_seq == position.last_seq
        and stream.created == position.created
        and (shown.epoch, shown.seq) == (position.last_epoch, position.last_event_seq)
        and position.last_boot in (None, shown.boot)
    )


def _loss(position: StreamPosition, stream: Stream) -> str:
    if stream.created != position.created:
        return "the stream was made anew"
    if stream.last_seq < position.last_seq:
        return "the stream lost its newest messages"
    return ""


def _again(stream: Stream, shown: Shown | None, why: str) -> GoOn:
    if shown is None:
        nothing = StreamPosition(created=stream.created, last_seq=0)
        return GoOn(sent=0, expected=0, position=nothing, resend=True, lost=True, why=why)
    return GoOn(
        sent=0 if shown.former else shown.seq,
        expected=shown.stream_seq,
        position=position_at(stream, shown),
        resend=True,
        lost=True,
        why=why,
    )


def position_at(stream: Stream, shown: Shown) -> StreamPosition:
    """What a journal that goes on behind `shown` remembers."""
    return StreamPosition(
        created=stream.created,
        last_seq=shown.stream_seq,
        last_event_seq=shown.seq,
        last_epoch=shown.epoch,
        last_boot=shown.boot,
    )


def _foreign(epoch: str, shown: Shown) -> str:
    if not shown.epoch:
        return f"message {shown.stream_seq} on this node's event subjects is no event of a worker"
    if shown.epoch != epoch:
        return f"another worker has published under this name (epoch {shown.epoch}, event {shown.seq})"
    return f"a worker with a copy of this journal has published event {shown.seq} (boot {shown.boot})"
