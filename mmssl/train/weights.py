"""Whole weights and averaged weights, wherever ZeRO keeps the pieces.

Element-wise work such as the moving average is done on the pieces (`mmssl.partition`); only saving
and evaluation put them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mmssl.partition import assemble, cut, piece


def whole_state(
    model: nn.Module, average: Mapping[str, Tensor] | None = None, keep: bool = True
) -> dict[str, Tensor]:
    """The full state dict on the CPU, copied; a collective at ZeRO-3.

    Args:
        model: parameters may be partitioned.
        average: pieces by parameter name that stand in for the trained ones (`Average.pieces`).
        keep: False on ranks that only take part; they get an empty dict.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        part = (average or {}).get(names.get(id(value), key))
        if isinstance(value, nn.Parameter):
            value = assemble(value, piece(value) if part is None else part)
        elif part is not None:
            value = part
        if keep:
            state[key] = value.detach().to("cpu", copy=True).contiguous()
    return state


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and full shape of everything in the state dict, partitioned or not."""
    items = model.state_dict(keep_vars=True).items()
    return {key: tuple(getattr(value, "ds_shape", value.shape)) for key, value in items}


class Average:
    """Exponential moving average of the trained weights (Polyak and Juditsky 1992), in fp32.

    The running statistics of batch norms are averaged alike: those of the newest weights would not
    fit the averaged ones.
    """

    def __init__(self, model: nn.Module) -> None:
        """Start at the model's present weights."""
        self.pieces = {
            name: piece(value).to(torch.float32, copy=True) for name, value in _averaged(model)
        }

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Move by a <- decay * a + (1 - decay) * w, on this rank's pieces."""
        for name, value in _averaged(model):
            self.pieces[name].lerp_(piece(value).float(), 1 - decay)

    @torch.no_grad()
    def load(self, model: nn.Module, whole: Mapping[str, Tensor]) -> None:
        """Take the averaged weights from a full state dict.

        Raises:
            KeyError: a trained parameter is missing.
        """
        for name, value in _averaged(model):
            self.pieces[name].copy_(cut(value, whole[name]))


def averaging_decay(decay: float, step: int) -> float:
    """`decay`, but at most (1 + step) / (10 + step), steps counted from 0.

    Without the bound, which tf.train.ExponentialMovingAverage calls `num_updates`, a run of a few
    times 1 / (1 - decay) steps keeps its random initial weights in the average.
    """
    return min(decay, (1 + step) / (10 + step))


def _averaged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Trained parameters and running statistics by name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    for name, buffer in model.named_buffers():
        if name.endswith((".running_mean", ".running_var")):
            yield name, buffer
