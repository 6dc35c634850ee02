"""What every suite shares: the values of single clips, and the seed of what is random.

Letters in shapes: N rows of the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmssl.eval.embed import Rows

Metrics = dict[str, Any]


@dataclass
class ItemTable:
    """Values of single clips, so that runs can be pooled over folds and compared in pairs.

    It stays empty where a number is no mean over clips: `abx`, `units`, and `probe`, `knn` and
    `finetune` of several labels per clip.

    values: metric -> clip key -> value; sources: clip key -> source recording; parts: the same by
    part of the test set, where it was split.
    """

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    parts: dict[str, ItemTable] = field(default_factory=dict)

    def tree(self) -> Metrics:
        """Plain data for a file."""
        tree: Metrics = {"sources": self.sources, "values": self.values}
        if self.parts:
            tree["parts"] = {name: part.values for name, part in self.parts.items()}
        return tree

    def add(self, metric: str, rows: Rows, kept: Iterable[int], values: ArrayLike) -> None:
        """Note the value of each of the kept rows."""
        column = self.values.setdefault(metric, {})
        for row, value in zip(kept, np.asarray(values).tolist(), strict=True):
            column[rows.keys[row]] = float(value)
            self.sources[rows.keys[row]] = str(rows.meta[row].get("source", rows.sources[row]))

    def recorder(
        self, prefix: str, rows: Rows, kept: NDArray[np.int64]
    ) -> Callable[[str, ArrayLike], None]:
        """`add` for metrics of one prefix and fixed rows."""

        def record(name: str, values: ArrayLike) -> None:
            self.add(f"{prefix}.{name}", rows, kept, values)

        return record


@dataclass(frozen=True)
class Protocol:
    """Seed and size of everything random in the metrics; `items` takes the values of every clip.

    dual_softmax: scale of the re-weighting of retrieval, 0 = none.
    """

    seed: int = 0
    resamples: int = 1000
    items: ItemTable | None = None
    dual_softmax: float = 0.0

    def of_part(self, name: str) -> Protocol:
        """The same for a part of the test set; its clips get a table of their own."""
        if self.items is None:
            return self
        return replace(self, items=self.items.parts.setdefault(name, ItemTable()))
