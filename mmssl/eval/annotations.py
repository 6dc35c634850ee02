"""Boxes that people drew around sounding objects: the files of VGG-SS and Flickr-SoundNet.

Letters in shapes: K boxes. Boxes are x0, y0, x1, y1 as shares of the whole picture.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmssl.types import UserError

Floats = NDArray[np.float64]

_FLICKR_SIDE = 256  # pixels of the square frames that were annotated
_NEEDED = "a box needs four numbers x0, y0, x1, y1 with x0 < x1 and y0 < y1"


@dataclass(frozen=True)
class Annotations:
    """Boxes (K, 4) by clip name; `consensus` annotators must agree for full weight.

    VGG-SS: all boxes count (1). Flickr-SoundNet: a box per annotator, two of three must agree.
    """

    boxes: dict[str, Floats]
    consensus: int


def read_annotations(path: Path) -> Annotations:
    """A JSON file of VGG-SS, or a folder of Flickr-SoundNet's XML files.

    Raises:
        UserError: neither, or an entry that cannot be read; names file, entry and remedy.
    """
    if path.is_dir():
        return _flickr(path)
    if not path.is_file():
        raise UserError(f"annotations={path}: no such file or folder")
    return _vggss(path)


def _vggss(path: Path) -> Annotations:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        entries = {entry["file"]: entry["bbox"] for entry in tree}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"annotations={path}: not a file of VGG-SS, which is a JSON list of objects with "
            f"`file` and `bbox` ({error!r})"
        ) from error
    return Annotations({name: _boxes(path, name, found) for name, found in entries.items()}, 1)


def _flickr(folder: Path) -> Annotations:
    """Each annotator's element holds `bbox` elements whose last four children are the corners."""
    files = sorted(folder.glob("*.xml"))
    if not files:
        raise UserError(f"annotations={folder}: holds no XML file of Flickr-SoundNet")
    found = {}
    for file in files:
        try:
            corners = [
                [float(child.text or "") / _FLICKR_SIDE for child in list(box)[-4:]]
                for box in ElementTree.parse(file).getroot().iter("bbox")
            ]
        except (ElementTree.ParseError, ValueError) as error:
            raise UserError(
                f"{file}: not an annotation of Flickr-SoundNet ({error}); a `bbox` ends with "
                "xmin, ymin, xmax, ymax in pixels"
            ) from error
        found[file.stem] = _boxes(file, file.stem, corners)
    return Annotations(found, 2)


def _boxes(path: Path, name: str, corners: Any) -> Floats:
    """Checked corners; what lies beyond the picture is cut off."""
    try:
        boxes_K4 = np.asarray(corners, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {name}: {_NEEDED}") from error
    if boxes_K4.shape == (0,):
        return np.zeros((0, 4))
    if boxes_K4.ndim != 2 or boxes_K4.shape[1] != 4:
        raise UserError(f"{path}: {name}: {_NEEDED}")
    if not (boxes_K4[:, :2] < boxes_K4[:, 2:]).all():
        raise UserError(f"{path}: {name}: corners in another order or missing; {_NEEDED}")
    if not (np.abs(boxes_K4) <= 2).all():
        raise UserError(
            f"{path}: {name}: boxes far beyond the picture; VGG-SS gives shares of its sides, "
            f"Flickr-SoundNet pixels of a frame of {_FLICKR_SIDE} x {_FLICKR_SIDE}"
        )
    return np.clip(boxes_K4, 0, 1)
