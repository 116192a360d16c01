"""Decision 3a as a table: what a node does for everything its stream may show."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.bus.recovery import GoOn, IsFenced, Shown, Stream, decide, may_be_stale, needs_deleted
from worker.journal_rows import StreamPosition

EPOCH, OTHER = "01E0", "01F9"
OLD = "2026-11-24T00:00:00Z"
NEW = "2026-11-25T00:00:00Z"

# Our event 10 was the last one acknowledged, at stream sequence 500.
POSITION = StreamPosition(created=OLD, last_seq=500, last_event_seq=10, last_epoch=EPOCH, last_boot="b1")
STREAM = Stream(created=OLD, first_seq=1, last_seq=900)


def ours(stream_seq: int, seq: int, boot: str = "b1") -> Shown:
    return Shown(stream_seq, EPOCH, boot, seq, ours=True)


def foreign(stream_seq: int, epoch: str, seq: int, boot: str = "b9") -> Shown:
    return Shown(stream_seq, epoch, boot, seq, ours=False)


def look(
    shown: Shown | None, stream: Stream = STREAM, position: StreamPosition | None = POSITION
) -> GoOn | IsFenced:
    return decide(epoch=EPOCH, position=position, stream=stream, shown=shown)


def go_on(shown: Shown | None, stream: Stream = STREAM, position: StreamPosition | None = POSITION) -> GoOn:
    decision = look(shown, stream, position)
    assert isinstance(decision, GoOn)
    return decision


def test_nothing_has_changed() -> None:
    assert go_on(ours(500, 10)) == GoOn(sent=10, expected=500)


def test_a_new_journal_and_no_message() -> None:
    assert go_on(None, position=None) == GoOn(sent=0, expected=0)


def test_the_first_acknowledgement_was_lost() -> None:
    decision = go_on(ours(7, 1), position=None)
    assert (decision.sent, decision.expected, decision.resend) == (1, 7, False)


def test_an_acknowledgement_was_lost() -> None:
    decision = go_on(ours(510, 14, boot="b2"))
    assert (decision.sent, decision.expected, decision.resend) == (14, 510, False)
    assert decision.position == StreamPosition(
        created=OLD, last_seq=510, last_event_seq=14, last_epoch=EPOCH, last_boot="b2"
    )


@pytest.mark.parametrize(
    "shown",
    [
        foreign(500, OTHER, 10),
        foreign(100, OTHER, 1),
        foreign(600, EPOCH, 11),  # a boot that this journal does not know
        foreign(600, EPOCH, 99, boot="b1"),  # more than this journal has made
        foreign(600, "", 0),  # no event at all
    ],
)
@pytest.mark.parametrize("stream", [STREAM, Stream(created=NEW, first_seq=1, last_seq=900)])
@pytest.mark.parametrize("position", [POSITION, None])
def test_fenced(shown: Shown, stream: Stream, position: StreamPosition | None) -> None:
    decision = look(shown, stream, position)
    assert isinstance(decision, IsFenced)
    assert decision.why


def test_the_stream_was_made_anew() -> None:
    decision = go_on(None, Stream(created=NEW, first_seq=1, last_seq=2000))
    assert (decision.sent, decision.expected, decision.resend) == (0, 0, True)
    assert decision.position == StreamPosition(created=NEW, last_seq=0)
    assert "made anew" in decision.why


def test_it_was_made_anew_and_has_what_we_sent_again_before_a_crash() -> None:
    decision = go_on(ours(3, 6), Stream(created=NEW, first_seq=1, last_seq=3))
    assert (decision.sent, decision.expected, decision.resend) == (6, 3, True)


def test_it_was_made_anew_and_already_has_everything() -> None:
    decision = go_on(ours(30, 12), Stream(created=NEW, first_seq=1, last_seq=30))
    assert (decision.sent, decision.expected, decision.resend) == (12, 30, False)


def test_the_newest_messages_are_lost() -> None:
    """A power failure before the fsync, or an older backup."""
    decision = go_on(ours(480, 8), Stream(created=OLD, first_seq=1, last_seq=490))
    assert (decision.sent, decision.expected, decision.resend) == (8, 480, True)
    decision = go_on(None, Stream(created=OLD, first_seq=1, last_seq=490))
    assert (decision.sent, decision.expected, decision.resend) == (0, 0, True)


def test_an_older_backup_that_others_have_filled_up_again() -> None:
    decision = go_on(ours(480, 8))
    assert (decision.sent, decision.expected, decision.resend) == (8, 480, True)
    assert go_on(None).resend


@pytest.mark.parametrize(
    "stream",
    [
        Stream(created=OLD, first_seq=501, last_seq=900),  # by age or size
        Stream(created=OLD, first_seq=901, last_seq=900),  # purged as a whole
        Stream(created=OLD, first_seq=1, last_seq=900, num_deleted=2, deleted=frozenset({499, 500})),
    ],
    ids=["evicted", "purged", "purged by subject"],
)
def test_what_was_evicted_is_not_sent_again_but_told(stream: Stream) -> None:
    assert go_on(None, stream) == GoOn(sent=10, expected=0, lost=True)
    if stream.deleted:
        assert go_on(ours(480, 8), stream) == GoOn(sent=10, expected=480, lost=True)


def test_nothing_was_ever_acknowledged_in_this_epoch() -> None:
    """After a takeover everything of the new epoch is still to be sent, whatever became of the old one's last."""
    base = StreamPosition(created=OLD, last_seq=500, last_event_seq=77, last_epoch=OTHER, last_boot="b9")
    assert go_on(foreign(500, OTHER, 77), position=base) == GoOn(sent=0, expected=500)
    assert go_on(None, position=base) == GoOn(sent=0, expected=0)
    assert go_on(ours(501, 3), position=base).sent == 3


@pytest.mark.parametrize(
    "shown", [foreign(501, OTHER, 78), foreign(500, OTHER, 76), foreign(500, OTHER, 77, boot="b8")]
)
def test_after_a_takeover_the_other_one_has_gone_on(shown: Shown) -> None:
    base = StreamPosition(created=OLD, last_seq=500, last_event_seq=77, last_epoch=OTHER, last_boot="b9")
    assert isinstance(look(shown, position=base), IsFenced)


def test_when_the_list_of_deleted_is_asked_for() -> None:
    holes = Stream(created=OLD, first_seq=1, last_seq=900, num_deleted=5)

    def asked(shown: Shown | None, stream: Stream, position: StreamPosition | None = POSITION) -> bool:
        return needs_deleted(epoch=EPOCH, position=position, stream=stream, shown=shown)

    assert asked(None, holes)
    assert asked(ours(480, 8), holes)
    assert not asked(ours(500, 10), holes)
    assert not asked(foreign(500, OTHER, 1), holes)
    assert not asked(None, STREAM)
    assert not asked(None, holes, None)
    assert not asked(None, Stream(created=NEW, first_seq=1, last_seq=900, num_deleted=5))
    assert not asked(None, Stream(created=OLD, first_seq=501, last_seq=900, num_deleted=5))


def test_an_older_message_of_another_may_come_from_a_replica_that_lags() -> None:
    """We took over at 500 and have published since; a follower still shows the other one's last."""

    def stale(
        shown: Shown | None, stream: Stream = STREAM, position: StreamPosition | None = POSITION
    ) -> bool:
        return may_be_stale(position=position, stream=stream, shown=shown)

    assert stale(foreign(490, OTHER, 77))
    assert not stale(foreign(501, OTHER, 78))
    assert not stale(None)
    assert not stale(foreign(490, OTHER, 77), position=None)
    assert not stale(foreign(490, OTHER, 77), Stream(created=OLD, first_seq=1, last_seq=495))
    assert not stale(foreign(490, OTHER, 77), Stream(created=NEW, first_seq=1, last_seq=900))
    holes = Stream(created=OLD, first_seq=1, last_seq=900, num_deleted=1, deleted=frozenset({500}))
    assert not stale(foreign(490, OTHER, 77), holes)


# -- the law: whatever happens to the stream, what is sent next neither repeats nor skips


@given(
    stream_events=st.integers(0, 30),
    acked=st.integers(0, 30),
    made=st.integers(0, 40),
    anew=st.booleans(),
)
def test_what_is_sent_next_follows_what_the_stream_has(
    stream_events: int, acked: int, made: int, anew: bool
) -> None:
    """The stream holds our events 1 … n at sequences 1 … n (rolled back or made anew at will)."""
    made = max(made, stream_events, acked)
    created = NEW if anew else OLD
    stream = Stream(created=created, first_seq=1, last_seq=stream_events)
    position = (
        StreamPosition(created=OLD, last_seq=acked, last_event_seq=acked, last_epoch=EPOCH) if acked else None
    )
    shown = ours(stream_events, stream_events) if stream_events else None
    decision = decide(epoch=EPOCH, position=position, stream=stream, shown=shown)
    assert isinstance(decision, GoOn)
    assert (decision.sent, decision.expected) == (stream_events, stream_events)
    if decision.resend:
        assert acked > stream_events
    # Applied and looked at again, it is settled.
    position = decision.position or position
    again = decide(epoch=EPOCH, position=position, stream=stream, shown=shown)
    assert isinstance(again, GoOn)
    assert msgspec.structs.replace(again, position=None) == GoOn(sent=stream_events, expected=stream_events)


# -- a copy of the stream from before a takeover, which shows what this journal made in a former epoch


def former(stream_seq: int, seq: int) -> Shown:
    return Shown(stream_seq, "01D0", "b0", seq, ours=False, former=True)


def test_put_back_from_before_a_takeover() -> None:
    decision = go_on(former(400, 70), Stream(created=OLD, first_seq=1, last_seq=450))
    assert (decision.sent, decision.expected, decision.resend, decision.lost) == (0, 400, True, True)
    # The position it stands on afterwards asks for the same again until something is acknowledged.
    again = go_on(former(400, 70), Stream(created=OLD, first_seq=1, last_seq=450), decision.position)
    assert (again.sent, again.expected) == (0, 400)


def test_put_back_from_before_a_takeover_of_which_nothing_was_sent() -> None:
    base = msgspec.structs.replace(POSITION, last_epoch=OTHER, last_event_seq=77)
    assert go_on(former(400, 70), position=base) == GoOn(sent=0, expected=400, lost=True)
    assert go_on(former(400, 70), position=None) == GoOn(sent=0, expected=400, lost=True)
