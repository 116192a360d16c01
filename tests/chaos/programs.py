"""What the containers of a run do: print numbered lines, fork, exit, crash, ignore signals.

Each program keeps a witness of its own outside of its container: a file per stream to which it adds one byte
behind every line. So the judge knows what was printed without asking the node.
"""

import random
from pathlib import Path
from typing import Any

from .history import Witness
from .judge_states import EXITS

IMAGE = "chaos"
MODES = {  # mode → how it may end, beside by a signal
    "plain": None,
    "deaf": None,
    "slow": "7",
    "fork": None,
    "crash": "-11",
    "stay": None,
}

# $1 the witness folder, $2 lines, $3 lines between two pauses, $4 the pause, $5 exit code, $6 mode, $7 pad
SCRIPT = r"""
I=$SANDFLEET_INSTANCE; w=$1; p=$7; n=1
while ! (set -C; : > "$w/$I.$n.${#p}.stdout") 2> /dev/null; do
  n=$((n + 1)); [ $n -lt 500 ] || exit 98
done
exec 3>> "$w/$I.$n.${#p}.stdout" 4>> "$w/$I.$n.${#p}.stderr"
case $6 in
  deaf) trap '' TERM INT HUP USR1 USR2;;
  slow) trap 'sleep 0.2; exit 7' TERM INT;;
  fork) (sleep 1000 & ); setsid sleep 1000 & (setsid sleep 1000 & ) ;;
esac
i=0; e=0
while [ $i -lt $2 ]; do
  printf '%s.%03d stdout %08d %s\n' "$I" $n $i "$p"; printf . >&3
  i=$((i + 1))
  if [ $((i % 5)) = 0 ]; then
    printf '%s.%03d stderr %08d %s\n' "$I" $n $e "$p" >&2; printf . >&4
    e=$((e + 1))
  fi
  [ $((i % $3)) != 0 ] || sleep $4
done
: > "$w/$I.$n.${#p}.ended"
case $6 in
  crash) kill -SEGV $$; sleep 5;;
  stay) sleep 1000 & wait $!;;
esac
exit $5
"""


def random_spec(rng: random.Random, mode: str | None = None) -> dict[str, Any]:
    """A spec whose labels say how its program may end. `{witness}` stands for the witness folder."""
    mode = mode or rng.choice(list(MODES))
    lines = rng.choice([0, 3, 20, 100, 400])
    every, pause = rng.choice([(1, 0.01), (5, 0.02), (50, 0.2), (1000, 1.0)])
    code = rng.choice([0, 0, 3])
    exits = MODES[mode]
    spec: dict[str, Any] = {
        "image": {"name": IMAGE, "pull_policy": "never"},
        "command": {
            "entrypoint": ["/bin/sh", "-c", SCRIPT, "talk"],
            "args": [
                "{witness}",
                *map(str, (lines, every, pause, code)),
                mode,
                "x" * rng.choice([8, 40, 120]),
            ],
        },
        "sandbox": {"write": ["{witness}"]},
        "stop_grace_period": f"{rng.choice([100, 300, 1000])}ms",
        "labels": {EXITS: str(code) if exits is None else f"{code},{exits}"},
    }
    if rng.random() < 0.1:
        spec["logs"] = rng.choice([{"max_size_bytes": 8192}, {"max_rate": "2Ki"}])
    if rng.random() < 0.2:
        spec["lifecycle"] = {"delete_on_exit": True}
    return spec


def read_witnesses(folder: Path) -> list[Witness]:
    found = []
    for path in sorted(folder.glob("*.stdout")):
        instance, number, pad, _ = path.name.split(".")
        errors, ended = path.with_suffix(".stderr"), path.with_suffix(".ended")
        found.append(
            Witness(
                instance=instance,
                number=int(number),
                pad=int(pad),
                stdout=path.stat().st_size,
                stderr=errors.stat().st_size if errors.exists() else 0,
                ended=ended.exists(),
            )
        )
    return found
