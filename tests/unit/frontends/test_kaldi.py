"""Kaldi features and utterance-level processing: independent references and padding laws."""

import numpy as np
import pytest
import torch
import torchaudio

from mmssl.frontends.kaldi import Kaldi, KaldiParams, UtteranceFeatures
from mmssl.frontends.spectra import LogMel, SpectrumParams
from mmssl.types import UserError

MFCC = KaldiParams(ceps=13, n_mels=23, window="povey")
MEL80 = SpectrumParams(
    n_fft=400, win=400, hop=160, n_mels=80, f_min=0, f_max=0, power=2, log="ln_eps", floor=1e-10
)


def waves(samples, rows=2):
    return 0.3 * torch.randn(rows, samples, generator=torch.Generator().manual_seed(1))


def test_filter_bank_equals_an_independent_transform():
    audio_utils = pytest.importorskip("transformers.audio_utils")
    wave = waves(4000, 1)
    filters = audio_utils.mel_filter_bank(
        257, 80, 20, 8000, 16000, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    expected = audio_utils.spectrogram(
        wave[0].double().numpy(), audio_utils.window_function(400, "hamming", periodic=False),
        400, 160, 512, power=2.0, center=False, preemphasis=0.97, mel_filters=filters,
        log_mel="log", mel_floor=1.192092955078125e-07, remove_dc_offset=True,
    ).T  # fmt: skip
    out = Kaldi(KaldiParams())(wave)
    assert out.shape == (1, 1, 23, 80)
    np.testing.assert_allclose(out[0, 0].numpy(), expected, atol=2e-3)


def test_cepstra_and_deltas_are_huberts_first_features():
    wave = waves(16000)
    signal = UtteranceFeatures(Kaldi(MFCC), deltas=2)
    out = signal(wave)
    assert out.shape == (2, 1, 98, 39)
    assert signal.grid((16000,)) == (98, 39)
    for row in range(2):
        ceps = torchaudio.compliance.kaldi.mfcc(
            wave[row : row + 1], sample_frequency=16000, use_energy=False
        ).T
        deltas = torchaudio.functional.compute_deltas(ceps)
        second = torchaudio.functional.compute_deltas(deltas)
        expected = torch.cat([ceps, deltas, second]).T
        torch.testing.assert_close(out[row, 0], expected, atol=1e-5, rtol=1e-5)


def test_mel80_sets_the_level_before_and_the_moments_behind():
    wave = waves(8000) * torch.tensor([[0.01], [1.0]])
    plain = UtteranceFeatures(LogMel(MEL80), level_db=-25)(wave)
    for row in range(2):
        loud = wave[row] * 10 ** (-25 / 20) / wave[row].square().mean().sqrt()
        transform = torchaudio.transforms.MelSpectrogram(16000, 400, 400, 160, n_mels=80, power=2)
        expected = (transform(loud) + 1e-10).log().T
        torch.testing.assert_close(plain[row, 0], expected, atol=1e-4, rtol=1e-4)
    out = UtteranceFeatures(LogMel(MEL80), level_db=-25, cmvn=True)(wave)[:, 0]
    torch.testing.assert_close(out.mean(1), torch.zeros(2, 80), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(1), torch.ones(2, 80), atol=1e-3, rtol=0)
    # the level is lost on normalised features
    other = UtteranceFeatures(LogMel(MEL80), cmvn=True)(wave)[:, 0]
    torch.testing.assert_close(out[1], other[1], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("base", ["fbank", "mfcc"])
def test_padding_changes_nothing(base, stack):
    signal = UtteranceFeatures(
        Kaldi(KaldiParams() if base == "fbank" else MFCC), level_db=-25, deltas=2, cmvn=True,
        stack=stack,
    )  # fmt: skip
    lengths = torch.tensor([8000, 5123, 700])
    wave = waves(8000, 3)
    out = signal(wave, lengths)
    other = signal(wave.masked_fill(torch.arange(8000) >= lengths[:, None], 9.0), lengths)
    assert torch.equal(out, other)
    assert torch.isfinite(out).all()
    frames = signal.out_lengths(lengths).tolist()
    for row in (0, 1):
        alone = signal(wave[row : row + 1, : lengths[row]])
        assert alone.shape[2] == frames[row]
        torch.testing.assert_close(out[row, :, : frames[row]], alone[0], atol=2e-4, rtol=2e-4)
        assert torch.all(out[row, :, frames[row] :] == 0)


def test_moments_count_valid_frames_only():
    signal = UtteranceFeatures(Kaldi(KaldiParams()), deltas=1, cmvn=True)
    lengths = torch.tensor([8000, 4000])
    out = signal(waves(8000), lengths)[1, 0, : (4000 - 400) // 160 + 1]
    torch.testing.assert_close(out.mean(0), torch.zeros(160), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(0), torch.ones(160), atol=1e-3, rtol=0)


def test_stacked_frames_lie_side_by_side_and_set_the_rate():
    single = UtteranceFeatures(Kaldi(KaldiParams()), cmvn=True)
    joined = UtteranceFeatures(Kaldi(KaldiParams()), cmvn=True, stack=3)
    wave = waves(8000)
    a, b = single(wave), joined(wave)
    assert (a.shape[2], b.shape[2], b.shape[3]) == (48, 16, 240)
    assert torch.equal(b[0, 0, 5], a[0, 0, 15:18].flatten())
    assert (single.params.frame_rate, joined.params.frame_rate) == (100.0, 100 / 3)
    assert joined.out_lengths(torch.tensor([0, 400, 1000, 8000])).tolist() == [0, 1, 1, 16]


def test_bad_parameters_are_refused():
    for bad, match in (
        ({"window": "kaiser"}, "window"),
        ({"ceps": 90}, "raise n_mels"),
        ({"f_min": 9000.0}, "f_max"),
    ):
        with pytest.raises(UserError, match=match):
            KaldiParams(**bad)
    with pytest.raises(UserError, match="deltas"):
        UtteranceFeatures(Kaldi(MFCC), deltas=-1)
    with pytest.raises(UserError, match="shorter than one window"):
        Kaldi(MFCC)(waves(399))
    with pytest.raises(UserError, match="no 3 frames"):
        UtteranceFeatures(Kaldi(MFCC), stack=3)(waves(700))
    with pytest.raises(UserError, match="mono"):
        Kaldi(MFCC)(torch.zeros(1, 2, 4000))


@pytest.mark.parametrize("stack", [1, 3])
def test_the_first_frame_is_centred_where_it_says(stack):
    params = KaldiParams(sample_rate=8000, win=200, hop=80, n_mels=20)
    features = UtteranceFeatures(Kaldi(params), stack=stack)
    wave = torch.zeros(1, 1600)
    wave[0, 700] = 1.0  # a click
    energy = features(wave)[0, 0].exp().sum(-1)
    heard = energy > energy.min() * 1.01
    centres = torch.arange(len(energy))[heard] + features.first_centre
    assert centres.double().mean().item() * 80 * stack == pytest.approx(700, abs=40 * stack)
