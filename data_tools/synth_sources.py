"""Where Sounding Sprites come from: folders of real sounds and drawings, and their splits."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools import synth_media as media
from data_tools import synth_plan as plan
from data_tools import synth_scenes as scenes
from mmssl.types import UserError

_SOUND_NAME = re.compile(r"(?P<fold>\d+)-(?P<source>[^-]+)-.+\.(ogg|wav|flac)")
_SEEN = 16  # alpha (0-255) above which a point of a drawing belongs to its box
_VAL_SHARE = 1 / 8  # of the sounds outside the test fold


@dataclass(frozen=True)
class Sound:
    """One recording: class, fold and source id are read off its path."""

    path: Path
    name: str
    fold: int
    source: str


def list_sounds(folder: Path) -> list[Sound]:
    """All sounds of ``folder``/CLASS/FOLD-SOURCE-TAKE.(ogg|wav|flac), sorted.

    Raises:
        UserError: If the folder, a class or the file names do not fit.
    """
    sounds = []
    for path in (
        p for name in _classes(folder, "--sounds") for p in sorted((folder / name).iterdir())
    ):
        match = _SOUND_NAME.fullmatch(path.name)
        if match is None:
            raise UserError(
                f"{path}: sounds are called FOLD-SOURCE-TAKE.ogg (or .wav, .flac), such as "
                "1-187207-A.ogg; rename or remove this file"
            )
        source = f"{path.parent.name}-{match['source']}".lower()
        sounds.append(Sound(path, path.parent.name, int(match["fold"]), source))
    return sounds


def _classes(folder: Path, option: str) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"{option} {folder}: no such folder; give one with a folder per class")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if len(names) < 2:
        raise UserError(
            f"{option} {folder}: has {len(names)} class folders; two or more are needed"
        )
    return names


def list_drawings(folder: Path, classes: Sequence[str]) -> dict[str, list[Path]]:
    """Drawings of each class, sorted by name; the last one is kept for tests.

    Raises:
        UserError: If the folder or the drawings of a class are missing.
    """
    _classes(folder, "--sprites")
    drawings = {name: sorted((folder / name).glob("*.png")) for name in classes}
    for name, found in drawings.items():
        if len(found) < 2:
            raise UserError(
                f"--sprites {folder / name}: holds {len(found)} png drawings, but class {name!r} "
                "has sounds; put two or more there (the last is used in tests only)"
            )
    return drawings


def split_sounds(sounds: Sequence[Sound], fold: int, seed: int) -> dict[str, list[Sound]]:
    """Sounds of each split: ``fold`` is the test, an eighth of the rest by source is validation.

    Raises:
        UserError: If a split of a class would be empty.
    """
    folds = sorted({sound.fold for sound in sounds})
    if fold not in folds:
        raise UserError(f"--fold {fold}: the sounds have folds {folds}")
    split: dict[str, list[Sound]] = {"train": [], "val": [], "test": []}
    for name in sorted({sound.name for sound in sounds}):
        mine = [sound for sound in sounds if sound.name == name]
        held_out = _validation_sources([s for s in mine if s.fold != fold], fold, seed)
        for s in mine:
            part = "test" if s.fold == fold else "val" if s.source in held_out else "train"
            split[part].append(s)
        for part, members in split.items():
            if not any(s.name == name for s in members):
                raise UserError(
                    f"class {name!r} has no sound left for {part} with --fold {fold}; it needs "
                    "one in this fold and two sources in the others"
                )
    return split


def _validation_sources(sounds: Sequence[Sound], fold: int, seed: int) -> set[str]:
    sources = sorted({sound.source for sound in sounds})
    if len(sources) < 2:
        return set()
    order = plan.generator(seed, "validation", fold, sounds[0].name).permutation(len(sources))
    chosen: set[str] = set()
    for k in order[:-1]:
        if sum(s.source in chosen for s in sounds) >= _VAL_SHARE * len(sounds):
            break
        chosen.add(sources[k])
    return chosen


@functools.lru_cache(maxsize=512)
def load_sound(path: Path) -> media.Wave:
    """Samples (S,) of a sound, mono at 16 kHz.

    Raises:
        UserError: If the file cannot be read or is silent.
    """
    try:
        wave_S = media.read_audio(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as audio ({error}); replace or remove it"
        ) from error
    if not wave_S.any():
        raise UserError(f"{path}: holds nothing but silence; replace or remove it")
    return wave_S


@functools.lru_cache(maxsize=64)
def load_stamp(path: Path) -> scenes.Stamp:
    """A drawing, cut to what is seen of it and centred in a square.

    Raises:
        UserError: If the file cannot be read or shows nothing.
    """
    try:
        rgba_HWC = media.read_picture(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from error
    seen_HW = rgba_HWC[..., 3] > _SEEN
    if not seen_HW.any():
        raise UserError(f"{path}: is transparent everywhere; replace or remove it")
    (top, bottom), (left, right) = (
        np.flatnonzero(seen_HW.any(axis=axis))[[0, -1]] + (0, 1) for axis in (1, 0)
    )
    height, width = bottom - top, right - left
    side = max(height, width)
    square = np.zeros((side, side, 4))
    y, x = (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = rgba_HWC[top:bottom, left:right]
    square[..., :3] *= square[..., 3:] / 255
    square[..., 3] /= 255
    return scenes.Stamp(square, (float(width / side), float(height / side)))
