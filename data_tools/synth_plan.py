"""What every synthetic corpus shares: balanced draws, manifest lines, running jobs.

A clip is drawn from (seed, split, index) alone. That makes the output independent of the number of
workers, and a small corpus a prefix of a larger one with the same seed.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools import synth_media as media
from data_tools import synth_scenes as scenes
from mmssl.files import whole_file
from mmssl.types import MODALITIES, UserError

SPLITS = ("train", "val", "test")
KINDS = ("one", "two")
Line = dict[str, Any]
JobT = TypeVar("JobT")

_LACKS = ("text", "text", "audio", "video")  # what 4 of every 20 training clips lack


@dataclass(frozen=True)
class Role:
    """One object of a clip: its class and its size group."""

    name: str
    size: str


def generator(seed: int, *path: int | str) -> np.random.Generator:
    """Random generator of its own for a seed and a path such as (split, "clip", index)."""
    words = [p if isinstance(p, int) else int.from_bytes(p.encode(), "little") for p in path]
    return np.random.default_rng([seed, *words])


def roles(
    classes: Sequence[str], seed: int, split: str, kind: str, index: int
) -> tuple[Role, Role]:
    """Class and size group of the sounding and the silent object of the index-th clip of a kind.

    With C classes, C consecutive clips hold each class once in each role, and three times C
    consecutive clips hold each pair (class, size group) once in each role.
    """
    turn, place = divmod(index, len(classes))
    starts_RC = generator(seed, split, "sizes", kind, turn // 3).integers(3, size=(2, len(classes)))
    rng = generator(seed, split, "order", kind, turn)
    order, shift = rng.permutation(len(classes)), int(rng.integers(1, len(classes)))
    picks = (int(order[place]), int(order[(place + shift) % len(classes)]))
    sizes = [scenes.SIZES[(int(starts_RC[r, picks[r]]) + turn) % 3] for r in range(2)]
    return Role(classes[picks[0]], sizes[0]), Role(classes[picks[1]], sizes[1])


def lacking(seed: int, split: str, index: int) -> str | None:
    """The modality a clip lacks: in training text 10 %, audio 5 %, video 5 %; elsewhere none."""
    if split != "train":
        return None
    deck = [*_LACKS, *[None] * (20 - len(_LACKS))]
    return deck[int(generator(seed, split, "lacks", index // 20).permutation(20)[index % 20])]


def frame_times(fps: int) -> NDArray[np.float64]:
    """Times (T,) in seconds at which the frames are shown: k / fps."""
    return np.arange(round(scenes.SECONDS * fps)) / fps


def rounded(values: Iterable[float], digits: int) -> list[float]:
    """Plain floats for json."""
    return [round(float(v), digits) for v in values]


# --- from a drawn clip to a file and its manifest line


@dataclass(frozen=True)
class Drawn:
    """A clip before it is written.

    Attributes:
        source: Id of the recording it stems from; clips of one source are not independent.
        caption: What is seen and what sounds.
        wave: Audio (S,) at 16 kHz.
        boxes: Box tracks (T, 4) in px: the sounding object, then the silent one if there is one.
        frames: Draws the frames (T, 128, 128, 3); called only for clips that have video.
        meta: Ground truth beside the boxes.
    """

    source: str
    caption: str
    wave: media.Wave
    boxes: Sequence[NDArray[np.float64]]
    frames: Callable[[], NDArray[np.uint8]]
    meta: Line


def write_drawn(
    out: Path, split: str, index: int, fps: int, lacks: str | None, drawn: Drawn
) -> Line:
    """Write the media file of a clip without the modality it lacks; returns its manifest line."""
    frames = None if lacks == "video" else drawn.frames()
    name = f"media/{split}/{index:06d}.{'m4a' if frames is None else 'mp4'}"
    media.write_clip(out / name, frames, None if lacks == "audio" else drawn.wave, fps)
    tracks = [[rounded(box, 2) for box in box_T4] for box_T4 in drawn.boxes]
    truth = {"fps": fps, "sounding": tracks[0], "silent": tracks[1] if tracks[1:] else None}
    return {
        "media": name,
        "caption": None if lacks == "text" else drawn.caption,
        "source": drawn.source,
        "split": split,
        "start": 0.0,
        "end": scenes.SECONDS,
        "has": [m for m in MODALITIES if m != lacks],
        "meta": {**drawn.meta, "boxes": None if frames is None else truth},
    }


# --- running


def check_numbers(n: Mapping[str, int], seed: int, workers: int, fps: int) -> None:
    """Refuse numbers that make no corpus.

    Raises:
        UserError: Naming the option and its range.
    """
    for split, count in n.items():
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; use {', '.join(SPLITS)}")
        if count < 0:
            raise UserError(f"--{split} {count}: give 0 (leave this split alone) or more clips")
    if seed < 0:
        raise UserError(f"--seed {seed}: seeds are 0 or larger")
    if workers < 1:
        raise UserError(f"--workers {workers}: at least one process is needed")
    if not 1 <= fps <= 60:
        raise UserError(f"--fps {fps}: frames per second lie between 1 and 60")


def write_split(
    out: Path, split: str, make: Callable[[JobT], Line], jobs: Sequence[JobT], workers: int
) -> None:
    """Make the clips of a split, then its manifest; an older manifest goes first.

    Raises:
        UserError: If ``out`` cannot be written to.
    """
    path = out / f"{split}.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it would describe files that are about to be replaced
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error}; choose another --out") from error
    lines = _run(make, jobs, workers, split)
    with whole_file(path) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _run(make: Callable[[JobT], Line], jobs: Sequence[JobT], workers: int, name: str) -> list[Line]:
    if workers == 1 or len(jobs) < 2:
        return list(_progress(map(make, jobs), len(jobs), name))
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        return list(_progress(pool.imap(make, jobs, chunksize=4), len(jobs), name))


def _progress(lines: Iterable[Line], total: int, name: str) -> tqdm[Line]:
    # disable=None: silent when the output is no terminal
    return tqdm(lines, total=total, desc=name, unit="clip", disable=None)
