"""Command line of the package; see its text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools import manifest
from data_tools.manifest.corpus import Clip, Corpus, Coverage
from data_tools.manifest.layouts import LAYOUTS
from mmssl.data.integrity import canonical
from mmssl.files import whole_file
from mmssl.types import UserError


def write_manifest(layout: str, root: Path, out: Path) -> Coverage:
    """Write the rows of all clips that are there, and the list of those that are not.

    Raises:
        UserError: no such folder, a list of the layout is missing or wrong, or no clip is there.
    """
    corpus, coverage = Corpus(root), Coverage()
    base, home = root.resolve(), out.parent.resolve()
    inner = base.relative_to(home) if base.is_relative_to(home) else base
    used: set[str] = set()
    with whole_file(out) as partial:
        with partial.open("wb") as file:
            for clip in _clips(layout, corpus):
                coverage.note(clip)
                used.update((*clip.media, clip.sound))
                if clip.media:
                    file.write(_line(clip, inner))
        if coverage.found == 0:
            told = f"; {coverage.table()}" if coverage.listed else ""
            raise UserError(f"{root}: no clip of the layout {layout} is there{told}")
    coverage.unlisted = sorted(set(corpus.media) - used)
    listed = out.with_suffix(".missing.txt")
    listed.unlink(missing_ok=True)
    if coverage.missing:
        lines = (f"{split}\t{name}\n" for split, name in coverage.missing)
        listed.write_text("".join(lines), encoding="utf-8")
    return coverage


def _clips(layout: str, corpus: Corpus) -> Iterator[Clip]:
    try:
        yield from LAYOUTS[layout](corpus)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        told = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{corpus.reads}: is no list of {layout}: {told}") from error


def _line(clip: Clip, inner: Path) -> bytes:
    """The row in the manifest, from whose folder the corpus is at `inner`."""
    media = [(inner / name).as_posix() for name in clip.media]
    sound = {"sound": (inner / clip.sound).as_posix()} if clip.sound else {}
    row = {"media": media if len(media) > 1 else media[0], **sound, **clip.row}
    return canonical(row) + b"\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.manifest", description=manifest.__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("layout", choices=LAYOUTS)
    parser.add_argument("root", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    try:
        coverage = write_manifest(args.layout, args.root, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {coverage.found} clips\n{coverage.table()}")
    if coverage.missing:
        print(f"missing ones are listed in {args.out.with_suffix('.missing.txt')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
