"""Shards of a few clips whose captions a tiny model can tell apart, and the index of them."""

import json

from embed_runs import WORDS, run_folder
from media_files import write_corpus

from data_tools.make_shards import make_shards
from mmssl.index import build
from mmssl.index.build import BuildSpec


def demo_shards(folder, count, seconds, lacks=()):
    """A folder of shards below `folder`; row k lacks the modality lacks[k % len(lacks)]."""
    manifest = write_corpus(folder / "clips", count, seconds, lacks=lacks)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for k, line in enumerate(lines):
        if line["caption"]:
            line["caption"] = WORDS[k % len(WORDS)] + " again" * (k // len(WORDS))
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_shards(folder / "clips", folder / "shards", workers=1)
    return folder / "shards"


def demo_index(data, folder):
    """An index of shards or files with the tiny run `folder`/run, at `folder`/library."""
    if not (folder / "run").exists():
        run_folder(folder / "run")
    out = folder / "library"
    build.build(str(data), BuildSpec(model=str(folder / "run"), out=str(out)))
    return out
