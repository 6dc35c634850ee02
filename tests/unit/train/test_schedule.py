from __future__ import annotations

from itertools import pairwise

import pytest

from mmssl.specs import OptimSpec
from mmssl.train.schedule import learning_rate, warmup_steps


def test_warmup_reaches_the_peak_and_cosine_ends_at_the_final_share() -> None:
    optim = OptimSpec(lr=2.0, warmup=4, final_lr=0.25)
    rates = [learning_rate(optim, step, 12) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[7] == pytest.approx(1.25)  # half way from 2.0 to 0.5
    assert rates[11] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(rates[3:]))


def test_warmup_below_one_is_a_share_of_the_run() -> None:
    assert warmup_steps(OptimSpec(warmup=0.25), 40) == 10
    assert warmup_steps(OptimSpec(warmup=25), 40) == 25
    assert learning_rate(OptimSpec(lr=1.0, warmup=0.25), 4, 40) == 0.5


def test_constant_stays_at_the_peak_and_no_warmup_starts_there() -> None:
    optim = OptimSpec(lr=0.3, warmup=0, decay="constant")
    assert {learning_rate(optim, step, 5) for step in range(5)} == {0.3}


def test_a_warmup_longer_than_the_run_never_decays() -> None:
    optim = OptimSpec(lr=1.0, warmup=10)
    assert [learning_rate(optim, s, 3) for s in range(3)] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("step", [-1, 5])
def test_a_step_outside_of_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="outside of a run of 5 steps"):
        learning_rate(OptimSpec(), step, 5)


def test_linear_decay_and_a_held_peak() -> None:
    optim = OptimSpec(lr=1.0, warmup=2, hold=0.2, decay="linear")
    rates = [learning_rate(optim, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])


def test_exponential_decay_has_equal_ratios() -> None:
    optim = OptimSpec(lr=2.0, warmup=0, decay="exponential", final_lr=0.0625)
    rates = [learning_rate(optim, step, 4) for step in range(4)]
    assert rates == pytest.approx([1.0, 0.5, 0.25, 0.125])
    with pytest.raises(ValueError, match="final_lr"):
        OptimSpec(decay="exponential")
