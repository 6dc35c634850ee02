"""What a checkpoint holds, how it is found, and how a run continues from it exactly.

    RUN/checkpoints/step-00000100/   RUN/best/step-00000100/ (only the files marked *)
        weights.safetensors *      whole fp32 weights and buffers
        ema.safetensors *          the same with averaged weights, where the run averages
        config.yaml * tokenizer.model * manifest.json *
        deepspeed/                 DeepSpeed's shards: optimiser state, partitioned weights
        ranks/00000.pt             loader position and random states of each rank

Nothing is loaded that could run code: safetensors, and pickles of tensors and plain values only.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mmssl import dist
from mmssl.files import sha256
from mmssl.partition import cut, piece
from mmssl.rng import seed_of
from mmssl.train.commit import (
    MANIFEST,
    TEMPORARY,
    Writer,
    commit,
    problem,
    read_manifest,
    write_text,
)
from mmssl.train.copies import Copies
from mmssl.train.elastic import Layout
from mmssl.train.engine import Engine
from mmssl.train.preempt import StopRequest
from mmssl.train.randomness import random_state, seed_all, set_random_state
from mmssl.train.safe import load_plain
from mmssl.train.turns import Turns
from mmssl.train.watchdog import Watchdog
from mmssl.train.weights import Average, shapes, whole_state
from mmssl.types import Batch, UserError

WEIGHTS, EMA, LATEST = "weights.safetensors", "ema.safetensors", "latest"
TOKENIZER = "tokenizer.model"
_STEPS = "step-????????"


class Loader(Protocol):
    """Endless batches of this rank, from a position that can be saved.

    skipped: samples left out so far, by reason.
    """

    skipped: dict[str, int]

    def __next__(self) -> Batch:
        """The next micro-batch."""

    def state(self) -> Any:
        """The position, of tensors and plain values."""

    def restore(self, state: Any) -> None:
        """Go on from a position."""

    def redistribute(self, states: Sequence[Any]) -> None:
        """Go on from the positions of all ranks of a run of another size."""

    def close(self) -> None:
        """Stop reading."""


@dataclass
class Progress:
    """Where a run stands.

    `best` and `waited` (evaluations without improvement) steer stopping; `evaluated` is the step of
    the last evaluation. `skipped` counts steps that were left out for a loss or gradient that was
    not finite.
    """

    step: int = 0
    elapsed_s: float = 0.0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    stopped: str = ""
    evaluated: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    rollbacks: int = 0


@dataclass
class Job:
    """The parts of a running training whose state must survive."""

    folder: Path
    config: str
    digest: str
    engine: Engine | Turns
    loader: Loader
    layout: Layout
    average: Average | None
    progress: Progress
    stop: StopRequest
    watch: Watchdog
    copies: Copies | None = None


# ---------------------------------------------------------------- save and restore


def save(job: Job) -> Path:
    """Write the checkpoint of the present step; every rank calls it."""
    target = job.folder / "checkpoints" / _name(job.progress.step)

    def write(writer: Writer) -> None:
        _write_weights(job, writer)
        job.engine.save(writer, "deepspeed")
        state = {"loader": job.loader.state(), "random": random_state()}
        writer.file(_rank_file(dist.rank()), lambda path: torch.save(state, path))

    commit(target, write, _facts(job))
    if dist.rank() == 0:
        with suppress(OSError):  # only advice
            write_text(target.parent / LATEST, target.name)
        if job.copies is not None:
            job.copies.put(target)
    return target


def prune(run: Path, step: int, keep_last: int, keep_every: int, spare: Path | None = None) -> None:
    """Remove checkpoints that the policy does not keep, and what interrupted saves have left.

    Of those up to `step`, which has just been saved, the newest `keep_last` (0: all) stay, and
    those of steps that `keep_every` divides. Later ones, which a run that went back has left, are
    not looked at: they may be damaged. `spare` stays for now, and what cannot be removed.
    """
    if dist.rank():
        return
    folder = run / "checkpoints"
    for left in folder.glob(f"step-*{TEMPORARY}"):
        shutil.rmtree(left, ignore_errors=True)
    steps = sorted(path for path in folder.glob(_STEPS) if path.name <= _name(step))
    for old in steps[:-keep_last] if keep_last else []:
        if old != spare and (not keep_every or int(old.name.removeprefix("step-")) % keep_every):
            # never half a folder under a name that counts
            with suppress(OSError):
                shutil.rmtree(old.rename(old.with_name(old.name + TEMPORARY)))


def save_best(job: Job) -> Path:
    """Write the weights of the present step as the best so far; every rank calls it."""
    target = job.folder / "best" / _name(job.progress.step)
    commit(target, lambda writer: _write_weights(job, writer), _facts(job), replace=True)
    if dist.rank() == 0:
        for older in sorted(target.parent.glob("step-*")):
            if older != target:
                shutil.rmtree(older, ignore_errors=True)
    return target


def restore(job: Job, folder: Path, data: bool = True) -> None:
    """Put a job back to where a checkpoint was taken; every rank calls it.

    Without `data` its loader stays where it is.

    Raises:
        UserError: another ZeRO stage or another model.
    """
    manifest = read_manifest(folder)
    _check_fit(job, folder, manifest)
    ranks = int(manifest["world_size"])
    job.engine.load(folder / "deepspeed", ranks)
    if job.average is not None:
        _restore_average(job.average, job.engine.model, folder)
    job.progress = Progress(**manifest["progress"])
    if ranks == dist.world_size():
        state = load_plain(folder / _rank_file(dist.rank()))
        if data:
            job.loader.restore(state["loader"])
        set_random_state(state["random"])
    else:
        _restore_untrained(job.engine.model, folder)
        states = [load_plain(folder / _rank_file(rank)) for rank in range(ranks)]
        if data:
            job.loader.redistribute([state["loader"] for state in states])
        seed_all(seed_of(job.progress.step, manifest["digest"], dist.rank()))


def _write_weights(job: Job, writer: Writer) -> None:
    first, model = dist.rank() == 0, job.engine.model
    files: dict[str, Mapping[str, Tensor] | None] = {WEIGHTS: None}
    if job.average is not None:
        files[EMA] = job.average.pieces
    for name, pieces in files.items():
        state = whole_state(model, pieces, keep=first)
        if first:
            writer.tensors(name, state, job.digest)
    if first:
        writer.file("config.yaml", lambda path: path.write_text(job.config))
        if (job.folder / TOKENIZER).is_file():
            writer.file(TOKENIZER, partial(shutil.copyfile, job.folder / TOKENIZER))


def _facts(job: Job) -> dict[str, Any]:
    return {
        "step": job.progress.step,
        "world_size": dist.world_size(),
        "workers": job.layout.workers,
        "rows": job.layout.rows,
        "zero": job.engine.stage,
        "digest": job.digest,
        "tokenizer_sha256": _sha256(job.folder / TOKENIZER),
        "progress": asdict(job.progress),
    }


def _check_fit(job: Job, folder: Path, manifest: Mapping[str, Any]) -> None:
    if manifest["zero"] != job.engine.stage:
        raise UserError(
            f"{folder}: written with train.zero={manifest['zero']}, this run has "
            f"{job.engine.stage}; resume with train.zero={manifest['zero']}"
        )
    if manifest["tokenizer_sha256"] != _sha256(job.folder / TOKENIZER):
        raise UserError(
            f"{job.folder / TOKENIZER}: is not the one of the checkpoint; copy it back from "
            f"{folder / TOKENIZER}"
        )
    with safe_open(folder / WEIGHTS, framework="pt") as stored:
        theirs = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    ours = shapes(job.engine.model)
    odd = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    if odd:
        raise UserError(
            f"{folder}: the run's model differs from the saved one in {len(odd)} tensors, first "
            f"`{odd[0]}` (saved {theirs.get(odd[0])}, now {ours.get(odd[0])}); resume without "
            "overrides of `towers`, `tasks`, `views` and `shared`, or start a new run with `init`"
        )


@torch.no_grad()
def _restore_untrained(model: nn.Module, folder: Path) -> None:
    """Buffers and frozen parameters, which are no part of DeepSpeed's universal checkpoint."""
    whole = load_file(folder / WEIGHTS)
    for name, buffer in model.named_buffers():
        if name in whole:  # the others are not saved
            buffer.copy_(whole[name])
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            piece(parameter).copy_(cut(parameter, whole[name]))
            if parameter.shape == whole[name].shape:  # gathered, at ZeRO-3
                parameter.copy_(whole[name])


def _restore_average(average: Average, model: nn.Module, folder: Path) -> None:
    if not (folder / EMA).is_file():
        raise UserError(f"{folder}: has no {EMA}; resume with optim.ema=0, as it was saved")
    average.load(model, load_file(folder / EMA))


# ---------------------------------------------------------------- find and read


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, by its files alone: `latest` is not asked."""
    for folder in sorted((run / "checkpoints").glob(_STEPS), reverse=True):
        if not problem(folder):
            return folder
    return None


def newest_for_all(run: Path) -> Path | None:
    """As `newest`, with the same answer on all ranks, which share the reading; a collective.

    A checkpoint that one rank does not see as it was written is none.
    """
    steps = dist.on_rank0(lambda: sorted((run / "checkpoints").glob(_STEPS), reverse=True))
    for folder in steps:
        if not any(dist.gather_objects(problem(folder, dist.world_size(), dist.rank()))):
            return folder
    return None


def find(path: str | Path, which: str = "best") -> Path:
    """The checkpoint folder that `path` means.

    Args:
        path: a run folder or a checkpoint folder.
        which: `best` is the best checkpoint of `validation.metric`, and the newest one in a run
            that keeps no best; `last` is the newest complete checkpoint.

    Raises:
        UserError: there is none, or it is damaged (names the file).
    """
    run = Path(path)
    if which not in ("best", "last"):
        raise UserError(f"which={which}: expected best or last")
    if (run / MANIFEST).is_file():
        if damage := problem(run):
            raise UserError(f"{damage}; choose another checkpoint of the run")
        return run
    best = sorted((run / "best").glob(_STEPS), reverse=True) if which == "best" else []
    found = next((folder for folder in best if not problem(folder)), None) or newest(run)
    if found is None:
        raise UserError(f"{run}: no complete checkpoint here; expected RUN/checkpoints/step-*")
    return found


def load_weights(path: str | Path, ema: bool = False, which: str = "best") -> dict[str, Tensor]:
    """Whole fp32 weights and buffers by name, on the CPU.

    Args:
        path: a run folder, a checkpoint folder or a safetensors file.
        ema: the averaged weights instead of the trained ones.
        which: see `find`.

    Raises:
        UserError: nothing there, damaged, or the run does not average its weights.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        file = find(path, which) / (EMA if ema else WEIGHTS)
    if not file.is_file():
        why = "; the run does not average weights (optim.ema=0)" if ema else ""
        raise UserError(f"{file}: no such file{why}")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: not a safetensors file: {error}") from error


def _rank_file(rank: int) -> str:
    return f"ranks/{rank:05d}.pt"


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _sha256(path: Path) -> str:
    return sha256(path) if path.is_file() else ""
