"""The speech encoder's parts in bf16: cast as a whole, and under autocast."""

import pytest
import torch
from torch import nn

from mmssl.backbones.transformer import Transformer
from mmssl.frontends.conv_positions import ConvPositions, ConvStackPositions
from mmssl.frontends.patches import padding_mask
from mmssl.frontends.wave_stem import WaveStem

SIZE = {"width": 32, "layers": 2, "heads": 4, "head_size": 8}
KINDS = {
    "wavlm": (
        {"norm": "group"},
        {"post_norm": True, "input_norm": True, "relative_buckets": 8, "relative_use": "gated"},
        ConvPositions,
    ),
    "data2vec": (
        {"norm": "layer", "bias": True},
        {"layer_scale": 0.1, "drop_path": 0.2},
        ConvStackPositions,
    ),
    "conformer": (
        {"norm": "group1", "log_compress": True},
        {"layer": "conformer", "conv_kernels": 5, "conv_norm": "batch"},
        ConvPositions,
    ),
}


class Encoder(nn.Module):
    def __init__(self, kind):
        super().__init__()
        stem, trunk, positions = KINDS[kind]
        self.stem = WaveStem(32, 16, gradient_scale=0.1, **stem)
        self.positions = positions(32)
        self.trunk = Transformer(**SIZE, **trunk)

    def forward(self, wave, lengths):
        tokens, grid = self.stem(wave, lengths)
        pad = padding_mask(self.stem.out_lengths(lengths), grid)
        out, _ = self.trunk(self.positions(tokens, grid, pad), pad)
        return out.masked_fill(pad[..., None], 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_sixteen_bits_follow_the_wide_result(kind, how):
    torch.manual_seed(0)
    model = Encoder(kind).eval()
    wave, lengths = torch.randn(2, 1, 6000), torch.tensor([6000, 4100])
    wide = model(wave, lengths)
    if how == "cast":
        model = model.to(torch.bfloat16)
        narrow = model(wave, lengths)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            narrow = model(wave, lengths)
    assert (narrow.float() - wide).norm() < 0.05 * wide.norm()
    narrow.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_training_with_all_dropouts_runs(how):
    torch.manual_seed(0)
    trunk = Transformer(
        **SIZE, dropout=0.1, layer_drop=0.3, input_dropout=0.1,
        relative_buckets=8, relative_use="gated",
    )  # fmt: skip
    x = torch.randn(2, 9, 32)
    if how == "cast":
        trunk, x = trunk.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        out, _ = trunk(x, padding_mask(torch.tensor([9, 5]), (9,)))
    out.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in trunk.parameters())
