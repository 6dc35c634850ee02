"""Contrastive objectives over a table of scores, with masks that say who competes with whom.

Letters in shapes: Q queries (rows of this rank), C candidates (rows of all ranks), G rows of all
ranks, B rows of this rank, L alternatives of a row (its caption and the neighbouring ones).

Every objective returns one loss per query, in nats, fp32 or wider. A query without a positive has
loss 0 and sends no gradient, so a term is `loss_Q.sum()` over `positive_QC.any(1).sum()`, both
summed over ranks. Scores are logits: temperatures are applied before. Embeddings of absent rows may
hold any finite value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmssl import dist
from mmssl.objectives.precision import wide

Positives = Literal["pooled", "mean"]
MilForm = Literal["released", "strict", "symmetric"]


@dataclass(frozen=True)
class Candidates:
    """Who the rows of one modality are: row, source (G,) int64, present (G,) bool, text (G,) int64.

    row: place in the global batch. source: id of the recording, near-duplicates share it.
    present: the row has this modality. text: id of the caption, 0 where there is none; None where
    captions play no part.
    """

    row: Tensor
    source: Tensor
    present: Tensor
    text: Tensor | None = None

    @classmethod
    def local(cls, source_B: Tensor, present_B: Tensor, text_B: Tensor | None = None) -> Candidates:
        """The rows of this rank, numbered through over the ranks (B is the same on each)."""
        start = dist.rank() * source_B.shape[0]
        row = torch.arange(start, start + source_B.shape[0], device=source_B.device)
        return cls(row, source_B, present_B, text_B)

    def gathered(self) -> Candidates:
        """The rows of all ranks, in rank order (one collective)."""
        columns = [self.row, self.source, self.present.long()]
        columns += [] if self.text is None else [self.text]
        row, source, present, *text = dist.gather_no_grad(torch.stack(columns, 1)).unbind(1)
        return Candidates(row, source, present.bool(), text[0] if text else None)

    def __getitem__(self, rows: slice) -> Candidates:
        text = None if self.text is None else self.text[rows]
        return Candidates(self.row[rows], self.source[rows], self.present[rows], text)

    def __len__(self) -> int:
        return self.row.shape[0]


def candidate_mask(
    query: Candidates, candidates: Candidates, equal_text_positive: bool = False
) -> tuple[Tensor, Tensor]:
    """Which candidates are positives of a query, and which take part at all.

    Positive: the query's own row and, where asked, rows with an equal caption. Left out: absent
    candidates, all candidates of an absent query, and other rows of the query's own source (they
    are no negatives).

    Returns:
        positive (Q, C) and valid (Q, C), bool; every positive is valid.

    Raises:
        ValueError: `equal_text_positive` without caption ids.
    """
    both_QC = query.present[:, None] & candidates.present[None]
    positive_QC = query.row[:, None] == candidates.row[None]
    if equal_text_positive:
        if query.text is None or candidates.text is None:
            raise ValueError("candidate_mask: equal_text_positive needs caption ids on both sides")
        equal_QC = query.text[:, None] == candidates.text[None]
        positive_QC = positive_QC | (equal_QC & (candidates.text != 0)[None])
    other_QC = query.source[:, None] != candidates.source[None]
    return positive_QC & both_QC, (positive_QC | other_QC) & both_QC


def info_nce(
    scores_QC: Tensor, positive_QC: Tensor, valid_QC: Tensor, positives: Positives = "pooled"
) -> Tensor:
    """InfoNCE in one direction (van den Oord et al. 2018): constant scores give ln(valid).

    Args:
        scores_QC: logits.
        positive_QC: bool; positives that are not valid do not count.
        valid_QC: bool, the denominator.
        positives: with several, `pooled` -lse(valid) + lse(positives) asks for any of them,
            `mean` averages the losses of each (Khosla et al. 2020, eq. 2).

    Returns:
        (Q,) losses.
    """
    scores_QC, positive_QC = wide(scores_QC), positive_QC & valid_QC
    total_Q = masked_logsumexp(scores_QC, valid_QC)
    if positives == "pooled":
        hit_Q = masked_logsumexp(scores_QC, positive_QC)
    else:
        kept_QC = torch.where(positive_QC, scores_QC, torch.zeros_like(scores_QC))
        hit_Q = kept_QC.sum(1) / positive_QC.sum(1).clamp(min=1)
    return _where_any(positive_QC, total_Q - hit_Q)


def mil_nce(
    forward_QCL: Tensor,
    backward_QCL: Tensor,
    positive_QC: Tensor,
    valid_forward_QC: Tensor,
    valid_backward_QC: Tensor,
    form: MilForm = "released",
) -> Tensor:
    """Two-direction NCE with L alternatives per row (MIL-NCE, Miech et al. 2020; MMV, 2020).

    forward[i, j, l] scores row i against alternative l of row j, backward[i, j, l] scores row j
    against alternative l of row i. Plain NCE between two modalities is L = 1.

    `released`: one softmax over both directions, positives twice in the denominator, constant
    scores give ln(2C). `strict` (the papers): positives once, ln(2C - 1). `symmetric`:
    the sum of two softmaxes, 2 ln C.

    Args:
        forward_QCL: logits, (Q, C, L) or (Q, C).
        backward_QCL: logits of the same shape.
        positive_QC: bool, broadcast over L; only its valid entries count.
        valid_forward_QC: bool, (Q, C) or (Q, C, L): the alternative (j, l) takes part.
        valid_backward_QC: bool, likewise: row j and the alternative (i, l) take part.
        form: see above.

    Returns:
        (Q,) losses.

    Raises:
        ValueError: an unknown form.
    """
    forward, backward = wide(forward_QCL).flatten(1), wide(backward_QCL).flatten(1)
    positive = _spread(positive_QC, forward_QCL)
    valid_f = _spread(valid_forward_QC, forward_QCL)
    valid_b = _spread(valid_backward_QC, forward_QCL)
    positive_f, positive_b = positive & valid_f, positive & valid_b
    if form == "symmetric":
        loss_Q = info_nce(forward, positive_f, valid_f) + info_nce(backward, positive_b, valid_b)
        return _where_any(positive_f, loss_Q)
    if form == "strict":
        valid_b = valid_b & ~positive_b
    elif form != "released":
        raise ValueError(f"mil_nce: form is released, strict or symmetric, got {form!r}")
    everything = torch.cat([forward, backward], 1)
    total_Q = masked_logsumexp(everything, torch.cat([valid_f, valid_b], 1))
    return _where_any(positive_f, total_Q - masked_logsumexp(forward, positive_f))


def sigmoid_pairs(
    scores_QC: Tensor,
    positive_QC: Tensor,
    valid_QC: Tensor,
    scale: Tensor | float = 1.0,
    bias: Tensor | float = 0.0,
) -> Tensor:
    """Independent yes/no loss of every valid pair (SigLIP, Zhai et al. 2023), summed per query.

    The paper starts from scale 10 and bias -10. A query without a positive still has its
    negatives; rows of absent queries are not valid and give 0.

    Returns:
        (Q,) losses.
    """
    logits_QC = wide(scores_QC) * scale + bias
    loss_QC = F.softplus(torch.where(positive_QC, -logits_QC, logits_QC))
    return torch.where(valid_QC, loss_QC, torch.zeros_like(loss_QC)).sum(1)


def in_row_chunks(fn: Callable[[slice], Tensor], rows: int, chunk: int) -> Tensor:
    """`fn(slice(0, rows))`, evaluated for `chunk` rows at a time.

    `fn` maps a slice of the query rows to a tensor with one row for each, for example

        in_row_chunks(lambda r: info_nce(a_QD[r] @ b_CD.T, *candidate_mask(q[r], c)), Q, 256)

    Only one chunk's scores exist at a time, in the backward too, where they are computed again: the
    square of a global batch is never in memory. `fn` must be a pure function without collectives.

    Raises:
        ValueError: `chunk` is not positive.
    """
    if chunk < 1:
        raise ValueError(f"in_row_chunks: chunk must be at least 1, got {chunk}")
    if rows <= chunk:
        return fn(slice(0, rows))
    parts = [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
    if not torch.is_grad_enabled():
        return torch.cat([fn(part) for part in parts])
    return torch.cat(
        [checkpoint(fn, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    )


def masked_logsumexp(scores_QC: Tensor, mask_QC: Tensor) -> Tensor:
    """(Q,) log-sum-exp over the marked entries; 0 and without gradient where none is marked."""
    filled_QC = scores_QC.masked_fill(~mask_QC, -math.inf)
    # A row of -inf alone would give NaN gradients: it is replaced before, not after, the lse.
    any_Q1 = mask_QC.any(1, keepdim=True)
    filled_QC = torch.where(any_Q1, filled_QC, torch.zeros_like(filled_QC))
    return _where_any(mask_QC, torch.logsumexp(filled_QC, 1))


class LogitScale(nn.Module):
    """Temperature as a factor on scores, learned in log space, with an optional bias.

    Values have shape (1,); the factor is applied in fp32 or wider and held at `max_scale` (CLIP,
    Radford et al. 2021). At the bound the gradient still passes, so that the factor can come back;
    `clamp_` keeps the parameter itself from drifting away.
    """

    log_scale: Tensor
    bias: Tensor | None

    def __init__(
        self, init: float, learned: bool = True, max_scale: float = 100.0, bias: float | None = None
    ) -> None:
        """Start from the factor `init` (1 / temperature) and `bias`, both fixed unless learned.

        Raises:
            ValueError: `init` is not in (0, max_scale].
        """
        super().__init__()
        if not 0 < init <= max_scale:
            raise ValueError(f"LogitScale: init must be in (0, {max_scale}], got {init}")
        self.max_scale = max_scale
        self._hold("log_scale", math.log(init), learned)
        if bias is None:
            self.bias = None
        else:
            self._hold("bias", bias, learned)

    @property
    def scale(self) -> Tensor:
        """(1,) the factor in effect."""
        raw = wide(self.log_scale)
        excess = (raw - math.log(self.max_scale)).clamp(min=0)
        return torch.exp(raw - excess.detach())

    def forward(self, scores: Tensor) -> Tensor:
        """Scores of any shape -> logits of the same shape."""
        logits = wide(scores) * self.scale
        return logits if self.bias is None else logits + wide(self.bias)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring the parameter back to the bound (call after an optimiser step)."""
        self.log_scale.clamp_(max=math.log(self.max_scale))

    def _hold(self, name: str, value: float, learned: bool) -> None:
        tensor = torch.full((1,), value, dtype=torch.float32)
        if learned:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)


def _spread(mask: Tensor, scores_QCL: Tensor) -> Tensor:
    """A (Q, C) or (Q, C, L) mask as (Q, C*L), like the flattened scores."""
    if mask.dim() < scores_QCL.dim():
        mask = mask[..., None]
    return mask.expand(scores_QCL.shape).flatten(1)


def _where_any(mask_QC: Tensor, value_Q: Tensor) -> Tensor:
    return torch.where(mask_QC.any(1), value_Q, torch.zeros_like(value_Q))
