"""The training loop. It knows no method."""

from __future__ import annotations

import math
from typing import cast

from mmssl.schedules import resolve
from mmssl.specs import RunSpec
from mmssl.train import checkpoint, preempt
from mmssl.train.checkpoint import Job
from mmssl.train.commit import NotSavedError
from mmssl.train.engine import Terms, Trainable
from mmssl.train.meters import Meters
from mmssl.train.randomness import untouched_random_state
from mmssl.train.schedule import learning_rate
from mmssl.train.validate import Validator
from mmssl.train.weights import averaging_decay
from mmssl.types import UserError


def train(spec: RunSpec, job: Job, meters: Meters, validator: Validator | None) -> None:
    """Run the remaining steps, save at the end; every rank takes the same path.

    On a request to stop (see `preempt`) the run saves and says so in `progress.stopped`.

    Raises:
        UserError: losses or gradients stay not finite; the weights saved so far are untouched.
    """
    saved, total, every = job.progress.step, spec.train.steps, spec.train.save_every
    while True:
        progress = job.progress
        job.watch.beat()
        asked = job.stop.agreed()
        if validator and validator.due(progress, total) and not asked:
            with meters.aside():
                validator.run(job, meters)
            job.watch.beat()
            asked, progress = job.stop.agreed(), job.progress
        pending = validator is not None and validator.due(progress, total)  # was interrupted
        over = not pending and (progress.step >= total or bool(progress.stopped))
        due = every and progress.step % every == 0
        if progress.step != saved and (over or asked or due):
            with meters.aside():
                saved = progress.step if _save(spec, job, meters, over or asked) else saved
            job.watch.beat()
        if over:
            return
        if asked:
            progress.stopped = preempt.REASON
            return
        trouble = _step(spec, job, meters)
        progress.step += 1
        if trouble:
            saved = _count_trouble(spec, job, meters, trouble, saved)
        else:
            progress.bad_in_a_row = 0


def _save(spec: RunSpec, job: Job, meters: Meters, last: bool) -> bool:
    """Write a checkpoint and remove old ones; False if that failed and the run is to go on.

    The `last` one of a process must not fail.

    Raises:
        NotSavedError: a rank could not write.
    """
    job.progress.elapsed_s = meters.elapsed_s()
    try:
        checkpoint.save(job)
    except NotSavedError as error:
        if last or spec.train.on_save_error == "stop":
            raise
        meters.not_saved(job.progress.step, str(error))
        return False
    keep = spec.train.keep_last, spec.train.keep_every
    copied = job.copies.busy if job.copies else None
    checkpoint.prune(job.folder, job.progress.step, *keep, spare=copied)
    return True


def _step(spec: RunSpec, job: Job, meters: Meters) -> str:
    """One optimiser step; what was not finite, if anything, and nothing has changed then."""
    engine, step, total = job.engine, job.progress.step, spec.train.steps
    model = cast("Trainable", engine.model)
    trouble = ""
    for _ in range(spec.train.accumulate):
        # Loaders draw from torch's generator when they start workers, at another moment of the run
        # after a resume.
        with meters.waiting(), untouched_random_state():
            batch = next(job.loader).to(engine.device)
        with meters.counting():
            loss, terms = engine.forward(batch, step, total)
            odd = _not_finite(terms)
            trouble = trouble or odd
            # A term may be infinite where its gradient is not: then the whole gradient is spoilt,
            # so that there is one way in which a step is left out.
            engine.backward(loss * math.nan if odd else loss)
        meters.micro_batch(batch, model.last_tokens, None if odd else loss, terms)
    lr = learning_rate(spec.optim, step, total)
    norm = engine.step(lr)
    if not math.isfinite(norm):
        return trouble or "the gradient"
    model.after_step(step, total)
    if job.average is not None:
        decay = resolve(spec.optim.ema, step / total)
        job.average.update(engine.model, averaging_decay(decay, step))
    meters.step(step + 1, lr, norm, model.last_embeddings, job.loader.skipped)
    return ""


def _not_finite(terms: Terms) -> str:
    # Terms are summed over ranks, so all ranks come to the same conclusion.
    for name, (total, _) in terms.items():
        if not math.isfinite(float(total.sum())):
            return f"the loss `{name}`"
    return ""


def _count_trouble(spec: RunSpec, job: Job, meters: Meters, what: str, saved: int) -> int:
    """Note a skipped step; after too many in a row go back to the last checkpoint, once.

    Returns the step of the last checkpoint of this process. The data do not go back: other samples
    follow the second time.

    Raises:
        UserError: it is the second time, or there is no checkpoint.
    """
    progress = job.progress
    progress.skipped += 1
    progress.bad_in_a_row += 1
    meters.skipped(progress.step, what, progress.skipped)
    if progress.bad_in_a_row < spec.train.bad_steps:
        return saved
    found = None if progress.rollbacks else checkpoint.newest_for_all(job.folder)
    if found is None:
        tried = (
            "again, after going back once" if progress.rollbacks else "and there is no checkpoint"
        )
        raise UserError(
            f"step {progress.step}: {what} is not finite, as in {progress.bad_in_a_row} steps in a "
            f"row (train.bad_steps), {tried}; resume from the last checkpoint with a lower "
            "`optim.lr`, a smaller `optim.clip` or `train.precision=fp32`"
        )
    checkpoint.restore(job, found, data=False)
    back = job.progress
    back.skipped, back.bad_in_a_row, back.rollbacks = progress.skipped, 0, progress.rollbacks + 1
    meters.rolled_back(back.step, progress.step)
    return back.step
