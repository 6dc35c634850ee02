"""The machine's own peak, measured by matrix products."""

from __future__ import annotations

import time

import torch
from torch import Tensor


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Best FLOP/s of square matrix products in `dtype` on this rank's device within `seconds`.

    All ranks of a machine measure at once, so they share its memory and cores as in training.
    """
    side = 8192 if device.type == "cuda" else 768
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    _product(a, b)
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        began = time.perf_counter()
        _product(a, b)
        best = min(best, time.perf_counter() - began)
    return 2.0 * side**3 / best


def _product(a: Tensor, b: Tensor) -> None:
    torch.mm(a, b)
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
