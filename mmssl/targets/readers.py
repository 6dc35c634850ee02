"""What else is learned from quantised latents: to rebuild the input, to spell what was said.

P items, N frames, D width of the context, Q width of a quantised vector, K numbers under a frame,
U symbols of a transcript, V symbols with the blank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmssl.frontends.patches import cells_of
from mmssl.objectives.precision import recurrent
from mmssl.objectives.regression import mean_square
from mmssl.objectives.transcripts import ctc
from mmssl.rng import row_uniform
from mmssl.targets.base import Seen
from mmssl.towers import item_weight
from mmssl.types import Term, UserError


@dataclass(frozen=True)
class Everything:
    """Codes of all frames, drawn independently of those that are targets of hidden frames.

    valid_PN: frames of present items that are no padding. ids_PNG: None without a quantizer.
    vectors_PNQ: quantised; latents without a quantizer. mapped_PNF: where they are compared.
    """

    valid_PN: Tensor
    ids_PNG: Tensor | None
    vectors_PNQ: Tensor
    mapped_PNF: Tensor


class Reader(nn.Module):
    """Terms of a part that reads `Everything`."""

    def forward(self, seen: Seen, every: Everything) -> dict[str, Term]:
        """Terms by name."""
        raise NotImplementedError


class Consistency(Reader):
    """Rebuild the stem's input from the codes alone (wav2vec-C, Sadhu et al. 2021).

    LSTM layers of `hidden` units and a linear map to a frame's K inputs; the term is the mean
    square error per number. Nothing but codes is read, or the term would be trivial.
    """

    def __init__(self, width: int, hidden: int, layers: int, cell: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True)
        self.out = nn.Linear(hidden, cell)

    def forward(self, seen: Seen, every: Everything) -> dict[str, Term]:
        """The error over all valid frames, hidden or not."""
        x_PNH = recurrent(self.lstm, every.vectors_PNQ)
        grid, cell = seen.tokens.grid, seen.tower.cell
        truth_PNK = cells_of(seen.tower.inputs(seen.view).detach(), grid, cell)
        error = mean_square(self.out(x_PNH), truth_PNK, every.valid_PN)
        return {"consistency": Term(*error)}


class Transcription(Reader):
    """CTC on frames of which some are replaced by their codes (UniSpeech, Wang et al. 2021).

    field: of the samples' metadata, symbols separated by spaces. Clips without it, and transcripts
    with more symbols than frames, count in no term but `transcribed`, the share that does count.
    replace: chance of a frame to be replaced, in training. CTC is counted per hidden frame of the
    clips that count, as the contrastive terms it is weighed against.
    """

    def __init__(
        self, width: int, field: str, symbols: Sequence[str], replace: float, dropout: float
    ) -> None:
        super().__init__()
        self.field, self.replace = field, replace
        self.number = {symbol: i for i, symbol in enumerate(symbols, start=1)}
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, 1 + len(symbols))

    def forward(self, seen: Seen, every: Everything) -> dict[str, Term]:
        """The terms `ctc` and `transcribed`."""
        ids_PU, symbols_P = self._transcripts(seen)
        logits_PNV = self.out(self.dropout(self._mixed(seen, every.mapped_PNF)))
        loss_P, counts_P = ctc(logits_PNV, every.valid_PN.sum(1), ids_PU, symbols_P)
        hidden_P = seen.hidden_PN.sum(1)
        present_P = item_weight(seen.view) > 0
        return {
            "ctc": Term(loss_P.sum(), (hidden_P * counts_P).sum()),
            "transcribed": Term(counts_P.sum(), present_P.sum()),
        }

    def _mixed(self, seen: Seen, mapped_PND: Tensor) -> Tensor:
        x_PND = seen.tokens.x_PND
        if not self.training:
            return x_PND
        u_PN = row_uniform(seen.view.seeds_P, x_PND.shape[1], f"{seen.task}/replace")
        return torch.where((u_PN < self.replace)[..., None], mapped_PND.to(x_PND.dtype), x_PND)

    def _transcripts(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """(P, U) ids padded with the blank, and how many symbols each item has; 0 = none known."""
        present_P = (item_weight(seen.view) > 0).tolist()
        rows_P = seen.view.rows_P.tolist()
        ids = [self._ids(seen, rows_P[i]) if here else [] for i, here in enumerate(present_P)]
        device = seen.tokens.x_PND.device
        symbols_P = torch.tensor([len(row) for row in ids], device=device)
        ids_PU = torch.zeros(len(ids), max(1, *map(len, ids)), dtype=torch.long)
        for target_U, row in zip(ids_PU, ids, strict=True):
            target_U[: len(row)] = torch.tensor(row, dtype=torch.long)
        return ids_PU.to(device), symbols_P

    def _ids(self, seen: Seen, row: int) -> list[int]:
        batch = seen.passes.batch
        text = batch.meta[row].get(self.field, "")
        words = text.split() if isinstance(text, str) else [repr(text)]
        unknown = [word for word in words if word not in self.number]
        if unknown:
            raise UserError(
                f"{batch.keys[row]}: {self.field!r} has {unknown[0]!r}, which is not among the "
                f"symbols of tasks.{seen.task}.target.transcripts; symbols stand between spaces"
            )
        return [self.number[word] for word in words]
