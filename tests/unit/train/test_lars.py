from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from mmssl.specs import OptimSpec
from mmssl.train.lars import TRUST, Lars
from mmssl.train.optim import build_optimizer


class Rule(NamedTuple):
    lr_scale: float = 1.0
    decay: bool = True
    frozen: bool = False
    constant_lr: bool = False


def stepped(scale: float, weight_decay: float) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A layer after one step at lr 2, and how weight and bias moved."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    spec = OptimSpec(kind="lars", lr=2.0, weight_decay=weight_decay)
    optimizer = build_optimizer(layer, {"weight": Rule(), "bias": Rule()}, spec)
    assert isinstance(optimizer, Lars)
    before = [p.detach().clone() for p in layer.parameters()]
    for parameter in layer.parameters():
        parameter.grad = scale * torch.randn(parameter.shape)
    optimizer.step()
    weight, bias = (p.detach() - b for p, b in zip(layer.parameters(), before, strict=True))
    return layer, weight, bias


def test_first_step_has_the_length_of_the_trusted_share_of_the_weight() -> None:
    torch.manual_seed(0)
    norm = nn.Linear(4, 3).weight.norm().item()
    for decay in (0.0, 0.5):
        moved = stepped(1.0, decay)[1].norm().item()
        assert moved == pytest.approx(2.0 * TRUST * norm, rel=1e-5)


def test_scaled_gradients_move_only_what_is_not_adapted() -> None:
    _, weight, bias = stepped(1.0, 0.0)
    _, weight_1000, bias_1000 = stepped(1000.0, 0.0)
    torch.testing.assert_close(weight_1000, weight)
    torch.testing.assert_close(bias_1000, 1000 * bias)


def test_vectors_are_not_decayed_and_zeros_still_learn() -> None:
    layer = nn.Linear(4, 3)
    spec = OptimSpec(kind="lars", lr=1.0, weight_decay=0.5)
    optimizer = build_optimizer(layer, {"weight": Rule(), "bias": Rule()}, spec)
    nn.init.zeros_(layer.weight)
    bias = layer.bias.detach().clone()
    layer.weight.grad, layer.bias.grad = torch.ones(3, 4), torch.zeros(3)
    optimizer.step()
    assert torch.equal(layer.weight, -torch.ones(3, 4))
    assert torch.equal(layer.bias, bias)
