"""Parameters wherever ZeRO keeps their pieces.

At ZeRO-3 each rank keeps a flat piece of every parameter (`ds_tensor`): rank r holds the elements
[r * n, (r + 1) * n) of the flattened parameter, padded at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmssl import dist


def piece(parameter: Tensor) -> Tensor:
    """The part of a parameter this rank keeps: all of it, or a flat piece at ZeRO-3."""
    kept: Tensor = getattr(parameter, "ds_tensor", parameter)
    return kept.data


def own_length(parameter: Tensor) -> int:
    """Elements of `piece` that are not padding."""
    length = piece(parameter).numel()
    size: int = getattr(parameter, "ds_numel", parameter.numel())
    start = dist.rank() * length if hasattr(parameter, "ds_tensor") else 0
    return min(max(0, size - start), length)


def assemble(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """The whole tensor from all ranks' pieces (laid out as `piece`); a collective at ZeRO-3."""
    shape: torch.Size | None = getattr(parameter, "ds_shape", None)
    if shape is None:
        return part
    return dist.gather_no_grad(part.reshape(-1))[: shape.numel()].view(shape)


def cut(parameter: Tensor, whole: Tensor) -> Tensor:
    """This rank's piece of a whole tensor: the inverse of `assemble`.

    Raises:
        ValueError: the whole has another number of elements than the parameter.
    """
    size = getattr(parameter, "ds_numel", parameter.numel())
    if whole.numel() != size:
        raise ValueError(f"expected {size} elements, got {tuple(whole.shape)}")
    if not hasattr(parameter, "ds_tensor"):
        return whole.view(parameter.shape)
    length = piece(parameter).numel()
    flat = whole.new_zeros(length * dist.world_size())
    flat[:size] = whole.reshape(-1)
    return flat.narrow(0, dist.rank() * length, length).clone()


@torch.no_grad()
def assign(parameter: nn.Parameter, whole: Tensor) -> None:
    """Give a parameter new values, wherever ZeRO keeps a copy or a piece of them.

    Raises:
        ValueError: the whole has another number of elements than the parameter.
    """
    part = cut(parameter, whole)
    piece(parameter).copy_(part)
    zero: Any = parameter
    if hasattr(zero, "_z3_optimizer"):
        if parameter.shape == whole.shape:  # small parameters stay gathered between the steps
            parameter.data.copy_(whole)
        zero._z3_optimizer.set_local_hp_param(part, parameter)
    elif hasattr(zero, "_hp_mapping"):
        zero.set_full_hp_param(whole)
