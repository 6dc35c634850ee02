"""Going on with another number of processes: who reads what, and which numbers are possible.

A run begins with some readers (processes x data.workers), each of which puts batches of `rows` rows
together. Both stay for the whole run: with fewer processes each has more readers and joins several
of their batches to one, so that the global batch, and with it every loss across rows, is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmssl.specs import RunSpec
from mmssl.train.engine import micro_batch
from mmssl.types import UserError


@dataclass(frozen=True)
class Layout:
    """How one process reads: `workers` readers, whose batches of `rows` are joined `joined` by
    `joined`.
    """

    workers: int
    rows: int
    joined: int = 1


def layout(spec: RunSpec, world: int, manifest: Mapping[str, Any] | None) -> Layout:
    """The layout for `world` processes of a new run, or of one that has a checkpoint.

    Raises:
        UserError: the run cannot go on with so many processes; lists the numbers it can.
    """
    size = micro_batch(spec.train, world)
    if manifest is None or (manifest["world_size"] == world and manifest["rows"] is None):
        rows = spec.data.rows or size
        if size % rows:
            raise UserError(
                f"data.rows={rows}: a process takes {size} rows at once (train.batch / processes / "
                "train.accumulate), which must be a multiple"
            )
        return Layout(spec.data.workers, rows, size // rows)
    if manifest["world_size"] == world:
        if size % manifest["rows"]:
            raise UserError(
                f"train.batch={spec.train.batch}, train.accumulate={spec.train.accumulate}: the "
                f"run's readers put {manifest['rows']} rows together, of which {size} rows at once "
                "are no multiple; resume with the batch it was saved with"
            )
        return Layout(manifest["workers"], manifest["rows"], size // manifest["rows"])
    possible = [n for n in range(1, spec.train.batch + 1) if _fits(spec, n, manifest)]
    if world not in possible:
        readers = _readers(manifest)
        why = (
            f"its {readers} readers (processes x data.workers) with {manifest['rows']} rows each "
            "must share the work evenly"
            if manifest["workers"]
            else "with data.workers=0, or before format 2, processes cannot share readers"
        )
        raise UserError(
            f"the run was saved by {manifest['world_size']} processes and cannot go on with "
            f"{world}: {why}; use {' or '.join(map(str, possible))}"
        )
    return Layout(_readers(manifest) // world, manifest["rows"], size // manifest["rows"])


def _fits(spec: RunSpec, world: int, manifest: Mapping[str, Any]) -> bool:
    if world == manifest["world_size"]:
        return True
    readers = _readers(manifest)
    if not readers or readers % world:
        return False
    return spec.train.batch % (world * spec.train.accumulate * int(manifest["rows"])) == 0


def _readers(manifest: Mapping[str, Any]) -> int:
    return int(manifest["world_size"]) * int(manifest["workers"] or 0)
