"""The tables of an index: one of LanceDB for each space and modality, and what is known about them.

Scores. Cosines of different pairs of modalities cannot be compared: contrastive models keep each
modality in a cone of its own (the modality gap, Liang et al. 2022), so that the worst sound may lie
nearer to a sound than the best text does. A score therefore says by how many standard deviations a
cosine exceeds the mean cosine that this very query has with all items of that modality. Mean and
deviation follow exactly from the mean vector m and the covariance C of the modality's vectors,
which are kept with the index: q.m and sqrt(q'Cq). That calibrates every pair of modalities, queries
that combine several, and each query by itself: a constant added to all vectors of one modality
changes no score.

Letters in shapes: D width.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from mmssl.files import whole_file
from mmssl.index import ann
from mmssl.index.ann import Approximate, Singles
from mmssl.types import UserError

Doubles = NDArray[np.float64]
Key = tuple[str, str]  # space, modality

RECORD, MOMENTS = "index.json", "moments.npz"
VERSION = 2
UNFINISHED = -1
_SAMPLE = 100_000  # rows of which mean and covariance are taken
_LEAST_STD = 1e-4  # of cosines: equal rows differ by the noise of single precision


@dataclass
class Record:
    """What an index says about itself.

    model, run: hash and folder of the model. spaces: space -> modalities. parts: files of vectors
    that are in, and when they were made (ns); calibrated: how many they are, UNFINISHED from when
    rows are added until the moments are taken. built: by table, the sizes of its approximate index,
    the rows it was trained on, how it is asked and its recall by modality of the query.
    """

    model: str
    run: str
    which: str
    version: int = VERSION
    spaces: dict[str, list[str]] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)
    calibrated: int = 0
    built: dict[str, dict[str, Any]] = field(default_factory=dict)


def connect(folder: Path) -> Any:
    """The LanceDB of a folder.

    Raises:
        UserError: the extra is not installed.
    """
    os.environ.setdefault("LANCE_LOG", "error")  # its warnings are about what we do on purpose
    try:
        import lancedb
    except ImportError as error:
        raise UserError(f"{error}; install the extra: pip install 'mmssl[index]'") from error
    return lancedb.connect(folder)


def table_name(space: str, modality: str) -> str:
    """Name of the table of a space and modality."""
    return f"{space}.{modality}"


def copies(key: Key) -> Key:
    """The table of rows whose content the table `key` holds of another item; never searched."""
    return key[0], f"{key[1]}.copies"


def quoted(text: str) -> str:
    """Text in a condition of SQL."""
    return "'" + text.replace("'", "''") + "'"


class Index:
    """An index folder."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self.record = folder, record
        self._database = connect(folder)
        self._tables: dict[Key, Any] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Of a folder.

        Raises:
            UserError: it is no index, or one of another version.
        """
        path = Path(folder) / RECORD
        if not path.is_file():
            raise UserError(
                f"{folder}: no index; make one with mmssl index build DATA model=RUN out={folder}"
            )
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree["version"] != VERSION:
                raise UserError(
                    f"{path}: written in version {tree['version']}, this is {VERSION}; build anew"
                )
            return cls(Path(folder), Record(**tree))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error!r}); build the index anew") from error

    def save(self) -> None:
        """Write the record."""
        with whole_file(self.folder / RECORD) as partial:
            partial.write_text(json.dumps(asdict(self.record), indent=1) + "\n", encoding="utf-8")

    @property
    def keys(self) -> list[Key]:
        """Space and modality of every table."""
        return [(space, m) for space, held in self.record.spaces.items() for m in held]

    def table(self, key: Key, schema: Any = None) -> Any:
        """A table; made of a schema where there is none.

        Raises:
            UserError: it cannot be opened.
        """
        if key in self._tables:
            return self._tables[key]
        name, base = table_name(*key), self._database
        try:
            if schema is None:
                self._tables[key] = base.open_table(name)
            else:
                self._tables[key] = base.create_table(name, schema=schema, exist_ok=True)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"{self.folder}: the table {name} cannot be opened ({error}); build the index anew"
            ) from error
        return self._tables[key]

    def sample(self, key: Key, columns: Sequence[str], most: int) -> list[dict[str, Any]]:
        """At most so many rows of a table, evenly spaced, always the same."""
        table = self.table(key)
        count = table.count_rows()
        if not count:
            return []
        offsets = np.linspace(0, count - 1, min(count, most)).astype(int).tolist()
        return list(table.take_offsets(offsets).select([*columns]).to_list())

    def row(self, name: str, columns: Sequence[str]) -> dict[str, Any]:
        """The row with an id, in whatever table.

        Raises:
            UserError: there is none.
        """
        for key in self.keys:
            query = self.table(key).search().where(f"id = {quoted(name)}").select([*columns])
            for row in query.limit(1).to_list():
                return dict(row)
        raise UserError(f"{self.folder}: holds no row {name!r}; reload what has named it")

    def check_filter(self, where: str, keys: Sequence[Key]) -> None:
        """Refuse a condition that cannot be evaluated.

        Raises:
            UserError: says what is wrong and which columns there are.
        """
        for key in keys[:1]:
            table = self.table(key)
            try:
                table.count_rows(where)
            except (ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0].partition(", /")[0]
                columns = ", ".join(n for n in table.schema.names if n not in _NOT_FILTERED)
                raise UserError(
                    f"where={where}: {reason}; the columns are {columns}; text stands in single "
                    "quotes, e.g. where=\"duration_s < 5 AND array_has(meta, 'class=dog')\""
                ) from error

    def approximate(self, key: Key) -> Approximate | None:
        """How the approximate index of a table is asked, None where it has none."""
        built = self.record.built.get(table_name(*key))
        return None if built is None else Approximate(built["probes"], built["refine"])

    # ------------------------------------------------------------ scores

    def check_finished(self) -> None:
        """Refuse an index whose moments are not those of its rows.

        Raises:
            UserError: it is being built, or that was interrupted.
        """
        if self.record.calibrated != len(self.record.parts):
            raise UserError(
                f"{self.folder}: unfinished; wait for the process that builds it, or run the same "
                "mmssl index build again"
            )

    @cached_property
    def _moments(self) -> dict[str, Doubles]:
        try:
            with np.load(self.folder / MOMENTS) as file:
                return dict(file)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise UserError(
                f"{self.folder / MOMENTS}: missing or damaged ({error}); remove it and run the "
                "same mmssl index build again"
            ) from error

    def save_moments(self) -> None:
        """Mean and covariance of every table, of all rows or of a hundred thousand."""
        found: dict[str, Doubles] = {}
        for key in self.keys:
            table, name = self.table(key), table_name(*key)
            mean, cov = moments(table)
            found |= {f"{name}/mean": mean, f"{name}/cov": cov}
        with whole_file(self.folder / MOMENTS) as partial, partial.open("wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]
        vars(self).pop("_moments", None)
        self.record.calibrated = len(self.record.parts)
        self.save()

    def scores(self, key: Key, query_D: Singles, cosines: Doubles) -> Doubles:
        """Cosines of a unit query with rows of a table as scores, see the module."""
        name, q_D = table_name(*key), query_D.astype(np.float64)
        mean = float(q_D @ self._moments[f"{name}/mean"])
        variance = float(q_D @ self._moments[f"{name}/cov"] @ q_D)
        std = max(math.sqrt(max(0.0, variance)), _LEAST_STD)
        return np.asarray((cosines - mean) / std, dtype=np.float64)


_NOT_FILTERED = ("vector", "thumbnail")


def moments(table: Any) -> tuple[Doubles, Doubles]:
    """Mean (D,) and covariance (D, D) of the vectors of a table, evenly sampled."""
    step, dim = -(-table.count_rows() // _SAMPLE), table.schema.field("vector").type.list_size
    count, first, total, square = 0, 0, np.zeros(dim), np.zeros((dim, dim))
    for rows_ND in ann.blocks(table, "vector"):
        some_ND = rows_ND[-first % step :: step].astype(np.float64)
        first += len(rows_ND)
        count, total = count + len(some_ND), total + some_ND.sum(0)
        square = square + some_ND.T @ some_ND
    mean_D = total / max(1, count)
    return mean_D, square / max(1, count) - np.outer(mean_D, mean_D)
