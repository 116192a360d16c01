"""The health check of the worker's image: exit code 0 while a worker runs and its launcher answers.

It asks on this machine only. A server that is away is no illness: the worker goes on, and containers run. The frames
of the launcher's socket are those of worker/launcher/protocol.py: four bytes of length and JSON, `hello` first.
"""

import fcntl
import json
import os
import socket
import sys
from pathlib import Path

TIMEOUT_S = 3.0


def illness(root: Path) -> str:
    """What is wrong with the worker of this data directory; empty when nothing is."""
    try:
        if not _is_locked(root / "worker.lock"):
            return "no worker runs"
        launcher = json.loads((root / "launcher.json").read_text())
        _say_hello(launcher["socket"], (root / "launcher.key").read_text().strip())
    except (OSError, ValueError, KeyError) as failure:
        return f"the launcher does not answer: {failure}"
    return ""


def _is_locked(path: Path) -> bool:
    """A worker holds this lock for as long as it lives."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _say_hello(path: str, key: str) -> None:
    """ValueError or OSError unless the launcher takes the key, which its main loop reads and compares."""
    hello = json.dumps({"id": 1, "op": "hello", "key": key, "protocol": [1, 1], "events": False}).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(TIMEOUT_S)
        peer.connect(path)
        peer.sendall(len(hello).to_bytes(4, "big") + hello)
        with peer.makefile("rb") as answers:
            length = int.from_bytes(answers.read(4), "big")
            answer = json.loads(answers.read(length))
    if "ok" not in answer:
        raise ValueError(answer.get("error", answer))


if __name__ == "__main__":
    said = illness(Path(os.environ.get("SANDFLEET_DATA_DIR", "/var/lib/sandfleet")))
    print(said or "healthy")
    sys.exit(1 if said else 0)
