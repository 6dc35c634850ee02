"""FLOPs: of a pass, counted; of a machine, measured; of GPUs, by their data sheets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)


class Gpu(NamedTuple):
    """Dense matrix products (bf16 on tensor cores, fp32 without TF32) and memory."""

    bf16_flops: float
    fp32_flops: float
    bytes_per_s: float
    bytes: float


# NVIDIA's data sheets of the SXM boards: A100 80GB (2021), H100 (2023; dense is half of the figure
# with sparsity), H200 (2024).
GPUS = {
    "a100": Gpu(312e12, 19.5e12, 2.039e12, 80e9),
    "h100": Gpu(989e12, 67e12, 3.35e12, 80e9),
    "h200": Gpu(989e12, 67e12, 4.8e12, 141e9),
}

_ATEN = torch.ops.aten


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


def _attention_backward(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object
) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))  # type: ignore[no-untyped-call]


_COUNTS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(  # type: ignore[no-untyped-call]
        _attention
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(  # type: ignore[no-untyped-call]
        _attention_backward
    ),
}


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts matrix products, convolutions and attention inside, by torch's formulas.

    Operations run as they are and nothing is held: torch's own counter takes composite ones apart,
    which rounds otherwise, and its hooks keep recomputed activations alive.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := _COUNTS.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


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
