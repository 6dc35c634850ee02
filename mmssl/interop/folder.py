"""Folders in the layout of `transformers`: config.json, *.safetensors, preprocessor_config.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmssl.types import UserError

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
ONE, SEVERAL = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        UserError: no such file, or something else in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder of a checkpoint of transformers")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: no JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected an object, found {type(found).__name__}")
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from the parts that its index names.

    Raises:
        UserError: no safetensors there, or a damaged or missing one.
    """
    found: dict[str, Tensor] = {}
    for path in _files(folder):
        try:
            found |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file: {error}") from error
    return found


def _files(folder: Path) -> list[Path]:
    if (folder / SEVERAL).is_file():
        weights = read_json(folder / SEVERAL).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise UserError(f"{folder / SEVERAL}: has no weight_map")
        return [folder / Path(name).name for name in sorted(set(weights.values()))]
    if (folder / ONE).is_file():
        return [folder / ONE]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if pickles := sorted(path for kind in _PICKLES for path in folder.glob(kind)):
        raise UserError(
            f"{pickles[0]}: a pickle, which could run code, is not read; load it where it is "
            "trusted and write it again with model.save_pretrained(FOLDER), which makes safetensors"
        )
    raise UserError(f"{folder}: no *.safetensors here")


def write_folder(
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    preprocessor: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a folder, all of it or nothing; `files`: what else is in it, by name.

    Raises:
        UserError: `out` has something in it already.
    """
    check_new(out)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write_json(temporary / CONFIG, config)
    if preprocessor:
        _write_json(temporary / PREPROCESSOR, preprocessor)
    for name, data in (files or {}).items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_bytes(data)
    save_file(dict(tensors), temporary / ONE, metadata={"format": "pt"})
    # safetensors makes files that only their owner may read
    (temporary / ONE).chmod(temporary.stat().st_mode & 0o666)
    if out.is_dir():
        out.rmdir()
    os.rename(temporary, out)


def check_new(out: Path) -> None:
    """Refuse a path that holds something.

    Raises:
        UserError: it does.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out}: is there already; choose a new folder")


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(tree), indent=2, sort_keys=True) + "\n")
