"""The training loop. It knows no method."""

from __future__ import annotations

import math
from typing import cast

from mmssl.schedules import resolve
from mmssl.specs import RunSpec
from mmssl.train import checkpoint
from mmssl.train.checkpoint import Job
from mmssl.train.engine import Terms, Trainable
from mmssl.train.meters import Meters
from mmssl.train.randomness import untouched_random_state
from mmssl.train.schedule import learning_rate
from mmssl.train.validate import Validator
from mmssl.types import UserError


def train(spec: RunSpec, job: Job, meters: Meters, validator: Validator | None) -> None:
    """Run the remaining steps, save at the end; every rank takes the same path.

    Raises:
        UserError: a loss or the gradient is not finite; the weights saved so far are untouched.
    """
    total, progress = spec.train.steps, job.progress
    while progress.step < total and not progress.stopped:
        _step(spec, job, meters)
        progress.step += 1
        if validator and validator.due(progress.step, total):
            with meters.aside():
                meters.validation(progress.step, validator.run(job))
        last = progress.step == total or progress.stopped
        if last or (spec.train.save_every and progress.step % spec.train.save_every == 0):
            with meters.aside():
                progress.elapsed_s = meters.elapsed_s()
                checkpoint.save(job)


def _step(spec: RunSpec, job: Job, meters: Meters) -> None:
    engine, step, total = job.engine, job.progress.step, spec.train.steps
    model = cast("Trainable", engine.model)
    for _ in range(spec.train.accumulate):
        # Loaders draw from torch's generator when they start workers, at another moment of the run
        # after a resume.
        with meters.waiting(), untouched_random_state():
            batch = next(job.loader).to(engine.device)
        with meters.counting():
            loss, terms = engine.forward(batch, step, total)
            _require_finite(terms, step)
            engine.backward(loss)
        meters.micro_batch(batch, model.last_tokens, loss, terms)
    lr = learning_rate(spec.optim, step, total)
    norm = engine.step(lr)
    if not math.isfinite(norm):
        raise UserError(f"step {step + 1}: the gradient's norm is {norm}; {_REMEDY}")
    model.after_step(step, total)
    if job.average is not None:
        job.average.update(engine.model, resolve(spec.optim.ema, step / total))
    meters.step(step + 1, lr, norm, model.last_embeddings, job.loader.skipped)


def _require_finite(terms: Terms, step: int) -> None:
    # Terms are summed over ranks, so all ranks come to the same conclusion.
    for name, (total, _) in terms.items():
        if not math.isfinite(float(total.sum())):
            raise UserError(f"step {step + 1}: the loss `{name}` is not finite; {_REMEDY}")


_REMEDY = (
    "training stops before anything is saved; resume from the last checkpoint with a lower "
    "`optim.lr`, a smaller `optim.clip` or `train.precision=fp32`"
)
