"""A test set whose truth is known, and encoders that know it, give one vector for all, or noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmssl.heads.dense import Dense
from mmssl.types import Batch, ViewBatch

CLASSES = ("circle", "square", "star", "heart")
SIDE, FRAMES, FPS, GRID = 32, 8, 4.0, (4, 8, 8)
WIDTH = 16


def _view(modality: str, data: Tensor, rows: Tensor, total: int, rate: float) -> ViewBatch:
    count = len(data)
    there = torch.zeros(total, 1, dtype=torch.bool)
    there[rows, 0] = True
    return ViewBatch(
        modality=modality,
        data=data,
        lengths_P=torch.full((count,), data.shape[1]),
        rows_P=rows,
        slots_P=torch.zeros(count, dtype=torch.int64),
        seeds_P=torch.arange(count),
        start_s_P=torch.zeros(count, dtype=torch.float64),
        present_BL=there,
        rate=rate,
    )


def make_row(number: int, rng: np.random.Generator) -> dict[str, Any]:
    """Even rows show one object, odd ones two; frames of 64 pixels, boxes aligned with cells."""
    kind = ("one", "two")[number % 2]
    name = CLASSES[(number // 2) % len(CLASSES)]
    silent = CLASSES[(number // 2 + 1 + int(rng.integers(3))) % len(CLASSES)]
    corners = rng.permutation(4)[:2]
    tracks = []
    for corner in corners:
        x, y = (corner % 2) * 32, (corner // 2) * 32
        tracks.append([[x + 8, y + 8, x + 24, y + 24]] * 20)
    return {
        "kind": kind,
        "class": name,
        "size": "small" if (number // 8) % 2 else "large",
        "silent_class": silent if kind == "two" else None,
        "boxes": {
            "fps": 10,
            "sounding": tracks[0],
            "silent": tracks[1] if kind == "two" else None,
        },
        "stored_size": [64, 64],
        "captions": [f"a {name} <sounds>"],
    }


def make_batch(first: int, size: int) -> Batch:
    """Rows depend on their number alone, not on the batch they are in."""
    rows = torch.arange(size)
    rngs = [np.random.default_rng(first + i) for i in range(size)]
    shape = (FRAMES, SIDE, SIDE, 3)
    pixels = np.stack([rng.integers(0, 255, shape).astype(np.uint8) for rng in rngs])
    wave = torch.from_numpy(np.stack([rng.normal(0, 1e-4, 16000) for rng in rngs])).float()
    wave[:, :8000] += 0.1  # the first second of two is loud
    frames, ids = torch.from_numpy(pixels), torch.zeros(size, 6, dtype=torch.int64)
    return Batch(
        views={
            "frames": _view("video", frames, rows, size, FPS),
            "sound": _view("audio", wave, rows, size, 8000.0),
            "words": _view("text", ids, rows, size, 0.0),
        },
        keys=[f"clip-{first + i}" for i in range(size)],
        source_B=torch.arange(first, first + size),
        text_B=torch.arange(first, first + size) // 2 + 1,
        index_B=torch.arange(first, first + size),
        meta=[make_row(first + i, rng) for i, rng in enumerate(rngs)],
    )


class KnowingModel(nn.Module):
    """Reads the truth from `meta`. mode: `perfect`, `constant` or `noise`."""

    def __init__(self, mode: str = "perfect", match: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.mode, self.match = mode, match

    def passes(self, batch: Batch) -> list[str]:
        return batch.keys

    def _code(self, name: str, key: str) -> Tensor:
        """Class in the first half, a clip's own code in the second."""
        code = torch.zeros(WIDTH)
        code[CLASSES.index(name)] = 1.0
        generator = torch.Generator().manual_seed(int(key.rsplit("-", 1)[1]))
        code[WIDTH // 2 :] = 0.1 * torch.randn(WIDTH // 2, generator=generator)
        return code

    def _vectors(self, batch: Batch) -> Tensor:
        if self.mode == "constant":
            return torch.ones(batch.size, WIDTH) / WIDTH**0.5
        if self.mode == "noise":
            return torch.nn.functional.normalize(torch.randn(batch.size, WIDTH), dim=1)
        rows = [self._code(m["class"], k) for m, k in zip(batch.meta, batch.keys, strict=True)]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    def embed(self, batch: Batch) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        there = torch.ones(batch.size, dtype=torch.bool)
        return {(m, "common"): (self._vectors(batch), there) for m in ("text", "video", "audio")}

    def space_for(self, a: str, b: str) -> str | None:
        return "common"

    def dense(self, batch: Batch) -> Dense:
        times, height, width = GRID
        video = 0.01 * torch.randn(batch.size, times, height, width, WIDTH)
        audio = torch.zeros(batch.size, 5, WIDTH)
        for i, meta in enumerate(batch.meta):
            audio[i, :, CLASSES.index(meta["class"])] = 1.0
            for track, name in (("sounding", "class"), ("silent", "silent_class")):
                if meta["boxes"][track] is not None and self.mode == "perfect":
                    x0, y0, x1, y1 = (v // 8 for v in meta["boxes"][track][0])
                    video[i, :, y0:y1, x0:x1, CLASSES.index(meta[name])] = 1.0
        return Dense(
            video=video.flatten(2, 3),
            audio=audio,
            audio_valid=torch.ones(batch.size, 5, dtype=torch.bool),
            present=torch.ones(batch.size, dtype=torch.bool),
            grid=GRID,
            times_s=(torch.arange(times) * 0.5 + 0.25).expand(batch.size, times),
        )

    def score_maps(self, video: Tensor, audio: Tensor, valid: Tensor) -> Tensor:
        weight = valid[..., None].float()
        mean = (audio * weight).sum(1) / weight.sum(1).clamp(min=1)
        return torch.einsum("ptsd,pd->pts", video, mean)

    def map_pairs(self) -> list[tuple[str, str]]:
        return []

    def map_sides(self, batch: Batch) -> dict[tuple[str, str], Any]:
        return {}

    def match_logit(self, batch: Batch, partner: Tensor) -> Tensor | None:
        if not self.match:
            return None
        own = partner == torch.arange(batch.size)
        return torch.where(own, 1.0, -1.0)

    def masked_stats(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        values = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64)
        return {
            "hide_sound": {
                "error_sum": torch.tensor([2.0]),
                "count": torch.tensor([4.0]),
                "target_sum": values.sum(0),
                "square_sum": values.square().sum().reshape(1),
                "cells": torch.tensor([2.0]),
            },
            "hide_words": {
                "correct": torch.tensor([6.0]),
                "count": torch.tensor([10.0]),
                "histogram": torch.tensor([2.0, 5.0, 3.0]),
            },
        }


@pytest.fixture
def knowing_model() -> type[KnowingModel]:
    return KnowingModel


@pytest.fixture
def make_batches() -> Callable[[int, int], list[Batch]]:
    """(rows, rows per batch) -> batches."""
    return _batches


@pytest.fixture
def batches() -> list[Batch]:
    """48 rows in batches of 10, the last one smaller."""
    return _batches(48, 10)


def _batches(total: int, size: int) -> list[Batch]:
    return [make_batch(first, min(size, total - first)) for first in range(0, total, size)]
