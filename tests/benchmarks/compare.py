"""Methods, and ablations of the flagship, side by side on Sounding Sprites in equal training time.

    python tests/benchmarks/compare.py --data DIR [--work runs/compare] [--seconds 300]
        [--folds 1 2] [--names flagship avol_net ...]

DIR and the folds are those of `sprites.py`, whose shards with pulsing drawings are made here once
for all. First a few steps of every entry are timed, on one thread and with nothing else on the
machine, which tells how many steps fit into --seconds of one core; that number holds for all its
folds. Then each is trained with that many and evaluated (`bouncing`, `retrieval`) on the test fold,
fold by fold. All is kept under --work, so that an interrupted benchmark goes on and its table
grows; once timing is done, processes with other --folds may work beside each other. The text of
`compare.notes.md` beside the table ends it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sprites import Job, make_shards, once, pooled, shards_of

from mmssl.eval import results

TIMED = 16  # steps; the first ones are slower and count all the same
FOLDS = (1, 2, 3, 4, 5)
ALONE = ("train.threads=1", "data.workers=0", "validate.every=0", "train.save_every=0")
COUNTS = (1500, 100, 5)  # clips of training and validation, crops per test sound
SUITES = ("bouncing", "retrieval")
# name: (configuration, overrides)
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "flagship": ("sprites", ()),
    "vatt_ma": ("vatt_ma_tiny", ()),
    "vatt_mbs": ("vatt_mbs_tiny", ()),
    "mmv_fac": ("mmv_fac_tiny", ()),
    "avol_net": ("avol_net_tiny", ()),
    "ez_vsl": ("ez_vsl_tiny", ()),
    "davenet": ("davenet_tiny", ()),
    "dense_av": ("dense_av_tiny", ()),
}
# in the order in which the recipe names them
ABLATIONS = {
    "patches instead of convolutions": (
        "towers.video.cut={kind: patch, patch: [1, 16, 16]}",
        "towers.audio.cut={kind: patch, patch: [16, 16]}",
    ),
    "norms shared by the modalities": ("shared.own_norms=false",),
    "no dense score": ("tasks.align.pairs.where=null", "tasks.align.pairs.where_text=null"),
    "no token dropping": ("towers.video.drop_tokens=0.0",),
    "no masked prediction": (
        "tasks.masked_audio=null",
        "tasks.masked_video=null",
        "tasks.masked_text=null",
    ),
    "sigmoid instead of softmax": (
        "tasks.align.pairs.va_coarse.objective={kind: sigmoid}",
        "tasks.align.pairs.at.objective={kind: sigmoid, equal_text: true}",
        "tasks.align.pairs.vt.objective={kind: sigmoid, equal_text: true}",
    ),
    "no match": ("tasks.match=null",),
    "hard negatives after 40 %": (
        "tasks.match.target.hard={kind: steps, points: [[0.0, 0.0], [0.4, 0.25]]}",
    ),
    "pairs alone": (
        *(f"tasks.{name}=null" for name in ("masked_audio", "masked_video", "masked_text")),
        "tasks.match=null",
    ),
    "registers": tuple(f"towers.{name}.registers=4" for name in ("audio", "video", "text")),
}
ENTRIES = METHODS | {
    f"flagship, {name}": ("sprites", overrides) for name, overrides in ABLATIONS.items()
}
COLUMNS = (
    ("retrieval.audio->video.class_at_1", "class a→v"),
    ("retrieval.video->audio.class_at_1", "v→a"),
    ("retrieval.text->video.class_at_1", "t→v"),
    ("retrieval.audio->text.class_at_1", "a→t"),
    ("localization.pointing_sounding", "points at sounding"),
    ("localization.pointing_silent", "at silent"),
    ("localization.pointing_swapped_audio", "wrong audio moves it"),
    ("localization.pointing_center", "picture's centre"),
)
CIOU = (
    ("relative", "cIoU@0.5, upper half"),
    ("absolute", "map ≥ 0.5"),
    ("adaptive", "area of the object"),
)


def seconds_per_step(job: Job) -> float:
    """Of one core, reading and decoding included; measured once for all folds."""
    once(job, "timed", [*_train(job), f"train.steps={TIMED}"])
    return 60 * float(_summary(job)["minutes"]) / TIMED


def compute(job: Job, steps: int) -> None:
    """Train and evaluate one entry on one fold, each once."""
    once(job, "trained", [*_train(job), f"train.steps={steps}"])
    suites = (["mmssl.cli", "eval", suite, job.run, "report=false"] for suite in SUITES)
    once(job, "evaluated", *suites)


def _train(job: Job) -> list[str]:
    data = [f"out={job.run}", *shards_of(job)]
    return ["mmssl.cli", "train", job.config, *data, *job.overrides, *ALONE]


def _summary(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.run / "summary.json").read_text())
    return found


def row(jobs: Sequence[Job]) -> dict[str, Any]:
    """Means over the finished folds with intervals over source sounds."""
    tables = [_items(j.run) for j in jobs]
    files = [results.read(j.run / "results.json") for j in jobs]
    metrics = {path: pooled(path, tables, [t["values"] for t in tables]) for path, _ in COLUMNS}
    for rule, _ in CIOU:
        for what in ("model", "center"):
            path = f"localization.ciou.{what}.{rule}"
            found = [results.lookup(f, path) or {} for f in files]
            for name in ("at_0.5", "auc"):
                metrics[f"{path}.{name}"] = {"mean": _mean([one.get(name) for one in found])}
    return {
        "folds": [j.fold for j in jobs],
        "seed": jobs[0].seed,
        "metrics": {path: metric for path, metric in metrics.items() if metric},
        "steps": [results.lookup(f, "train.steps") for f in files],
        "config": [results.lookup(f, "run.config") for f in files],
        "machine": files[0]["machine"],
        "versions": files[0]["versions"],
    }


def _items(run: Path) -> dict[str, Any]:
    """Values of single clips of both suites: retrieval by maps is in that of its own alone."""
    all_, retrieval = (
        json.loads((run / name).read_text()) for name in ("items.json", "items_retrieval.json")
    )
    return {name: retrieval[name] | all_[name] for name in ("values", "sources")}


def _mean(values: Sequence[Any]) -> float | None:
    there = [float(v) for v in values if v is not None]
    return math.fsum(there) / len(there) if there else None


# --- the table


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """The table for people."""
    titles = ["", *(title for _, title in COLUMNS)]
    titles += [f"{title} (AUC)" for _, title in CIOU] + ["steps", "folds"]
    lines = [
        "# Methods side by side",
        "",
        "Sounding Sprites with pulsing drawings (`tests/benchmarks/compare.py`): the sounds of the",
        "test fold and a third of the drawings are in no training clip. All entries train for the",
        "same time. Means over folds; brackets: 95 % bootstrap interval over source sounds. cIoU:",
        "share of clips above 0.5 by three rules for the region that a map names.",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
        *(_line(name, entry) for name, entry in found.items()),
        "",
    ]
    if found:
        first = next(iter(found.values()))
        machine = first["machine"]
        lines += [
            f"A map that is a Gaussian in the middle of the picture: {_ciou(first, 'center')}.",
            "",
            f"Seed {first['seed']}; {machine['processor']}, {machine['cores']} cores, "
            f"{machine['device']}; torch {first['versions']['torch']}.",
            "",
        ]
    return "\n".join(lines)


def _line(name: str, entry: dict[str, Any]) -> str:
    cells = [name]
    for path, _ in COLUMNS:
        cell = entry["metrics"].get(path)
        low, high = cell["ci"] if cell else (0.0, 0.0)
        cells.append(f"{cell['mean']:.3f} [{low:.2f}, {high:.2f}]" if cell else "-")
    cells += _rules(entry, "model")
    cells.append(_range(entry["steps"]))
    return f"| {' | '.join([*cells, ', '.join(map(str, entry['folds']))])} |"


def _rules(entry: dict[str, Any], what: str) -> list[str]:
    out = []
    for rule, _ in CIOU:
        at, auc = (
            entry["metrics"][f"localization.ciou.{what}.{rule}.{name}"]["mean"]
            for name in ("at_0.5", "auc")
        )
        out.append("-" if at is None else f"{at:.3f} ({auc:.3f})")
    return out


def _ciou(entry: dict[str, Any], what: str) -> str:
    values = zip(CIOU, _rules(entry, what), strict=True)
    return ", ".join(f"{title} {value}" for (_, title), value in values)


def _range(values: Sequence[float]) -> str:
    low, high = (results.number(f(values), 0) for f in (min, max))
    return low if low == high else f"{low} to {high}"


def save(work: Path, seed: int, out: Path) -> None:
    """Write `compare.json` and `compare.md` of what is finished under `work`."""
    found = {}
    for name in ENTRIES:
        jobs = [_job(name, fold, work, seed) for fold in FOLDS]
        done = [job for job in jobs if job.mark("evaluated").exists()]
        if done:
            found[name] = row(done)
    results.write(found, out / "compare.json")
    notes = out / "compare.notes.md"
    text = notes.read_text(encoding="utf-8") if notes.exists() else ""
    (out / "compare.md").write_text(markdown(found) + text, encoding="utf-8")
    print(out / "compare.md", f"({len(found)} entries)", flush=True)


def _job(name: str, fold: int, work: Path, seed: int, step: str = "") -> Job:
    """Of one entry; `step`: the folder in place of the fold's."""
    config, overrides = ENTRIES[name]
    folder = name.replace(",", "").replace(" ", "_").replace("%", "percent")
    return Job(
        variant="pulsing",
        fold=fold,
        data=Path(),
        folder=work / (step or f"fold{fold}") / folder,
        counts=COUNTS,
        config=config,
        overrides=overrides,
        seed=seed,
        workers=2,
        shards=work / f"fold{fold}" / "shards",
    )


def main() -> None:
    """Compute what is missing, fold by fold, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with esc10 and sprites")
    add("--work", type=Path, default=Path("runs/compare"))
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--folds", type=int, nargs="+", choices=FOLDS, default=FOLDS)
    add("--names", nargs="+", choices=list(ENTRIES), default=list(ENTRIES), metavar="NAME")
    add("--seconds", type=float, default=300.0, help="of one core for the training of a fold")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    _shards(args, FOLDS[0])
    steps = {}
    for name in args.names:
        timing = _job(name, FOLDS[0], args.work, args.seed, step="timing")
        steps[name] = max(TIMED, round(args.seconds / seconds_per_step(timing)))
    for fold in args.folds:
        _shards(args, fold)
        for name in args.names:
            compute(_job(name, fold, args.work, args.seed), steps[name])
            save(args.work, args.seed, args.out)


def _shards(args: argparse.Namespace, fold: int) -> None:
    job = _job(args.names[0], fold, args.work, args.seed)
    make_shards(replace(job, data=args.data, folder=args.work / f"fold{fold}", shards=None))


if __name__ == "__main__":
    main()
