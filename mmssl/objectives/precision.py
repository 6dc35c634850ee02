"""The precision that losses and recurrences are computed in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def wide(x: Tensor) -> Tensor:
    """16-bit floats as fp32, everything else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def recurrent(layers: nn.Module, x_BND: Tensor) -> Tensor:
    """(B, N, E) to the (B, N, D) outputs of recurrent layers, in the precision of their weights.

    CUDA's autocast runs them in fp16 even where it is asked for bf16, and without a scaled loss
    their gradients would vanish.
    """
    weight: Tensor = layers.weight_ih_l0  # type: ignore[assignment]
    with torch.autocast(x_BND.device.type, enabled=False):
        out_BND: Tensor = layers(x_BND.to(weight.dtype))[0]
    return out_BND
