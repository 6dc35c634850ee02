"""Dense regression: what is predicted of which frame, and what must not change it."""

import math
from dataclasses import replace

import pytest
import torch
from small_methods import full_batch, small_model, values

from mmssl.build import build_model
from mmssl.check import fake_batch
from mmssl.specs import RunSpec
from mmssl.targets.signals import Standardize
from mmssl.types import UserError

LPS = {"kind": "log_spectrogram", "n_fft": 512, "win": 400, "hop": 160, "f_max": 0, "power": 2}
KALDI = {"kind": "kaldi", "n_mels": 20, "ceps": 13}


def spec_of(signal, patch=160, **options):
    """Patches of a waveform on a small transformer."""
    return RunSpec.model_validate(
        {
            "name": "t",
            "towers": {
                "audio": {
                    "modality": "audio",
                    "frontend": {"kind": "waveform"},
                    "cut": {"kind": "patches", "patch": [patch]},
                    "backbone": {"kind": "transformer", "width": 16, "layers": 1, "head_size": 8},
                }
            },
            "views": {"x": {"modality": "audio", "crop_s": 0.4}},
            "tasks": {"r": {"kind": "regress", "view": "x", "signal": signal, **options}},
        }
    )


def zeroed(model):
    for p in list(model.tasks["r"].decoder.layers[-1].parameters()):
        torch.nn.init.zeros_(p)
    return model.train()


@pytest.mark.parametrize("signal", [LPS, KALDI], ids=lambda s: s["kind"])
def test_zeros_cost_one_of_standardised_frames(signal):
    model = zeroed(small_model(spec_of(signal)))
    assert values(model, full_batch(model.spec))["r"] == pytest.approx(1.0, abs=1e-5)


def test_zeros_cost_the_mean_absolute_sample():
    decoder = {"kind": "waveform", "channels": [8], "strides": [160], "kernel": 200, "hidden": 8}
    model = small_model(
        spec_of({"kind": "waveform"}, decoder=decoder, error="absolute", standardize=False)
    )
    batch = full_batch(model.spec)
    want = batch.views["x"].data.abs().mean()
    assert values(zeroed(model), batch)["r"] == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize(("signal", "patch"), [(LPS, 160), (LPS, 320), (KALDI, 160), (KALDI, 480)])
def test_a_frame_is_predicted_at_its_time(signal, patch):
    """A click excites the frames around it, whichever token says them."""
    task = build_model(spec_of(signal, patch)).eval().tasks["r"]
    batch = fake_batch(spec_of(signal, patch), 1, missing=False)
    view = batch.views["x"]
    view.data.zero_()
    view.data[:, 3000] = 1.0
    ratio = patch // 160
    truth_PSF, valid_PS = task.truth(view, ratio * (6400 // patch))
    loud_S = (truth_PSF - truth_PSF[:, 3:4]).abs().sum(-1)[0] * valid_PS[0]
    place = float((loud_S * torch.arange(len(loud_S))).sum() / loud_S.sum())
    centre = (patch - 1) / 2  # of the first token
    predicted = centre + 160 * (place - (ratio - 1) / 2)
    assert abs(predicted - 3000) < 100  # frames lie on a grid of 160 samples


def test_what_has_no_frame_or_no_token_counts_nowhere():
    model = small_model(spec_of(KALDI)).eval()
    batch = full_batch(model.spec, 4)
    _, terms = model(batch, 0, 10)
    # windows of 400 samples every 160: frame f lies around token f + 1 of 40
    assert float(terms["r"].count) == 4 * 38
    view = batch.views["x"]
    short = replace(view, lengths_P=torch.tensor([6400, 6400, 6400, 3200]))
    _, valid_PS = model.tasks["r"].truth(short, 40)
    assert valid_PS.sum(1).tolist() == [38, 38, 38, 18]


def test_rows_without_sound_change_nothing():
    model = small_model(spec_of(LPS)).train()
    batch = full_batch(model.spec, 4)
    view = batch.views["x"]
    more = replace(
        batch,
        views={"x": replace(view, present_BL=torch.cat([view.present_BL, ~view.present_BL[:2]]))},
        keys=[*batch.keys, "a", "b"],
        source_B=torch.arange(6),
        text_B=torch.zeros(6).long(),
        index_B=torch.arange(6),
    )
    assert values(model, more)["r"] == pytest.approx(values(model, batch)["r"], rel=1e-6)


def test_moments_are_those_of_all_frames_so_far():
    torch.manual_seed(0)
    norm = Standardize(3)
    seen = []
    for i in range(4):
        x = torch.randn(5, 7, 3) * torch.tensor([1.0, 30, 0.01]) + torch.tensor([0.0, -80, i])
        valid = torch.rand(5, 7) < 0.7
        seen.append(x[valid].double())
        rows = torch.cat(seen)
        got = norm(x.masked_fill(~valid[..., None], math.nan), valid)[valid]
        want = (x[valid] - rows.mean(0)) / rows.std(0, unbiased=False)
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)
    assert int(norm.count) == len(torch.cat(seen))
    kept = [b.clone() for b in norm.buffers()]
    norm.eval()(x, valid)
    assert all(torch.equal(a, b) for a, b in zip(kept, norm.buffers(), strict=True))


def test_what_does_not_fit_is_refused():
    for signal, options, message in [
        (LPS | {"sample_rate": 8000, "f_max": 0}, {}, "sample_rate: 8000 Hz"),
        (LPS | {"hop": 100}, {}, "hop: 100 samples, but tokens of towers.audio are 160"),
        (
            {"kind": "waveform"},
            {"decoder": {"kind": "waveform", "strides": [4, 4, 4]}},
            "64 samples",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            build_model(spec_of(signal, **options))
    for options in (
        {"signal": LPS, "decoder": {"kind": "waveform"}},
        {"signal": {"kind": "waveform"}},
    ):
        with pytest.raises(ValueError, match="goes with the decoder `waveform`"):
            spec_of(**options)
    with pytest.raises(ValueError, match="one entry per layer"):
        spec_of({"kind": "waveform"}, decoder={"kind": "waveform", "strides": [160]})
