"""Cuts views out of decoded clips and augments them.

Letters in shapes: S samples, T frames, N token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmssl import rng
from mmssl.specs import AugmentSpec, ViewSpec
from mmssl.types import Clip, UserError, View
from mmssl.views import mel, segments, text, video, wave
from mmssl.views.plan import Cut

WAVE_OPS: dict[str, Callable[..., Tensor]] = {
    "fade": wave.fade,
    "gain": wave.gain,
    "noise": wave.noise,
    "pitch": wave.pitch,
    "rescale": wave.rescale,
    "time_mask": wave.time_mask,
    "band_noise": wave.band_noise,
    "reverb": wave.reverb,
}
VIDEO_OPS: dict[str, Callable[..., Tensor]] = {
    "horizontal_flip": video.horizontal_flip,
    "random_resized_crop": video.random_resized_crop,
    "color_jitter": video.color_jitter,
    "grayscale": video.grayscale,
    "blur": video.blur,
    "solarize": video.solarize,
}
OPS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "audio": WAVE_OPS,
    "video": VIDEO_OPS,
    "text": {},
}


def check_views(specs: dict[str, ViewSpec]) -> None:
    """Try every augmentation of every view on a tiny input.

    Raises:
        UserError: an unknown augmentation, options it does not take, or `mix` on another modality.
    """
    for name, spec in specs.items():
        table = OPS[spec.modality]
        if spec.mix is not None and spec.modality != "audio":
            raise UserError(f"views.{name}.mix: mixes waveforms; {name} is {spec.modality}")
        sample = torch.zeros(8) if spec.modality == "audio" else torch.zeros(1, 8, 8, 3).byte()
        for i, augment in enumerate(spec.augment):
            where = f"views.{name}.augment[{i}]"
            on_mel = spec.modality == "audio" and augment.kind in mel.OPS
            if augment.kind not in table and not on_mel:
                known = (
                    ", ".join([*table, *(mel.OPS if spec.modality == "audio" else ())]) or "none"
                )
                raise UserError(
                    f"{where}: no {spec.modality} augmentation {augment.kind!r} (known: {known})"
                )
            try:
                if on_mel:
                    one = torch.ones(1, 1, 2, 2)
                    two = torch.full((1,), 2)
                    mel.apply(one, mel.Items(two, two, one), [augment])
                else:
                    _apply(sample, augment, spec, rng.generator(0))
            except (TypeError, ValueError, ZeroDivisionError) as error:
                raise UserError(f"{where} {augment.kind}: bad options ({error})") from error


def cut_audio(clip: Clip, cut: Cut, training: bool) -> View | None:
    """The cut's samples, silence where the clip has none; None if the clip has no audio at all."""
    if clip.waveform is None:
        return None
    spec = cut.spec
    length = round((cut.end_s - cut.start_s) * spec.hz)
    first = round((cut.start_s - clip.audio_start_s) * spec.hz)
    mono = clip.waveform[0] if len(clip.waveform) == 1 else clip.waveform.mean(0)
    data = _window(mono, first, length)
    if training:
        data = _augment(data, cut)
    if spec.normalize:
        data = wave.normalize(data)
    return View(data, float(spec.hz), cut.start_s, cut.seed)


def cut_video(clip: Clip, cut: Cut, training: bool) -> View | None:
    """The frames nearest to the cut's times; None if the clip has no video."""
    if clip.frames is None or clip.frame_times_s is None:
        return None
    spec = cut.spec
    wanted = torch.tensor(cut.frame_times_s, dtype=torch.float64)
    picked = nearest(clip.frame_times_s, wanted)
    whole = len(picked) == len(clip.frames) and bool((picked.diff() == 1).all())
    data = clip.frames if whole else clip.frames[picked]
    if training:
        data = _augment(data, cut)
    place = rng.generator(cut.seed, "crop") if training else None
    return View(video.fit(data, spec.size, place), spec.fps, cut.start_s, cut.seed)


def cut_text(captions: Sequence[str], cut: Cut, tokenizer: segments.Encoder) -> list[View]:
    """One view per caption candidate, each with a seed of its own; or one of all captions."""
    if cut.spec.segments is not None:
        return segments.cut_segments(captions, cut, tokenizer)
    ids = text.tokenise(captions, tokenizer, cut.spec.length, cut.spec.candidates)
    seeds = [cut.seed if i == 0 else rng.seed_of(cut.seed, i) for i in range(len(ids))]
    return [View(data, 0.0, 0.0, seed) for data, seed in zip(ids, seeds, strict=True)]


def nearest(times_T: Tensor, wanted_K: Tensor) -> Tensor:
    """(K,) index of the nearest of the sorted times; the earlier one on a tie."""
    right = torch.searchsorted(times_T, wanted_K).clamp(max=len(times_T) - 1)
    left = (right - 1).clamp(min=0)
    closer = (wanted_K - times_T[left]).abs() <= (times_T[right] - wanted_K).abs()
    return torch.where(closer, left, right)


def _window(wave_S: Tensor, first: int, length: int) -> Tensor:
    """`length` samples from index `first`, which may lie outside the waveform."""
    low, high = max(0, first), min(len(wave_S), first + length)
    if low == first and high == first + length:
        return wave_S[low:high]
    out = wave_S.new_zeros(length)
    if high > low:
        out[low - first : high - first] = wave_S[low:high]
    return out


def _augment(data: Tensor, cut: Cut) -> Tensor:
    for i, augment in enumerate(cut.spec.augment):
        if augment.kind in mel.OPS:
            continue  # the model does it, behind the front-end
        data = _apply(data, augment, cut.spec, rng.generator(cut.seed, "augment", i))
    return data


def _apply(
    data: Tensor, augment: AugmentSpec, spec: ViewSpec, generator: torch.Generator
) -> Tensor:
    options: dict[str, Any] = dict(augment.options)
    if augment.kind == "random_resized_crop":
        options.setdefault("size", spec.size)
    if augment.kind in ("band_noise", "reverb"):
        options.setdefault("hz", spec.hz)
    return OPS[spec.modality][augment.kind](data, generator, **options)
