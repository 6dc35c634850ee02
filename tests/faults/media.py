"""R6: damaged media can neither stop nor poison training.

Files are mutated at random, or made to ask for too much, before they are sealed into samples: the
checksums hold, so that the decoder meets them. Each must end as a row of finite numbers of the
expected shapes, or as a counted sample; the process that reads must live on, and the next good file
must decode as it always did.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults.report import Outcome, collect
from media_files import moving_frames, tone, write_media

from mmssl.data.collate import Item
from mmssl.data.encode import BadSampleGuard, SampleEncoder
from mmssl.data.guarded import encode_guarded
from mmssl.data.integrity import Ledger, Quarantine, seal
from mmssl.data.isolate import DecodeChild
from mmssl.specs import DataSpec, ViewSpec
from mmssl.types import Sample

VIEWS = {
    "audio": ViewSpec(modality="audio", crop_s=0.5),
    "video": ViewSpec(modality="video", crop_s=0.5, fps=8, size=24),
}
STORED = {"video": ViewSpec(modality="video", crop_s=0.5, fps=60, size=0)}
DATA = DataSpec(decode_mb=300)


def run(count: int, seed: int) -> list[Outcome]:
    """Decode `count` mutated files and the crafted ones."""
    return collect("R6", _cases(count, seed))


def _cases(count: int, seed: int) -> Iterator[tuple[str, bool]]:
    random_ = random.Random(seed)
    bases = _bases()
    decode = Decoding(VIEWS)
    try:
        for k in range(count):
            name, data = bases[k % len(bases)]
            what, mutate = list(MUTATIONS.items())[k // len(bases) % len(MUTATIONS)]
            yield what, decode(name, mutate(data, random_), None)
        for what, (name, data, has, reasons) in _crafted().items():
            yield what, decode(name, data, reasons, has)
    finally:
        decode.child.close()
    yield from _hostile_decoders()


class Decoding:
    """Samples through the child, each followed by a good one now and then."""

    def __init__(self, views: dict[str, ViewSpec], work: Any = None, seconds: float = 20.0) -> None:
        encoder = SampleEncoder(views, DATA, 0, None, True)
        self.child = DecodeChild(work or encoder, seconds, DATA.decode_mb)
        self.guard = BadSampleGuard(1.0, Ledger(), Quarantine())
        self.stored = SampleEncoder(STORED, DATA, 0, None, True)
        self.count = 0
        self.good = _sample("mp4", _bases()[0][1], ("audio", "video"))
        self.expected = encoder(self.good) if work is None else None

    def __call__(
        self,
        name: str,
        data: bytes,
        reasons: tuple[str, ...] | None,
        has: tuple[str, ...] = ("audio", "video"),
    ) -> bool:
        """Whether a file ended as it may: with one of the reasons ("" = as a row) if given."""
        sample = _sample(name, data, has, str(self.count))
        self.count += 1
        before = sum(self.guard.ledger.counts.values())
        item = encode_guarded(self.child, self.guard, sample, {})
        found = sum(self.guard.ledger.counts.values()) - before
        held = found == (item is None) and (item is None or _sound(item, has))
        if reasons is not None:
            reason = "" if item else next(iter(self.guard.ledger.fresh()))
            held &= reason in reasons
        self.guard.ledger.fresh()
        if self.expected is not None and self.count % 20 == 0:
            held &= _equal(self.child(self.good), self.expected)
        return held


def _sample(name: str, data: bytes, has: tuple[str, ...], key: str = "good") -> Sample:
    members = {name: data}
    record = {"key": f"k-{key}", "source": "s", "index": 0, "has": list(has), "captions": []}
    return Sample(f"k-{key}", (), {**members, "json": seal(record | {"meta": {}}, members)})


def _sound(item: Item, has: tuple[str, ...]) -> bool:
    audio, video = (item.views.get(name, []) for name in ("audio", "video"))
    return (
        all(0 < len(v.data) <= 8000 and bool(v.data.isfinite().all()) for v in audio)
        and all(v.data.shape[1:] == (24, 24, 3) and len(v.data) > 0 for v in video)
        and len(audio) == ("audio" in has)
        and len(video) == ("video" in has)
    )


def _equal(a: Item, b: Item) -> bool:
    pairs = [(a.views[name][0].data, b.views[name][0].data) for name in b.views]
    return all(torch.equal(x, y) for x, y in pairs)


def _bases() -> list[tuple[str, bytes]]:
    frames, wave = moving_frames(10), tone(1.0, 16000)
    h265 = {"x265-params": "log-level=none:pools=1:frame-threads=1"}
    return [
        ("mp4", write_media(frames, wave)),
        ("mkv", write_media(frames, wave, container="matroska", audio_codec="flac")),
        ("webm", write_media(frames, tone(1.0, 48000), container="webm", rate=48000)),
        (
            "mkv",
            write_media(frames, wave, container="matroska", video_codec="libx265", options=h265),
        ),
        (
            "mp4",
            write_media(frames, np.stack([wave, wave]), options={"g": "4", "bf": "2"}),
        ),
    ]


# --- mutations


def _flips(data: bytes, random_: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(random_.randint(1, 40)):
        out[random_.randrange(len(out))] ^= 1 << random_.randrange(8)
    return bytes(out)


def _noise(data: bytes, random_: random.Random) -> bytes:
    first, size = random_.randrange(len(data)), random_.randint(1, 400)
    return data[:first] + random_.randbytes(size) + data[first + size :]


def _cut(data: bytes, random_: random.Random) -> bytes:
    return data[: random_.randrange(len(data))]


def _splice(data: bytes, random_: random.Random) -> bytes:
    """A stretch is repeated at another place, or left out."""
    a, b = sorted(random_.sample(range(len(data)), 2))
    place = random_.randrange(len(data))
    return (
        data[:a] + data[b:] if random_.random() < 0.5 else data[:place] + data[a:b] + data[place:]
    )


def _number(data: bytes, random_: random.Random) -> bytes:
    """An extreme number where sizes, counts and times of boxes stand."""
    out, first = bytearray(data), random_.randrange(len(data) - 8)
    if random_.random() < 0.5:  # in the header of an mp4, else anywhere
        first = max(0, data.find(b"moov")) + random_.randrange(600)
    number = random_.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, random_.randrange(2**32)])
    out[first : first + 4] = number.to_bytes(4, "big")
    return bytes(out)


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "media with flipped bits": _flips,
    "media with a stretch of noise": _noise,
    "media cut short": _cut,
    "media with a stretch repeated or missing": _splice,
    "media with extreme numbers": _number,
}


# --- crafted files: (field, bytes, modalities, how it may end)

Crafted = tuple[str, bytes, tuple[str, ...], tuple[str, ...]]


def _crafted() -> dict[str, Crafted]:
    frames, wave = moving_frames(10), tone(1.0, 16000)
    both, pictures, sound = ("audio", "video"), ("video",), ("audio",)
    plain = write_media(frames, wave)
    fast = {"preset": "ultrafast"}
    wide = write_media(np.zeros((1, 4000, 8000, 3), np.uint8), None, options=fast)
    times = {"container": "matroska", "options": {"bf": "0"}}
    return {
        "frames of 8000 x 4000": ("mp4", wide, pictures, ("bomb",)),
        "one frame without duration (0 fps)": (
            "mp4",
            _no_durations(frames[:1]),
            pictures,
            ("", "bomb", "header"),
        ),
        "1200 frames within 14 ms": (
            "mp4",
            write_media(
                moving_frames(1200, 16, 16),
                None,
                times_s=[k / 90_000 for k in range(1200)],
                options={"bf": "0"},
            ),
            pictures,
            ("bomb",),
        ),
        "start before zero": (
            "mkv",
            write_media(frames, wave, container="matroska", video_at=0.2, audio_at=-0.5),
            both,
            ("",),
        ),
        "promised sound is not there": ("mp4", write_media(frames, None), both, ("missing",)),
        "no sound, none promised": ("mp4", write_media(frames, None), pictures, ("",)),
        "variable frame rate": (
            "mkv",
            write_media(frames[:4], None, times_s=[0, 0.01, 0.7, 0.71], **times),
            pictures,
            ("",),
        ),
        "rotated by 90 degrees": ("mp4", write_media(frames, wave, rotation=90), both, ("",)),
        "frames of one pixel": (
            "mkv",
            write_media(
                frames[:, :1, :1],
                None,
                container="matroska",
                video_codec="ffv1",
                pix_fmt="yuv444p",
                options={},
            ),
            pictures,
            ("",),
        ),
        "eleven days between two frames": (
            "mkv",
            write_media(frames[:2], None, times_s=[0, 1e6], **times),
            pictures,
            ("bomb",),
        ),
        "weeks claimed by the header": ("mp4", _claimed(plain), both, ("", "bomb")),
        "text instead of media": ("mp4", b"#EXTM3U\nfile:///etc/passwd\n" * 40, both, ("header",)),
        "playlist that names other files": (
            "mkv",
            b"ffconcat version 1.0\nfile /etc/passwd\n",
            sound,
            ("header",),
        ),
        "empty file": ("wav", b"", sound, ("header",)),
    }


def write_damaged(folder: Path, count: int, seed: int) -> int:
    """Put `count` mutated files and the crafted ones into a folder; returns how many lie there."""
    random_, bases = random.Random(seed), _bases()
    mutations = list(MUTATIONS.values())
    folder.mkdir(exist_ok=True)
    for k in range(count):
        name, data = bases[k % len(bases)]
        mutate = mutations[k // len(bases) % len(mutations)]
        (folder / f"mutated{k:05d}.{name}").write_bytes(mutate(data, random_))
    for k, (name, data, _, _) in enumerate(_crafted().values()):
        (folder / f"crafted{k:02d}.{name}").write_bytes(data)
    return len(list(folder.iterdir()))


def _claimed(data: bytes) -> bytes:
    """An mp4 whose header claims a length of weeks."""
    place = data.index(b"mvhd") + 20
    return data[:place] + (2**31 - 1).to_bytes(4, "big") + data[place + 4 :]


def _no_durations(frames: np.ndarray) -> bytes:
    """An mp4 whose table of durations holds zeros."""
    data = bytearray(write_media(frames, None))
    place = data.index(b"stts") + 12
    data[place + 4 : place + 8] = bytes(4)
    return bytes(data)


# --- decoders that hang, crash or eat memory


def _hang(_: Sample) -> Item:
    re.match(r"(a+)+$", "a" * 60 + "b")  # for years, in C, holding the interpreter's lock
    raise AssertionError


def _sleep(_: Sample) -> Item:
    time.sleep(1e6)
    raise AssertionError


def _crash(_: Sample) -> Item:
    signal.raise_signal(signal.SIGSEGV)
    raise AssertionError


def _exit(_: Sample) -> Item:
    os._exit(0)


def _eat(_: Sample) -> Item:
    return Item("k", "s", 0, [], {}, {"eaten": [bytearray(64 << 20) for _ in range(100)]})


def _hostile_decoders() -> Iterator[tuple[str, bool]]:
    bad = {
        "decoder in an endless loop": (_hang, "timeout", 0.5),
        "decoder asleep": (_sleep, "timeout", 0.5),
        "decoder crashed": (_crash, "crash", 20.0),
        "decoder ended the process": (_exit, "crash", 20.0),
        "decoder took 6 GB": (_eat, "memory", 20.0),
    }
    for what, (work, reason, seconds) in bad.items():
        for _ in range(2):  # the second time in a new child
            decode = Decoding(VIEWS, work, seconds)
            yield what, decode("mp4", b"", (reason,)) and len(decode.guard.quarantine.keys) == 1
            decode.child.close()
    stored = Decoding(STORED)
    large = np.zeros((8, 3072, 4096, 3), np.uint8)
    data = write_media(large, None, fps=60, options={"preset": "ultrafast"})
    # where memory runs out in a thread of the decoder, the process ends
    ends = ("memory", "crash")
    yield "frames of 300 MB in all, as stored", stored("mp4", data, ends, ("video",))
    yield "a good file after that", _equal(stored.child(stored.good), stored.expected)
    stored.child.close()
