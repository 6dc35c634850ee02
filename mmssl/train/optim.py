"""Parameter groups and the optimiser handed to DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from mmssl.specs import OptimSpec
from mmssl.train.lars import Lars
from mmssl.types import UserError


class Policy(Protocol):
    """How one parameter learns."""

    @property
    def lr_scale(self) -> float:
        """Factor on the learning rate."""

    @property
    def decay(self) -> bool:
        """Subject to weight decay; one-dimensional parameters never are."""

    @property
    def frozen(self) -> bool:
        """Keeps its value."""

    @property
    def constant_lr(self) -> bool:
        """Learns at the peak rate all the time."""


def parameter_groups(
    model: nn.Module, policy: Mapping[str, Policy], weight_decay: float, layerwise: bool = False
) -> list[dict[str, Any]]:
    """Groups of parameters that learn alike, in the order in which the model lists them.

    Frozen parameters lose `requires_grad` and belong to no group. Biases, norms and other
    one-dimensional parameters are not decayed. layerwise: those with more dimensions are groups of
    their own, which have `adapt` on (LARS).

    Raises:
        UserError: nothing is left to train.
        KeyError: the policy lacks a parameter.
    """
    groups: dict[tuple[float, float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rule = policy[name]
        if rule.frozen or not parameter.requires_grad:
            parameter.requires_grad_(False)
            continue
        decay = weight_decay if rule.decay and parameter.dim() > 1 else 0.0
        adapt = layerwise and parameter.dim() > 1
        key = (rule.lr_scale, decay, adapt, rule.constant_lr)
        groups.setdefault(key, []).append(parameter)
    if not groups:
        raise UserError("`towers`: every parameter is frozen; nothing is left to train")
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        | ({"adapt": adapt} if layerwise else {})
        | ({"constant_lr": True} if steady else {})
        for (scale, decay, adapt, steady), parameters in groups.items()
    ]


def build_optimizer(
    model: nn.Module, policy: Mapping[str, Policy], spec: OptimSpec
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), Adam, SGD or LARS over the model's groups."""
    if spec.kind == "lars":
        groups = parameter_groups(model, policy, spec.weight_decay, layerwise=True)
        return Lars(groups, spec.lr, momentum=spec.betas[0])
    if spec.kind == "sgd":
        groups = parameter_groups(model, policy, spec.weight_decay)
        return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.betas[0])
    kind = torch.optim.AdamW if spec.kind == "adamw" else torch.optim.Adam
    groups = parameter_groups(model, policy, spec.weight_decay)
    return kind(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)


def set_learning_rate(groups: list[dict[str, Any]], lr: float, peak: float) -> None:
    """Give every group `lr` times its own scale, those of constant rate the peak instead."""
    for group in groups:
        rate = peak if group.get("constant_lr") else lr
        group["lr"] = rate * float(group["lr_scale"])
