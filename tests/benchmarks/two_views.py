"""SimCLR, BYOL and Barlow Twins whose two views are the sound and the frames of a clip.

    python tests/benchmarks/two_views.py [--work runs/two_views] [--names simclr byol barlow]

On Bouncing Shapes, which is made first: `configs/runs/*_av_tiny.yaml` trains on clips, each on one
thread, and finds the frames of a sound and the sound of frames among the test clips with one
shape, beside the same network with random weights. Everything is kept under --work: a finished step
is not computed again, an interrupted training goes on. Further words override keys of all runs. The
text of `two_views.notes.md` beside the results, if there is one, ends the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmssl.eval import results
from mmssl.eval.corpora import once

NAMES = ("simclr", "byol", "barlow")
DIRECTIONS = ("audio->video", "video->audio")
METRICS = ("class_at_1", "r_at_1", "r_at_10")
ALONE = ("train.threads=1", "data.workers=0", "validate.every=0")


def make_shards(work: Path, seed: int) -> Path:
    """Bouncing Shapes at few frames per second, which are quickly decoded."""
    work.mkdir(parents=True, exist_ok=True)
    corpus, shards = work / "corpus", work / "shards"
    size = ["--train", "1000", "--val", "50", "--test", "500", "--fps", "2", "--seed", str(seed)]
    once(work / "corpus.json", ["data_tools.synth", "--out", str(corpus), *size])
    once(work / "shards.json", ["data_tools.make_shards", str(corpus), str(shards)])
    return shards


def measure(name: str, work: Path, shards: Path, seed: int, words: Sequence[str]) -> dict[str, Any]:
    """Train and evaluate one method, each once."""
    run = work / name
    data = [f"data.{part}={shards / part}" for part in ("train", "val", "test")]
    options = [f"out={run}", *data, f"train.seed={seed}", *ALONE, *words]
    once(work / f"{name}.trained.json", ["mmssl.cli", "train", f"{name}_av_tiny", *options])
    evaluate = ["mmssl.cli", "eval", "retrieval", str(run), "report=false"]
    once(work / f"{name}.evaluated.json", evaluate)
    found = results.read(run / "results_retrieval.json")
    return {
        "trained": found["retrieval"],
        "random": found["random_encoder"]["retrieval"],
        "train": found["train"],
        "config": found["run"]["config"],
    }


def markdown(found: dict[str, Any]) -> str:
    """The table for people."""
    titles = [f"{m} {d.replace('->', '→')}" for m in METRICS for d in DIRECTIONS]
    lines = [
        "# Two views of two modalities",
        "",
        "Bouncing Shapes, test clips with one shape (`tests/benchmarks/two_views.py`): share of",
        "queries with an item of their class (`class_at_1`) or their own clip (`r_at_k`) among the",
        "first 1 or 10; brackets: 95 % bootstrap interval over clips; bold: chance is below it.",
        "",
        f"| | {' | '.join(titles)} | steps | minutes |",
        "|---" * (len(titles) + 3) + "|",
    ]
    for name, part in found["methods"].items():
        cells = [_cell(part["trained"][d], m) for m in METRICS for d in DIRECTIONS]
        steps, minutes = part["train"]["steps"], part["train"]["minutes"]
        lines.append(f"| {name} | {' | '.join(cells)} | {steps} | {minutes:.1f} |")
        cells = [f"{part['random'][d][m]:.3f}" for m in METRICS for d in DIRECTIONS]
        lines.append(f"| random weights | {' | '.join(cells)} | 0 | |")
    chance = [part["trained"][d]["chance"][m] for m in METRICS for d in DIRECTIONS]
    lines += [
        f"| chance | {' | '.join(f'{value:.3f}' for value in chance)} | | |",
        "",
        f"{part['trained'][DIRECTIONS[0]]['n']} queries. {found['machine']['processor']}, "
        f"{found['machine']['cores']} cores, {found['machine']['device']}, one thread; torch "
        f"{found['versions']['torch']}; seed {found['seed']}; {found['date']}.",
        "",
    ]
    return "\n".join(lines)


def _cell(row: dict[str, Any], metric: str) -> str:
    low, high = row["ci"][metric]
    value = f"**{row[metric]:.3f}**" if low > row["chance"][metric] else f"{row[metric]:.3f}"
    return f"{value} [{low:.2f}, {high:.2f}]"


def main(argv: Sequence[str] | None = None) -> None:
    """Compute what is missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/two_views"))
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--names", nargs="+", choices=NAMES, default=list(NAMES))
    add("--seed", type=int, default=0)
    args, words = parser.parse_known_args(argv)
    shards = make_shards(args.work, args.seed)
    found: dict[str, Any] = {
        "methods": {},
        "seed": args.seed,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": results.versions(),
        "machine": results.machine(),
    }
    for name in args.names:
        found["methods"][name] = measure(name, args.work, shards, args.seed, words)
        results.write(found, args.out / "two_views.json")
        notes = args.out / "two_views.notes.md"
        text = notes.read_text(encoding="utf-8") if notes.exists() else ""
        (args.out / "two_views.md").write_text(markdown(found) + text, encoding="utf-8")
        print(markdown(found), flush=True)


if __name__ == "__main__":
    main()
