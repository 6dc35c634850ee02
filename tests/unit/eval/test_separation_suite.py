"""`mmssl eval separation`: what perfect, useless and split outputs score; `separate` of a run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_run import TREE, separation, tiny_model, tiny_spec
from tone_shards import write_tones

import mmssl.eval.load
from mmssl.check import fake_batch
from mmssl.embed.model import EmbeddingModel
from mmssl.eval import results, suites
from mmssl.tasks.separate import Separate
from mmssl.types import UserError


@pytest.fixture
def run(tmp_path, monkeypatch):
    shards = write_tones(tmp_path / "corpus", [[0, 0], [1, 1], [2, 2]])  # three pure tones
    data = {"test": str(shards), "workers": 0, "isolate": False}
    recipe = separation()
    spec = tiny_spec(**recipe | {"tasks": {"pit": recipe["tasks"]["pit"]}}, data=data)

    def load_model(run, which="ema", random=False):
        return tiny_model(spec, seed=int(random)).eval(), spec, None

    monkeypatch.setattr(mmssl.eval.load, "load_model", load_model)
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def answering(monkeypatch, answer):
    """Let every model answer a mixture with a function of its sounds (P, K, S) and itself."""
    mixtures, known = Separate.mixtures, {}

    def remember(self, *args):
        mixed = mixtures(self, *args)
        pairs = zip(mixed.heard.data, mixed.sound_PKS, strict=True)
        known.update({tuple(x[:50].tolist()): sounds for x, sounds in pairs})
        return mixed

    def separate(self, passes, view):
        sounds = torch.stack([known[tuple(x[:50].tolist())] for x in view.data])
        return answer(sounds, view.data)

    monkeypatch.setattr(Separate, "mixtures", remember)
    monkeypatch.setattr(Separate, "separate", separate)


def measured(run, *options):
    suites.main("separation", str(run), ["resamples=20", "report=false", *options])
    return results.read(run / "results_separation.json")


def test_perfect_outputs_in_any_order(run, monkeypatch):
    answering(monkeypatch, lambda sounds, heard: 0.9 * sounds.flip(1))
    found = measured(run)["separation"]
    assert (found["n"], found["n_missing"]) == (3, 0)
    assert found["si_sdr_db"] > 50
    assert found["mixture_db"] == pytest.approx(0, abs=0.1)  # one is as much above as below
    assert found["gain_db"] == pytest.approx(found["si_sdr_db"] - found["mixture_db"])
    assert found["added_up"]["gain_db"] == pytest.approx(found["gain_db"], abs=1)
    low, high = found["ci"]["gain_db"]
    assert low <= found["gain_db"] <= high
    items = results.read(run / "items_separation.json")["values"]
    column = items["separation.gain_db"]
    assert np.mean(list(column.values())) == pytest.approx(found["gain_db"])


def test_a_sound_in_two_outputs_is_whole_when_added_up(run, monkeypatch):
    def split(sounds, heard):
        half = heard.shape[1] // 2
        first, second = sounds[:, 0].clone(), sounds[:, 0].clone()
        first[:, half:], second[:, :half] = 0, 0
        return torch.stack([first, second, sounds[:, 1]], 1)

    answering(monkeypatch, split)
    found = measured(run)["separation"]
    assert found["added_up"]["gain_db"] > 50
    assert found["gain_db"] < found["added_up"]["gain_db"] - 20


def test_the_mixture_itself_gains_nothing(run, monkeypatch):
    answering(monkeypatch, lambda sounds, heard: heard[:, None].expand(-1, 2, -1))
    found = measured(run)
    assert found["separation"]["gain_db"] == pytest.approx(0, abs=1e-5)
    assert found["random_encoder"]["separation"]["gain_db"] == pytest.approx(0, abs=1e-5)


def test_refusals(run):
    with pytest.raises(UserError, match="sounds=3, but tiny has 2 outputs"):
        measured(run, "sounds=3")
    with pytest.raises(UserError, match="no clip has 1 clips of other sources beside it"):
        measured(run, "limit=1")


def test_a_run_without_mixtures_is_refused(run, monkeypatch):
    spec = tiny_spec(
        towers={"audio": TREE["towers"]["audio"]},
        views={"audio": TREE["views"]["audio"]},
        joints={},
        tasks={"masked": TREE["tasks"]["masked_audio"]},
        data={"test": str(run.parent / "corpus" / "test")},
    )
    load = lambda *_, **__: (tiny_model(spec).eval(), spec, None)  # noqa: E731
    monkeypatch.setattr(mmssl.eval.load, "load_model", load)
    with pytest.raises(UserError, match="tiny: has no `separate` task"):
        measured(run, f"data={run.parent / 'corpus'}")


# ---------------------------------------------------------------- users


def noise(seconds, rate=16000):
    rng = np.random.default_rng(0)
    return (0.3 * rng.standard_normal(round(seconds * rate))).astype(np.float32), rate


def test_a_recording_of_any_length_is_taken_apart_at_once():
    model = tiny_model(tiny_spec(**separation())).eval()
    made = EmbeddingModel(model, None)
    wave, rate = noise(1.3)  # the view has a quarter of a second
    found = made.separate({"audio": (wave, rate)})
    assert found.shape == (2, len(wave))
    batch = fake_batch(model.spec, 1, missing=False)
    whole = replace(batch.views["audio"], data=torch.from_numpy(wave)[None])
    whole = replace(whole, lengths_P=torch.tensor([len(wave)]))
    with torch.no_grad():
        passes = model.passes(replace(batch, views={"audio": whole}))
        expected = model.tasks["pit"].separate(passes, whole)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(0), torch.from_numpy(wave), rtol=0, atol=1e-5)
    several = made.separate([{"audio": noise(0.2)}, {"audio": (wave, rate)}])
    assert [x.shape[1] for x in several] == [3200, len(wave)]
    torch.testing.assert_close(several[1], found)


def test_what_cannot_be_taken_apart_is_named():
    spec = tiny_spec(**separation(), data={"max_seconds": 1.0})
    with pytest.raises(UserError, match=r"audio: is longer than data.max_seconds \(1 s\)"):
        EmbeddingModel(tiny_model(spec).eval(), None).separate({"audio": noise(1.5)})
    with pytest.raises(UserError, match="text: is not in a mixture"):
        EmbeddingModel(tiny_model(spec).eval(), None).separate({"text": "rain"})
