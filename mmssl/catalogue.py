"""The list of methods in configs/methods: `mmssl list`, and the table in the README.

`python -m mmssl.catalogue --write README.md` renews the table between its two markers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmssl import config
from mmssl.specs import RunSpec, TowerSpec
from mmssl.types import MODALITIES, UserError

BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"


@dataclass(frozen=True)
class Method:
    """One file of configs/methods.

    `wiring` holds the kinds of its tasks, `file` is understood by every verb.
    """

    name: str
    wiring: list[str]
    modalities: list[str]
    paper: str
    file: str


def methods() -> list[Method]:
    """All methods, sorted by file.

    Raises:
        UserError: a method file does not load.
    """
    return [_method(name, config.load(config.find(name, ("methods",)))) for name in _names()]


def _names() -> list[str]:
    return config.names(("methods",))


def _method(name: str, spec: RunSpec) -> Method:
    used = {tower.modality for tower in spec.towers.values() if isinstance(tower, TowerSpec)}
    return Method(
        name=spec.name,
        wiring=sorted({task.kind for task in spec.tasks.values()}),
        modalities=[m for m in MODALITIES if m in used],
        paper=spec.paper,
        file=f"configs/methods/{name}.yaml",
    )


def main(*flags: str) -> int:
    """Print the catalogue as a table, or with `--json` as a JSON list."""
    found = methods()
    if "--json" in flags:
        print(json.dumps([asdict(m) for m in found], indent=2, ensure_ascii=False))
        return 0
    print(_text_table(found))
    runs = config.names(("runs",))
    if runs:
        print(f"\nruns: {', '.join(runs)}")
    return 0


def _rows(found: Iterable[Method]) -> list[tuple[str, str, str, str, str]]:
    return [(m.name, ", ".join(m.wiring), ", ".join(m.modalities), m.paper, m.file) for m in found]


def _text_table(found: Sequence[Method]) -> str:
    rows = [("name", "wiring", "modalities", "paper", "file"), *_rows(found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def markdown_table(found: Sequence[Method]) -> str:
    """The README's table."""
    lines = ["| method | tasks | modalities | paper |", "| --- | --- | --- | --- |"]
    for name, wiring, modalities, paper, file in _rows(found):
        lines.append(f"| [{name}]({file}) | {wiring} | {modalities} | {paper.replace('|', '/')} |")
    return "\n".join(lines)


def renewed(text: str, found: Sequence[Method]) -> str:
    """`text` with the table between the markers replaced.

    Raises:
        UserError: a marker is missing.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"the file needs the lines `{BEGIN}` and `{END}`, once each, in this order")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{markdown_table(found)}\n{END}{rest.split(END)[1]}"


def _write(path: Path) -> None:
    try:
        path.write_text(renewed(path.read_text(encoding="utf-8"), methods()), encoding="utf-8")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--write":
        sys.exit("usage: python -m mmssl.catalogue --write README.md")
    try:
        _write(Path(sys.argv[2]))
    except UserError as error:
        sys.exit(str(error))
