"""Pitch, voicing, energy and zero crossings of sounds whose values are known."""

import math

import numpy as np
import pytest
import torch
import torchaudio

from mmssl.frontends.prosody import Prosody, interpolated

HZ = 16_000


@pytest.fixture(scope="module")
def prosody():
    return Prosody(HZ, 400, 160, 60.0, 400.0)


def voice(hz, seconds=1.0, harmonics=8):
    """A sum of harmonics that fall by 6 dB per octave."""
    t = torch.arange(round(seconds * HZ)) / HZ
    return 0.2 * sum(torch.sin(2 * math.pi * k * hz * t + k) / k for k in range(1, harmonics + 1))


@pytest.mark.parametrize("hz", [70.0, 110.0, 181.0, 233.0, 377.0])
def test_the_fundamental_of_a_voice(prosody, hz):
    x_T4 = prosody(voice(hz)[None])[0, 0]
    inside = x_T4[4:-4]
    assert inside[:, 1].eq(1).all()
    torch.testing.assert_close(inside[:, 0].exp(), torch.full((93,), hz), rtol=0.006, atol=0)


def test_a_glide_is_followed_as_torchaudio_follows_it(prosody):
    t = torch.arange(HZ) / HZ
    hz = 100 + 80 * t  # Hz
    phase = 2 * math.pi * (100 * t + 40 * t.square())
    wave = 0.2 * sum(torch.sin(k * phase) / k for k in range(1, 6))
    x_T4 = prosody(wave[None])[0, 0]
    got = x_T4[8:-8, 0].exp()
    torch.testing.assert_close(got, hz[::160][8:93], rtol=0.02, atol=0)
    theirs = torchaudio.functional.detect_pitch_frequency(wave, HZ, 0.01, 5, 60, 400)
    torch.testing.assert_close(got[:80], theirs[8:88], rtol=0.05, atol=0)


def test_noise_and_silence_have_no_voice(prosody):
    noise = 0.1 * torch.randn(HZ, generator=torch.Generator().manual_seed(0))
    x_PT4 = prosody(torch.stack([noise, torch.zeros(HZ)]))[:, 0]
    assert float(x_PT4[0, :, 1].mean()) < 0.05
    assert x_PT4[1, :, 1].eq(0).all()
    middle = math.log(math.sqrt(60 * 400))
    torch.testing.assert_close(x_PT4[1, :, 0], torch.full((101,), middle))


def test_energy_and_crossings(prosody):
    wave = 0.5 * torch.sin(2 * math.pi * 1000 * torch.arange(HZ) / HZ + 0.3)
    inside = prosody(wave[None])[0, 0, 4:-4]
    torch.testing.assert_close(inside[:, 2], torch.full((93,), math.log(0.125)), atol=1e-3, rtol=0)
    assert float(inside[:, 3].mean()) == pytest.approx(2 * 1000 / HZ, rel=0.01)


def test_gaps_are_bridged():
    known = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    values = torch.tensor([[9.0, 1, 9, 9, 4, 9]]).expand(2, 6)
    got = interpolated(values, known, 7.0)
    want = np.interp(range(6), [1, 4], [1.0, 4.0])
    np.testing.assert_allclose(got[0], want)
    assert got[1].eq(7).all()


def test_what_lies_behind_an_item_changes_nothing(prosody):
    wave = voice(150.0)
    longer = torch.cat([wave, torch.randn(8000)])[None]
    got = prosody(longer, torch.tensor([HZ]))[0, 0, :101]
    torch.testing.assert_close(got, prosody(wave[None])[0, 0], atol=1e-5, rtol=1e-5)
