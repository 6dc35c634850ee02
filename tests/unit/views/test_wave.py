"""Operations on waveforms."""

import math

import pytest
import torch

from mmssl.views import wave


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_gain_is_uniform_in_decibels():
    quiet = torch.full((10,), 0.01)
    db = [
        20 * math.log10(wave.gain(quiet, generator(s), (-12, 6))[0].item() / 0.01)
        for s in range(400)
    ]
    assert -12 <= min(db) < -11.5
    assert 5.5 < max(db) <= 6.0
    assert sum(db) / len(db) == pytest.approx(-3, abs=0.8)


def test_gain_clips_at_full_scale():
    assert wave.gain(torch.tensor([0.9, -0.9]), generator(), (20, 20)).tolist() == [1.0, -1.0]


def test_noise_is_relative_to_the_maximum():
    for peak in (0.01, 1.0):
        x = torch.zeros(50_000)
        x[0] = -peak
        out = wave.noise(x, generator(), (0.1, 0.1))
        assert out[1:].std().item() == pytest.approx(0.1 * peak, rel=0.02)
        assert out[1:].mean().abs().item() < 0.002 * peak


def test_silence_and_nothing_stay_finite():
    assert wave.noise(torch.zeros(8), generator()).eq(0).all()
    assert wave.noise(torch.zeros(0), generator()).shape == (0,)
    assert wave.normalize(torch.zeros(8)).eq(0).all()
    assert wave.normalize(torch.full((8,), 0.3)).abs().max() < 0.5


def test_normalize():
    out = wave.normalize(torch.randn(1000, generator=generator()) * 0.01 + 5)
    assert out.mean().abs() < 1e-3
    assert out.square().mean().item() == pytest.approx(1, rel=1e-3)
