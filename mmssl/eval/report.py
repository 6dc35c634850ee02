"""One HTML file that shows a run: numbers beside targets and baselines, pictures, curves.

    python -m mmssl.eval.report --check results.json

exits with code 1 and a list where the file is incomplete.

Pictures are embedded, so the file opens without a server.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from mmssl.eval import results, sections
from mmssl.eval.album import Album
from mmssl.eval.pictures import page
from mmssl.eval.results import Results, lookup
from mmssl.files import whole_file
from mmssl.types import UserError


def write(found: Results, album: Album, run: Path, path: Path) -> None:
    """Write the report of `found` to `path`; it appears only when it is complete.

    Args:
        found: results of a suite.
        album: pictures that were kept while they were computed.
        run: run folder, for the training log.
        path: of the HTML file.
    """
    parts = [
        sections.header(found),
        sections.tiles(found),
        sections.targets(found),
        sections.localization(found, album),
        sections.retrieval(found, album),
        sections.plots(found),
        sections.curves(sections.read_log(run / "log.jsonl")),
        sections.facts(found),
    ]
    with whole_file(path) as partial:
        title = str(lookup(found, "run.name") or "mmssl")
        partial.write_text(page(title, parts), encoding="utf-8")


# --- check


def main(words: Iterable[str]) -> int:
    """`--check FILE`: 0 if the results are complete, else 1 and a list of what is wrong."""
    words = list(words)
    if len(words) != 2 or words[0] != "--check":
        print("usage: python -m mmssl.eval.report --check results.json", file=sys.stderr)
        return 2
    try:
        problems = results.check(results.read(Path(words[1])))
    except UserError as error:
        problems = [str(error)]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{words[1]}: {'complete' if not problems else f'{len(problems)} problems'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
