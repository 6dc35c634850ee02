"""Sounding Sprites: five folds of real sounds under drawings, with and without pulsing.

    python tests/benchmarks/sprites.py --data DIR [--work runs/sprites] [--folds 1 2] [--steps N]

DIR holds `esc10/CLASS/FOLD-SOURCE-TAKE.ogg` (the ten-class subset ESC-10 of ESC-50, CC BY 3.0,
https://github.com/karolpiczak/ESC-50) and `sprites/CLASS/*.png` (three 128 x 128 drawings with
transparency per class). For every fold a model is trained on the other four, with a validation part
cut out of them by source recording.

The last drawing of each class appears in the test only. The test shows all three drawings equally
often: the headline is the result on all test clips; beside it stand the same measures among the
clips whose sounding object is a drawing that training showed, and among those where it did not.
Retrieval is computed within the clips of one drawing (a third of the clips each, so that seen and
unseen drawings are searched among equally many); `seen` joins the first two.

Everything is kept under --work: an interrupted benchmark goes on where it stopped, a finished fold
is not computed again. Further words are overrides of the run's configuration, such as
`optim.lr=1e-3`. The text of `sprites.notes.md` beside the results, if there is one, ends the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.eval import results
from mmssl.eval.bootstrap import interval

VARIANTS = {"pulsing": (), "steady": ("--no-pulse",)}
LIMIT_MINUTES = 12  # training and evaluation of a fold on two cores
ROWS = (
    ("retrieval.audio->video.class_at_1", "class at rank 1, audio→video", ">= 0.75"),
    ("retrieval.video->audio.class_at_1", "class at rank 1, video→audio", ""),
    ("retrieval.text->video.class_at_1", "class at rank 1, text→video", ""),
    ("retrieval.audio->text.class_at_1", "class at rank 1, audio→text", ""),
    ("retrieval.audio->video.r_at_10", "own clip in the first 10, audio→video", ""),
    ("localization.pointing_sounding", "highest cell in the sounding object", ">= 0.93"),
    ("localization.pointing_silent", "highest cell in the silent object", "<= 0.04"),
    ("localization.pointing_swapped_audio", "other audio moves the peak", ">= 0.75"),
    ("localization.pointing_audio_blind", "averaged audio, sounding object", ""),
    ("localization.pointing_center", "middle of the picture", ""),
)


@dataclass(frozen=True)
class Job:
    """One fold of one variant."""

    variant: str
    fold: int
    data: Path
    folder: Path
    counts: tuple[int, int, int]  # clips of training and validation, crops per test sound
    config: str
    overrides: tuple[str, ...]
    seed: int
    workers: int
    shards: Path | None = None  # where they are, if not below `folder`

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def mark(self, name: str) -> Path:
        return self.folder / f"{name}.done.json"


def once(job: Job, name: str, *steps: Sequence[str | Path]) -> None:
    """Run modules of the project unless they have been finished before; the mark tells which."""
    mark, asked = job.mark(name), [" ".join(map(str, step)) for step in steps]
    if mark.exists():
        if json.loads(mark.read_text())["commands"] != asked:
            sys.exit(f"{mark} was made by other commands than\n{asked}\nuse another --work")
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    for line, step in zip(asked, steps, strict=True):
        print("+", line, flush=True)
        subprocess.run([sys.executable, "-m", *map(str, step)], check=True)
    facts = {
        "commands": asked,
        "seconds": round(time.monotonic() - begin, 1),
        "date": datetime.now(UTC).date().isoformat(),
    }
    mark.write_text(json.dumps(facts, indent=1))


def shards_of(job: Job) -> list[str]:
    """Overrides that name the data of a job."""
    shards = job.shards or job.folder / "shards"
    data = [f"data.{split}={shards / split}" for split in ("train", "val", "test")]
    return [*data, f"data.tokenizer={shards / 'tokenizer.model'}", f"train.seed={job.seed}"]


def make_shards(job: Job) -> None:
    """Corpus and shards of one fold."""
    corpus, shards = job.folder / "corpus", job.folder / "shards"
    train, val, crops = map(str, job.counts)
    workers = ("--workers", str(job.workers))
    synth = ["data_tools.synth", "--out", corpus, "--fold", str(job.fold), *workers]
    synth += ["--sounds", job.data / "esc10", "--sprites", job.data / "sprites"]
    synth += ["--train", train, "--val", val, "--crops", crops, "--test-drawings", "all"]
    synth += ["--seed", str(job.seed), *VARIANTS[job.variant]]
    make = ["data_tools.make_shards", corpus, shards, *workers]
    words = ["data_tools.train_tokenizer", shards / "train", shards / "tokenizer.model"]
    once(job, "shards", synth, make, words)
    shutil.rmtree(corpus, ignore_errors=True)


def compute(job: Job) -> None:
    """Shards, training and evaluation of one fold, each step once."""
    make_shards(job)
    train = ["mmssl.cli", "train", job.config, f"out={job.run}", *shards_of(job), *job.overrides]
    once(job, "trained", train)
    once(job, "evaluated", ["mmssl.cli", "eval", "bouncing", job.run, "split_by=drawing"])


# --- results


def summarize(jobs: Iterable[Job]) -> dict[str, Any]:
    """Means over folds with intervals over source sounds, by variant; only finished folds count."""
    found: dict[str, Any] = {}
    for variant in VARIANTS:
        done = [j for j in jobs if j.variant == variant and j.mark("evaluated").exists()]
        if done:
            found[variant] = _variant(done)
    return found


def _variant(jobs: Sequence[Job]) -> dict[str, Any]:
    tables = [json.loads((j.run / "items.json").read_text()) for j in jobs]
    files = [results.read(j.run / "results.json") for j in jobs]
    by_drawing = [_by_drawing(t) for t in tables]
    metrics = {}
    for path, _, _ in ROWS:
        metric = pooled(path, tables, [t["values"] for t in tables])
        if metric:
            parts = {
                name: pooled(path, tables, [part[name] for part in by_drawing])
                for name in ("seen", "unseen")
            }
            metrics[path] = metric | parts
    return {
        "folds": [j.fold for j in jobs],
        "metrics": metrics,
        "random_weights": {
            path: _mean([results.lookup(f, f"random_encoder.{path}") for f in files])
            for path, _, _ in ROWS
        },
        "clips": {
            kind: [f["data"]["kinds"].get(kind, 0) for f in files] for kind in ("one", "two")
        },
        "minutes": _minutes(jobs, files),
        "steps": [results.lookup(f, "train.steps") for f in files],
        "config": [results.lookup(f, "run.config") for f in files],
        "manifests": [results.lookup(f, "data.manifest_sha256") for f in files],
        "checkpoints": [results.lookup(f, "checkpoint.sha256") for f in files],
        "seed": jobs[0].seed,
        "dates": [json.loads(j.mark("evaluated").read_text())["date"] for j in jobs],
        "protocol": files[0]["protocol"],
        "versions": files[0]["versions"],
        "machine": files[0]["machine"],
    }


def _by_drawing(table: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Values of single clips of the seen drawings joined, and of the unseen (last) one."""
    *seen, last = (table["parts"][name] for name in sorted(table["parts"]))
    joined: dict[str, dict[str, float]] = {}
    for part in seen:
        for path, values in part.items():
            joined.setdefault(path, {}).update(values)
    return {"seen": joined, "unseen": last}


def _minutes(jobs: Sequence[Job], files: Sequence[results.Results]) -> dict[str, list[float]]:
    """By fold. The training's own clock counts: it goes on where an interrupted run went on."""
    seconds = [
        {name: json.loads(j.mark(name).read_text())["seconds"] for name in ("shards", "evaluated")}
        for j in jobs
    ]
    train = [float(results.lookup(f, "train.minutes")) for f in files]
    return {
        "corpus_and_shards": [s["shards"] / 60 for s in seconds],
        "training": train,
        "evaluation": [s["evaluated"] / 60 for s in seconds],
        "training_and_evaluation": [
            t + s["evaluated"] / 60 for t, s in zip(train, seconds, strict=True)
        ],
    }


def pooled(
    path: str, tables: Sequence[dict[str, Any]], values: Sequence[dict[str, dict[str, float]]]
) -> dict[str, Any]:
    """Mean over folds; the bootstrap draws whole source sounds out of all folds."""
    folds = [v.get(path, {}) for v in values]
    if not all(folds):
        return {}
    pool = np.asarray([value for fold in folds for value in fold.values()])
    sources = [
        f"{k}/{table['sources'][key]}"
        for k, (table, fold) in enumerate(zip(tables, folds, strict=True))
        for key in fold
    ]
    means = [float(np.mean(list(fold.values()))) for fold in folds]
    return {
        "mean": float(np.mean(means)),
        "ci": list(interval(pool, sources)),
        "folds": means,
        "n": len(pool),
        "sources": len(set(sources)),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return float(np.mean(there)) if there else None


# --- the table


def markdown(found: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        "# Sounding Sprites",
        "",
        "Real ESC-10 sounds under drawings; the sounds of the test fold and the last drawing of",
        "each class are in no training clip. Retrieval on one-object clips, pointing on two-object",
        "clips; chance of the class is 0.10. The test shows the three drawings equally often:",
        "`all` is the headline, `seen` and `unseen` are the same measures among the clips whose",
        "sounding object is a drawing that training showed or did not (retrieval within the clips",
        "of one drawing, a third of the clips: the own clip is found more easily among them).",
        "Mean over folds; brackets: 95 % bootstrap interval over the source sounds of all folds.",
        "`steady`: no pulsing with the loudness, so that appearance must be learned.",
        "",
    ]
    return "\n".join([*lines, *(line for name in found for line in _section(name, found[name]))])


def _section(variant: str, part: dict[str, Any]) -> list[str]:
    folds = part["folds"]
    columns = ["measure", "target", "all", "seen", "unseen", *(f"fold {k}" for k in folds)]
    one, two = (sorted(set(part["clips"][kind])) for kind in ("one", "two"))
    machine, minutes = part["machine"], part["minutes"]
    return [
        f"## {variant}",
        "",
        f"| {' | '.join(columns)} | random weights |",
        "|---" * (len(columns) + 1) + "|",
        *(_line(row, part) for row in ROWS if row[0] in part["metrics"]),
        "",
        f"Test clips per fold: {_list(one)} with one object, {_list(two)} with two. "
        f"Steps: {_list(sorted(set(part['steps'])))}. Seed {part['seed']}.",
        "",
        f"Minutes by fold, training and evaluation (at most {LIMIT_MINUTES} on two cores): "
        f"{_list(minutes['training_and_evaluation'])}; of these training: "
        f"{_list(minutes['training'])}. Before that, corpus and shards: "
        f"{_list(minutes['corpus_and_shards'])}.",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['device']}; torch "
        f"{part['versions']['torch']}; {_list(sorted(set(part['dates'])))}; configuration "
        f"{_list(sorted(set(part['config'])))}.",
        "",
    ]


def _list(values: Iterable[Any]) -> str:
    return ", ".join(v if isinstance(v, str) else results.number(v, 1) for v in values)


def _line(row: tuple[str, str, str], part: dict[str, Any]) -> str:
    path, title, target = row
    cell = part["metrics"][path]
    cells = [f"**{_bounded(cell)}**", _bounded(cell["seen"]), _bounded(cell["unseen"])]
    cells += [f"{value:.3f}" for value in cell["folds"]]
    guess = results.number(part["random_weights"][path])
    return f"| {title} | {target} | {' | '.join(cells)} | {guess} |"


def _bounded(cell: dict[str, Any]) -> str:
    return f"{cell['mean']:.3f} [{cell['ci'][0]:.3f}, {cell['ci'][1]:.3f}]" if cell else "-"


def save(found: dict[str, Any], out: Path) -> None:
    """Write `sprites.json` and `sprites.md`."""
    results.write(found, out / "sprites.json")
    notes = out / "sprites.notes.md"
    text = notes.read_text(encoding="utf-8") if notes.exists() else ""
    (out / "sprites.md").write_text(markdown(found) + text, encoding="utf-8")
    done = ", ".join(f"{name}: folds {part['folds']}" for name, part in found.items())
    print(out / "sprites.md", f"({done})")


# --- command line


def jobs_of(args: argparse.Namespace, overrides: Sequence[str]) -> list[Job]:
    """The asked folds of the asked variants; each fold first in all its variants."""
    steps = (f"train.steps={args.steps}",) if args.steps else ()
    return [
        Job(
            variant=variant,
            fold=fold,
            data=args.data,
            folder=args.work / variant / f"fold{fold}",
            counts=(args.train, args.val, args.crops),
            config=args.config,
            overrides=(*steps, *overrides),
            seed=args.seed,
            workers=args.workers,
        )
        for fold in args.folds
        for variant in args.variants
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Compute what is missing, then write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with esc10 and sprites")
    add("--work", type=Path, default=Path("runs/sprites"))
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--folds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    add("--config", default="configs/runs/sprites.yaml")
    add("--steps", type=int, help="training steps instead of the configuration's")
    add("--crops", type=int, default=5, help="test clips per sound and kind")
    add("--train", type=int, default=1500, help="training clips per fold")
    add("--val", type=int, default=100, help="validation clips per fold")
    add("--seed", type=int, default=0, help="of the corpus and the training")
    add("--workers", type=int, default=2, help="processes that make the corpus")
    args, overrides = parser.parse_known_args(argv)
    wrong = [word for word in overrides if word.startswith("-") or "=" not in word]
    if wrong:
        parser.error(f"unknown arguments {wrong}; overrides look like optim.lr=1e-3")
    for name in ("esc10", "sprites"):
        if not (args.data / name).is_dir():
            parser.error(f"{args.data / name}: no such folder")
    jobs = jobs_of(args, overrides)
    for job in jobs:
        compute(job)
        save(summarize(jobs), args.out)


if __name__ == "__main__":
    main()
