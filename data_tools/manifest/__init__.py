"""Source manifests: which clips go into shards, and what is known of them.

A manifest is a JSON-lines, CSV, TSV or Parquet file, a folder of media, or an address of fsspec
(s3://bucket/prefix/) where one of these is. A row names one clip:

    media       path or address, relative to the manifest; or a list of pictures in their order
    sound       audio file of a silent video or of pictures (which it shows for equal times)
    start, end  seconds: the part of the file to keep
    caption, captions
    transcript  {"text": ..., "words": [[start, end, word], ...]}, seconds on the file's clock; a
                word may be a phrase; either of the two entries suffices
    source      recording it comes from (its clips stay together, and are no negatives)
    split       part of the corpus: a folder of shards
    has         modalities to use
    meta        anything
    language, licence

All are optional except that a row needs media, a caption or a transcript.

    python -m data_tools.manifest LAYOUT ROOT OUT.jsonl

writes the manifest of a public corpus, to be looked at and edited. ROOT holds its lists and media,
in folders of any name where the layout does not ask for some. What lists name and the disk lacks is
counted, and written to OUT.missing.txt.
"""

from data_tools.manifest.files import Place, find_manifests, read_rows
from data_tools.manifest.media import FOREIGN_SUFFIXES, SUFFIXES, Media, stamps
from data_tools.manifest.row import Row, as_tree

__all__ = [
    "FOREIGN_SUFFIXES",
    "SUFFIXES",
    "Media",
    "Place",
    "Row",
    "as_tree",
    "find_manifests",
    "read_rows",
    "stamps",
]
