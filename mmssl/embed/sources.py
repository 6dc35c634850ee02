"""What a caller may give, checked: files, arrays and texts, one row of modalities per item.

Letters in shapes: C channels, S samples, T frames, H height, W width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmssl.files import is_file
from mmssl.types import MODALITIES, UserError

_INTEGERS = {torch.int16: 2.0**15, torch.int32: 2.0**31}  # full scale of sound
_CHANNELS = 64
_PATHS = (str, os.PathLike)


@dataclass(frozen=True)
class Sound:
    """(S,) float32 samples, the mean of the channels, at `rate` Hz."""

    wave_S: Tensor
    rate: int


@dataclass(frozen=True)
class Film:
    """(T, H, W, 3) uint8 frames at `fps` per second."""

    frames_THWC: Tensor
    fps: float


Source = Path | bytes | Sound | Film | str


@dataclass(frozen=True)
class Row:
    """One item: the source of each modality, a text being its own.

    name: says in messages which item it is. whole: a file of which every stream that the model
    knows is meant; then there are no sources.
    """

    name: str
    sources: Mapping[str, Source]
    whole: Path | None = None


def is_single(inputs: Any) -> bool:
    """Whether one item is given, not several."""
    if isinstance(inputs, Mapping):
        return not any(isinstance(column, list) for column in inputs.values())
    return isinstance(inputs, _PATHS)


def rows(inputs: Any) -> Iterator[Row]:
    """The items of any allowed input.

    Raises:
        UserError: something else; names item and modality.
    """
    if is_single(inputs):
        yield _row("the item", inputs)
    elif isinstance(inputs, Mapping):
        yield from _columns(inputs)
    elif isinstance(inputs, Iterable) and not isinstance(inputs, np.ndarray | Tensor | bytes):
        yield from (_row(f"item {i}", value) for i, value in enumerate(inputs))
    else:
        raise UserError(
            f"a {type(inputs).__name__} does not say what it is; give "
            '{"audio": ...}, {"video": ...}, {"text": ...}, several of them, or a list of items'
        )


def _columns(inputs: Mapping[str, Any]) -> Iterator[Row]:
    sizes = {name: len(c) if isinstance(c, list) else -1 for name, c in inputs.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{n}: {s if s >= 0 else 'no list'}" for n, s in sizes.items())
        raise UserError(
            f"lists of one length are needed ({told}); put None where an item lacks a modality"
        )
    for i, values in enumerate(zip(*inputs.values(), strict=True)):
        yield _row(f"item {i}", dict(zip(inputs, values, strict=True)))


def _row(name: str, value: Any) -> Row:
    if isinstance(value, Mapping):
        return Row(name, {m: _source(f"{name}, {m}", m, v) for m, v in _given(name, value)})
    if isinstance(value, os.PathLike):
        return Row(name, {}, _file(name, value))
    if isinstance(value, str):
        if is_file(value):
            raise UserError(
                f"{name}: {value!r} is a file; give Path({value!r}) for all that is in it, "
                '{"audio": ...} for its sound, or {"text": ...} for the words'
            )
        return Row(name, {"text": _text(name, value)})
    raise UserError(
        f"{name}: expected a text, a Path or a dict of modalities, found {type(value).__name__}"
    )


def _given(name: str, value: Mapping[str, Any]) -> list[tuple[str, Any]]:
    unknown = [key for key in value if key not in MODALITIES]
    if unknown:
        raise UserError(f"{name}: no modality {unknown[0]!r}; there are {', '.join(MODALITIES)}")
    given = [(m, value[m]) for m in MODALITIES if value.get(m) is not None]
    if not given:
        raise UserError(f"{name}: has no modality at all; leave the item out")
    return given


def _source(where: str, modality: str, value: Any) -> Source:
    if modality == "text":
        return _text(where, value)
    if isinstance(value, bytes):
        return value
    if isinstance(value, _PATHS):
        return _file(where, value)
    names = ("array", "sampling_rate") if modality == "audio" else ("frames", "fps")
    if isinstance(value, Mapping):
        value = tuple(value.get(name) for name in names)
    if not isinstance(value, tuple) or len(value) != 2:
        raise UserError(
            f"{where}: a {type(value).__name__} has no rate; give a path, ({names[0]}, "
            f'{names[1]}) or {{"{names[0]}": ..., "{names[1]}": ...}}'
        )
    array, rate = value
    if not isinstance(rate, int | float | np.number) or not 0 < rate < math.inf:
        raise UserError(f"{where}: {names[1]} must be a number above 0, found {rate!r}")
    if not isinstance(array, np.ndarray | Tensor):
        raise UserError(
            f"{where}: {names[0]} must be a numpy array or a tensor, found {type(array).__name__}"
        )
    data = _tensor(where, array).detach().cpu()
    return (
        _sound(where, data, float(rate)) if modality == "audio" else _film(where, data, float(rate))
    )


def _tensor(where: str, array: NDArray[Any] | Tensor) -> Tensor:
    if isinstance(array, Tensor):
        return array
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(native)
    except TypeError as error:
        raise UserError(f"{where}: an array of {array.dtype} holds no samples") from error


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: expected a text, found {type(value).__name__}")
    if not value.strip():
        raise UserError(f"{where}: the text is empty; leave it out, or put None in its place")
    return value


def _file(where: str, value: Any) -> Path:
    path = Path(value)
    if not is_file(path):
        raise UserError(f"{where}: {path}: no such file")
    return path


def _sound(where: str, data: Tensor, rate: float) -> Sound:
    if data.ndim not in (1, 2) or (data.ndim == 2 and len(data) > min(_CHANNELS, data.shape[1])):
        raise UserError(
            f"{where}: expected (samples,) or (channels, samples), found {tuple(data.shape)}"
        )
    if data.numel() == 0:
        raise UserError(f"{where}: holds no samples")
    if rate != int(rate):
        raise UserError(f"{where}: sampling_rate must be a whole number of Hz, found {rate!r}")
    scale = _INTEGERS.get(data.dtype, 1.0)
    if not data.is_floating_point() and scale == 1.0:
        raise UserError(f"{where}: samples of {data.dtype}; give float in [-1, 1], int16 or int32")
    wave_S = data.float() / scale
    wave_S = wave_S.mean(0) if wave_S.ndim == 2 else wave_S
    if not bool(wave_S.isfinite().all()):
        raise UserError(f"{where}: holds samples that are not finite")
    return Sound(wave_S, int(rate))


def _film(where: str, data: Tensor, fps: float) -> Film:
    if data.dtype != torch.uint8 or data.ndim != 4 or data.shape[3] != 3 or not data.numel():
        raise UserError(
            f"{where}: expected (frames, height, width, 3) uint8 in RGB, found "
            f"{tuple(data.shape)} {data.dtype}"
        )
    return Film(data.contiguous(), fps)


def counted(found: Iterator[Row]) -> Iterator[Row]:
    """The same rows.

    Raises:
        UserError: there is none.
    """
    first = next(found, None)
    if first is None:
        raise UserError("there is nothing to encode: the list is empty")
    return chain([first], found)


def of_one(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, as long as each has one source.

    Raises:
        UserError: one has several.
    """
    for row in rows:
        if len(row.sources) != 1:
            raise UserError(f'{row.name}: say of what frames are wanted, {{"audio": ...}} or video')
        yield row
