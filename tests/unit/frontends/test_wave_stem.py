"""The wav2vec stem: lengths, matrix products, norms and padding, gradient scale."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmssl.frontends.wave_stem import RowConv, WaveStem, scale_gradient
from mmssl.types import UserError

SHORT = {"channels": 8, "kernels": (5, 3, 2), "strides": (3, 2, 2)}
NORMS = ("group", "layer", "group1", "none")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def shuffled(module, std=0.5):
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module.eval()


def test_frames_of_wav2vec():
    stem = WaveStem(4, channels=2)
    for samples, frames in (
        (400, 1),
        (719, 1),
        (720, 2),
        (16000, 49),
        (250000, 781),
        (320000, 999),
    ):
        assert stem.grid((samples,)) == (frames,) == ((samples - 400) // 320 + 1,)
    assert stem.strides == (320,)
    assert stem.fields() == ((320, 400, 199.5),)
    lengths = torch.tensor([0, 10, 400, 16000])
    assert stem.out_lengths(lengths).tolist() == [0, 1, 1, 49]
    tokens, grid = stem(torch.randn(2, 1, 16000))
    assert grid == (49,)
    assert tokens.shape == (2, 49, 4)


def test_frames_of_vq_wav2vec():
    stem = WaveStem(
        4, 2, (10, 8, 4, 4, 4, 1, 1, 1), (5, 4, 2, 2, 2, 1, 1, 1), norm="group1", activation="relu",
        log_compress=True,
    )  # fmt: skip
    assert stem.fields()[0][:2] == (160, 465)
    out = stem.encode(torch.randn(1, 1, 4000))
    assert torch.all(out.raw_PTC >= 0)
    plain = WaveStem(4, 2, stem.kernels, stem.steps, norm="group1", activation="relu")
    plain.load_state_dict(stem.state_dict())
    raw = plain.encode(torch.zeros(1, 1, 4000)).raw_PTC
    assert torch.equal(stem.encode(torch.zeros(1, 1, 4000)).raw_PTC, (raw.abs() + 1).log())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs", [1, 6])
@pytest.mark.parametrize(
    ("kernel", "stride", "samples"),
    [(10, 5, 52), (3, 2, 31), (3, 2, 30), (2, 2, 31), (1, 1, 9), (3, 1, 9), (8, 3, 29), (5, 3, 23)],
)
def test_matrix_products_are_the_convolution(kernel, stride, samples, inputs, bias):
    conv = RowConv(inputs, 4, kernel, stride, bias=bias).double()
    x = torch.randn(3, inputs, samples, dtype=torch.float64, requires_grad=True)
    expected = F.conv1d(x, conv.weight, conv.bias, stride)
    out = conv(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    weights = [x, *conv.parameters()]
    probe = torch.randn_like(out)
    ours = torch.autograd.grad((out * probe).sum(), weights)
    theirs = torch.autograd.grad((expected * probe).sum(), weights)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("norm", NORMS)
def test_padding_changes_no_valid_frame_and_rows_are_independent(norm):
    stem = shuffled(WaveStem(6, norm=norm, bias=True, **SHORT))
    lengths = torch.tensor([120, 71, 40])
    x = torch.randn(3, 1, 120)
    x = x.masked_fill(torch.arange(120) >= lengths[:, None, None], 0.0)
    out = stem.encode(x, lengths)
    frames = stem.out_lengths(lengths).tolist()
    for row, (samples, valid) in enumerate(zip(lengths.tolist(), frames, strict=True)):
        alone = stem.encode(x[row : row + 1, :, :samples])
        assert alone.grid == (valid,)
        for mine, other in zip(out[:3], alone[:3], strict=True):
            torch.testing.assert_close(mine[row : row + 1, :valid], other, atol=1e-5, rtol=1e-4)
    assert all(torch.isfinite(t).all() for t in out[:3])


def test_group_norm_follows_the_first_convolution_only():
    stem = WaveStem(6, norm="group", **SHORT)
    assert [type(n).__name__ for n in stem.norms] == ["TimeGroupNorm", "Identity", "Identity"]
    assert stem.norms[0].num_groups == 8
    assert all(conv.bias is None for conv in stem.convs)
    # a waveform twice as loud gives the same frames: every channel is normalised over time
    x = torch.randn(2, 1, 90)
    torch.testing.assert_close(stem(2 * x)[0], stem(x)[0], atol=1e-3, rtol=1e-3)


def test_features_are_the_normed_outputs_and_tokens_their_projection():
    stem = shuffled(WaveStem(6, norm="layer", **SHORT))
    out = stem.encode(torch.randn(2, 1, 90))
    assert torch.equal(out.features_PTC, stem.features(out.raw_PTC))
    assert torch.equal(out.tokens_PND, stem.proj(out.features_PTC))
    assert torch.equal(stem(torch.zeros(1, 1, 90))[0], stem.encode(torch.zeros(1, 1, 90))[0])


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_gradient_scale_reaches_the_convolutions_only(scale):
    stem = shuffled(WaveStem(6, norm="layer", gradient_scale=scale, **SHORT))
    whole = WaveStem(6, norm="layer", **SHORT)
    whole.load_state_dict(stem.state_dict())
    x = torch.randn(2, 1, 90)
    assert torch.equal(stem(x)[0], whole(x)[0])
    for model in (stem, whole):
        out = model.encode(x)
        (out.tokens_PND.square().sum() + out.raw_PTC.square().mean()).backward()
    for (name, p), q in zip(stem.named_parameters(), whole.parameters(), strict=True):
        factor = scale if name.startswith(("convs", "norms")) else 1.0
        torch.testing.assert_close(p.grad, factor * q.grad, atol=1e-6, rtol=1e-5)


def test_scaled_gradient_is_exact():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    (scale_gradient(x, 0.1) * torch.arange(5)).sum().backward()
    assert torch.equal(x.grad, 0.1 * torch.arange(5, dtype=torch.float64))


def test_initial_convolutions_keep_the_variance():
    stem = WaveStem(6, channels=256, norm="group")
    weight = stem.convs[1].weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (3 * 256)), rel=0.02)


def test_bad_inputs_are_refused():
    with pytest.raises(UserError, match="fewer than the 400"):
        WaveStem(4, 2).grid((399,))
    with pytest.raises(UserError, match="no waveform"):
        WaveStem(4, 2).grid((100, 80))
    with pytest.raises(UserError, match="2 kernels, 1 strides"):
        WaveStem(4, 2, (3, 3), (2,))
    with pytest.raises(UserError, match="norm 'batch'"):
        WaveStem(4, 2, norm="batch")
    with pytest.raises(UserError, match="activation: 'tanh'"):
        WaveStem(4, 2, activation="tanh")
