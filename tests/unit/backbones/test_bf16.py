"""A model cast to bf16 runs through every part, from fp32 signals, and stays near fp32."""

import copy

import pytest
import torch

from mmssl.backbones.convnets import ConvAV8, EfficientNetB0
from mmssl.backbones.tokens import ExtraTokens
from mmssl.backbones.transformer import Transformer
from mmssl.frontends.positions import FactorisedPositions
from mmssl.frontends.stems import ConvStem, VideoConvStem
from mmssl.frontends.text import FrozenTextEmbedding
from mmssl.heads.project import SpaceHeads


class Chain(torch.nn.Module):
    """Stem, positions at another size, global token, trunk, FAC head."""

    def __init__(self, stem, axes):
        super().__init__()
        self.stem = stem
        self.positions = FactorisedPositions((3,) * axes, 32, norm=True)
        self.extra = ExtraTokens(32)
        self.trunk = Transformer(32, 2, head_size=16, relative_buckets=8)
        self.heads = SpaceHeads("fac", {"video": 32, "audio": 8, "text": 8}, {"va": 8, "vat": 4})

    def forward(self, x):
        x, grid = self.stem(x)
        x, pad = self.extra(self.positions(x, grid), torch.zeros(x.shape[:2]).bool(), ("agg",))
        named, _ = self.extra.split(self.trunk(x, pad)[0], ("agg",))
        return self.heads.project(named["agg"], "video", "vat")


@pytest.mark.parametrize("kind", ["audio", "video", "text"])
def test_bf16_chain(kind):
    torch.manual_seed(0)
    stem, axes, x = {
        "audio": (ConvStem(32, (8, 8), (4, 2)), 2, torch.randn(6, 1, 32, 16)),
        "video": (VideoConvStem(32, (8, 8), (4, 2), None, 2, 2), 3, torch.randn(6, 3, 4, 16, 16)),
        "text": (FrozenTextEmbedding(20, 32), 1, torch.arange(30).view(6, 5) % 20),
    }[kind]
    wide = Chain(stem, axes).eval()
    narrow = copy.deepcopy(wide).bfloat16()
    torch.testing.assert_close(narrow(x).float(), wide(x), atol=0.08, rtol=0.1)
    out = narrow.train()(x)
    assert out.dtype == torch.bfloat16
    out.square().sum().backward()
    used = [p.grad for n, p in narrow.named_parameters() if "audio" not in n and "text" not in n]
    assert all(g is not None and torch.isfinite(g).all() for g in used)


@pytest.mark.parametrize("net", [ConvAV8(1, 2), EfficientNetB0(1, drop_path=0.0)])
def test_bf16_convnets(net):
    torch.manual_seed(0)
    narrow = copy.deepcopy(net).bfloat16()
    x = torch.randn(4, 1, 64, 64)
    for module in (narrow.train(), narrow.eval()):
        out, _ = module(x)
        assert out.dtype == torch.bfloat16
        assert torch.isfinite(out).all()
    narrow.train()(x)[0].float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in narrow.parameters())
