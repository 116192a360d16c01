"""parse(build(x)) == x, and no name can change the shape of a subject."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.commands import CONTAINER_VERBS, NODE_VERBS
from schemas.errors import ContractError, InvalidCommand
from schemas.subjects import MAX_REPLICA, Kind, Parsed, Subjects, build_cid, parse_cid

nodes = st.from_regex(r"\A[A-Za-z0-9_-]{1,64}\Z")
services = st.from_regex(r"\A[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
replicas = st.integers(0, MAX_REPLICA)
streams = st.sampled_from(["stdout", "stderr"])
S = Subjects()


@given(services, replicas)
def test_cid(service: str, replica: int) -> None:
    assert parse_cid(build_cid(service, replica)) == (service, replica)


@pytest.mark.parametrize(
    "cid",
    [
        *(
            "",
            "a",
            "a-",
            "-0",
            "a-01",
            "a-+1",
            "a--1",
            "A-0",
            "a-4294967296",
            "a-0\n",
            "a-٣",
            "_",
            "a" * 64 + "-0",
        ),
        *("a.b-0", "a-0-", "a-99999999999"),
    ],
)
def test_no_cid(cid: str) -> None:
    with pytest.raises(InvalidCommand) as caught:
        parse_cid(cid)
    assert caught.value.field == "container"


def test_bad_replica() -> None:
    for bad in (-1, MAX_REPLICA + 1, True):
        with pytest.raises(InvalidCommand) as caught:
            build_cid("a", bad)
        assert caught.value.field == "replica"


@given(
    nodes, services, replicas, st.sampled_from([*CONTAINER_VERBS, *NODE_VERBS, "pause"]), streams, st.data()
)
def test_what_is_built_is_parsed(
    node: str, service: str, replica: int, verb: str, stream: str, data: st.DataObject
) -> None:
    cid = build_cid(service, replica)
    whole = {"node": node, "cid": cid, "service": service, "replica": replica}
    session = data.draw(nodes)
    cases: list[tuple[str, Parsed]] = [
        (S.command(node, cid, verb), Parsed(Kind.COMMAND, **whole, verb=verb)),
        (S.command(node, None, verb), Parsed(Kind.COMMAND, node, verb=verb)),
        (S.job(session, service), Parsed(Kind.JOB, pool=session, job_id=service)),
        (S.state(node, cid), Parsed(Kind.EVENT, **whole, event="state")),
        (S.health(node, cid), Parsed(Kind.EVENT, **whole, event="health")),
        (S.command_event(node, cid), Parsed(Kind.EVENT, **whole, event="command")),
        (S.command_event(node, None), Parsed(Kind.EVENT, node, event="command")),
        (S.job_event(node, cid), Parsed(Kind.EVENT, **whole, event="job")),
        (S.node_event(node), Parsed(Kind.EVENT, node, event="node")),
        (S.image_event(node), Parsed(Kind.EVENT, node, event="image")),
        (S.log(node, cid, stream), Parsed(Kind.LOG, **whole, stream=stream)),
        (S.stat(node, cid), Parsed(Kind.STAT, **whole)),
        (S.progress(node), Parsed(Kind.PROGRESS, node)),
        (S.rpc(node, verb), Parsed(Kind.RPC, node, verb=verb)),
        (S.exec_in(node, session), Parsed(Kind.EXEC, node, session=session, direction="in")),
        (S.exec_out(node, session), Parsed(Kind.EXEC, node, session=session, direction="out")),
    ]
    for subject, expected in cases:
        assert S.parse(subject) == expected
        assert not set(subject) & set("*> \t")


def test_the_contract_by_example() -> None:
    assert S.command("mac-1", "web-0", "start") == "sandfleet.v1.cmd.mac-1.web-0.start"
    assert S.command("mac-1", None, "drain") == "sandfleet.v1.cmd.mac-1._.drain"
    assert S.job("mac", "build-7") == "sandfleet.v1.job.mac.build-7"
    assert S.log("mac-1", "web-0", "stdout") == "sandfleet.v1.log.mac-1.web-0.stdout"
    assert S.progress("mac-1") == "sandfleet.v1.progress.mac-1.image"
    assert S.exec_in("mac-1", "s1") == "sandfleet.v1.exec.mac-1.s1.in"
    assert S.events_of("mac-1") == "sandfleet.v1.evt.mac-1.>"
    assert S.events_of() == "sandfleet.v1.evt.>"
    assert S.commands_of("mac-1") == "sandfleet.v1.cmd.mac-1.>"
    assert S.logs_of("mac-1") == "sandfleet.v1.log.mac-1.>"
    assert S.logs_of("mac-1", "web-0") == "sandfleet.v1.log.mac-1.web-0.*"
    assert S.stats_of() == "sandfleet.v1.stat.>"
    assert S.progress_of() == "sandfleet.v1.progress.>"
    assert S.rpc_of("mac-1") == "sandfleet.v1.rpc.mac-1.*"
    assert S.exec_in_of("mac-1") == "sandfleet.v1.exec.mac-1.*.in"
    assert S.jobs_of("mac") == "sandfleet.v1.job.mac.*"
    assert S.jobs_of() == "sandfleet.v1.job.>"
    assert S.container_events_of("mac-1", None) == "sandfleet.v1.evt.mac-1._.>"
    assert Subjects("a.b-c").stat("n", "a-0") == "a.b-c.stat.n.a-0"


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: S.command("a.b", "a-0", "start"), "node"),
        (lambda: S.command("*", "a-0", "start"), "node"),
        (lambda: S.command("n", "_", "start"), "container"),
        (lambda: S.command("n", "a-0.x", "start"), "container"),
        (lambda: S.command("n", "a-0", "a.b"), "verb"),
        (lambda: S.log("n", "a-0", "stdin"), "stream"),
        (lambda: S.job("n", "A"), "job_id"),
        (lambda: S.job(">", "a"), "pool"),
        (lambda: S.exec_in("n", "a b"), "session"),
        (lambda: S.events_of(">"), "node"),
        (lambda: Subjects("a..b"), "prefix"),
        (lambda: Subjects("a.>"), "prefix"),
        (lambda: Subjects(""), "prefix"),
    ],
)
def test_builders_refuse(build: Any, field: str) -> None:
    with pytest.raises(InvalidCommand) as caught:
        build()
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("subject", "field"),
    [
        ("", "subject"),
        ("sandfleet.v1", "subject"),
        ("sandfleet.v2.cmd.n.a-0.start", "subject"),
        ("sandfleet.v1.cmd.n.a-0", "subject"),
        ("sandfleet.v1.cmd.n.a-0.start.now", "subject"),
        ("sandfleet.v1.what.n", "subject"),
        ("sandfleet.v1.progress.n.log", "subject"),
        ("sandfleet.v1.cmd.n.web.start", "container"),
        ("sandfleet.v1.cmd.n.web-01.start", "container"),
        ("sandfleet.v1.cmd.n.Web-0.start", "container"),
        ("sandfleet.v1.cmd.n..start", "container"),
        ("sandfleet.v1.cmd..web-0.start", "node"),
        ("sandfleet.v1.cmd.n.web-0.", "verb"),
        ("sandfleet.v1.cmd.n.web-0.St", "verb"),
        ("sandfleet.v1.evt.n.web-0.image", "event"),
        ("sandfleet.v1.evt.n._.state", "event"),
        ("sandfleet.v1.log.n._.stdout", "container"),
        ("sandfleet.v1.log.n.a-0.both", "stream"),
        ("sandfleet.v1.exec.n.s.up", "direction"),
        ("sandfleet.v1.job.p.J", "job_id"),
    ],
)
def test_parse_names_the_part(subject: str, field: str) -> None:
    with pytest.raises(InvalidCommand) as caught:
        S.parse(subject)
    assert caught.value.field == field


@given(st.one_of(st.text(), st.text().map(lambda tail: "sandfleet.v1." + tail)))
def test_parse_never_crashes(subject: str) -> None:
    try:
        S.parse(subject)
    except ContractError as failure:
        failure.message.encode()


@given(st.lists(st.text(max_size=8), min_size=2, max_size=5), st.sampled_from(list(Kind)))
def test_parse_takes_only_what_it_would_build(parts: list[str], kind: Kind) -> None:
    try:
        parsed = S.parse(".".join(["sandfleet.v1", kind, *parts]))
    except ContractError:
        return
    assert parsed.node is None or parsed.node == parts[0]
