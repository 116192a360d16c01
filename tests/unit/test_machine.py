from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.values import NODE
from worker.datadir import default_data_dir, default_node_name, machine_boot_id, machine_id
from worker.errors import Configuration

LINUX_ID = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("system", "env", "uid", "wanted"),
    [
        ("Linux", {"HOME": "/root"}, 0, "/var/lib/sandfleet"),
        ("Darwin", {"HOME": "/var/root"}, 0, "/var/lib/sandfleet"),
        ("Linux", {"HOME": "/home/a", "XDG_DATA_HOME": "/data"}, 1000, "/data/sandfleet"),
        ("Linux", {"HOME": "/home/a", "XDG_DATA_HOME": "relative"}, 1000, "/home/a/.local/share/sandfleet"),
        ("Linux", {"HOME": "/home/a", "XDG_DATA_HOME": ""}, 1000, "/home/a/.local/share/sandfleet"),
        ("Darwin", {"HOME": "/Users/a"}, 501, "/Users/a/Library/Application Support/sandfleet"),
        (
            "Darwin",
            {"HOME": "/Users/a", "XDG_DATA_HOME": "/x"},
            501,
            "/Users/a/Library/Application Support/sandfleet",
        ),
    ],
)
def test_default_data_dir(system: str, env: dict[str, str], uid: int, wanted: str) -> None:
    assert default_data_dir(system, env, uid) == Path(wanted)


@pytest.mark.parametrize("home", [{}, {"HOME": ""}, {"HOME": "here"}])
def test_no_home(home: dict[str, str]) -> None:
    with pytest.raises(Configuration, match="--data-dir"):
        default_data_dir("Linux", home, 1000)


@pytest.mark.parametrize(
    ("hostname", "wanted"),
    [
        ("web-1", "web-1"),
        ("web-1.example.com", "web-1-example-com"),
        ("Johns-MacBook-Pro.local", "Johns-MacBook-Pro"),
        ("büro pc.fritz.box.", "b-ro-pc-fritz-box"),
        ("localhost.localdomain", "node-01234567"),
        ("", "node-01234567"),
        ("...", "node-01234567"),
        ("a" * 80, "a" * 64),
    ],
)
def test_default_node_name(hostname: str, wanted: str) -> None:
    assert default_node_name(hostname, LINUX_ID) == wanted


@given(st.text(max_size=100))
def test_any_host_name_can_be_made_to_fit(hostname: str) -> None:
    assert NODE.fullmatch(default_node_name(hostname, LINUX_ID))


def test_machine_id_is_stable_and_hides_its_source(tmp_path: Path) -> None:
    file = tmp_path / "machine-id"
    file.write_text(LINUX_ID + "\n")
    found = machine_id(file)
    assert found == machine_id(file)
    assert found is not None
    assert len(found) == 32
    assert LINUX_ID not in found
    assert machine_id(ask=lambda: "A52E8A05-D6A4-5F2B-9C1E-3B7D0C2E9F11") not in (None, found)


@pytest.mark.parametrize("content", ["", "uninitialized\n", "zz" * 16])
def test_a_machine_without_an_id(tmp_path: Path, content: str) -> None:
    file = tmp_path / "machine-id"
    assert machine_id(file) is None
    file.write_text(content)
    assert machine_id(file) is None
    assert machine_id(ask=lambda: None) is None


def test_boot_id(tmp_path: Path) -> None:
    file = tmp_path / "boot_id"
    assert machine_boot_id(file) is None
    file.write_text("7ac00ed2-33d8-4e6c-a5f5-8d4a0a1e7b0c\n")
    assert machine_boot_id(file) == "7ac00ed2-33d8-4e6c-a5f5-8d4a0a1e7b0c"
    assert machine_boot_id(ask=lambda: "7AC00ED2-33D8") == "7ac00ed2-33d8"
