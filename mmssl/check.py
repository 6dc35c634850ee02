"""`mmssl show` prints the flow of a method; `mmssl check` runs it on a made-up batch.

Letters: B rows of the batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmssl import config
from mmssl.stages import LABELS, Stage, about, is_staged, plan
from mmssl.storage import is_address
from mmssl.types import Batch, FrameLabels, Term, UserError, ViewBatch

if TYPE_CHECKING:
    import torch

    from mmssl.model import Model
    from mmssl.specs import RunSpec, SegmentsSpec, TaskSpec, UnitTargetSpec, ViewSpec

VOCABULARY = 512  # of the made-up tokenizer, where the run names none
SPECIAL = {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 4}
BEGINS = tuple(i > max(SPECIAL.values()) and i % 3 > 0 for i in range(VOCABULARY))


def show(file: str, overrides: Sequence[str] = ()) -> None:
    """Print what a run reads, encodes and learns, with the shape of every view."""
    if is_staged(file):
        rows = [_stage_row(stage) for stage in plan(file, overrides)]
        print(table(rows, ("stage", "does", "with", "into")))
        return
    spec = config.load(file, list(overrides))
    model = _model(spec)
    print(f"{spec.name}  (config {config.digest(spec)}, {_millions(model)} parameters)\n")
    print(table(_view_rows(spec, model), ("view", "window", "data", "tower", "tokens", "width")))
    print()
    print(table(_task_rows(spec), ("task", "kind", "reads", "objective", "weight")))


def check(file: str, overrides: Sequence[str] = ()) -> None:
    """Build a run, or every run of a file with stages, and take one step on a made-up batch.

    Some of its rows lack a modality.

    Raises:
        UserError: the run cannot work; every problem is named.
    """
    if not is_staged(file):
        _check_run(file, config.load(file, list(overrides)))
        return
    for stage in plan(file, overrides):
        print("  ".join(_stage_row(stage)))
        if stage.run is not None:
            with about(stage.place):
                _check_run(stage.name, stage.run)


def _check_run(file: str, spec: RunSpec) -> None:
    import torch

    torch.manual_seed(spec.train.seed)
    model = _model(spec).train()
    batch = fake_batch(spec, rows=4)
    start = time.perf_counter()
    loss, terms = model(batch, 0, spec.train.steps)
    loss.backward()
    seconds = time.perf_counter() - start
    labels = judge_labels(model, spec)
    problems = _problems(model, loss, terms) + labels.problems
    if problems:
        raise UserError(f"{file}: " + "; ".join(problems))
    print(f"{spec.name}: {_millions(model)} parameters, one step of 4 rows in {seconds:.2f} s")
    values = {name: float(t.sum / t.count.clamp(min=1)) for name, t in terms.items()}
    rows = [(name, f"{value:.4f}", f"{int(terms[name].count)}") for name, value in values.items()]
    print(table(rows, ("term", "value", "count")))
    resting = [f"the terms of `{n}`: it starts without rows" for n in model.resting()]
    for absent in [*resting, *labels.absent]:
        print(f"not checked: {absent}")
    print("ok: every parameter is used, every term is finite")


def _stage_row(stage: Stage) -> tuple[str, ...]:
    if stage.run is not None:
        return (stage.name, "train", stage.run.name, str(stage.folder))
    assert stage.label is not None
    clusters = ", ".join(map(str, stage.label.clusters))
    layer = f", layer {stage.label.layer}" if stage.label.layer else ""
    what = f"{clusters} clusters of {stage.label.features}{layer}"
    return (stage.name, "label", what, str(stage.folder / LABELS))


def _problems(model: Model, loss: torch.Tensor, terms: dict[str, Term]) -> list[str]:
    out = [
        f"{n} has no dimension: give it shape (1,)"
        for n, t in model.state_dict().items()
        if t.ndim == 0
    ]
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        out.append(
            f"unused parameters {', '.join(unused[:8])}: remove their part, or add a task that "
            "reads it"
        )
    bad = [
        n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    ]
    if bad:
        out.append(f"gradient is not finite in {', '.join(bad[:8])}")
    wild = [f"{n} is {float(t.sum)}" for n, t in terms.items() if not bool(t.sum.isfinite().all())]
    if wild or not bool(loss.isfinite()):
        out.append(f"terms are not finite: {', '.join(wild) or 'their weights'}")
    return out


class LabelReport(NamedTuple):
    """What is wrong with the labels that a run predicts, and what could not be looked at."""

    problems: list[str]
    absent: list[str]


def judge_labels(model: Model, spec: RunSpec) -> LabelReport:
    """Hold frame labels against the shards, towers and classes of the run; reads them whole, once.

    Of labels that come from clustering clips: hold the number of clips against the shards.

    Raises:
        UserError: a file is no side-car, or those of a label set fit neither each other nor a
            folder of `data.train`.
    """
    from mmssl.data.labels import listed
    from mmssl.data.sidecars import MAKE

    report = LabelReport([], [])
    for task_name, task in spec.tasks.items():
        if task.kind == "classify" and task.target.kind == "clusters":
            key = f"tasks.{task_name}.target.clips"
            report.problems.extend(_clip_problems(spec, key, task.target.clips))
        if task.kind != "masked" or task.target.kind != "units":
            continue
        view = spec.views[task.view]
        hz = model.towers[view.tower_name].token_rate(_rate(view))  # type: ignore[operator]
        for name, sizes in task.target.classes.items():
            key = f"tasks.{task_name}.target.classes.{name}"
            files = listed(spec.data.frame_labels.get(name, []))
            lacking = next((file for file in files if not Path(file).is_file()), None)
            if lacking or not files:
                what = f"{lacking}, which is not there" if lacking else "no side-car"
                report.absent.append(f"{key}: data.frame_labels.{name} names {what}; {MAKE}")
            else:
                classes = [sizes] if isinstance(sizes, int) else list(sizes)
                report.problems.extend(_label_problems(spec, name, key, classes, hz))
    return report


def need_labels(model: Model, spec: RunSpec) -> None:
    """Refuse to train on labels that are missing or degenerate (`judge_labels`).

    Raises:
        UserError: they are; every problem is named.
    """
    report = judge_labels(model, spec)
    if report.absent or report.problems:
        raise UserError("; ".join(report.absent + report.problems))


def _label_problems(
    spec: RunSpec, name: str, key: str, classes: list[int], hz: float
) -> Iterator[str]:
    from mmssl.data.folders import read_manifest
    from mmssl.data.labels import LabelBook, check, listed
    from mmssl.data.sidecars import SideCar, shards_digest

    folders = _folders(spec)
    samples = {shards_digest(f): sum(s.samples for s in read_manifest(f)) for f in folders}
    files = {name: listed(spec.data.frame_labels[name])}
    cars = LabelBook.open(files, folders, required=True).cars[name]
    for car in cars or map(SideCar, files[name]):  # without shards every file is looked at
        has = list(car.info.classes)
        if has != classes:
            yield f"{key}: {classes} classes, but {car.path} has {has}; give those, or other labels"
        for problem in check(car, hz, samples.get(car.info.shards)):
            yield f"data.frame_labels.{name}: {problem}"


def _clip_problems(spec: RunSpec, key: str, clips: int) -> Iterator[str]:
    """Clips are in the order of their numbers: the last one has the highest."""
    from mmssl.data.folders import read_manifest
    from mmssl.data.ordered import eval_batches

    for folder in _folders(spec):
        last = sum(shard.samples for shard in read_manifest(folder)) - 1
        for batch in eval_batches(folder, spec.data, {}, 1, None, workers=0, rows=[last]):
            count = int(batch.index_B[0]) + 1
            if not count <= clips <= 2 * count:  # with many more the first labels come late
                numbers = f"the clips of {folder} have the numbers up to {count - 1}"
                yield f"{key}: {clips}, but {numbers}; give {count}"


def _folders(spec: RunSpec) -> list[str]:
    """The folders of `data.train` that are there."""
    from mmssl.data.labels import listed

    return [f for f in listed(spec.data.train) if f and (is_address(f) or Path(f).is_dir())]


def fake_batch(spec: RunSpec, rows: int = 4, seed: int = 0, missing: bool = True) -> Batch:
    """Random data in the shape of the run's views; row i lacks modality i if `missing`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    order = ("text", "audio", "video")
    present = {m: torch.ones(rows, dtype=torch.bool) for m in order}
    if missing and rows > len(order):
        for i, modality in enumerate(order):
            present[modality][i] = False
    views = {
        name: _fake_view(name, view, present[view.modality], generator)
        for name, view in spec.views.items()
    }
    for task in spec.tasks.values():
        if task.kind == "masked" and task.target.kind == "units":
            views[task.view].labels = _fake_units(task.target, views[task.view], generator)
    ids = torch.arange(rows)
    text = torch.where(present["text"], ids + 1, torch.zeros_like(ids))
    meta = [_fake_labels(spec, i) for i in range(rows)]
    return Batch(views, [f"row-{i}" for i in range(rows)], ids + 1000, text, ids, meta)


def _fake_view(
    name: str, view: ViewSpec, present_B: torch.Tensor, generator: torch.Generator
) -> ViewBatch:
    import torch

    from mmssl.build import data_shape

    rows = present_B.nonzero()[:, 0].repeat_interleave(view.candidates)
    slots = torch.arange(view.candidates).repeat(int(present_B.sum()))
    count, shape = len(rows), data_shape(name, view)
    if view.codes is not None:
        data = torch.randint(2, view.codes.vocabulary, (count, *shape), generator=generator)
    elif view.modality == "audio":
        data = 0.1 * torch.randn(count, *shape, generator=generator)
    elif view.modality == "video":
        data = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    else:
        data = torch.randint(
            max(SPECIAL.values()) + 1, VOCABULARY, (count, *shape), generator=generator
        )
        data[:, -1] = SPECIAL["eos"]
    segments = {} if view.segments is None else _fake_segments(data, view.segments, generator)
    return ViewBatch(
        modality=view.modality,
        data=data,
        lengths_P=torch.full((count,), shape[0]),
        rows_P=rows,
        slots_P=slots,
        seeds_P=torch.randint(0, 2**62, (count,), generator=generator),
        start_s_P=torch.zeros(count),
        present_BL=present_B[:, None].expand(-1, view.candidates).clone(),
        rate=_rate(view),
        split_P=segments.get("split_P"),
        order_P=segments.get("order_P"),
    )


def _rate(view: ViewSpec) -> float:
    """Samples or frames per second; 0 for text."""
    return {"audio": float(view.hz), "video": view.fps, "text": 0.0}[view.modality]


def _fake_segments(
    data: torch.Tensor, spec: SegmentsSpec, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Puts the markers of one segment or two into random ids."""
    import torch

    count, length = data.shape
    data[:, 0] = SPECIAL["bos"]
    if spec.pairing == "single":
        return {"split_P": torch.zeros(count).long(), "order_P": torch.full((count,), -1)}
    split_P = torch.randint(3, length - 1, (count,), generator=generator)
    data[torch.arange(count), split_P - 1] = SPECIAL["eos"]
    return {
        "split_P": split_P,
        "order_P": torch.randint(0, 2, (count,), generator=generator),
    }


def _fake_units(
    target: UnitTargetSpec, view: ViewBatch, generator: torch.Generator
) -> dict[str, FrameLabels]:
    """Random cluster ids at 100 Hz, or at the frames of a video."""
    import torch

    from mmssl.data.labels import label_count

    hz = 100.0 if view.modality == "audio" else view.rate
    count = label_count(view.data.shape[1], view.rate, hz)
    found = {}
    for name, sizes in target.classes.items():
        books = [sizes] if isinstance(sizes, int) else sizes
        ids = [
            torch.randint(size, (len(view.data), count, 1), generator=generator) for size in books
        ]
        found[name] = FrameLabels(torch.cat(ids, -1), hz)
    return found


def _fake_labels(spec: RunSpec, row: int) -> dict[str, str]:
    targets: list[Any] = [
        t.target for t in spec.tasks.values() if t.kind == "classify" and t.target.kind == "label"
    ]
    for task in spec.tasks.values():
        if task.kind == "reconstruct" and task.decoder.kind == "wavenet" and task.decoder.speaker:
            targets.append(task.decoder.speaker)
    known = {t.field: t.classes[row % len(t.classes)] for t in targets}
    for task in spec.tasks.values():
        if task.kind == "masked" and task.target.kind == "codes" and row > 0:
            said = task.target.transcripts  # the first row has none
            known |= {} if said is None else {said.field: " ".join(said.symbols[:row])}
    return known


def _model(spec: RunSpec) -> Model:
    from mmssl.build import build_model

    return build_model(spec, VOCABULARY, SPECIAL, BEGINS)


def _millions(model: Model) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"


def _view_rows(spec: RunSpec, model: Model) -> list[tuple[str, ...]]:
    from mmssl.build import data_shape

    rows: list[tuple[str, ...]] = []
    for name, view in spec.views.items():
        tower_name = view.tower_name
        tower = model.towers[tower_name]
        shape = data_shape(name, view)
        grid = " x ".join(map(str, tower.grid_of(shape)))  # type: ignore[operator]
        data = " x ".join(map(str, shape))
        rows.append((name, view.window, data, tower_name, grid, str(tower.width)))
    return rows


def _task_rows(spec: RunSpec) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, task in spec.tasks.items():
        if task.kind != "pairs":
            rows.append((name, task.kind, *_flow(task), str(task.weight)))
            continue
        for key, pair in task.pairs.items():
            what = f"{pair.objective.kind} on {pair.score.kind} in {pair.space or 'its space'}"
            if pair.score.kind == "map":
                what = f"{pair.objective.kind} on the map"
            weight = f"{task.weight} x {pair.weight}"
            rows.append((f"{name}.{key}", "pairs", " ~ ".join(pair.between), what, weight))
    return rows


def _flow(task: TaskSpec) -> tuple[str, str]:
    """What a task other than `pairs` reads, and what it makes of that."""
    if task.kind == "masked":
        return task.view, f"{task.target.kind}, {task.mask.rule} {task.mask.ratio}"
    if task.kind == "future":
        reads = " -> ".join(filter(None, (task.view, task.predicts)))
        return reads, f"{task.target.kind}, {task.steps} steps"
    if task.kind == "siamese":
        target = "itself" if task.decay is None else "its average"
        return " ~ ".join(task.between), f"{task.objective.kind}, target {target}"
    if task.kind == "prototypes":
        assigned = f"assigned: {len(task.assigned)} of the views"
        return " ~ ".join(task.views), f"{task.prototypes} prototypes, {assigned}"
    if task.kind == "reconstruct":
        return task.view, f"said by {task.decoder.kind}"
    if task.kind == "separate":
        sounds = f"{task.sounds} sounds into {task.outputs}"
        return task.view, f"{task.objective.kind}, {sounds}"
    if task.kind == "regress":
        return task.view, f"{task.error} error of {task.signal.kind}"
    if task.kind == "alignment":
        return "two tables", f"critic against mapping, {task.critic_steps} : 1"
    assert task.kind == "classify"  # `pairs` have rows of their own
    asked = task.target
    if asked.kind == "match":
        return " ~ ".join(asked.between), f"match by {task.score.kind}"
    return asked.view, f"label {asked.field}" if asked.kind == "label" else asked.kind


def table(rows: Iterable[Sequence[str]], head: Sequence[str]) -> str:
    """Columns of text under a head."""
    rows = list(rows)
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
