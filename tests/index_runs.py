"""Reads back what `mmssl embed` and `mmssl index` have written."""

import io

import pyarrow.parquet as pq
from media_files import moving_frames
from PIL import Image

from mmssl.index.store import Index


def rows_of(folder):
    """All rows of all tables, by id, without what tells when they were added."""
    index = Index.open(folder)
    found = {}
    for key in index.keys:
        for row in index.table(key).to_arrow().to_pylist():
            assert row["id"] not in found
            del row["part"]
            found[row["id"]] = row
    return found


def embedded(folder):
    """The rows that `mmssl embed` wrote."""
    return [row for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()]


def png():
    """A small picture, always the same."""
    out = io.BytesIO()
    Image.fromarray(moving_frames(1, seed=9)[0]).save(out, "PNG")
    return out.getvalue()
