"""Separation of two spoken digits of speakers that training has not heard (FSDD).

    python tests/benchmarks/separate_fsdd.py --data DIR [--work DIR] [--runs mixit pit]

DIR holds `fsdd/recordings/DIGIT_SPEAKER_INDEX.wav` of the Free Spoken Digit Dataset (3,000
recordings of six speakers at 8 kHz, CC BY-SA 4.0, https://github.com/Jakobovski/free-spoken-digit-dataset).

Four speakers are trained on, two (`--unheard`) are tested. `mixit` hears mixtures of two mixtures
of two recordings and no recording alone (configs/runs/mixit_tiny.yaml, but for 9,000 steps); `pit`
is told both recordings of each mixture (pit_tiny), an upper bound. `mmssl eval separation` mixes
every test recording with one of the other unheard speaker, within 5 dB, and gives the SI-SDR of the
outputs above that of the mixture. Further arguments, before --runs, override keys of all runs. The
text of `separate_fsdd.notes.md` beside the results, if there is one, ends the table.

Everything is kept under --work: a finished step is not computed again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmssl.eval import results
from mmssl.eval.corpora import once

RUNS: dict[str, list[str]] = {"mixit": ["train.steps=9000"], "pit": []}  # and what each overrides
UNHEARD = ("theo", "yweweler")  # the last two by name
SEED = 0  # of the order of the test recordings, which decides whom they meet


def make_shards(data: Path, work: Path, unheard: Sequence[str]) -> Path:
    """Recordings of the speakers of training and of test, in folders of their own.

    A test recording's source is its speaker: it is mixed with one of the other.
    """
    files = sorted((data / "fsdd" / "recordings").glob("*.wav"))
    if not files:
        sys.exit(f"{data / 'fsdd' / 'recordings'}: no recordings; see --help")
    random.Random(SEED).shuffle(files)
    rows = []
    for file in files:
        digit, speaker, _ = file.stem.split("_")
        split, source = ("test", speaker) if speaker in unheard else ("train", file.stem)
        row = {"media": str(file.resolve()), "source": source, "split": split}
        rows.append({**row, "meta": {"digit": digit, "speaker": speaker}})
    work.mkdir(parents=True, exist_ok=True)
    manifest = work / "fsdd.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data_tools.make_shards", str(manifest), str(work / "shards")]
    once(work / "shards.done.json", words)
    return work / "shards"


def measure(name: str, shards: Path, args: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """Minutes of training, and what the suite says of the test speakers."""
    run, mark = args.work / name, args.work / f"{name}.done.json"
    extra = [f"data.train={shards / 'train'}", f"train.seed={args.seed}", *RUNS[name], *overrides]
    config = f"configs/runs/{name}_tiny.yaml"
    minutes = once(mark, ["mmssl.cli", "train", config, f"out={run}", *extra])["minutes"]
    words = ["mmssl.cli", "eval", "separation", str(run), f"data={shards / 'test'}"]
    once(args.work / f"{name}.eval.json", [*words, "report=false"])
    found = results.read(run / "results_separation.json")
    kept = {key: found[key] for key in ("protocol", "separation", "random_encoder", "train")}
    return {"minutes": minutes, "config": found["run"]["config"], **kept}


def save(found: dict[str, Any], out: Path) -> None:
    """Write `separate_fsdd.json` and `separate_fsdd.md`."""
    results.write(found, out / "separate_fsdd.json")
    lines = [
        "# Two digits at once, of unheard speakers (FSDD)",
        "",
        "SI-SDR of the outputs above that of the mixture, in dB, on mixtures of",
        f"{' and '.join(found['unheard'])}; mean over both sounds and all mixtures, with its",
        "95 % interval (bootstrap over mixtures). One output stands for each sound; `added up`:",
        "every output is added to the sound it belongs to. Both choices know the sounds.",
        "",
        "| run | trained with | gain | added up | random weights | mixtures | minutes |",
        "|---|---|---|---|---|---|---|",
        *(_row(name, part) for name, part in found["runs"].items()),
        "",
        f"{found['machine']['processor']}, {found['machine']['cores']} cores, one thread; "
        f"torch {found['versions']['torch']}; seed {found['seed']}; {found['date']}.",
        "",
    ]
    notes = out / "separate_fsdd.notes.md"
    lines += [notes.read_text(encoding="utf-8")] if notes.exists() else []
    (out / "separate_fsdd.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def _row(name: str, part: dict[str, Any]) -> str:
    trained, random_weights = part["separation"], part["random_encoder"]["separation"]
    low, high = trained["ci"]["gain_db"]
    told = {"mixit": "mixtures of mixtures alone", "pit": "both sounds"}[name]
    return (
        f"| {name} | {told} | **{trained['gain_db']:.2f}** ({low:.2f} to {high:.2f}) | "
        f"{trained['added_up']['gain_db']:.2f} | {random_weights['gain_db']:.2f} | "
        f"{trained['n']} | {part['minutes']:.0f} |"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Compute what is missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True)
    add("--work", type=Path, default=Path("runs/separate_fsdd"))
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    add("--unheard", nargs=2, default=list(UNHEARD))
    add("--seed", type=int, default=0)
    args, overrides = parser.parse_known_args(argv)
    shards = make_shards(args.data, args.work, args.unheard)
    found: dict[str, Any] = {
        "runs": {},
        "unheard": args.unheard,
        "seed": args.seed,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": results.versions(),
        "machine": results.machine(),
    }
    for name in args.runs:
        found["runs"][name] = measure(name, shards, args, overrides)
        save(found, args.out)


if __name__ == "__main__":
    main()
