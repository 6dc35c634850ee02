import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc

from mmssl.eval import ciou

RNG = np.random.default_rng


def by_pixels(predicted, weights):
    """cIoU, one pixel after the other."""
    hit = miss = total = 0.0
    for row in range(weights.shape[0]):
        for column in range(weights.shape[1]):
            g = weights[row, column]
            total += g
            if predicted[row, column]:
                hit += g
                miss += g == 0
    return hit / (total + miss)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_ciou_matches_the_pixel_loop(seed):
    rng = RNG(seed)
    weights = rng.choice([0.0, 0.5, 1.0], (12, 12), p=[0.6, 0.2, 0.2])
    weights[0, 0] = 1.0
    predicted = rng.random((12, 12)) < rng.random()
    assert ciou.ciou(predicted, weights) == pytest.approx(by_pixels(predicted, weights))


def test_binary_ciou_is_plain_iou():
    a = ciou.weight_map([[0.0, 0.0, 0.5, 0.5]], side=100)
    b = ciou.weight_map([[0.25, 0.0, 0.75, 0.5]], side=100) > 0
    assert ciou.ciou(b, a) == pytest.approx(1 / 3)


def test_weight_maps():
    boxes = [[0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5]]
    union = ciou.weight_map(boxes)
    assert union.shape == (224, 224)
    assert union.sum() == 112 * 112
    agreement = ciou.weight_map(boxes, consensus=2)  # one annotator 0.5, both 1
    assert agreement[10, 10] == 0.5
    assert agreement[100, 100] == 1.0
    assert agreement.sum() == pytest.approx(0.5 * 112**2 + 0.5 * 56**2)


def test_rules():
    picture = np.arange(100.0).reshape(10, 10)
    weights = np.zeros((10, 10))
    weights[9, :7] = 1
    assert ciou.predict_relative(picture).sum() == 50
    assert ciou.predict_absolute(picture, 0.5).sum() == 50
    assert ciou.predict_absolute(picture, 0.95).sum() == 5
    adaptive = ciou.predict_adaptive(picture, weights)
    assert adaptive.sum() == 7
    assert picture[adaptive].min() == 93
    assert ciou.predict_absolute(np.ones((4, 4))).sum() == 0
    assert ciou.predict_adaptive(picture, np.zeros((10, 10))).sum() == 0


def test_rules_ignore_the_scale_of_the_map():
    picture, weights = RNG(0).normal(size=(20, 20)), ciou.weight_map([[0, 0, 0.3, 0.3]], side=20)
    for rule in (ciou.predict_relative, ciou.predict_absolute):
        assert np.array_equal(rule(picture), rule(3 * picture - 7))
    assert np.array_equal(
        ciou.predict_adaptive(picture, weights), ciou.predict_adaptive(3 * picture - 7, weights)
    )


def test_success_area_matches_scikit_learn():
    values = RNG(1).random(80)
    levels = np.arange(21) * 0.05
    rates = [(values >= level).mean() for level in levels]
    assert ciou.success_area(values) == pytest.approx(auc(levels, rates), abs=1e-12)
    assert ciou.success_area(np.ones(3)) == 1.0


def test_the_whole_picture_and_the_perfect_map():
    weights = ciou.weight_map([[0.2, 0.2, 0.6, 0.8]])
    share = weights.mean()
    assert ciou.ciou(np.ones(weights.shape, bool), weights) == pytest.approx(share)
    found = ciou.ciou_summary([weights + 0.0], [weights])
    assert found["adaptive"] == {"mean": 1.0, "at_0.5": 1.0, "auc": 1.0}
    assert found["curve"]["at_0.5"] == [1.0] * 19
    assert found["curve"]["level"][0] == 0.05
    assert found["curve"]["level"][-1] == 0.95


def test_upper_half_caps_small_objects():
    weights = ciou.weight_map([[0.4, 0.4, 0.6, 0.6]])
    picture = weights + 1e-6 * RNG(2).random(weights.shape)
    assert ciou.ciou(ciou.predict_relative(picture), weights) == pytest.approx(
        weights.mean() / 0.5, rel=1e-3
    )
    assert ciou.ciou(ciou.predict_adaptive(picture, weights), weights) == 1.0


@pytest.mark.parametrize("corners", [True, False])
def test_upsampling(corners):
    cells = np.array([[0.0, 1.0], [2.0, 3.0]])
    big = ciou.upsample(cells, 8, align_corners=corners)
    assert big[0, 0] == 0.0
    assert big[-1, -1] == 3.0
    assert big.mean() == pytest.approx(1.5)
    # without aligned corners a cell keeps its centre: the value at 1/4 of the side is the cell's
    middle = ciou.upsample(cells, 8, align_corners=False)[1:3, 1:3].mean()
    assert middle == pytest.approx(0.0, abs=0.4)


def test_centre_map_peaks_in_the_middle_and_is_symmetric():
    picture = ciou.centre_map(64)
    assert np.unravel_index(picture.argmax(), picture.shape) in [
        (31, 31),
        (31, 32),
        (32, 31),
        (32, 32),
    ]
    assert np.allclose(picture, picture[::-1])
    assert np.allclose(picture, picture.T)


def test_pointing_game_and_its_tolerance():
    weights = np.zeros((50, 50))
    weights[10:20, 10:20] = 1
    picture = np.zeros((50, 50))
    picture[15, 30] = 1  # 11 pixels right of the box
    assert not ciou.pointing_game(picture, weights)
    assert not ciou.pointing_game(picture, weights, tolerance=10)
    assert ciou.pointing_game(picture, weights, tolerance=11)
    picture[12, 12] = 2
    assert ciou.pointing_game(picture, weights)
    assert not ciou.pointing_game(picture, np.zeros((50, 50)), tolerance=15)


def test_an_empty_ground_truth_is_refused():
    with pytest.raises(ValueError, match="empty"):
        ciou.ciou(np.ones((4, 4), bool), np.zeros((4, 4)))
