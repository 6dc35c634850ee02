"""Spectrograms: parity with torchaudio and with an independent NumPy transform."""

import copy
import math

import numpy as np
import pytest
import torch
import torchaudio

from mmssl.frontends.spectra import LogMel, LogSpectrogram, SpectrumParams
from mmssl.types import UserError

L3 = SpectrumParams(
    sample_rate=48000, n_fft=512, win=512, hop=242, f_min=0, f_max=0, framing="valid",
    log="ln_clip5", floor=1e-12,
)  # fmt: skip
COLA = SpectrumParams(framing="valid")
MMV = SpectrumParams(
    sample_rate=48000, n_fft=2048, win=2048, hop=1024, n_mels=80, f_min=80, f_max=7600,
    framing="pad_end", log="ln_1e4",
)  # fmt: skip


def waves(samples, rows=2):
    return 0.3 * torch.randn(rows, samples, generator=torch.Generator().manual_seed(1))


def numpy_magnitudes(wave, win, hop, n_fft):
    """(T, n_fft / 2 + 1) magnitudes of whole windows, periodic Hann, fp64."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(win) / win)
    frames = np.lib.stride_tricks.sliding_window_view(wave, win)[::hop] * window
    return np.abs(np.fft.rfft(frames, n_fft))


def numpy_mel(params):
    """(F, n_mels) triangles on the HTK scale, no area norm."""

    def to_mel(f):
        return 2595 * np.log10(1 + f / 700)

    edges = 700 * (
        10 ** (np.linspace(to_mel(params.f_min), to_mel(params.top), params.n_mels + 2) / 2595) - 1
    )
    freqs = np.linspace(0, params.sample_rate / 2, params.n_fft // 2 + 1)[:, None]
    up = (freqs - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - freqs) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(up, down))


def test_l3_spectrogram_equals_numpy():
    wave = waves(48000)
    out = LogSpectrogram(L3)(wave)
    assert out.shape == (2, 1, 197, 257)
    reference = np.log(np.maximum(numpy_magnitudes(wave[1].double().numpy(), 512, 242, 512), 1e-12))
    np.testing.assert_allclose(out[1, 0].numpy(), reference / 5, atol=2e-4)


def test_cola_log_mel_equals_numpy_with_a_short_window():
    wave = waves(16000)
    out = LogMel(COLA)(wave)
    assert out.shape == (2, 1, 98, 64)
    mel = numpy_magnitudes(wave[0].double().numpy(), 400, 160, 1024) @ numpy_mel(COLA)
    np.testing.assert_allclose(out[0, 0].numpy(), np.log(np.clip(mel, 1e-5, 1e8)), atol=1e-3)


def test_mmv_log_mel_pads_the_end():
    wave = waves(153600, 1)
    out = LogMel(MMV)(wave)
    assert out.shape == (1, 1, 150, 80)
    padded = np.pad(wave[0].double().numpy(), (0, 1024))
    mel = numpy_magnitudes(padded, 2048, 1024, 2048) @ numpy_mel(MMV)
    np.testing.assert_allclose(out[0, 0].numpy(), np.log1p(1e4 * mel), atol=1e-3)


@pytest.mark.parametrize(("scale", "norm"), [("htk", ""), ("slaney", ""), ("slaney", "slaney")])
@pytest.mark.parametrize("window", ["hann", "hamming"])
def test_centred_log_mel_equals_torchaudio(scale, norm, window):
    params = SpectrumParams(
        win=800, mel_scale=scale, mel_norm=norm, window=window, power=2.0, log="none"
    )
    reference = torchaudio.transforms.MelSpectrogram(
        16000, 1024, 800, 160, 60.0, 7800.0, n_mels=64, power=2.0, mel_scale=scale,
        norm=norm or None, window_fn=getattr(torch, f"{window}_window"),
    )(waves(8000))  # fmt: skip
    torch.testing.assert_close(LogMel(params)(waves(8000))[:, 0], reference.transpose(1, 2))


def test_log_rules_are_their_formulas():
    base = {"framing": "valid", "floor": 1e-3}
    raw = LogMel(SpectrumParams(log="none", **base))(waves(4000)).double()
    level = 10 * raw.clamp(min=1e-3).log10()
    expected = {
        "ln_eps": (raw + 1e-3).log(),
        "ln_1e4": (1 + 1e4 * raw).log(),
        "ln_clip": raw.clamp(1e-3, 1e8).log(),
        "ln_clip5": raw.clamp(min=1e-3).log() / 5,
        "log10_eps": (raw + 1e-3).log10(),
        "db": (level - level.amax(dim=(1, 2, 3), keepdim=True)).clamp(min=-20.0),
    }
    for rule, reference in expected.items():
        out = LogMel(SpectrumParams(log=rule, db_range=20.0, **base))(waves(4000))
        torch.testing.assert_close(out.double(), reference, atol=1e-4, rtol=1e-4, msg=rule)


def test_decibels_ignore_gain_and_silence_is_flat():
    mel = LogMel(SpectrumParams(log="db", floor=1e-10))
    torch.testing.assert_close(mel(waves(4000)), mel(0.1 * waves(4000)), atol=1e-3, rtol=0)
    assert torch.all(mel(torch.zeros(1, 4000)) == 0)


def test_fixed_normalisation():
    plain, scaled = SpectrumParams(), SpectrumParams(mean=-2.0, std=4.0)
    torch.testing.assert_close(
        LogMel(scaled)(waves(4000)), (LogMel(plain)(waves(4000)) + 2.0) / 4.0
    )


def test_a_tone_peaks_in_its_band():
    params = SpectrumParams(n_fft=2048, win=2048, hop=512, n_mels=40, framing="valid")
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(16000) / 16000)[None]
    band = int(LogMel(params)(tone)[0, 0].mean(0).argmax())
    edges = np.linspace(*(2595 * np.log10(1 + np.array([60, 7800]) / 700)), 42)
    assert abs(band - int(np.abs(edges[1:-1] - 2595 * np.log10(1 + 1000 / 700)).argmin())) <= 1


@pytest.mark.parametrize("params", [COLA, MMV, SpectrumParams()])
@pytest.mark.parametrize("samples", [4096, 5001, 9600])
def test_frames_equal_the_real_shape(params, samples):
    mel = LogMel(params)
    out = mel(waves(samples))
    assert mel.grid((samples,)) == tuple(out.shape[2:])
    assert mel.out_lengths(torch.tensor([samples, 0])).tolist() == [out.shape[2], 0]
    assert params.frame_rate == params.sample_rate / params.hop


def test_samples_behind_a_length_change_nothing():
    mel, lengths = LogMel(COLA), torch.tensor([4000, 2500])
    a, b = waves(4000), waves(4000)
    b[1, 2500:] = 7.0
    assert torch.equal(mel(a, lengths), mel(b, lengths))


def test_work_stays_in_fp32_and_outside_the_checkpoint():
    mel = LogMel(SpectrumParams())
    before = mel(waves(4000))
    assert mel.state_dict() == {}
    half = copy.deepcopy(mel).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(half(waves(4000)), before)


def test_first_use_in_inference_mode_serves_training():
    mel = LogMel(SpectrumParams())
    with torch.inference_mode():
        mel(waves(4000))
    wave = waves(4000).requires_grad_()
    mel(wave).sum().backward()
    assert wave.grad.abs().sum() > 0


def test_bad_records_and_inputs_are_refused():
    for bad in (
        {"framing": "centre"}, {"log": "log"}, {"window": "boxcar"}, {"mel_scale": "bark"},
        {"mel_norm": "area"}, {"win": 2048}, {"f_max": 9000.0}, {"f_min": 7900.0}, {"std": 0.0},
    ):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(bad)).replace("f_min", "f_max")):
            SpectrumParams(**bad)
    with pytest.raises(UserError, match="mono"):
        LogMel(COLA)(torch.zeros(2, 2, 16000))
    with pytest.raises(UserError, match="shorter than one window"):
        LogMel(COLA)(torch.zeros(2, 300))
    with pytest.raises(UserError, match="shorter than one window"):
        LogMel(SpectrumParams())(torch.zeros(2, 512))
