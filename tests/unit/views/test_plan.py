"""Where views are cut, and what has to be decoded for them."""

import numpy as np
import pytest

from mmssl.specs import AugmentSpec, ViewSpec
from mmssl.views.plan import Seeds, plan

A = ViewSpec(modality="audio", crop_s=1.0)
V = ViewSpec(modality="video", crop_s=2.0, fps=5, size=32)
T = ViewSpec(modality="text")
ALL = {"audio", "video", "text"}


def cuts(specs, duration=10.0, key="k", training=True, has=ALL, grid=(), draw=(1,)):
    return plan(specs, duration, has, Seeds(0, key, draw), training, grid)


def test_views_of_one_window_start_together():
    """The longest crop of a window must fit."""
    starts = []
    for k in range(300):
        made = cuts({"a": A, "v": V}, key=str(k)).cuts
        assert made["a"].start_s == made["v"].start_s
        assert made["v"].end_s == made["v"].start_s + 2.0
        starts.append(made["v"].start_s)
    assert 0 <= min(starts) < 0.2
    assert 7.8 < max(starts) <= 8.0
    # Uniform: Kolmogorov-Smirnov at the 1 % level.
    assert np.abs(np.sort(starts) / 8 - (np.arange(300) + 0.5) / 300).max() < 1.63 / np.sqrt(300)


def test_other_windows_start_elsewhere():
    shifted = A.model_copy(update={"window": "other"})
    made = cuts({"a": A, "b": shifted}).cuts
    assert made["a"].start_s != made["b"].start_s
    assert made["a"].seed != made["b"].seed


def test_adding_a_view_changes_no_other_view():
    both = cuts({"a": A, "b": A}).cuts
    assert cuts({"a": A}).cuts["a"] == both["a"]
    assert both["a"].seed != both["b"].seed


def test_absent_modalities_are_left_out_and_change_nothing():
    made = cuts({"a": A, "v": V, "t": T}, has={"audio", "text"})
    assert set(made.cuts) == {"a", "t"}
    assert made.cuts["a"].start_s == cuts({"a": A, "v": V}).cuts["a"].start_s


def test_randomness_depends_on_names_only():
    assert cuts({"a": A}).cuts == cuts({"a": A}).cuts
    for change in ({"key": "x"}, {"draw": (2,)}):
        assert cuts({"a": A}, **change).cuts["a"].start_s != cuts({"a": A}).cuts["a"].start_s


def test_evaluation_starts_at_zero():
    made = cuts({"a": A, "v": V}, training=False).cuts
    assert (made["a"].start_s, made["v"].start_s, made["v"].end_s) == (0.0, 0.0, 2.0)


@pytest.mark.parametrize("training", [True, False])
def test_short_clips_are_taken_whole(training):
    made = cuts({"a": A, "v": V}, duration=0.7, training=training).cuts
    assert (made["v"].start_s, made["v"].end_s) == (0.0, 0.7)
    assert made["v"].frame_times_s == pytest.approx((0.0, 0.2, 0.4, 0.6))


def test_crop_zero_goes_to_the_end():
    whole = ViewSpec(modality="audio")
    assert cuts({"w": whole}).cuts["w"].end_s == 10.0
    made = cuts({"w": whole, "a": A}).cuts
    assert (made["w"].start_s, made["w"].end_s) == (made["a"].start_s, 10.0)


def test_starts_snap_to_stored_frames():
    grid = [k / 10 for k in range(100)]
    starts = {cuts({"v": V}, key=str(k), grid=grid).cuts["v"].start_s for k in range(2000)}
    assert starts == set(grid[:81])


def test_snapped_crops_fit_on_irregular_grids():
    grid = [0.0, 0.5, 7.9, 8.3, 9.9]
    starts = {cuts({"v": V}, key=str(k), grid=grid).cuts["v"].start_s for k in range(200)}
    assert starts == {0.0, 0.5, 7.9}


def test_frame_times():
    cut = cuts({"v": V}, training=False).cuts["v"]
    assert cut.frame_times_s == pytest.approx([k / 5 for k in range(10)])


def test_one_pass_serves_views_that_agree():
    same = cuts({"a": A, "b": A.model_copy(update={"window": "w", "crop_s": 0.5}), "v": V, "t": T})
    assert len(same.needs) == 1
    need = same.needs[0]
    begin = min(same.cuts[n].start_s for n in "ab")
    end = max(same.cuts[n].end_s for n in "ab")
    assert (need.audio_hz, need.audio_start_s, need.audio_end_s) == (16000, begin, end)
    assert need.frame_times_s == same.cuts["v"].frame_times_s
    assert need.short_side == 32
    assert same.pass_of == {"a": 0, "b": 0, "v": 0}


def test_other_rates_and_sizes_need_further_passes():
    specs = {
        "a": A,
        "b": A.model_copy(update={"hz": 48000}),
        "v": V,
        "w": V.model_copy(update={"size": 64}),
        "x": V.model_copy(update={"size": 16}),
    }
    made = cuts(specs)
    assert [(n.audio_hz, n.short_side) for n in made.needs] == [(16000, 32), (48000, 64), (0, 16)]
    assert made.pass_of == {"a": 0, "b": 1, "v": 0, "w": 1, "x": 2}
    assert made.needs[2].audio_end_s == 0.0


def test_random_resized_crop_needs_the_stored_pixels():
    crop = V.model_copy(update={"augment": [AugmentSpec(kind="random_resized_crop")]})
    assert cuts({"v": crop}).needs[0].short_side == 0


def test_text_alone_needs_no_pass():
    assert cuts({"t": T}, duration=0.0, has={"text"}).needs == ()


def test_numbered_windows_lie_beside_each_other():
    specs = {n: ViewSpec(modality="audio", window=f"near.{n}", crop_s=1.0) for n in "12"}
    starts = []
    for k in range(500):
        made = cuts(specs, duration=3.0, key=str(k)).cuts
        a, b = (made[n].start_s for n in "12")
        assert min(a, b) >= 0
        assert max(a, b) <= 2.0
        assert abs(a - b) >= 1.0 - 1e-9
        starts.append((a, b))
    a, b = np.array(starts).T
    assert 0.4 < (a < b).mean() < 0.6
    assert a.min() < 0.05
    assert a.max() > 1.95


def test_numbered_windows_start_no_farther_apart_than_they_may():
    """TRILL's sampler: |i - j| <= tau and no overlap, anywhere in the clip."""
    specs = {
        "1": ViewSpec(modality="audio", window="near.1", crop_s=1.0),
        "2": ViewSpec(modality="audio", window="near.2", crop_s=2.0, within_s=4.0),
    }
    found = [cuts(specs, duration=60.0, key=str(k)).cuts for k in range(500)]
    a, b = (np.array([made[n].start_s for made in found]) for n in "12")
    apart = np.where(a < b, b - a - 1, a - b - 2)  # from an end to a start
    assert apart.min() >= -1e-9
    assert np.abs(a - b).max() <= 4 + 1e-9
    assert np.abs(a - b).max() > 3.8
    assert 0 <= min(a.min(), b.min()) < 1
    assert 58 < max(a.max(), b.max() + 1) <= 59
    assert 0.4 < (a < b).mean() < 0.6
    # where the clip is no longer than they may lie apart, nothing changes
    free = {n: spec.model_copy(update={"within_s": None}) for n, spec in specs.items()}
    for k in range(50):
        near, any_ = (cuts(s, duration=4.5, key=str(k)).cuts for s in (specs, free))
        assert [near[n].start_s for n in "12"] == [any_[n].start_s for n in "12"]


def test_a_clip_too_short_for_all_numbered_windows_has_the_first_alone():
    specs = {n: ViewSpec(modality="audio", window=f"near.{n}", crop_s=1.0) for n in "12"}
    specs["same"] = specs["1"].model_copy()
    made = cuts(specs, duration=1.5).cuts
    assert set(made) == {"1", "same"}
    assert 0 <= made["1"].start_s == made["same"].start_s <= 0.5
    assert set(cuts(specs, duration=2.0).cuts) == {"1", "2", "same"}
    assert set(cuts(specs, duration=1.5, training=False).cuts) == {"1", "2", "same"}
