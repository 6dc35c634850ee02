"""Reads shards once and in order, for evaluation; B rows of the micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from mmssl.data import energon
from mmssl.data.collate import Item, PackedBatch, failed
from mmssl.data.encode import BadSampleGuard, SampleEncoder
from mmssl.data.folders import read_manifest
from mmssl.data.guarded import close, encode_guarded, guarded, packed_rows, to_sample
from mmssl.data.integrity import Ledger, Quarantine
from mmssl.data.labels import LabelBook
from mmssl.data.reader import ShardReader
from mmssl.data.text import Tokenizer
from mmssl.data.workers import apart
from mmssl.specs import DataSpec, ViewSpec
from mmssl.types import Batch


def eval_batches(
    path: str | Path,
    data: DataSpec,
    views: Mapping[str, ViewSpec],
    micro_batch: int,
    tokenizer: Tokenizer | None,
    limit: int | None = None,
    workers: int | None = None,
    ledger: str | Path | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every sample of a folder once, in the order of the source manifest, without augmentation.

    Damaged samples are left out and counted. `Batch.meta` holds the manifest's meta of every row,
    with `captions`, `source`, `has`, `duration_s` and `stored_size` (width, height). Views carry
    the frame labels of those `data.frame_labels` that have a side-car of this folder.

    Args:
        path: shard folder.
        data: decoder, limits and `max_bad_share`.
        views: views by name.
        micro_batch: rows per batch; the last one may be smaller.
        tokenizer: needed by text views.
        limit: read only the first clips.
        workers: processes; `data.workers` if None.
        ledger: file to which skipped samples are appended as JSON lines.
        rows: read only the samples of these numbers, in this order.

    Raises:
        UserError: no such folder, or too many bad samples.
    """
    folder = _folder(path, data)
    labels = LabelBook.open(data.frame_labels, [path], required=False)
    encoder = SampleEncoder(views, data, 0, tokenizer, False, labels)
    chosen: Sequence[int] = range(len(folder)) if rows is None else rows
    guard = BadSampleGuard(data.max_bad_share, Ledger(ledger), Quarantine())
    chunks = _Chunks(folder.reader(), encoder, guard, chosen[:limit], micro_batch)
    return _eval_iterator(chunks, data.workers if workers is None else workers)


def places(path: str | Path, data: DataSpec) -> dict[str, int]:
    """Number of every sample of a folder by its key, as `rows` of `eval_batches` counts them.

    Raises:
        UserError: no such folder.
    """
    reader = _folder(path, data).reader()
    return {reader[number]["__key__"]: number for number in range(len(reader))}


def _folder(path: str | Path, data: DataSpec) -> energon.Shards:
    read_manifest(path)
    with energon.quiet():
        return energon.Shards(path, energon.worker_config(0, 1, 0, 0), False, data.max_bytes)


def _eval_iterator(chunks: _Chunks, workers: int) -> Iterator[Batch]:
    options: dict[str, Any] = {}
    workers = min(workers, len(chunks))
    if workers:
        options = {"multiprocessing_context": "fork", "prefetch_factor": 2}
        options["worker_init_fn"] = partial(apart, None)
    with energon.quiet():
        loader = DataLoader(chunks, batch_size=None, num_workers=workers, **options)
        iterator = iter(loader)
    try:
        for packed in iterator:
            batch = packed.unpack()
            if batch.size:
                yield batch
    finally:
        close(chunks.encode)


class _Chunks(Dataset[PackedBatch]):
    """A folder cut into micro-batches of consecutive samples."""

    def __init__(
        self,
        reader: ShardReader,
        encoder: SampleEncoder,
        guard: BadSampleGuard,
        rows: Sequence[int],
        micro_batch: int,
    ) -> None:
        self._reader, self._encoder, self._guard = reader, encoder, guard
        self.encode = guarded(encoder)
        self._rows, self._micro_batch = rows, micro_batch

    def __len__(self) -> int:
        return -(-len(self._rows) // self._micro_batch)

    def __getitem__(self, chunk: int) -> PackedBatch:
        first = chunk * self._micro_batch
        if chunk >= len(self):
            raise IndexError(chunk)
        items: list[Item] = []
        for index in self._rows[first : first + self._micro_batch]:
            crude = self._reader[index]
            item = encode_guarded(self.encode, self._guard, to_sample(crude), crude)
            if self._guard.stop:
                return failed(self._guard.stop)
            if item is not None:
                items.append(item)
        return packed_rows(items, self._encoder)
