import numpy as np
import pytest

from mmssl.eval import localize

NONE = np.full((1, 1, 4), np.nan)


def still(box, times=1):
    return np.tile(np.asarray(box, dtype=float), (1, times, 1))


def test_boxes_move_into_the_picture_the_model_sees():
    square = localize.to_view([[32, 16, 64, 128]], (128, 128), 96)
    assert square.tolist() == [[0.25, 0.125, 0.5, 1.0]]
    # 200 x 100 stored, the middle 100 x 100 is kept: x loses 50 pixels
    wide = localize.to_view([[50, 0, 100, 100]], (200, 100), 64)
    assert wide.tolist() == [[0.0, 0.0, 0.5, 1.0]]
    whole = localize.to_view([[50, 0, 100, 100]], (200, 100), 0)
    assert whole.tolist() == [[0.25, 0.0, 0.5, 1.0]]


def test_the_frame_nearest_in_time_gives_the_box():
    track = np.arange(5)[:, None] * np.ones(4)
    times = [0.0, 0.14, 0.16, 0.25, 9.0]  # frames at 0, 0.1, 0.2, 0.3, 0.4
    assert localize.boxes_at(track, 10.0, times)[:, 0].tolist() == [0, 1, 2, 2, 4]


def test_the_highest_cell_of_the_whole_map_is_tested_at_its_own_time():
    maps = np.zeros((1, 2, 16))
    maps[0, 1, 5] = 1.0  # row 1, column 1 of 4 x 4: centre (0.375, 0.375)
    here, away = [0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]
    moving = np.array([[away, here]])
    found = localize.point(maps, (4, 4), moving, still(away, 2))
    assert (found.bin_P, found.cell_P) == ([1], [5])
    assert found.sounding_P.tolist() == [True]
    assert localize.point(maps, (4, 4), moving[:, ::-1], still(away, 2)).sounding_P[0] == False  # noqa: E712
    assert localize.point(maps, (4, 4), still(away, 2), moving).silent_P[0]


def test_a_hit_in_both_boxes_counts_for_neither():
    maps = np.zeros((1, 1, 16))
    maps[0, 0, 5] = 1.0
    found = localize.point(maps, (4, 4), still([0, 0, 0.5, 0.5]), still([0.25, 0.25, 1, 1]))
    assert (found.sounding_P[0], found.silent_P[0], found.both_P[0]) == (False, False, True)


def test_a_missing_silent_object_is_never_hit():
    maps = np.zeros((1, 1, 4))
    found = localize.point(maps, (2, 2), still([0, 0, 0.5, 0.5]), NONE)
    assert found.sounding_P[0]
    assert not found.silent_P[0]


def test_pointing_matches_a_loop_over_cells():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(50, 3, 20))
    corner = rng.uniform(0, 0.6, (2, 50, 3, 2))
    sounding, silent = np.concatenate([corner, corner + 0.4], axis=-1)
    found = localize.point(maps, (4, 5), sounding, silent)
    for p in range(50):
        best = max(
            ((t, y, x) for t in range(3) for y in range(4) for x in range(5)),
            key=lambda c: maps[p, c[0], c[1] * 5 + c[2]],
        )
        t, y, x = best
        cx, cy = (x + 0.5) / 5, (y + 0.5) / 4
        in_a, in_b = (
            b[0] <= cx < b[2] and b[1] <= cy < b[3] for b in (sounding[p, t], silent[p, t])
        )
        assert found.sounding_P[p] == (in_a and not in_b)
        assert found.silent_P[p] == (in_b and not in_a)
        assert found.both_P[p] == (in_a and in_b)


def test_every_frame_is_pointed_at_by_its_own_highest_cell():
    maps = np.zeros((1, 2, 4))
    maps[0, 0, 0], maps[0, 1, 3] = 5.0, 1.0
    left = still([0, 0, 0.5, 0.5], 2)
    found = localize.point_frames(maps, (2, 2), left, np.full((1, 2, 4), np.nan))
    assert found.tolist() == [[True, False]]


def test_baselines():
    covers_middle = np.concatenate([still([0.4, 0.4, 0.6, 0.6]), still([0, 0, 0.4, 0.4])], axis=1)
    nothing = np.full((1, 2, 4), np.nan)
    assert localize.point_centre(covers_middle, nothing).tolist() == [0.5]
    # 16 of 64 cells in one bin, all in the other
    quarter = np.concatenate([still([0, 0, 0.5, 0.5]), still([0, 0, 1, 1])], axis=1)
    assert localize.point_anywhere((8, 8), quarter, nothing).tolist() == [(0.25 + 1) / 2]


def test_sounding_bins_by_energy():
    wave = np.zeros(4000)
    wave[1000:2000] = 1.0
    wave[2000:3000] = 0.2  # -14 dB
    wave[3000:] = 0.05  # -26 dB
    times = np.arange(4) * 0.25 + 0.125
    assert localize.sounding_bins(wave, 4000, 0.0, times).tolist() == [False, True, True, False]
    later = localize.sounding_bins(wave, 4000, 0.25, times)
    assert later.tolist() == [False, False, True, True]
    assert not localize.sounding_bins(np.zeros(4000), 4000, 0.0, times).any()


def test_partners_have_the_wanted_class_and_another_source():
    classes, sources = ["a", "a", "b", "c"], [0, 1, 2, 2]
    picks = localize.partners(["b", "c", "a", "b"], classes, sources, sources, seed=3)
    assert picks[:2].tolist() == [2, 3]
    assert picks[2] in (0, 1)
    assert picks[3] == -1  # the only "b" has the same source
    again = localize.partners(["b", "c", "a", "b"], classes, sources, sources, seed=3)
    assert np.array_equal(picks, again)


def test_maps_that_are_not_finite_or_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        localize.point(np.full((1, 1, 4), np.nan), (2, 2), NONE, NONE)
    with pytest.raises(ValueError, match="do not fill"):
        localize.point(np.zeros((1, 1, 5)), (2, 2), NONE, NONE)
