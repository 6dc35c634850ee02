"""Retrieval by map scores: tables against one pair at a time, and the directions read from them."""

from functools import partial

import numpy as np
import pytest
import torch
from small_methods import equal_rows, full_batch, small_model
from tiny_run import TREE, tiny_batch, tiny_model, tiny_spec
from torch.nn import functional as F

from mmssl import config
from mmssl.build import build_model
from mmssl.check import BEGINS, SPECIAL, VOCABULARY, fake_batch
from mmssl.eval import measure, parts, tables
from mmssl.eval.embed import Encoded, Rows, Want, collect
from mmssl.eval.items import ItemTable, Protocol
from mmssl.eval.retrieval import ranks
from mmssl.eval.tables import Sides, Table
from mmssl.heads.score import ScoreMap
from mmssl.types import UserError

LOCAL = ("avol_net", "lvs", "ez_vsl", "davenet", "matchmap", "dense_av")
AV = ("video", "audio")
MAPS = Want(embeddings=False, dense=False, match=False, masked=False, maps=True)
CPU = torch.device("cpu")


def model_of(name):
    sizes = ["views.video={crop_s: 2.0, size: 64}", "views.audio.crop_s=2.0"]
    return small_model(config.load(f"configs/runs/{name}_tiny.yaml", sizes)).eval()


def collected(model, batches):
    rows, found = collect({"m": model}, batches, {"m": MAPS})
    return rows, found["m"]


def side(batch, model):
    """(cells, steps) of a batch's rows as the score reads them, and the score."""
    ((score, views),) = (found for task in model.tasks.values() for found in task.maps())
    passes = model.passes(batch)
    return score, *(score.embed(passes, view)[0] for view in views)


@pytest.mark.parametrize("name", LOCAL)
def test_tables_are_the_scores_of_all_pairs(name):
    """Two batches of six rows, of which each lacks a sound (row 1) and a picture (row 2)."""
    model = model_of(name)
    assert model.map_pairs() == [AV]
    batches = [fake_batch(model.spec, 6, seed) for seed in (0, 1)]
    rows, encoded = collected(model, batches)
    table, both = encoded.tables[AV], [0, 3, 4, 5, 6, 9, 10, 11]
    assert table.rows_P.tolist() == both
    with torch.no_grad():
        read = [side(batch, model) for batch in batches]
        videos, sounds = (
            [tuple(part[i : i + 1] for part in one[s]) for one in read for i in range(6)]
            for s in (1, 2)
        )
        score = read[0][0]
        want = [[float(score(videos[i], sounds[j])) for j in both] for i in both]
    np.testing.assert_allclose(table.scores_PP, want, rtol=1e-5, atol=1e-5)
    assert np.ptp(table.scores_PP) > 1e-3  # the pairs differ by much more than that
    found = measure.retrieval(rows, encoded, model.space_for, Protocol(0, 20))
    assert list(found) == ["audio->video", "video->audio"]
    own = np.diag(want)
    for direction, others in (
        ("audio->video", np.asarray(want)),
        ("video->audio", np.array(want).T),
    ):
        assert found[direction]["mean_rank"] == pytest.approx((others >= own).sum(0).mean())
        assert found[direction]["space"] == "map"
        assert found[direction]["n"] == 8
        assert found[direction]["missing"] == ["row-1", "row-2"] * 2
        assert set(found[direction]["ci"]) >= {"r_at_1", "r_at_10", "median_rank"}


def sides_of(model, seeds=(0, 1, 2)):
    found = []
    for number, seed in enumerate(seeds):
        batch = full_batch(model.spec, 5, seed)
        found.append(tables.sides(batch, 5 * number, *model.map_sides(batch)[AV]))
    return found


@pytest.mark.parametrize("name", LOCAL)
def test_blocks_change_nothing(name):
    model = model_of(name)
    read, score = sides_of(model), partial(model.map_table, AV)
    whole = tables.table(read, score, CPU)
    assert whole.rows_P.tolist() == list(range(15))
    for block in (1, 4, 15):
        again = tables.table(read, score, CPU, block=block).scores_PP
        np.testing.assert_allclose(again, whole.scores_PP, rtol=1e-6, atol=1e-9)
    order = [read[2], read[0], read[1]]
    moved = tables.table(order, score, CPU, block=2)
    back = moved.rows_P.argsort()
    np.testing.assert_allclose(moved.scores_PP[np.ix_(back, back)], whole.scores_PP, rtol=1e-6)


def test_few_similarities_are_in_memory_at_a_time(monkeypatch):
    model, asked = model_of("matchmap"), []
    read = sides_of(model)
    each = read[0].video[1][0].numel() * read[0].query[1].shape[1]

    def score(video, query):
        asked.append(len(video[0]) * len(query[0]) * each)
        return model.map_table(AV, video, query)

    whole = tables.table(read, score, CPU)
    assert asked == [15 * 15 * each]
    monkeypatch.setattr(tables, "_SIMILARITIES", 10 * each)
    blocks = tables.table(read, score, CPU)
    np.testing.assert_allclose(blocks.scores_PP, whole.scores_PP, rtol=1e-6)
    assert max(asked[1:]) == 9 * each
    assert sum(asked[1:]) == 15 * 15 * each
    monkeypatch.setattr(tables, "_SIMILARITIES", 1)  # a pair is always possible
    assert np.array_equal(tables.table(read, score, CPU).rows_P, whole.rows_P)
    assert asked[-1] == each


@pytest.mark.parametrize("name", LOCAL)
def test_equal_clips_are_tied_in_every_block(name):
    """A model that sees no difference is at the bottom, not at chance by rounding."""
    model = model_of(name)
    batch = equal_rows(full_batch(model.spec, 7))
    read = tables.sides(batch, 0, *model.map_sides(batch)[AV])
    one = Sides(
        read.rows_P, *(tuple(p[:1].expand_as(p) for p in s) for s in (read.video, read.query))
    )
    table = tables.table([one], partial(model.map_table, AV), CPU, block=3)
    assert len(np.unique(table.scores_PP)) == 1


def test_avol_nets_table_orders_pairs_as_its_match():
    model = model_of("avol_net")
    batch, partner = full_batch(model.spec, 6), torch.tensor([3, 0, 1, 5, 2, 4])
    _, encoded = collected(model, [batch])
    scores = torch.from_numpy(encoded.tables[AV].scores_PP)
    (task,) = model.tasks.values()
    with torch.no_grad():
        logits = task.score.scale(scores[range(6), partner])  # keeps the order: exp(log_scale) > 0
    torch.testing.assert_close(logits, model.match_logit(batch, partner), rtol=1e-5, atol=1e-5)


def test_davenets_table_is_a_product_of_means():
    """Harwath et al. 2016: without a maximum, the means of cells and steps tell the score."""
    model = model_of("davenet")
    (read,) = sides_of(model, seeds=(0,))
    cells = read.video[0].flatten(1, 2).mean(1)
    weight = read.query[1][..., None].float()
    steps = (F.normalize(read.query[0], dim=-1) * weight).sum(1) / weight.sum(1)
    table = tables.table([read], partial(model.map_table, AV), CPU, block=2)
    np.testing.assert_allclose(table.scores_PP, cells @ steps.T, rtol=1e-4, atol=1e-6)


def test_pictures_and_texts_are_ranked_by_their_map():
    where = {"between": ["video", "text"], "objective": {"kind": "info_nce"}}
    where["score"] = {"kind": "map", "dim": 8, "query": "mean", "aligned": True}
    tasks = {"align": {"kind": "pairs", "pairs": {"where": where}}}
    towers = {k: v for k, v in TREE["towers"].items() if k != "audio"}
    views = {k: v for k, v in TREE["views"].items() if k != "audio"}
    model = tiny_model(tiny_spec(tasks=tasks, towers=towers, views=views, joints={})).eval()
    batch = tiny_batch()
    batch.views.pop("audio")
    rows, encoded = collected(model, [batch])
    assert model.dense(batch) is None  # no sound
    found = measure.retrieval(rows, encoded, model.space_for, Protocol(0, 0))
    assert list(found) == ["text->video", "video->text"]
    assert found["text->video"]["missing"] == ["row-0", "row-2"]
    assert "equal_text" in found["video->text"]


def test_vectors_stay_the_default():
    spec = config.load("configs/runs/quickstart.yaml")
    with torch.device("meta"):
        model = build_model(spec, VOCABULARY, SPECIAL, BEGINS)
    assert any(task.maps() for task in model.tasks.values())
    assert model.map_pairs() == []


# ---------------------------------------------------------------- directions and ranks


def rows_of(count, **meta):
    clips = range(count)
    return Rows([str(i) for i in clips], [*clips], [i + 1 for i in clips], [dict(meta)] * count)


def constructed(order):
    """Video i shows code i in one of six cells; sound order[j] is code j in two of three steps."""
    count = len(order)
    cells = torch.zeros(count, 2, 3, count)
    cells[range(count), torch.arange(count) % 2, torch.arange(count) % 3] = torch.eye(count)
    steps = torch.randn(count, 3, count, generator=torch.Generator().manual_seed(0))
    steps[order, :2] = torch.eye(count)[:, None]  # the third is padding: noise
    valid = torch.ones(count, 3, dtype=torch.bool)
    valid[:, 2] = False
    rows_P = np.arange(count)
    return Sides(rows_P, (cells, torch.ones(count, 2, 3, dtype=torch.bool)), (steps, valid))


def test_features_made_to_match_are_found_first():
    score = ScoreMap("max", "mean")

    def table(order):
        return tables.table(
            [constructed(order)], lambda v, a: score(v[0], a[0], v[1], a[1]), CPU, block=5
        )

    right, items = Encoded(tables={AV: table(torch.arange(12))}), ItemTable()
    found = measure.retrieval(rows_of(12), right, lambda a, b: None, Protocol(0, 50, items))
    wrong = Encoded(tables={AV: table(torch.arange(12).roll(1))})
    for name, row in found.items():
        assert row["r_at_1"] == row["mean_rank"] == row["expected_rank"] == 1.0
        assert row["ci"]["r_at_1"] == [1.0, 1.0]
        assert row["chance"]["r_at_1"] == pytest.approx(1 / 12)
        assert list(items.values[f"retrieval.{name}.rank"].values()) == [1.0] * 12
    for row in measure.retrieval(rows_of(12), wrong, lambda a, b: None, Protocol(0, 0)).values():
        assert row["r_at_1"] == 0.0  # another clip's sound is found instead


def test_each_direction_reads_its_own_side_of_the_table():
    """Video 0 likes sound 1 best; each sound likes its own video best."""
    table = Table(np.arange(2), np.asarray([[1.0, 2.0], [0.0, 3.0]], np.float32))
    found = measure.retrieval(
        rows_of(2), Encoded(tables={AV: table}), lambda a, b: None, Protocol(0, 0)
    )
    assert found["video->audio"]["r_at_1"] == 0.5
    assert found["audio->video"]["r_at_1"] == 1.0


def test_a_table_of_cosines_ranks_as_the_vectors_do():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(40, 8)) for _ in range(2))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    labels, groups = np.arange(40) % 20, np.arange(40) % 2
    for options in ({}, {"dual_softmax": 20.0}, {"chunk": 7}):
        args = (labels, labels, groups, groups)
        want, got = (
            ranks(a, b, *args, **options),
            ranks(unit[0] @ unit[1].T, None, *args, **options),
        )
        for name, column in vars(want).items():
            np.testing.assert_allclose(getattr(got, name), column, err_msg=name)


def test_dual_softmax_of_scores_of_any_size_does_not_overflow():
    scores = 1e4 * np.eye(5) + 1e4
    assert ranks(scores, None, range(5), range(5), dual_softmax=20.0).hits(1).all()


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="scores hold values that are not finite"):
        ranks([[np.nan, 1.0]], None, [0], [0, 1])


def test_clips_of_two_objects_and_sets_without_a_pair_are_left_out():
    model = model_of("ez_vsl")
    batch = full_batch(model.spec, 4)
    batch.meta[2] = {"kind": "two"}
    rows, encoded = collected(model, [batch])
    assert encoded.tables[AV].rows_P.tolist() == [0, 1, 3]
    assert (
        measure.retrieval(rows, encoded, model.space_for, Protocol(0, 0))["audio->video"]["n"] == 3
    )
    nothing = tables.sides(batch, 0, *model.map_sides(batch)[AV][:2], torch.zeros(4))
    empty = tables.table([nothing], partial(model.map_table, AV), CPU)
    row = measure.retrieval(rows, Encoded(tables={AV: empty}), model.space_for, Protocol())
    assert row["video->audio"]["n"] == 0
    assert row["video->audio"]["n_missing"] == 3


def test_clips_of_different_grids_are_refused():
    with pytest.raises(UserError, match="retrieval: clips have different grids"):
        tables.table([constructed(torch.arange(3)), *sides_of(model_of("lvs"))], None, CPU)


def test_a_part_of_the_test_set_takes_its_part_of_the_table():
    scores = np.arange(16, dtype=np.float32).reshape(4, 4)
    encoded = Encoded(tables={AV: Table(np.asarray([0, 2, 3, 5]), scores)})
    _, few = parts.take(rows_of(6), encoded, np.asarray([2, 4, 5]))
    assert few.tables[AV].rows_P.tolist() == [0, 2]  # clips 2 and 5
    assert few.tables[AV].scores_PP.tolist() == [[5.0, 7.0], [13.0, 15.0]]
