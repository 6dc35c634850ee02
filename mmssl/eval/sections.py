"""The sections of the report, each a piece of HTML made from results and kept pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmssl.eval import pictures, results
from mmssl.eval.album import Album, Example, Shot
from mmssl.eval.results import Results, Target, lookup, number

_PANEL = 300  # pixels of a localization picture
_SHOTS = 8
_POINTS = 300  # of a curve


# --- numbers


def header(found: Results) -> str:
    """Name of the run and what was measured."""
    n = lookup(found, "data.n")
    minutes = lookup(found, "train.minutes")
    facts = [
        f"{n} test clips" if n else "",
        f"{number(minutes, 1)} minutes of training" if minutes else "",
        f"weights: {lookup(found, 'checkpoint.which')}" if found.get("checkpoint") else "",
        f"protocol {found.get('protocol')}, seed {found.get('seed')}",
    ]
    line = escape(" · ".join(fact for fact in facts if fact))
    name = escape(str(lookup(found, "run.name") or "Evaluation"))
    return f'<header><h1>{name}</h1><p class="dim">{line}</p></header>'


_TILES = (
    ("retrieval.audio->video.class_at_1", "right class first, sound to picture", "class_at_1"),
    ("retrieval.audio->video.r_at_10", "own clip in the first 10, sound to picture", "r_at_10"),
    ("retrieval.text->video.class_at_1", "right class first, words to picture", "class_at_1"),
    ("localization.pointing_sounding", "points at the sounding object", ""),
    ("localization.pointing_swapped_audio", "follows another sound to the other object", ""),
)


def tiles(found: Results) -> str:
    """The headline numbers."""
    tiles = []
    for path, title, chance in _TILES:
        value = lookup(found, path)
        if value is None:
            continue
        base = lookup(found, f"{path.rpartition('.')[0]}.chance.{chance}") if chance else None
        if path.startswith("localization"):
            base = lookup(found, "localization.pointing_whole_image")
        note = f"chance {number(base)}" if base is not None else ""
        tiles.append(
            f'<div class="tile"><b>{number(value, 2)}</b><span>{escape(title)}</span>'
            f"<span>{note}</span></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def targets(found: Results) -> str:
    """Every target with its value."""
    known = [t for t in results.TARGETS if lookup(found, t.path) is not None]
    if not known:
        return ""
    rows = "".join(_target_row(found, target) for target in known)
    reached = sum(bool(target.met(found)) for target in known)
    return (
        f"<section><h2>Targets</h2><p class='dim'>{reached} of {len(known)} reached. "
        "The upright line marks the target; brackets hold the 95 % bootstrap interval.</p>"
        '<div class="wide"><table><tr><th>measure</th><th class="n">value</th><th></th>'
        '<th class="n">target</th><th></th><th class="n">random weights</th></tr>'
        f"{rows}</table></div></section>"
    )


def _target_row(found: Results, target: Target) -> str:
    value = lookup(found, target.path)
    parent, _, key = target.path.rpartition(".")
    span = max(1.0, 2 * target.value) if target.value >= 1 else 1.0
    guess = lookup(found, f"random_encoder.{target.path}")
    verdict = '<td class="yes">reached</td>' if target.met(found) else '<td class="no">missed</td>'
    sign = "≥" if target.at_least else "≤"
    shown = _value(lookup(found, parent), key)
    return (
        f'<tr><td>{escape(_arrow(target.title))}</td><td class="n">{shown}</td>'
        f"<td>{_bar(value, span, target.value)}</td>"
        f'<td class="n">{sign} {target.value:g}</td>{verdict}<td class="n">{number(guess)}</td>'
        "</tr>"
    )


def _value(tree: Mapping[str, Any], key: str) -> str:
    bounds = results.interval_of(tree, key)
    note = f"<small>{results.bracketed(bounds)}</small>" if bounds else ""
    return f"{number(tree.get(key))}{note}"


def _bar(value: Any, span: float = 1.0, mark: float | None = None) -> str:
    share = 100 * min(float(value), span) / span if isinstance(value, int | float) else 0.0
    line = "" if mark is None else f'<u style="left:{100 * mark / span:.1f}%"></u>'
    return f'<div class="bar"><i style="width:{share:.1f}%"></i>{line}</div>'


# --- localization


def localization(found: Results, album: Album) -> str:
    """Gallery, pointing table and cIoU."""
    numbers = found.get("localization")
    if not numbers:
        return ""
    rows = "".join(
        f'<tr><td>{escape(title)}</td><td class="n">{_value(numbers, key)}</td>'
        f"<td>{_bar(numbers.get(key))}</td>"
        f'<td class="n">{number(lookup(found, f"random_encoder.localization.{key}"))}</td></tr>'
        for key, title in results.LOCALIZATION_ROWS
    )
    table = (
        '<div class="wide"><table><tr><th>highest cell of the whole map lies …</th>'
        '<th class="n">trained</th><th></th><th class="n">random weights</th></tr>'
        f"{rows}</table></div>"
    )
    return (
        "<section><h2>Where does the sound come from?</h2>"
        f'<p class="dim">{numbers["n"]} clips with two objects, of which one sounds. '
        "The swapped sound belongs to a clip whose sounding object has the class of the silent one "
        f"here ({numbers['n_swapped']} clips have such a partner).</p>"
        f"{_gallery(album)}{table}{_ciou(numbers)}</section>"
    )


def _gallery(album: Album) -> str:
    if not album.shots:
        return ""
    key = (
        '<p class="key small dim"><b style="background:rgb(54,224,122)"></b>sounding object'
        '<b style="background:rgb(255,92,92)"></b>silent object'
        '<b style="background:#fff;border:1px solid #888"></b>highest cell. '
        "The first clips of the test set, not a selection.</p>"
    )
    figures = "".join(_figure(album, own, other) for own, other in album.shots[:_SHOTS])
    return f'{key}<div class="shots">{figures}</div><h3>Every clip, and trivial answers</h3>'


def _figure(album: Album, own: Shot, other: Shot | None) -> str:
    size = (_PANEL, _PANEL)
    frame = pictures.resized(album.clips[own.row].at(own.time_s), size)
    cells = _panel(_boxed(frame, own), f"at {own.time_s:.1f} s")
    cells += _panel(_heated(album, own), f"own sound → {own.hit}")
    if other is not None:
        cells += _panel(_heated(album, other), f"other sound → {other.hit}")
    caption = album.captions.get(own.row, "")
    if other is not None and other.heard in album.captions:
        caption += f" — other sound from: {album.captions[other.heard]}"
    words = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure><div class="trio">{cells}</div>{words}</figure>'


def _panel(picture: pictures.Bytes, text: str) -> str:
    source = pictures.data_uri(picture, 88)
    return f'<div><img alt="{escape(text)}" src="{source}">{escape(text)}</div>'


def _boxed(picture: pictures.Bytes, shot: Shot) -> pictures.Bytes:
    picture = pictures.mark_box(picture, shot.silent, pictures.SILENT)
    return pictures.mark_box(picture, shot.sounding, pictures.SOUNDING)


def _heated(album: Album, shot: Shot) -> pictures.Bytes:
    frame = album.clips[shot.row].at(shot.time_s)
    warm = pictures.overlay(frame, pictures.scaled(shot.map_HW), (_PANEL, _PANEL))
    return pictures.mark_peak(_boxed(warm, shot), shot.map_HW)


def _ciou(numbers: Mapping[str, Any]) -> str:
    table = numbers.get("ciou") or {}
    names = [("model", "model"), ("audio_blind", "averaged audio"), ("center", "centred Gaussian")]
    rows = ""
    for key, title in names:
        if key in table:
            cells = "".join(
                f'<td class="n">{number(table[key][rule]["mean"])}</td>'
                f'<td class="n">{number(table[key][rule]["at_0.5"])}</td>'
                for rule in ("relative", "absolute", "adaptive")
            )
            rows += f"<tr><td>{title}</td>{cells}</tr>"
    if not rows:
        return ""
    head = "".join(f'<th class="n">{r} mean</th><th class="n">≥ 0.5</th>' for r in _RULES)
    whole = number(lookup(table, "whole_image.mean"))
    return (
        "<h3>Consensus IoU of the map at its highest time step, by the rule that cuts the map</h3>"
        f'<div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'
        f'<p class="small dim">Whole image: {whole}. The upper half of the pixels cannot fit small '
        "objects; the adaptive rule predicts as many pixels as the object covers.</p>"
    )


_RULES = ("upper half", "half of the peak", "adaptive")


# --- retrieval


def retrieval(found: Results, album: Album) -> str:
    """All directions and examples."""
    table = found.get("retrieval")
    if not table:
        return ""
    keys = ("class_at_1", "r_at_1", "r_at_10", "median_rank")
    rows = ""
    for name, row in table.items():
        cells = "".join(f'<td class="n">{_value(row, key)}</td>' for key in keys)
        chance = number(lookup(row, "chance.r_at_10"))
        guess = number(lookup(found, f"random_encoder.retrieval.{name}.r_at_10"))
        rows += (
            f'<tr><td>{escape(_arrow(name))}</td><td class="n">{row["n"]}</td>{cells}'
            f'<td class="n">{chance}</td><td class="n">{guess}</td></tr>'
        )
    head = "".join(f'<th class="n">{title}</th>' for title in _COLUMNS)
    return (
        "<section><h2>What belongs together?</h2>"
        '<p class="dim">Cosine similarity; equal scores count against the model. class@1: the '
        "first item has the right class. R@k: the clip's own partner is among the first k.</p>"
        f'<div class="wide"><table><tr><th>direction</th>{head}</tr>{rows}</table></div>'
        f"{_examples(album)}</section>"
    )


_COLUMNS = ("N", "class@1", "R@1", "R@10", "median rank", "R@10 chance", "R@10 random weights")


def _arrow(name: str) -> str:
    return name.replace("->", " → ")


def _examples(album: Album) -> str:
    blocks = []
    for name, examples in album.examples.items():
        query, base = name.split("->")
        asks = "".join(_ask(album, query, base, example) for example in examples)
        blocks.append(f"<h3>{escape(_arrow(name))}, the first five</h3>{asks}")
    key = (
        '<p class="key small dim"><b style="background:var(--good)"></b>own partner'
        '<b style="background:var(--accent)"></b>same class'
        '<b style="background:var(--line)"></b>another class. '
        "Evenly spaced queries, not a selection.</p>"
    )
    return f"{''.join(blocks)}{key}" if blocks else ""


def _ask(album: Album, query: str, base: str, example: Example) -> str:
    items = "".join(
        f'<div class="{_kind(album, example.query, row)}">{_item(album, base, row)}</div>'
        for row in example.found
    )
    asked = _item(album, query, example.query, short=False)
    return (
        f'<div class="ask"><div class="q">{asked}own partner: rank {example.rank}</div>'
        f'<div class="found {base}">{items}</div></div>'
    )


def _kind(album: Album, query: int, row: int) -> str:
    if row == query:
        return "own"
    known = album.classes.get(query)
    return "same" if known and album.classes.get(row) == known else ""


def _item(album: Album, modality: str, row: int, short: bool = True) -> str:
    """A clip as picture, spectrogram or words."""
    caption = f"<p>{escape(album.captions.get(row, ''))}</p>"
    if modality == "text":
        return caption
    if modality == "audio" and row in album.spectra:
        picture = pictures.spectrum(album.spectra[row], (200, 120))
    elif modality == "video" and row in album.pictures:
        picture = pictures.resized(album.pictures[row], (200, 200))
    else:
        return "<p>(no picture kept)</p>"
    image = f'<img alt="{modality}" src="{pictures.data_uri(picture, 85)}">'
    return image + caption if short else image


# --- plots


def plots(found: Results) -> str:
    """Every plot of the results, with its numbers behind it."""
    drawn = found.get("plots")
    if not drawn:
        return ""
    pieces = [f'<div class="wide">{pictures.lines(one)}{_numbers(one)}</div>' for one in drawn]
    told = escape(results.counts(found))
    if any("bounds" in one for one in drawn):
        told = "; ".join(filter(None, (told, "brackets and whiskers hold the 95 % interval")))
    head = f"<h2>{escape(str(found.get('suite')))}</h2>"
    note = f'<p class="dim">{told}</p>' if told else ""
    return f"<section>{head}{note}{''.join(pieces)}</section>"


def _numbers(drawn: Mapping[str, Any]) -> str:
    places = [number(x, 2) if isinstance(x, float) else str(x) for x in drawn["x"]]
    head = "".join(f'<th class="n">{escape(place)}</th>' for place in places)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(
            f'<td class="n">{value}{f"<small>{pair}</small>" if pair else ""}</td>'
            for value, pair in results.plotted(drawn, name)
        )
        + "</tr>"
        for name in drawn["lines"]
    )
    return f"<table><tr><th>{escape(drawn['x_name'])}</th>{head}</tr>{rows}</table>"


# --- training


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSON-lines log; none where the file is missing. A torn last line is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    parsed = []
    for k, line in enumerate(lines):
        try:
            parsed.append(json.loads(line))
        except ValueError:
            if k + 1 < len(lines):
                raise
    return parsed


def curves(log: Sequence[Mapping[str, Any]]) -> str:
    """Losses and speed over the steps, and validation."""
    steps = [line for line in log if "step" in line and "loss" in line]
    tested = [line for line in log if "step" in line and isinstance(line.get("validation"), dict)]
    names = ["loss", *sorted({k for line in steps for k in line if k.startswith("term/")})]
    names += [k for k in ("grad_norm", "samples_per_s", "data_wait") if any(k in x for x in steps)]
    drawn = [_curve(steps, name) for name in names] if len(steps) > 1 else []
    checks = [t.path for t in results.TARGETS if any(t.path in x["validation"] for x in tested)]
    held = [
        _curve([{"step": x["step"], **x["validation"]} for x in tested], name) for name in checks
    ]
    if not drawn and not held:
        return ""
    later = f'<h3>On validation clips</h3><div class="curves">{"".join(held)}</div>' if held else ""
    return f'<section><h2>Training</h2><div class="curves">{"".join(drawn)}</div>{later}</section>'


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> str:
    pairs = [(float(x["step"]), x.get(name)) for x in lines]
    kept = pairs[:: max(1, len(pairs) // _POINTS)]
    ys = [float(y) if isinstance(y, int | float) else float("nan") for _, y in kept]
    return pictures.curve([x for x, _ in kept], ys, name.removeprefix("term/"))


# --- facts


def facts(found: Results) -> str:
    """What a reader needs to repeat it."""
    train = found.get("train") or {}
    match = found.get("correspondence") or {}
    lines: list[tuple[str, Any]] = [
        ("run folder", lookup(found, "run.folder")),
        ("config digest", lookup(found, "run.config")),
        ("checkpoint", lookup(found, "checkpoint.sha256")),
        ("options", _pairs(found.get("options"))),
        ("test data", lookup(found, "data.folder")),
        ("manifest", lookup(found, "data.manifest_sha256")),
        ("clips by kind", _pairs(lookup(found, "data.kinds"))),
        (
            "correspondence",
            _pairs({k: match.get(k) for k in ("accuracy", "auc", "n")} if match else {}),
        ),
        ("training", _pairs(train)),
        ("evaluation", f"{found['seconds']} s" if "seconds" in found else None),
        ("machine", _pairs(found.get("machine"))),
        ("versions", _pairs(found.get("versions"))),
    ]
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in lines if value
    )
    return f"<section><h2>Facts</h2><dl>{items}</dl></section>"


def _pairs(tree: Mapping[str, Any] | None) -> str:
    shown = {k: v for k, v in (tree or {}).items() if v not in (None, "")}
    return ", ".join(f"{k} {number(v) if isinstance(v, float) else v}" for k, v in shown.items())
