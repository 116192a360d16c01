"""Random commands: good ones, and all that a scheduler may get wrong. Pure: the generator decides everything.

What is only known during the run stands as a symbol in the body: `@current` and `@former` are instances of
the container, `@now+2.5` is a time, `{witness}` a folder (see `publisher`).
"""

import json
import random
from typing import Any

from .plan import Action
from .programs import IMAGE, random_spec

NAMES = ("a-0", "b-0", "c-7", "d-0", "long-name-of-a-service-4294967295")
QUIET = ("quiet-0", "quiet-1")  # one runs, one is only created; then nobody speaks of them
GAP_S = 0.15  # between two commands, on average
SIGNALS = ("SIGKILL", "SIGTERM", "INT", "SIGHUP", "USR1", "SIGUSR2")
KINDS = {
    "run": 26,
    "create": 7,
    "start": 9,
    "stop": 13,
    "kill": 8,
    "restart": 9,
    "remove": 13,
    "again": 7,
    "other": 2,
    "malformed": 6,
    "node": 3,
    "drain": 1,
}


def plan_commands(rng: random.Random, seconds: float) -> list[Action]:
    """Actions `send` (a new command), `again` (the same one, perhaps written otherwise), `other` (another
    body under a known id), `malformed`.
    """
    actions: list[Action] = []
    ids: list[str] = []
    for cid, verb in zip(QUIET, ("run", "create"), strict=True):
        actions.append(_send(rng, 0.0, cid, verb, {"spec": random_spec(rng, mode="stay")}, ids))
    ids.clear()
    at_s = 0.0
    while at_s < seconds:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind in ("again", "other") and not ids:
            continue
        match kind:
            case "again":
                args = {"id": rng.choice(ids[-20:]), "reorder": rng.random() < 0.3}
                actions.append(Action(at_s, "again", args))
            case "other":
                actions.append(Action(at_s, "other", {"id": rng.choice(ids[-20:])}))
            case "malformed":
                actions.append(Action(at_s, "malformed", _malformed(rng)))
            case "drain":
                body = {"timeout_s": rng.choice([0.1, 0.5]), "stop_containers": rng.random() < 0.3}
                actions.append(_send(rng, at_s, None, "drain", body, ids))
                actions.append(_send(rng, at_s + rng.uniform(0.1, 0.8), None, "resume", {}, ids))
            case "node":
                actions.append(_send(rng, at_s, None, *_node_command(rng), ids))
            case _:
                body = _fields(rng, kind)
                actions.append(_send(rng, at_s, rng.choice(NAMES), kind, body, ids))
        # Bursts: now and then several at one moment.
        at_s += rng.expovariate(1 / GAP_S) if rng.random() < 0.8 else 0.001
    return actions


def _new_id(rng: random.Random) -> str:
    return f"{rng.getrandbits(80):020x}"


def _send(
    rng: random.Random, at_s: float, cid: str | None, verb: str, fields: dict[str, Any], ids: list[str]
) -> Action:
    body = {"type": verb, "id": _new_id(rng), **fields}
    ids.append(body["id"])
    return Action(at_s, "send", {"cid": cid, "verb": verb, "body": body})


def _fields(rng: random.Random, verb: str) -> dict[str, Any]:
    body: dict[str, Any] = {}
    match verb:
        case "run" | "create":
            body["spec"] = random_spec(rng)
            body["replace"] = rng.random() < 0.5
        case "stop" | "restart":
            if rng.random() < 0.6:
                body["timeout_s"] = rng.choice([0, 0.1, 0.5, 2])
        case "kill":
            body["signal"] = rng.choice(SIGNALS)
        case "remove":
            body["force"] = rng.random() < 0.8
    if rng.random() < 0.08:
        body["if_instance"] = rng.choice(["@current", "@former", "01BX5ZZKBKACTAV9WEVGEMMVRZ"])
    if rng.random() < 0.08:
        body["deadline"] = f"@now{rng.choice([-3600.0, -1.0, 0.3, 1.0, 3.0]):+}"
    if rng.random() < 0.2:
        body["actor"] = "chaos"
    return body


def _node_command(rng: random.Random) -> tuple[str, dict[str, Any]]:
    return rng.choice(
        [
            ("tag_image", {"source": IMAGE, "target": f"{IMAGE}:{rng.randrange(3)}"}),
            ("remove_image", {"image": f"{IMAGE}:{rng.randrange(3)}"}),
            ("register_image", {"image": IMAGE, "source_dir": "{image}"}),
            ("prune_images", {}),
            ("resume", {}),
        ]
    )


def _malformed(rng: random.Random) -> dict[str, Any]:
    """The end of a subject and a body (latin-1) that no node can take for a command."""
    cid, command_id = rng.choice(NAMES), _new_id(rng)

    def body(**fields: Any) -> str:
        return json.dumps({"type": "stop", "id": command_id, **fields})

    end, text = rng.choice(
        [
            (f"{cid}.stop", ""),
            (f"{cid}.stop", "{"),
            (f"{cid}.stop", "null"),
            (f"{cid}.stop", "[" * 5000),
            (f"{cid}.stop", '{"type":"stop","id":"\xff"}'),
            (f"{cid}.stop", body(id="no id: spaces")),
            (f"{cid}.stop", body(surprise=1)),
            (f"{cid}.stop", body(timeout_s=-1)),
            (f"{cid}.stop", body(deadline="tomorrow")),
            (f"{cid}.stop", body(actor="x" * 300_000)),
            (f"{cid}.kill", body(type="kill", signal="SIGSTOP")),
            (f"{cid}.run", body(type="run", spec={"image": {"name": IMAGE}, "imgae": 1})),
            (f"{cid}.start", body()),
            (f"{cid}.explode", body(type="explode")),
            (f"{cid}.drain", body(type="drain")),
            ("_.stop", body()),
            ("No-Name.stop", body()),
            (f"{cid}.stop.again", body()),
            ("stop", body()),
        ]
    )
    return {"end": end, "body": text, "id": command_id if command_id in text else None}
