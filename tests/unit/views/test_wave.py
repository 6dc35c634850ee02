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
    assert wave.band_noise(torch.zeros(0), generator(), 8000).shape == (0,)
    assert wave.reverb(torch.zeros(0), generator(), 8000).shape == (0,)
    assert wave.normalize(torch.zeros(8)).eq(0).all()
    assert wave.normalize(torch.full((8,), 0.3)).abs().max() < 0.5


def test_normalize():
    out = wave.normalize(torch.randn(1000, generator=generator()) * 0.01 + 5)
    assert out.mean().abs() < 1e-3
    assert out.square().mean().item() == pytest.approx(1, rel=1e-3)


def test_pitch_multiplies_frequencies_and_keeps_the_tempo():
    seconds = torch.arange(8000) / 8000
    tone = torch.sin(2 * math.pi * 500 * seconds)
    bursts = tone * ((seconds % 0.25) < 0.05)  # begin at every quarter of a second
    seen = set()
    for seed in range(40):
        out = wave.pitch(tone, torch.Generator().manual_seed(seed))
        assert out.shape == tone.shape
        peak = torch.fft.rfft(out * torch.hann_window(8000)).abs().argmax().item()  # Hz
        seen.add(round(peak / 25))
        assert peak == pytest.approx(25 * round(peak / 25), abs=2)
        moved = wave.pitch(bursts, torch.Generator().manual_seed(seed))
        power = moved.square().unfold(0, 400, 400).mean(1).reshape(4, 5)  # windows of 50 ms
        assert power[:, 0].sum() > 0.75 * power.sum()
    assert seen == set(range(16, 26))  # twentieths of 500 Hz from 0.8 to 1.25
    assert wave.pitch(tone, torch.Generator(), (1.0, 1.0)) is tone
    assert not wave.pitch(torch.zeros(0), torch.Generator()).numel()


def test_a_fade_keeps_the_middle_and_silences_the_ends():
    ramps = [wave.fade(torch.ones(1000), generator(s), probability=1.0) for s in range(40)]
    assert len({tuple(r.tolist()) for r in ramps}) == 40
    for ramp in ramps:
        assert ramp[499:501].eq(1).all()
        assert ramp.min() >= 0
        assert ramp[0] < 0.1
        assert ramp[-1] < 0.1
    kept = [wave.fade(torch.ones(100), generator(s)).eq(1).all().item() for s in range(400)]
    assert sum(kept) / 400 == pytest.approx(0.5, abs=0.1)


def test_a_mask_replaces_an_eighth_by_faint_noise():
    first = set()
    for s in range(40):
        out = wave.time_mask(torch.ones(8000), generator(s), probability=1.0)
        hidden = (out != 1).nonzero()[:, 0]
        assert len(hidden) == 1000 == hidden[-1] - hidden[0] + 1
        assert out[hidden].std().item() == pytest.approx(0.01, rel=0.1)
        first.add(int(hidden[0]))
    assert len(first) > 35
    assert wave.time_mask(torch.ones(4), generator(), probability=1.0).eq(1).all()


def test_band_noise_has_its_band_and_ratio():
    speech = 0.1 * torch.randn(16_000, generator=generator(1))
    ratios = []
    for seed in range(30):
        added = wave.band_noise(speech, generator(seed), 16_000, (80, 240), (5, 15)) - speech
        power = torch.fft.rfft(added).abs().square()  # bins of 1 Hz
        assert power[80:241].sum() / power.sum() > 0.9999
        ratios.append(10 * math.log10(speech.square().sum() / added.square().sum()))
    assert 5 <= min(ratios) < 7
    assert 13 < max(ratios) <= 15
    added = wave.band_noise(speech, generator(), 16_000, db=(7, 7)) - speech
    ratio = 10 * math.log10(speech.square().sum() / added.square().sum())
    assert ratio == pytest.approx(7, abs=0.1)
    assert wave.band_noise(torch.zeros(800), generator(), 8000).eq(0).all()
    assert wave.band_noise(torch.ones(8), generator(), 8000).isfinite().all()  # no bin in the band


def test_reverberation_keeps_length_energy_and_place():
    speech = 0.1 * torch.randn(8000, generator=generator(1))
    for seed in range(20):
        out = wave.reverb(speech, generator(seed), 8000)
        assert out.shape == speech.shape
        assert float(out.norm()) == pytest.approx(float(speech.norm()), rel=1e-4)
        lags = torch.fft.irfft(
            torch.fft.rfft(out, 16_000) * torch.fft.rfft(speech, 16_000).conj(), 16_000
        )
        assert int(lags.abs().argmax()) == 0
    assert wave.reverb(torch.zeros(800), generator(), 8000).eq(0).all()


def test_a_room_decays_by_60_db_in_its_time():
    click = torch.zeros(8000)
    click[0] = 1.0
    out = wave.reverb(click, generator(), 8000, decay_s=(0.5, 0.5), direct_db=3.0)
    direct, tail = out[0].square(), out[1:].square()
    assert 10 * math.log10(direct / tail.sum()) == pytest.approx(3, abs=1e-3)
    early, late = tail[:400].mean(), tail[2000:2400].mean()
    assert 10 * math.log10(early / late) == pytest.approx(30, abs=2)  # a quarter of a second apart


def test_rescaled_peaks_are_uniform():
    wave_S = 0.1 * torch.randn(400, generator=generator())
    peaks = torch.stack([wave.rescale(wave_S, generator(i)).abs().max() for i in range(300)])
    assert 0.45 < float(peaks.mean()) < 0.55
    assert float(peaks.max()) <= 1
    twice = wave.rescale(2 * wave_S, generator(3))
    torch.testing.assert_close(twice, wave.rescale(wave_S, generator(3)))
    assert wave.rescale(torch.zeros(8), generator()).eq(0).all()
    assert wave.rescale(torch.zeros(0), generator()).shape == (0,)
