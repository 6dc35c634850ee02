"""Decoders: from codes back to a signal.

P items, N tokens, Q width of a code, C channels, T frames, F bands, S samples, K levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.backbones.audio2vec import SeparableBlock
from mmssl.objectives.classification import softmax_cross_entropy
from mmssl.objectives.regression import mean_square
from mmssl.types import Batch, Term, ViewBatch

LEVELS = 256


@dataclass(frozen=True)
class Truth:
    """What a decoder is to say, data without gradient.

    signal: (P, C, *axes), time first. lengths_P: valid inputs along time. valid_P: False for
    dummies. view, batch: which items they are, and of which rows.
    """

    signal: Tensor
    lengths_P: Tensor
    valid_P: Tensor
    view: ViewBatch
    batch: Batch

    def steps(self) -> Tensor:
        """(P, T) bool: what is neither padding nor of a dummy."""
        place_T = torch.arange(self.signal.shape[2], device=self.signal.device)
        return (place_T < self.lengths_P[:, None]) & self.valid_P[:, None]


class Decoder(nn.Module):
    """Codes to a signal, and how far off it is."""

    def forward(self, code_PNQ: Tensor, truth: Truth) -> dict[str, Term]:
        """Terms by name; the one named "" is called like its task."""
        raise NotImplementedError


class ConvDecoder(Decoder):
    """The mirror of `Audio2Vec`: a linear map of one vector, and blocks that nearest cells widen.

    Slices (C, T, F) come out side by side as channels; the term is the mean square error per
    number, counted once per slice.

    channels: of the encoder's blocks. shape: (T, F).
    """

    def __init__(
        self, width: int, channels: Sequence[int], slices: int, shape: tuple[int, int]
    ) -> None:
        super().__init__()
        halves = range(len(channels), -1, -1)
        self.sizes = [(shape[0] >> k, shape[1] >> k) for k in halves]
        self.enter = nn.Linear(width, channels[-1] * prod(self.sizes[0]))
        pairs = list(pairwise([*reversed(channels), slices]))
        last = len(pairs) - 1
        self.blocks = nn.ModuleList(
            SeparableBlock(*pair, mirrored=True, bare=i == last) for i, pair in enumerate(pairs)
        )

    def decode(self, code_PNQ: Tensor, valid_P: Tensor | None = None) -> Tensor:
        """(P, C, T, F); items that are not valid enter no batch statistics."""
        x: Tensor = self.enter(code_PNQ.flatten(1))
        x = x.reshape(len(x), -1, *self.sizes[0])
        for block, size in zip(self.blocks, self.sizes[1:], strict=True):
            x = block(F.interpolate(x, size), valid_P)
        return x

    def forward(self, code_PNQ: Tensor, truth: Truth) -> dict[str, Term]:
        """{"": the error}."""
        valid_P = None if bool(truth.valid_P.all()) else truth.valid_P
        guess = self.decode(code_PNQ, valid_P).flatten(2)
        mask_PC = truth.valid_P[:, None].expand(guess.shape[:2])
        return {"": Term(*mean_square(guess, truth.signal.flatten(2), mask_PC))}


class SequenceDecoder(Decoder):
    """A recurrent cell whose first state is the one vector it reads (Audio Word2Vec, Chung 2016).

    As wide as that vector. Every step reads the frame that the last one has said (zeros before the
    first), never the true one, which could be copied without the vector. The term is the mean
    square error per number, counted once per valid frame.

    features: numbers of a frame.
    """

    def __init__(self, width: int, features: int, cell: str = "lstm") -> None:
        super().__init__()
        self.cell = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}[cell](features, width)
        self.out = nn.Linear(width, features)

    def decode(self, code_PNQ: Tensor, frames: int) -> Tensor:
        """(P, T, F) of so many frames."""
        state = code_PNQ[:, 0]
        memory = torch.zeros_like(state)
        frame = state.new_zeros(len(state), self.out.out_features)
        said = []
        for _ in range(frames):
            if isinstance(self.cell, nn.LSTMCell):
                state, memory = self.cell(frame, (state, memory))
            else:
                state = self.cell(frame, state)
            frame = self.out(state)
            said.append(frame)
        return torch.stack(said, 1)

    def forward(self, code_PNQ: Tensor, truth: Truth) -> dict[str, Term]:
        """{"": the error}."""
        heard_PTF = truth.signal.transpose(1, 2).flatten(2)
        guess_PTF = self.decode(code_PNQ, heard_PTF.shape[1])
        return {"": Term(*mean_square(guess_PTF, heard_PTF, truth.steps()))}


class GatedLayer(nn.Module):
    """Causal dilated convolution of two taps, gated, to a residual and a skip (WaveNet)."""

    def __init__(self, channels: int, skip: int, dilation: int) -> None:
        super().__init__()
        self.channels, self.dilation = channels, dilation
        self.conv = nn.Conv1d(channels, 2 * channels, 2, dilation=dilation)
        self.out = nn.Conv1d(channels, channels + skip, 1)

    def forward(self, x_PCS: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(P, C, S) and the (P, 2 C, S) that are added before the gate, to the same and a skip."""
        wide = self.conv(F.pad(x_PCS, (self.dilation, 0))) + condition
        new, gate = wide.chunk(2, 1)
        out = self.out(new.tanh() * gate.sigmoid())
        rest, skip = out[:, : self.channels], out[:, self.channels :]
        return x_PCS + rest, skip


class WaveNet(Decoder):
    """Samples one after the other, from those before them and from codes (van den Oord 2016, 2017).

    Samples are told apart in 256 levels (mu-law); sample s reads the true ones up to s - 1, and of
    the codes that of its own cell of `stride` samples. Speakers enter as one-hot vectors beside the
    codes. The term is the cross-entropy of a sample in nats; ln 256 = 5.545 without knowledge.

    width: Q. cycles, depth: so many times layers dilated by 1, 2, 4 ... 2^(depth - 1).
    speakers: field of the rows' metadata, and the names in it.
    """

    def __init__(
        self,
        width: int,
        stride: int,
        channels: int = 64,
        skip: int = 256,
        cycles: int = 2,
        depth: int = 10,
        speakers: tuple[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        self.stride, self.speakers = stride, speakers
        dilations = [1 << k for k in range(depth)] * cycles
        named = 0 if speakers is None else len(speakers[1])
        self.enter = nn.Embedding(LEVELS, channels)
        self.condition = nn.Linear(width + named, 2 * channels * len(dilations))
        self.layers = nn.ModuleList(GatedLayer(channels, skip, d) for d in dilations)
        self.hidden, self.out = nn.Conv1d(skip, skip, 1), nn.Conv1d(skip, LEVELS, 1)

    def logits(self, level_PS: Tensor, code_PNQ: Tensor, speaker_P: Tensor | None) -> Tensor:
        """(P, S, K) of every sample.

        level_PS: int64 the samples themselves. speaker_P: int64, -1 where unknown; None without.
        """
        silence = level_PS.new_full((len(level_PS), 1), LEVELS // 2)
        x_PCS = self.enter(torch.cat([silence, level_PS[:, :-1]], 1)).transpose(1, 2)
        if speaker_P is not None:
            classes = self.condition.in_features - code_PNQ.shape[-1]
            names = torch.arange(classes, device=speaker_P.device)
            told_PK = (speaker_P[:, None] == names).to(code_PNQ.dtype)
            told_PNK = told_PK[:, None].expand(-1, code_PNQ.shape[1], -1)
            code_PNQ = torch.cat([code_PNQ, told_PNK], -1)
        place_S = torch.arange(level_PS.shape[1], device=level_PS.device) // self.stride
        place_S = place_S.clamp(max=code_PNQ.shape[1] - 1)
        parts = self.condition(code_PNQ).transpose(1, 2).chunk(len(self.layers), 1)
        skips = x_PCS.new_zeros(())
        for layer, part in zip(self.layers, parts, strict=True):
            x_PCS, skip = layer(x_PCS, part[..., place_S])
            skips = skips + skip
        found: Tensor = self.out(F.relu(self.hidden(F.relu(skips))))
        return found.transpose(1, 2)

    def forward(self, code_PNQ: Tensor, truth: Truth) -> dict[str, Term]:
        """{"": the cross-entropy}, and how many speakers are known."""
        speaker_P = None
        if self.speakers is not None:
            speaker_P = truth.batch.classes(*self.speakers)[truth.view.rows_P]
        wave_PS, valid_PS = truth.signal[:, 0].float().clamp(-1, 1), truth.steps()
        level_PS = torchaudio.functional.mu_law_encoding(wave_PS, LEVELS)
        logits_PSK = self.logits(level_PS, code_PNQ, speaker_P)
        loss = softmax_cross_entropy(
            logits_PSK.flatten(0, 1), level_PS.flatten(), valid_PS.flatten()
        )
        terms = {"": Term(loss.sum(), valid_PS.sum())}
        if speaker_P is not None:
            known_P = (speaker_P >= 0) & truth.valid_P
            terms["speakers"] = Term(known_P.sum(), truth.valid_P.sum())
        return terms
