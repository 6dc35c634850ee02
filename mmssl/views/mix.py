"""Mixing the waveforms of a batch: a part of another row, or of a noise clip, is added to a row.

Letters in shapes: P rows, S samples, M the rows that are mixed, Q noise clips, R their samples.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmssl.rng import row_bits, row_uniform
from mmssl.specs import ViewSpec
from mmssl.types import ViewBatch


class MixPlan(NamedTuple):
    """What is added to which row; each field has one entry per row of the batch.

    mixed_P: bool, the row is mixed. noise_P: bool, with a noise clip instead of another row.
    second_P: which row or clip. ratio_P: power of the row over that of the scaled second signal,
    both over their whole lengths, in dB. length_P: samples of the region. start_P, from_P: its
    first sample in the row and in the second signal.
    """

    mixed_P: Tensor
    noise_P: Tensor
    second_P: Tensor
    ratio_P: Tensor
    length_P: Tensor
    start_P: Tensor
    from_P: Tensor


def plan_mix(
    lengths_P: Tensor,
    seeds_P: Tensor,
    probability: float = 0.2,
    noise_lengths_Q: Tensor | None = None,
    noise_probability: float = 0.0,
    speech_db: tuple[float, float] = (-5.0, 5.0),
    noise_db: tuple[float, float] = (-5.0, 20.0),
    stream: str = "mix",
) -> MixPlan:
    """Draw a mixing plan; arguments, law and errors as `mix_utterances`."""
    if noise_probability > 0 and noise_lengths_Q is None:
        raise ValueError(
            f"mix: noise_probability is {noise_probability}, but there is no noise; give clips or 0"
        )
    if noise_lengths_Q is None:
        noise_lengths_Q = torch.zeros_like(lengths_P[:1])
    u_P4 = row_uniform(seeds_P, 4, stream).double()
    bits_P3 = row_bits(seeds_P, 3, stream + "/place")
    noise_P = u_P4[:, 1] < noise_probability
    row_P, clip_P = ((u_P4[:, 2] * n).long() for n in (len(lengths_P), len(noise_lengths_Q)))
    second_P = torch.where(noise_P, clip_P, row_P)
    second_length_P = torch.where(noise_P, noise_lengths_Q[clip_P], lengths_P[row_P])
    # Drawn from the row's own length first, so that only shorter seconds shorten the region.
    length_P = torch.minimum(bits_P3[:, 0] % (lengths_P // 2 + 1), second_length_P)
    low_P, high_P = (torch.where(noise_P, noise_db[i], speech_db[i]) for i in (0, 1))
    return MixPlan(
        u_P4[:, 0] < probability,
        noise_P,
        second_P,
        low_P + (high_P - low_P) * u_P4[:, 3],
        length_P,
        bits_P3[:, 1] % (lengths_P - length_P + 1),
        bits_P3[:, 2] % (second_length_P - length_P + 1),
    )


def mix_utterances(
    wave_PS: Tensor,
    lengths_P: Tensor,
    seeds_P: Tensor,
    probability: float = 0.2,
    noise_QR: Tensor | None = None,
    noise_lengths_Q: Tensor | None = None,
    noise_probability: float = 0.0,
    speech_db: tuple[float, float] = (-5.0, 5.0),
    noise_db: tuple[float, float] = (-5.0, 20.0),
    normalize: bool = False,
    stream: str = "mix",
) -> Tensor:
    """Add a region of a second signal to some rows (utterance mixing of WavLM, Chen et al. 2022).

    Each row is mixed with the given probability; the second signal is a noise clip with
    probability `noise_probability`, else a row of the batch, itself included. The region's length
    is a whole number uniform in 0 .. T/2 (at most the second signal's length), its place uniform in
    both signals. The second signal is scaled to a power ratio uniform in dB; powers are those of
    the whole signals. All second signals are the rows as given, never mixed ones. A silent signal
    adds nothing. Everything but the partner and what its length bounds depends on the row's own
    seed and length alone.

    Args:
        wave_PS: waveforms, padded at the end; not changed.
        lengths_P: int64 valid samples.
        seeds_P: int64 row seeds.
        probability: of mixing a row; 0 gives the batch bit for bit.
        noise_QR: noise clips, padded at the end.
        noise_lengths_Q: int64 valid samples of the clips; all where None.
        noise_probability: of a noise clip as the second signal (WavLM Base 0, Base+ and Large 0.1).
        speech_db: range of the ratio for another row.
        noise_db: range of the ratio for noise.
        normalize: bring mixed rows to zero mean and unit variance again, as the view did before.
        stream: name of the random stream.

    Returns:
        (P, S) waveforms; rows that are not mixed, and padding, are as given.

    Raises:
        ValueError: a noise probability without noise.
    """
    if noise_QR is not None and noise_lengths_Q is None:
        noise_lengths_Q = lengths_P.new_full((len(noise_QR),), noise_QR.shape[1])
    plan = plan_mix(
        lengths_P,
        seeds_P,
        probability,
        noise_lengths_Q,
        noise_probability,
        speech_db,
        noise_db,
        stream,
    )
    row_M = plan.mixed_P.nonzero()[:, 0]
    added_MS = _region(wave_PS, lengths_P, wave_PS, lengths_P, plan, row_M)
    if noise_QR is not None and noise_lengths_Q is not None:
        noise_MS = _region(wave_PS, lengths_P, noise_QR, noise_lengths_Q, plan, row_M)
        added_MS = torch.where(plan.noise_P[row_M, None], noise_MS, added_MS)
    mixed_MS = wave_PS[row_M] + added_MS
    if normalize:
        mixed_MS = _normalized(mixed_MS, lengths_P[row_M])
    return wave_PS.index_copy(0, row_M, mixed_MS)


def mix_view(view: ViewBatch, spec: ViewSpec) -> ViewBatch:
    """An audio view with utterances mixed as `spec.mix` asks, normalised again if it was."""
    assert spec.mix is not None
    wave_PS = mix_utterances(
        view.data,
        view.lengths_P,
        view.seeds_P,
        spec.mix.probability,
        speech_db=spec.mix.db,
        normalize=spec.normalize,
    )
    return replace(view, data=wave_PS)


def _region(
    wave_PS: Tensor,
    lengths_P: Tensor,
    bank_QR: Tensor,
    bank_lengths_Q: Tensor,
    plan: MixPlan,
    row_M: Tensor,
) -> Tensor:
    """(M, S) the scaled region of a signal of the bank at its place in the row, 0 elsewhere."""
    # A row that reads the other bank has an index of that bank: any signal does for it here.
    second_M = plan.second_P[row_M].clamp(max=len(bank_QR) - 1)
    power_M = _power(wave_PS[row_M], lengths_P[row_M])
    second_power_M = _power(bank_QR[second_M], bank_lengths_Q[second_M])
    gain_M = _gain(power_M, second_power_M, plan.ratio_P[row_M]).to(wave_PS.dtype)
    offset_MS = torch.arange(wave_PS.shape[1], device=wave_PS.device) - plan.start_P[row_M, None]
    inside_MS = (offset_MS >= 0) & (offset_MS < plan.length_P[row_M, None])
    source_MS = (plan.from_P[row_M, None] + offset_MS).clamp(0, bank_QR.shape[1] - 1)
    region_MS = bank_QR[second_M].gather(1, source_MS) * gain_M[:, None]
    return torch.where(inside_MS, region_MS, torch.zeros_like(region_MS))


def levelled(sound_PKS: Tensor, lengths_PK: Tensor, ratio_PC: Tensor) -> Tensor:
    """(P, K) factors that bring the second to the last (C) of K sounds to their levels.

    The first keeps its own, which exceeds that of the others by so many dB; powers are those of the
    whole sounds. A silent one stays silent.
    """
    items, sounds = lengths_PK.shape
    power_PK = _power(sound_PKS.flatten(0, 1), lengths_PK.flatten()).reshape(items, sounds)
    gain_PC = _gain(power_PK[:, :1], power_PK[:, 1:], ratio_PC)
    return torch.cat([torch.ones_like(power_PK[:, :1]), gain_PC], 1).to(sound_PKS.dtype)


def _gain(power: Tensor, second_power: Tensor, ratio: Tensor) -> Tensor:
    """Factor of a second signal that puts it `ratio` dB below the first; 0 where it is silent."""
    square = power / second_power * 10 ** (-ratio / 10)
    return torch.where(second_power > 0, square, 0).sqrt()


def _power(wave_MS: Tensor, lengths_M: Tensor) -> Tensor:
    """(M,) fp64 mean square over the valid samples, 0 where there are none."""
    square_MS = wave_MS.double().square() * _inside(wave_MS, lengths_M)
    return square_MS.sum(1) / lengths_M.clamp(min=1)


def _normalized(wave_MS: Tensor, lengths_M: Tensor) -> Tensor:
    """Zero mean and unit variance over the valid samples; padding stays."""
    inside_MS, count_M1 = _inside(wave_MS, lengths_M), lengths_M.clamp(min=1)[:, None]
    mean_M1 = (wave_MS * inside_MS).sum(1, keepdim=True) / count_M1
    centred_MS = wave_MS - mean_M1
    variance_M1 = (centred_MS.square() * inside_MS).sum(1, keepdim=True) / count_M1
    return torch.where(inside_MS, centred_MS / (variance_M1.sqrt() + 1e-7), wave_MS)


def _inside(wave_MS: Tensor, lengths_M: Tensor) -> Tensor:
    return torch.arange(wave_MS.shape[1], device=wave_MS.device) < lengths_M[:, None]
