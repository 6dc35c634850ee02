"""The tokenizer repeats exactly, shrinks to its captions, and reads shards or manifests."""

import hashlib
import json
import shutil
import tracemalloc
from collections import Counter

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from media_files import write_corpus

from data_tools import train_tokenizer as tool
from data_tools.make_shards import make_shards
from data_tools.train_tokenizer import (
    Options,
    Text,
    sample,
    texts_of,
    train_model,
    train_tokenizer,
)
from mmssl.data.text import Tokenizer
from mmssl.types import UserError

WORDS = [f"w{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
TURNED = [" ".join(WORDS[k:] + WORDS[:k]) for k in range(50)]
SPECIAL = {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("tok")
    write_corpus(root / "media", 6, seconds=0.3, lacks=(None, "text", None))
    make_shards(root / "media", root / "out")
    return root


@pytest.fixture(scope="module")
def models():
    return {kind: train_model(TURNED, Options(320, kind)) for kind in tool.MODEL_TYPES}


def _manifest(path, captions, **more):
    rows = ({"caption": text, "source": f"s{k}", **more} for k, text in enumerate(captions))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_shards_and_manifest_hold_the_same_captions(corpus):
    from_shards = [c.text for c in texts_of(corpus / "out")]
    assert from_shards == [c.text for c in texts_of(corpus / "media" / "manifest.jsonl")]
    assert from_shards == [f"clip number {k} shows a moving pattern" for k in (0, 2, 3, 5)]


def test_transcripts_are_read_as_training_reads_them(corpus, tmp_path):
    """Of parts of a file what is said in them; from a manifest the same as from its shards."""
    words = [[0.02, 0.1, "one"], [0.12, 0.18, "two"], [0.2, 0.28, "three"]]
    rows = [
        {"media": "0.mp4", "caption": "a cut", "start": 0.11, "transcript": {"words": words}},
        {"media": "0.mp4", "end": 0.11, "source": "b", "transcript": {"text": "1", "words": words}},
        {"media": "1.mp4", "transcript": {"text": "no  times"}, "language": "en"},
        {"transcript": {"text": "text alone", "words": words}},
        {"media": "2.mp4", "caption": "unwanted", "transcript": {"text": "this, too"}},
        {"media": "0.mp4", "start": 0.0, "end": 0.01, "transcript": {"words": words}},
    ]
    rows[4]["has"] = ["audio", "video"]
    names = sorted((corpus / "media").glob("**/*.mp4"))
    for row in rows:
        if "media" in row:
            row["media"] = str(names[int(row["media"][0])])
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_shards(folder, tmp_path / "out")
    wanted = ["a cut", "two three", "one", "no times", "text alone"]
    for place in (tmp_path / "out", folder, str(folder / "m.jsonl")):
        found = list(texts_of(place))
        assert [text.text for text in found] == wanted, place
        assert [text.language for text in found] == ["", "", "", "en", ""]


@pytest.mark.parametrize("gap", [" ", ""])
def test_texts_of_any_length_count(gap):
    """An hour of speech, with or without spaces; SentencePiece alone would leave it out."""
    speech = gap.join(["猫が", "鳴くよ"] * 3000)
    plain = train_model(TURNED, Options(340, coverage=1.0))
    heard = train_model([*TURNED, speech], Options(340, coverage=1.0))
    lengths = [
        len(sentencepiece.SentencePieceProcessor(model_proto=m).encode("鳴く"))
        for m in (plain, heard)
    ]
    assert lengths[0] == 1 + 6  # bytes
    assert lengths[1] <= 3


def test_bytes_repeat_and_size_shrinks(corpus, tmp_path):
    made = [train_tokenizer(corpus / "out", tmp_path / f"{k}.model", 8000) for k in range(2)]
    models = [t.path.read_bytes() for t in made]
    assert models[0] == models[1]
    assert made[0].vocab_size < made[0].asked == 8000
    assert made[0].texts == made[0].used == 4
    tokenizer = Tokenizer.load(made[0].path)
    assert tokenizer.vocab_size == made[0].vocab_size >= 256 + 5
    assert tokenizer.special == SPECIAL


def test_what_the_defaults_have_always_made(models):
    """Tokenizers that runs were trained with can be made again."""
    assert hashlib.sha256(models["unigram"]).hexdigest()[:16] == "4e858880102bf9f6"


def test_a_sample_depends_on_no_order(tmp_path):
    texts = [f"{WORDS[k % 100]} {WORDS[k * k % 97]} {WORDS[k * 7 % 89]}" for k in range(400)]
    one, two = (_manifest(tmp_path / f"{n}.jsonl", texts[n::2]) for n in range(2))
    made = [
        train_tokenizer(inputs, tmp_path / f"{k}.model", 300, max_texts=150, seed=seed)
        for k, (inputs, seed) in enumerate([((one, two), 3), ((two, one), 3), ((one, two), 4)])
    ]
    first, turned, other = (t.path.read_bytes() for t in made)
    assert first == turned != other
    assert [(t.texts, t.used) for t in made] == [(400, 150)] * 3


def test_a_sample_is_uniform_over_captions_however_often_they_occur():
    """Nine of ten captions are the same: so are nine of ten of the sample, within 4 sigma."""
    captions = [Text("rain" if k % 10 else f"rare {k}", "", str(k)) for k in range(20_000)]
    counts = Counter(sample(captions, 2000, 0))
    assert counts.total() == 2000
    assert abs(counts["rain"] / 2000 - 0.9) < 4 * (0.9 * 0.1 / 2000) ** 0.5
    halves = Counter(int(text[5:]) < 10_000 for text in counts if text != "rain")
    assert abs(halves[True] - halves[False]) < 4 * halves.total() ** 0.5  # early ones as late ones


def test_memory_is_that_of_the_sample():
    """50 times as many captions take no more."""

    def peak(count):
        tracemalloc.start()
        sample((Text(f"caption {k} " + "x" * 200, "", str(k)) for k in range(count)), 400, 0)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(20_000) < 1.2 * peak(400) < 400_000


def test_asked_size_is_kept_where_the_captions_support_it(tmp_path):
    path = _manifest(tmp_path / "m.jsonl", TURNED)
    assert train_tokenizer(path, tmp_path / "t.model", 320).vocab_size == 320


@pytest.mark.parametrize("kind", tool.MODEL_TYPES)
def test_both_types_split_words_and_keep_the_special_ids(models, kind):
    tokenizer = Tokenizer(models[kind])
    assert tokenizer.special == SPECIAL
    proto = sentencepiece.SentencePieceProcessor(model_proto=models[kind])
    assert [proto.is_byte(i) for i in range(5, 261)] == [True] * 256
    pieces = proto.encode("wak wbl", out_type=str)
    assert 2 <= len(pieces) < len("wak wbl")  # learnt, not spelt
    assert models["bpe"] != models["unigram"]


@pytest.mark.parametrize("kind", tool.MODEL_TYPES)
def test_any_text_survives(models, kind):
    """Characters that training never saw go through bytes; what NFKC changes is changed before."""
    tokenizer = Tokenizer(models[kind])
    processor = sentencepiece.SentencePieceProcessor(model_proto=models[kind])

    @given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
    def survives(text):
        ids = tokenizer.encode(text, 1000)
        assert tokenizer.unk_id not in ids
        assert tokenizer.decode(ids) == processor.normalize(text).replace("\u2581", " ").strip()

    survives()
    for text in ("кошка спит 🐈‍⬛ 👩🏽‍🚀", "猫が鳴く 🎉🎉", "नमस्ते", "wak 🫠 wbl"):
        assert tokenizer.decode(tokenizer.encode(text, 1000)) == text


def test_characters_beyond_the_coverage_are_spelt_in_bytes():
    texts = [*TURNED * 4, "wak é"]
    pieces = {
        coverage: sentencepiece.SentencePieceProcessor(
            model_proto=train_model(texts, Options(320, coverage=coverage))
        ).encode("é", out_type=str)
        for coverage in (0.99, 1.0)
    }
    assert pieces == {0.99: ["\u2581", "<0xC3>", "<0xA9>"], 1.0: ["\u2581", "é"]}


def test_errors(corpus, tmp_path):
    out = tmp_path / "t.model"
    for wrong, message in (
        ({"vocab": 100}, "--vocab 100: byte fallback"),
        ({"model_type": "word"}, "--model-type word: is one of unigram, bpe"),
        ({"coverage": 0.5}, "--coverage 0.5: must lie within"),
        ({"max_texts": 0}, "--max-texts 0: must be 1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            train_tokenizer(corpus / "out", out, **wrong)
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"media": "x.mp4"}))
    with pytest.raises(UserError, match="no captions or transcripts"):
        train_tokenizer(path, out)
    with pytest.raises(UserError, match="cannot train"):
        train_model([" "], Options())
    shutil.copytree(corpus / "out", tmp_path / "bad")
    shard = tmp_path / "bad" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"moving pattern", b"moving pattepn"))
    with pytest.raises(UserError, match=r"shard-000000\.tar: damaged"):
        train_tokenizer(tmp_path / "bad", out)
    assert not out.exists()


def test_command_line(corpus, tmp_path, capsys):
    out = str(tmp_path / "t.model")
    assert tool.main([str(corpus / "out"), out]) == 0
    text = capsys.readouterr().out
    assert "pieces from 4 texts" in text
    assert "8000 were asked for" in text
    assert tool.main([str(tmp_path / "none"), out]) == 2
    assert "no such file" in capsys.readouterr().err


def test_command_line_reports_sample_and_languages(tmp_path, capsys):
    german = _manifest(tmp_path / "de.jsonl", TURNED[:30], language="de")
    other = _manifest(tmp_path / "xx.jsonl", TURNED[30:40])
    words = [german, other, tmp_path / "t.model", "--vocab", 300, "--model-type", "bpe"]
    assert tool.main([*map(str, words), "--max-texts", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("300 pieces from 40 texts")
    assert lines[1:] == [
        "  trained on a sample of 20 texts",
        "  de: 75.0%",
        "  no language: 25.0%",
    ]
