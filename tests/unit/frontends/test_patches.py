"""Patch cuts: parity with strided convolutions, inverse, published token counts."""

import pytest
import torch
import torch.nn.functional as F

from mmssl.frontends.patches import PatchEmbed, padding_mask, patchify, unpatchify, zero_behind
from mmssl.types import UserError

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize(
    ("shape", "patch", "channels"),
    [((1285,), (128,), 1), ((37, 20), (16, 5), 1), ((9, 35, 32), (4, 16, 16), 3)],
)
def test_patch_embed_is_a_strided_valid_convolution(shape, patch, channels):
    torch.manual_seed(0)
    embed = PatchEmbed(patch, 24, channels)
    x = torch.randn(2, channels, *shape)
    tokens, grid = embed(x)
    kernel = embed.proj.weight.view(24, channels, *patch)
    reference = CONVS[len(patch)](x, kernel, embed.proj.bias, stride=patch)
    assert grid == tuple(reference.shape[2:]) == embed.grid(shape)
    torch.testing.assert_close(tokens, reference.flatten(2).transpose(1, 2), atol=2e-5, rtol=1e-5)


def test_published_token_counts():
    assert PatchEmbed((4, 16, 16), 8, 3).grid((32, 224, 224)) == (8, 14, 14)  # VATT: 1568
    assert PatchEmbed((128,), 8).grid((153600,)) == (1200,)
    assert PatchEmbed((16, 5), 8).grid((150, 80)) == (9, 16)
    x = torch.zeros(1, 3, 32, 224, 224)
    assert patchify(x, (4, 16, 16)).shape == (1, 1568, 3072)


@pytest.mark.parametrize("shape", [(12,), (12, 8), (4, 12, 8)])
def test_unpatchify_inverts(shape):
    x = torch.randn(2, 3, *shape)
    patch = (2, 4, 2)[: len(shape)]
    grid = tuple(n // p for n, p in zip(shape, patch, strict=True))
    assert torch.equal(unpatchify(patchify(x, patch), grid, patch), x)


def test_one_patch_touches_one_token():
    embed = PatchEmbed((2, 4, 4), 5, 3)
    x = torch.randn(1, 3, 4, 8, 8, requires_grad=True)
    tokens, grid = embed(x)
    assert grid == (2, 2, 2)
    tokens[0, 5].sum().backward()  # t 1, h 0, w 1
    touched = x.grad[0].abs().sum(0) > 0
    expected = torch.zeros(4, 8, 8, dtype=torch.bool)
    expected[2:, :4, 4:] = True
    assert torch.equal(touched, expected)


def test_what_lies_behind_a_length_changes_nothing():
    embed = PatchEmbed((4, 3), 6)
    x, lengths = torch.randn(2, 1, 12, 9), torch.tensor([12, 6])
    other = x.clone()
    other[1, :, 6:] = 1e6
    (a, grid), (b, _) = embed(x, lengths), embed(other, lengths)
    assert torch.equal(a, b)
    assert embed.out_lengths(lengths).tolist() == [3, 2]
    pad = padding_mask(embed.out_lengths(lengths), grid)
    assert pad.sum(1).tolist() == [0, 3]
    assert pad[1].tolist() == [False] * 6 + [True] * 3


def test_zero_behind_handles_any_axis():
    x = torch.ones(2, 3, 4, 5)
    assert zero_behind(x, torch.tensor([2, 4])).sum(dim=(1, 2, 3)).tolist() == [30.0, 60.0]
    assert zero_behind(x, torch.tensor([1, 3]), axis=1).sum(dim=(1, 2, 3)).tolist() == [20.0, 60.0]
    assert zero_behind(x, None) is x


def test_an_input_below_one_patch_is_a_clear_error():
    with pytest.raises(UserError, match="smaller than one patch"):
        PatchEmbed((4, 16, 16), 8, 3)(torch.zeros(1, 3, 2, 32, 32))
