"""What the pages ask for: results of a search, videos under score maps, the map of the corpus."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import NamedTuple

from mmssl.data.samples import Record
from mmssl.demos import film
from mmssl.demos.localize import Heat, heat_of, loudness
from mmssl.demos.web import corpus as corpora
from mmssl.demos.web import fragments, media
from mmssl.demos.web.corpus import Corpus, Query
from mmssl.demos.web.fragments import Source
from mmssl.embed.model import EmbeddingModel
from mmssl.specs.towers import FramesSpec
from mmssl.types import UserError

Told = Callable[[float, str], object]  # the share that is done, and what is being done

_KEPT = 200  # files that pages may show at a time
_STILL_S = 10.0  # length of a picture for models that read whole clips


class Shelf:
    """Files for the browser in a folder; of many the ones that were not asked for longest go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: OrderedDict[str, None] = OrderedDict()

    def put(self, found: media.Playable) -> Source:
        """Keep a file; returns where the browser finds it."""
        name = hashlib.sha256(found.data).hexdigest()[:24] + found.ending
        if name not in self._names:
            (self.folder / name).write_bytes(found.data)
        self._names[name] = None
        self._names.move_to_end(name)
        while len(self._names) > _KEPT:
            (self.folder / self._names.popitem(last=False)[0]).unlink()
        return Source(f"gradio_api/file={self.folder / name}", found.is_film)


class Given(NamedTuple):
    """What is looked for: a text, and paths of uploads."""

    text: str | None
    sound: str | None
    video: str | None
    image: str | None


@dataclass(frozen=True)
class Desk:
    """A model, a corpus and a shelf; max_seconds: of an upload."""

    model: EmbeddingModel
    corpus: Corpus
    shelf: Shelf
    max_seconds: float

    # ------------------------------------------------------------ search

    @property
    def sees_stills(self) -> bool:
        """Whether the model reads anything of a picture in which nothing moves."""
        fronts = [tower.frontend for tower in self.model.spec.towers.values()]
        return any(
            isinstance(f, FramesSpec) and f.channels in ("rgb", "rgb_motion") for f in fronts
        )

    def search(self, given: Given, modalities: Sequence[str], k: int, told: Told) -> str:
        """Cards of the clips that fit all that is given, best first.

        Raises:
            UserError: nothing is given, or something that cannot be used.
        """
        if not modalities:
            raise UserError("choose what to look in: video, audio or text")
        queries = list(self._queries(given, told))
        if not queries:
            raise UserError("write something, or give a sound, a video or a picture")
        told(0.8, "comparing")
        hits = self.corpus.search(queries, k, modalities)
        return fragments.results(hits, [self.source(hit.key) for hit in hits])

    def _queries(self, given: Given, told: Told) -> Iterator[Query]:
        if given.text and given.text.strip():
            told(0.1, "reading the text")
            yield corpora.query(self.model, "text", given.text)
        if given.sound:
            told(0.2, "listening")
            sound = media.checked(given.sound, ["audio"], self.max_seconds)
            yield corpora.query(self.model, "audio", sound)
        if given.video:
            told(0.4, "watching")
            video = media.checked(given.video, ["video"], self.max_seconds)
            yield corpora.query(self.model, "video", video)
        if given.image:
            told(0.6, "looking")
            if not self.sees_stills:
                raise UserError(
                    "this model reads only what moves, so a picture tells it nothing; "
                    "give a video, or a run whose video tower reads colours"
                )
            crops = [v.crop_s for v in self.model.spec.views.values() if v.modality == "video"]
            still = media.picture(given.image, max(crops) or _STILL_S)
            yield corpora.query(self.model, "video", still)

    def source(self, key: str) -> Source | None:
        """Where the browser finds a clip of the corpus."""
        found = media.playable(self.corpus.record(key))
        return None if found is None else self.shelf.put(found)

    # ------------------------------------------------------------ localize

    def choices(self, modality: str, most: int = 200) -> list[tuple[str, str]]:
        """(caption, key) of the first clips with a modality, for a menu."""
        keys = self.corpus.keys_with(modality)[:most]
        return [(f"{n}. {self.corpus.captions[key] or key}", key) for n, key in enumerate(keys, 1)]

    def localize(
        self, video: str | None, clip: str | None, sound: str | None, other: str | None, told: Told
    ) -> str:
        """A video under its score maps.

        With another sound the colours keep the scale of the video's own, so that heat that fades
        is seen to fade.

        Args:
            video: path of an upload; goes before `clip`.
            clip: key of a clip of the corpus.
            sound: path of an upload whose sound replaces the video's; goes before `other`.
            other: key of a clip whose sound does.
            told: hears of progress.

        Raises:
            UserError: no video, or something that cannot be used.
        """
        told(0.0, "checking")
        swap = self._sound(sound, other)
        own = self._film(video, clip, swap is not None)
        shown = own if swap is None else replace(own, sound=swap)
        ends = None
        if swap is not None and "audio" in own.has:
            ends = film.scale(self._heat(own, lambda done: told(0.45 * done, "own sound")).maps_NHW)
        first = 0.0 if ends is None else 0.45
        found = self._heat(
            shown, lambda done: told(first + (0.9 - first) * done, "places and sound")
        )
        told(0.9, "preparing the video")
        curve_K = loudness(_pictures(shown), Path(own.key), sound=shown.sound)
        source = self.shelf.put(_needed(media.playable(shown)))
        return fragments.stage(source, found, film.levels(found.maps_NHW, ends), curve_K)

    def _heat(self, record: Record, told: Callable[[float], object]) -> Heat:
        model, views = self.model.model, self.model.spec.views
        return heat_of(model, views, _pictures(record), Path(record.key), record.sound, told)

    def _film(self, path: str | None, clip: str | None, may_be_mute: bool) -> Record:
        """A video whose `has` tells whether it has sound."""
        if path:
            wanted = ["video"] if may_be_mute else ["video", "audio"]
            data = media.checked(path, wanted, self.max_seconds)
            has = {"video", "audio"} if media.has_sound(data) else {"video"}
            return Record(Path(path).name, "", 0, frozenset(has), (), {}, data, None)
        if clip is None:
            raise UserError("give a video, or choose a clip of the corpus")
        record = self.corpus.record(clip)
        if not may_be_mute and "audio" not in record.has:
            raise UserError(f"{clip}: has no sound; choose a sound, too")
        return record

    def _sound(self, path: str | None, clip: str | None) -> bytes | None:
        """A file with the sound that was chosen."""
        if path:
            return media.checked(path, ["audio"], self.max_seconds)
        if clip is None:
            return None
        record = self.corpus.record(clip)
        return record.video if record.sound is None else record.sound

    # ------------------------------------------------------------ explore

    @property
    def spaces(self) -> list[str]:
        """Those of the map, the one with the most modalities first."""
        default = self.model.default_space
        return sorted(corpora.trained_spaces(self.model), key=lambda name: name != default)

    def explore(
        self, space: str, modalities: Sequence[str], centred: bool, words: str | None
    ) -> tuple[str, str]:
        """The map of the corpus, and what its colours mean.

        Raises:
            UserError: no point is left.
        """
        points = [p for p in self.corpus.points(space) if p.modality in modalities]
        if not points:
            raise UserError(f"nothing of the corpus is in {space}: choose more modalities")
        counts = Counter(p.modality for p in points)
        drawn = fragments.corpus_map(points, fragments.principal(points, centred), words)
        return drawn, fragments.legend(counts)

    def shown(self, key: str, start_s: float, end_s: float) -> str:
        """A clip of the map with its caption."""
        told = f"{self.corpus.captions[key]} · {fragments.span(start_s, end_s)}".strip(" ·")
        return (
            f'<div class="mmssl-player">{fragments.player(self.source(key), start_s, end_s)}'
            f'<p class="mmssl-caption">{escape(told)}</p></div>'
        )


def _pictures(record: Record) -> bytes:
    if record.video is None:
        raise UserError(f"{record.key}: has no pictures; choose a clip with a video")
    return record.video


def _needed(found: media.Playable | None) -> media.Playable:
    assert found is not None  # a film has media
    return found
