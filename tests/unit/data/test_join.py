"""Joined batches are what collating all their rows at once gives."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mmssl.data.collate import Item, pack
from mmssl.data.join import join
from mmssl.specs import ViewSpec
from mmssl.types import Batch, FrameLabels, View

SPECS = {
    "a": ViewSpec.model_validate({"modality": "audio", "hz": 8000}),
    "v": ViewSpec.model_validate({"modality": "video", "fps": 4, "crop_s": 1, "size": 8}),
    "t": ViewSpec.model_validate({"modality": "text", "length": 6, "candidates": 2}),
}


def item(row: int, samples: int, frames: int, captions: int) -> Item:
    g = torch.Generator().manual_seed(row)
    views: dict[str, list[View]] = {"a": [], "v": [], "t": []}
    if samples:
        views["a"] = [View(torch.rand(samples, generator=g), 8000.0, 0.5 * row, 10 + row)]
    if frames:
        pixels = torch.randint(0, 255, (frames, 8, 8, 3), generator=g, dtype=torch.uint8)
        views["v"] = [View(pixels, 4.0, 0.0, 20 + row)]
    for i in range(captions):
        ids = torch.randint(0, 50, (2 + i,), generator=g)
        views["t"].append(View(ids, 0.0, 0.0, 30 + row))
    return Item(f"k{row}", f"s{row}", row, ["caption"] * captions, views, {"row": row})


ITEMS = [
    item(0, 700, 0, 0),
    item(1, 900, 4, 0),
    item(2, 0, 3, 2),
    item(3, 0, 4, 1),
    item(4, 500, 0, 2),
]


def leaves(batch: Batch) -> Iterator[tuple[str, Any]]:
    for name, value in vars(batch).items():
        if name != "views":
            yield name, value
    for view_name, view in batch.views.items():
        for name, value in vars(view).items():
            yield f"{view_name}.{name}", value


@pytest.mark.parametrize("cuts", [(2,), (1, 2, 3, 4), (4,)])
def test_joined_batches_equal_those_of_all_rows(cuts: tuple[int, ...]) -> None:
    whole = pack(ITEMS, SPECS, shared=False).unpack()
    ends = [0, *cuts, len(ITEMS)]
    parts = [pack(ITEMS[a:b], SPECS, shared=False).unpack() for a, b in pairwise(ends)]
    joined = dict(leaves(join(parts)))
    for name, value in leaves(whole):
        if isinstance(value, Tensor):
            assert torch.equal(joined[name], value), name
        else:
            assert joined[name] == value, name


def test_a_view_that_no_part_has_stays_a_dummy() -> None:
    parts = [pack([ITEMS[row]], SPECS, shared=False).unpack() for row in (0, 4)]
    video = join(parts).views["v"]
    assert video.dummy
    assert video.present_BL.shape == (2, 1)
    assert not video.present_BL.any()


def test_frame_labels_are_padded_with_none() -> None:
    parts = [pack([ITEMS[row]], SPECS, shared=False).unpack() for row in (0, 1)]
    for part, count in zip(parts, (3, 5), strict=True):
        ids_PNG = torch.arange(count)[None, :, None]
        part.views["a"].labels = {"units": FrameLabels(ids_PNG, 50.0)}
    ids_PNG = join(parts).views["a"].labels["units"].ids
    assert ids_PNG[..., 0].tolist() == [[0, 1, 2, -1, -1], [0, 1, 2, 3, 4]]
