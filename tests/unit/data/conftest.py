"""Shards of tiny clips, made once per session."""

import pytest
from clip_shards import train_tokens, write_clips


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """See `write_clips`."""
    return write_clips(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def tokenizer(shards):
    return train_tokens(shards)
