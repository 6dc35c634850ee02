"""Frames of a sound on a regular grid of times, as other libraries expect them.

Letters in shapes: B sounds, S samples, T frames, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmssl.embed.model import EmbeddingModel
from mmssl.types import UserError
from mmssl.views.clip import nearest


class SoundFrames:
    """A tower that reads sound."""

    def __init__(self, model: EmbeddingModel, tower: str | None = None) -> None:
        """Find its rate.

        Raises:
            UserError: no such tower, or none that reads sound.
        """
        view = model.audio_view(tower)
        self.model, self.tower, self.hz = model, view.tower_name, view.hz
        second = [{"audio": (torch.zeros(view.hz), view.hz)}]
        ((layers, times_T),) = model.encode_layers(second, tower=self.tower, threads=0)
        if len(times_T) < 2:
            raise UserError(f"{model.spec.name}: its tokens are too long for frames")
        self.rate_hz = float(1 / times_T.diff().median())
        self.widths = [layer.shape[1] for layer in layers]

    def on_grid(
        self, waves: Sequence[Tensor], rate: int, step_s: float, batch_size: int = 8
    ) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Layers (T, D) of every sound, and times (T,) in seconds: (i + 1/2) steps.

        Each instant has the frame whose centre is nearest. T is the length in steps, rounded, and
        at least 1.
        """
        found = self.model.encode_layers(
            [{"audio": (wave_S, rate)} for wave_S in waves], batch_size, tower=self.tower
        )
        layers, times = [], []
        for (each, at_T), wave_S in zip(found, waves, strict=True):
            count = max(1, int(len(wave_S) / rate / step_s + 0.5))
            # from the number of the frame, as sums of steps would drift
            grid_T = (torch.arange(count, dtype=torch.float64) + 0.5) * step_s
            place_T = nearest(at_T, grid_T)
            layers.append([x_TD[place_T] for x_TD in each])
            times.append(grid_T)
        return layers, times
