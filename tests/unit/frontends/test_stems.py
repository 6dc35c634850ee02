"""Convolutional stems: arithmetic, locality, padding invariance, memory layout."""

import pytest
import torch
from torch import nn

from mmssl.frontends.patches import padding_mask
from mmssl.frontends.stems import ChannelNorm, ConvStem, VideoConvStem
from mmssl.types import UserError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(64, 40), (101, 33), (17, 64)])
@pytest.mark.parametrize("kernels", [None, (3, 3, 5), ((7, 3), 3, (4, 3))])
def test_grid_arithmetic_equals_the_real_map(shape, kernels):
    stem = ConvStem(12, (4, 6, 8), ((2, 1), 2, 2), kernels)
    tokens, grid = stem(torch.randn(2, 1, *shape))
    maps = stem.stack(torch.randn(2, 1, *shape))
    assert grid == stem.grid(shape) == tuple(maps.shape[2:])
    assert tokens.shape == (2, grid[0] * grid[1], 12)
    assert stem.strides == (8, 4)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (2, 2), (3, 1), (3, 2), (4, 2)])
@pytest.mark.parametrize("frames", [4, 7])
def test_video_grid_arithmetic_equals_the_real_map(kernel, stride, frames):
    stem = VideoConvStem(12, (4, 8), (4, 2), None, kernel, stride)
    tokens, grid = stem(torch.randn(2, 3, frames, 24, 32))
    assert grid == stem.grid((frames, 24, 32))
    assert grid[1:] == (3, 4)
    assert tokens.shape == (2, grid[0] * 12, 12)
    assert stem.strides == (stride, 8, 8)


def test_rank_one_stem_serves_waveforms():
    stem = ConvStem(6, (4, 4), (5, 4), (10, 8), rank=1)
    tokens, grid = stem(torch.randn(2, 1, 400))
    assert grid == stem.grid((400,)) == (20,)
    assert tokens.shape == (2, 20, 6)


def test_temporal_merge_is_a_convolution_along_time():
    stem = VideoConvStem(5, (4,), (4,), None, temporal_kernel=3, temporal_stride=2)
    x = torch.randn(1, 3, 6, 8, 8)
    tokens, grid = stem(x)
    frames = torch.stack([stem.stack(x[:, :, t]) for t in range(6)], dim=2)  # (1, C, T, h, w)
    weight = stem.proj.weight.view(5, 3, 4).permute(0, 2, 1)[..., None, None]
    reference = nn.functional.conv3d(frames, weight, stem.proj.bias, (2, 1, 1), (1, 0, 0))
    assert grid == tuple(reference.shape[2:])
    torch.testing.assert_close(tokens, reference.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_a_token_sees_its_declared_field_only():
    stem = ConvStem(4, (6, 6), (2, 2))
    x = torch.randn(1, 1, 48, 48, requires_grad=True)
    tokens, grid = stem(x)
    row, column = 5, 7
    tokens[0, row * grid[1] + column].sum().backward()
    seen = x.grad[0, 0].abs() > 0
    for axis, place in ((1, row), (0, column)):
        (touched,) = torch.nonzero(seen.any(axis), as_tuple=True)
        field = stem.fields()[1 - axis]
        centre = field.first + place * field.stride
        assert (int(touched[0]), int(touched[-1])) == (
            centre - (field.size - 1) / 2,
            centre + (field.size - 1) / 2,
        )
        assert centre == (place + 0.5) * field.stride - 0.5


def test_input_masked_before_the_stem_does_not_leak():
    stem = ConvStem(4, (6, 6), (2, 2))
    x = torch.randn(1, 1, 16, 16, requires_grad=True)
    hidden = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    hidden[..., 4:8, 8:12] = True
    tokens, _ = stem(x.masked_fill(hidden, 0.0))
    tokens.square().sum().backward()
    assert torch.all(x.grad[hidden] == 0)
    assert x.grad[~hidden].abs().sum() > 0


@pytest.mark.parametrize("length", [24, 30, 41])
def test_padded_spectrogram_equals_the_short_one(length):
    stem = ConvStem(8, (6, 8), (2, 2), (3, 4))
    x = torch.randn(1, 1, length, 16)
    padded = torch.cat([x, 1e3 * torch.randn(1, 1, 20, 16)], dim=2)
    lengths = torch.tensor([length])
    (long, grid), (short, short_grid) = stem(padded, lengths), stem(x)
    steps = stem.out_lengths(lengths)
    assert int(steps) == short_grid[0]
    assert int((~padding_mask(steps, grid)).sum()) == short.shape[1]
    torch.testing.assert_close(long[:, : short.shape[1]], short, atol=1e-5, rtol=1e-5)


def test_padded_video_equals_the_short_one():
    stem = VideoConvStem(8, (6,), (4,), None, 3, 1)
    x = torch.randn(1, 3, 4, 8, 8)
    padded = torch.cat([x, torch.randn(1, 3, 3, 8, 8)], dim=2)
    (long, _), (short, _) = stem(padded, torch.tensor([4])), stem(x)
    assert stem.out_lengths(torch.tensor([4, 0, 7])).tolist() == [4, 0, 7]
    torch.testing.assert_close(long[:, : short.shape[1]], short, atol=1e-5, rtol=1e-5)


def test_channel_layer_norm_equals_torch_on_the_last_axis():
    norm = ChannelNorm(6)
    nn.init.normal_(norm.norm.weight)
    x = torch.randn(2, 6, 5, 4)
    reference = nn.functional.layer_norm(
        x.permute(0, 2, 3, 1), (6,), norm.norm.weight, norm.norm.bias, 1e-6
    )
    torch.testing.assert_close(norm(x), reference.permute(0, 3, 1, 2))


@pytest.mark.parametrize("norm", ["layer", "group", "none"])
def test_items_do_not_influence_each_other(norm):
    stem = ConvStem(4, (6, 6), (2, 2), norm=norm)
    x = torch.randn(3, 1, 16, 12)
    torch.testing.assert_close(stem(x)[0][1:2], stem(x[1:2])[0], atol=1e-5, rtol=1e-5)


def test_frames_stay_channels_last_through_the_stack():
    stem = VideoConvStem(8, (6, 8), (2, 2))
    layouts = []
    for conv in stem.stack.convs:
        conv.register_forward_hook(
            lambda _m, _i, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    stem(torch.randn(2, 4, 16, 16, 3).movedim(-1, 1))
    assert layouts == [True, True]


def test_bad_stems_are_refused():
    with pytest.raises(UserError, match="one of each per layer"):
        ConvStem(8, (4, 4), (2,))
    with pytest.raises(UserError, match="norm"):
        ConvStem(8, (4,), (2,), norm="batch")
    with pytest.raises(UserError, match="activation"):
        ConvStem(8, (4,), (2,), activation="tanh")
    with pytest.raises(UserError, match="frames are skipped"):
        VideoConvStem(8, (4,), (2,), temporal_kernel=2, temporal_stride=3)
    with pytest.raises(UserError, match="gives the grid"):
        ConvStem(8, (4,), (8,), (16,))(torch.zeros(1, 1, 3, 40))
    with pytest.raises(UserError, match="2 axes"):
        ConvStem(8, (4,), (2,)).grid((3, 40, 40))
    with pytest.raises(UserError, match="fewer than one token needs"):
        VideoConvStem(8, (4,), (2,), None, 4, 4).grid((3, 16, 16))
