"""A tower that is a convolutional network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmssl.frontends.lengths import Field
from mmssl.frontends.patches import padding_mask
from mmssl.towers.items import full_padding, item_weight, lengths_if_padded, token_rate_of
from mmssl.towers.masks import Mask
from mmssl.types import Tokens, UserError, ViewBatch


class ConvTower(nn.Module):
    """A convolutional network on the signal itself (COLA, AVE-Net, MMV)."""

    def __init__(self, modality: str, signal: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.modality = modality
        self.signal, self.network = signal, network
        self.width = int(network.width)  # type: ignore[arg-type]

    def grid_of(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Grid of the feature map of one item whose data has this shape."""
        grid: tuple[int, ...] = self.network.grid(self.signal.grid(tuple(shape)))  # type: ignore[operator]
        return grid

    def first_centre(self) -> float:
        """Centre of the first cell along time, in cells."""
        field = self._time_field()
        return (field.first + getattr(self.signal, "first_centre", 0.0)) / field.stride

    def token_rate(self, rate: float) -> float:
        """Tokens per second along the time axis of a view of that rate (Hz, frames per second)."""
        return token_rate_of(rate, self.signal, self._time_field().stride)

    def _time_field(self) -> Field:
        """How cells see time."""
        if self.modality == "video":
            return self.network.time_field()  # type: ignore[no-any-return, operator]
        return self.network.fields()[0]  # type: ignore[no-any-return, operator]

    def inputs(self, view: ViewBatch) -> Tensor:
        """The network's input: (P, C, *axes) signal, zero behind an item's end."""
        out: Tensor = (
            self.signal(view.data, lengths_if_padded(view)) if view.signal is None else view.signal
        )
        return out

    def frames(self, view: ViewBatch) -> Tensor:
        """(P,) valid inputs of the network along time."""
        lengths: Tensor = self.signal.out_lengths(view.lengths_P)  # type: ignore[operator]
        return lengths

    def encode(self, view: ViewBatch, position: float, mask: Mask | None = None) -> Tokens:
        """Encode the P items of a view.

        Raises:
            UserError: a masked pass was asked for.
        """
        if mask is not None:
            raise UserError(
                "a convolutional backbone has no masked pass; use a transformer tower for `masked`"
            )
        signal, shorter = self.inputs(view), lengths_if_padded(view) is not None
        frames = self.frames(view) if shorter else None
        x, grid = self.network(signal, frames, item_weight(view) > 0 if view.dummy else None)
        pad = None
        if frames is not None:
            steps = self.network.out_lengths(frames, signal.ndim - 2)  # type: ignore[operator]
            pad = padding_mask(steps.clamp(min=1), grid)
        rate = self.token_rate(view.rate)
        filled = full_padding(pad, x)
        return Tokens(x, filled, x, filled, grid, grid, {}, rate, rate, view)
