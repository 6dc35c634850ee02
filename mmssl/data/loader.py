"""Reads shards into batches for training, without end and resumable.

B rows of the micro-batch. Energon decides the order; `encode` does the work; the batch crosses from
the worker as one block of shared memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.energon import Cooker, SkipSample, TaskEncoder, get_savable_loader, stateless
from megatron.energon.metadataset.loader_interface import DatasetBlendMode

from mmssl.data import energon, workers
from mmssl.data.blend import train_weights
from mmssl.data.collate import PackedBatch, failed
from mmssl.data.encode import BadSampleGuard, SampleEncoder
from mmssl.data.folders import Shard, read_manifest
from mmssl.data.guarded import close, encode_guarded, guarded, packed_rows, to_sample
from mmssl.data.integrity import Ledger, Quarantine
from mmssl.data.join import join
from mmssl.data.labels import LabelBook
from mmssl.data.text import Tokenizer
from mmssl.specs import DataSpec, ViewSpec
from mmssl.types import Batch, UserError

_STATE_VERSION = 1
# Energon stores a worker's state at most this often; resuming repeats the reading since then.
_STATE_EVERY_S = 2.0
# A dead worker takes its state along: the loader remembers one this often, and reads the batches
# since then again.
_REMEMBER_EVERY = 200
_MAX_DEATHS = 5  # of workers, in one process of training


def train_loader(
    data: DataSpec,
    views: Mapping[str, ViewSpec],
    micro_batch: int,
    seed: int,
    rank: int,
    world: int,
    tokenizer: Tokenizer | None,
    ledger: str | Path | None = None,
    quarantine: str | Path | None = None,
    joined: int = 1,
) -> TrainLoader:
    """An endless iterator of training batches.

    Args:
        data: folders with blend weights, workers, limits.
        views: views by name.
        micro_batch: rows that a reader puts together.
        seed: seeds the order and everything random about a sample.
        rank: number of this process among those that read.
        world: how many processes read.
        tokenizer: needed by text views.
        ledger: file to which skipped samples are appended as JSON lines.
        quarantine: file to which samples that killed or stalled a decoder are appended; those
            listed there, or in files beside it, are skipped.
        joined: so many of the readers' batches are delivered as one.

    Raises:
        UserError: a folder is missing or not prepared, has fewer samples than there are readers, or
            has no side-car among those of a name in `data.frame_labels`.
    """
    weights = train_weights(data)
    shards = {folder: read_manifest(folder) for folder in weights}
    readers = world * max(1, data.workers)
    for folder, listed in shards.items():
        _check_readers(folder, listed, readers, world, data.workers)
    labels = LabelBook.open(data.frame_labels, list(weights), required=True)
    encoder = SampleEncoder(views, data, seed, tokenizer, True, labels)
    config = energon.worker_config(rank, world, data.workers, seed)
    guard = BadSampleGuard(data.max_bad_share, Ledger(ledger), Quarantine(quarantine))
    task = _Task(encoder, guard, workers.InFlight(data.workers))

    def make() -> Any:
        dataset = task.build_train_datasets(
            datasets=[energon.loaded(f, config, w, data.max_bytes) for f, w in weights.items()],
            worker_config=config,
            batch_size=micro_batch,
            shuffle_buffer_size=data.shuffle_buffer or None,
            blend_mode=DatasetBlendMode.DATASET_WEIGHT,
        )
        loader = get_savable_loader(
            dataset,
            checkpoint_every_sec=_STATE_EVERY_S,
            gc_collect_every_n_steps=100 if data.workers else 0,
            watchdog_timeout_seconds=None,
        )
        if data.workers:
            loader.worker_init_fn = partial(workers.apart, loader.worker_init_fn)
        return loader

    identity = {
        "version": _STATE_VERSION,
        "seed": seed,
        "rank": rank,
        "world": world,
        "workers": data.workers,
        "micro_batch": micro_batch,
        "shuffle_buffer": data.shuffle_buffer,
        "folders": [[w, [s.sha256 for s in shards[f]]] for f, w in weights.items()],
    }
    if data.frame_labels:
        identity["frame_labels"] = labels.digests
    return TrainLoader(make, task, identity, joined)


def _check_readers(
    folder: str, shards: Sequence[Shard], readers: int, world: int, workers: int
) -> None:
    """Readers get stretches of consecutive samples: shards may be fewer, samples may not."""
    total = sum(shard.samples for shard in shards)
    if total < readers:
        raise UserError(
            f"{folder}: {total} samples for {readers} readers ({world} ranks x "
            f"{max(1, workers)} workers); every reader needs at least one: set data.workers to "
            f"{total // world} or less, or use fewer ranks"
        )


class TrainLoader:
    """Endless iterator of batches whose position can be saved and restored exactly.

    Where a worker process dies, all workers are started again from the last remembered position,
    batches delivered since are read again and dropped, and the sample the worker was at is put into
    quarantine. (Had that sample been delivered since that position, another one of the epoch would
    be left out in its stead.)

    skipped: samples left out of the batches so far, by reason, those before a resumption included.
    """

    def __init__(
        self, make: Callable[[], Any], task: _Task, identity: dict[str, Any], joined: int
    ) -> None:
        self._make, self._task = make, task
        self._identity, self._joined = identity, joined
        self._iterator: Iterator[PackedBatch] | None = None
        self.skipped: dict[str, int] = {}
        # Energon's position, batches delivered since, and how many of them are to be dropped
        self._position: Any = None
        self._since = self._behind = self._deaths = 0
        self._loader = self._made()

    def _made(self) -> Any:
        with energon.quiet():
            return self._make()

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            UserError: too many samples were bad, or workers died again and again.
        """
        return join([self._one() for _ in range(self._joined)])

    def _one(self) -> Batch:
        if self._identity["workers"] and self._since >= _REMEMBER_EVERY:
            self._remember()
        packed: PackedBatch = self._alive(self._fetch)
        self._since += 1
        for reason, count in packed.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
        return packed.unpack()

    def _fetch(self) -> PackedBatch:
        if self._iterator is not None:
            return next(self._iterator)
        with energon.quiet():
            self._iterator = iter(self._loader)
            packed = next(self._iterator)
        if self._identity["workers"]:
            workers.watch(self._loader)
        return packed

    def _remember(self) -> None:
        self._position = self._alive(lambda: self._loader.save_state_rank())
        self._since = 0

    def _alive(self, ask: Callable[[], Any]) -> Any:
        """Ask, and ask again of new workers where it failed because one has died."""
        while True:
            try:
                while self._behind:
                    self._fetch()
                    self._behind -= 1
                return ask()
            except (RuntimeError, OSError, EOFError) as error:
                dead = workers.dead(self._loader)
                if not dead:
                    raise
                self._start_again(dead, error)

    def _start_again(self, dead: Sequence[int], error: Exception) -> None:
        flight, quarantine = self._task.flight, self._task.guard.quarantine
        guilty = workers.guilty(self._loader, dead)
        keys = [key for key in map(flight.take, guilty) if key]
        self._deaths += bool(guilty)
        for key in keys:
            quarantine.add(key, "worker", f"a worker died over it: {error}")
        if self._deaths > _MAX_DEATHS:
            raise UserError(
                f"data workers died {self._deaths} times, the last one over "
                f"{', '.join(keys) or 'no sample'} ({error}); if memory is short, lower "
                "data.workers or data.shuffle_buffer, and see the kernel's log"
            ) from error
        self.close()
        quarantine.read()
        self._loader = self._made()
        self._loader.restore_state_rank(self._position)
        self._behind = self._since

    def state(self) -> dict[str, Any]:
        """Position after the last batch delivered, as plain data and tensors.

        `torch.save` it; `torch.load(..., weights_only=True)` reads it back.
        """
        self._remember()
        position = energon.to_plain(self._position)
        return {"identity": self._identity, "position": position, "skipped": dict(self.skipped)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state` was taken; call it before the first batch.

        Raises:
            UserError: the state belongs to other shards, another seed, batch or number of readers.
            RuntimeError: batches were already taken.
        """
        self._check(state["identity"], self._identity)
        self._go_to(_position(state), state.get("skipped", {}))

    def redistribute(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue what another number of ranks has read; call it before the first batch.

        Readers keep their number, counted over the ranks, and with it their samples and position:
        nothing is lost or read twice.

        Args:
            states: of all ranks of that run, in their order.

        Raises:
            UserError: as `restore`, or the number of readers is another.
            RuntimeError: batches were already taken.
        """
        mine = self._identity
        for rank, state in enumerate(states):
            layout = {"rank": rank, "world": len(states), "workers": state["identity"]["workers"]}
            self._check(state["identity"], {**mine, **layout})
        positions = [_position(state) for state in states]
        readers = [reader for position in positions for reader in position.worker_states]
        if not mine["workers"] or len(readers) != mine["world"] * mine["workers"]:
            raise UserError(
                f"the saved data position belongs to {len(readers)} readers; this run has "
                f"{mine['world']} ranks x {mine['workers']} workers"
            )
        first = mine["rank"] * mine["workers"]
        share = readers[first : first + mine["workers"]]
        skipped: Counter[str] = Counter()
        for state in states if mine["rank"] == 0 else []:  # counted once
            skipped.update(state.get("skipped", {}))
        self._go_to(replace(positions[0], worker_states=share, next_worker_id=0), skipped)

    def _go_to(self, position: Any, skipped: Mapping[str, int]) -> None:
        self._position, self.skipped = position, dict(skipped)
        self._loader.restore_state_rank(position)

    def _check(self, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        if self._iterator is not None:
            raise RuntimeError("restore the loader before the first batch is taken")
        for name, value in wanted.items():
            if saved.get(name) != value:
                raise UserError(_mismatch(name, saved.get(name), value))

    def close(self) -> None:
        """Stop the workers."""
        self._iterator = None
        close(self._task.encode)
        inner = getattr(self._loader, "_iterator", None)
        if inner is not None and hasattr(inner, "_shutdown_workers"):
            inner._shutdown_workers()
        self._loader._iterator = None


def _position(state: Mapping[str, Any]) -> Any:
    try:
        return energon.from_plain(state["position"])
    except (KeyError, TypeError) as error:
        raise UserError(f"the saved data position is unreadable ({error!r})") from error


def _mismatch(name: str, saved: Any, value: Any) -> str:
    if name == "folders":
        return (
            "the saved data position belongs to other shards or blend weights; point data.train at "
            "the shards of the original run"
        )
    if name == "frame_labels":
        return (
            "the saved data position was taken with other frame labels; point data.frame_labels at "
            "the side-cars of the original run"
        )
    return (
        f"the saved data position was taken with {name} = {saved}, this run has {value}; resume "
        "with the original value"
    )


@stateless  # type: ignore[untyped-decorator]
def _cook(sample: Any) -> Any:
    return sample


class _Task(TaskEncoder[Any, Any, Any, Any]):  # type: ignore[misc]
    """Our stages in Energon's terms."""

    cookers = (Cooker(_cook),)
    decoder = None

    def __init__(
        self, encoder: SampleEncoder, guard: BadSampleGuard, flight: workers.InFlight
    ) -> None:
        self._encoder, self.encode = encoder, guarded(encoder)
        self.guard, self.flight = guard, flight

    @stateless  # type: ignore[untyped-decorator]
    def encode_sample(self, sample: Any) -> Any:
        """One row; a bad sample is skipped and counted, after too many of them nothing is read."""
        if self.guard.stop:
            return None
        self.flight.put(sample["__key__"])
        item = encode_guarded(self.encode, self.guard, to_sample(sample), sample)
        self.flight.put("")
        if item is None and not self.guard.stop:
            raise SkipSample
        return item

    @stateless  # type: ignore[untyped-decorator]
    def batch(self, samples: list[Any]) -> PackedBatch:
        """Rows to one block; `None` among them stands for a stop."""
        if self.guard.stop:
            return failed(self.guard.stop)
        packed = packed_rows(samples, self._encoder)
        packed.skipped = self.guard.ledger.fresh()
        return packed


def load_state(path: str | Path) -> dict[str, Any]:
    """Read a state that was written with `torch.save`; nothing in the file can run code.

    Raises:
        UserError: not such a file.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file may fail anywhere in torch's reader
        raise UserError(f"{path}: not a loader state, or a damaged one") from error
    if not isinstance(state, dict) or set(state) != {"identity", "position", "skipped"}:
        raise UserError(f"{path}: not a loader state")
    return state
