"""A tiny model, shards of tiny clips, and the index of both."""

import json
from types import SimpleNamespace

import pytest
from embed_runs import run_folder
from index_runs import rows_of
from media_files import write_corpus

from data_tools.make_shards import make_shards
from mmssl.index import build

LACKS = ["", "video", "audio", "text"]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """run, media, shards (three of up to four samples) and library of these, with the model."""
    folder = tmp_path_factory.mktemp("library")
    model = run_folder(folder / "run")
    manifest = write_corpus(folder / "media", 10, lacks=LACKS)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for number, line in enumerate(lines):  # what differs within the few tokens that are read
        line["caption"] = line["caption"] and f"{number} dogs"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_shards(manifest, folder / "shards", shard_samples=4, workers=1)
    build.main("build", str(folder / "shards"), [f"model={folder}/run", f"out={folder}/library"])
    return SimpleNamespace(folder=folder, model=model, library=folder / "library")


@pytest.fixture
def made(place):
    """Makes an index of some data below the test's own folder; returns its rows."""

    def make(data, out, *words, model="run"):
        words = [*words, f"model={place.folder / model}"] if model else words
        build.main("build", str(data), [f"out={out}", *words])
        return rows_of(out)

    return make
