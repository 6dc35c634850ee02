"""Windows that are in time or not, on clips whose every frame and sample tells its time."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

import mmssl.data.ordered
import mmssl.eval.load
from mmssl.eval import clapper, results, suites, sync
from mmssl.eval.features import cut
from mmssl.specs import DataSpec, ViewSpec
from mmssl.types import Batch, UserError, ViewBatch

FPS, HZ, SECONDS = 5.0, 100.0, 8.0


def view(modality, data, rate):
    count = len(data)
    return ViewBatch(
        modality,
        data,
        torch.full((count,), data.shape[1]),
        torch.arange(count),
        torch.zeros(count, dtype=torch.long),
        torch.zeros(count, dtype=torch.long),
        torch.zeros(count, dtype=torch.float64),
        torch.ones(count, 1, dtype=torch.bool),
        rate,
    )


def clocks(first, size, seconds=SECONDS):
    """Pixels hold the frame's number, samples the time in units of 10 s."""
    frames = torch.arange(round(seconds * FPS), dtype=torch.uint8)[None, :, None, None, None]
    sound = torch.arange(round(seconds * HZ)) / HZ / 10
    rows = torch.arange(first, first + size)
    return Batch(
        {
            "frames": view("video", frames.repeat(size, 1, 4, 4, 3), FPS),
            "sound": view("audio", sound.repeat(size, 1), HZ),
        },
        [f"clip-{int(i)}" for i in rows],
        rows,
        torch.zeros_like(rows),
        rows,
        [{"duration_s": seconds} for _ in rows],
    )


class Clock(nn.Module):
    """Reads the time of both sides and compares it as an angle of 20 s around."""

    def __init__(self, deaf=False):
        super().__init__()
        self.weight, self.deaf = nn.Parameter(torch.ones(1)), deaf

    def passes(self, batch):
        return None

    def embed(self, batch):
        film, sound = batch.views["frames"], batch.views["sound"]
        seen_s = film.data.double().mean((1, 2, 3, 4)) / FPS + 0.5 / FPS
        heard_s = sound.data.double().mean(1) * 10 + 0.5 / HZ
        there = torch.ones(batch.size, dtype=torch.bool)
        heard_s = heard_s * 0 if self.deaf else heard_s
        return {
            (name, "av"): (self.hand(time), there)
            for name, time in (("video", seen_s), ("audio", heard_s))
        }

    def hand(self, time_s):
        angle = time_s * 2 * math.pi / 20
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    def space_for(self, a, b):
        return "av"

    def match_logit(self, batch, partner):
        return None

    def dense(self, batch):
        return None


@pytest.fixture
def run(tmp_path, monkeypatch):
    from test_suites import run_spec

    (tmp_path / "manifest.json").write_text('{"shards": []}')
    spec = run_spec(tmp_path)
    views = {
        "frames": spec.views["frames"].model_copy(update={"fps": FPS}),
        "sound": spec.views["sound"],
    }
    spec = spec.model_copy(
        update={"data": DataSpec(test=str(tmp_path)), "views": views, "tasks": {}}
    )
    monkeypatch.setattr(
        mmssl.eval.load,
        "load_model",
        lambda run, which="ema", random=False: (Clock(random), spec, None),
    )
    found = [clocks(k, 20) for k in range(0, 60, 20)] + [clocks(60, 2, seconds=2.5)]
    monkeypatch.setattr(mmssl.data.ordered, "eval_batches", lambda *a, **k: iter(found))
    return tmp_path


def test_a_model_that_reads_the_clock_and_one_that_is_deaf(run, capsys):
    suites.main("sync", str(run), ["window_s=2", "resamples=50"])
    found = results.read(run / "results_sync.json")
    own = found["sync"]["cosine"]
    assert (own["accuracy"], own["auc"], own["paired"]) == (1.0, 1.0, 1.0)
    assert own["ci"]["accuracy"] == [1.0, 1.0]
    counts = [found["sync"][key] for key in ("n", "too_short", "n_offsets")]
    assert (own["n"], counts) == (60, [60, 2, 60])
    assert own["offsets"]["accuracy"] == own["offsets"]["within_one"] == 1.0
    assert own["offsets"]["chance_accuracy"] == pytest.approx(1 / 21)
    assert 2 / 21 <= own["offsets"]["chance_within_one"] <= 3 / 21
    assert own["offsets"]["mean_error_s"] == 0.0
    deaf = found["random_encoder"]["sync"]["cosine"]
    assert deaf["paired"] == 0.5  # the same score whatever is heard
    assert deaf["offsets"]["accuracy"] == 0.0  # ties count against the model
    assert found["trivial"]["sync"]["correlation"]["offsets"]["accuracy"] < 0.3
    assert found["sync"]["decoder_error"]["max_ms"] < 5
    assert "the decoder's own error" in capsys.readouterr().out
    items = results.read(run / "items_sync.json")["values"]
    assert len(items["sync.cosine.right"]) == 60


def test_views_of_two_lengths_keep_theirs_around_one_instant(run, monkeypatch):
    model, spec, _ = mmssl.eval.load.load_model(run)
    lengths = {"frames": 0.2, "sound": 2.0}  # one frame, 4.5 frames into the window
    views = {
        name: view.model_copy(update={"crop_s": lengths[name]}) for name, view in spec.views.items()
    }
    spec = spec.model_copy(update={"views": views})
    monkeypatch.setattr(mmssl.eval.load, "load_model", lambda *_, **__: (model, spec, None))
    seen, embed = set(), model.embed
    model.embed = lambda batch: (
        seen.add(tuple(view.data.shape[1] for view in batch.views.values())) or embed(batch)
    )
    suites.main("sync", str(run), ["random=false", "resamples=0", "report=false"])
    found = results.read(run / "results_sync.json")["sync"]
    assert seen == {(1, 200)}
    assert found["cosine"]["accuracy"] == found["cosine"]["offsets"]["accuracy"] == 1.0
    assert [found[key] for key in ("n", "too_short", "n_offsets")] == [60, 2, 60]
    draws = [sync.draw(6.0, FPS, sync.Options(), seed, 0.9) for seed in range(50)]
    starts = np.asarray([one.film_s + 0.9 for one in draws if one.film_s < 6.0])
    assert starts * FPS == pytest.approx(np.round(starts * FPS))


def test_windows_are_inside_the_clip_and_shifts_as_asked():
    options = sync.Options()
    draws = [sync.draw(6.0, 4.0, options, seed) for seed in range(300)]
    shifts = np.asarray([one.shifted_s - one.film_s for one in draws])
    assert np.abs(shifts).min() >= 1.0
    assert 3.8 < np.abs(shifts).max() <= 4.0
    assert 0.4 < (shifts > 0).mean() < 0.6
    for one in draws:
        assert 0 <= one.film_s <= 6
        assert -0.125 <= one.shifted_s <= 6.125  # half a frame, by which pictures are moved
        assert one.film_s * 4 == round(one.film_s * 4)
        film_s = one.center_s + sync.OFFSETS_S[one.right]
        assert film_s * 4 == pytest.approx(round(film_s * 4))
        assert 2 - 0.125 <= one.center_s <= 4.125
    assert len({one.right for one in draws}) == 21
    assert sync.draw(0.9, 4.0, options, 0) is None
    assert sync.draw(3.9, 4.0, options, 0).center_s is None


def test_cuts_are_padded_outside():
    sound = view("audio", torch.arange(1.0, 11.0)[None], 10.0)
    half = ViewSpec(modality="audio", crop_s=0.5)
    found = cut(sound, half, np.array([-0.2]))
    assert found.data.tolist() == [[0, 0, 1, 2, 3]]
    assert cut(sound, half, np.array([0.8])).data.tolist() == [[9, 10, 0, 0, 0]]
    assert found.start_s_P.tolist() == [-0.2]
    normal = half.model_copy(update={"normalize": True})
    again = cut(sound, normal, np.array([0.1])).data[0]
    assert (float(again.mean()), float(again.std(correction=0))) == pytest.approx((0, 1), abs=1e-5)


def test_the_signal_knows_when_motion_and_loudness_agree():
    rng = np.random.default_rng(0)
    batch = clocks(0, 1)
    steps = rng.random(39) < 0.3
    film = np.concatenate([[0], np.cumsum(steps)]) % 2 * 200
    frames = torch.from_numpy(film.astype(np.uint8))[None, :, None, None, None]
    batch.views["frames"].data = frames.repeat(1, 1, 4, 4, 3)
    loud = np.repeat(np.concatenate([[0], steps]), 20) * rng.normal(size=800)
    batch.views["sound"].data = torch.from_numpy(loud)[None]
    assert sync.correlation(batch)[0] > 0.9
    longer = torch.nn.functional.pad(batch.views["sound"].data, (50, 50), value=9.0)
    batch.views["sound"].data = longer
    assert sync.correlation(batch)[0] > 0.9  # the film's stretch is the middle of the sound
    batch.views["sound"].data = longer[:, 50:-50].roll(100, 1)
    assert sync.correlation(batch)[0] < 0.6
    batch.views["sound"].data = torch.zeros(1, 800)
    assert sync.correlation(batch)[0] == 0.0


def test_offsets_by_hand():
    scores = np.zeros((3, 5))
    scores[0, 2], scores[1, 1], scores[2, 4] = 1, 1, 1
    found = sync.offset_numbers(scores, np.array([2, 2, 2]))
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["within_one"] == pytest.approx(2 / 3)
    assert found["chance_accuracy"] == pytest.approx(1 / 5)
    assert found["mean_error_s"] == pytest.approx(0.2)
    same = sync.offset_numbers(np.zeros((2, 5)), np.array([0, 1]))  # ties against the model
    assert (same["accuracy"], same["within_one"]) == (0, 0)
    assert same["mean_error_s"] == pytest.approx(0.2 * (4 + 3) / 2)
    unknown = sync.offset_numbers(np.full((1, 5), np.nan), np.array([1]))
    assert unknown["mean_error_s"] == pytest.approx(0.6)


def test_the_clapper_measures_what_is_late(monkeypatch):
    assert clapper.alignment_error("pyav")["max_ms"] < 5
    monkeypatch.setattr(clapper, "_write", functools.partial(clapper._write, late_s=0.035))
    found = clapper.alignment_error("pyav")
    assert found["mean_ms"] == pytest.approx(35, abs=2)
    assert found["claps"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the run's views take whole clips; give window_s=SECONDS"),
        (["window_s=7.5"], "the longest has 8 s"),
        (["window_s=2", "min_shift_s=5"], "min_shift_s is above max_shift_s"),
    ],
)
def test_bad_input(run, words, message):
    with pytest.raises(UserError, match=message):
        suites.main("sync", str(run), words)


def test_a_method_that_compares_nothing(run, monkeypatch):
    monkeypatch.setattr(Clock, "space_for", lambda *_: None)
    with pytest.raises(UserError, match="compares sound and pictures neither by a match task"):
        suites.main("sync", str(run), ["window_s=2"])
