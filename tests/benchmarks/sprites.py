"""Sounding Sprites: five folds of real sounds under drawings, with and without pulsing.

    python tests/benchmarks/sprites.py --data DIR [--work runs/sprites] [--folds 1 2] [a.b=c ...]

DIR holds `esc10/CLASS/FOLD-SOURCE-TAKE.ogg` (the ten-class subset ESC-10 of ESC-50, CC BY 3.0,
https://github.com/karolpiczak/ESC-50) and `sprites/CLASS/*.png` (three 128 x 128 drawings with
transparency per class). For every fold a model is trained on the other four, with a validation part
cut out of them by source recording; the third drawing of each class appears in the test only.
Everything is kept under --work: an interrupted benchmark goes on where it stopped, a finished fold
is not computed again. Further words are overrides of the run's configuration.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.eval import results
from mmssl.eval.bootstrap import interval

VARIANTS = {"pulsing": (), "steady": ("--no-pulse",)}
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
    workers: int

    @property
    def run(self) -> Path:
        return self.folder / "run"


def command(*words: str | Path) -> None:
    """Run a module of the project; stops the benchmark if it fails."""
    print("+", *words, flush=True)
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


def once(folder: Path, name: str, *steps: Sequence[str | Path]) -> None:
    """Run commands unless they have been finished before; the mark holds what was run."""
    mark, asked = folder / f".{name}", "\n".join(" ".join(map(str, step)) for step in steps)
    if mark.exists():
        if mark.read_text() != asked:
            sys.exit(f"{mark} was made by other commands than\n{asked}\nuse another --work")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        command(*step)
    mark.write_text(asked)


def compute(job: Job) -> None:
    """Corpus, shards, training and evaluation of one fold, each step once."""
    corpus, shards = job.folder / "corpus", job.folder / "shards"
    train, val, crops = job.counts
    synth = [
        "data_tools.synth",
        "--out",
        corpus,
        "--fold",
        str(job.fold),
        "--workers",
        str(job.workers),
    ]
    synth += ["--sounds", job.data / "esc10", "--sprites", job.data / "sprites"]
    synth += ["--train", str(train), "--val", str(val), "--crops", str(crops)]
    synth += VARIANTS[job.variant]
    make = ["data_tools.make_shards", corpus, shards, "--workers", str(job.workers)]
    words = ["data_tools.train_tokenizer", shards / "train", shards / "tokenizer.model"]
    once(job.folder, "shards", synth, make, words)
    shutil.rmtree(corpus, ignore_errors=True)
    data = [f"data.{split}={shards / split}" for split in ("train", "val", "test")]
    data.append(f"data.tokenizer={shards / 'tokenizer.model'}")
    fit = ["mmssl.cli", "train", job.config, f"out={job.run}", *data, *job.overrides]
    once(job.folder, "trained", fit)
    once(job.folder, "evaluated", ["mmssl.cli", "eval", "bouncing", job.run])


# --- results


def summarize(jobs: Iterable[Job]) -> dict[str, Any]:
    """Means over folds with intervals over source sounds, by variant; only finished folds count."""
    found: dict[str, Any] = {}
    for variant in VARIANTS:
        done = [j for j in jobs if j.variant == variant and (j.folder / ".evaluated").exists()]
        if done:
            found[variant] = _variant(done)
    return found


def _variant(jobs: Sequence[Job]) -> dict[str, Any]:
    tables = [json.loads((j.run / "items.json").read_text()) for j in jobs]
    files = [results.read(j.run / "results.json") for j in jobs]
    metrics = {}
    for path, _, _ in ROWS:
        folds = [list(t["values"].get(path, {}).values()) for t in tables]
        if all(folds):
            metrics[path] = _pooled(path, folds, tables)
    return {
        "folds": [j.fold for j in jobs],
        "metrics": metrics,
        "random_weights": {
            path: _mean([results.lookup(f, f"random_encoder.{path}") for f in files])
            for path, _, _ in ROWS
        },
        "minutes": [results.lookup(f, "train.minutes") for f in files],
        "config": [results.lookup(f, "run.config") for f in files],
        "manifests": [results.lookup(f, "data.manifest_sha256") for f in files],
        "checkpoints": [results.lookup(f, "checkpoint.sha256") for f in files],
        "seed": files[0]["seed"],
        "protocol": files[0]["protocol"],
        "versions": files[0]["versions"],
        "machine": files[0]["machine"],
    }


def _pooled(path: str, folds: list[list[float]], tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over folds; the bootstrap draws whole source sounds out of all folds."""
    values = np.concatenate([np.asarray(fold) for fold in folds])
    sources = [
        f"{k}/{t['sources'][key]}" for k, t in enumerate(tables) for key in t["values"][path]
    ]
    low, high = interval(values, sources)
    return {
        "mean": float(np.mean([np.mean(fold) for fold in folds])),
        "ci": [low, high],
        "folds": [float(np.mean(fold)) for fold in folds],
        "n": len(values),
        "sources": len(set(sources)),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return float(np.mean(there)) if there else None


def markdown(found: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        "# Sounding Sprites",
        "",
        "Real ESC-10 sounds under drawings; the test fold and the third drawing of each class are",
        "unseen. 400 test clips per kind and fold (5 crops per sound). Retrieval on one-object",
        "clips, pointing on two-object clips; chance of the class is 0.10. Brackets: 95 %",
        "bootstrap interval over source sounds. `steady`: no pulsing, so that appearance must be",
        "learned.",
        "",
    ]
    for variant, part in found.items():
        folds = part["folds"]
        head = "| measure | target | mean | " + " | ".join(f"fold {k}" for k in folds)
        lines += [
            f"## {variant}",
            "",
            f"{head} | random weights |",
            "|---" * (len(folds) + 4) + "|",
        ]
        lines += [_line(row, part) for row in ROWS if row[0] in part["metrics"]]
        minutes = ", ".join(results.number(m, 1) for m in part["minutes"])
        machine = part["machine"]
        where = f"{machine['processor']}, {machine['cores']} cores, {machine['device']}"
        lines += ["", f"Training: {minutes} minutes by fold ({where}).", ""]
        lines += [f"Config digests: {', '.join(map(str, part['config']))}.", ""]
    return "\n".join(lines)


def _line(row: tuple[str, str, str], part: dict[str, Any]) -> str:
    path, title, target = row
    cell = part["metrics"][path]
    folds = " | ".join(f"{value:.3f}" for value in cell["folds"])
    mean = f"**{cell['mean']:.3f}** [{cell['ci'][0]:.3f}, {cell['ci'][1]:.3f}]"
    guess = results.number(part["random_weights"][path])
    return f"| {title} | {target} | {mean} | {folds} | {guess} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Compute what is missing, then write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with esc10 and sprites")
    parser.add_argument("--work", type=Path, default=Path("runs/sprites"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--config", default="configs/runs/sprites.yaml")
    parser.add_argument("--crops", type=int, default=5, help="test clips per sound and kind")
    parser.add_argument("--train", type=int, default=1500, help="training clips per fold")
    parser.add_argument("--val", type=int, default=100, help="validation clips per fold")
    parser.add_argument("--workers", type=int, default=2)
    args, overrides = parser.parse_known_args(argv)
    wrong = [word for word in overrides if word.startswith("-") or "=" not in word]
    if wrong:
        parser.error(f"unknown arguments {wrong}; overrides look like train.steps=100")
    for name in ("esc10", "sprites"):
        if not (args.data / name).is_dir():
            parser.error(f"{args.data / name}: no such folder")
    jobs = [
        Job(
            variant,
            fold,
            args.data,
            args.work / variant / f"fold{fold}",
            (args.train, args.val, args.crops),
            args.config,
            tuple(overrides),
            args.workers,
        )
        for fold in args.folds
        for variant in args.variants
    ]
    for job in jobs:
        compute(job)
        save(summarize(jobs), args.out)


def save(found: dict[str, Any], out: Path) -> None:
    """Write `sprites.json` and `sprites.md`."""
    results.write(found, out / "sprites.json")
    (out / "sprites.md").write_text(markdown(found), encoding="utf-8")
    done = ", ".join(f"{name}: folds {part['folds']}" for name, part in found.items())
    print(out / "sprites.md", f"({done})")


if __name__ == "__main__":
    main()
