import numpy as np
import pytest

from mmssl.eval.bootstrap import interval


def test_mean_matches_the_normal_approximation():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = interval(values, resamples=4000)
    error = values.std(ddof=0) / np.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.03)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.03)


def test_scipy_agrees():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).exponential(size=60)
    ours = interval(values, resamples=5000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=0)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)


@pytest.mark.parametrize("count", [7, 8])
def test_median_is_that_of_the_resampled_list(count):
    values = np.random.default_rng(2).permutation(count).astype(float)
    from mmssl.eval.bootstrap import _medians, _weights

    weights = np.concatenate(list(_weights(np.arange(count), 250, seed=3)))
    expected = [np.median(np.repeat(values, line.astype(int))) for line in weights]
    assert np.array_equal(_medians(values, weights), expected)


def test_groups_are_drawn_whole():
    # two sources of which one always succeeds: resampling clips would hide that there are only two
    values, sources = [1.0] * 50 + [0.0] * 50, [0] * 50 + [1] * 50
    assert interval(values, sources) == (0.0, 1.0)
    low, high = interval(values)
    assert 0.35 < low < 0.45
    assert 0.55 < high < 0.65


def test_each_resample_draws_as_many_groups_as_there_are():
    from mmssl.eval.bootstrap import _weights

    weights = np.concatenate(list(_weights(np.array([4, 4, 9, 7]), 130, seed=0)))
    assert weights.shape == (130, 4)
    assert np.array_equal(weights[:, 0], weights[:, 1])
    assert np.array_equal(weights[:, 1:].sum(axis=1), np.full(130, 3))


def test_same_seed_same_interval_and_empty_input():
    assert interval([0.0, 1.0, 1.0], seed=5) == interval([0.0, 1.0, 1.0], seed=5)
    assert np.isnan(interval([])).all()
    with pytest.raises(ValueError, match="3 values but 2"):
        interval([1.0, 2.0, 3.0], [0, 1])
