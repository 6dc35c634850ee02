"""LARS: momentum whose step in each tensor is in proportion to the tensor's own norm.

ZeRO hands an optimiser one flat tensor per group, with pieces of many parameters in it, and of a
parameter that lies across a border only a part. A trust ratio needs whole norms: the squares of the
pieces are added up over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmssl import dist
from mmssl.partition import own_length, piece

TRUST = 1e-3  # eta of You et al., SimCLR, BYOL and Barlow Twins
Pieces = Sequence[tuple[int, int]]  # (start, length) of every parameter in a flat tensor


class Lars(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017) as SimCLR and BYOL have it.

    With d = gradient + weight_decay * w of a whole tensor w, its velocity becomes momentum *
    velocity + r * d with r = 1e-3 |w| / |d|, or 1 where a norm is 0, and w moves by -lr *
    velocity. Groups with `adapt` off (biases, norms) have r = 1.

    layout: {flat tensor: where each parameter lies in it}, set under ZeRO, for which every rank
    must step through the same groups; None where each tensor is one whole parameter.
    """

    layout: Mapping[Tensor, Pieces] | None = None

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float) -> None:
        # SGD would add the decay behind the ratio: it is added here, before
        ours = [{**g, "weight_decay": 0.0, "lars_decay": g["weight_decay"]} for g in groups]
        super().__init__(ours, lr=lr, momentum=momentum)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; a collective under ZeRO."""
        for group in self.param_groups:
            for w in group["params"] if group["adapt"] else []:
                if w.grad is not None:
                    w.grad.add_(w, alpha=group["lars_decay"])
                    self._scale(w, w.grad)
        return super().step(closure)

    def _scale(self, w: Tensor, d: Tensor) -> None:
        """Multiply each parameter's part of `d` by its trust ratio."""
        pieces = [(0, w.numel())] if self.layout is None else self.layout[w]
        flat_w, flat_d = w.reshape(-1), d.view(-1)
        parts = [(flat_w[at : at + n], flat_d[at : at + n]) for at, n in pieces]
        squares = torch.stack([torch.stack([_square(a), _square(b)]) for a, b in parts])
        if self.layout is not None:
            squares = dist.sum_over_ranks(squares)
        norm_w, norm_d = squares.sqrt().unbind(1)
        known = (norm_w > 0) & (norm_d > 0)
        ratios = torch.where(known, TRUST * norm_w / norm_d, torch.ones_like(norm_w))
        for (_, part), ratio in zip(parts, ratios.to(d.dtype), strict=True):
            part.mul_(ratio)


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()


def layout_of(zero: Any, stage: int) -> dict[Tensor, Pieces]:
    """Where DeepSpeed's ZeRO optimiser (stages 1 to 3) keeps this rank's part of each parameter."""
    if stage == 3:
        pairs = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        return {flat: _in_a_row(group) for flat, group in pairs}
    pairs = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
    return {flat: [_fragment(parameter) for parameter in group] for flat, group in pairs}


def _in_a_row(group: Sequence[nn.Parameter]) -> Pieces:
    found, at = [], 0
    for parameter in group:
        found.append((at, own_length(parameter)))
        at += piece(parameter).numel()
    return found


def _fragment(parameter: Any) -> tuple[int, int]:
    if parameter._hp_mapping is None:  # lies on other ranks
        return 0, 0
    address = parameter._hp_mapping.get_hp_fragment_address()
    return address.start, address.numel
