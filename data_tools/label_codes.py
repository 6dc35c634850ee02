"""A quantiser's codes as labels: one class for each of the most frequent tuples of its entries.

Letters in shapes: N frames, G groups, K tuples.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mmssl.data.sidecars import Source
from mmssl.files import whole_file
from mmssl.types import UserError

VERSION = "mmssl-codes-1"
_META = "mmssl"  # the entry of the header
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class CodeBook:
    """Which tuples have a class of their own: k for the k-th most frequent one.

    tuples_KG: int64 entries, groups side by side. room: classes there may be; the last one, `room`,
    is any other tuple, so that the number of classes does not depend on what was observed. source:
    what the codes come from. covered: share of the frames that were counted.
    """

    tuples_KG: Ints
    room: int
    source: Source
    covered: float

    @property
    def count(self) -> int:
        """Number of classes."""
        return self.room + 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tuples."""
        return hashlib.sha256(self.tuples_KG.astype("<i8").tobytes()).hexdigest()

    @cached_property
    def _classes(self) -> dict[tuple[int, ...], int]:
        return {tuple(codes): k for k, codes in enumerate(self.tuples_KG.tolist())}

    def assign(self, codes_NG: NDArray[Any]) -> Ints:
        """(N,) class of each frame's tuple."""
        found = (
            self._classes.get(tuple(codes), self.room) for codes in codes_NG.astype(int).tolist()
        )
        return np.fromiter(found, np.int64, len(codes_NG))

    def describe(self) -> str:
        """What a user wants to know of it."""
        return f"{len(self.tuples_KG)} tuples of codes for {self.covered:.2%} of the frames"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose header says what the tuples belong to."""
        facts = {"format": VERSION, "source": asdict(self.source), "room": self.room}
        meta = {_META: json.dumps({**facts, "covered": self.covered}, sort_keys=True)}
        with whole_file(Path(path)) as partial:
            partial.write_bytes(save({"tuples": self.tuples_KG}, meta))

    @classmethod
    def load(cls, path: str | Path) -> CodeBook:
        """Read a file of `save`.

        Raises:
            UserError: no such file, or another kind or version of file.
        """
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; make one with data_tools.label_shards --codes")
        try:
            with safe_open(path, "np") as file:
                facts = json.loads((file.metadata() or {}).get(_META, "{}"))
                if facts.get("format") == VERSION:
                    tuples_KG = file.get_tensor("tuples")
                    source = Source(**facts["source"])
                    return cls(tuples_KG, int(facts["room"]), source, float(facts["covered"]))
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a table of codes, or damaged ({error!r})") from error
        raise UserError(
            f"{path}: the format is {facts.get('format')!r}, not {VERSION!r}; make it again with "
            "data_tools.label_shards --codes"
        )


def observe(stream: Iterable[NDArray[Any]], room: int, source: Source) -> CodeBook:
    """The `room` most frequent of the (N, G) tuples; the smaller tuple first on a tie.

    Raises:
        UserError: there are none.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    for codes_NG in stream:
        counts.update(map(tuple, codes_NG.astype(int).tolist()))
    if not counts:
        raise UserError("no codes were observed: the shards hold no readable audio")
    kept = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:room]
    covered = sum(n for _, n in kept) / counts.total()
    return CodeBook(np.array([codes for codes, _ in kept], np.int64), room, source, covered)
