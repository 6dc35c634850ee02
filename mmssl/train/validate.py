"""Evaluation inside training: fixed subsets, the best checkpoint, early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from mmssl import dist
from mmssl.specs import ValidateSpec
from mmssl.train.checkpoint import Job, Progress, save_best
from mmssl.train.commit import NotSavedError
from mmssl.train.meters import Meters
from mmssl.train.preempt import InterruptedWork
from mmssl.train.randomness import untouched_random_state
from mmssl.train.weights import whole_state
from mmssl.types import UserError

Evaluate = Callable[[nn.Module, int], Mapping[str, float]]
"""(model in evaluation mode, number of clips) -> metrics by name."""


@dataclass(frozen=True)
class Validator:
    """Evaluates a second model that holds the averaged weights, or the trained ones without EMA.

    A model of its own, built anew each time: at ZeRO-3 the trained one is in pieces, and nothing
    an evaluation does can touch the training.
    """

    spec: ValidateSpec
    make_model: Callable[[], nn.Module]
    evaluate: Evaluate
    go_on: bool = False  # where the best checkpoint cannot be written

    def due(self, progress: Progress, total: int) -> bool:
        """At this step of `total`, and not done yet."""
        step = progress.step
        return step > progress.evaluated and (step % self.spec.every == 0 or step == total)

    def run(self, job: Job, meters: Meters) -> None:
        """Evaluate on every rank, log, keep the best checkpoint, note when to stop.

        A request to stop leaves an evaluation on all ranks; it stays due.

        Raises:
            UserError: the run's metric is none of those evaluated; lists them.
        """
        with untouched_random_state():
            values = self._values(job)
        if dist.any_rank(values is None):
            return
        assert values is not None
        job.progress.evaluated = job.progress.step
        before = replace(job.progress)
        if self.spec.metric and judge(self.spec, values, job.progress):
            try:
                save_best(job)
            except NotSavedError as error:
                if not self.go_on:
                    raise
                job.progress = before  # the next evaluation may be the best and saved
                meters.not_saved(job.progress.step, str(error))
        meters.validation(job.progress.step, values)

    def _values(self, job: Job) -> Mapping[str, float] | None:
        state = whole_state(job.engine.model, job.average.pieces if job.average else None)
        try:
            with job.stop.interruptible():
                model = self.make_model()
                model.load_state_dict(state)
                return self.evaluate(model.to(job.engine.device).eval(), self.spec.clips)
        except InterruptedWork:
            return None


def judge(spec: ValidateSpec, values: Mapping[str, float], progress: Progress) -> bool:
    """Compare with the best so far and update `progress`; True when this is the new best.

    A metric written with a leading minus is minimised.

    Raises:
        UserError: no such metric.
    """
    name = spec.metric.removeprefix("-")
    if name not in values:
        raise UserError(
            f"validation.metric={spec.metric}: no such metric; this run evaluates: "
            f"{', '.join(sorted(values)) or 'nothing'}"
        )
    sign = -1.0 if spec.metric.startswith("-") else 1.0
    value = float(values[name])
    better = progress.best is None or sign * value > sign * progress.best
    if math.isfinite(value) and better:
        progress.best, progress.best_step, progress.waited = value, progress.step, 0
        return True
    progress.waited += 1
    if spec.patience and progress.waited >= spec.patience:
        progress.stopped = f"no better {spec.metric} in {progress.waited} evaluations"
    return False
