"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from mmssl.specs import OptimSpec


def warmup_steps(optim: OptimSpec, total: int) -> int:
    """Length of the warm-up: a share of the run where `warmup` < 1, else steps."""
    return round(optim.warmup * total) if optim.warmup < 1 else round(optim.warmup)


def learning_rate(optim: OptimSpec, step: int, total: int) -> float:
    """Learning rate of optimiser step `step` (0-based) in a run of `total` steps.

    Linear warm-up that reaches the peak at the end of its last step, `hold` at the peak, then half
    a period of a cosine, a quarter (VATT), a line, equal ratios or a constant; all but the last
    arrive at `final_lr * lr` in the last step.

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
    warm += round(optim.hold * total)
    done = max(0.0, (step + 1 - warm) / max(1, total - warm))
    if optim.decay == "exponential":
        return float(optim.lr * optim.final_lr**done)
    left = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "quarter_cosine": math.cos(math.pi / 2 * done),
        "linear": 1 - done,
    }[optim.decay]
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * left)
