"""One sample to one row: whatever is wrong with it is counted, and rows become a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import get_worker_info

from mmssl.data.collate import Item, PackedBatch, failed, pack
from mmssl.data.encode import BadSampleGuard, SampleEncoder
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.isolate import DecodeChild
from mmssl.data.reader import ERROR, NOTE, REASON, STORAGE
from mmssl.storage import StorageError
from mmssl.types import Sample, UserError

Encode = Callable[[Sample], Item]


def packed_rows(items: Sequence[Item], encoder: SampleEncoder) -> PackedBatch:
    """Rows to one block, shared where this is a worker; bad settings travel as a batch, too."""
    try:
        kinds = encoder.frame_labels.kinds
        return pack(items, encoder.views, shared=get_worker_info() is not None, labels=kinds)
    except UserError as error:
        return failed(str(error))


def to_sample(crude: Mapping[str, Any]) -> Sample:
    """Energon's dict as our record."""
    fields = {name: data for name, data in crude.items() if not name.startswith("__")}
    return Sample(crude["__key__"], tuple(crude["__restore_key__"]), fields)


def intact(crude: Mapping[str, Any]) -> Sample:
    """A sample of the reader, for those that read no further than its record.

    Raises:
        StorageError: the storage failed; the sample may be a good one.
        DamagedSampleError: it cannot be read.
    """
    if crude.get(REASON) == STORAGE:
        raise StorageError(crude[ERROR])
    if ERROR in crude:
        raise DamagedSampleError(crude[REASON], crude[ERROR])
    return to_sample(crude)


def guarded(encoder: SampleEncoder) -> Encode:
    """The encoder, in a child process where `data.isolate` says so."""
    data = encoder.data
    return DecodeChild(encoder, data.decode_seconds, data.decode_mb) if data.isolate else encoder


def close(encode: Encode) -> None:
    """End the child of an encoder that has one."""
    if isinstance(encode, DecodeChild):
        encode.close()


def encode_guarded(
    encode: Encode, guard: BadSampleGuard, sample: Sample, crude: Mapping[str, Any]
) -> Item | None:
    """Encode a sample, or count it as bad and return None."""
    where = {"shard": str(crude.get("__shard__", ""))}
    if crude.get(REASON) == STORAGE:  # the sample may be a good one
        guard.stop = crude[ERROR]
        return None
    if ERROR in crude:
        guard.bad(sample.key, crude[REASON], crude[ERROR], **where)
        return None
    if NOTE in crude:  # the sample is read nevertheless
        guard.ledger.add("index", key=sample.key, message=crude[NOTE], **where)
    if sample.key in guard.quarantine.keys:
        guard.bad(sample.key, "quarantined", "listed in the quarantine", **where)
        return None
    try:
        item = encode(sample)
    except DamagedSampleError as error:
        guard.bad(sample.key, error.reason, str(error), **where)
    except UserError as error:  # a wrong setting, not a bad sample
        guard.stop = str(error)
    except (
        Exception
    ) as error:  # a damaged file may fail anywhere in a decoder: counted, never silent
        guard.bad(sample.key, "error", f"{type(error).__name__}: {error}", **where)
    else:
        guard.good()
        return item
    return None
