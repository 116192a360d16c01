"""What of an image's configuration counts, with the spec on top."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.spec import ImageSpec, ServiceSpec
from schemas.spec_rules import check_labels
from worker.errors import CreateFailed
from worker.images.honoured import check_config, labels, stop_signal
from worker.images.model import ImageConfig

PLAIN = ServiceSpec(image=ImageSpec(name="app"))


def spec(**fields: object) -> ServiceSpec:
    return ServiceSpec(image=ImageSpec(name="app"), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "image", "number"),
    [
        (None, None, 15),
        (None, "", 15),
        (None, "SIGQUIT", 3),
        (None, "INT", 2),
        (None, "9", 9),
        ("SIGHUP", "SIGQUIT", 1),
        ("SIGHUP", "nonsense", 1),
    ],
)
def test_the_stop_signal(asked: str | None, image: str | None, number: int) -> None:
    assert stop_signal(spec(stop_signal=asked), ImageConfig(stop_signal=image)) == number


@pytest.mark.parametrize("image", ["SIGNONE", "0", "99", "SIGKILL; rm", "\0"])
def test_a_stop_signal_that_is_none(image: str) -> None:
    with pytest.raises(CreateFailed, match=r"stop signal .*spec\.stop_signal"):
        stop_signal(PLAIN, ImageConfig(stop_signal=image))


def test_the_specs_labels_come_first() -> None:
    image = ImageConfig(labels={"app": "image", "vendor": "acme", "bad\n": "x", "": "y", "ctl": "a\x1b[0m"})
    assert labels(spec(labels={"app": "spec"}), image) == {"app": "spec", "vendor": "acme"}
    assert labels(PLAIN, ImageConfig()) == {}


_TEXT = st.text(max_size=200)


@given(st.dictionaries(_TEXT, st.text(max_size=3000), max_size=80))
def test_labels_always_fit_a_status(found: dict[str, str]) -> None:
    own = {"mine": "1"}
    merged = labels(spec(labels=own), ImageConfig(labels=found))
    check_labels(merged, "labels")
    assert merged.items() >= own.items()


def test_as_many_labels_as_there_is_room() -> None:
    image = ImageConfig(labels={f"k{n:03}": "v" for n in range(100)})
    assert len(labels(spec(labels={"a": "b"}), image)) == 64


@pytest.mark.parametrize("item", ["", "=x", "NAME", "A=b\0c"])
def test_a_variable_that_is_none(item: str) -> None:
    with pytest.raises(CreateFailed, match="variable 1"):
        check_config(ImageConfig(env=["PATH=/bin", item]))
    check_config(ImageConfig(env=["PATH=/bin", "EMPTY="]))
