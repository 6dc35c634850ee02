"""The scoreboard's table: Markdown, JSON and a picture of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from mmssl.eval import results
from mmssl.eval.bootstrap import interval
from mmssl.eval.results import Results, number
from mmssl.files import whole_file

BASELINE = "log_mel"
CLOCKS = ("", "_cpu")  # ends of names: minutes on the clock, and of all cores
_TITLES = {
    "fsdd": "Spoken digits of unheard speakers (FSDD)",
    "esc10": "Sounds of unheard folds (ESC-10)",
}
_WIDTH, _LEFT, _ROW = 720, 190, 22  # of the picture, in pixels


def spread(values: Mapping[str, float], seed: int) -> Results:
    """Mean over groups, its 95 % interval by bootstrap over them, and the values."""
    bounds = interval(list(values.values()), seed=seed)
    return {"mean": float(np.mean(list(values.values()))), "ci": list(bounds), "groups": {**values}}


def difference(a: Mapping[str, float], b: Mapping[str, float], seed: int) -> Results:
    """The same of a - b by group; a beats b if the paired interval lies above 0."""
    found = spread({name: value - b[name] for name, value in a.items()}, seed)
    return found | {"beats": found["ci"][0] > 0}


def words(row: Results) -> str:
    """A row in one line."""
    random, gain = row["random"]["mean"], _signed(row["gain"])
    clock, _ = _minutes(row, "training", "evaluation")
    return f"{row['trained']['mean']:.3f}, random {random:.3f}, {gain}; {clock:.1f} min"


def write(out: Path, minutes: float) -> None:
    """Write `scoreboard.json`, `.md` and `.svg` of all rows under `out`.

    The text of `scoreboard.notes.md` there, if there is one, ends the table.

    minutes: limit of a row; those that are longer on the clock and in CPU time are marked.
    """
    sets = {name: _rows(out / name) for name in _TITLES if (out / name).is_dir()}
    results.write({"limit_minutes": minutes, "sets": sets}, out / "scoreboard.json")
    notes = out / "scoreboard.notes.md"
    tail = [notes.read_text(encoding="utf-8")] if notes.is_file() else []
    parts = [_table(name, rows, minutes) for name, rows in sets.items() if len(rows) > 1]
    head = ["# Methods on real sound, frozen", "", "![accuracy by method](scoreboard.svg)", ""]
    text = "\n".join([*head, *parts, *tail])
    for name, content in (("scoreboard.md", text), ("scoreboard.svg", picture(sets))):
        with whole_file(out / name) as partial:
            partial.write_text(content, encoding="utf-8")


def _rows(folder: Path) -> list[Results]:
    """Rows of a set, the baseline first, then the best one; each with what it gains over that."""
    rows = [results.read(path) for path in folder.glob("*.json")]
    rows.sort(key=lambda row: (row["method"] != BASELINE, -row["trained"]["mean"], row["method"]))
    base = rows[0]["trained"]["groups"]
    for row in rows[1:]:
        row["over_log_mel"] = difference(row["trained"]["groups"], base, row["seed"])
    return rows


# --- Markdown


def _table(name: str, rows: Sequence[Results], minutes: float) -> str:
    base, first = rows[0], rows[1]
    what = {"fsdd": "speaker", "esc10": "fold"}[name]
    heard = (
        f"one pretraining per {what}, which never hears it"
        if first["held_out"]
        else f"one pretraining, which hears the test {what}'s recordings, too, without labels"
    )
    voices = "abx" in first
    titles = ["method", "trained", "random weights", "gain", "over log-mel"]
    titles += ["ABX error (random)", "speaker (random)"] if voices else []
    titles += ["numbers", "steps", "minutes (CPU)"]
    cells = ["log-mel statistics", _bounded(base["trained"]), "", "", ""]
    cells += [number(base["abx"]["trained"]), number(base["speaker"]["trained"])] if voices else []
    lines = [cells + [""] * (len(titles) - len(cells))]
    lines += [_cells(row, voices, minutes) for row in rows[1:]]
    machines = Counter(_machine(row) for row in rows)
    where = "; ".join(f"{text}: {count}" for text, count in machines.items())
    return "\n".join(
        [
            f"## {_TITLES[name]}",
            "",
            f"{base['n']} clips; mean accuracy over {len(base['trained']['groups'])} {what}s left",
            f"out, {heard}. Brackets: 95 % bootstrap interval over {what}s; bold: beats random",
            "weights and the log-mel baseline, as both paired intervals lie above 0. The probe's C",
            f"is chosen for each {what} by leaving out one of the others in turn.",
            *(["ABX: digits across speakers, chance 0.5; speaker: other takes."] if voices else []),
            "Minutes of training and evaluation by the clock and (of all cores); (!): both above",
            f"{minutes:g}; behind +: training of the runs that it starts from, rows of their own.",
            "",
            f"| {' | '.join(titles)} |",
            "|---" * len(titles) + "|",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"Rows by machine: {where}; torch {first['versions']['torch']}; seed {first['seed']}; "
            f"{max(row['date'] for row in rows)}.",
            "",
        ]
    )


def _cells(row: Results, voices: bool, minutes: float) -> list[str]:
    accuracy = _bounded(row["trained"])
    if row["gain"]["beats"] and row["over_log_mel"]["beats"]:
        accuracy = f"**{accuracy}**"
    cells = [row["method"], accuracy, _bounded(row["random"])]
    cells += [_signed(row["gain"]), _signed(row["over_log_mel"])]
    for name in ("abx", "speaker") if voices else ():
        pair = row.get(name)
        cells.append(f"{pair['trained']:.3f} ({pair['random']:.3f})" if pair else "")
    clock, cpu = _minutes(row, "training", "evaluation")
    late = " (!)" if min(clock, cpu) > minutes else ""
    before, before_cpu = _minutes(row, "before")
    earlier = f" + {before:.1f} ({before_cpu:.1f})" if before else ""
    return [
        *cells,
        f"{row['parameters'] / 1e6:.2f} M",
        f"{row['steps']} x {row['batch']}",
        f"{clock:.1f} ({cpu:.1f}){late}{earlier}",
    ]


def _machine(row: Results) -> str:
    machine = row["machine"]
    return f"{machine['processor']}, {machine['cores']} cores, {machine['device']}"


def _minutes(row: Results, *parts: str) -> list[float]:
    """Of all parts, by `CLOCKS`; rows of an older version have nothing `before` them."""
    spent = {"before": 0.0, "before_cpu": 0.0, **row["minutes"]}
    return [sum(spent[part + cpu] for part in parts) for cpu in CLOCKS]


def _bounded(found: Results) -> str:
    low, high = found["ci"]
    return f"{found['mean']:.3f} [{low:.2f}, {high:.2f}]"


def _signed(found: Results) -> str:
    low, high = found["ci"]
    return f"{found['mean']:+.3f} [{low:+.2f}, {high:+.2f}]"


# --- picture


def picture(sets: Mapping[str, Sequence[Results]]) -> str:
    """SVG: accuracy with its interval, random weights as rings, log-mel statistics as a line."""
    parts, top = [], 0
    for name, rows in sets.items():
        if len(rows) > 1:
            parts.append(_panel(_TITLES[name], rows, top))
            top += _ROW * (len(rows) + 2)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _panel(title: str, rows: Sequence[Results], top: int) -> str:
    values = [v for r in rows for k in ("trained", "random") if k in r for v in r[k]["ci"]]
    low = min(np.floor(10 * min(values)) / 10, 0.9)

    def x(value: float) -> float:
        return float(_LEFT + (value - low) / (1 - low) * (_WIDTH - _LEFT - 40))

    base, bottom = x(rows[0]["trained"]["mean"]), top + _ROW * (len(rows) + 0.6)
    parts = [
        f'<text x="8" y="{top + 16}" font-weight="bold">{escape(title)}<tspan font-weight="normal">'
        ": dots trained, with 95 % intervals, rings random weights</tspan></text>"
    ]
    parts.append(
        f'<path d="M{base:.1f} {top + 24}V{bottom:.1f}" stroke="#b54" stroke-dasharray="4 3"/>'
        f'<text x="{base:.1f}" y="{bottom + 14:.1f}" fill="#b54" text-anchor="middle">log-mel '
        f"{rows[0]['trained']['mean']:.3f}</text>"
    )
    for k, row in enumerate(rows[1:], 1):
        y, mean, random = top + _ROW * k + 18, row["trained"]["mean"], x(row["random"]["mean"])
        a, b = map(x, row["trained"]["ci"])
        parts.append(
            f'<text x="{_LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(row["method"])}</text>'
            f'<path d="M{a:.1f} {y}H{b:.1f}" stroke="#26c" stroke-width="2"/>'
            f'<circle cx="{random:.1f}" cy="{y}" r="4" fill="#fff" stroke="#888"/>'
            f'<circle cx="{x(mean):.1f}" cy="{y}" r="4.5" fill="#26c"/>'
            f'<text x="{_WIDTH - 34}" y="{y + 4}">{mean:.3f}</text>'
        )
    return "".join(parts)
