"""The causal convolutions of wav2vec and vq-wav2vec: formula, what a token sees, padding."""

import math

import pytest
import torch
from torch import nn

from mmssl.backbones.causal import CausalConvs


def shuffled(net):
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net.double()


def test_the_formula_layer_by_layer():
    torch.manual_seed(0)
    net = shuffled(CausalConvs(6, [2, 5]))
    x = y = torch.randn(3, 12, 6, dtype=torch.float64)
    out, hidden = net(x, return_hidden=True)
    for block, kernel, found in zip(net.blocks, (2, 5), hidden, strict=True):
        conv, norm = nn.Conv1d(6, 6, kernel).double(), nn.GroupNorm(1, 6).double()
        conv.load_state_dict(block.conv.state_dict())
        norm.load_state_dict(block.norm.state_dict())
        layer = nn.Sequential(nn.ReplicationPad1d((kernel - 1, 0)), conv, norm, nn.ReLU())
        y = (layer(y.transpose(1, 2)).transpose(1, 2) + y) * math.sqrt(0.5)
        torch.testing.assert_close(found, y)
    assert torch.equal(out, hidden[-1])


def test_without_norms_a_token_sees_79_tokens_up_to_its_own():
    net = shuffled(CausalConvs(3, range(2, 14), "gelu"))
    for block in net.blocks:
        block.norm = Plain()
    x = torch.randn(1, 120, 3, dtype=torch.float64, requires_grad=True)
    net(x)[0][0, 100].sum().backward()
    seen = x.grad.abs().sum(-1)[0].nonzero()[:, 0]
    assert seen.tolist() == list(range(100 - 78, 101))


class Plain(nn.Module):
    def forward(self, x, pad):
        return x


@pytest.mark.parametrize("length", [1, 7])
def test_a_padded_row_equals_itself_alone(length):
    torch.manual_seed(0)
    net = shuffled(CausalConvs(4, [3, 4]))
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    pad = torch.arange(11) >= torch.tensor([[11], [length]])
    x[1, length:] = math.nan
    out, _ = net(x, pad)
    alone, _ = net(x[1:, :length])
    torch.testing.assert_close(out[1:, :length], alone)
    torch.testing.assert_close(out[:1], net(x[:1])[0])
