"""Reading the fields of an op. Whatever is missing or of the wrong kind is `invalid_command`, by name."""

import signal
from typing import Any

from worker.launcher.program import Command
from worker.launcher.protocol import INVALID, UNSUPPORTED, Refused
from worker.launcher.run import Identity

Message = dict[str, Any]


def text(message: Message, name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise Refused(INVALID, f"{name} must be a text that is not empty")
    return value


def whole(message: Message, name: str, low: int, high: int) -> int:
    value = message.get(name)
    if type(value) is not int or not low <= value <= high:
        raise Refused(INVALID, f"{name} must be a whole number from {low} to {high}")
    return value


def signum(message: Message) -> int:
    number = whole(message, "signum", 1, signal.NSIG)
    if number not in signal.valid_signals():
        raise Refused(INVALID, f"signum must be that of a signal; {number} is none")
    return number


def optional_whole(message: Message, name: str, low: int, high: int) -> int | None:
    return None if message.get(name) is None else whole(message, name, low, high)


def seconds(message: Message, name: str) -> float:
    value = message.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
        raise Refused(INVALID, f"{name} must be a number of seconds")
    return float(value)


def command(message: Message) -> Command:
    """program, argv, env and cwd."""
    argv, env = message.get("argv"), message.get("env")
    if not isinstance(argv, list) or not argv or not all(_plain(a) for a in argv):
        raise Refused(INVALID, "argv must be a list of texts that is not empty")
    if not isinstance(env, dict) or not all(_plain(v) and k and "=" not in k for k, v in env.items()):
        raise Refused(INVALID, "env must map names to texts")
    return Command(text(message, "program"), argv, env, text(message, "cwd"))


def _plain(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


def identity(message: Message) -> Identity:
    """Which run, and its limits on output and processor time."""
    if message.get("tty"):
        raise Refused(UNSUPPORTED, "tty")
    limits = message.get("limits") or {}
    if not isinstance(limits, dict):
        raise Refused(INVALID, "limits must be an object")
    cpu = limits.get("cpu_time_limit_s")
    return Identity(
        cid=text(message, "cid"),
        instance=text(message, "instance"),
        run=whole(message, "run", 1, 1 << 62),
        state_dir=text(message, "state_dir"),
        max_log_bytes=optional_whole(limits, "max_log_bytes", 1, 1 << 62),
        max_rate=optional_whole(limits, "max_rate", 1, 1 << 62),
        cpu_limit_s=None if cpu is None else seconds(limits, "cpu_time_limit_s"),
    )


def plan(message: Message) -> dict[str, Any]:
    value = message.get("plan")
    if not isinstance(value, dict):
        raise Refused(INVALID, "plan must be an object")
    return value
