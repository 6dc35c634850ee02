"""What we change about Energon.

Data sets name no code, `reader` reads the tars, and states are plain data.

Energon keeps the order of samples, the blending of data sets and the bookkeeping of resumption.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import CrudeWebdataset, WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.errors import reraise_exception
from megatron.energon.flavors.webdataset import sample_loader
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.metadataset.loader_interface import LoadedDataset
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import (
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)
from megatron.energon.state import FlexState
from megatron.energon.wrappers.map_dataset import MapDataset

from mmssl.data.folders import find_folder
from mmssl.data.reader import OPEN_SHARDS, ShardReader

SPLIT = "train"  # Energon's name for the one part of every folder, whatever it is used for

# A worker's order is a shuffled list of slices of consecutive samples; the state holds the list.
_MAX_SLICES = 8192


class Shards(CrudeWebdataset):  # type: ignore[misc]
    """One shard folder as an Energon data set; samples of more than `max_bytes` are damage."""

    def __init__(
        self, folder: str | Path, worker_config: WorkerConfig, training: bool, max_bytes: int
    ) -> None:
        self._folder = find_folder(folder)
        super().__init__(
            EPath(self._folder.path.resolve()),
            split_part=SPLIT,
            training=training,
            worker_config=worker_config,
            decoder=None,
        )
        self._max_bytes = max_bytes
        readers = max(1, worker_config.num_workers) * worker_config.world_size
        self.max_samples_per_sequence = max(1, math.ceil(len(self) / readers / _MAX_SLICES))

    def reader(self) -> ShardReader:
        """Random access by sample number."""
        return ShardReader(self._folder, self.shards, self._max_bytes)

    def build(self, worker_rotation_offset: int = 0) -> Any:
        """As Energon's, with our reader."""
        slices = self.shard_workers(
            self.shards,
            worker_config=self.worker_config,
            max_samples_per_sequence=self.max_samples_per_sequence,
            rotation_offset=worker_rotation_offset,
        )
        dataset = sample_loader.WebdatasetSampleLoaderDataset(
            join_readers=[self.reader()],
            workers_sample_slice_offsets=slices,
            worker_config=self.worker_config,
            shuffle_over_epochs=1 if self.training else None,
            parallel_slice_iters=OPEN_SHARDS if self.training else 1,
        )
        return MapDataset(
            dataset,
            self._load_sample_raw,
            stateless_map_fn=True,
            map_fn_config=self.config,
            worker_config=self.worker_config,
        )


def worker_config(rank: int, world: int, workers: int, seed: int) -> WorkerConfig:
    """Energon's record of readers; errors in our own code are raised, not printed and swallowed."""
    return WorkerConfig(
        rank=rank,
        world_size=world,
        num_workers=workers,
        seed_offset=seed,
        global_error_handler=reraise_exception,
    )


def loaded(folder: str, config: WorkerConfig, weight: float, max_bytes: int) -> LoadedDataset:
    """A folder with its blend weight."""
    return LoadedDataset(dataset=Shards(folder, config, True, max_bytes), weight=weight)


class _Nowhere(io.TextIOBase):
    """Accepts text and keeps none; workers forked meanwhile inherit it."""

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what Energon prints, and torch's advice about workers and pinned memory."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(_Nowhere()):
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        warnings.filterwarnings("ignore", message=".*worker processes.*")
        yield


# --- states as plain data: dicts, lists, tuples, numbers, strings, bytes and tensors

_STATES: dict[str, Any] = {
    c.__name__: c
    for c in (
        SavableDataLoaderState,
        SavableDatasetCheckpoint,
        SavableDatasetState,
        SystemRngState,
        SliceState,
        FlexState,
    )
}
_CLASS = "__state__"


def to_plain(value: Any) -> Any:
    """Energon's state objects as data that `torch.load(weights_only=True)` accepts.

    Raises:
        TypeError: a type that is not on the list.
    """
    if is_dataclass(value) and type(value).__name__ in _STATES:
        items = {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
        return {_CLASS: type(value).__name__, **items}
    if isinstance(value, bytes):
        return {_CLASS: "bytes", "data": torch.frombuffer(bytearray(value), dtype=torch.uint8)}
    if isinstance(value, np.ndarray):
        data = torch.from_numpy(value.view(np.uint8).copy())
        return {_CLASS: "ndarray", "dtype": value.dtype.str, "data": data}
    if isinstance(value, FlexState):
        return {_CLASS: "FlexState", **{k: to_plain(v) for k, v in value.items()}}
    if type(value) in (list, tuple):
        return type(value)(to_plain(v) for v in value)
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor)):
        return value
    raise TypeError(f"loader state: unexpected {type(value).__name__}")


def from_plain(value: Any) -> Any:
    """The state objects again; only the classes listed above are made."""
    if isinstance(value, (list, tuple)):
        return type(value)(from_plain(v) for v in value)
    if not isinstance(value, dict):
        return value
    rest = {k: from_plain(v) for k, v in value.items() if k != _CLASS}
    name = value[_CLASS]
    if name == "bytes":
        return rest["data"].numpy().tobytes()
    if name == "ndarray":
        return rest["data"].numpy().view(np.dtype(rest["dtype"]))
    return _STATES[name](**rest)
