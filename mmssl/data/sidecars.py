"""Frame labels beside shards: one side-car file per shard folder and kind of label.

A side-car is a safetensors file: tensors and a json header, so nothing in it can run code, and any
language can read it. It is mapped, not loaded: the readers of a machine share its pages, and a
look-up touches the one sample that is asked for (parquet would decompress a whole row group).

    ids       (N, G)  labels of all samples, in the order of the shards, in the smallest integer
    keys      (bytes) sorted sample keys, one behind the other; key_ends (S,) where each ends
    starts    (S,)    first label of each key's sample; lengths (S,) number of its labels
    seconds   (S,)    duration of the signal that was labelled

Header: label rate, what the labels came from, number of classes of every codebook, the hash of the
shard folder, and a CRC32C of every tensor. Label t describes the signal around
`first_centre_s + t / rate_hz` on the clip's own clock; its cell begins at t / rate_hz.

Letters in shapes: S samples, N labels, G codebooks.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mmssl.data.folders import read_manifest
from mmssl.data.integrity import canonical, crc32c
from mmssl.files import whole_file
from mmssl.types import UserError

VERSION = "mmssl-labels-1"
MAKE = "make one with python -m data_tools.label_shards"

_DTYPES = {"U8": "<u1", "U16": "<u2", "I32": "<i4", "I64": "<i8", "F32": "<f4"}
_NAMES = {np.dtype(text): name for name, text in _DTYPES.items()}
_BLOCK = 1 << 20  # labels looked at together

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """What frame features, and the labels made of them, come from.

    features: a name such as `mfcc` or `RUN/TOWER`. rate_hz: frames per second. first_centre_s:
    centre of frame 0. layer: 0 = the output, L = behind the L-th layer. checkpoint_sha256: of the
    weights, empty for signal processing.
    """

    features: str
    rate_hz: float
    first_centre_s: float = 0.0
    layer: int = 0
    checkpoint_sha256: str = ""


@dataclass(frozen=True)
class LabelInfo:
    """The header of a side-car.

    classes: number of classes of every codebook. codebooks: digests of the clusterings. shards:
    `shards_digest` of the folder that was labelled.
    """

    source: Source
    classes: tuple[int, ...]
    shards: str
    codebooks: tuple[str, ...] = ()

    @property
    def rate_hz(self) -> float:
        """Labels per second."""
        return self.source.rate_hz


def shards_digest(folder: str | Path) -> str:
    """SHA-256 over names, sizes and hashes of a folder's shards; the same wherever it lies.

    Raises:
        UserError: not a shard folder.
    """
    shards = [asdict(shard) for shard in read_manifest(folder)]
    return hashlib.sha256(canonical({"shards": shards})).hexdigest()


# ---------------------------------------------------------------- writing


class LabelWriter:
    """Takes the labels of one sample after another; see `writing`."""

    def __init__(self, info: LabelInfo, body: BinaryIO) -> None:
        self.info, self._body = info, body
        self._dtype = np.dtype(_smallest(max(info.classes)))
        self._rows: dict[str, tuple[int, int, float]] = {}
        self._crc = 0
        self.labels = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, key: str, ids_NG: NDArray[Any], seconds: float) -> None:
        """Append a sample: (N, G) ids, none where it has nothing to label, and its duration.

        Raises:
            ValueError: a key twice, another number of codebooks, or an id that is no class.
        """
        if key in self._rows:
            raise ValueError(f"{key}: labelled twice")
        if ids_NG.ndim != 2 or ids_NG.shape[1] != len(self.info.classes):
            raise ValueError(
                f"{key}: ids of shape {ids_NG.shape}, there are {len(self.info.classes)} codebooks"
            )
        if ids_NG.size and (ids_NG.min() < 0 or (ids_NG >= self.info.classes).any()):
            raise ValueError(f"{key}: ids outside the classes {self.info.classes}")
        data = ids_NG.astype(self._dtype).tobytes()
        self._body.write(data)
        self._crc = google_crc32c.extend(self._crc, data)
        self._rows[key] = (self.labels, len(ids_NG), seconds)
        self.labels += len(ids_NG)

    def save(self, file: BinaryIO) -> None:
        """Write header, index and labels.

        Raises:
            UserError: no sample was added.
        """
        if not self._rows:
            raise UserError("no sample was labelled: the shards hold no readable audio")
        index = self._index()
        crc = {name: crc32c(array.tobytes()) for name, array in index.items()}
        crc["ids"] = f"{self._crc:08x}"
        shape = (self.labels, len(self.info.classes))
        kinds = {name: (array.dtype, array.shape) for name, array in index.items()}
        file.write(_header(self.info, {**kinds, "ids": (self._dtype, shape)}, crc))
        for array in index.values():
            file.write(array.tobytes())
        self._body.seek(0)
        while block := self._body.read(1 << 24):
            file.write(block)

    def _index(self) -> dict[str, NDArray[Any]]:
        """The tensors before `ids`, widest first, so that every one is aligned."""
        keys = sorted(self._rows)
        joined = "".join(keys).encode()
        starts, lengths, seconds = zip(*(self._rows[key] for key in keys), strict=True)
        ends = np.cumsum([len(key.encode()) for key in keys])
        padded = joined + bytes(-len(joined) % 8)
        return {
            "key_ends": ends.astype("<i8"),
            "starts": np.asarray(starts, "<i8"),
            "lengths": np.asarray(lengths, "<i4"),
            "seconds": np.asarray(seconds, "<f4"),
            "keys": np.frombuffer(padded, "<u1"),
        }


@contextmanager
def writing(path: Path, info: LabelInfo) -> Iterator[LabelWriter]:
    """A writer whose file appears when the block ends without error, whole.

    Labels wait in a temporary file beside it, so memory holds the keys only.
    """
    with whole_file(path) as partial, tempfile.TemporaryFile(dir=path.parent) as body:
        writer = LabelWriter(info, body)
        yield writer
        with partial.open("wb") as file:
            writer.save(file)


def _smallest(classes: int) -> str:
    return next(
        (t for t, top in (("<u1", 1 << 8), ("<u2", 1 << 16)) if classes <= top),
        "<i4",
    )


def _header(
    info: LabelInfo,
    kinds: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    crc: Mapping[str, str],
) -> bytes:
    """Length and json of a safetensors file, padded so that the data is aligned."""
    tree: dict[str, Any] = {
        "__metadata__": {
            "format": VERSION,
            "info": canonical(asdict(info)).decode(),
            "crc32c": canonical(crc).decode(),
        }
    }
    offset = 0
    for name, (dtype, shape) in kinds.items():
        size = math.prod(shape) * dtype.itemsize
        tree[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = canonical(tree)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# ---------------------------------------------------------------- reading


class SideCar:
    """An open side-car, iterated by sorted sample key; cheap to open and to fork at any size."""

    def __init__(self, path: str | Path) -> None:
        """Map the file.

        Raises:
            UserError: no such file, not a side-car, another version, or a damaged one.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such side-car; {MAKE}")
        meta = self._metadata()
        try:
            self.info = _info(json.loads(meta["info"]))
            self._crc: dict[str, str] = json.loads(meta["crc32c"])
            tensors = self._mapped()
            self._ids_NG, self._keys = tensors["ids"], tensors["keys"]
            self._key_ends_S, self._starts_S = tensors["key_ends"], tensors["starts"]
            self._lengths_S, self._seconds_S = tensors["lengths"], tensors["seconds"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.path}: a damaged side-car ({error!r}); {MAKE}") from error

    def _metadata(self) -> dict[str, str]:
        try:
            with safe_open(self.path, "np") as file:  # checks every offset against the file
                meta: dict[str, str] = file.metadata() or {}
        except SafetensorError as error:
            raise UserError(f"{self.path}: not a side-car ({error}); {MAKE}") from error
        if meta.get("format") != VERSION:
            raise UserError(
                f"{self.path}: the format is {meta.get('format')!r}, this version reads "
                f"{VERSION!r}; {MAKE}"
            )
        return meta

    def _mapped(self) -> dict[str, NDArray[Any]]:
        with self.path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size)
        self.digest = hashlib.sha256(header).hexdigest()
        tree = json.loads(header)
        out: dict[str, NDArray[Any]] = {}
        for name, tensor in tree.items():
            if name == "__metadata__":
                continue
            dtype, shape = np.dtype(_DTYPES[tensor["dtype"]]), tuple(tensor["shape"])
            offset = 8 + size + tensor["data_offsets"][0]
            if math.prod(shape):
                mapped = np.memmap(self.path, dtype, "r", offset, shape)
                out[name] = np.asarray(mapped)  # a plain view: memmap's own indexing is slow
            else:
                out[name] = np.zeros(shape, dtype)
        return out

    def __len__(self) -> int:
        return len(self._starts_S)

    @property
    def labels(self) -> int:
        """Labels of all samples together."""
        return len(self._ids_NG)

    def key(self, i: int) -> str:
        """The i-th of the sorted sample keys."""
        return self._key(i).decode()

    def __iter__(self) -> Iterator[str]:
        return (self.key(i) for i in range(len(self)))

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def ids(self, key: str) -> NDArray[Any]:
        """(N, G) labels of a sample, without a copy; none where it had nothing to label.

        Raises:
            UserError: the side-car lacks the sample.
        """
        i = self._row(key)
        start, length = int(self._starts_S[i]), int(self._lengths_S[i])
        return self._ids_NG[start : start + length]

    def seconds(self, key: str) -> float:
        """Duration of the signal that was labelled.

        Raises:
            UserError: the side-car lacks the sample.
        """
        return float(self._seconds_S[self._row(key)])

    def _row(self, key: str) -> int:
        i = self._find(key)
        if i is None:
            raise UserError(
                f"{self.path}: no labels of sample {key!r}; the side-car belongs to other shards, "
                f"or the sample could not be read when they were made: {MAKE}"
            )
        return i

    def _find(self, key: str) -> int | None:
        wanted = key.encode()
        i = bisect_left(range(len(self)), wanted, key=self._key)
        return i if i < len(self) and self._key(i) == wanted else None

    def _key(self, i: int) -> bytes:
        first = int(self._key_ends_S[i - 1]) if i else 0
        return self._keys[first : int(self._key_ends_S[i])].tobytes()

    def check_shards(self, folder: str | Path) -> None:
        """Refuse shards that are not the labelled ones.

        Raises:
            UserError: they are not, or the folder holds no shards.
        """
        if shards_digest(folder) != self.info.shards:
            raise UserError(f"{self.path}: labels of other shards than {folder}; {MAKE}")

    def damage(self) -> list[str]:
        """Names of the tensors whose bytes have changed since they were written."""
        out = []
        for name, array in (
            ("ids", self._ids_NG),
            ("keys", self._keys),
            ("key_ends", self._key_ends_S),
            ("starts", self._starts_S),
            ("lengths", self._lengths_S),
            ("seconds", self._seconds_S),
        ):
            crc = 0
            for first in range(0, len(array), _BLOCK):
                crc = google_crc32c.extend(crc, array[first : first + _BLOCK].tobytes())
            if f"{crc:08x}" != self._crc.get(name):
                out.append(name)
        return out

    def counts(self) -> list[Ints]:
        """How many labels of each class there are, per codebook.

        Raises:
            UserError: an id that is no class.
        """
        out = [np.zeros(k, np.int64) for k in self.info.classes]
        for first in range(0, self.labels, _BLOCK):
            for g, total in enumerate(out):
                found = np.bincount(self._ids_NG[first : first + _BLOCK, g], minlength=len(total))
                if len(found) > len(total):
                    raise UserError(
                        f"{self.path}: id {len(found) - 1} in codebook {g} of {len(total)} classes"
                    )
                total += found
        return out

    def off_s(self) -> NDArray[np.float64]:
        """(S,) by how many seconds the labels of each sample end away from its end.

        The last label ends as far behind its centre as the first begins before its own.
        """
        window_s = 2 * self.info.source.first_centre_s
        seconds_S = np.asarray(self._seconds_S, np.float64)
        ends_S = (self._lengths_S - 1) / self.info.rate_hz + window_s
        shorter_S = -np.maximum(seconds_S - window_s, 0.0)  # than the first window
        return np.where(self._lengths_S > 0, ends_S - seconds_S, shorter_S)

    @property
    def empty(self) -> int:
        """Samples without a label."""
        return int((self._lengths_S == 0).sum())


def _info(tree: dict[str, Any]) -> LabelInfo:
    return LabelInfo(
        source=Source(**tree["source"]),
        classes=tuple(int(k) for k in tree["classes"]),
        shards=str(tree["shards"]),
        codebooks=tuple(tree["codebooks"]),
    )
