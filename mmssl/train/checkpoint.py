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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmssl import dist
from mmssl.files import sha256
from mmssl.train.commit import MANIFEST, commit, problem, read_manifest, write_text
from mmssl.train.engine import Engine
from mmssl.train.randomness import random_state, set_random_state
from mmssl.train.safe import load_plain
from mmssl.train.weights import Average, shapes, whole_state
from mmssl.types import Batch, UserError

WEIGHTS, EMA, LATEST = "weights.safetensors", "ema.safetensors", "latest"
TOKENIZER = "tokenizer.model"


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


@dataclass
class Progress:
    """Where a run stands; `best` and `waited` (evaluations without improvement) steer stopping."""

    step: int = 0
    elapsed_s: float = 0.0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    stopped: str = ""


@dataclass
class Job:
    """The parts of a running training whose state must survive."""

    folder: Path
    config: str
    digest: str
    engine: Engine
    loader: Loader
    average: Average | None
    progress: Progress


# ---------------------------------------------------------------- save and restore


def save(job: Job) -> Path:
    """Write the checkpoint of the present step; every rank calls it."""
    target = job.folder / "checkpoints" / _name(job.progress.step)

    def write(folder: Path) -> None:
        _write_weights(job, folder)
        job.engine.save(folder / "deepspeed")
        (folder / "ranks").mkdir(exist_ok=True)
        state = {"loader": job.loader.state(), "random": random_state()}
        torch.save(state, _rank_file(folder))

    commit(target, write, _facts(job))
    if dist.rank() == 0:
        write_text(target.parent / LATEST, target.name)
    return target


def save_best(job: Job) -> Path:
    """Write the weights of the present step as the best so far; every rank calls it."""
    target = job.folder / "best" / _name(job.progress.step)
    commit(target, lambda folder: _write_weights(job, folder), _facts(job), replace=True)
    if dist.rank() == 0:
        for older in sorted(target.parent.glob("step-*")):
            if older != target:
                shutil.rmtree(older)
    return target


def restore(job: Job, folder: Path) -> None:
    """Put a job back to where a checkpoint was taken; every rank calls it.

    Raises:
        UserError: another number of processes, another ZeRO stage or another model.
    """
    manifest = read_manifest(folder)
    _check_fit(job, folder, manifest)
    job.engine.load(folder / "deepspeed")
    if job.average is not None:
        _restore_average(job.average, job.engine.model, folder)
    state = load_plain(_rank_file(folder))
    job.loader.restore(state["loader"])
    job.progress = Progress(**manifest["progress"])
    set_random_state(state["random"])


def _write_weights(job: Job, folder: Path) -> None:
    first, model = dist.rank() == 0, job.engine.model
    files: dict[str, Mapping[str, Tensor] | None] = {WEIGHTS: None}
    if job.average is not None:
        files[EMA] = job.average.pieces
    for name, pieces in files.items():
        state = whole_state(model, pieces, keep=first)
        if first:
            save_file(state, folder / name, metadata={"digest": job.digest})
            # safetensors makes files that only their owner may read.
            (folder / name).chmod(folder.stat().st_mode & 0o666)
    if first:
        (folder / "config.yaml").write_text(job.config)
        if (job.folder / TOKENIZER).is_file():
            shutil.copyfile(job.folder / TOKENIZER, folder / TOKENIZER)


def _facts(job: Job) -> dict[str, Any]:
    return {
        "step": job.progress.step,
        "world_size": dist.world_size(),
        "zero": job.engine.stage,
        "digest": job.digest,
        "tokenizer_sha256": _sha256(job.folder / TOKENIZER),
        "progress": asdict(job.progress),
    }


def _check_fit(job: Job, folder: Path, manifest: Mapping[str, Any]) -> None:
    for key, mine in (("world_size", dist.world_size()), ("zero", job.engine.stage)):
        if manifest[key] != mine:
            name = {"world_size": "processes", "zero": "train.zero"}[key]
            raise UserError(
                f"{folder}: written with {name}={manifest[key]}, this run has {mine}; resume with "
                f"{name}={manifest[key]}"
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


def _restore_average(average: Average, model: nn.Module, folder: Path) -> None:
    if not (folder / EMA).is_file():
        raise UserError(f"{folder}: has no {EMA}; resume with optim.ema=0, as it was saved")
    average.load(model, load_file(folder / EMA))


# ---------------------------------------------------------------- find and read


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, by its files alone: `latest` is not asked."""
    for folder in sorted((run / "checkpoints").glob("step-????????"), reverse=True):
        if not problem(folder):
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
    best = sorted((run / "best").glob("step-????????"), reverse=True) if which == "best" else []
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


def _rank_file(folder: Path) -> Path:
    return folder / "ranks" / f"{dist.rank():05d}.pt"


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _sha256(path: Path) -> str:
    return sha256(path) if path.is_file() else ""
