"""Augmentations of linear mel spectrograms."""

import math

import pytest
import torch

from mmssl.frontends.spectra import LogMel, SpectrumParams
from mmssl.views.mel import Items, mel_mix, mel_noise, mel_shift

P, T, F = 64, 12, 16


def cells(seed=0):
    return torch.rand(P, 1, T, F, generator=torch.Generator().manual_seed(seed)) + 0.1


def items(steps=T, other=None):
    seeds = torch.arange(P) * 7919 + 1
    return Items(
        seeds, torch.full((P,), steps), torch.zeros(P, 1, T, F) if other is None else other
    )


def test_noise_multiplies_by_one_and_a_half_normal():
    factor = mel_noise(cells(), items(), std=0.5) / cells()
    assert float(factor.min()) >= 1 - 1e-6
    excess = (factor - 1).flatten().double()
    assert float(excess.mean()) == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=0.02)
    assert float(excess.square().mean()) == pytest.approx(0.25, rel=0.03)


def test_mixing_adds_a_share_of_the_own_energy():
    x, other = cells(), 1000 * cells(1)
    mixed = mel_mix(x, items(other=other), share=0.25)
    torch.testing.assert_close(mixed.sum((1, 2, 3)), 1.25 * x.sum((1, 2, 3)))
    ratio = (mixed - x) / other
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio), rtol=1e-3, atol=0)


def test_silence_adds_nothing_and_stays_finite():
    torch.testing.assert_close(mel_mix(cells(), items()), cells())


def test_a_shift_moves_around_in_time_and_out_of_the_bands():
    x = cells()
    moved = mel_shift(x, items(), bands=3)
    found = set()
    for p in range(P):
        options = [
            (by, up)
            for by in range(T)
            for up in range(-3, 4)
            if torch.equal(moved[p, 0], shifted(x[p, 0], by, up))
        ]
        assert len(options) == 1
        found.add(options[0])
    assert {by for by, _ in found} == set(range(T))
    assert {up for _, up in found} == set(range(-3, 4))


def shifted(x_TF, by, up):
    out = torch.zeros_like(x_TF)
    low, high = max(0, up), min(F, F + up)
    out[:, low:high] = x_TF.roll(by, 0)[:, low - up : high - up]
    return out


def test_what_lies_behind_an_end_stays_there():
    x = cells()
    moved = mel_shift(x, items(steps=5), bands=0)
    assert torch.equal(moved[:, :, 5:], x[:, :, 5:])
    torch.testing.assert_close(moved[:, :, :5].sum(2), x[:, :, :5].sum(2))
    assert not torch.equal(moved[:, :, :5], x[:, :, :5])


def test_the_logarithm_is_taken_back_and_again():
    mel = LogMel(SpectrumParams(log="ln_eps", floor=0.01, mean=-2.0, std=3.0))
    plain = LogMel(SpectrumParams(log="none"))
    wave = 0.1 * torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    linear = mel.linear(mel(wave))
    torch.testing.assert_close(linear, plain(wave), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mel.logarithmic(linear), mel(wave), atol=1e-5, rtol=1e-5)
