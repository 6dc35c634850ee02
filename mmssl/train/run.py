"""`mmssl train` and `mmssl resume`: from a configuration to a run folder.

RUN/config.yaml tokenizer.model      what is needed to go on
RUN/log.jsonl tensorboard/           numbers of every logged step
RUN/skipped.jsonl quarantine.jsonl   samples the loader left out, and will not try again
RUN/checkpoints/ best/               see `checkpoint`
RUN/summary.json                     duration and rates, when training has ended
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from mmssl import config, dist
from mmssl.build import build_model
from mmssl.check import need_labels
from mmssl.data.draws import Draws
from mmssl.data.loader import train_loader
from mmssl.data.text import Tokenizer
from mmssl.model import Model, need_tasks
from mmssl.rng import seed_of
from mmssl.specs import RunSpec
from mmssl.storage import is_address
from mmssl.train import checkpoint, elastic, preempt
from mmssl.train.checkpoint import Job, Loader, Progress
from mmssl.train.commit import read_manifest, replace_file, write_text
from mmssl.train.copies import Copies, fetch
from mmssl.train.elastic import Layout
from mmssl.train.engine import Trainable, session
from mmssl.train.loop import train
from mmssl.train.meters import Meters
from mmssl.train.preempt import StopRequest
from mmssl.train.randomness import seed_all
from mmssl.train.start import load_start_weights
from mmssl.train.turns import make_engine
from mmssl.train.validate import Evaluate, Validator
from mmssl.train.watchdog import Watchdog
from mmssl.train.weights import Average, shapes
from mmssl.types import PREEMPTED, UserError

_LISTS = ("skipped", "quarantine")
_GRACE_S = 20.0  # for the last copy where the machine is about to go
_OURS = ("log.jsonl", "checkpoints", "best", "summary.json")


def main(file: str, overrides: Sequence[str] = ()) -> int:
    """Train a configuration in its run folder; goes on where the same run was interrupted.

    Returns the exit code: `types.PREEMPTED` after a request to stop, else 0.

    Raises:
        UserError: bad configuration or data, or the folder belongs to another run.
    """
    spec = config.load(file, overrides)
    with session(spec.train.threads, spec.train.hang_s) as device:
        return start(spec, device)


def start(spec: RunSpec, device: torch.device) -> int:
    """As `main`, in an open `engine.session`."""
    folder = run_folder(spec)
    dist.on_rank0(lambda: open_folder(spec, folder))
    return _run(spec, folder, device)


def resume(run_dir: str, overrides: Sequence[str] = ()) -> int:
    """Go on with a run from its newest complete checkpoint; everything is found in its folder.

    Returns the exit code, see `main`.

    Raises:
        UserError: no run or no complete checkpoint there, or it does not fit the overrides.
    """
    folder = Path(run_dir)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no config.yaml here; a run folder is what `mmssl train` wrote")
    spec = config.load(folder / "config.yaml", overrides)
    with session(spec.train.threads, spec.train.hang_s) as device:
        return _run(spec, folder, device, again=True)


@dataclass(frozen=True)
class Parts:
    """What a run is put together from, besides its configuration."""

    make_model: Callable[[], nn.Module]
    make_loader: Callable[[Layout], Loader]
    evaluate: Evaluate
    # of a new run: refuses bad labels, and loads the weights of `init` entries
    load_start: Callable[[nn.Module], None] | None = None


def fit(
    spec: RunSpec, parts: Parts, folder: Path, device: torch.device, again: bool = False
) -> Progress:
    """Train in an opened folder, from its newest complete checkpoint if there is one.

    Args:
        spec: `optim`, `train` and `validation` are read; the parts know the rest.
        parts: model factory, loader and evaluation.
        folder: run folder, which holds config.yaml.
        device: of `engine.session`, in which this runs.
        again: there must be a checkpoint, and a run that was stopped early goes on.

    Returns:
        where it ended; `stopped` is `preempt.REASON` after a request, though all steps be done.

    Raises:
        UserError: see `loop.train`, `checkpoint.restore` and `validate.judge`.
    """
    with StopRequest().listening() as stop:
        progress = _fit(spec, parts, folder, device, again, stop)
        if stop.agreed():  # also where it came too late for a step: other stages may follow
            progress.stopped = preempt.REASON
        return progress


def _fit(
    spec: RunSpec, parts: Parts, folder: Path, device: torch.device, again: bool, stop: StopRequest
) -> Progress:
    watch = Watchdog(spec.train.hang_s)
    with watch.watching():  # each of the steps on the way has the limit
        found = checkpoint.newest_for_all(folder)
        if found is None and spec.train.copy_to:
            watch.beat()
            here = folder / "checkpoints"
            dist.on_rank0(lambda: fetch(spec.train.copy_to, here, config.digest(spec)))
            found = checkpoint.newest_for_all(folder)
        if again and found is None:
            raise UserError(f"{folder}: no complete checkpoint; start again with `mmssl train`")
        layout = elastic.layout(spec, dist.world_size(), read_manifest(found) if found else None)
        watch.beat()
        loader = parts.make_loader(layout)
    try:
        with watch.watching():
            job = _job(spec, parts, folder, device, stop, watch, loader, layout, found is None)
            if found:
                watch.beat()
                checkpoint.restore(job, found)
                if again:
                    job.progress.stopped, job.progress.waited = "", 0
        return _train(spec, parts, job)
    finally:
        loader.close()


def _train(spec: RunSpec, parts: Parts, job: Job) -> Progress:
    dist.on_rank0(lambda: write_text(job.folder / "config.yaml", job.config))
    progress = job.progress
    floors = cast("Trainable", job.engine.model).floors
    meters = Meters(
        job.folder, spec.train, job.engine.device, progress.step, progress.elapsed_s, floors
    )
    validator = None
    if spec.validation.every:
        go_on = spec.train.on_save_error == "continue"
        validator = Validator(spec.validation, parts.make_model, parts.evaluate, go_on)
    meters.message(_headline(spec, job))
    if spec.train.copy_to:  # on all ranks, so that a bad address is known to all
        job.copies = Copies(spec.train.copy_to, meters.message)
    try:
        with job.watch.watching():
            train(spec, job, meters, validator)
        _summarise(job, meters)
    finally:
        if job.copies is not None:
            job.copies.close(_GRACE_S if job.progress.stopped == preempt.REASON else None)
        meters.close()
        job.engine.close()
    return job.progress


# ---------------------------------------------------------------- run folder


def run_folder(spec: RunSpec) -> Path:
    """Where the run lives: `out`, or runs/<name>."""
    return Path(spec.out or f"runs/{spec.name}")


def open_folder(spec: RunSpec, folder: Path) -> None:
    """Create a run folder, or accept the one of the very same run.

    Raises:
        UserError: the folder holds another run, or files as of a run; a data key is wrong.
    """
    need_tasks(spec)
    text, path = config.dump(spec), folder / "config.yaml"
    elsewhere = f"choose another folder with out=..., or remove {folder}"
    if path.is_file() and path.read_text() != text:
        raise UserError(
            f"{folder}: holds a run with another configuration; go on with it by "
            f"`mmssl resume {folder}`, {elsewhere}"
        )
    copy, source = folder / checkpoint.TOKENIZER, Path(spec.data.tokenizer)
    known = path.is_file()
    _check_data(spec, known and copy.is_file())
    foreign = [name for name in _OURS if (folder / name).exists()]
    if _has_text(spec) and copy.is_file() and not known:
        foreign += [copy.name] if copy.read_bytes() != source.read_bytes() else []
    if foreign and not known:
        raise UserError(f"{folder}: has {foreign[0]} of another origin; {elsewhere}")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    if _has_text(spec) and not copy.is_file():
        replace_file(copy, source.read_bytes())


def _check_data(spec: RunSpec, has_tokenizer: bool) -> None:
    if not spec.views:
        _check_tables(spec)
        return
    if not spec.data.train:
        raise UserError("data.train is empty: name a folder of shards (data_tools.make_shards)")
    folders = [spec.data.train] if isinstance(spec.data.train, str) else list(spec.data.train)
    keys = [("data.train", name) for name in folders]
    if spec.validation.every:
        keys.append(("data.val", spec.data.val))
    for key, name in keys:
        if not name or not (is_address(name) or Path(name).is_dir()):
            raise UserError(
                f"{key}={name}: no such folder; make shards with python -m data_tools.make_shards"
            )
    has_tokenizer = has_tokenizer or Path(spec.data.tokenizer).is_file()
    if _has_text(spec) and not has_tokenizer:
        raise UserError(
            f"data.tokenizer={spec.data.tokenizer}: no such file; train one with "
            "python -m data_tools.train_tokenizer"
        )


def _check_tables(spec: RunSpec) -> None:
    for name, task in spec.tasks.items():
        for key in ("source", "target"):
            path = getattr(task, key)
            if not Path(path).is_file():
                raise UserError(
                    f"tasks.{name}.{key}={path}: no such file; name a safetensors file with rows "
                    "of vectors under the key `weight`"
                )


def _has_text(spec: RunSpec) -> bool:
    return any(view.modality == "text" for view in spec.views.values())


# ---------------------------------------------------------------- assembly


def _run(spec: RunSpec, folder: Path, device: torch.device, again: bool = False) -> int:
    tokenizer = Tokenizer.load(folder / "tokenizer.model") if _has_text(spec) else None
    rank, world = dist.rank(), dist.world_size()
    skipped, quarantine = (
        folder / (f"{name}.jsonl" if world == 1 else f"{name}-{rank:05d}.jsonl") for name in _LISTS
    )

    def make_loader(layout: Layout) -> Loader:
        if not spec.views:
            return Draws(layout.rows * layout.joined, rank, world)
        return train_loader(
            spec.data.model_copy(update={"workers": layout.workers}),
            spec.views,
            layout.rows,
            spec.train.seed,
            rank,
            world,
            tokenizer,
            skipped,
            quarantine,
            layout.joined,
        )

    def make_model() -> nn.Module:
        if tokenizer is None:
            return build_model(spec)
        return build_model(spec, tokenizer.vocab_size, tokenizer.special, tokenizer.begins)

    def load_start(model: nn.Module) -> None:
        dist.on_rank0(lambda: need_labels(cast("Model", model), spec))
        load_start_weights(cast("Model", model), spec)

    def evaluate(model: nn.Module, clips: int) -> dict[str, float]:
        from mmssl.eval import alignment, suites

        if not spec.views:
            return alignment.quick(cast("Any", model))
        return suites.quick(cast("Any", model), spec, tokenizer, clips)

    parts = Parts(make_model, make_loader, evaluate, load_start)
    progress = fit(spec, parts, folder, device, again)
    return PREEMPTED if progress.stopped == preempt.REASON else 0


def _job(
    spec: RunSpec,
    parts: Parts,
    folder: Path,
    device: torch.device,
    stop: StopRequest,
    watch: Watchdog,
    loader: Loader,
    layout: Layout,
    fresh: bool,
) -> Job:
    # The run owns the global generators: weights start alike on all ranks, dropout differs.
    seed_all(seed_of(spec.train.seed, "weights"))
    model = parts.make_model().train()
    if fresh and parts.load_start is not None:
        parts.load_start(model)
    engine = make_engine(model, spec.optim, spec.train, device)
    average = Average(model) if spec.optim.ema != 0 else None
    seed_all(seed_of(spec.train.seed, "rank", dist.rank()))
    text, digest = config.dump(spec), config.digest(spec)
    return Job(folder, text, digest, engine, loader, layout, average, Progress(), stop, watch)


def _headline(spec: RunSpec, job: Job) -> str:
    size = sum(math.prod(shape) for shape in shapes(job.engine.model).values())
    train_spec, progress = spec.train, job.progress
    start = f", from step {progress.step}" if progress.step else ""
    return (
        f"{spec.name}: {size / 1e6:.1f} M numbers, {dist.world_size()} x {job.engine.device.type}, "
        f"ZeRO {train_spec.zero}, {train_spec.precision}, {train_spec.steps} steps of "
        f"{train_spec.batch} clips{start} -> {job.folder}"
    )


def _summarise(job: Job, meters: Meters) -> None:
    progress, rates = job.progress, meters.summary()
    facts = {
        "minutes": progress.elapsed_s / 60,
        "steps": progress.step,
        "stopped": progress.stopped,
        "best": progress.best,
        "best_step": progress.best_step,
        **rates,
    }
    path = job.folder / "summary.json"
    if rates["samples_per_s"] or not path.exists():
        dist.on_rank0(lambda: write_text(path, json.dumps(facts, indent=1)))
    reason = f"stopped at step {progress.step}: {progress.stopped}" if progress.stopped else "done"
    meters.message(f"{reason}, {progress.elapsed_s / 60:.1f} minutes -> {job.folder}")
