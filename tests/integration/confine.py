"""Run as `python -I -S confine.py`: does in confined children what it is told, one JSON task a line.

Loads the enforcement as the launcher does, with bare package modules, so that nothing but the standard library
is there. A task: {plan or null, uid, setup, code, argv}. `code` is executed in the confined child, or `argv`
in its stead; `setup` in its parent, before, with the same names. The answer, a line: {errno, error, said}.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import socket
import struct
import sys
import traceback
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAID_LIMIT = 1 << 20

libc = ctypes.CDLL(None, use_errno=True)


def load_enforcement() -> types.ModuleType:
    for name in ("worker", "worker.platform", "worker.platform.linux"):
        module = types.ModuleType(name)
        module.__path__ = [str(ROOT.joinpath(*name.split(".")))]
        sys.modules[name] = module
    from worker.platform.linux import enforce

    foreign = sorted({name.partition(".")[0] for name in sys.modules} & {"msgspec", "schemas", "loguru"})
    assert not foreign, foreign
    return enforce


def call(numbers: tuple[int, int], *args: Any) -> int:
    """A raw system call by its numbers on x86-64 and aarch64."""
    number = numbers[0] if platform.machine() == "x86_64" else numbers[1]
    longs = [ctypes.c_long(a) if isinstance(a, int) else a for a in (number, *args)]
    result: int = libc.syscall(*longs)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def main() -> None:
    enforce = load_enforcement()
    for line in sys.stdin.buffer:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            stage(json.loads(line), enforce, writing)
        os.close(writing)
        with open(reading, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(pid, 0)
        answer = answer or json.dumps(told(-1, f"ended with wait status {status}")).encode()
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


def told(number: int = 0, error: str | None = None, said: str = "") -> dict[str, Any]:
    return {"errno": number, "error": error, "said": said}


def stage(task: dict[str, Any], enforce: Any, writing: int) -> None:
    """One task, in a process of its own whose user can be changed."""
    try:
        if task["uid"] is not None:
            os.setgroups([])
            os.setresgid(task["uid"], task["uid"], task["uid"])
            os.setresuid(task["uid"], task["uid"], task["uid"])
            libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, which the change of user cleared
        # Imported before the user changed: another one may not be able to read the interpreter's folder.
        modules = (ctypes, os, resource, signal, socket, struct, sys)
        names: dict[str, Any] = {module.__name__: module for module in modules}
        names |= {"call": call, "enforce": enforce}
        exec(task["setup"], names)
        prepared = None if task["plan"] is None else enforce.prepare(task["plan"])
        os.write(writing, in_child(task, names, enforce, prepared))
    except BaseException:
        os.write(writing, json.dumps(told(-1, traceback.format_exc())).encode())
    finally:
        os._exit(0)


def in_child(task: dict[str, Any], names: dict[str, Any], enforce: Any, prepared: Any) -> bytes:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(task, names, enforce, prepared, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read(SAID_LIMIT)
    os.waitpid(pid, 0)
    return json.dumps(told(said=said.decode())).encode() if task["argv"] else said


def child(task: dict[str, Any], names: dict[str, Any], enforce: Any, prepared: Any, writing: int) -> None:
    answer = told()
    try:
        if prepared is not None:
            enforce.apply(task["plan"], prepared)
        if task["argv"]:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            os.execv(task["argv"][0], task["argv"])
        names["say"] = lambda *words: answer.update(said=answer["said"] + " ".join(map(str, words)) + "\n")
        exec(task["code"], names)
    except OSError as error:
        answer |= {"errno": error.errno, "error": str(error)}
    except BaseException:
        answer |= {"errno": -1, "error": traceback.format_exc()}
    finally:
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)


main()
