"""What the pages ask for: results of a search, videos under score maps, the map of the corpus."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from mmssl.data.samples import Record
from mmssl.demos import film
from mmssl.demos.localize import Heat, heat_of, loudness
from mmssl.demos.web import fragments, media
from mmssl.demos.web.fragments import Point, Source
from mmssl.embed.model import EmbeddingModel
from mmssl.index.corpus import PLACE, picture_of, record_of
from mmssl.index.search import Query, SearchSpec, search
from mmssl.index.store import Index
from mmssl.specs import FramesSpec
from mmssl.types import MODALITIES, UserError

Told = Callable[[float, str], object]  # the share that is done, and what is being done

_KEPT, _KEPT_BYTES = 200, 2**31  # files that pages may show at a time
_POINTS = 1000  # of a modality on the map


class Shelf:
    """Files for the browser in a folder; of many the ones that were not asked for longest go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: OrderedDict[str, int] = OrderedDict()  # bytes

    def put(self, found: media.Playable) -> Source:
        """Keep a file; returns where the browser finds it."""
        name = hashlib.sha256(found.data).hexdigest()[:24] + found.ending
        if name not in self._names:
            (self.folder / name).write_bytes(found.data)
        self._names[name] = len(found.data)
        self._names.move_to_end(name)
        while len(self._names) > 1 and (
            len(self._names) > _KEPT or sum(self._names.values()) > _KEPT_BYTES
        ):
            (self.folder / self._names.popitem(last=False)[0]).unlink()
        return Source(f"gradio_api/file={self.folder / name}", found.kind)


class Given(NamedTuple):
    """What is looked for: a text, and paths of uploads."""

    text: str | None
    sound: str | None
    video: str | None
    image: str | None


@dataclass(frozen=True)
class Desk:
    """A model, its index and a shelf. Clips go by ids of their rows.

    name: of the corpus, for the page. max_seconds: of an upload.
    """

    model: EmbeddingModel
    index: Index
    name: str
    shelf: Shelf
    max_seconds: float

    @property
    def held(self) -> dict[str, int]:
        """How many windows of each modality the index holds."""
        counts: Counter[str] = Counter()
        for space, modality in self.index.keys:
            counts[modality] = max(counts[modality], self._count(space, modality))
        return {m: counts[m] for m in MODALITIES if m in counts}

    def _count(self, space: str, modality: str) -> int:
        return int(self.index.table((space, modality)).count_rows())

    def _record(self, row: Mapping[str, Any]) -> Record:
        return record_of(row, self.model.spec.data.max_bytes)

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
        told(0.5, "comparing")
        options = SearchSpec(k=k, modality=",".join(modalities))
        hits = search(self.index, self.model, queries, options, once=True)
        return fragments.results(hits, [self._player(vars(hit)) for hit in hits])

    def _queries(self, given: Given, told: Told) -> Iterator[Query]:
        if given.text and given.text.strip():
            yield {"text": given.text.strip()}
        if given.sound:
            told(0.1, "listening")
            yield {"audio": media.checked(given.sound, ["audio"], self.max_seconds)}
        if given.video:
            told(0.2, "watching")
            yield {"video": media.checked(given.video, ["video"], self.max_seconds)}
        if given.image:
            told(0.3, "looking")
            if not self.sees_stills:
                raise UserError(
                    "this model reads only what moves, so a picture tells it nothing; "
                    "give a video, or a run whose video tower reads colours"
                )
            try:
                yield {"video": picture_of(Path(given.image))}
            except ValueError as error:
                name = Path(given.image).name
                raise UserError(f"{name}: cannot be read as a picture ({error})") from error

    def _player(self, row: Mapping[str, Any]) -> str:
        """The clip of a row at its time; of one that cannot be played its picture and why."""
        try:
            found = media.playable(self._record(row))
        except UserError as error:
            return fragments.missing(row["thumbnail"], str(error))
        if found is None:
            return ""
        return fragments.player(self.shelf.put(found), row["start_s"], row["end_s"])

    # ------------------------------------------------------------ localize

    def choices(self, modality: str, most: int = 200) -> list[tuple[str, str]]:
        """(caption, id) of some clips with a modality, for a menu."""
        key = next((key for key in self.index.keys if key[1] == modality), None)
        if key is None:
            return []
        firsts = self.index.table(key).search().where("start_s = 0")
        rows = firsts.select(["id", "key", "caption"]).limit(most).to_list()
        return [
            (f"{n}. {row['caption'] or row['key']}", row["id"]) for n, row in enumerate(rows, 1)
        ]

    def localize(
        self, video: str | None, clip: str | None, sound: str | None, other: str | None, told: Told
    ) -> str:
        """A video under its score maps.

        With another sound the colours keep the scale of the video's own, so that heat that fades
        is seen to fade.

        Args:
            video: path of an upload; goes before `clip`.
            clip: id of a row of the index.
            sound: path of an upload whose sound replaces the video's; goes before `other`.
            other: id of a row whose clip's sound does.
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
        record = self._clip(clip)
        if not may_be_mute and "audio" not in record.has:
            raise UserError(f"{record.key}: has no sound; choose a sound, too")
        return record

    def _clip(self, clip: str) -> Record:
        return self._record(self.index.row(clip, PLACE))

    def _sound(self, path: str | None, clip: str | None) -> bytes | None:
        """A file with the sound that was chosen."""
        if path:
            return media.checked(path, ["audio"], self.max_seconds)
        if clip is None:
            return None
        record = self._clip(clip)
        return record.video if record.sound is None else record.sound

    # ------------------------------------------------------------ explore

    @property
    def spaces(self) -> list[str]:
        """Those of the map, the one with the most modalities first."""
        default = self.model.default_space
        return sorted(self.index.record.spaces, key=lambda name: name != default)

    def explore(
        self, space: str, modalities: Sequence[str], centred: bool, words: str | None
    ) -> tuple[str, str]:
        """The map of the corpus, of large ones of an even sample, and what its colours mean.

        Raises:
            UserError: no point is left.
        """
        inside = self.index.record.spaces[space]
        chosen = [m for m in MODALITIES if m in inside and m in modalities]
        columns = Point._fields
        rows = [r for m in chosen for r in self.index.sample((space, m), columns, _POINTS)]
        points = [Point(**row) for row in rows]
        if not points:
            raise UserError(f"nothing of the corpus is in {space}: choose more modalities")
        counts = Counter(p.modality for p in points)
        drawn = fragments.corpus_map(points, fragments.principal(points, centred), words)
        return drawn, fragments.legend(counts, {m: self._count(space, m) for m in counts})

    def shown(self, point: str) -> str:
        """The clip of a point of the map with its caption.

        Raises:
            UserError: the index does not hold it any more.
        """
        columns = (*PLACE, "start_s", "end_s", "caption", "thumbnail")
        row = self.index.row(point, columns)
        span = fragments.span(row["start_s"], row["end_s"])
        told = " · ".join(part for part in (row["caption"], span) if part)
        return (
            f'<div class="mmssl-player">{self._player(row)}'
            f'<p class="mmssl-caption">{escape(told)}</p></div>'
        )


def _pictures(record: Record) -> bytes:
    if record.video is None:
        raise UserError(f"{record.key}: has no pictures; choose a clip with a video")
    if media.is_still(record.video):
        raise UserError(f"{record.key}: is a picture; choose a clip with a video")
    return record.video


def _needed(found: media.Playable | None) -> media.Playable:
    assert found is not None  # a film has media
    return found
