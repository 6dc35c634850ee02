"""Thresholds chosen elsewhere, and precision where the place counts, against loops."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from mmssl.eval import decide

RNG = np.random.default_rng


def scores(n=60, gap=1.0, seed=0):
    rng = RNG(seed)
    return rng.normal(gap, 1, n).round(1), rng.normal(0, 1, n).round(1)  # with ties


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_best_of_all(seed):
    yes, no = scores(seed=seed)
    truth = np.repeat([1, 0], 60)
    both = np.concatenate([yes, no])

    def balanced(cut):
        return balanced_accuracy_score(truth, both >= cut)

    cuts = [-np.inf, np.inf, *(np.unique(both) + 1e-6), *(np.unique(both) - 1e-6)]
    assert balanced(decide.threshold(yes, no)) == pytest.approx(max(map(balanced, cuts)))


def test_thresholds_of_extremes():
    assert decide.threshold([2.0, 3.0], [0.0, 1.0]) == 1.5
    assert decide.threshold([0.0], [1.0]) == -np.inf
    assert decide.auc([1, 2, 2], [2, 0]) == pytest.approx(
        roc_auc_score([1, 1, 1, 0, 0], [1, 2, 2, 2, 0])
    )


def test_halves_part_sources_not_clips():
    sources = np.repeat(np.arange(21), 3)
    first = decide.halves(sources, 0)
    assert first.sum() == 33
    assert all(len(set(first[sources == s])) == 1 for s in range(21))
    assert not np.array_equal(first, decide.halves(sources, 1))


def test_answers_come_from_the_other_half():
    yes, no = np.array([10.0, 11.0, 0.0, 1.0]), np.array([9.0, 8.0, -1.0, -2.0])
    first = np.array([True, True, False, False])
    # the cut of the first half (9.5) refuses all of the second, that of the second accepts all
    assert decide.crossed(yes, no, first).tolist() == [0.5, 0.5, 0.5, 0.5]
    assert decide.crossed(yes[[0, 2, 1, 3]], no[[0, 2, 1, 3]], first).mean() < 1
    easy = decide.crossed(np.full(4, 1.0), np.zeros(4), first)
    assert easy.tolist() == [1.0] * 4


def test_calibration_is_tested_on_the_rest():
    yes, silent = scores(n=400, gap=3.0)
    other = scores(n=400, seed=2)[1] + 2.9
    first = decide.halves(np.arange(400), 0)
    found = decide.calibrated(yes, {"silence": silent, "off_screen": other}, first)
    assert found["accepts"] == pytest.approx((yes[~first] >= found["threshold"]).mean())
    assert found["rejects_silence"] == pytest.approx((silent[~first] < found["threshold"]).mean())
    assert found["auc_silence"] > 0.95
    assert 0.4 < found["auc_off_screen"] < 0.6
    mean = (found["rejects_silence"] + found["rejects_off_screen"]) / 2
    assert found["balanced_accuracy"] == pytest.approx((found["accepts"] + mean) / 2)
    assert (found["n"], found["n_calibration"]) == (200, 200)


@pytest.mark.parametrize("seed", range(4))
def test_ap_with_negatives_matches_loops(seed):
    rng = RNG(seed)
    yes, no = scores(n=25, seed=seed)
    placed = rng.random(25) < 0.6
    points, best_f1 = [], 0.0
    for cut in sorted({*yes, *no}, reverse=True):
        right = sum(y >= cut and p for y, p in zip(yes, placed, strict=True))
        false = sum(y >= cut and not p for y, p in zip(yes, placed, strict=True)) + sum(no >= cut)
        missed = sum(yes < cut)
        points.append((right / max(1, right + missed), right / max(1, right + false)))
        best_f1 = max(best_f1, 2 * right / max(1, 2 * right + false + missed))
    area, before = 0.0, 0.0
    for recall, _ in points:
        area += (recall - before) * max(p for r, p in points if r >= recall)
        before = recall
    found = decide.with_negatives(yes, placed, no)
    assert found["ap"] == pytest.approx(area)
    assert found["max_f1"] == pytest.approx(best_f1)


def test_perfect_and_hopeless_places():
    yes, no = np.array([3.0, 4.0]), np.array([1.0, 2.0])
    assert decide.with_negatives(yes, np.array([True, True]), no) == {"ap": 1.0, "max_f1": 1.0}
    assert decide.with_negatives(yes, np.array([False, False]), no) == {"ap": 0.0, "max_f1": 0.0}
