"""Triplets of a few pixels, samples and ids from one hidden cause, and quick training on them.

The audio carries the whole cause, the text a quantised part of it, the video all of it beside
pixels that mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from small_methods import small, small_model
from torch import Tensor

from mmssl.model import Model
from mmssl.types import Batch, ViewBatch

CAUSES = 8  # numbers of a cause, each in [0, 1)
TINY = (
    "towers.video.cut.patch=[1,4,4]",
    "towers.video.positions.grid=[1,2,2]",
    "towers.video.drop_tokens=0",
    "towers.audio.cut.patch=[4]",
    "towers.audio.positions.grid=[4]",
    "towers.audio.drop_tokens=0",
    "views.video.crop_s=0.1",
    "views.video.size=8",
    "views.audio.crop_s=0.0003333333",  # 16 samples
    "views.text.length=5",
    "views.text.candidates=1",
)


def toy_model(name: str, *overrides: str, width: int = 32, seed: int = 0) -> Model:
    """A method on four tokens per view, a bit wider than the other tests have it."""
    spec = small(name)
    keys = ["shared"] if spec.shared is not None else []
    keys += [f"towers.{t}.backbone" for t in spec.towers if spec.shared is None]
    wider = [f"{key}.{n}={v}" for key in keys for n, v in (("width", width), ("hidden", 2 * width))]
    dims = [f"tasks.align.heads.spaces.{s}.dim={width}" for s in spec.tasks["align"].heads.spaces]
    return small_model(small(name, *TINY, *wider, *dims, *overrides), seed)


def causes(rows: int, seed: int) -> Tensor:
    """(rows, CAUSES) hidden causes."""
    return torch.rand(rows, CAUSES, generator=torch.Generator().manual_seed(seed))


def triplets(cause: Tensor, text: Tensor, seed: int = 0) -> Batch:
    """Media of causes; `text` (rows, 4) are the ids of each row, the end marker is added."""
    rows = len(cause)
    g = torch.Generator().manual_seed(seed)
    pixels = torch.rand(rows, 12, generator=g)  # a colour for each of the four patches
    pixels[:, :CAUSES] = cause
    frames = (pixels * 255.99).floor().to(torch.uint8).reshape(rows, 1, 2, 1, 2, 1, 3)
    frames = frames.expand(-1, -1, -1, 4, -1, 4, -1).reshape(rows, 1, 8, 8, 3)
    wave = (2 * cause - 1).repeat_interleave(2, dim=1)
    ids = torch.cat([text, torch.full((rows, 1), 3)], 1)
    views = {
        "video": _view("video", frames, g),
        "audio": _view("audio", wave, g),
        "text": _view("text", ids, g),
    }
    place = torch.arange(rows)
    return Batch(views, [str(i) for i in range(rows)], place + 100, place + 1, place)


def _view(modality: str, data: Tensor, g: torch.Generator) -> ViewBatch:
    rows = len(data)
    return ViewBatch(
        modality,
        data,
        torch.full((rows,), data.shape[1]),
        torch.arange(rows),
        torch.zeros(rows, dtype=torch.long),
        torch.randint(0, 2**62, (rows,), generator=g),
        torch.zeros(rows),
        torch.ones(rows, 1, dtype=torch.bool),
        {"audio": 48000.0, "video": 10.0, "text": 0.0}[modality],
    )


def quantised(cause: Tensor, levels: int = 6) -> Tensor:
    """(rows, 4) ids of the first four numbers, each in so many levels."""
    level = (cause[:, :4] * levels).floor().long()
    return 10 + levels * torch.arange(4) + level


def train(
    model: Model, batches: Callable[[int], Batch], steps: int, lr: float = 3e-3
) -> list[float]:
    """Adam with a linear decay; returns the losses."""
    optimiser = torch.optim.Adam(model.parameters(), lr)
    losses = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * (1 - step / steps)
        loss, _ = model.train()(batches(step), step, steps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def recall_at_1(query: Tensor, base: Tensor) -> float:
    """Share of rows whose own partner is strictly the nearest."""
    scores = query @ base.T
    own = scores.diagonal()[:, None]
    return float(((scores >= own).sum(1) == 1).float().mean())
