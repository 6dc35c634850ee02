"""What the measurements of all clips amount to: flags, duplicates, distributions."""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_tools.near import cosine, groups, near_pairs

Clip = Mapping[str, Any]

# name -> (title, unit); what is drawn
NUMBERS = {
    "duration_s": ("duration", "s"),
    "megabytes": ("size", "MB"),
    "fps": ("frame rate", "frames/s"),
    "loudness_lufs": ("integrated loudness", "LUFS"),
    "peak_dbfs": ("sample peak", "dBFS"),
    "silence_share": ("digital silence", "share of samples"),
    "clipped_share": ("clipping", "share of samples"),
    "motion": ("motion: mean absolute frame difference", "levels of 255"),
    "still_share": ("frames that equal the one before", "share"),
    "black_share": ("black frames", "share"),
    "start_gap_s": ("audio starts after video", "s"),
    "av_offset_s": ("sound late by, where measurable", "s"),
    "caption_words": ("words of a caption", "words"),
}
KINDS = (
    *("part", "container", "video_codec", "audio_codec", "channels", "pix_fmt"),
    *("size", "rate", "language", "licence"),
)
_BINS = 40
_MANY = 30  # rows of a table of kinds, groups of duplicates that are listed
_WORD = re.compile(r"\w+")

# Cosines of codes. Of 400 clips of ESC-10, 5 s each, 95 % of AAC and MP3 copies at half the gain
# reach 0.98 and 99 % of the others' nearest neighbours stay below 0.955. Codecs pad clips of less
# than a second by so much of their length that copies may be missed.
SAME_SOUND, SAME_PICTURES = 0.98, 0.97
_LEAST = {"audio_code": SAME_SOUND, "video_code": SAME_PICTURES}
_SLACK = 0.01  # the cosine of joint codes weights the two by their norms
_LONGER_S, _LONGER = 0.15, 0.02  # by which copies may differ in length


def flags_of(clip: Clip) -> list[str]:
    """What stands out about a clip by itself; `FLAGS` says what each means."""
    return [name for name, (_, test) in FLAGS.items() if test is not None and test(clip)]


def _silent(clip: Clip) -> bool:
    if "silence_share" not in clip:
        return False
    peak = clip["peak_dbfs"]
    return clip["silence_share"] >= 0.95 or peak is None or bool(peak <= -60)


def _still(clip: Clip) -> bool:
    return "motion" in clip and (clip["still_share"] >= 0.95 or clip["change"] < 12)


FLAGS: dict[str, tuple[str, Callable[[Clip], bool] | None]] = {
    "damaged": ("cannot be read", lambda c: "reason" in c),
    "silent": ("95 % digital silence, or no sample above -60 dBFS", _silent),
    "still": (
        "95 % of the frames equal the one before, or nothing changes by 12 levels of 255",
        _still,
    ),
    "black": ("95 % black frames", lambda c: c.get("black_share", 0) >= 0.95),
    "clipped": ("0.1 % of the samples clipped", lambda c: c.get("clipped_share", 0) > 1e-3),
    "offset": (
        "sound more than 0.125 s early or late (the bound of ITU-R BT.1359 for late sound)",
        lambda c: abs(c.get("av_offset_s", 0)) > 0.125,
    ),
    "duplicate": ("same pictures and sound as an earlier clip", None),
}


# ---------------------------------------------------------------- duplicates


@dataclass
class Duplicates:
    """Clip numbers that share their content, by kind; a clip is one if all it has is shared.

    A flat picture or silence has no content: it neither makes nor hinders a duplicate.
    """

    clips: list[list[int]] = field(default_factory=list)
    audio: list[list[int]] = field(default_factory=list)
    video: list[list[int]] = field(default_factory=list)

    @property
    def first(self) -> dict[int, int]:
        """Number of the copy to number of the clip that is kept."""
        return {copy: group[0] for group in self.clips for copy in group[1:]}


def find_duplicates(clips: Iterable[Clip]) -> Duplicates:
    """Near duplicates; memory grows with the codes."""
    numbers: list[int] = []
    lengths = array("d")
    codes: dict[str, list[str]] = {"audio_code": [], "video_code": []}
    for clip in clips:
        numbers.append(clip["number"])
        lengths.append(clip.get("duration_s", 0.0))
        for name, column in codes.items():
            column.append(clip.get(name, ""))
    everything = range(len(numbers))
    kinds = {}
    for name, least in _LEAST.items():
        there = [i for i in everything if codes[name][i]]
        kinds[name] = groups(len(numbers), _pairs(codes[name], there, lengths, least))
    found = groups(len(numbers), _same_clips(codes, kinds, lengths)), *kinds.values()
    return Duplicates(*([[numbers[i] for i in group] for group in kind] for kind in found))


def _same_clips(
    codes: Mapping[str, list[str]], kinds: Mapping[str, list[list[int]]], lengths: Sequence[float]
) -> list[tuple[int, int]]:
    """Pairs that have the same modalities, and in all of them the same content.

    Looked for once more among the clips that share something: the pairs of a modality join each
    to a few others only, which may be those that differ in the other modality.
    """
    shared = {name: {i for group in found for i in group} for name, found in kinds.items()}
    pairs = []
    for names in (("audio_code", "video_code"), ("audio_code",), ("video_code",)):
        others = codes.keys() - set(names)
        there = [
            i
            for i in sorted(set.intersection(*(shared[name] for name in names)))
            if not any(codes[name][i] for name in others)
        ]
        joint = {i: "".join(codes[name][i] for name in names) for i in there}
        least = min(_LEAST[name] for name in names) - _SLACK
        pairs += [
            (a, b)
            for a, b in _pairs(joint, there, lengths, least)
            if all(cosine(codes[name][a], codes[name][b]) >= _LEAST[name] for name in names)
        ]
    return pairs


def _pairs(
    codes: Mapping[int, str] | Sequence[str],
    there: Sequence[int],
    lengths: Sequence[float],
    least: float,
) -> list[tuple[int, int]]:
    """Pairs of about the same length, which are found by their codes."""
    there = sorted(there, key=lengths.__getitem__)  # of equal codes, neighbours are joined
    pairs = ((there[a], there[b]) for a, b in near_pairs([codes[i] for i in there], least))
    return [
        (a, b)
        for a, b in pairs
        if abs(lengths[a] - lengths[b]) <= _LONGER_S + _LONGER * max(lengths[a], lengths[b])
    ]


# ---------------------------------------------------------------- distributions


class Collected:
    """Takes in clips one by one; keeps a number per clip and measurement, and counts."""

    def __init__(self) -> None:
        self.clips = 0
        self.seconds = {"audio": 0.0, "video": 0.0}
        self.reasons: Counter[str] = Counter()
        self.presence: Counter[str] = Counter()
        self.flags: Counter[str] = Counter()
        self._numbers = {name: array("d") for name in NUMBERS}
        self._kinds: dict[str, Counter[str]] = {name: Counter() for name in KINDS}
        self._captions = _Captions()

    def add(self, clip: Clip, flags: Sequence[str]) -> None:
        """Take in a clip."""
        self.clips += 1
        self.flags.update(flags)
        if "reason" in clip:
            self.reasons[clip["reason"]] += 1
            return
        self.presence[" + ".join(clip["has"]) or "nothing"] += 1
        for modality, total in self.seconds.items():
            if modality in clip["has"]:
                self.seconds[modality] = total + clip["duration_s"]
        clip = {**clip, "megabytes": clip["bytes"] / 1e6}
        for name, values in self._numbers.items():
            if clip.get(name) is not None:
                values.append(clip[name])
        size = f"{clip['width']} x {clip['height']}" if "width" in clip else None
        for name, counts in self._kinds.items():
            value = size if name == "size" else clip.get(name)
            if value not in (None, ""):
                counts[str(value)] += 1
        for caption in clip["captions"]:
            self._numbers["caption_words"].append(self._captions.add(caption))
        self._captions.without += not clip["captions"]

    def summary(self) -> dict[str, Any]:
        """Plain data; every part says of how many clips it is (n)."""
        return {
            "clips": self.clips,
            "hours": {m: s / 3600 for m, s in self.seconds.items()},
            "damaged": dict(self.reasons.most_common()),
            "presence": dict(self.presence.most_common()),
            "flags": {name: self.flags[name] for name in FLAGS},
            "numbers": {k: _distribution(v) for k, v in self._numbers.items() if v},
            "kinds": {k: _kinds(v) for k, v in self._kinds.items() if v},
            "captions": self._captions.summary(),
        }


def _distribution(values: Sequence[float]) -> dict[str, Any]:
    """Quantiles, and a histogram whose ends hold what lies beyond the 0.5 and 99.5 % quantiles."""
    x = np.asarray(values, np.float64)
    names = ("min", "p1", "p5", "p25", "median", "p75", "p95", "p99", "max")
    shares = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
    low, high = np.quantile(x, (0.005, 0.995))
    span = (low, high if high > low else low + 1)
    counts, edges = np.histogram(np.clip(x, low, high), _BINS, span)
    found = dict(zip(names, np.quantile(x, shares).tolist(), strict=True))
    histogram = {"edges": edges.tolist(), "counts": counts.tolist()}
    return {"n": len(x), "mean": float(x.mean()), **found, "histogram": histogram}


def _kinds(counts: Counter[str]) -> dict[str, Any]:
    top = counts.most_common(_MANY)
    rest = counts.total() - sum(n for _, n in top)
    return {"n": counts.total(), "kinds": len(counts), "counts": dict(top), "others": rest}


class _Captions:
    """Statistics of captions; a script is that of most letters."""

    def __init__(self) -> None:
        self.count = self.empty = self.words = self.repeated = self.without = 0
        self._seen: set[int] = set()
        self._vocabulary: Counter[str] = Counter()
        self._scripts: Counter[str] = Counter()

    def add(self, caption: str) -> int:
        """Take in a caption; returns its number of words."""
        words = _WORD.findall(caption.lower())
        self.count += 1
        self.empty += not words
        self.words += len(words)
        self._vocabulary.update(words)
        digest = hash(" ".join(words))
        self.repeated += digest in self._seen
        self._seen.add(digest)
        scripts = Counter(_script(c) for c in caption[:1000] if c.isalpha())
        if scripts:
            self._scripts[scripts.most_common(1)[0][0]] += 1
        return len(words)

    def summary(self) -> dict[str, Any]:
        """Shares are of the captions."""
        n = max(1, self.count)
        once = sum(count == 1 for count in self._vocabulary.values())
        return {
            "n": self.count,
            "clips_without": self.without,
            "empty_share": self.empty / n,
            "repeated_share": self.repeated / n,
            "words": self.words,
            "vocabulary": len(self._vocabulary),
            "words_seen_once": once,
            "commonest": dict(self._vocabulary.most_common(_MANY)),
            "scripts": dict(self._scripts.most_common()),
        }


def _script(letter: str) -> str:
    return unicodedata.name(letter, "unknown").split()[0].lower()
