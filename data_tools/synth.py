"""Built-in corpora: Bouncing Shapes, and Sounding Sprites from real sounds and drawings.

    python -m data_tools.synth --out DIR [--train 1500 --val 100 --test 500]
    python -m data_tools.synth --out DIR --sounds DIR --sprites DIR --fold K [--no-pulse]

Bouncing Shapes: 4 s clips of a shape that sounds whenever it hits a wall (timbre by class, pitch by
size); every other clip shows a second, silent shape of another class as well. Training clips lack
text (10 %), audio (5 %) or video (5 %); the others have all.
Times are in seconds, lengths in pixels of the 128 x 128 frame.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools import synth_media as media
from data_tools import synth_plan as plan
from data_tools import synth_scenes as scenes
from data_tools.synth_sprites import generate_sprites
from mmssl.types import UserError

CLASSES = tuple(scenes.SHAPES)
DEFAULT_COUNTS = {"train": 1500, "val": 100, "test": 500}

VERBS = {
    "circle": ("beeps", "beeping"),
    "square": ("buzzes", "buzzing"),
    "triangle": ("chimes", "chiming"),
    "diamond": ("twangs", "twanging"),
    "cross": ("hisses", "hissing"),
    "star": ("chirps", "chirping"),
    "ring": ("hums", "humming"),
    "crescent": ("swoops", "swooping"),
    "arrow": ("clicks", "clicking"),
    "heart": ("clangs", "clanging"),
}
# {a}: the sounding object ("small red circle"), {b}: the silent one, {verb} and {ing}: its sound
ONE_TEMPLATES = (
    "a {a} {verb}",
    "a {a} {verb} whenever it hits a wall",
    "a {a} bounces around and {verb}",
    "a {a} moves alone, {ing} at every bounce",
    "a {ing} sound comes from a {a}",
    "we see a {a} that {verb}",
    "{ing} is heard as a {a} hits the walls",
    "the {a} {verb} each time it bounces",
    "only a {a} is there, and it {verb}",
    "one {a}, {ing} on impact",
    "there is a {a} {ing} at the borders",
    "watch a {a}: it {verb} at each wall",
    "the only object, a {a}, {verb}",
)
TWO_TEMPLATES = (
    "a {a} {verb} while a {b} bounces silently",
    "a {a} {verb} and a {b} makes no sound",
    "a {b} moves silently while a {a} {verb}",
    "a silent {b} and a {ing} {a}",
    "a {a} {verb} at the walls; a {b} is mute",
    "the {a} {verb}, the {b} stays quiet",
    "{ing} comes from a {a}, not from a {b}",
    "next to a quiet {b}, a {a} {verb}",
    "two objects: a {a} that {verb} and a {b} without sound",
    "we hear a {a} {ing} and see a {b} bounce quietly",
    "a {b} says nothing, a {a} {verb}",
    "of the two, only the {a} {verb}; the {b} does not",
    "a {a} {verb} beside a {b} that cannot be heard",
)


@dataclass(frozen=True)
class ShapeJob:
    """One Bouncing Shapes clip to make; odd indices show two objects."""

    out: Path
    split: str
    index: int
    seed: int
    fps: int


@dataclass(frozen=True)
class _Shape:
    """One object as drawn: role, path, colour word, colour (3,), boxes (T, 4) in px."""

    role: plan.Role
    path: scenes.Path
    colour: str
    rgb: NDArray[np.float64]
    boxes: NDArray[np.float64]

    @property
    def words(self) -> str:
        return f"{self.role.size} {self.colour} {self.role.name}"


def make_shape_clip(job: ShapeJob) -> plan.Line:
    """Draw and write one Bouncing Shapes clip; returns its manifest line."""
    count = 1 + job.index % 2
    kind = plan.KINDS[count - 1]
    parts = plan.roles(CLASSES, job.seed, job.split, kind, job.index // 2)[:count]
    rng = plan.generator(job.seed, job.split, "clip", job.index)
    objects = _draw_objects(rng, parts, plan.frame_times(job.fps))
    first, path = objects[0], objects[0].path
    wave = media.hits_track(first.role.name, path.size, path.hits(), scenes.SECONDS, rng)
    drawn = plan.Drawn(
        source=f"bs-{job.seed}-{job.split}-{job.index:06d}",
        caption=_caption(rng, objects),
        wave=wave,
        boxes=[o.boxes for o in objects],
        frames=lambda: _frames(rng, objects),
        meta=_meta(kind, objects),
    )
    lacks = plan.lacking(job.seed, job.split, job.index)
    return plan.write_drawn(job.out, job.split, job.index, job.fps, lacks, drawn)


def _draw_objects(
    rng: np.random.Generator, parts: Sequence[plan.Role], times_T: NDArray[np.float64]
) -> list[_Shape]:
    sizes = [float(rng.uniform(*scenes.DIAMETERS[part.size])) for part in parts]
    paths = scenes.sample_paths(rng, sizes, times_T)
    names = [str(c) for c in rng.permutation(list(scenes.COLOURS))[: len(parts)]]
    return [
        _Shape(
            role=part,
            path=path,
            colour=name,
            rgb=np.clip(scenes.COLOURS[name] + rng.uniform(-8, 8, 3), 0, 255),
            boxes=scenes.boxes(path.centres(times_T), np.full(len(times_T), path.size)),
        )
        for part, path, name in zip(parts, paths, names, strict=True)
    ]


def _caption(rng: np.random.Generator, objects: Sequence[_Shape]) -> str:
    verb, ing = VERBS[objects[0].role.name]
    templates = ONE_TEMPLATES if len(objects) == 1 else TWO_TEMPLATES
    template = templates[int(rng.integers(len(templates)))]
    return template.format(a=objects[0].words, b=objects[-1].words, verb=verb, ing=ing)


def _frames(rng: np.random.Generator, objects: Sequence[_Shape]) -> NDArray[np.uint8]:
    picture_HWC = scenes.background(rng, [o.rgb for o in objects])
    actors = [(scenes.Stamp(scenes.draw_shape(o.role.name, o.rgb)), o.boxes) for o in objects]
    order = rng.permutation(len(actors))  # either may be in front where they touch
    return scenes.render(picture_HWC, [actors[i] for i in order])


def _meta(kind: str, objects: Sequence[_Shape]) -> plan.Line:
    meta: plan.Line = {"kind": kind}
    for prefix, shape in zip(("", "silent_"), (*objects, None)[:2], strict=True):
        meta[f"{prefix}class"] = shape.role.name if shape else None
        meta[f"{prefix}size"] = shape.role.size if shape else None
        meta[f"{prefix}diameter"] = round(shape.path.size, 2) if shape else None
        meta[f"{prefix}color"] = shape.colour if shape else None
        meta[f"{prefix}hits_s"] = plan.rounded(shape.path.hits(), 5) if shape else None
    return meta


def generate_bouncing(
    out: Path, n: Mapping[str, int], seed: int, workers: int, fps: int = 10
) -> Path:
    """Generate Bouncing Shapes: media files and one JSON-lines manifest per split.

    Args:
        out: Folder to write to.
        n: Clips per split (train, val, test); 0 leaves a split alone.
        seed: Seed of the whole corpus.
        workers: Processes; the bytes do not depend on it.
        fps: Frames per second.

    Returns:
        ``out``, which then holds ``media/<split>/<index>.mp4`` and ``<split>.jsonl``.

    Raises:
        UserError: If a number is out of range or ``out`` cannot be written.
    """
    plan.check_numbers(n, seed, workers, fps)
    for split in filter(n.get, plan.SPLITS):
        jobs = [ShapeJob(Path(out), split, k, seed, fps) for k in range(n[split])]
        plan.write_split(Path(out), split, make_shape_clip, jobs, workers)
    return Path(out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.synth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write media and manifests to")
    add("--train", type=int, default=1500, help="training clips (default 1500)")
    add("--val", type=int, default=100, help="validation clips (default 100)")
    add("--test", type=int, help="test clips of Bouncing Shapes (default 500)")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=2, help="processes; the files do not depend on it")
    add("--fps", type=int, default=10, help="frames per second (default 10)")
    add("--sounds", type=Path, help="real sounds: CLASS/FOLD-SOURCE-TAKE.ogg, as in ESC-10")
    add("--sprites", type=Path, help="drawings: CLASS/0.png 1.png ...; the last is for tests")
    add("--fold", type=int, help="fold of the sounds that becomes the test split")
    add("--crops", type=int, help="test crops per sound and kind of clip (default 5)")
    add("--test-drawings", choices=("last", "all"), help="drawings in test clips (default last)")
    add("--no-pulse", action="store_true", help="drawings keep their size")
    return parser


def _check_options(args: argparse.Namespace) -> None:
    sprites = args.sounds is not None or args.sprites is not None
    if sprites and None in (args.sounds, args.sprites, args.fold):
        raise UserError("Sounding Sprites need all of --sounds DIR, --sprites DIR and --fold K")
    if sprites and args.test is not None:
        raise UserError("--test is for Bouncing Shapes; with --sounds, --crops sets the test size")
    only_sprites = {"--fold": args.fold, "--crops": args.crops, "--no-pulse": args.no_pulse or None}
    for name, value in (*only_sprites.items(), ("--test-drawings", args.test_drawings)):
        if not sprites and value is not None:
            raise UserError(f"{name} needs --sounds DIR and --sprites DIR")


def run(argv: Sequence[str] | None = None) -> Path:
    """Generate what the command line asks for; returns the folder.

    Raises:
        UserError: If the options or the input folders do not fit.
    """
    args = _parser().parse_args(argv)
    _check_options(args)
    n = {"train": args.train, "val": args.val}
    if args.sounds is None:
        n["test"] = DEFAULT_COUNTS["test"] if args.test is None else args.test
        return generate_bouncing(args.out, n, args.seed, args.workers, args.fps)
    return generate_sprites(
        args.out,
        args.sounds,
        args.sprites,
        args.fold,
        n=n,
        crops=5 if args.crops is None else args.crops,
        seed=args.seed,
        workers=args.workers,
        fps=args.fps,
        pulsing=not args.no_pulse,
        test_drawings=args.test_drawings or "last",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status (2 for bad input, which is printed)."""
    try:
        run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
