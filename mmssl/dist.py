"""Ranks and the differentiable collectives: the only importer of `torch.distributed`.

Letters in shapes: W ranks, B rows of one rank, D channels.

Gradient convention. Rank r back-propagates its own loss l_r; the trained quantity is L = sum over r
of l_r. The backward of every differentiable collective here sums over the ranks, so each rank ends
up with dL/d(its own tensors), and summing parameter gradients over ranks (or averaging them when
l_r carries a factor W) is exact. In exchange every rank must run the same collectives, forward and
backward, in the same order: a tensor that reaches `gather` must need a gradient on all ranks or on
none, and its result must take part in every rank's loss, with weight zero where the rank has
nothing to say. Do not call collectives inside an activation checkpoint: the recomputation would
repeat them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as td
from torch import Tensor, nn

from mmssl.types import UserError

T = TypeVar("T")

_NARROW = (torch.bfloat16, torch.float16)


def is_initialized() -> bool:
    """True while a process group exists; without one this process is rank 0 of 1."""
    return td.is_available() and td.is_initialized()


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return td.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return td.get_world_size() if is_initialized() else 1


def init(backend: str = "gloo", timeout_s: float = 1800.0) -> None:
    """Start the process group.

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (torchrun and deepspeed set them); where
    neither RANK nor WORLD_SIZE is set this is a group of one that opens no port.

    Args:
        backend: `gloo` on CPUs, `nccl` on NVIDIA devices.
        timeout_s: seconds after which a collective that a rank never joins fails.

    Raises:
        RuntimeError: a process group exists already.
    """
    if is_initialized():
        raise RuntimeError("dist.init: the process group exists already; call dist.shutdown first")
    timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        td.init_process_group(backend, init_method="env://", timeout=timeout)
    else:
        store = td.HashStore()  # type: ignore[attr-defined]
        td.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def shutdown() -> None:
    """Meet the other ranks, then destroy the process group; does nothing without one.

    Leaving without the meeting aborts some processes at exit. For the normal end of a run only:
    after a failure on one rank the others would wait here until the timeout.
    """
    if is_initialized():
        barrier()
        td.destroy_process_group()


def barrier() -> None:
    """Wait until every rank has come here."""
    if not is_initialized():
        return
    if td.get_backend() == "nccl":
        td.barrier(device_ids=[torch.cuda.current_device()])
    else:
        td.barrier()


def broadcast_object(value: T, source: int = 0) -> T:
    """The picklable `value` of rank `source`, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=source)
    return box[0]


def on_rank0(work: Callable[[], T]) -> T:
    """Do something on rank 0 only; its result, or its error, on every rank.

    Raises:
        OSError: what `work` raised, on all ranks alike, so that none waits for another.
        UserError: likewise, and for any other error.
    """
    value: T | None = None
    error: OSError | UserError | None = None
    if rank() == 0:
        try:
            value = work()
        except (OSError, UserError) as raised:
            error = raised
        except Exception as raised:  # e.g. of an object store: the others must not wait for ever
            error = UserError(f"{type(raised).__name__}: {raised}")
            error.__cause__ = raised
    value, error = broadcast_object((value, error))
    if error is not None:
        raise error
    return cast("T", value)


def gather_objects(value: T) -> list[T]:
    """The picklable `value` of every rank, in rank order, on every rank; sizes may differ."""
    if world_size() == 1:
        return [value]
    boxes: list[Any] = [None] * world_size()
    td.all_gather_object(boxes, value)
    return boxes


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on one of them."""
    if world_size() == 1:
        return flag
    device = "cuda" if td.get_backend() == "nccl" else "cpu"
    return bool(sum_over_ranks(torch.tensor([float(flag)], device=device)) > 0)


def post(note: str) -> None:
    """Leave a note for all ranks, without waiting for any."""
    if world_size() > 1:
        td.distributed_c10d._get_default_store().set(note, "")


def posted(note: str) -> bool:
    """Whether a rank has left this note, without waiting; from any thread."""
    return world_size() > 1 and td.distributed_c10d._get_default_store().check([note])


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks, with gradient: (B, ...) -> (W*B, ...), rank-major.

    B must be the same on every rank. The backward sums the ranks' gradients in x's dtype.

    Raises:
        TypeError: x is not floating point (use `gather_no_grad`).
        ValueError: x has no row dimension.
    """
    if not x.is_floating_point():
        raise TypeError(f"dist.gather: {x.dtype} carries no gradient; use dist.gather_no_grad")
    _require_rows(x, "gather")
    if world_size() == 1:
        return x
    return cast("Tensor", _Gather.apply(x))  # type: ignore[no-untyped-call]


def gather_no_grad(x: Tensor) -> Tensor:
    """Rows of all ranks without gradient, any dtype: (B, ...) -> (W*B, ...), rank-major.

    Raises:
        ValueError: x has no row dimension.
    """
    _require_rows(x, "gather_no_grad")
    return x.detach() if world_size() == 1 else _all_gather(x.detach())


def sum_over_ranks(x: Tensor) -> Tensor:
    """Element-wise sum over ranks, without gradient: a new tensor of x's shape and dtype."""
    total = x.detach().clone()
    if world_size() > 1:
        td.all_reduce(total)
    return total


def sum_with_gradient(x: Tensor) -> Tensor:
    """Element-wise sum over ranks; the backward sums the gradient over ranks too."""
    if world_size() == 1:
        return x
    return cast("Tensor", _Sum.apply(x))  # type: ignore[no-untyped-call]


class MaskedSyncBatchNorm(nn.Module):
    """Batch normalisation over the valid rows of all ranks (Ioffe and Szegedy 2015).

    Equal to `torch.nn.BatchNorm1d` on the concatenated valid rows: biased variance to normalise,
    unbiased in the running estimate. Rows that are not valid come out as zeros and influence
    nothing, whatever they contain. Every rank must call the module equally often in training mode,
    also one without a valid row. Where a single row is valid its output is the bias, and the
    running statistics stay as they are (one row has no variance); so they do where a row is not
    finite.

    All is computed in fp64: where rows are almost equal, the rounding of a mean is magnified by the
    small deviation and hits every row alike, so that two ranks would differ from one. Running
    statistics stay fp32 when the module is cast to a 16-bit type.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, dim: int, momentum: float = 0.1, eps: float = 1e-5, affine: bool = True
    ) -> None:
        """Set up `dim` channels; `momentum` is the weight of the newest batch.

        affine: scale and shift are trained.
        """
        super().__init__()
        self.dim, self.momentum, self.eps = dim, momentum, eps
        for name, start in (("weight", torch.ones(dim)), ("bias", torch.zeros(dim))):
            if affine:
                self.register_parameter(name, nn.Parameter(start))
            else:
                self.register_buffer(name, start)
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("num_batches_tracked", torch.zeros(1, dtype=torch.int64))

    def forward(self, x_PD: Tensor, valid_P: Tensor | None = None) -> Tensor:
        """Normalise x (..., D); valid (...) bool, True for rows that exist (default: all).

        Raises:
            ValueError: the last axis is not D, or `valid_P` does not have the row axes of x.
        """
        self._check(x_PD, valid_P)
        rows_PD = x_PD.reshape(-1, self.dim)
        valid_P1 = _row_mask(rows_PD, valid_P)
        wide_PD = rows_PD.double()
        wide_PD = torch.where(valid_P1, wide_PD, torch.zeros_like(wide_PD))
        if self.training:
            mean_D, var_D, count = moments(wide_PD, valid_P1)
            self._track(mean_D.detach(), var_D.detach(), count.detach())
        else:
            mean_D, var_D = self.running_mean.to(wide_PD), self.running_var.to(wide_PD)
        scale_D = self.weight.to(wide_PD) * torch.rsqrt(var_D + self.eps)
        out_PD = (wide_PD - mean_D) * scale_D + self.bias.to(wide_PD)
        out_PD = torch.where(valid_P1, out_PD, torch.zeros_like(out_PD))
        return out_PD.to(x_PD.dtype).reshape(x_PD.shape)

    @torch.no_grad()
    def _track(self, mean_D: Tensor, var_D: Tensor, count: Tensor) -> None:
        # Tensors decide, not `if`: asking the device for the count would stall it at every call.
        enough = count > 1
        unbiased_D = var_D * count / (count - 1).clamp(min=1)
        self._keep(
            self.running_mean.lerp(mean_D.to(self.running_mean), self.momentum),
            self.running_var.lerp(unbiased_D.to(self.running_var), self.momentum),
            enough,
        )

    @torch.no_grad()
    def _keep(self, mean_D: Tensor, var_D: Tensor, wanted: Tensor) -> None:
        """New running statistics, if wanted and finite."""
        taken = wanted & mean_D.isfinite().all() & var_D.isfinite().all()
        self.running_mean.copy_(torch.where(taken, mean_D, self.running_mean))
        self.running_var.copy_(torch.where(taken, var_D, self.running_var))
        self.num_batches_tracked += taken.to(torch.int64)

    def _check(self, x_PD: Tensor, valid_P: Tensor | None) -> None:
        if x_PD.dim() < 2 or x_PD.shape[-1] != self.dim:
            raise ValueError(
                f"MaskedSyncBatchNorm: expected (..., {self.dim}), got {tuple(x_PD.shape)}"
            )
        if valid_P is not None and valid_P.shape != x_PD.shape[:-1]:
            raise ValueError(
                f"MaskedSyncBatchNorm: valid {tuple(valid_P.shape)} does not match the rows "
                f"{tuple(x_PD.shape[:-1])} of the input"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedSyncBatchNorm:
        # In bf16 a running value would stop moving once it is within 2 % of the batch's.
        before = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype in _NARROW:
                setattr(self, name, old.to(device=new.device))
        return self


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        local = grad.new_empty(grad.shape[0] // world_size(), *grad.shape[1:])
        td.reduce_scatter_tensor(local, grad.contiguous())
        return local


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_over_ranks(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return sum_over_ranks(grad.contiguous())


def _all_gather(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0] * world_size(), *x.shape[1:])
    td.all_gather_into_tensor(out, x.contiguous())
    return out


def _require_rows(x: Tensor, name: str) -> None:
    if x.dim() == 0:
        raise ValueError(f"dist.{name}: a 0-dim tensor has no rows; pass x.reshape(1)")


def _row_mask(rows_PD: Tensor, valid_P: Tensor | None) -> Tensor:
    if valid_P is None:
        return torch.ones(rows_PD.shape[0], 1, dtype=torch.bool, device=rows_PD.device)
    return valid_P.reshape(-1, 1)


def moments(x_PD: Tensor, valid_P1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), biased variance (D,) and count (1,) over the valid rows of all ranks.

    Rows that are not valid hold zeros.
    """
    count = valid_P1.sum(0).to(x_PD.dtype)
    mean_D = x_PD.sum(0) / count.clamp(min=1)
    centred_PD = torch.where(valid_P1, x_PD - mean_D, torch.zeros_like(x_PD))
    return merged_moments(mean_D, centred_PD.square().sum(0), count)


def merged_moments(
    mean_D: Tensor, square_D: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), biased variance (D,) and count (1,) of all ranks' rows from those of each.

    Each rank sends its own mean and squared deviations, merged by Chan's formula: one collective,
    and no cancellation as with sums of squares.
    """
    dim = mean_D.shape[0]
    packed_WK = gather(torch.cat([mean_D, square_D, count])[None])
    mean_WD, square_WD, count_W1 = torch.split(packed_WK, [dim, dim, 1], dim=1)
    count_W1 = count_W1.detach()
    total = count_W1.sum(0)
    safe = total.clamp(min=1)
    mean_D = (count_W1 * mean_WD).sum(0) / safe
    between_D = (count_W1 * (mean_WD - mean_D).square()).sum(0)
    return mean_D, (square_WD.sum(0) + between_D) / safe, total
