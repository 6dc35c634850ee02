"""The tokenizer's ids, truncation and what it refuses."""

import pickle

import pytest

from mmssl.data.text import Tokenizer
from mmssl.types import UserError


def test_special_ids(tokenizer):
    assert tokenizer.special == {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 4}
    assert len(set(tokenizer.special.values())) == 5


@pytest.mark.parametrize(
    "text", ["clip number 3 shows a moving pattern", "naïve 日本語 \U0001f600 text"]
)
def test_round_trip_of_any_text(tokenizer, text):
    """Byte fallback leaves nothing unknown."""
    ids = tokenizer.encode(text, 200)
    assert tokenizer.unk_id not in ids
    assert tokenizer.decode(ids) == text


def test_truncation_keeps_the_end_marker(tokenizer):
    long = tokenizer.encode("clip number 3 shows a moving pattern", 100)
    for length in range(1, len(long) + 2):
        ids = tokenizer.encode("clip number 3 shows a moving pattern", length)
        assert ids == [*long[: min(length, len(long)) - 1], tokenizer.eos_id]
    assert tokenizer.encode("", 8) == [tokenizer.eos_id]


def test_ids_lie_in_the_vocabulary(tokenizer):
    ids = tokenizer.encode("clip \x00 ☃ number", 64)
    assert all(0 < i < tokenizer.vocab_size for i in ids)


def test_pieces_behind_a_space_begin_words(tokenizer):
    begins = tokenizer.begins
    assert len(begins) == tokenizer.vocab_size
    assert not any(begins[i] for i in tokenizer.special.values())
    text = "clip number 3 shows a moving pattern"
    ids = tokenizer.encode(text, 100)[:-1]
    assert sum(begins[i] for i in ids) == len(text.split())
    assert begins[ids[0]]


def test_pickle_keeps_the_model(tokenizer):
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other.sha256 == tokenizer.sha256
    assert other.encode("clip 5", 16) == tokenizer.encode("clip 5", 16)


def test_refused_files(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.model: no such tokenizer"):
        Tokenizer.load(tmp_path / "nowhere.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"bad\.model"):
        Tokenizer.load(tmp_path / "bad.model")


def test_model_without_our_pieces_is_refused(tmp_path):
    import io

    import sentencepiece

    sink = io.BytesIO()
    sentences = ["a b c d e f g", "abc abd acd"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=sink, vocab_size=12, minloglevel=2
    )
    with pytest.raises(UserError, match="needs pad id 0"):
        Tokenizer(sink.getvalue())
