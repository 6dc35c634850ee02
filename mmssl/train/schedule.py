"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from mmssl.specs import OptimSpec


def warmup_steps(optim: OptimSpec, total: int) -> int:
    """Length of the warm-up: a share of the run where `warmup` < 1, else steps."""
    return round(optim.warmup * total) if optim.warmup < 1 else round(optim.warmup)


def learning_rate(optim: OptimSpec, step: int, total: int) -> float:
    """Learning rate of optimiser step `step` (0-based) in a run of `total` steps.

    Linear warm-up that reaches the peak at the end of its last step, then half a period of a
    cosine, a quarter (VATT) or a constant; the cosines arrive at `final_lr * lr` in the last step.

    Raises:
        ValueError: the step lies outside the run.
    """
    if not 0 <= step < total:
        raise ValueError(f"step {step} lies outside of a run of {total} steps")
    warm = warmup_steps(optim, total)
    if step < warm:
        return optim.lr * (step + 1) / warm
    if optim.decay == "constant":
        return optim.lr
    # The last warm-up step already ran at the peak, so the decay starts below it.
    done = (step + 1 - warm) / (total - warm)
    quarter = optim.decay == "quarter_cosine"
    left = math.cos(math.pi / 2 * done) if quarter else 0.5 * (1 + math.cos(math.pi * done))
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * left)
