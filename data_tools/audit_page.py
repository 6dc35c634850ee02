"""The page of an audit: numbers, distributions, and sheets of clips to look at.

Letters in shapes: T frames, H rows, W columns, C colours.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_tools.audit_source import Source
from data_tools.audit_summary import FLAGS, NUMBERS, Duplicates
from mmssl.data.decode import ClipReader
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.samples import Record
from mmssl.eval import pictures
from mmssl.files import whole_file
from mmssl.types import Sample
from mmssl.views.plan import Need

_RANDOM, _EACH, _TWINS = 12, 8, 8  # clips of a sheet, pairs of duplicates
_SIDE, _WIDTH, _SOUND = 90, 480, 70  # pixels: frames, a card, a spectrogram
_HZ = 16_000
_SHOWN_S = 20.0  # of the sound


class _Extremes(Protocol):
    def numbers(self, name: str) -> list[int]: ...


@dataclass(frozen=True)
class Sheets:
    """What the sheets are chosen from; see `audit`."""

    source: Source
    read: Callable[[Sequence[int]], Iterator[dict[str, Any]]]
    numbers: Sequence[int]
    flags: Mapping[int, Sequence[str]]
    twins: Duplicates
    extremes: _Extremes
    guarded: Callable[[Callable[..., Any]], Any]


def write(tree: Mapping[str, Any], sheets: Sheets, path: Path) -> None:
    """Write the page of the numbers in audit.json; clips that it shows are read again."""
    child = sheets.guarded(preview)
    try:
        show = _Cards(sheets, child)
        parts = [
            _header(tree),
            _tiles(tree),
            _flag_table(tree),
            _plots(tree["numbers"]),
            _kind_tables(tree),
            _captions(tree["captions"]),
            *_sheets(sheets, show),
        ]
    finally:
        child.close()
    text = pictures.page(f"Audit of {tree['data']}", parts)
    with whole_file(path) as partial:
        partial.write_bytes(text.encode(errors="backslashreplace"))


# ---------------------------------------------------------------- numbers


def _header(tree: Mapping[str, Any]) -> str:
    line = f"{tree['clips']:,} of {tree['of']:,} clips · {escape(str(tree['data']))}"
    return f'<header><h1>Audit</h1><p class="dim">{line}</p></header>'


def _tiles(tree: Mapping[str, Any]) -> str:
    hours = tree["hours"]
    shown = [
        (f"{tree['clips']:,}", "clips"),
        (f"{hours['video']:,.2f}", "hours of video"),
        (f"{hours['audio']:,.2f}", "hours of audio"),
        (f"{tree['captions']['n']:,}", "captions"),
        (f"{sum(tree['damaged'].values()):,}", "cannot be read"),
        (f"{tree['dropped']['n']:,}", f"to drop ({', '.join(tree['dropped']['flags'])})"),
    ]
    tiles = (f'<div class="tile"><b>{n}</b><span>{escape(t)}</span></div>' for n, t in shown)
    columns = "grid-template-columns:repeat(auto-fit,minmax(150px,1fr))"
    return f'<div class="tiles" style="{columns}">{"".join(tiles)}</div>'


def _flag_table(tree: Mapping[str, Any]) -> str:
    n = max(1, tree["clips"])
    rows = "".join(
        f'<tr><td><b>{name}</b></td><td>{escape(FLAGS[name][0])}</td><td class="n">{count:,}</td>'
        f'<td class="n">{100 * count / n:.2f} %</td><td>{_bar(count / n)}</td></tr>'
        for name, count in tree["flags"].items()
    )
    twins = tree["duplicates"]
    text = " · ".join(
        f"{title}: {twins[kind]['groups']:,} groups with {twins[kind]['copies']:,} copies"
        for kind, title in (
            ("clips", "same clip"),
            ("video", "same pictures"),
            ("audio", "same sound"),
        )
    )
    return (
        '<section><h2>Flags</h2><div class="wide"><table><tr><th>flag</th><th>meaning</th>'
        f'<th class="n">clips</th><th class="n">share</th><th></th></tr>{rows}</table></div>'
        f'<p class="small dim" style="margin:12px 0 0">{text}</p></section>'
    )


def _bar(share: float) -> str:
    return f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>'


def _plots(numbers: Mapping[str, Any]) -> str:
    drawn = "".join(
        f"<figure>{pictures.histogram(**numbers[name]['histogram'], title=title)}<figcaption>"
        f"{unit}; n {numbers[name]['n']:,}, median {numbers[name]['median']:.4g}, "
        f"{numbers[name]['min']:.4g} to {numbers[name]['max']:.4g}</figcaption></figure>"
        for name, (title, unit) in NUMBERS.items()
        if name in numbers
    )
    note = "The first and the last bar hold what lies beyond the 0.5 and 99.5 % quantiles, too."
    return (
        f'<section><h2>Distributions</h2><p class="dim">{note}</p><div class="curves">{drawn}</div>'
        "</section>"
    )


def _kind_tables(tree: Mapping[str, Any]) -> str:
    tables = [_counts("modalities", tree["presence"]), _counts("damage", tree["damaged"])]
    for name, kinds in tree["kinds"].items():
        others = {"others": kinds["others"]} if kinds["others"] else {}
        tables.append(_counts(name.replace("_", " "), {**kinds["counts"], **others}))
    return f'<section><h2>Kinds</h2><div class="cols">{"".join(tables)}</div></section>'


def _counts(title: str, counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    total = sum(counts.values())
    rows = "".join(
        f'<tr><td>{escape(str(kind))}</td><td class="n">{n:,}</td>'
        f'<td class="n">{100 * n / total:.1f} %</td></tr>'
        for kind, n in list(counts.items())[:12]
    )
    return f"<div><h3>{escape(title)}</h3><table>{rows}</table></div>"


def _captions(found: Mapping[str, Any]) -> str:
    if not found["n"]:
        return ""
    facts = {
        "captions": f"{found['n']:,}; {found['clips_without']:,} clips have none",
        "empty": f"{100 * found['empty_share']:.2f} %",
        "equal to an earlier one": f"{100 * found['repeated_share']:.2f} %",
        "words": f"{found['words']:,}, {found['vocabulary']:,} different, of which "
        f"{found['words_seen_once']:,} occur once",
        "scripts": ", ".join(f"{name} {n:,}" for name, n in found["scripts"].items()) or "none",
        "commonest words": ", ".join(f"{word} {n:,}" for word, n in found["commonest"].items()),
    }
    rows = "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f"<section><h2>Captions</h2><dl>{rows}</dl></section>"


# ---------------------------------------------------------------- clips


def _sheets(sheets: Sheets, show: _Cards) -> Iterator[str]:
    rng = random.Random(0)
    drawn = sorted(rng.sample(list(sheets.numbers), min(_RANDOM, len(sheets.numbers))))
    yield _sheet("Random clips", drawn, show)
    for name, (meaning, _) in FLAGS.items():
        if name == "duplicate":
            continue
        flagged = [n for n, found in sheets.flags.items() if name in found]
        chosen = sorted(rng.sample(flagged, min(_EACH, len(flagged))))
        title = f"{name.capitalize()}: {meaning}" + (
            f" ({len(flagged):,} clips)" if flagged else ""
        )
        yield _sheet(title, chosen, show)
    pairs = [n for group in sheets.twins.clips[:_TWINS] for n in group[:2]]
    yield _sheet("Duplicates, first of each pair before its copy", pairs, show)
    yield _sheet("The quietest", sheets.extremes.numbers("quiet"), show)
    yield _sheet("The loudest", sheets.extremes.numbers("loud"), show)


def _sheet(title: str, numbers: Sequence[int], show: _Cards) -> str:
    if not numbers:
        return ""
    cards = "".join(show(numbers))
    return f'<section><h2>{escape(title)}</h2><div class="sheet">{cards}</div></section>'


class _Cards:
    """Reads clips again and draws them; each is drawn once, however many sheets show it."""

    def __init__(self, sheets: Sheets, child: Callable[[Sample], Any]) -> None:
        self._sheets, self._child = sheets, child
        self._drawn: dict[int, str] = {}

    def __call__(self, numbers: Sequence[int]) -> Iterator[str]:
        for clip in self._sheets.read(numbers):
            number = clip["number"]
            if number not in self._drawn:
                self._drawn[number] = f"<figure>{self._picture(clip)}{_text(clip)}</figure>"
            yield self._drawn[number]

    def _picture(self, clip: Mapping[str, Any]) -> str:
        if "reason" in clip or not {"audio", "video"} & set(clip["has"]):
            return f'<div class="none">{"damaged" if "reason" in clip else "no media"}</div>'
        try:
            sample = self._sheets.source.item(clip["number"]).sample()
            sample.fields["has"] = " ".join(clip["has"]).encode()
            shown = self._child(sample)
        except DamagedSampleError as error:  # since it was measured
            return f'<div class="none">{escape(str(error))}</div>'
        return "".join(f'<img alt="" src="{uri}">' for uri in shown)


def _text(clip: Mapping[str, Any]) -> str:
    lines = [f"<b>{escape(str(clip.get('key', clip['where']))[-60:])}</b>"]
    if "reason" in clip:
        lines.append(escape(f"{clip['reason']}: {clip['message'][-160:]}"))
    facts = [
        f"{clip[name]:{form}} {unit}"
        for name, form, unit in (
            ("duration_s", ".4g", "s"),
            ("loudness_lufs", ".1f", "LUFS"),
            ("motion", ".2f", "motion"),
            ("av_offset_s", "+.3f", "s offset"),
        )
        if clip.get(name) is not None
    ]
    lines += [escape(" · ".join(facts))] if facts else []
    lines += [escape(caption[:90]) for caption in clip.get("captions", [])[:1]]
    return f"<figcaption>{'<br>'.join(lines)}</figcaption>"


def preview(sample: Sample) -> list[str]:
    """Pictures of a clip as `data:` addresses: three frames side by side, a spectrogram.

    Raises:
        DamagedSampleError: it cannot be decoded.
    """
    job = json.loads(sample.fields["job"])
    has = frozenset(sample.fields["has"].decode().split()) & {"audio", "video"}
    media = (sample.fields.get("video"), sample.fields.get("sound"))
    record = Record(sample.key, "", 0, has, (), {}, *media)
    with ClipReader(record) as reader:
        end_s = min(job["end"] or reader.duration_s, reader.duration_s)
        length_s = end_s - job["start"]
        times = tuple(job["start"] + length_s * k / 6 for k in (1, 3, 5)) if "video" in has else ()
        sound = _HZ if "audio" in has else 0
        heard_s = min(end_s, job["start"] + _SHOWN_S)
        clip = reader.clip(Need(sound, job["start"], heard_s, times, _SIDE))
    shown = []
    if clip.frames is not None:
        frames = clip.frames.numpy()
        strip_HWC = np.concatenate([frames[min(k, len(frames) - 1)] for k in range(3)], axis=1)
        height = round(strip_HWC.shape[0] * _WIDTH / strip_HWC.shape[1])
        shown.append(pictures.data_uri(pictures.resized(strip_HWC, (_WIDTH, height)), 75))
    if clip.waveform is not None:
        from mmssl.eval.album import spectrogram

        levels_FT = spectrogram(clip.waveform[0], _HZ)
        if clip.waveform.abs().max() < 1e-3:  # its levels are those of its own maximum
            levels_FT[:] = 0
        shown.append(pictures.data_uri(pictures.spectrum(levels_FT, (_WIDTH, _SOUND)), 75))
    return shown
