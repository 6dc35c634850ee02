"""`regress`: every token says what a signal of its view holds at its time (PASE's regressors).

Letters: P items, T tokens, S frames or samples of the signal, F values of a frame.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.heads.regress import FrameDecoder, WaveDecoder
from mmssl.objectives.regression import mean_absolute, mean_square
from mmssl.specs import Number
from mmssl.targets.signals import Standardize
from mmssl.tasks.base import Task
from mmssl.towers import Passes, item_weight, time_steps
from mmssl.types import Batch, Term, ViewBatch

ERRORS = {"square": mean_square, "absolute": mean_absolute}


class Regress(Task):
    """Regression of a front-end's frames, or of the waveform, from the tokens of one view.

    signal: the front-end. shift: frames by which the first frame lies behind the first one that is
    predicted; frames that no token has, and tokens that no frame has, count nowhere.
    """

    def __init__(
        self,
        view: str,
        signal: nn.Module,
        shift: int,
        decoder: FrameDecoder | WaveDecoder,
        error: str,
        standard: Standardize | None,
        weight: Number,
    ) -> None:
        super().__init__(weight)
        self.view, self.signal, self.shift = view, signal, shift
        self.decoder, self.standard, self.error = decoder, standard, ERRORS[error]

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """The error of a frame, averaged over its values."""
        tokens = passes.tokens(self.view)
        x_PTD, pad_PT = time_steps(tokens)
        guess_PSF = self.decoder(x_PTD)
        truth_PSF, valid_PS = self.truth(tokens.view, guess_PSF.shape[1])
        valid_PS = valid_PS & ~pad_PT.repeat_interleave(self.decoder.ratio, 1)
        return {"": Term(*self.error(guess_PSF, truth_PSF, valid_PS))}

    @torch.no_grad()
    def truth(self, view: ViewBatch, steps: int) -> tuple[Tensor, Tensor]:
        """(P, steps, F) of the items of a view, and which of them count."""
        lengths_P = view.lengths_P
        x = self.signal(view.data, lengths_P)
        x_PSF = x[:, 0, :, None] if x.ndim == 3 else x.transpose(1, 2).flatten(2)
        frames_P1 = self.signal.out_lengths(lengths_P)[:, None]  # type: ignore[operator]
        place = torch.arange(steps, device=x.device) - self.shift
        valid_PS = (place >= 0) & (place < frames_P1) & (item_weight(view) > 0)[:, None]
        behind = max(0, steps - self.shift - x_PSF.shape[1])
        x_PSF = F.pad(x_PSF, (0, 0, self.shift, behind))[:, :steps]
        if self.standard is not None:
            x_PSF = self.standard(x_PSF, valid_PS)
        return x_PSF, valid_PS
