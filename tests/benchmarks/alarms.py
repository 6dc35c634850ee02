"""Do the collapse alarms ring, and only then? Broken runs on speech beside their healthy twins.

    python tests/benchmarks/alarms.py --data DIR [--work runs/alarms] [--seed 0] [--steps 500]

DIR is that of tests/benchmarks/fsdd.py. Two runs of `configs/runs/*_tiny.yaml` are broken on
purpose: wav2vec 2.0 without its diversity term, whose codebook falls to a few entries, and data2vec
with a teacher that is the student itself (decay 0), whose targets lose their variety. Each, and the
same run as it is, goes through the first steps of its full schedule, then it is stopped. The table
names the step of the first line of the log in which each alarm is on.

Everything is kept under --work: a run that has come far enough is not repeated. Further arguments
override keys of all runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsdd import make_shards

from mmssl.eval import results

EVERY = 10  # steps of a line of the log
RUNS = {
    "wav2vec2_base, diversity 0": ("wav2vec2_base", ["tasks.mam.weights.diversity=0"]),
    "wav2vec2_base": ("wav2vec2_base", []),
    "data2vec_audio, decay 0": ("data2vec_audio", ["tasks.latents.target.decay=0"]),
    "data2vec_audio": ("data2vec_audio", []),
}
WATCHED = ("term/mam.usage", "term/latents.target_std", "rank/latents.targets", "loss")


def lines(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log so far."""
    log = run / "log.jsonl"
    text = log.read_text() if log.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def train_until(steps: int, run: Path, config: str, overrides: Sequence[str]) -> None:
    """Start a run and stop it as soon as its log has come to a step."""
    if (run / "log.jsonl").exists() and lines(run)[-1]["step"] >= steps:
        return
    command = [sys.executable, "-m", "mmssl.cli", "train", config, f"out={run}", *overrides]
    print("+", *command[1:], flush=True)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (lines(run) and lines(run)[-1]["step"] >= steps):
            time.sleep(1)
        if process.returncode:
            sys.exit(f"{run}: training failed with status {process.returncode}")
        process.terminate()


def judge(run: Path, steps: int) -> dict[str, Any]:
    """First step of each alarm, and what is watched along the way."""
    alarms: dict[str, int] = {}
    kept = [line for line in lines(run) if line["step"] <= steps]
    for line in kept:
        for name, value in line.items():
            if name.startswith("alarm/") and value:
                alarms.setdefault(name.removeprefix("alarm/"), line["step"])
    course = [{k: line[k] for k in ("step", *WATCHED) if k in line} for line in kept]
    return {"alarms": alarms, "course": course}


def save(found: dict[str, Any], out: Path) -> None:
    """Write `alarms.json` and `alarms.md`."""
    results.write(found, out / "alarms.json")
    text = [
        "# Collapse alarms",
        "",
        f"The first {found['steps']} steps of tiny runs on FSDD; a line of the log every {EVERY}.",
        "",
        "| run | alarms, by the step at which they ring | as it should be |",
        "|---|---|---|",
        *(_row(name, part) for name, part in found["runs"].items()),
        "",
        f"{found['machine']['processor']}, {found['machine']['cores']} cores; torch "
        f"{found['versions']['torch']}; seed {found['seed']}; overrides "
        f"{' '.join(found['overrides']) or 'none'}; {found['date']}.",
        "",
    ]
    (out / "alarms.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


def _row(name: str, part: dict[str, Any]) -> str:
    rung = ", ".join(f"`{alarm}` {step}" for alarm, step in part["alarms"].items())
    return f"| {name} | {rung or 'none'} | {'yes' if part['right'] else 'NO'} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, then write the table; status 1 if an alarm is missing or false."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True)
    add("--work", type=Path, default=Path("runs/alarms"))
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=500)
    args, overrides = parser.parse_known_args(argv)
    shards = make_shards(args.data, args.work)
    found: dict[str, Any] = {
        "runs": {},
        "steps": args.steps,
        "seed": args.seed,
        "overrides": overrides,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": results.versions(),
        "machine": results.machine(),
    }
    for name, (method, broken) in RUNS.items():
        run = args.work / name.replace(", ", "_").replace(" ", "_")
        given = [f"data.train={shards}", f"train.seed={args.seed}", f"train.log_every={EVERY}"]
        config = f"configs/runs/{method}_tiny.yaml"
        train_until(args.steps, run, config, [*given, *broken, *overrides])
        part = judge(run, args.steps)
        found["runs"][name] = {**part, "right": bool(part["alarms"]) == bool(broken)}
    save(found, args.out)
    if not all(part["right"] for part in found["runs"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
