import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl.eval import pictures, results, sections
from mmssl.eval.album import Album, Film, spectrogram
from mmssl.eval.sections import facts, read_log


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_heat_goes_from_dark_to_bright():
    colours = pictures.heat(np.linspace(-1, 2, 50)).astype(int)
    light = colours @ [299, 587, 114]
    assert (np.diff(light) >= 0).all()
    assert colours[0].tolist() == [0, 0, 4]
    assert colours[-1].tolist() == [252, 255, 164]


def test_scaled():
    assert pictures.scaled([2.0, 4.0, 3.0]).tolist() == [0.0, 1.0, 0.5]
    assert pictures.scaled([2.0, 4.0, 3.0], 3.0, 4.0).tolist() == [0.0, 1.0, 0.0]
    assert pictures.scaled([5.0, 5.0]).tolist() == [0.0, 0.0]


def test_the_overlay_is_hot_where_the_map_is_high():
    frame = np.full((32, 32, 3), 100, np.uint8)
    cells = np.zeros((4, 4))
    cells[1, 2] = 1.0
    picture = pictures.overlay(frame, cells, (64, 64)).astype(int)
    assert picture.shape == (64, 64, 3)
    changed = np.abs(picture - 85).sum(axis=-1)
    row, column = np.unravel_index(changed.argmax(), changed.shape)
    assert 16 <= row < 32
    assert 32 <= column < 48
    assert changed[48:, :16].max() <= 3


def test_boxes_and_peaks_are_drawn_in_place():
    black = np.zeros((100, 100, 3), np.uint8)
    boxed = pictures.mark_box(black, [0.2, 0.3, 0.6, 0.9], (0, 255, 0))
    ys, xs = np.nonzero(boxed[..., 1])
    assert (xs.min(), ys.min(), xs.max(), ys.max()) == (20, 30, 60, 90)
    cells = np.zeros((5, 10))
    cells[2, 7] = 1
    ys, xs = np.nonzero(pictures.mark_peak(black, cells).sum(axis=-1))
    assert xs.mean() == pytest.approx(75, abs=1)
    assert ys.mean() == pytest.approx(50, abs=1)


def test_data_uris_hold_the_picture():
    picture = np.random.default_rng(0).integers(0, 255, (8, 9, 3)).astype(np.uint8)
    assert np.array_equal(decoded(pictures.data_uri(picture)), picture)
    assert decoded(pictures.data_uri(picture, 95)).shape == picture.shape


def test_spectrum_has_low_bands_at_the_bottom():
    levels = np.zeros((10, 20))
    levels[0] = 1.0
    picture = pictures.spectrum(levels, (20, 10)).astype(int).sum(axis=-1)
    assert picture[-1].min() > picture[0].max()


@pytest.mark.parametrize("hz", [220.0, 3000.0])
def test_a_tone_lights_one_band(hz):
    tone = torch.sin(2 * torch.pi * hz * torch.arange(16000) / 16000)
    levels = spectrogram(tone, 16000)
    assert levels.shape[0] == 64
    assert levels.max() == pytest.approx(1.0)
    band = levels.mean(axis=1).argmax()
    mel = 2595 * np.log10(1 + hz / 700) / (2595 * np.log10(1 + 8000 / 700)) * 65 - 1
    assert band == pytest.approx(mel, abs=2)


def test_curves_leave_gaps_out_and_escape_titles():
    svg = pictures.curve([1, 2, 3], [1.0, float("nan"), 4.0], "a<b")
    assert "a&lt;b" in svg
    assert svg.count(",") == 2  # two points
    assert "step 3" in svg
    assert "polyline" not in pictures.curve([1], [1.0], "one point")


def test_album_keeps_the_first_clips_only(batches):
    album = Album(limit=15, films=3)
    for batch in batches:
        album.add(batch)
    assert sorted(album.pictures) == sorted(album.spectra) == list(range(15))
    assert list(album.clips) == [1, 3, 5]  # odd rows show two objects
    assert album.captions[0] == "a circle <sounds>"
    film = album.clips[1]
    assert film.frames_THWC.shape == (8, 32, 32, 3)
    assert np.array_equal(film.at(0.3), film.frames_THWC[1])


def test_films_give_the_nearest_frame():
    film = Film(np.arange(3, dtype=np.uint8)[:, None, None, None], np.array([0.0, 0.5, 1.0]))
    assert [int(film.at(t)[0, 0, 0]) for t in (-1.0, 0.3, 0.8, 9.0)] == [0, 1, 2, 2]


def test_a_torn_last_line_of_the_log_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_log(path) == []
    path.write_text('{"step": 1}\n{"step"')
    assert read_log(path) == [{"step": 1}]
    path.write_text('{"step"\n{"step": 2}\n')
    with pytest.raises(ValueError, match="Expecting"):
        read_log(path)


def test_lines_join_numbers_but_not_names():
    drawn = {"title": "a", "x_name": "k", "x": [1, 5], "lines": {"one": [0.5, None], "two": [0, 1]}}
    picture = pictures.lines(drawn)
    assert (picture.count("<polyline"), picture.count("<circle")) == (2, 3)
    picture = pictures.lines(drawn | {"x": ["<purity", "pnmi"]})
    assert (picture.count("<polyline"), picture.count("<circle")) == (0, 3)
    assert "&lt;purity" in picture


def test_intervals_are_whiskers_in_place():
    drawn = results.plot("a", "k", [1, 5], {"one": [0.5, 1.0]}, {"one": [[0.25, 0.75], None]})
    picture = pictures.lines(drawn)
    (top,), (bottom,) = (re.findall(rf'y="(\d+)" class="e">{v}<', picture) for v in (1, 0))
    x, low, high = map(float, re.findall(r'd="M(\S+) (\S+)V(\S+)" fill', picture)[0])
    one = np.asarray([int(bottom), int(top)]) - 4.0  # texts hang 4 below their level
    assert [low, high] == pytest.approx(np.interp([0.25, 0.75], [0, 1], one))
    places = re.findall(r'<circle cx="(\S+)" cy="(\S+)"', picture)
    assert np.asarray(places, float)[:, 1] == pytest.approx(np.interp([0.5, 1.0], [0, 1], one))
    assert float(places[0][0]) == x
    assert "brackets and whiskers hold the 95 % interval" in sections.plots({"plots": [drawn]})
    assert "0.500<small> [0.25, 0.75]</small>" in sections.plots({"plots": [drawn]})


@pytest.mark.parametrize("name", ["a", "quite a long name"])
def test_points_of_names_stand_side_by_side_and_names_are_legible(name):
    x, ys = [f"{name} {k}" for k in range(8)], [0.5] * 8
    picture = pictures.lines(results.plot("", "", x, {"one": ys, "two": ys}))
    at = [float(x) for x in re.findall(r'<circle cx="(\S+)"', picture)]
    assert len(set(at)) == 16  # equal values do not hide each other
    step = at[1] - at[0]
    assert at[8] - at[0] < step
    assert ("rotate" in picture) == (6 * len(x[0]) > step)
    height = int(re.search(r'viewBox="0 0 560 (\d+)"', picture)[1])
    assert (height > 300) == (len(name) > 9)


def test_numbers_of_an_axis_are_named_evenly():
    levels = np.round(np.arange(1, 20) * 0.05, 2).tolist()
    picture = pictures.lines(results.plot("", "", levels, {"one": levels}))
    named = re.findall(r'text-anchor="middle">(\S+?)<', picture)
    steps = np.diff([float(text) for text in named])
    assert len(named) >= 6
    assert steps == pytest.approx(steps[0])


def test_facts_tell_what_was_asked():
    assert "label class, clusters 50" in facts({"options": {"label": "class", "clusters": 50}})
