"""CLAR's three pictures of a sound."""

import math

import pytest
import torch
import torchaudio

from mmssl.frontends.spectra import SpectrumParams
from mmssl.frontends.stack import SpectrumStack

PARAMS = SpectrumParams(
    n_fft=2048,
    win=2048,
    hop=128,
    n_mels=128,
    f_min=40,
    f_max=8000,
    mel_scale="slaney",
    mel_norm="slaney",
)
TIME = torch.arange(16000) / 16000


def test_one_second_has_the_published_shape():
    assert SpectrumStack(PARAMS)(torch.zeros(2, 16000)).shape == (2, 3, 126, 128)
    assert SpectrumStack(PARAMS).grid((16000,)) == (126, 128)


def test_silence_is_the_floor():
    x = SpectrumStack(PARAMS)(torch.zeros(1, 16000))[0]
    assert x[0].unique().tolist() == [pytest.approx(20 * -5 - 20)]
    assert x[2].unique().tolist() == [pytest.approx(10 * -5 - 10)]


def test_a_tone_has_its_level_and_phase():
    """A cosine of amplitude A at a band's centre: magnitude A / 2 x the window's sum."""
    band = 64
    hz = 40 * 200 ** (band / 128)
    wave = 0.5 * torch.cos(2 * math.pi * hz * TIME.double() + 0.3).float()
    x = SpectrumStack(PARAMS)(wave[None])[0]
    frames = torch.arange(20, 100)
    want = 20 * math.log10(0.5 / 2 * 1024) - 20
    torch.testing.assert_close(x[0, 20:100, band], torch.full((80,), want), atol=0.01, rtol=0)
    assert x[0, 50].argmax() == band
    start = (frames * 128 - 1024) / 16000  # a frame's first sample
    phase = 2 * math.pi * hz * start.double() + 0.3
    error = torch.remainder(x[1, 20:100, band].double() - phase + math.pi, 2 * math.pi) - math.pi
    assert float(error.abs().max()) < 0.01


def test_the_third_picture_is_torchaudios_mel_in_decibels():
    g = torch.Generator().manual_seed(0)
    wave = 0.1 * torch.randn(1, 16000, generator=g)
    mel = torchaudio.transforms.MelSpectrogram(
        16000,
        2048,
        hop_length=128,
        f_min=40,
        f_max=8000,
        n_mels=128,
        norm="slaney",
        mel_scale="slaney",
    )(wave)[0].T
    want = 10 * mel.clamp(min=1e-5).log10() - 10
    torch.testing.assert_close(SpectrumStack(PARAMS)(wave)[0, 2], want, atol=1e-4, rtol=1e-4)
