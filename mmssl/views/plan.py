"""Which stretch of a clip each view takes, decided from its header before anything is decoded.

All times are seconds on the clip's own clock (zero = first video frame, or first audio sample).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from mmssl import rng
from mmssl.specs import ViewSpec

_EPSILON_S = 1e-6


@dataclass(frozen=True)
class Seeds:
    """Names the random numbers of one sample: they depend on nothing else.

    `draw` tells the visits of one sample apart (Energon's restore key); it is empty in evaluation.
    """

    run: int
    key: str
    draw: tuple[str | int, ...] = ()

    def of(self, *name: str | int) -> int:
        """A 63-bit seed for one purpose, such as a view's name."""
        return rng.seed_of(self.run, self.key, *self.draw, *name)


@dataclass(frozen=True)
class Cut:
    """One view of one clip: where it starts, how much of the clip it covers, and its seed."""

    name: str
    spec: ViewSpec
    start_s: float
    end_s: float
    seed: int

    @property
    def frame_times_s(self) -> tuple[float, ...]:
        """Times of the video frames this cut asks for."""
        count = max(1, int((self.end_s - self.start_s) * self.spec.fps + 0.5))
        return tuple(self.start_s + k / self.spec.fps for k in range(count))


@dataclass(frozen=True)
class Need:
    """What one decoding pass must deliver.

    audio_hz 0 means no audio, empty frame_times_s no video; short_side 0 keeps the stored size.
    """

    audio_hz: int = 0
    audio_start_s: float = 0.0
    audio_end_s: float = 0.0
    frame_times_s: tuple[float, ...] = ()
    short_side: int = 0


@dataclass(frozen=True)
class Plan:
    """Cuts by view name, the decoding passes, and the pass that serves each view."""

    cuts: dict[str, Cut] = field(default_factory=dict)
    needs: tuple[Need, ...] = ()
    pass_of: dict[str, int] = field(default_factory=dict)


def plan(
    specs: Mapping[str, ViewSpec],
    duration_s: float,
    has: Collection[str],
    seeds: Seeds,
    training: bool,
    grid_s: Sequence[float] = (),
) -> Plan:
    """Decide the cuts of all views whose modality the clip has.

    In training, the start of a window is uniform over the places where its longest crop fits; views
    of one window share it. Windows named NAME.1, NAME.2 ... never overlap, and start no farther
    apart than the least `within_s` of theirs: a clip that is too short for all of them has the
    first one alone. In evaluation every window starts at 0.

    Args:
        specs: views by name.
        duration_s: length of the clip.
        has: modalities the clip offers.
        seeds: where random numbers come from.
        training: random starts, or fixed ones.
        grid_s: sorted times of the stored video frames; starts snap to them, so that a view whose
            frame rate divides the stored one shows exact frames.
    """
    longest: dict[str, float] = {}
    for spec in specs.values():
        longest[spec.window] = max(spec.crop_s, longest.get(spec.window, 0.0))
    starts: dict[str, float | None] = dict.fromkeys(longest, 0.0)
    if training:
        starts = {w: _start(w, s, duration_s, seeds, grid_s) for w, s in longest.items()}
        starts |= _apart(specs.values(), longest, duration_s, seeds)
    cuts = {
        name: _cut(name, spec, start, duration_s, seeds)
        for name, spec in specs.items()
        if spec.modality in has and (start := starts[spec.window]) is not None
    }
    needs, pass_of = passes(cuts)
    return Plan(cuts, needs, pass_of)


def _start(
    window: str, crop_s: float, duration_s: float, seeds: Seeds, grid_s: Sequence[float]
) -> float:
    room = duration_s - crop_s
    if crop_s <= 0 or room <= _EPSILON_S:
        return 0.0
    start = (seeds.of("window", window) / 2**63) * room
    fitting = bisect_left(grid_s, room + _EPSILON_S)
    if not fitting:
        return start
    # Equal shares of [0, room] for every stored frame at which the crop still fits.
    return max(0.0, grid_s[min(fitting - 1, int(start / room * fitting))])


def _apart(
    specs: Collection[ViewSpec], crops_s: Mapping[str, float], duration_s: float, seeds: Seeds
) -> dict[str, float | None]:
    """Starts of the windows NAME.1, NAME.2 ..., in random order, what is left between them.

    They lie in a stretch of the clip that allows no larger distance than `within_s`. None for all
    but the first where they do not fit beside each other.
    """
    families: dict[str, list[str]] = {}
    for window in crops_s:
        name, dot, _ = window.rpartition(".")
        if dot:
            families.setdefault(name, []).append(window)
    starts: dict[str, float | None] = {}
    for name, windows in families.items():
        if len(windows) < 2 or min(crops_s[w] for w in windows) <= 0:
            continue
        order = sorted(windows, key=lambda w: seeds.of("order", w))
        within = min((s.within_s for s in specs if s.window in windows and s.within_s), default=inf)
        stretch = min(duration_s, within + crops_s[order[-1]])
        room = stretch - sum(crops_s[w] for w in windows)
        if room < -_EPSILON_S:
            starts |= dict.fromkeys(windows[1:])
            continue
        gaps = sorted(seeds.of("window", w) / 2**63 * max(room, 0.0) for w in windows)
        before = seeds.of("stretch", name) / 2**63 * (duration_s - stretch)
        for window, gap in zip(order, gaps, strict=True):
            starts[window] = before + gap
            before += crops_s[window]
    return starts


def _cut(name: str, spec: ViewSpec, start_s: float, duration_s: float, seeds: Seeds) -> Cut:
    end = duration_s if spec.crop_s == 0 else min(duration_s, start_s + spec.crop_s)
    return Cut(name, spec, start_s, max(end, start_s), seeds.of(name))


def passes(cuts: Mapping[str, Cut]) -> tuple[tuple[Need, ...], dict[str, int]]:
    """One pass for each audio rate and each picture size; an audio pass rides on a video pass."""
    audio: dict[int, list[Cut]] = {}
    video: dict[int, list[Cut]] = {}
    for cut in cuts.values():
        if cut.spec.modality == "audio" and cut.spec.codes is None:
            audio.setdefault(cut.spec.hz, []).append(cut)
        elif cut.spec.modality == "video":
            video.setdefault(decode_side(cut.spec), []).append(cut)
    rates, sides = list(audio), list(video)
    needs: list[Need] = []
    pass_of: dict[str, int] = {}
    for i in range(max(len(rates), len(sides))):
        sounds = audio[rates[i]] if i < len(rates) else []
        pictures = video[sides[i]] if i < len(sides) else []
        needs.append(_need(sounds, pictures))
        pass_of.update({cut.name: i for cut in (*sounds, *pictures)})
    return tuple(needs), pass_of


def _need(sounds: Sequence[Cut], pictures: Sequence[Cut]) -> Need:
    times = sorted({t for cut in pictures for t in cut.frame_times_s})
    return Need(
        audio_hz=sounds[0].spec.hz if sounds else 0,
        audio_start_s=min((c.start_s for c in sounds), default=0.0),
        audio_end_s=max((c.end_s for c in sounds), default=0.0),
        frame_times_s=tuple(times),
        short_side=decode_side(pictures[0].spec) if pictures else 0,
    )


def decode_side(spec: ViewSpec) -> int:
    """Short side to decode a view at; a random resized crop needs the stored pixels."""
    kinds = {augment.kind for augment in spec.augment}
    return 0 if "random_resized_crop" in kinds else spec.size
