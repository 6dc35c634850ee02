import math

import numpy as np
import pytest
import torch
from small_methods import small, small_model

from mmssl import config, stages
from mmssl.check import fake_batch
from mmssl.eval import measure, scenes
from mmssl.eval.embed import Encoded, collect
from mmssl.eval.items import Protocol
from mmssl.types import UserError

FAST = Protocol(seed=0, resamples=50)


def run(model, batches):
    rows, found = collect({"m": model}, batches)
    encoded = found["m"]
    truth = scenes.scene(rows, encoded.dense, 0, 0)
    maps = scenes.localization_maps(model, encoded.dense, truth)
    return rows, encoded, truth, maps


def test_a_perfect_model_reaches_everything(batches, knowing_model):
    model = knowing_model()
    rows, encoded, truth, maps = run(model, batches)
    retrieval = measure.retrieval(rows, encoded, model.space_for, FAST)
    assert list(retrieval) == [
        "audio->video",
        "audio->text",
        "video->audio",
        "video->text",
        "text->audio",
        "text->video",
        "text->audio+video",
        "audio+video->text",
    ]
    for row in retrieval.values():
        assert row["n"] == 24  # one-object clips only
        assert row["class_at_1"] == row["r_at_1"] == 1.0
        assert row["same_group"]["r_at_1"] == 1.0
    assert "equal_text" in retrieval["text->video"]
    assert "equal_text" not in retrieval["audio->video"]
    found = scenes.localization(maps, rows, encoded.dense, truth, FAST)
    assert found["pointing_sounding"] == found["pointing_frames"] == 1.0
    assert found["pointing_silent"] == found["pointing_both"] == 0.0
    assert found["pointing_swapped_audio"] == 1.0
    assert found["pointing_swapped_stays"] == 0.0
    assert found["n"] == 24
    assert found["n_frames"] == 48
    assert found["ci"]["pointing_sounding"] == [1.0, 1.0]
    assert found["ciou"]["model"]["adaptive"]["at_0.5"] == 1.0


def test_an_encoder_without_sound_is_at_chance_with_averaged_audio(batches, knowing_model):
    rows, encoded, truth, maps = run(knowing_model(), batches)
    found = scenes.localization(maps, rows, encoded.dense, truth, FAST)
    # both objects match the mean sound about equally well
    assert 0.2 < found["pointing_audio_blind"] < 0.8
    assert found["pointing_center"] == 0.0
    # one box of 2 x 2 cells in 8 x 8
    assert found["pointing_whole_image"] == pytest.approx(4 / 64)


def test_a_constant_encoder_scores_nothing(batches, knowing_model):
    model = knowing_model("constant")
    rows, found = collect({"m": model}, batches)
    for row in measure.retrieval(rows, found["m"], model.space_for, FAST).values():
        assert row["r_at_10"] == row["class_at_1"] == 0.0


def test_blind_audio_is_the_mean_of_valid_steps():
    audio = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [9.0, 9.0]]])
    valid = torch.tensor([[True, True], [True, False]])
    mean, there = scenes.blind_audio(audio, valid)
    half = 0.5**0.5
    assert torch.allclose(mean[0], torch.tensor([[half, half], [0.0, 1.0]]))
    assert torch.equal(mean[0], mean[1])
    assert there.all()


def test_swapped_audio_needs_a_partner(batches, knowing_model):
    model = knowing_model()
    rows, found = collect({"m": model}, batches[:1])
    for i in found["m"].dense.rows_P:
        rows.meta[i]["silent_class"] = "nobody"
    truth = scenes.scene(rows, found["m"].dense, 0, 0)
    maps = scenes.localization_maps(model, found["m"].dense, truth)
    result = scenes.localization(maps, rows, found["m"].dense, truth, FAST)
    assert result["pointing_swapped_audio"] is None
    assert result["n_swapped"] == 0
    assert result["ci"]["pointing_swapped_audio"] is None


def test_maps_are_computed_in_blocks(batches, knowing_model, monkeypatch):
    _, encoded, _, maps = run(knowing_model(), batches)
    monkeypatch.setattr(scenes, "_MAPS", 5)
    dense = encoded.dense
    again = scenes.score_maps(knowing_model(), dense.video_PTSD, dense.audio_PAD, dense.valid_PA)
    assert np.allclose(again, maps["own"])


def test_rows_that_lack_a_modality_are_counted_and_named(batches, knowing_model):
    model = knowing_model()
    rows, found = collect({"m": model}, batches)
    encoded = found["m"]
    encoded.present["video", "common"][[0, 2]] = False
    row = measure.retrieval(rows, encoded, model.space_for, FAST)["audio->video"]
    assert (row["n"], row["n_missing"], row["missing"]) == (22, 2, ["clip-0", "clip-2"])
    encoded.present["video", "common"][:] = False
    assert measure.retrieval(rows, encoded, model.space_for, FAST)["audio->video"]["n"] == 0


def test_modalities_without_a_common_space_are_not_compared(batches, knowing_model):
    rows, found = collect({"m": knowing_model()}, batches)
    table = measure.retrieval(
        rows, found["m"], lambda a, b: None if "text" in (a, b) else "common", FAST
    )
    assert list(table) == ["audio->video", "video->audio"]


def test_boxes_beyond_the_frame_are_refused():
    meta = {"boxes": {"fps": 10, "sounding": [[0, 0, 120, 120]]}, "stored_size": [64, 64]}
    with pytest.raises(UserError, match="64 x 64"):
        scenes.box_track(meta, "sounding", 0, np.zeros(1))
    meta["boxes"]["frame"] = [240, 240]
    assert scenes.box_track(meta, "sounding", 0, np.zeros(1)).tolist() == [[0, 0, 0.5, 0.5]]
    meta["boxes"]["fps"] = None
    with pytest.raises(UserError, match="fps"):
        scenes.box_track(meta, "sounding", 0, np.zeros(1))


def test_correspondence(batches, knowing_model):
    rows, found = collect({"m": knowing_model()}, batches)
    result = measure.correspondence(rows, found["m"], FAST)
    assert (result["accuracy"], result["auc"], result["n"]) == (1.0, 1.0, 48)
    half = Encoded(own_N=np.array([1.0, -1, 2, np.nan]), other_N=np.array([-1.0, -1, 1, np.nan]))
    result = measure.correspondence(rows_of(4), half, FAST)
    assert result["accuracy"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert result["accepts_own"] == result["rejects_other"] == pytest.approx(2 / 3)
    assert result["n"] == 3
    assert measure.correspondence(rows_of(4), Encoded(), FAST) is None
    nobody = Encoded(own_N=np.full(4, np.nan), other_N=np.full(4, np.nan))
    assert measure.correspondence(rows_of(4), nobody, FAST) == {"accuracy": None, "n": 0}


def rows_of(n):
    from mmssl.eval.embed import Rows

    return Rows([str(i) for i in range(n)], list(range(n)), [0] * n, [{}] * n)


def test_masked_baselines_match_direct_computation():
    rng = np.random.default_rng(0)
    truth = rng.normal(2.0, 1.5, (50, 7))
    guess = truth + rng.normal(0, 0.5, truth.shape)
    sums = {
        "error_sum": np.array([((guess - truth) ** 2).sum()]),
        "count": np.array([truth.size]),
        "target_sum": truth.sum(0),
        "square_sum": np.array([(truth**2).sum()]),
        "cells": np.array([50.0]),
    }
    found = measure.masked(Encoded(masked={"m": sums}), {"m": "audio"})["audio"]
    assert found["error"] == pytest.approx(((guess - truth) ** 2).mean())
    assert found["baseline"] == pytest.approx(((truth - truth.mean(0)) ** 2).mean())
    assert found["ratio"] == pytest.approx(found["error"] / found["baseline"])


def test_masked_words_and_names():
    words = {
        "correct": np.array([6.0]),
        "count": np.array([10.0]),
        "histogram": np.array([1, 5, 4]),
    }
    found = measure.masked(Encoded(masked={"a": words, "b": words}), {"a": "text", "b": "text"})
    assert set(found) == {"a", "b"}  # two tasks of one modality keep their own names
    assert found["a"] == {"task": "a", "accuracy": 0.6, "baseline": 0.5, "ratio": 1.2, "n": 10}
    empty = {**words, "count": np.array([0.0])}
    assert measure.masked(Encoded(masked={"a": empty}), {})["a"]["ratio"] is None


def test_masked_baseline_of_a_guess():
    sums = {
        "correct": np.array([30.0]),
        "baseline_sum": np.array([10.0]),
        "count": np.array([100.0]),
    }
    found = measure.masked(Encoded(masked={"m": sums}), {"m": "audio"})["audio"]
    assert (found["accuracy"], found["baseline"]) == (0.3, 0.1)
    assert found["ratio"] == pytest.approx(3.0)


def predicts_hidden(name):
    return any(task.kind == "masked" for task in config.load(name).tasks.values())


@pytest.mark.parametrize(
    "name", [n for n in config.names() if not stages.is_staged(n) and predicts_hidden(n)]
)
def test_every_masked_task_can_be_judged(name):
    spec = small(name)
    sums = small_model(spec).masked_stats(fake_batch(spec, 4, 0))
    plain = {task: {k: v.numpy() for k, v in part.items()} for task, part in sums.items()}
    for found in measure.masked(Encoded(masked=plain), {}).values():
        assert found["n"] > 0
        assert 0 < found["baseline"] < math.inf
        assert 0 <= found["ratio"] < math.inf


def test_a_whole_clip_is_compared_by_the_mean_of_two_cosines(batches, knowing_model):
    """In the spaces of each pair; the rank of a full sort of the mean score."""
    rows, found = collect({"m": knowing_model("noise")}, batches)
    encoded, rng = found["m"], np.random.default_rng(0)
    for modality, space in (("text", "ta"), ("text", "tv"), ("audio", "ta"), ("video", "tv")):
        x = rng.normal(size=(48, 5)).astype(np.float32)
        encoded.vectors[modality, space] = x / np.linalg.norm(x, axis=1, keepdims=True)
        encoded.present[modality, space] = np.ones(48, bool)
    encoded.present["video", "tv"][4] = False
    spaces = {("text", "audio"): "ta", ("text", "video"): "tv"}
    table = measure.retrieval(
        rows, encoded, lambda a, b: spaces.get((a, b)) or spaces.get((b, a)), FAST
    )
    row = table["text->audio+video"]
    assert (row["n"], row["missing"], row["space"]) == (23, ["clip-4"], "ta + tv")
    kept = np.flatnonzero(measure.candidates(rows))
    kept = kept[kept != 4]
    z = encoded.vectors
    ta, tv, a, v = (
        z[k][kept] for k in (("text", "ta"), ("text", "tv"), ("audio", "ta"), ("video", "tv"))
    )
    scores = (ta @ a.T + tv @ v.T) / 2
    for name, table_QN in (("text->audio+video", scores), ("audio+video->text", scores.T)):
        ranks = 1 + (table_QN > np.diagonal(table_QN)[:, None]).sum(axis=1)
        assert table[name]["mean_rank"] == pytest.approx(ranks.mean())
