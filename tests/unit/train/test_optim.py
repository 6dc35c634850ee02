from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from mmssl.specs import OptimSpec
from mmssl.train.optim import build_optimizer, parameter_groups, set_learning_rate
from mmssl.types import UserError


class Rule(NamedTuple):
    lr_scale: float = 1.0
    decay: bool = True
    frozen: bool = False
    constant_lr: bool = False


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def test_vectors_and_flagged_matrices_are_not_decayed() -> None:
    model = network()
    policy = {name: Rule(decay=name != "2.weight") for name, _ in model.named_parameters()}
    groups = parameter_groups(model, policy, 0.1)
    decayed = [p for g in groups if g["weight_decay"] == 0.1 for p in g["params"]]
    assert [p is model[0].weight for p in decayed] == [True]
    assert sum(len(g["params"]) for g in groups) == 6


def test_frozen_parameters_are_in_no_group_and_need_no_gradient() -> None:
    model = network()
    policy = {n: Rule(frozen=n.startswith("0.")) for n, _ in model.named_parameters()}
    groups = parameter_groups(model, policy, 0.1)
    listed = {id(p) for g in groups for p in g["params"]}
    assert id(model[0].weight) not in listed
    assert not model[0].weight.requires_grad
    assert model[2].weight.requires_grad


def test_nothing_left_to_train_is_refused() -> None:
    model = network()
    with pytest.raises(UserError, match="every parameter is frozen"):
        parameter_groups(model, dict.fromkeys(dict(model.named_parameters()), Rule(frozen=True)), 0)


def test_a_parameter_without_a_rule_is_refused() -> None:
    with pytest.raises(KeyError, match=r"0\.weight"):
        parameter_groups(network(), {}, 0.1)


def test_first_step_moves_by_the_scaled_learning_rate() -> None:
    # Adam's first step is lr * sign(gradient) wherever the gradient is much larger than eps.
    model = network()
    policy = {n: Rule(0.25 if n.startswith("0.") else 1.0) for n, _ in model.named_parameters()}
    optimizer = build_optimizer(model, policy, OptimSpec(weight_decay=0.0))
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_learning_rate(optimizer.param_groups, 0.04, 0.1)
    optimizer.step()
    moved = [
        float((a - b).detach().mean()) for a, b in zip(before, model.parameters(), strict=True)
    ]
    assert moved == pytest.approx([0.01, 0.01, 0.04, 0.04, 0.04, 0.04], rel=1e-4)


def test_adamw_decays_apart_from_the_gradient_and_adam_within_it() -> None:
    ends = {}
    for kind in ("adamw", "adam"):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 2.0)
        spec = OptimSpec(kind=kind, lr=0.1, weight_decay=0.5)
        optimizer = build_optimizer(model, {"weight": Rule()}, spec)
        model.weight.grad = torch.zeros(1, 1)
        optimizer.step()
        ends[kind] = float(model.weight.detach())
    assert ends == pytest.approx({"adamw": 2.0 * (1 - 0.1 * 0.5), "adam": 2.0 - 0.1})
