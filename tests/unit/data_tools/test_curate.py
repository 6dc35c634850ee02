"""Curation keeps the clips whose sound and picture match."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from embed_runs import run_folder
from media_files import moving_frames, tone, write_media
from sklearn.metrics import mutual_info_score

from data_tools import curate as tool
from data_tools.curate import choose, open_vectors
from data_tools.manifest import read_rows
from data_tools.mutual import mutual_information, pointwise, select
from mmssl.index.vectors import _FACTS, _schema
from mmssl.index.vectors import main as embed
from mmssl.types import UserError

CLASSES, CLIPS = 12, 600


def test_information_as_in_sklearn():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5, (2, 3, 200))
    ids[1, 1] = (ids[0, 1] + (rng.random(200) < 0.3)) % 5
    alone = [mutual_info_score(ids[0, p], ids[1, p]) for p in range(3)]
    assert mutual_information(ids) == pytest.approx(np.mean(alone), abs=1e-12)
    assert pointwise(ids).mean() == pytest.approx(np.mean(alone), abs=1e-12)
    same = np.arange(60).reshape(1, 1, -1) % 6
    assert mutual_information(np.concatenate([same, same])) == pytest.approx(np.log(6))


def test_greedy_against_brute_force():
    """Never below 1 - 1/e of the best subset, and the best one where the clips of it stand out."""
    shares = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, 3, (2, 1, 10))
        subsets = itertools.combinations(range(10), 5)
        best = max(mutual_information(ids[:, :, list(s)]) for s in subsets)
        chosen = select(ids, 5, taken=1)
        assert len(set(chosen.tolist())) == 5
        shares.append(mutual_information(ids[:, :, chosen]) / best)
    assert min(shares) >= 1 - 1 / np.e
    a = np.array([0, 0, 0, 1, 1, 1, 0, 1, 0, 1])
    v = np.array([0, 0, 0, 1, 1, 1, 1, 0, 1, 0])
    assert select(np.stack([a, v])[:, None], 6, taken=1).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("batch", [512, 4096])
def test_matched_assignments_are_kept(batch):
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 20, 4000)
    matched = rng.random(4000) < 0.5
    heard = np.where(matched, truth, (truth + rng.integers(1, 20, 4000)) % 20)
    kept = select(np.stack([heard, truth])[:, None], int(matched.sum()), batch=batch)
    assert len(kept) == matched.sum()
    assert matched[kept].mean() >= 0.95


def vectors(folder, corpus, keys, heard, seen, model="m"):
    """Two files of rows as `mmssl embed` writes them; sounds in two windows each."""
    folder.mkdir()
    for part in range(2):
        rows = []
        for k in range(part, len(keys), 2):
            for modality, x in (("audio", heard[k]), ("audio", 3 * heard[k]), ("video", seen[k])):
                row = dict.fromkeys(("id", "source", "shard", "caption", "model"), "")
                row |= {"space": "joint", "modality": modality, "key": keys[k], "vector": x}
                rows.append(row | {"folder": str(corpus), "number": k, "start_s": 0.0})
        facts = {"model": model, "run": "", "which": "ema", "settings": {}, "folder": str(corpus)}
        facts |= {"units": [], "skipped": [], "made": part, "version": 1}
        table = pa.Table.from_pylist(rows, _schema(pa))
        table = table.replace_schema_metadata({_FACTS: json.dumps(facts)})
        pq.write_table(table, folder / f"part{part}.parquet")


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Vectors of clips half of which have the sound of a clip of another class."""
    folder = tmp_path_factory.mktemp("curate")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, 16))
    classes = np.arange(CLIPS) % CLASSES
    matched = np.arange(CLIPS) < CLIPS // 2
    other = np.where(matched, classes, (classes + rng.integers(1, CLASSES, CLIPS)) % CLASSES)
    heard = centres[other] + rng.normal(0, 0.3, (CLIPS, 16))
    seen = centres[classes] + rng.normal(0, 0.3, (CLIPS, 16))
    keys = [f"clip{k:04d}.mp4" for k in range(CLIPS)]
    (folder / "media").mkdir()
    data = write_media(moving_frames(2), tone(0.2, 16000))
    for key in keys:
        (folder / "media" / key).write_bytes(data)
    corpus = folder.resolve() / "media"
    vectors(folder / "vectors", corpus, keys, heard.astype("f4"), seen.astype("f4"))
    # an encoder of pictures that knows nothing of the sound's
    apart = (seen @ rng.normal(size=(16, 16)))[:, ::-1].astype("f4")
    vectors(folder / "apart", corpus, keys, heard.astype("f4"), apart, model="other")
    return folder


@pytest.mark.parametrize(
    ("by", "pictures"), [("mi", "vectors"), ("mi", "apart"), ("similarity", "vectors")]
)
def test_half_mismatched(halves, by, pictures):
    audio = open_vectors(halves / "vectors", "audio")
    video = open_vectors(halves / pictures, "video")
    choice = choose(audio, video, by, 0.5, [CLASSES, 2 * CLASSES])
    kept = [choice.keys[n] for n in choice.kept]
    assert len(kept) == CLIPS // 2
    assert np.mean([key < f"clip{CLIPS // 2:04d}" for key in kept]) >= 0.95


def test_command_writes_scores_and_a_manifest(halves, tmp_path, capsys):
    words = [str(halves / "vectors"), "--out", str(tmp_path), "--keep", "200", "--by", "similarity"]
    assert tool.main(words) == 0
    assert "200 of 600" in capsys.readouterr().out
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").open()]
    least = min(s["similarity"] for s in scores if s["kept"])
    assert sum(s["kept"] for s in scores) == 200
    assert all(s["similarity"] <= least for s in scores if not s["kept"])
    rows = list(read_rows(tmp_path / "kept.jsonl"))
    assert {row.media.name for row in rows} == {s["key"] for s in scores if s["kept"]}
    assert all(row.media.is_file() and row.meta["similarity"] >= least for row in rows)


def test_without_rows_no_manifest_of_an_earlier_choice_stays(halves, tmp_path, capsys):
    vectors_of_shards = tmp_path / "vectors"
    x = np.eye(4, dtype="f4")
    vectors(vectors_of_shards, tmp_path / "shards", [f"k-{k}" for k in range(4)], x, x)
    (tmp_path / "kept.jsonl").write_text("old\n")
    words = [str(vectors_of_shards), "--out", str(tmp_path), "--keep", "0.01"]
    assert tool.main([*words, "--by", "similarity"]) == 0
    told = capsys.readouterr().out
    assert "1 of 4 clips" in told
    assert "--manifest" in told
    assert not (tmp_path / "kept.jsonl").exists()


def test_vectors_of_a_run(tmp_path):
    """From `mmssl embed` to a manifest; the score is the cosine of the vectors themselves."""
    (tmp_path / "media").mkdir()
    for k in range(4):
        data = write_media(moving_frames(12, seed=k), tone(1.2, 16000, 300 + 200 * k))
        (tmp_path / "media" / f"clip{k}.mp4").write_bytes(data)
    model = run_folder(tmp_path / "run")
    embed(str(tmp_path / "media"), [f"model={tmp_path / 'run'}", f"out={tmp_path / 'vectors'}"])
    words = [str(tmp_path / "vectors"), "--out", str(tmp_path / "out"), "--keep", "0.5"]
    assert tool.main([*words, "--by", "similarity"]) == 2  # several spaces
    assert tool.main([*words, "--by", "similarity", "--space", "av"]) == 0
    rows = list(read_rows(tmp_path / "out" / "kept.jsonl"))
    scores = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").open()]
    assert [row.media.name for row in rows] == [s["key"] for s in scores if s["kept"]]
    paths = [tmp_path / "media" / s["key"] for s in scores]
    heard, seen = (model.encode({m: paths}, space="av") for m in ("audio", "video"))
    cosines = torch.cosine_similarity(heard, seen).numpy()
    # alone, a sound begins with its own first sample
    assert np.abs(cosines - [s["similarity"] for s in scores]).max() < 1e-2


def test_errors(halves, tmp_path, capsys):
    with pytest.raises(UserError, match="no vectors"):
        open_vectors(tmp_path / "none", "audio")
    with pytest.raises(UserError, match="it has joint"):
        open_vectors(halves / "vectors", "audio", "other")
    with pytest.raises(UserError, match="no text vectors"):
        open_vectors(halves / "vectors", "text")
    audio, video = (
        open_vectors(halves / f, m) for f, m in (("vectors", "audio"), ("apart", "video"))
    )
    with pytest.raises(UserError, match="one space of both"):
        choose(audio, video, "similarity", 0.5, [4])
    assert tool.main([str(halves / "vectors"), "--out", str(tmp_path), "--keep", "0"]) == 2
    assert "--keep 0" in capsys.readouterr().err
    assert tool.main([str(halves / "vectors"), "--out", str(tmp_path), "--keep", "inf"]) == 2
    assert "--keep inf" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text('{"media": "elsewhere.mp4"}\n')
    words = [str(halves / "vectors"), "--out", str(tmp_path), "--keep", "9", "--by", "similarity"]
    assert tool.main([*words, "--manifest", str(tmp_path / "rows.jsonl")]) == 2
    assert "none of its rows" in capsys.readouterr().err
