"""What a choice among clips leaves behind: lists of keys to drop, manifests of kept rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any, TextIO

from data_tools.manifest import Row, as_tree
from mmssl.data.integrity import canonical
from mmssl.files import whole_file


def write_manifest(
    rows: Iterable[Row], path: Path, metas: Iterable[Mapping[str, Any]] | None = None
) -> int:
    """Write rows as JSON lines that make_shards reads; returns how many there are.

    metas: what is added to the `meta` of each.
    """
    count = 0
    with whole_file(path) as partial, text_file(partial) as file:
        for row, extra in zip(rows, repeat({}) if metas is None else metas, strict=False):
            tree = as_tree(replace(row, meta={**row.meta, **extra}), path.parent)
            file.write(json.dumps(tree, ensure_ascii=False) + "\n")
            count += 1
    return count


def text_file(path: Path) -> TextIO:
    """A file for lines of JSON; bytes of file names that are no UTF-8 become JSON's escapes."""
    return path.open("w", encoding="utf-8", errors="backslashreplace")


def write_drops(drops: Iterable[tuple[str, str, str]], path: Path) -> int:
    """Write (key, reason, message) as the quarantine list that training reads."""
    count = 0
    with whole_file(path) as partial, partial.open("wb") as file:
        for key, reason, message in drops:
            file.write(canonical({"key": key, "reason": reason, "message": message}) + b"\n")
            count += 1
    return count
