"""Unit quality against scikit-learn, the values of the HuBERT card, and counts by hand."""

import numpy as np
import pytest
from sklearn.metrics import homogeneity_score, mutual_info_score

from mmssl.data.sidecars import LabelInfo, SideCar, Source, writing
from mmssl.eval.units import joint_counts, pnmi_bias, sample_counts, unit_quality
from mmssl.types import UserError


def random_pair(classes=40, units=100, frames=10_000, tied=0.0, seed=0):
    rng = np.random.default_rng(seed)
    y, z = rng.integers(classes, size=frames), rng.integers(units, size=frames)
    return y, np.where(rng.random(frames) < tied, y, z)


@pytest.mark.parametrize("tied", [0.0, 0.3, 0.9])
def test_pnmi_is_scikit_learns_mutual_information(tied):
    y, z = random_pair(tied=tied)
    found = unit_quality(joint_counts(y, z, 40, 100))
    shares = np.bincount(y) / len(y)
    known = -(shares * np.log(shares)).sum()
    assert found.pnmi == pytest.approx(mutual_info_score(y, z) / known, abs=1e-12)
    assert found.pnmi == pytest.approx(homogeneity_score(y, z), abs=1e-12)


def test_permuted_labels_tell_everything():
    y, _ = random_pair(classes=40)
    found = unit_quality(joint_counts(y, np.random.default_rng(1).permutation(40)[y], 40, 40))
    assert found.pnmi == pytest.approx(1.0, abs=1e-12)
    assert (found.phone_purity, found.cluster_purity, found.used) == (1.0, 1.0, 40)


def test_independent_labels_show_the_bias_only():
    """P = 40, C = 100, N = 10000: .0523 to first order, a little more in truth (.061 measured)."""
    assert pnmi_bias(40, 100, 10_000) == pytest.approx(0.0523, abs=1e-4)
    found = [unit_quality(joint_counts(*random_pair(seed=s), 40, 100)) for s in range(10)]
    values = [quality.pnmi for quality in found]
    assert 0.052 < np.mean(values) < 0.064
    assert np.ptp(values) < 0.005
    assert found[0].bias == pnmi_bias(40, 100, 10_000)
    many = unit_quality(joint_counts(*random_pair(frames=400_000), 40, 100))
    assert many.pnmi == pytest.approx(many.bias, rel=0.05)  # where the first order suffices


def test_counts_and_purities_by_hand():
    counts = joint_counts([0, 0, 0, 1, 1, 1, -1, 1], [0, 0, 1, 1, 1, 2, 1, -1], 2, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 2, 1, 0]]
    found = unit_quality(counts)
    assert found.phone_purity == pytest.approx((2 + 2 + 1) / 6)
    assert found.cluster_purity == pytest.approx((2 + 2) / 6)
    shares = np.array([2, 3, 1]) / 6
    assert found.entropy == pytest.approx(-(shares * np.log(shares)).sum())
    assert found.perplexity == pytest.approx(np.exp(found.entropy))
    assert (found.used, found.units, found.frames) == (3, 4, 6)


def test_units_used_evenly_have_full_perplexity():
    y = np.repeat([0, 1], 50)
    found = unit_quality(joint_counts(y, np.arange(100) % 25, 2, 30))
    assert (found.used, found.perplexity) == (25, pytest.approx(25.0))
    assert found.pnmi == pytest.approx(0.0, abs=1e-12)


def test_counts_of_parts_add_up():
    y, z = random_pair(tied=0.5)
    whole = joint_counts(y, z, 40, 100)
    parts = [joint_counts(y[i::3], z[i::3], 40, 100) for i in range(3)]
    np.testing.assert_array_equal(sum(parts), whole)


def test_frames_take_the_class_of_their_sample(tmp_path):
    info = LabelInfo(Source("x", 50.0), (3, 2), "s")
    with writing(tmp_path / "l.safetensors", info) as writer:
        writer.add("a", np.array([[0, 0], [0, 1], [1, 1]]), 0.06)
        writer.add("b", np.array([[2, 0], [1, 0]]), 0.04)
        writer.add("c", np.array([[2, 0]]), 0.02)
    car = SideCar(tmp_path / "l.safetensors")
    counts = sample_counts(car, {"a": 0, "b": 1, "unknown": 1}, 2)
    assert counts.tolist() == [[2, 1, 0], [0, 1, 1]]
    assert sample_counts(car, {"a": 0, "b": 1}, 2, codebook=1).tolist() == [[1, 2], [2, 0]]
    with pytest.raises(UserError, match="none of its samples has a class"):
        sample_counts(car, {"d": 0}, 2)


def test_errors():
    with pytest.raises(ValueError, match=r"shape \(2,\), units of shape \(3,\)"):
        joint_counts([0, 1], [0, 1, 2], 2, 3)
    with pytest.raises(ValueError, match="class 2 of 2"):
        joint_counts([0, 2], [0, 1], 2, 3)
    with pytest.raises(UserError, match="5 frames of 1 classes"):
        unit_quality(np.array([[2, 3], [0, 0]]))
    with pytest.raises(UserError, match="0 frames of 0 classes"):
        unit_quality(np.zeros((2, 2), np.int64))
