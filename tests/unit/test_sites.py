"""A stream's sources: what is missing is added, and nothing else of the operator's settings is touched."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from worker.bus.sites import source, with_sources

names = st.sampled_from(["SANDFLEET_EVT", "SANDFLEET_LOG"])
domains = st.sampled_from(["north", "south", "hub"])
subjects = st.none() | st.sampled_from(["sandfleet.v1.cmd.a.>", "sandfleet.v1.cmd.b.>"])
sources = st.builds(source, names, domains, subject=subjects)


@given(present=st.lists(sources), wanted=st.lists(sources, min_size=1), told=st.booleans())
def test_adding_twice_is_adding_once(
    present: list[dict[str, Any]], wanted: list[dict[str, Any]], told: bool
) -> None:
    config: dict[str, Any] = {"name": "S", "max_bytes": 7} | ({"sources": present} if present or told else {})
    made = with_sources(config, wanted)
    if made is None:
        assert all(one in present for one in wanted)
        return
    assert {**made, "sources": present} == {**config, "sources": present}
    assert made["sources"][: len(present)] == present
    assert all(one in made["sources"] for one in wanted)
    assert with_sources(made, wanted) is None


def test_what_the_server_adds_to_a_source_makes_it_no_other_one() -> None:
    known = {"name": "S", "external": {"api": "$JS.site.API", "deliver": ""}, "opt_start_seq": 7}
    assert with_sources({"sources": [known]}, [source("S", "site")]) is None
    assert with_sources({"sources": [known]}, [source("S", "other")]) is not None
    assert with_sources({"sources": None}, [source("S", "site")]) == {"sources": [source("S", "site")]}
