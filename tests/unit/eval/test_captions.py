"""Retrieval with several captions per clip."""

import numpy as np
import pytest
import torch
from tiny_run import tiny_batch, tiny_model, tiny_spec
from torchmetrics.retrieval import RetrievalHitRate, RetrievalRecall

import mmssl.data.ordered
import mmssl.eval.load
from mmssl.eval import captions, measure, results, suites
from mmssl.eval.embed import Encoded, Rows
from mmssl.types import UserError

SPACES = {frozenset(("text", "audio")): "ta", frozenset(("text", "video")): "tv"}


class Spaces:
    def space_for(self, a, b):
        return SPACES.get(frozenset((a, b)))


def unit(rng, rows):
    x = rng.normal(size=(rows, 4)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def toy(clips=12, each=5):
    rng = np.random.default_rng(0)
    keys = [("text", "ta"), ("text", "tv"), ("audio", "ta"), ("video", "tv")]
    encoded = Encoded(
        vectors={key: unit(rng, clips) for key in keys},
        present={key: np.ones(clips, bool) for key in keys},
    )
    owner = np.repeat(np.arange(clips), each)
    vectors = {
        s: encoded.vectors[m, s][owner] + 0.8 * unit(rng, clips * each)
        for m, s in (("audio", "ta"), ("video", "tv"))
    }
    vectors = {s: x / np.linalg.norm(x, axis=1, keepdims=True) for s, x in vectors.items()}
    rows = Rows([str(i) for i in range(clips)], list(range(clips)), [0] * clips, [{}] * clips)
    return rows, encoded, captions.Captions(owner, vectors)


def test_rates_are_those_of_torchmetrics():
    rows, encoded, said = toy()
    table = captions.retrieval(rows, encoded, said, Spaces())
    assert sorted(table) == sorted(
        f"{a}->{b}"
        for x in ("audio", "video", "audio+video")
        for a, b in (("text", x), (x, "text"))
    )
    sides = {"audio": [("audio", "ta")], "video": [("video", "tv")]}
    sides["audio+video"] = sides["audio"] + sides["video"]
    for name, keys in sides.items():
        scores = sum(said.vectors[s] @ encoded.vectors[m, s].T for m, s in keys) / len(keys)
        scores = torch.from_numpy((scores + 1) / 2)
        own = torch.from_numpy(said.owner_C[:, None] == np.arange(12)[None])
        for row, x, truth in (
            (table[f"text->{name}"], scores, own),
            (table[f"{name}->text"], scores.T, own.T),
        ):
            query = torch.arange(len(x)).repeat_interleave(x.shape[1])
            flat = (x.flatten(), truth.flatten())
            hit = RetrievalHitRate(top_k=5)(*flat, indexes=query)
            recall = RetrievalRecall(top_k=5)(*flat, indexes=query)
            assert row["r_at_5"] == pytest.approx(float(hit), abs=1e-6)
            assert row["recall_at_5"] == pytest.approx(float(recall), abs=1e-6)
            assert (row["n"], row["captions"]) == (len(x), 60)


def test_clips_without_the_other_side_take_no_part():
    rows, encoded, said = toy()
    encoded.present["audio", "ta"][3:] = False
    table = captions.retrieval(rows, encoded, said, Spaces())
    assert (table["text->audio"]["n"], table["audio->text"]["n"]) == (15, 3)
    assert table["text->video"]["n"] == 60
    encoded.present["audio", "ta"][:] = False
    table = captions.retrieval(rows, encoded, said, Spaces())
    assert table["text->audio+video"] == {"n": 0, "captions": 0}


class Words:
    """Letters as ids."""

    def encode(self, text, length):
        return [*(4 + ord(c) % 20 for c in text[: length - 1]), 3]


def test_the_first_caption_has_the_vector_of_the_batch(tmp_path, monkeypatch):
    spec = tiny_spec(data={"test": str(tmp_path)})
    (tmp_path / "manifest.json").write_text('{"shards": []}')
    batch = tiny_batch(6, missing=False)
    batch.meta = [{"captions": [f"clip {i}", f"another {i}"][: 1 + i % 2]} for i in range(6)]
    ids = [torch.tensor(Words().encode(m["captions"][0], 8)) for m in batch.meta]
    padded = torch.nn.utils.rnn.pad_sequence([*ids, torch.zeros(8, dtype=torch.long)], True)
    batch.views["text"].data = padded[:-1]  # a view has its full length
    batch.views["text"].lengths_P = torch.tensor([len(x) for x in ids])
    model = tiny_model(spec).eval()
    monkeypatch.setattr(mmssl.eval.load, "load_model", lambda *a, **k: (model, spec, Words()))
    monkeypatch.setattr(mmssl.data.ordered, "eval_batches", lambda *a, **k: iter([batch]))
    seen = []
    monkeypatch.setattr(
        captions, "retrieval", lambda rows, e, said, m: seen.append((e, said)) or {}
    )
    suites.main("retrieval", str(tmp_path), ["captions=all", "random=false", "report=false"])
    ((encoded, said),) = seen
    assert said.owner_C.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5]
    first = np.unique(said.owner_C, return_index=True)[1]
    assert np.allclose(said.vectors["avt"][first], encoded.vectors["text", "avt"], atol=1e-5)
    assert results.read(tmp_path / "results_retrieval.json")["captions"] == {}


def test_runs_that_read_no_captions(tmp_path, monkeypatch):
    class Session:
        def view_of(self, _):
            return "doc", tiny_spec().views["text"].model_copy(update={"segments": "single"})

    with pytest.raises(UserError, match="reads documents"):
        captions.encode(Session(), Rows(), None)


def test_directions_need_a_space():
    _, encoded, _ = toy()
    assert list(measure.legs_of(encoded, lambda a, b: None)) == []
