"""Checkpoints of earlier versions: what changed, and how their manifests are read today.

| version | change |
|---|---|
| 1 | the first |
| 2 | `progress` tells the step of the last evaluation, skipped steps and returns to a checkpoint; \
`workers` and `rows` of the readers; a CRC32C of itself |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FORMAT_VERSION = 2

Manifest = dict[str, Any]


def _from_1(manifest: Manifest) -> Manifest:
    progress = manifest.get("progress", {})
    return {
        **manifest,
        # an evaluation that was due came before the checkpoint
        "progress": {**progress, "evaluated": progress.get("step", 0)},
        # not known: the run goes on with as many processes and its own data.workers
        "workers": None,
        "rows": None,
    }


# from which version, and how to the next
MIGRATIONS: dict[int, Callable[[Manifest], Manifest]] = {1: _from_1}


def migrated(manifest: Manifest) -> Manifest:
    """A manifest of any known version in the form of today's.

    Raises:
        ValueError: its version is not known.
    """
    version = manifest.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        hint = "; it was written by a newer mmssl" if newer else ""
        raise ValueError(f"format_version {version!r} is unknown{hint}")
    for step in range(version, FORMAT_VERSION):
        manifest = {**MIGRATIONS[step](manifest), "format_version": step + 1}
    return manifest
