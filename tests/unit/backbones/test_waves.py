"""Encoders of waveforms: sinc filters against the formula, SincNet, ResNet-18 in one dimension."""

import math

import numpy as np
import pytest
import torch
from conv_laws import dummies_change_nothing
from torch import nn

from mmssl.backbones.waves import SincNet, WaveResNet18
from mmssl.frontends.sinc import SincConv
from mmssl.types import UserError

HZ = 16000


def response(filters, hz):
    """Gain of every filter at a frequency."""
    place = torch.arange(filters.shape[1], dtype=torch.float64)
    angle = 2 * math.pi * hz / HZ * place
    real, imaginary = (filters.double() @ f(angle) for f in (torch.cos, torch.sin))
    return torch.hypot(real, imaginary)


def test_a_filter_passes_its_band():
    conv = SincConv(1, 251, HZ)
    with torch.no_grad():
        conv.low_hz.fill_(1000 - 50)
        conv.band_hz.fill_(1000 - 50)
    filters = conv.filters().detach()
    gain = HZ / (2 * 1000)
    db = lambda hz: 20 * math.log10(float(response(filters, hz)) / gain)  # noqa: E731
    assert float(response(filters, 1500)) == pytest.approx(8.0, rel=0.01)
    assert db(1000) == pytest.approx(-6.02, abs=0.1)
    assert db(2000) == pytest.approx(-6.02, abs=0.1)
    assert db(500) < -50
    assert db(3000) < -50


def test_the_bank_has_two_numbers_per_filter_and_starts_in_mel():
    conv = SincConv()
    assert sum(p.numel() for p in conv.parameters()) == 160
    mel = np.linspace(2595 * np.log10(1 + 30 / 700), 2595 * np.log10(1 + 7900 / 700), 81)
    edges = 700 * (10 ** (mel / 2595) - 1)
    np.testing.assert_allclose(conv.low_hz.detach(), edges[:-1], rtol=1e-5)
    np.testing.assert_allclose(conv.band_hz.detach(), np.diff(edges), rtol=1e-4)


def test_the_filters_are_those_of_the_release():
    """Tap by tap in fp64, with the release's window; the middle tap is 1."""
    torch.manual_seed(0)
    conv = SincConv(5, 31, HZ)
    with torch.no_grad():
        conv.low_hz.normal_(0, 1000)
        conv.band_hz.normal_(0, 1000)
    low = 50 + np.abs(conv.low_hz.detach().double().numpy())
    high = np.clip(low + 50 + np.abs(conv.band_hz.detach().double().numpy()), 50, HZ / 2)
    got = conv.filters().detach().double().numpy()
    window = 0.54 - 0.46 * np.cos(2 * np.pi * np.linspace(0, 31 / 2 - 1, 15) / 31)
    for c in range(5):
        for k in range(15):
            t = (k - 15) / HZ
            sinc = lambda f: 2 * f * np.sin(2 * np.pi * f * t) / (2 * np.pi * f * t)  # noqa: B023, E731
            want = (sinc(high[c]) - sinc(low[c])) * window[k] / (2 * (high[c] - low[c]))
            assert got[c, k] == pytest.approx(want, abs=1e-5)
            assert got[c, 30 - k] == got[c, k]
        assert got[c, 15] == 1.0


def test_even_kernels_are_refused():
    with pytest.raises(UserError, match="250 taps have no middle"):
        SincConv(4, 250)


def test_filters_stay_fp32_under_autocast():
    conv, wave = SincConv(4, 31), torch.randn(2, 1, 200)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(wave), SincConv.forward(conv, wave.float()))
        assert conv(wave).dtype == torch.float32


def small_sincnet():
    torch.manual_seed(0)
    return SincNet(samples=400, shift=100, filters=6, kernel=31, widths=(8, 5))


def test_sincnet_has_the_published_sizes():
    net = SincNet()
    assert net.flat_norm.normalized_shape == (6420,)
    assert [tuple(n.weight.shape) for n in net.norms] == [(80, 983), (60, 326), (60, 107)]
    assert net.grid((3200,)) == (1,)
    assert net.grid((16000,)) == (81,)
    assert net.width == 2048


def test_every_chunk_is_encoded_by_itself():
    net = small_sincnet().eval()
    wave = torch.randn(2, 1, 900)
    tokens, grid = net(wave)
    assert grid == (6,)
    for i in range(6):
        alone, one = net(wave[..., 100 * i : 100 * i + 400])
        assert one == (1,)
        torch.testing.assert_close(tokens[:, i], alone[:, 0], atol=1e-5, rtol=1e-5)


def test_chunks_behind_an_end_enter_no_statistics():
    net, lengths = small_sincnet().train(), torch.tensor([900, 600])
    wave = torch.randn(2, 1, 900)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    a, _ = net(wave, lengths)
    net.load_state_dict(state)
    wave[1, :, 600:] = 7.0
    b, _ = net(torch.cat([wave, torch.randn(2, 1, 500)], 2), lengths)
    assert net.out_lengths(lengths).tolist() == [6, 3]
    torch.testing.assert_close(a[0], b[0, :6], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a[1, :3], b[1, :3], atol=1e-5, rtol=1e-5)


def test_too_short_a_waveform_is_refused():
    with pytest.raises(UserError, match="at least 400 samples"):
        small_sincnet().grid((399,))


def test_the_wave_resnet_is_a_resnet18_of_nine_taps():
    torch.manual_seed(0)
    net = WaveResNet18(channels=8).eval()
    wave = torch.randn(2, 1, 4000)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv1d)]
    assert [m.kernel_size[0] for m in convs].count(9) == 16
    assert len(convs) == 16 + 1 + 3  # blocks, stem, skips
    tokens, grid = net(wave)
    assert tokens.shape == (2, *grid, 64) == (2, 125, 64)
    assert net.fields()[0].stride == 32
    numbers = sum(p.numel() for p in WaveResNet18().parameters())
    blocks = [(64, 64), (64, 128), (128, 256), (256, 512)]
    want = 7 * 64 + 2 * 64
    for before, after in blocks:
        want += 9 * before * after + 3 * 9 * after * after + 8 * after
        want += before * after + 2 * after if before != after else 0
    assert numbers == want


def test_items_that_do_not_exist_change_nothing():
    dummies_change_nothing(lambda: WaveResNet18(channels=4), torch.randn(3, 1, 500))


def test_the_wave_resnet_refuses_spectrograms():
    with pytest.raises(UserError, match="reads a waveform"):
        WaveResNet18().grid((96, 64))
