"""Scores on sides with slots, and map scores that say where a sound is seen."""

from dataclasses import replace

import pytest
import torch
from small_methods import full_batch, make_tokens, small, small_model
from tiny_run import TREE, take_rows, tiny_batch, tiny_model, tiny_spec
from torch import nn

from mmssl.heads.dense import MapScore, VectorScore
from mmssl.heads.project import Head
from mmssl.heads.score import Bilinear, Distance, Dot, ScoreMap
from mmssl.towers import Passes
from mmssl.types import UserError


@pytest.mark.parametrize("score", [Dot(), Bilinear(5), Distance()])
def test_vectors_are_scored_against_every_slot(score):
    torch.manual_seed(0)
    a, b = torch.randn(3, 1, 5), torch.randn(4, 2, 5)
    table = VectorScore(score)((a,), (b,))
    assert table.shape == (3, 4, 2)
    for i in range(3):
        for j in range(4):
            for slot in range(2):
                want = score.pairs(a[i], b[j, slot : slot + 1])[0]
                torch.testing.assert_close(table[i, j, slot], want, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- maps


class FixedPasses:
    """Passes whose tokens are given."""

    def __init__(self, video, audio):
        self.given = {"video": video, "audio": audio}

    def tokens(self, view):
        return self.given[view]

    def tower(self, view):
        return self

    def first_centre(self):
        return 0.0


def planted(rows=3, bins=4, side=2, steps=4, width=8, noise=0.05):
    """Videos in which one cell per bin holds the vector that the audio has at that instant.

    The cell moves: at bin t it is cell (row + t) mod cells.
    """
    g = torch.Generator().manual_seed(0)
    cells = side * side
    sounds = nn.functional.normalize(torch.randn(rows, bins, width, generator=g), dim=-1)
    video = noise * torch.randn(rows, bins, cells, width, generator=g)
    place = (torch.arange(rows)[:, None] + torch.arange(bins)) % cells
    for row in range(rows):
        for t in range(bins):
            video[row, t, place[row, t]] += sounds[row, t]
    audio = sounds.repeat_interleave(steps // bins, dim=1)
    return video, audio, place


def sides(video, audio, audio_pad=None):
    batch = tiny_batch(len(video), missing=False)
    rows, bins, cells, width = video.shape
    side = int(cells**0.5)
    grid = (bins, side, side)
    v = make_tokens(video.reshape(rows, -1, width), grid, rate_hz=2.0, view=batch.views["video"])
    a = make_tokens(audio, audio.shape[1:2], audio_pad, view=batch.views["audio"])
    return FixedPasses(v, a)


def plain_map(aligned=True):
    """A map score whose projections change nothing."""
    score = MapScore({"video": 8, "audio": 8}, 8, ScoreMap("max", "mean", aligned))
    for name in score.maps_of:
        score.maps_of[name] = Head("none", 8, 8)
    return score


@pytest.mark.parametrize("aligned", [True, False])
def test_a_planted_cell_is_found_and_its_row_wins(aligned):
    video, audio, place = planted(steps=8)
    passes, score = sides(video, audio), plain_map(aligned)
    (v, _), (a, _) = score.embed(passes, "video"), score.embed(passes, "audio")
    table = score(v, a)[..., 0]
    assert table.argmax(0).tolist() == table.argmax(1).tolist() == [0, 1, 2]
    dense = score.features(passes, "video", "audio")
    maps = score.score.maps(dense.video, dense.audio, dense.audio_valid)
    if aligned:
        assert torch.equal(maps.argmax(-1), place)
        torch.testing.assert_close(maps.amax(-1), torch.ones(3, 4), atol=0.05, rtol=0)
    swapped = score.score.maps(dense.video, dense.audio.roll(1, 0), dense.audio_valid)
    assert float(swapped.amax()) < float(maps.amax(-1).min()) or not aligned


def test_the_gradient_reaches_the_strongest_cell_only():
    video, audio, place = planted()
    video.requires_grad_()
    passes, score = sides(video, audio), plain_map()
    (v, _), (a, _) = score.embed(passes, "video"), score.embed(passes, "audio")
    score(v, a)[..., 0].diagonal().sum().backward()
    touched = video.grad.abs().sum(-1) > 0
    assert touched.sum(-1).eq(1).all()
    assert torch.equal(touched.float().argmax(-1), place)


def test_padded_steps_and_absent_rows_play_no_part():
    video, audio, _ = planted(steps=4)
    pad = torch.zeros(3, 4, dtype=torch.bool)
    pad[:, 3] = True
    noisy = audio.clone()
    noisy[:, 3] = 100.0
    score = plain_map()
    tables = []
    for sound in (audio, noisy):
        passes = sides(video, sound, pad)
        (v, _), (a, _) = score.embed(passes, "video"), score.embed(passes, "audio")
        tables.append(score(v, a))
    assert torch.equal(*tables)


def test_bands_of_a_spectrogram_are_averaged_into_steps():
    x = torch.randn(6, 6, 8, generator=torch.Generator().manual_seed(0))  # 3 steps, 2 bands
    tokens = make_tokens(x, (3, 2), view=tiny_batch(missing=False).views["audio"])
    score = plain_map()
    (values, valid), filled = score.embed(FixedPasses(tokens, tokens), "audio")
    torch.testing.assert_close(values, x.reshape(6, 3, 2, 8).mean(2))
    assert valid.all()
    assert filled.all()


def test_times_of_the_bins_start_with_the_view():
    model, batch = tiny_model().eval(), tiny_batch(missing=False)
    video = batch.views["video"]
    batch.views["video"] = replace(video, start_s_P=torch.arange(6.0))
    times = model.dense(batch).times_s
    torch.testing.assert_close(times, torch.arange(6.0)[:, None] + torch.tensor([0.125, 0.625]))


def test_rows_that_lack_a_side_are_marked():
    model, batch = tiny_model().eval(), tiny_batch()
    assert model.dense(batch).present.tolist() == [True, False, False, True, True, True]
    alone = model.dense(take_rows(batch, [3]))
    whole = model.dense(batch)
    torch.testing.assert_close(alone.video[0], whole.video[3], atol=1e-5, rtol=0)


def test_convolutional_video_has_finite_times():
    spec = small(
        "av/ave_net",
        "views.video.crop_s=0.12",
        "tasks.avc=null",
        "tasks.map={kind: pairs, pairs: {va: {between: [video, audio], "
        "score: {kind: map, dim: 8}}}}",
    )
    model = small_model(spec).eval()
    times = model.dense(full_batch(spec, 2)).times_s
    torch.testing.assert_close(times[0], torch.tensor([0.0, 0.04, 0.08]))


def test_a_map_pair_must_name_video_first():
    pairs = {"x": {"between": ["audio", "video"], "score": {"kind": "map"}}}
    with pytest.raises(
        ValueError, match=r"tasks\.p\.pairs\.x\.between: .*video view with an audio or text view"
    ):
        tiny_model(tiny_spec(tasks={**TREE["tasks"], "p": {"kind": "pairs", "pairs": pairs}}))


def test_cells_of_the_stem_know_their_own_place_only():
    task = {**TREE["tasks"]["align"]}
    dense = task["pairs"]["dense"]
    task["pairs"] = {"dense": {**dense, "score": {**dense["score"], "cells": "stem"}}}
    towers = {**TREE["towers"], "video": {**TREE["towers"]["video"], "drop_tokens": 0.5}}
    model = tiny_model(tiny_spec(tasks={"align": task}, joints={}, towers=towers))
    batch = tiny_batch(missing=False)
    before = model.dense(batch).video
    video = batch.views["video"]
    video.data[:, :2, :4, :4] = 255 - video.data[:, :2, :4, :4]  # inside cell (0, 0, 0)
    change = (model.dense(batch).video - before).abs().sum(-1) > 1e-6
    assert change.any(0).tolist() == [[True, True, True, True], [False] * 4]
    # in training, DropToken spares them: they are read before it
    (_, seen), _ = model.train().tasks["align"].scores["dense"].embed(model.passes(batch), "video")
    assert seen.all()


def test_features_are_the_projections_of_the_scored_tokens():
    model, batch = tiny_model().eval(), tiny_batch(missing=False)
    passes = Passes(model.towers, model.joints, model.tower_of, batch, 1.0)
    score = model.tasks["align"].scores["dense"]
    dense = model.dense(batch)
    want = score.maps_of["video"](passes.tokens("video").x_PND).reshape(6, 2, 4, 8)
    torch.testing.assert_close(dense.video, want)


def pooled_map(normalize="steps"):
    score = ScoreMap("max", "mean", aligned=True, normalize=normalize)
    return MapScore({"video": 8, "text": 8}, 8, score, query="max")


def test_a_pooled_query_meets_the_best_cell_of_every_instant():
    torch.manual_seed(0)
    batch = tiny_batch(4, missing=False)
    video, words = torch.randn(4, 3 * 4, 8), torch.randn(4, 5, 8)
    pad = torch.arange(5).expand(4, 5) >= torch.tensor([5, 3, 4, 2])[:, None]
    v = make_tokens(video, (3, 2, 2), rate_hz=2.0, view=batch.views["video"])
    t = make_tokens(words, (5,), pad, view=batch.views["text"])  # in the place of the audio
    score = pooled_map()
    passes = FixedPasses(v, t)
    table = score(score.embed(passes, "video")[0], score.embed(passes, "audio")[0])[..., 0]
    pooled = words.masked_fill(pad[..., None], -torch.inf).amax(1)
    normed = nn.functional.batch_norm(pooled, None, None, training=True)
    query = nn.functional.normalize(normed @ score.maps_of["text"].layers[1].weight.T, dim=-1)
    cells = score.maps_of["video"](video).reshape(4, 3, 4, 8)
    best = torch.einsum("atsd,cd->acts", cells, query).amax(-1)
    torch.testing.assert_close(table, best.mean(-1), atol=1e-5, rtol=1e-5)


def test_a_cell_with_nothing_in_it_scores_its_bias_only_where_length_counts():
    cells = torch.tensor([[[[0.0, 0.0], [0.1, 0.0], [3.0, 0.0]]]])
    query = torch.tensor([[[2.0, 0.0]]])
    maps = {
        n: ScoreMap(aligned=True, normalize=n).maps(cells, query)[0, 0] for n in ("both", "steps")
    }
    torch.testing.assert_close(maps["both"], torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(maps["steps"], torch.tensor([0.0, 0.1, 3.0]))


def motion_model(**score):
    towers = {**TREE["towers"]}
    towers["video"] = {**towers["video"], "frontend": {"kind": "frames", "channels": "motion"}}
    pairs = {"x": {"between": ["video", "audio"], "score": {"kind": "map", "dim": 4, **score}}}
    return tiny_model(tiny_spec(towers=towers, tasks={"p": {"kind": "pairs", "pairs": pairs}}))


def test_cells_weighed_by_motion_are_zero_where_nothing_moves_inside():
    model = motion_model(cells="stem", normalize="steps", weigh="motion").eval()
    batch = tiny_batch(2, missing=False)
    video = batch.views["video"]
    video.data[:] = 0
    video.data[:, :, 1, 1] = 255 * (torch.arange(video.data.shape[1]) == 0)[None, :, None]
    dense = model.dense(batch)
    bins, height, width = dense.grid
    scale = dense.video.abs().sum(-1).reshape(2, bins, height, width)
    assert bool((scale[:, 0, 0, 0] > 0).all())
    assert int((scale > 0).sum()) == 2  # one cell of one bin per row


@pytest.mark.parametrize(
    "score", [{"cells": "backbone", "normalize": "steps"}, {"cells": "stem", "normalize": "both"}]
)
def test_only_cells_of_the_stem_with_a_length_can_be_weighed(score):
    with pytest.raises(ValueError, match="`weigh` scales cells of the stem"):
        motion_model(**score, weigh="motion")


def test_weighing_needs_a_front_end_that_shows_motion():
    pairs = {
        "x": {
            "between": ["video", "audio"],
            "score": {"kind": "map", "cells": "stem", "normalize": "steps", "weigh": "motion"},
        }
    }
    with pytest.raises(UserError, match=r"frontend\.channels to motion, rgb_motion or foreground"):
        tiny_model(tiny_spec(tasks={"p": {"kind": "pairs", "pairs": pairs}}))


@pytest.mark.parametrize(("cells", "bins"), [("stem", 4), ("backbone", 2)])
def test_times_of_merged_cells_are_the_middle_of_their_frames(cells, bins):
    """Four frames per second, read one by one; two make a token."""
    video = {"cut": {"kind": "conv", "channels": [8], "strides": [4], "merge_time": 2}}
    towers = {**TREE["towers"], "video": {**TREE["towers"]["video"], **video}}
    score = {"kind": "map", "dim": 4, "cells": cells}
    pairs = {"x": {"between": ["video", "audio"], "score": score}}
    model = tiny_model(tiny_spec(towers=towers, tasks={"p": {"kind": "pairs", "pairs": pairs}}))
    batch = tiny_batch(2, missing=False)
    batch.views["video"].start_s_P[:] = 1.0
    dense = model.eval().dense(batch)
    want = torch.arange(4) / 4 if cells == "stem" else torch.tensor([0.125, 0.625])
    assert dense.grid[0] == bins
    torch.testing.assert_close(dense.times_s[0], 1.0 + want)
