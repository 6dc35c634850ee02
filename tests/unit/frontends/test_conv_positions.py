"""Positions by convolution and by sines: padding laws, tables."""

import math

import pytest
import torch
from torch import nn

from mmssl.frontends.conv_positions import ConvPositions, ConvStackPositions
from mmssl.frontends.fixed_positions import SinusoidPositions
from mmssl.frontends.positions import FactorisedPositions
from mmssl.types import UserError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made(kind):
    positions = (
        ConvPositions(32, 8, 4) if kind == "one" else ConvStackPositions(32, 3, kernel=5, groups=4)
    )
    for p in positions.parameters():
        nn.init.normal_(p, std=0.3)
    return positions


@pytest.mark.parametrize("groups", [4, 16])
@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_sixteen_bits_round_and_nothing_else(how, groups):
    """Many taps over few channels are what oneDNN's kernel for AMX adds up wrongly."""
    positions, x = ConvPositions(32, 128, groups), torch.randn(2, 100, 32)
    wide = positions.vectors(x, None)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        if how == "cast":
            positions, x = positions.to(torch.bfloat16), x.to(torch.bfloat16)
        narrow = positions.vectors(x, None)
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - wide).norm() < 0.02 * wide.norm()


@pytest.mark.parametrize("kind", ["one", "stack"])
def test_padding_changes_nothing_and_rows_are_independent(kind):
    positions = made(kind)
    x = torch.randn(2, 11, 32)
    pad = torch.arange(11)[None] >= torch.tensor([[11], [6]])
    out = positions(x, (11,), pad)
    other = positions(x.masked_fill(pad[..., None], float("nan")), (11,), pad)
    assert torch.equal(out, other)
    torch.testing.assert_close(out[1:, :6], positions(x[1:, :6], (6,)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[:1], positions(x[:1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kernel", "left", "right"), [(8, 4, 3), (7, 3, 3)])
def test_the_last_frame_of_an_even_kernel_is_dropped(kernel, left, right):
    positions = ConvPositions(16, kernel, 4)
    x = torch.randn(1, 20, 16, requires_grad=True)
    out = positions(x)
    assert out.shape == x.shape
    (out - x)[0, 10].sum().backward()
    touched = torch.nonzero(x.grad[0].abs().sum(1) > 1e-9).flatten().tolist()
    assert touched == list(range(10 - left, 10 + right + 1))


def test_one_gain_per_tap_and_the_initial_deviation():
    positions = ConvPositions(768)
    state = {name: tuple(v.shape) for name, v in positions.state_dict().items()}
    assert state == {
        "conv.bias": (768,),
        "conv.parametrizations.weight.original0": (1, 1, 128),
        "conv.parametrizations.weight.original1": (768, 48, 128),
    }
    weight = positions.conv.weight
    assert weight.std().item() == pytest.approx(math.sqrt(4 / (128 * 768)), rel=0.01)
    gains = positions.conv.parametrizations.weight.original0.flatten()
    torch.testing.assert_close(weight.norm(dim=(0, 1)), gains)
    assert torch.all(positions.conv.bias == 0)


def test_interleaved_sines():
    table = SinusoidPositions(6, "interleaved").vectors((5,))
    for place in range(5):
        for channel in range(6):
            angle = place / 10000 ** (2 * (channel // 2) / 6)
            expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert table[place, channel].item() == pytest.approx(expected, abs=1e-6)
    # a grid of several axes is counted through
    assert torch.equal(SinusoidPositions(6, "interleaved").vectors((2, 3)), table.new_tensor(
        SinusoidPositions(6, "interleaved").vectors((6,)).tolist()
    ))  # fmt: skip


def test_grid_of_mae_equals_transformers():
    module = pytest.importorskip("transformers")
    config = module.ViTMAEConfig(
        image_size=96, patch_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, decoder_hidden_size=32, decoder_num_hidden_layers=1,
    )  # fmt: skip
    embeddings = module.ViTMAEModel(config).embeddings
    # a model made from a configuration marks this as loaded and leaves its positions at zero
    embeddings.patch_embeddings.projection._is_hf_initialized = False
    embeddings.initialize_weights()
    table = embeddings.position_embeddings[0]
    ours = SinusoidPositions(32).vectors((6, 6))
    assert torch.all(table[0] == 0)
    torch.testing.assert_close(ours, table[1:], atol=1e-6, rtol=1e-6)


def test_axes_of_other_grids():
    positions = SinusoidPositions(24)
    table = positions.vectors((2, 3, 4)).view(2, 3, 4, 24)
    assert torch.equal(table[0, 0, :, :8], table[1, 2, :, :8])  # the last axis comes first
    assert torch.equal(table[0, :, 0, 8:16], table[1, :, 3, 8:16])
    assert torch.equal(table[:, 0, 0, 16:], table[:, 2, 3, 16:])
    assert len(torch.unique(table.view(24, 24), dim=0)) == 24
    x = torch.randn(2, 24, 24)
    assert torch.equal(positions(x, (2, 3, 4), torch.zeros(2, 24).bool()), x + table.view(24, 24))
    half = positions(x.bfloat16(), (2, 3, 4))
    assert half.dtype == torch.bfloat16


def test_learned_positions_take_a_padding_mask_too():
    positions = FactorisedPositions((5,), 4)
    x = torch.randn(2, 5, 4)
    assert torch.equal(positions(x, (5,), torch.ones(2, 5).bool()), positions(x, (5,)))


def test_bad_choices_are_refused():
    with pytest.raises(UserError, match="no 16 equal groups"):
        ConvPositions(24)
    with pytest.raises(UserError, match="along one axis"):
        ConvPositions(32)(torch.zeros(1, 6, 32), (2, 3))
    with pytest.raises(UserError, match="layout: 'spiral'"):
        SinusoidPositions(8, "spiral")
    with pytest.raises(UserError, match="each of 2 axes"):
        SinusoidPositions(6).vectors((2, 2))
