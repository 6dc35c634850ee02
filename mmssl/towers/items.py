"""Items of a view: weights, padding, their places in the batch, their time steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmssl.types import Tokens, UserError, ViewBatch


def item_weight(view: ViewBatch) -> Tensor:
    """(P,) 1 for present items, 0 for the dummy of an empty view."""
    return view.present_BL[view.rows_P, view.slots_P].float()


def spread(values_P: Tensor, view: ViewBatch) -> Tensor:
    """(P, ...) values of the items to their (B, L, ...) places, zero where absent.

    The dummy item enters with weight 0: its modules stay in the graph on every rank, its gradient
    is exactly zero.
    """
    weight = item_weight(view).to(values_P.dtype)
    weighted = values_P * weight.reshape(-1, *([1] * (values_P.ndim - 1)))
    out = values_P.new_zeros(*view.present_BL.shape, *values_P.shape[1:])
    return out.index_put((view.rows_P, view.slots_P), weighted)


def time_steps(tokens: Tokens, how: str = "mean") -> tuple[Tensor, Tensor]:
    """Reduce a token grid to its time axis: (P, T, D) and padding (P, T).

    `max` and `mean` run over the valid cells of a time step; `none` keeps all tokens.

    Raises:
        UserError: an unknown reduction.
    """
    if how == "none":
        return tokens.x_PND, tokens.pad_PN
    items, steps = tokens.pad_PN.shape[0], tokens.grid[0]
    x = tokens.x_PND.reshape(items, steps, -1, tokens.x_PND.shape[-1])
    pad = tokens.pad_PN.reshape(items, steps, -1)
    empty = pad.all(dim=2)
    if how == "max":
        low = x.masked_fill(pad[..., None], torch.finfo(x.dtype).min).amax(dim=2)
        return low.masked_fill(empty[..., None], 0.0), empty
    if how == "mean":
        keep = (~pad).to(x.dtype)[..., None]
        return (x * keep).sum(2) / keep.sum(2).clamp(min=1), empty
    raise UserError(f"reduce: {how!r} is not known; use max, mean or none")


def lengths_if_padded(view: ViewBatch) -> Tensor | None:
    """Lengths of the items, None when none is padded."""
    return None if bool((view.lengths_P >= view.data.shape[1]).all()) else view.lengths_P


def full_padding(pad: Tensor | None, x_PND: Tensor) -> Tensor:
    """(P, N) padding of tokens; none where it is None."""
    if pad is None:
        return torch.zeros(x_PND.shape[:2], dtype=torch.bool, device=x_PND.device)
    return pad


def token_rate_of(rate: float, signal: nn.Module | None, stride: int) -> float:
    """Tokens per second; a spectrogram has one frame per hop."""
    params = getattr(signal, "params", None)
    return rate / (params.hop if params is not None else 1) / stride
