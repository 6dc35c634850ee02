"""The tokenizer repeats exactly, shrinks to its captions, and reads shards or manifests."""

import json
import shutil

import pytest
from media_files import write_corpus

from data_tools import train_tokenizer as tool
from data_tools.make_shards import make_shards
from data_tools.train_tokenizer import captions_of, train_tokenizer
from mmssl.data.text import Tokenizer
from mmssl.types import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("tok")
    write_corpus(root / "media", 6, seconds=0.3, lacks=(None, "text", None))
    make_shards(root / "media", root / "out")
    return root


def test_shards_and_manifest_hold_the_same_captions(corpus):
    from_shards = list(captions_of(corpus / "out"))
    assert from_shards == list(captions_of(corpus / "media" / "manifest.jsonl"))
    assert from_shards == [f"clip number {k} shows a moving pattern" for k in (0, 2, 3, 5)]


def test_bytes_repeat_and_size_shrinks(corpus, tmp_path):
    made = [train_tokenizer(corpus / "out", tmp_path / f"{k}.model", 8000) for k in range(2)]
    models = [t.path.read_bytes() for t in made]
    assert models[0] == models[1]
    assert made[0].vocab_size < made[0].asked == 8000
    assert made[0].captions == 4
    tokenizer = Tokenizer.load(made[0].path)
    assert tokenizer.vocab_size == made[0].vocab_size >= 256 + 5
    assert tokenizer.special == {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 4}


def test_asked_size_is_kept_where_the_captions_support_it(tmp_path):
    words = [f"w{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    path = tmp_path / "m.jsonl"
    path.write_text(
        "".join(json.dumps({"caption": " ".join(words[k:] + words[:k])}) + "\n" for k in range(50))
    )
    assert train_tokenizer(path, tmp_path / "t.model", 320).vocab_size == 320


def test_errors(corpus, tmp_path):
    with pytest.raises(UserError, match="--vocab 100: byte fallback"):
        train_tokenizer(corpus / "out", tmp_path / "t.model", 100)
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"media": "x.mp4"}))
    with pytest.raises(UserError, match="no captions"):
        train_tokenizer(path, tmp_path / "t.model")
    shutil.copytree(corpus / "out", tmp_path / "bad")
    shard = tmp_path / "bad" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"moving pattern", b"moving pattepn"))
    with pytest.raises(UserError, match=r"shard-000000\.tar: damaged"):
        train_tokenizer(tmp_path / "bad", tmp_path / "t.model")
    assert not (tmp_path / "t.model").exists()


def test_command_line(corpus, tmp_path, capsys):
    out = str(tmp_path / "t.model")
    assert tool.main([str(corpus / "out"), out]) == 0
    text = capsys.readouterr().out
    assert "pieces from 4 captions" in text
    assert "8000 were asked for" in text
    assert tool.main([str(tmp_path / "none"), out]) == 2
    assert "no such file" in capsys.readouterr().err
