"""Sounding Sprites: real sounds (ESC-10) under drawings whose size pulses with the loudness.

The sounds keep their folds: one fold is the test split, and validation is cut out of the others by
source recording. The last drawing of each class appears in the test split only.
A silent second drawing pulses to the unheard sound of another clip of its own class, so that no
look and no motion tells which of the two is heard.
Letters in names: T frames, S samples. Times are in seconds, lengths in px of the 128 x 128 frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data_tools import synth_media as media
from data_tools import synth_plan as plan
from data_tools import synth_scenes as scenes
from data_tools import synth_sources as sources
from data_tools.synth_sources import Sound
from mmssl.types import UserError

T = TypeVar("T")

SIDES = {"small": (34.0, 38.0), "medium": (40.0, 44.0), "large": (46.0, 50.0)}  # at the loudest
WORDS = {
    "baby_cry": ("baby", "cries", "crying"),
    "chainsaw": ("chainsaw", "roars", "roaring"),
    "clock_tick": ("clock", "ticks", "ticking"),
    "dog_bark": ("dog", "barks", "barking"),
    "fire_crackling": ("fire", "crackles", "crackling"),
    "helicopter": ("helicopter", "whirs", "whirring"),
    "person_sneeze": ("person", "sneezes", "sneezing"),
    "rain": ("rain cloud", "patters", "pattering"),
    "rooster": ("rooster", "crows", "crowing"),
    "sea_waves": ("sea wave", "rushes", "rushing"),
}
ONE_TEMPLATES = (
    "{a} {verb}",
    "{a} {verb} as it moves about",
    "{a} moves around and {verb}",
    "{a} is alone here, {ing} on and on",
    "the sound of {a} {ing}",
    "we see {a} that {verb}",
    "{ing} is heard while {a} moves along",
    "{a} drifts through the picture and {verb}",
    "only {a} is there, and it {verb}",
    "there is {a} {ing}",
    "watch {a}: it {verb}",
    "the only thing here, {a}, {verb}",
)
TWO_TEMPLATES = (
    "{a} {verb} while {b} is silent",
    "{a} {verb} and {b} makes no sound",
    "{b} moves silently while {a} {verb}",
    "{a} {ing} and {b} without sound",
    "{a} {verb}; {b} is mute",
    "{a} {verb}, {b} stays quiet",
    "{ing} comes from {a}, not from {b}",
    "next to {b} that is quiet, {a} {verb}",
    "two things: {a} that {verb} and {b} without sound",
    "we hear {a} {ing} and see {b} move quietly",
    "{b} says nothing, {a} {verb}",
    "{a} {verb} beside {b} that cannot be heard",
)

_CROP_TRIES = 20
_CROP_ENERGY = 0.5  # share of a sound's energy that its crop should hold
_WINDOW_S = 0.1
_QUIET_SCALE = 0.6  # size in silence relative to the loudest moment
_STEADY_SCALE = 0.85  # size without pulsing


@dataclass(frozen=True)
class _Look:
    """What the clips of a corpus have in common."""

    out: Path
    seed: int
    fps: int
    fold: int
    pulsing: bool


@dataclass(frozen=True)
class SpriteJob:
    """One Sounding Sprites clip to make; odd indices show two objects.

    Of ``sounds`` the first is heard, the second (of the second object) only moves it.
    """

    look: _Look
    split: str
    index: int
    sounds: tuple[Sound, ...]
    sizes: tuple[str, ...]
    drawings: tuple[Path, ...]


# --- one clip


def crop_sound(wave_S: media.Wave, rng: np.random.Generator) -> tuple[float, media.Wave]:
    """Cut 4 s that hold at least half of the sound's energy (or the best of 20 draws).

    Returns:
        The start (s) of the crop and the crop (S,), its peak at -6 to -1 dB.
    """
    length = round(scenes.SECONDS * media.RATE)
    if len(wave_S) < length:  # a few recordings are shorter: silence follows
        wave_S = np.pad(wave_S, (0, length - len(wave_S)))
    energy_S = np.concatenate([[0.0], np.cumsum(wave_S**2)])
    begins = rng.integers(len(wave_S) - length + 1, size=_CROP_TRIES)
    held = (energy_S[begins + length] - energy_S[begins]) / energy_S[-1]
    good = np.flatnonzero(held >= _CROP_ENERGY)
    begin = int(begins[good[0] if len(good) else held.argmax()])
    crop_S = wave_S[begin : begin + length]
    peak = 10 ** (rng.uniform(-6, -1) / 20)
    return begin / media.RATE, crop_S * (peak / np.abs(crop_S).max())


def loudness(wave_S: media.Wave, times_T: NDArray[np.float64]) -> NDArray[np.float64]:
    """Square root of the effective value around each time (T,), 1 at the loudest of them."""
    half = round(_WINDOW_S / 2 * media.RATE)
    power_S = np.concatenate([[0.0], np.cumsum(wave_S**2)])
    centre_T = np.rint(times_T * media.RATE).astype(int)
    low_T, high_T = np.maximum(centre_T - half, 0), np.minimum(centre_T + half, len(wave_S))
    level_T = np.maximum((power_S[high_T] - power_S[low_T]) / (high_T - low_T), 0) ** 0.25
    return np.asarray(level_T / level_T.max())


def make_sprite_clip(job: SpriteJob) -> plan.Line:
    """Draw and write one Sounding Sprites clip; returns its manifest line."""
    look = job.look
    rng = plan.generator(look.seed, job.split, "sprites", look.fold, job.index)
    times_T = plan.frame_times(look.fps)
    crops = [crop_sound(sources.load_sound(sound.path), rng) for sound in job.sounds]
    stamps = [sources.load_stamp(path) for path in job.drawings]
    sizes = [float(rng.uniform(*SIDES[size])) for size in job.sizes]
    extents = [stamp.extent for stamp in stamps]
    paths = scenes.sample_paths(rng, sizes, times_T, extents)
    centres = [path.centres(times_T) for path in paths]
    sides = [
        s * _scales(wave_S, times_T, look.pulsing)
        for s, (_, wave_S) in zip(sizes, crops, strict=True)
    ]
    squares = [scenes.boxes(c_TD, s_T) for c_TD, s_T in zip(centres, sides, strict=True)]
    drawn = plan.Drawn(
        source=job.sounds[0].source,
        caption=_caption(rng, [sound.name for sound in job.sounds]),
        wave=crops[0][1],
        boxes=[scenes.boxes(*track) for track in zip(centres, sides, extents, strict=True)],
        frames=lambda: _frames(rng, stamps, squares),
        meta=_meta(job, crops[0][0], paths),
    )
    lacks = plan.lacking(look.seed, job.split, job.index)
    return plan.write_drawn(look.out, job.split, job.index, look.fps, lacks, drawn)


def _scales(wave_S: media.Wave, times_T: NDArray[np.float64], pulsing: bool) -> NDArray[np.float64]:
    if not pulsing:
        return np.full(len(times_T), _STEADY_SCALE)
    return _QUIET_SCALE + (1 - _QUIET_SCALE) * loudness(wave_S, times_T)


def _frames(
    rng: np.random.Generator,
    stamps: Sequence[scenes.Stamp],
    squares: Sequence[NDArray[np.float64]],
) -> NDArray[np.uint8]:
    picture_HWC = scenes.background(rng)
    actors = list(zip(stamps, squares, strict=True))
    return scenes.render(picture_HWC, [actors[i] for i in rng.permutation(len(actors))])


def _caption(rng: np.random.Generator, names: Sequence[str]) -> str:
    nouns = [WORDS.get(name, (name.replace("_", " "),))[0] for name in names]
    _, verb, ing = WORDS.get(names[0], ("", "sounds", "sounding"))
    a, b = (f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in (nouns[0], nouns[-1]))
    templates = ONE_TEMPLATES if len(names) == 1 else TWO_TEMPLATES
    return templates[int(rng.integers(len(templates)))].format(a=a, b=b, verb=verb, ing=ing)


def _meta(job: SpriteJob, crop_s: float, paths: Sequence[scenes.Path]) -> plan.Line:
    meta: plan.Line = {
        "kind": plan.KINDS[len(job.sounds) - 1],
        "fold": job.look.fold,
        "pulsing": job.look.pulsing,
    }
    for k, prefix in enumerate(("", "silent_")):
        here = k < len(job.sounds)
        meta[f"{prefix}class"] = job.sounds[k].name if here else None
        meta[f"{prefix}size"] = job.sizes[k] if here else None
        meta[f"{prefix}diameter"] = round(paths[k].size, 2) if here else None
        meta[f"{prefix}drawing"] = job.drawings[k].stem if here else None
        meta[f"{prefix}sound"] = job.sounds[k].path.name if here else None
    return {**meta, "crop_s": round(crop_s, 4)}


# --- which clips


def _pick(pool: Sequence[T], seed: int, turn: int, *path: str) -> T:
    """Every member of the pool once before any comes again, in an order that changes."""
    lap, place = divmod(turn, len(pool))
    return pool[int(plan.generator(seed, *path, lap).permutation(len(pool))[place])]


@dataclass(frozen=True)
class _Cast:
    """What the clips of one split are drawn from."""

    split: str
    seed: int
    sounds: Mapping[str, Sequence[Sound]]  # class -> sounds
    drawings: Mapping[str, Sequence[Path]]  # class -> drawings this split may show

    def clip(
        self, index: int, heard: Sound | None
    ) -> tuple[tuple[Sound, ...], tuple[str, ...], tuple[Path, ...]]:
        """Sounds, size groups and drawings of the objects of a clip, the sounding one first.

        ``heard`` fixes the sound (tests go through all of them); else it is drawn.
        """
        count, nth = 1 + index % 2, index // 2
        kind = plan.KINDS[count - 1]
        classes, turn = sorted(self.sounds), nth // len(self.sounds)
        first, second = plan.roles(classes, self.seed, self.split, kind, nth)
        names = [first.name, second.name]
        if heard is None:
            heard = _pick(self.sounds[first.name], self.seed, turn, self.split, kind, first.name)
        else:
            shift = 1 + turn % (len(classes) - 1)
            names = [heard.name, classes[(classes.index(heard.name) + shift) % len(classes)]]
        rng = plan.generator(self.seed, self.split, "cast", kind, nth)
        unheard = self.sounds[names[1]][int(rng.integers(len(self.sounds[names[1]])))]
        # Each class comes once per turn in each role, so its drawings are shown equally often.
        shown = [
            _pick(self.drawings[name], self.seed, turn, self.split, "drawing", kind, role, name)
            for role, name in zip(("sounding", "silent"), names, strict=True)
        ]
        sizes = (first.size, second.size)
        return (heard, unheard)[:count], sizes[:count], tuple(shown[:count])


def generate_sprites(
    out: Path,
    sounds: Path,
    sprites: Path,
    fold: int,
    *,
    n: Mapping[str, int],
    crops: int = 5,
    seed: int = 0,
    workers: int = 2,
    fps: int = 10,
    pulsing: bool = True,
    test_drawings: str = "last",
) -> Path:
    """Generate Sounding Sprites for one test fold.

    Args:
        out: Folder to write to; one per fold.
        sounds: Folder of CLASS/FOLD-SOURCE-TAKE.ogg (ESC-10); silence follows those below 4 s.
        sprites: Folder of CLASS/*.png drawings, square and with transparency.
        fold: Test fold; the other folds give training and, by source, validation.
        n: Clips of "train" and "val"; even indices show one object, odd ones two.
        crops: Test clips per sound and kind, each with its own crop (5 x 80 sounds of an ESC-10
            fold are 400 clips of either kind).
        seed: Seed of the whole corpus.
        workers: Processes; the bytes do not depend on it.
        fps: Frames per second.
        pulsing: Whether size follows the loudness; else it is constant.
        test_drawings: "last" shows in the test only the drawings that training never shows, "all"
            shows all drawings there, equally often.

    Returns:
        ``out``, which then holds media and manifests as of ``generate_bouncing``.

    Raises:
        UserError: If folders, names or numbers do not fit.
    """
    plan.check_numbers(n, seed, workers, fps)
    if crops < 0:
        raise UserError(f"--crops {crops}: give 0 (no test clips) or more")
    if test_drawings not in ("last", "all"):
        raise UserError(f"--test-drawings {test_drawings}: use last or all")
    parts = sources.split_sounds(sources.list_sounds(Path(sounds)), fold, seed)
    drawings = sources.list_drawings(Path(sprites), sorted({s.name for s in parts["test"]}))
    look = _Look(Path(out), seed, fps, fold, pulsing)
    heard: dict[str, list[Sound | None]] = {part: [None] * count for part, count in n.items()}
    heard["test"] = [s for s in _interleaved(parts["test"]) * crops for _ in plan.KINDS]
    for part in (p for p in plan.SPLITS if heard.get(p)):
        shown = (
            slice(None, -1) if part != "test" else slice(-1 if test_drawings == "last" else 0, None)
        )
        cast = _Cast(
            part,
            seed,
            {name: [s for s in parts[part] if s.name == name] for name in drawings},
            {name: found[shown] for name, found in drawings.items()},
        )
        jobs = [SpriteJob(look, part, k, *cast.clip(k, s)) for k, s in enumerate(heard[part])]
        plan.write_split(Path(out), part, make_sprite_clip, jobs, workers)
    return Path(out)


def _interleaved(sounds: Sequence[Sound]) -> list[Sound]:
    """Classes in turn, so that any stretch of the test split is balanced."""
    ranks: dict[str, int] = {}
    keyed = []
    for sound in sounds:
        ranks[sound.name] = ranks.get(sound.name, -1) + 1
        keyed.append((ranks[sound.name], sound.name, sound))
    return [sound for *_, sound in sorted(keyed, key=lambda item: item[:2])]
