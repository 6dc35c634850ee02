"""Sources of one modality, and narrated videos: from files to shards to training batches."""

import json

import pytest
from media_files import moving_frames, tone, write_media

from data_tools.check_shards import check_folder
from data_tools.make_shards import make_shards
from data_tools.train_tokenizer import train_tokenizer
from mmssl.data.loader import train_loader
from mmssl.data.text import Tokenizer
from mmssl.index.corpus import open_corpus
from mmssl.specs import DataSpec, ViewSpec

VIEWS = {
    "audio": ViewSpec(modality="audio", crop_s=0.5, hz=8000),
    "video": ViewSpec(modality="video", crop_s=0.5, fps=5, size=16),
    "text": ViewSpec(modality="text", length=20),
}
COUNT = 6


def sound(k):
    wave = tone(1.0, 8000, 300 + 50 * k)
    return write_media(None, wave, container="wav", rate=8000, audio_codec="pcm_s16le")


def silent(k):
    return write_media(moving_frames(10, 32, 32, seed=k), None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    manifest = folder / "m.jsonl"
    manifest.write_text(json.dumps({"captions": [f"sentence {k} of them" for k in range(30)]}))
    train_tokenizer(manifest, folder / "t.model", 320)
    return Tokenizer.load(folder / "t.model")


@pytest.mark.parametrize(
    ("modality", "suffix", "write"),
    [("audio", "wav", sound), ("video", "mp4", silent), ("text", "", None)],
)
def test_a_source_of_one_modality_can_be_trained_on(tmp_path, tokenizer, modality, suffix, write):
    rows = []
    for k in range(COUNT):
        row = {"source": f"s{k}"} | ({} if write else {"caption": f"sentence {k} of them"})
        if write:
            row["media"] = f"{k}.{suffix}"
            (tmp_path / row["media"]).write_bytes(write(k))
        rows.append(json.dumps(row) + "\n")
    (tmp_path / "m.jsonl").write_text("".join(rows))
    (report,) = make_shards(tmp_path / "m.jsonl", tmp_path / "out")
    assert (report.samples, report.quarantined) == (COUNT, 0)
    found = check_folder(tmp_path / "out", decode=True)
    assert found.damages == []
    counts = {name: getattr(found, name) for name in VIEWS}
    assert counts == {name: COUNT if name == modality else 0 for name in VIEWS}
    data = DataSpec(train=str(tmp_path / "out"), workers=0)
    loader = train_loader(data, VIEWS, COUNT, 0, 0, 1, tokenizer)
    batch = next(loader)
    loader.close()
    for name, view in batch.views.items():
        assert view.present_B.tolist() == [name == modality] * COUNT
        assert view.dummy == (name != modality)
    lengths = batch.views[modality].lengths_P.tolist()
    if modality == "text":
        words = {tokenizer.decode(ids.tolist()) for ids in batch.views["text"].data}
        assert words == {f"sentence {k} of them" for k in range(COUNT)}
    else:
        assert lengths == [4000 if modality == "audio" else 3] * COUNT


def test_the_words_of_the_crop_come_with_the_crop(tmp_path, tokenizer):
    """Each word names the tenth of a second at which it is said."""
    words = [[k / 10, (k + 1) / 10, f"{k}"] for k in range(30)]
    (tmp_path / "a.wav").write_bytes(
        write_media(None, tone(3.0, 8000), container="wav", rate=8000, audio_codec="pcm_s16le")
    )
    row = {"media": "a.wav", "transcript": {"words": words}}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    make_shards(tmp_path / "m.jsonl", tmp_path / "out")
    assert check_folder(tmp_path / "out").text == 1
    corpus = open_corpus(str(tmp_path / "out"), 1 << 20)
    ((entry,),) = [list(corpus.entries(block)) for block in corpus.blocks()]
    assert entry.captions == (" ".join(map(str, range(30))),)  # what can be found by words
    views = {
        "audio": ViewSpec(modality="audio", crop_s=0.5, hz=8000),
        "text": ViewSpec(modality="text", crop_s=0.5, length=20, texts="transcript"),
    }
    loader = train_loader(
        DataSpec(train=str(tmp_path / "out"), workers=0), views, 8, 0, 0, 1, tokenizer
    )
    batch = next(loader)
    loader.close()
    starts = batch.views["audio"].start_s_P.tolist()
    assert len(set(starts)) == 8
    for start, ids in zip(starts, batch.views["text"].data, strict=True):
        inside = [k for k in range(30) if start <= k / 10 + 0.05 < start + 0.5]
        assert tokenizer.decode(ids.tolist()) == " ".join(map(str, inside))
