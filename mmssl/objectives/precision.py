"""The precision that losses are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """16-bit floats as fp32, everything else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
