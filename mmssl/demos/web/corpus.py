"""What the demo searches: vectors of clips by modality and space, and the clips themselves.

Letters in shapes: N windows of one modality, D width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from mmssl.data import energon
from mmssl.data.guarded import intact
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.samples import Record, read
from mmssl.data.sidecars import shards_digest
from mmssl.embed.model import EmbeddingModel
from mmssl.embed.spaces import TOWERS
from mmssl.files import whole_file
from mmssl.types import MODALITIES, UserError

_MAX_BYTES = 134_217_728  # of a sample
_BATCH = 16


@dataclass(frozen=True)
class Query:
    """What is looked for: unit vectors (D,) of something of one modality, by space."""

    modality: str
    vectors: Mapping[str, Tensor]


class Hit(NamedTuple):
    """A stretch of a clip (s) and the modality that was found in it.

    cosine: mean over the queries. score: by how many standard deviations the cosine exceeds the
    corpus's mean of its pair of modalities, summed over the queries.
    """

    key: str
    modality: str
    start_s: float
    end_s: float
    caption: str
    cosine: float
    score: float


class Point(NamedTuple):
    """A window of the corpus and its vector (D,)."""

    key: str
    modality: str
    start_s: float
    end_s: float
    caption: str
    vector_D: NDArray[np.float32]


class Corpus(Protocol):
    """Clips that can be searched."""

    name: str
    modalities: tuple[str, ...]

    @property
    def captions(self) -> Mapping[str, str]:
        """Of every clip by its key, in the order of the corpus."""
        ...

    def search(self, queries: Sequence[Query], k: int, modalities: Sequence[str]) -> list[Hit]:
        """The k best clips, each with its best window, for all queries together."""
        ...

    def record(self, key: str) -> Record:
        """A clip with its media."""
        ...

    def keys_with(self, modality: str) -> list[str]:
        """The clips that have a modality, in the order of the corpus."""
        ...

    def points(self, space: str) -> list[Point]:
        """Every window in one space."""
        ...


def trained_spaces(model: EmbeddingModel) -> list[str]:
    """The spaces that can compare modalities; those of single towers where there is none."""
    trained = [name for name in model.spaces if not name.startswith(TOWERS)]
    return trained or list(model.spaces)


def query(model: EmbeddingModel, modality: str, source: Any) -> Query:
    """A medium or text as a query: the mean of its windows in every space.

    Raises:
        UserError: it cannot be read.
    """
    spaces = [name for name in trained_spaces(model) if model.supports(modality, name)]
    found: dict[str, list[Tensor]] = {}
    for window in model.encode_windows({modality: source}, spaces=spaces, threads=1):
        for space, vector_D in window.vectors.items():
            found.setdefault(space, []).append(vector_D)
    means = {space: torch.stack(vectors).mean(0) for space, vectors in found.items()}
    return Query(modality, {s: torch.nn.functional.normalize(v, dim=0) for s, v in means.items()})


@dataclass(frozen=True)
class _Table:
    """Windows of one modality: clip (N,), start and end in s (N, 2), vectors by space (N, D)."""

    clips: Tensor
    spans: Tensor
    vectors: Mapping[str, Tensor]


class ShardCorpus:
    """The first clips of a shard folder, searched exactly; their vectors are in memory."""

    def __init__(self, model: EmbeddingModel, shards: str | Path, cache: Path, clips: int) -> None:
        """Embed the clips, or read the vectors that an earlier start has left in `cache`.

        Args:
            model: what embeds them.
            shards: a folder or address of shards.
            cache: folder of the vectors, one file per model, shards and number of clips.
            clips: so many at most.

        Raises:
            UserError: no such shards, or clips that cannot be decoded.
        """
        self.name = str(shards)
        file = cache / f"{model.hash[:16]}-{shards_digest(shards)[:16]}-{clips}.safetensors"
        with energon.quiet():
            dataset = energon.Shards(shards, energon.worker_config(0, 1, 0, 0), False, _MAX_BYTES)
        self._reader = dataset.reader()
        self.total = len(self._reader)
        found = _stored(file)
        if found is None:
            _write(file, *_embedded(model, self._rows(clips), min(clips, self.total), self.name))
            found = _stored(file)
            assert found is not None
        self._tables, self._numbers, self.captions = found
        self._keys = list(self._numbers)
        self.modalities = tuple(m for m in MODALITIES if m in self._tables)
        self._space = _compared(model)

    def _rows(self, clips: int) -> Iterator[tuple[int, Record]]:
        for number in range(min(clips, self.total)):
            try:
                record = read(intact(self._reader[number]))
            except DamagedSampleError:
                continue
            yield number, record

    def record(self, key: str) -> Record:
        """A clip with its media."""
        return read(intact(self._reader[self._numbers[key]]))

    def search(self, queries: Sequence[Query], k: int, modalities: Sequence[str]) -> list[Hit]:
        """The k best clips for all queries together, each with its best window.

        Cosines of one pair of modalities have another mean and spread than those of another pair;
        they are compared by what they exceed their own mean.

        Raises:
            UserError: the model compares none of the queries with any of the modalities.
        """
        best: dict[int, Hit] = {}
        reached = False
        for modality in modalities:
            table = self._tables[modality]
            pairs = [(q, self._space.get((q.modality, modality))) for q in queries]
            if not all(space in table.vectors for _, space in pairs):
                continue
            reached = True
            cosines_QN = torch.stack(
                [table.vectors[s or ""] @ q.vectors[s or ""] for q, s in pairs]
            )
            spread_Q1 = cosines_QN.std(1, correction=0, keepdim=True).clamp(min=1e-6)
            scores_N = ((cosines_QN - cosines_QN.mean(1, keepdim=True)) / spread_Q1).sum(0)
            for n in scores_N.argsort(descending=True, stable=True).tolist():
                clip, score = int(table.clips[n]), float(scores_N[n])
                if clip not in best or score > best[clip].score:
                    cosine = float(cosines_QN[:, n].mean())
                    best[clip] = Hit(*self._place(modality, n), cosine, score)
        if not reached:
            told = " and ".join(q.modality for q in queries)
            raise UserError(f"this model does not compare {told} with {', '.join(modalities)}")
        return sorted(best.values(), key=lambda hit: -hit.score)[:k]

    def keys_with(self, modality: str) -> list[str]:
        """The clips that have a modality, in the order of the corpus."""
        if modality not in self._tables:
            return []
        return [self._keys[n] for n in sorted(set(self._tables[modality].clips.tolist()))]

    def points(self, space: str) -> list[Point]:
        """Every window in one space."""
        return [
            Point(*self._place(modality, n), vector_D)
            for modality, table in self._tables.items()
            if space in table.vectors
            for n, vector_D in enumerate(table.vectors[space].numpy())
        ]

    def _place(self, modality: str, n: int) -> tuple[str, str, float, float, str]:
        table = self._tables[modality]
        key = self._keys[int(table.clips[n])]
        start_s, end_s = table.spans[n].tolist()
        return key, modality, start_s, end_s, self.captions[key]


def _compared(model: EmbeddingModel) -> dict[tuple[str, str], str]:
    """The space in which every pair of modalities is compared."""
    out = {}
    default = model.default_space
    for a in model.modalities:
        for b in model.modalities:
            space = model.model.space_for(a, b)
            if a == b and model.supports(a, default):
                space = default
            if space is not None:
                out[a, b] = space
    return out


# ---------------------------------------------------------------- making and keeping vectors

_Stored = tuple[dict[str, _Table], dict[str, int], dict[str, str]]


def _embedded(
    model: EmbeddingModel, rows: Iterator[tuple[int, Record]], total: int, name: str
) -> tuple[dict[str, _Table], list[tuple[str, int, str]]]:
    """Vectors of all rows, and (key, number in the shards, caption) of each."""
    told: list[tuple[str, int, str]] = []

    def inputs() -> Iterator[dict[str, Any]]:
        for number, record in tqdm(rows, f"embedding {name}", total, unit="clip"):
            given = {m: _source(record, m) for m in record.has if model.supports(m)}
            if given:
                told.append((record.key, number, (*record.captions, "")[0]))
                yield given

    found: dict[str, list[Any]] = {}
    for window in model.encode_windows(inputs(), _BATCH, spaces=trained_spaces(model)):
        found.setdefault(window.modality, []).append(window)
    tables = {}
    for modality, windows in found.items():
        windows.sort(key=lambda w: (w.item, w.start_s))
        tables[modality] = _Table(
            torch.tensor([w.item for w in windows]),
            torch.tensor([(w.start_s, w.end_s) for w in windows], dtype=torch.float64),
            {s: torch.stack([w.vectors[s] for w in windows]) for s in windows[0].vectors},
        )
    return tables, told


def _source(record: Record, modality: str) -> Any:
    if modality == "text":
        return record.captions[0]
    return record.sound if modality == "audio" and record.sound is not None else record.video


def _write(file: Path, tables: Mapping[str, _Table], told: Sequence[tuple[str, int, str]]) -> None:
    tensors: dict[str, Tensor] = {}
    for modality, table in tables.items():
        tensors |= {f"{modality}/clips": table.clips, f"{modality}/spans": table.spans}
        tensors |= {f"{modality}/in/{s}": x.contiguous() for s, x in table.vectors.items()}
    with whole_file(file) as partial:
        save_file(tensors, partial, {"clips": json.dumps(told)})


def _stored(file: Path) -> _Stored | None:
    """The vectors of an earlier start; None where there are none."""
    with suppress(FileNotFoundError, SafetensorError), safe_open(file, "pt") as found:
        told = json.loads(found.metadata()["clips"])
        tensors: dict[str, dict[str, Tensor]] = {}
        for name in found.keys():  # noqa: SIM118  (not a dict)
            modality, _, part = name.partition("/")
            tensors.setdefault(modality, {})[part] = found.get_tensor(name)
        tables = {
            m: _Table(
                parts["clips"],
                parts["spans"],
                {s[3:]: x for s, x in parts.items() if s.startswith("in/")},
            )
            for m, parts in sorted(tensors.items(), key=lambda pair: MODALITIES.index(pair[0]))
        }
        return tables, {k: n for k, n, _ in told}, {k: text for k, _, text in told}
    return None
