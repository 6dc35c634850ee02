"""The files of public corpora as they usually lie on a disk, read into rows of a manifest.

A reader yields one `Clip` for each entry of the corpus' lists, or for each file where the names of
files tell everything. `meta` has what the corpus says beyond that (labels, speaker, fold ...).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

from data_tools.manifest.corpus import Clip, Corpus, rank
from mmssl.data.samples import AUDIO_FIELDS
from mmssl.types import UserError

# How download scripts call the part of a YouTube video from a start to an end in seconds.
_CUTS = (
    *("{id}_{s:06.0f}", "{id}_{s:g}", "{id}_{s:.1f}", "{id}_{s:.3f}", "{id}_{s_ms:.0f}"),
    *("{id}_{s:06.0f}_{e:06.0f}", "{id}_{s:g}_{e:g}", "{id}_{s:.1f}_{e:.1f}"),
    *("{id}_{s:.3f}_{e:.3f}", "{id}_{s_ms:.0f}_{e_ms:.0f}", "Y{id}"),
)
_SPLITS = {"validate": "val"}


def _cuts(video: str, start: str, end: str | float) -> list[str]:
    s, e = float(start), float(end)
    return [name.format(id=video, s=s, e=e, s_ms=1000 * s, e_ms=1000 * e) for name in _CUTS]


def _split(name: str) -> str:
    return _SPLITS.get(name, re.sub(r"[^a-z0-9]+", "_", name.lower()))


def _needed(corpus: Corpus, *patterns: str) -> list[str]:
    """The lists without which a layout cannot be read."""
    found = corpus.lists(*patterns)
    if not found:
        raise UserError(f"{corpus.root}: has no {' or '.join(patterns)}; copy it there")
    return found


# ---------------------------------------------------------------- lists of YouTube's videos


def _audioset(corpus: Corpus) -> Iterator[Clip]:
    names: dict[str, str] = {}
    for path in corpus.lists("class_labels_indices.csv"):
        names |= {row["mid"]: row["display_name"] for row in corpus.csv(path)}
    columns = ("id", "start", "end", "labels")
    for path in _needed(corpus, "*_segments.csv"):
        split = PurePosixPath(path).stem.removesuffix("_segments")
        for row in corpus.csv(path, columns):
            labels = [names.get(mid, mid) for mid in row["labels"].split(",")]
            media = corpus.find(*_cuts(row["id"], row["start"], row["end"]))
            tree = {"source": row["id"], "split": _split(split), "meta": {"labels": labels}}
            yield Clip(f"{row['id']} at {row['start']} s", media, tree)


def _vggsound(corpus: Corpus) -> Iterator[Clip]:
    for path in _needed(corpus, "vggsound.csv"):
        for row in corpus.csv(path, ("id", "start", "label", "split")):
            name = f"{row['id']}_{int(row['start']):06d}"
            meta = {"label": row["label"]}
            tree = {"source": row["id"], "split": _split(row["split"]), "meta": meta}
            yield Clip(name, corpus.find(name), tree)


def _kinetics(corpus: Corpus) -> Iterator[Clip]:
    """Lists, or without any the folders SPLIT/CLASS/file."""
    lists = corpus.lists("*.csv")
    if not lists:
        yield from _named(corpus, "kinetics")
    for path in lists:
        for row in corpus.csv(path):
            if "youtube_id" not in row:  # a list of something else
                break
            video, start, end = (row[name] for name in ("youtube_id", "time_start", "time_end"))
            tree: dict[str, Any] = {"source": video}
            tree["split"] = _split(row.get("split") or PurePosixPath(path).stem)
            tree["meta"] = {"label": row["label"]} if row.get("label") else {}
            name = f"{video}_{int(float(start)):06d}_{int(float(end)):06d}"
            yield Clip(name, corpus.find(*_cuts(video, start, end), video), tree)


def _audiocaps(corpus: Corpus) -> Iterator[Clip]:
    for path in _needed(corpus, "train.csv", "val.csv", "test.csv"):
        captions: dict[tuple[str, str], list[str]] = {}
        for row in corpus.csv(path):
            captions.setdefault((row["youtube_id"], row["start_time"]), []).append(row["caption"])
        for (video, start), texts in captions.items():
            media = corpus.find(*_cuts(video, start, float(start) + 10), video)
            split = PurePosixPath(path).stem
            tree = {"captions": texts, "source": video, "split": split, "language": "en"}
            yield Clip(f"{video} at {start} s", media, tree)


def _howto100m(corpus: Corpus) -> Iterator[Clip]:
    """Whole videos; the phrases of a narration are the words of the transcript."""
    tasks: dict[str, dict[str, str]] = {}
    for path in corpus.lists("HowTo100M_v1.csv"):
        for row in corpus.csv(path):
            tasks[row.pop("video_id")] = row
    for path in _needed(corpus, "raw_caption*.json", "caption.json")[-1:]:
        for video, said in corpus.entries(path):
            times = zip(said["start"], said["end"], said["text"], strict=True)
            words = [[s, max(s, e), w] for s, e, w in times if isinstance(w, str) and w.strip()]
            tree: dict[str, Any] = {"source": video, "meta": tasks.get(video, {})}
            tree |= {"transcript": {"words": words}} if words else {}
            yield Clip(video, corpus.find(video), tree | {"language": "en"})


# ---------------------------------------------------------------- captions


def _msrvtt(corpus: Corpus) -> Iterator[Clip]:
    seen: set[str] = set()
    for path in _needed(corpus, "*videodatainfo*.json", "MSRVTT_data.json"):
        tree = json.loads((corpus.root / path).read_bytes())
        captions: dict[str, list[str]] = {}
        for sentence in tree["sentences"]:
            captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
        for video in tree["videos"]:
            name = video["video_id"]
            if name in seen:  # a list of all beside the lists of the splits
                continue
            seen.add(name)
            found = parse_qs(urlsplit(video.get("url", "")).query).get("v", [name])
            yield Clip(
                name,
                corpus.find(name),
                {
                    "captions": captions.get(name, []),
                    "source": found[0],  # clips of one video stay together
                    "split": _split(video["split"]),
                    "language": "en",
                    "meta": {"category": video["category"]} if "category" in video else {},
                },
            )


def _clotho(corpus: Corpus) -> Iterator[Clip]:
    for path in _needed(corpus, "clotho_captions_*.csv"):
        split = PurePosixPath(path).stem.removeprefix("clotho_captions_")
        known: dict[str, dict[str, str]] = {}
        for beside in corpus.lists(f"clotho_metadata_{split}.csv"):
            # Freesound's texts, in the encoding of the distributed lists
            known |= {row["file_name"]: row for row in corpus.csv(beside, encoding="latin-1")}
        for row in corpus.csv(path):
            name = row["file_name"]
            told = known.get(name, {})
            tree: dict[str, Any] = {"captions": [row[f"caption_{k}"] for k in range(1, 6)]}
            known_id = told.get("sound_id", "").strip()  # or "Not found"
            tree["source"] = known_id if known_id.isdigit() else PurePosixPath(name).stem
            tree |= {"split": split, "language": "en", "meta": {}}
            if told:
                tree |= {"licence": told["license"]}
                tree["meta"] = {"keywords": told["keywords"].split(";")}
            yield Clip(name, corpus.find(PurePosixPath(name).stem, within=split), tree)


def _librispeech(corpus: Corpus) -> Iterator[Clip]:
    for path in _needed(corpus, "*.trans.txt"):
        part, speaker, chapter, _ = PurePosixPath(corpus.root.resolve().name, path).parts[-4:]
        for line in (corpus.root / path).read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            tree: dict[str, Any] = {"caption": text, "source": f"{speaker}-{chapter}"}
            tree |= {"split": _split(part), "language": "en"}
            tree["meta"] = {"speaker": speaker, "chapter": chapter}
            yield Clip(name, corpus.find(name), tree)


# ---------------------------------------------------------------- names that tell everything


@dataclass(frozen=True)
class _Names:
    """A pattern of the path without suffix; its groups are fields of meta, but for `split`.

    A `word` is the caption, too. source: made of the groups; the default is the path.
    """

    pattern: str
    source: str = ""


_NAMED = {
    "esc": _Names(
        r"(?P<category>\w+)/(?P<fold>\d)-(?P<src_file>\d+)-(?P<take>[A-Z])", "{src_file}"
    ),
    "fsdd": _Names(r"(?P<digit>\d)_(?P<speaker>[a-z]+)_(?P<take>\d+)"),
    "kinetics": _Names(
        r"(?P<split>train|val|test)[^/]*/(?P<label>[^/]+)/(?P<id>.{11})(_\d{6}_\d{6})?", "{id}"
    ),
    "lrw": _Names(r"(?P<word>[A-Z]+)/(?P<split>train|val|test)/(?P=word)_\d+"),
    "voxceleb": _Names(
        r"(?P<speaker>id\d{5})/(?P<video>[^/]+)/(?P<utterance>\d+)", "{speaker}/{video}"
    ),
}


def _named(corpus: Corpus, layout: str) -> Iterator[Clip]:
    for path in corpus.media:
        if clip := _of_name(_NAMED[layout], path):
            yield clip


def _of_name(names: _Names, path: str) -> Clip | None:
    stem = str(PurePosixPath(path).with_suffix(""))
    match = re.fullmatch(rf"(?:.*/)?{names.pattern}", stem)
    if match is None:
        return None
    meta = match.groupdict()
    tree: dict[str, Any] = {"source": names.source.format(**meta) or stem}
    tree |= {"split": _split(meta.pop("split"))} if "split" in meta else {}
    tree |= {"caption": meta["word"], "language": "en"} if "word" in meta else {}
    return Clip(stem, (path,), tree | {"meta": meta})


def _fsdd(corpus: Corpus) -> Iterator[Clip]:
    """The corpus' own split: takes 0 to 4 of each speaker and digit are the test."""
    for clip in _named(corpus, "fsdd"):
        split = "test" if int(clip.row["meta"]["take"]) < 5 else "train"
        yield replace(clip, row=clip.row | {"split": split})


def _voxceleb(corpus: Corpus) -> Iterator[Clip]:
    """Utterances; where a video and a sound lie in folders of their own, they are joined."""
    found: dict[tuple[str, ...], list[tuple[int, Clip]]] = {}
    for path in corpus.media:
        if clip := _of_name(_NAMED["voxceleb"], path):
            parts = re.findall(r"(?:^|[/_])(dev|test)(?=[/_])", path)[:1]
            clip = replace(clip, row=clip.row | ({"split": parts[0]} if parts else {}))
            key = (*parts, *clip.name.split("/")[-3:])
            found.setdefault(key, []).append((rank(path), clip))
    for ranked in found.values():
        first, *others = (clip for _, clip in sorted(ranked, key=lambda pair: pair[0]))
        yield replace(first, sound=others[0].media[0]) if others else first


def _esc(corpus: Corpus, ten: bool) -> Iterator[Clip]:
    """The list of ESC-50, or without it the folders CLASS/FOLD-SOURCE-TAKE."""
    lists = corpus.lists("esc50.csv")
    if not lists:
        yield from _named(corpus, "esc")
    for path in lists:
        for row in corpus.csv(path):
            if ten and row["esc10"] != "True":
                continue
            name = row["filename"]
            media = corpus.find(PurePosixPath(name).stem)
            meta = {field: row[field] for field in ("category", "fold", "src_file", "take")}
            yield Clip(name, media, {"source": row["src_file"], "meta": meta})


def _flickr(corpus: Corpus) -> Iterator[Clip]:
    """Videos, or sounds and pictures of one name: frames/ID.jpg, frames/ID/*.jpg, Data/ID/*."""
    pictures: dict[str, list[str]] = {}
    for path in corpus.pictures:
        for name in {PurePosixPath(path).stem, PurePosixPath(path).parent.name}:
            pictures.setdefault(name, []).append(path)
    for path in corpus.media:
        place = PurePosixPath(path)
        if corpus.find(place.stem) != (path,):
            continue  # the sound of a video that is there, too
        tree = {"source": place.stem}
        if place.suffix.lower()[1:] not in AUDIO_FIELDS:
            yield Clip(place.stem, (path,), tree)
            continue
        own = pictures.get(place.stem) or pictures.get(place.parent.name, [])
        yield Clip(place.stem, tuple(sorted(own, key=_natural)), tree, path)


def _natural(path: str) -> list[tuple[str, int]]:
    """Sorts picture 2 before picture 10."""
    return [(word, int(number or 0)) for word, number in re.findall(r"(\D*)(\d*)", path)]


LAYOUTS: dict[str, Callable[[Corpus], Iterator[Clip]]] = {
    "audiocaps": _audiocaps,
    "audioset": _audioset,
    "clotho": _clotho,
    "esc10": partial(_esc, ten=True),
    "esc50": partial(_esc, ten=False),
    "flickr_soundnet": _flickr,
    "fsdd": _fsdd,
    "howto100m": _howto100m,
    "kinetics": _kinetics,
    "librispeech": _librispeech,
    "lrw": partial(_named, layout="lrw"),
    "msrvtt": _msrvtt,
    "vggsound": _vggsound,
    "voxceleb": _voxceleb,
}
