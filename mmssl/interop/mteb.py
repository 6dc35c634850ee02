"""A trained model as an encoder for `mteb.evaluate`; mteb itself is not needed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmssl.embed.model import EmbeddingModel
from mmssl.types import MODALITIES


class MtebEncoder:
    """mteb's encoder protocol; batches are dicts of lists named like our modalities."""

    def __init__(self, model: EmbeddingModel, meta: Any = None, **options: Any) -> None:
        """Keep the model; meta: mteb's ModelMeta; options: of `EmbeddingModel.encode`."""
        self.model, self.mteb_model_meta, self.options = model, meta, options

    def encode(self, inputs: Iterable[Mapping[str, Any]], **task: Any) -> NDArray[np.float32]:
        """(N, D) vectors of a loader's batches; `task`: what mteb says of the task, not needed."""
        options = {"batch_size": task["batch_size"]} if "batch_size" in task else {}
        items = chain.from_iterable(map(_items, inputs))
        return self.model.encode(items, **{**self.options, **options}).numpy()

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """(N, M) cosines."""
        return self.model.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """(N,) cosines."""
        return self.model.similarity_pairwise(embeddings1, embeddings2)


def _items(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    columns = {name: batch[name] for name in MODALITIES if name in batch}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
