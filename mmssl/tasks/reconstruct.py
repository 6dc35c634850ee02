"""`reconstruct`: encode a view, quantise what comes out on request, decode it to a signal.

The signal is the one that the tower reads, or the slices beside those it has read. Decoders
(`mmssl.heads.decode`) say how far off they are. Letters: P items, N tokens, D width of the tower, Q
width of a code, C channels, R slices that are read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmssl.heads.decode import Decoder, Truth
from mmssl.heads.embed import pool
from mmssl.quantizers import Quantizer, VectorQuantizer
from mmssl.rng import row_uniform
from mmssl.schedules import resolve
from mmssl.specs import Number, ReconstructSpec, SlicesSpec
from mmssl.targets.codes import codebook_terms
from mmssl.tasks.base import Task
from mmssl.tasks.masked import keep_items
from mmssl.tasks.pretext import pieces
from mmssl.towers import Passes, item_weight
from mmssl.types import Batch, Floor, Term, ViewBatch
from mmssl.views.pretext import slices

_WATCHED = dict.fromkeys(("diversity", "perplexity", "usage", "speakers"), 0.0)
_USAGE = Floor(0.02, "the codebook", "set `quantizer.ema` of the task, or lower `optim.lr`")


class Encoded(NamedTuple):
    """Latents (P, N, D) in front of a quantizer, which of them are valid, and what to decode to."""

    x_PND: Tensor
    valid_PN: Tensor
    truth: Truth


class Reconstruct(Task):
    """One error, and the terms of a codebook.

    quantizer: of pooled vectors or tokens, with its (scheduled) temperature. Items too short for
    the slices take no part.
    """

    def __init__(
        self,
        name: str,
        spec: ReconstructSpec,
        decoder: Decoder,
        quantizer: Quantizer | None,
        temperature: Number,
    ) -> None:
        super().__init__(spec.weight)
        self.name, self.spec, self.decoder = name, spec, decoder
        self.quantizer, self.temperature = quantizer, temperature
        self.weights = {**_WATCHED, **spec.weights}
        self.floors = {} if quantizer is None else {"usage": _USAGE}

    def weight(self, term: str) -> list[Number]:
        """The task's weight and the term's own."""
        return [self._weight, self.weights.get(term, 1.0)]

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """The decoder's terms, and those of the codes it reads."""
        x_PND, valid_PN, truth = self.encode(passes, batch)
        if self.quantizer is None:
            return dict(self.decoder(x_PND, truth))
        noise = self.quantizer.noise(truth.view.seeds_P, x_PND.shape[1], f"{self.name}/gumbel")
        tau = resolve(self.temperature, passes.position)
        codes = self.quantizer(x_PND, valid_PN, tau, noise)
        if self.training and isinstance(self.quantizer, VectorQuantizer):
            self.quantizer.offer(x_PND, codes, valid_PN, passes.position)
        terms: dict[str, Term] = self.decoder(codes.vectors_PNQ.to(x_PND.dtype), truth)
        return terms | codebook_terms(codes)

    def after_step(self, position: float) -> None:
        """Let an averaged codebook take in the step's latents."""
        if isinstance(self.quantizer, VectorQuantizer):
            self.quantizer.write()

    def encode(self, passes: Passes, batch: Batch) -> Encoded:
        """What the quantizer or the decoder reads, and what the latter is to say."""
        cut = self.spec.slices
        view, tower = batch.views[self.spec.view], passes.tower(self.spec.view)
        if cut is not None:
            view = keep_items(view, tower.frames(view) >= cut.span)
        signal = tower.inputs(view)
        valid_P = item_weight(view) > 0
        truth = Truth(signal.detach(), tower.frames(view), valid_P, view, batch)
        heard = self._zeroed(signal, view)
        if cut is not None:
            return self._slices(passes, cut, heard, truth)
        source = None if heard is signal else replace(view, signal=heard)
        name = "" if source is None else self.name
        tokens = passes.tokens(self.spec.view, source=source, name=name)
        if self.spec.pool:
            return Encoded(pool(tokens, self.spec.pool)[:, None], valid_P[:, None], truth)
        return Encoded(tokens.x_PND, ~tokens.pad_PN & valid_P[:, None], truth)

    def _zeroed(self, signal: Tensor, view: ViewBatch) -> Tensor:
        """The signal with a share of its numbers set to 0, in training."""
        if not self.training or not self.spec.zeros:
            return signal
        numbers = signal[0].numel()
        u_PK = row_uniform(view.seeds_P, numbers, f"{self.name}/zeros")
        return torch.where(u_PK.view_as(signal) < self.spec.zeros, 0.0, signal)

    def _slices(self, passes: Passes, cut: SlicesSpec, heard: Tensor, truth: Truth) -> Encoded:
        """Vectors of the slices that are read, joined in their order; the others as truth."""
        view, items = truth.view, len(heard)
        start_N = torch.arange(cut.count, device=heard.device) * (cut.frames + cut.guard)
        middle = [cut.past]
        around = [i for i in range(cut.count) if i != cut.past]
        read, said = (around, middle) if cut.read == "around" else (middle, around)
        read_PR = slices(heard, start_N[read].expand(items, -1), cut.frames)
        said_PC = slices(truth.signal, start_N[said].expand(items, -1), cut.frames)
        index = torch.arange(items, device=heard.device).repeat_interleave(len(read))
        source = pieces(view, index, read_PR.flatten(0, 1))
        tokens = passes.tokens(self.spec.view, source=source, name=self.name)
        vectors = pool(tokens, self.spec.pool).reshape(items, 1, -1)
        full_P = truth.lengths_P.new_full((items,), cut.frames)
        truth = replace(truth, signal=said_PC.flatten(1, 2), lengths_P=full_P)
        return Encoded(vectors, truth.valid_P[:, None], truth)
