"""Views of B rows to one Batch whose tensors share a single block of memory.

One block crosses from a worker to the training process as one file descriptor, and is pinned in one
go.

Letters in shapes: B rows, L slots, P present items, S samples, T frames, H, W, N ids or labels, G
codebooks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmssl import rng
from mmssl.data.labels import NO_LABEL, LabelKind, label_count
from mmssl.specs import ViewSpec
from mmssl.types import Batch, FrameLabels, UserError, View, ViewBatch
from mmssl.views.segments import with_strangers

_ALIGN = 64  # bytes
_DUMMY_S = 1.0  # length of a dummy item whose view has no fixed length
_DUMMY_SIDE = 64  # its side in pixels where the view keeps the stored size


@dataclass
class Item:
    """One row before collation: its views by name, one entry per filled slot."""

    key: str
    source: str
    index: int
    captions: list[str]
    views: dict[str, list[View]]
    meta: dict[str, Any] = field(default_factory=dict)


class Place(NamedTuple):
    """Where a tensor lies in the block."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class PackedBatch:
    """A batch as one block of bytes and a description; what travels between processes.

    error: set instead of the rest when training must stop; raised by the receiver.
    label_hz: rates of the frame labels by name. skipped: samples left out on the way, by reason.
    """

    block: Tensor
    places: dict[str, Place]
    views: dict[str, tuple[str, float, bool]]
    keys: list[str]
    meta: list[dict[str, Any]]
    error: str = ""
    label_hz: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory; torch calls it when there is an accelerator."""
        self.block = self.block.pin_memory()
        return self

    def unpack(self) -> Batch:
        """The batch; its tensors are views of the block.

        Raises:
            UserError: the sender asked for a stop.
        """
        if self.error:
            raise UserError(self.error)
        tensors = {name: _at(self.block, place) for name, place in self.places.items()}
        views = {
            name: ViewBatch(
                modality=modality,
                rate=rate,
                dummy=dummy,
                labels={
                    label: FrameLabels(tensors[_label_place(name, label)], hz)
                    for label, hz in self.label_hz.items()
                    if _label_place(name, label) in tensors
                },
                **{f: tensors[f"{name}/{f}"] for f in _VIEW_FIELDS},
                split_P=tensors.get(f"{name}/split_P"),
                order_P=tensors.get(f"{name}/order_P"),
            )
            for name, (modality, rate, dummy) in self.views.items()
        }
        return Batch(
            views=views,
            keys=self.keys,
            source_B=tensors["source_B"],
            text_B=tensors["text_B"],
            index_B=tensors["index_B"],
            meta=self.meta,
        )


_VIEW_FIELDS = (
    "data",
    "lengths_P",
    "rows_P",
    "slots_P",
    "seeds_P",
    "start_s_P",
    "present_BL",
)


def failed(message: str) -> PackedBatch:
    """A batch that carries only the reason to stop."""
    return PackedBatch(torch.empty(0, dtype=torch.uint8), {}, {}, [], [], message)


def collate(items: Sequence[Item], specs: Mapping[str, ViewSpec]) -> Batch:
    """Collate in this process; see `pack`."""
    return pack(items, specs, shared=False).unpack()


def pack(
    items: Sequence[Item],
    specs: Mapping[str, ViewSpec],
    shared: bool,
    labels: Mapping[str, LabelKind] | None = None,
) -> PackedBatch:
    """Lay the present items of every view out in one block, in the order of rows and slots.

    Args:
        items: the rows.
        specs: views by name; decide padded lengths and dummy items.
        shared: allocate the block in shared memory, so that sending it copies nothing.
        labels: the frame labels that every view of a signal carries.

    Raises:
        UserError: frames of different sizes in one view.
    """
    labels = labels or {}
    columns = {name: _Column(name, spec, items, labels) for name, spec in specs.items()}
    small = {
        "source_B": torch.tensor(
            [rng.seed_of("source", i.source) for i in items], dtype=torch.int64
        ),
        "text_B": torch.tensor([text_id(i.captions) for i in items], dtype=torch.int64),
        "index_B": torch.tensor([i.index for i in items], dtype=torch.int64),
    }
    for name, column in columns.items():
        small |= {f"{name}/{f}": t for f, t in column.indices(len(items)).items()}
        small |= {f"{name}/{f}": t for f, t in column.segments().items()}
        small |= {_label_place(name, label): t for label, t in column.frame_labels()}
    places, size = _lay_out(
        {
            **{n: (t.shape, t.dtype) for n, t in small.items()},
            **{f"{n}/data": c.data_kind for n, c in columns.items()},
        }
    )
    block = _new_block(size, shared)
    for name, tensor in small.items():
        _at(block, places[name]).copy_(tensor)
    for name, column in columns.items():
        column.fill(_at(block, places[f"{name}/data"]))
    kinds: dict[str, tuple[str, float, bool]] = {
        n: (c.spec.modality, c.rate, not c.entries) for n, c in columns.items()
    }
    label_hz = {name: kind.rate_hz for name, kind in labels.items()}
    keys, meta = [i.key for i in items], [i.meta for i in items]
    return PackedBatch(block, places, kinds, keys, meta, label_hz=label_hz)


def _label_place(view: str, label: str) -> str:
    return f"{view}/labels/{label}"


def text_id(captions: Sequence[str]) -> int:
    """Id of a row's first caption, whatever its case and spacing; 0 for none."""
    if not captions:
        return 0
    return rng.seed_of("text", " ".join(captions[0].casefold().split()))


class _Column:
    """The present items of one view."""

    def __init__(
        self,
        name: str,
        spec: ViewSpec,
        items: Sequence[Item],
        labels: Mapping[str, LabelKind],
    ) -> None:
        self.name, self.spec = name, spec
        self.labels = labels if spec.modality != "text" and spec.codes is None else {}
        self.slots = spec.candidates if spec.modality == "text" else 1
        self.entries: list[tuple[int, int, View]] = [
            (row, slot, view)
            for row, item in enumerate(items)
            for slot, view in enumerate(item.views.get(name, ())[: self.slots])
        ]
        if spec.segments is not None and spec.segments.pairing == "next":
            self._lend([item.source for item in items])
        self.rate = {"audio": float(spec.hz), "video": spec.fps, "text": 0.0}[spec.modality]
        self.length = self._padded_length()

    def _lend(self, sources: Sequence[str]) -> None:
        """Let rows borrow a second segment from each other."""
        views = [view for _, _, view in self.entries]
        mixed = with_strangers(views, [sources[row] for row, _, _ in self.entries])
        self.entries = [
            (row, slot, view) for (row, slot, _), view in zip(self.entries, mixed, strict=True)
        ]

    def _nominal(self, seconds: float) -> int:
        if self.spec.modality == "text":
            return self.spec.length
        return max(1, math.floor(seconds * self.rate + 0.5))

    def _padded_length(self) -> int:
        """Fixed wherever the view has a fixed length, so that shapes do not vary with the batch."""
        longest = max((len(v.data) for _, _, v in self.entries), default=0)
        if self.spec.modality == "text" or self.spec.crop_s:
            return max(longest, self._nominal(self.spec.crop_s))
        return longest or self._nominal(_DUMMY_S)

    @property
    def data_kind(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of the padded data, dummy item included."""
        count = max(1, len(self.entries))
        if self.spec.modality == "audio":
            return (count, self.length), torch.int64 if self.spec.codes else torch.float32
        if self.spec.modality == "text":
            return (count, self.length), torch.int64
        sizes = {tuple(v.data.shape[1:]) for _, _, v in self.entries}
        if len(sizes) > 1:
            raise UserError(
                f"views.{self.name}: frames of different sizes in one batch {sorted(sizes)}; "
                "set the view's `size`"
            )
        side = self.spec.size or _DUMMY_SIDE
        return (count, self.length, *(sizes.pop() if sizes else (side, side, 3))), torch.uint8

    def indices(self, rows: int) -> dict[str, Tensor]:
        """The small tensors of the view."""
        present_BL = torch.zeros(rows, self.slots, dtype=torch.bool)
        for row, slot, _ in self.entries:
            present_BL[row, slot] = True
        dummy = [] if self.entries else [0]
        whole = [self.length] if dummy else []
        return {
            "lengths_P": torch.tensor([len(v.data) for _, _, v in self.entries] + whole),
            "rows_P": torch.tensor([row for row, _, _ in self.entries] + dummy),
            "slots_P": torch.tensor([slot for _, slot, _ in self.entries] + dummy),
            "seeds_P": torch.tensor([v.seed for _, _, v in self.entries] + dummy),
            "start_s_P": torch.tensor(
                [v.start_s for _, _, v in self.entries] + [0.0] * len(dummy), dtype=torch.float32
            ),
            "present_BL": present_BL,
        }

    def segments(self) -> dict[str, Tensor]:
        """Where second segments begin, and whether they belong there; nothing without segments."""
        if self.spec.segments is None:
            return {}
        views = [view for _, _, view in self.entries]
        return {
            "split_P": torch.tensor([v.split for v in views] or [0]),
            "order_P": torch.tensor([v.order for v in views] or [-1]),
        }

    def frame_labels(self) -> Iterator[tuple[str, Tensor]]:
        """(P, N, G) labels by name; N follows the padded length of the data."""
        for name, kind in self.labels.items():
            count = label_count(self.length, self.rate, kind.rate_hz)
            shape = (max(1, len(self.entries)), count, kind.codebooks)
            ids_PNG = torch.full(shape, NO_LABEL, dtype=torch.int64)
            for target, (_, _, view) in zip(ids_PNG, self.entries, strict=False):
                ids_NG = view.labels[name].ids
                target[: len(ids_NG)] = ids_NG
            yield name, ids_PNG

    def fill(self, data: Tensor) -> None:
        """Write the padded data."""
        if not self.entries:
            data.zero_()
        for target, (_, _, view) in zip(data, self.entries, strict=False):
            target[: len(view.data)] = view.data
            target[len(view.data) :] = 0


def _lay_out(
    kinds: Mapping[str, tuple[Sequence[int], torch.dtype]],
) -> tuple[dict[str, Place], int]:
    places: dict[str, Place] = {}
    offset = 0
    for name, (shape, dtype) in kinds.items():
        places[name] = Place(offset, tuple(shape), dtype)
        size = math.prod(shape) * dtype.itemsize
        offset += -(-size // _ALIGN) * _ALIGN
    return places, offset


def _new_block(size: int, shared: bool) -> Tensor:
    if not shared:
        return torch.empty(size, dtype=torch.uint8)
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,))


def _at(block: Tensor, place: Place) -> Tensor:
    size = math.prod(place.shape) * place.dtype.itemsize
    return block[place.offset : place.offset + size].view(place.dtype).view(place.shape)
