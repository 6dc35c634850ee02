"""Methods, and ablations of the flagship, side by side on Sounding Sprites in equal training time.

    python tests/benchmarks/compare.py --data DIR [--work runs/compare] [--seconds 300]
        [--folds 1 2] [--names flagship avol_net ...]

DIR and the folds are those of `sprites.py`, whose shards with pulsing drawings are made here once
for all. Of every entry a few steps are timed, alone on the machine, which tells how many steps fit
into --seconds; then it is trained with that many and evaluated (`bouncing`, `retrieval`) on the
test fold. Entries are computed fold by fold; all is kept under --work, so that an interrupted
benchmark goes on and its table grows. The text of `compare.notes.md` beside the table ends it.
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

TIMED = 12  # steps; the first ones are slower and count all the same
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


def compute(job: Job, seconds: float) -> None:
    """Time, train and evaluate one entry on one fold, each once."""
    train = [
        "mmssl.cli",
        "train",
        job.config,
        *shards_of(job),
        *job.overrides,
        "validate.every=0",
    ]
    timing = job.folder / "timing"
    once(job, "timed", [*train, f"out={timing}", f"train.steps={TIMED}", "train.save_every=0"])
    summary = json.loads((timing / "summary.json").read_text())
    steps = max(TIMED, round(seconds * TIMED / (60 * summary["minutes"])))
    once(job, "trained", [*train, f"out={job.run}", f"train.steps={steps}"])
    suites = (["mmssl.cli", "eval", suite, job.run, "report=false"] for suite in SUITES)
    once(job, "evaluated", *suites)


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
        "minutes": [results.lookup(f, "train.minutes") for f in files],
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
    titles += [f"{title} (AUC)" for _, title in CIOU] + ["steps", "minutes", "folds"]
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
    cells += [_range(entry["steps"], 0), _range(entry["minutes"], 1)]
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


def _range(values: Sequence[float], digits: int) -> str:
    low, high = (results.number(f(values), digits) for f in (min, max))
    return low if low == high else f"{low} to {high}"


def save(entries: dict[str, list[Job]], out: Path) -> None:
    """Write `compare.json` and `compare.md` of what is finished."""
    done = {n: [j for j in jobs if j.mark("evaluated").exists()] for n, jobs in entries.items()}
    found = {name: row(jobs) for name, jobs in done.items() if jobs}
    results.write(found, out / "compare.json")
    notes = out / "compare.notes.md"
    text = notes.read_text(encoding="utf-8") if notes.exists() else ""
    (out / "compare.md").write_text(markdown(found) + text, encoding="utf-8")
    print(out / "compare.md", f"({len(found)} entries)", flush=True)


def main() -> None:
    """Compute what is missing, fold by fold, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with esc10 and sprites")
    add("--work", type=Path, default=Path("runs/compare"))
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--folds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    add("--names", nargs="+", choices=list(ENTRIES), default=list(ENTRIES), metavar="NAME")
    add("--seconds", type=float, default=300.0, help="of training, by entry and fold")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    entries: dict[str, list[Job]] = {name: [] for name in args.names}
    for fold in args.folds:
        shards = Job(
            variant="pulsing",
            fold=fold,
            data=args.data,
            folder=args.work / f"fold{fold}",
            counts=(1500, 100, 5),
            config="",
            overrides=(),
            seed=args.seed,
            workers=2,
        )
        make_shards(shards)
        for name in args.names:
            config, overrides = ENTRIES[name]
            folder = shards.folder / name.replace(",", "").replace(" ", "_").replace("%", "percent")
            job = replace(shards, folder=folder, config=config, overrides=overrides)
            job = replace(job, shards=shards.folder / "shards")
            compute(job, args.seconds)
            entries[name].append(job)
            save(entries, args.out)


if __name__ == "__main__":
    main()
