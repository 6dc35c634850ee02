"""Shards of tiny clips with their tokenizer, for tests of reading."""

from pathlib import Path

from media_files import write_corpus

from data_tools.make_shards import make_shards
from data_tools.train_tokenizer import train_tokenizer
from mmssl.data.text import Tokenizer


def write_clips(root: Path) -> Path:
    """40 clips of 1 s in 4 shards; every 8th lacks one modality."""
    lacks = (None, None, "text", None, "audio", None, None, "video")
    write_corpus(root / "media", 40, lacks=lacks)
    make_shards(root / "media", root / "train", shard_samples=10)
    return root / "train"


def train_tokens(shards: Path) -> Tokenizer:
    """A tokenizer of the captions, beside the shards."""
    path = shards.parent / "tokenizer.model"
    train_tokenizer(shards, path, 320)
    return Tokenizer.load(path)
