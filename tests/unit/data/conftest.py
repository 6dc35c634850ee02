"""Shards of tiny clips, made once per session."""

import pytest
from media_files import write_corpus

from data_tools.make_shards import make_shards
from data_tools.train_tokenizer import train_tokenizer
from mmssl.data.text import Tokenizer


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """40 clips of 1 s in 4 shards; every 8th lacks one modality."""
    root = tmp_path_factory.mktemp("shards")
    lacks = (None, None, "text", None, "audio", None, None, "video")
    write_corpus(root / "media", 40, lacks=lacks)
    make_shards(root / "media", root / "train", shard_samples=10)
    return root / "train"


@pytest.fixture(scope="session")
def tokenizer(shards):
    path = shards.parent / "tokenizer.model"
    train_tokenizer(shards, path, 320)
    return Tokenizer.load(path)
