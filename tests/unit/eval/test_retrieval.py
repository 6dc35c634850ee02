import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torchmetrics.retrieval import (
    RetrievalHitRate,
    RetrievalMAP,
    RetrievalMRR,
    RetrievalNormalizedDCG,
    RetrievalRecall,
)

from mmssl.eval.retrieval import (
    CUTS,
    Items,
    direction,
    equal_text,
    normalize,
    ranks,
    same_group,
    top,
)

RNG = np.random.default_rng


def pair(n=60, width=8, noise=1.0, seed=0):
    rng = RNG(seed)
    a = rng.normal(size=(n, width))
    return a, a + noise * rng.normal(size=(n, width))


def items(n, **known):
    return Items(sources_N=np.arange(n), **known)


def by_sort(a, b, labels):
    """Rank of the first relevant item by a full sort (no ties in continuous data)."""
    scores = normalize(a) @ normalize(b).T
    order = np.argsort(-scores, axis=1)
    return 1 + (labels[:, None] == labels[order]).argmax(axis=1)


def positive_scores(a, b):
    """Cosines moved to [0, 1]: torchmetrics takes items with a negative score for not retrieved."""
    return torch.from_numpy((normalize(a) @ normalize(b).T + 1) / 2).flatten()


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_ranks_match_a_full_sort(chunk):
    a, b = pair()
    labels = RNG(1).integers(0, 7, 60)
    for wanted in (np.arange(60), labels):
        found = ranks(a, b, wanted, wanted, chunk=chunk)
        assert np.array_equal(found.pessimistic_Q, by_sort(a, b, wanted))
        assert np.array_equal(found.expected_Q, found.pessimistic_Q)


def test_ranks_match_faiss():
    a, b = pair(200, 16, noise=2.0)
    index = faiss.IndexFlatIP(16)
    index.add(normalize(b).astype(np.float32))
    _, order = index.search(normalize(a).astype(np.float32), 200)
    place = 1 + (order == np.arange(200)[:, None]).argmax(axis=1)
    assert np.array_equal(ranks(a, b, np.arange(200), np.arange(200)).pessimistic_Q, place)
    assert np.array_equal(top(a, b, 200), order)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_hit_rate_and_map_match_torchmetrics(k):
    a, b = pair(40, 6, noise=1.5)
    labels = RNG(2).integers(0, 9, 40)
    scores = positive_scores(a, b)
    relevant = torch.from_numpy(labels[:, None] == labels[None]).flatten()
    query = torch.arange(40).repeat_interleave(40)
    found = ranks(a, b, labels, labels)
    hits = RetrievalHitRate(top_k=k)(scores, relevant, indexes=query)
    assert found.hits(k).mean() == pytest.approx(float(hits), abs=1e-6)
    assert found.precision_Q.mean() == pytest.approx(
        float(RetrievalMAP()(scores, relevant, indexes=query)), abs=1e-6
    )


def test_one_relevant_item_makes_map_the_mean_reciprocal_rank():
    a, b = pair(40, 6, noise=1.5)
    scores = positive_scores(a, b)
    query = torch.arange(40).repeat_interleave(40)
    own = torch.eye(40, dtype=torch.bool).flatten()
    found = direction(a, b, items(40), resamples=0)
    assert found["map"] == pytest.approx(
        float(RetrievalMRR()(scores, own, indexes=query)), abs=1e-6
    )


def test_identical_embeddings_score_nothing():
    x = np.tile(RNG(3).normal(size=8), (100, 1))
    found = direction(x, x, items(100, classes_N=np.arange(100) % 10), resamples=0)
    assert found["r_at_1"] == found["r_at_10"] == found["class_at_1"] == 0.0
    assert found["median_rank"] == found["mean_rank"] == 100
    assert found["expected_rank"] == pytest.approx(50.5)


def test_zero_vectors_score_nothing():
    a, _ = pair(20)
    assert direction(a, np.zeros((20, 8)), items(20), resamples=0)["r_at_10"] == 0.0


def test_perfect_embeddings_score_everything():
    a, _ = pair(30)
    found = direction(a, 5 * a, items(30), resamples=50)
    assert found["r_at_1"] == found["map"] == found["ndcg_at_10"] == 1.0
    assert found["median_rank"] == 1
    assert found["ci"]["r_at_1"] == [1.0, 1.0]


def test_toy_ties():
    query, base = np.array([[1.0, 0.0]]), np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
    found = ranks(query, base, [1], [0, 1, 2, 3])
    assert found.pessimistic_Q.tolist() == [2]
    assert found.expected_Q.tolist() == [1.5]
    both = ranks(query, base, [1], [1, 1, 2, 3])  # the tied items are both relevant
    assert both.pessimistic_Q.tolist() == [1]
    # precision at ranks 1 and 2
    assert both.precision_Q.tolist() == [1.0]


def test_average_precision_counts_ties_against_the_encoder():
    # scores 1, 1, 0.5 with the second and third relevant: ranks 2 and 3
    base = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, np.sqrt(3)]])
    found = ranks([[1.0, 0.0]], base, [1], [0, 1, 1])
    assert found.precision_Q[0] == pytest.approx((1 / 2 + 2 / 3) / 2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 4))
def test_permuting_the_database_changes_nothing(seed, n, width):
    rng = RNG(seed)
    a, b = rng.integers(-2, 3, (n, width)), rng.integers(-2, 3, (n, width))  # many ties
    labels, order = rng.integers(0, 4, n), rng.permutation(n)
    plain = ranks(a, b, labels, labels)
    moved = ranks(a, b[order], labels, labels[order])
    assert np.array_equal(plain.pessimistic_Q, moved.pessimistic_Q)
    assert np.allclose(plain.expected_Q, moved.expected_Q)
    assert np.allclose(plain.precision_Q, moved.precision_Q)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30))
def test_swapping_the_sides_swaps_the_directions(seed, n):
    rng = RNG(seed)
    a, b = rng.integers(-2, 3, (n, 3)), rng.integers(-2, 3, (n, 3))
    scores = (normalize(a) @ normalize(b).T).astype(np.float32)
    back = ranks(b, a, np.arange(n), np.arange(n)).pessimistic_Q
    assert np.array_equal(back, (np.diagonal(scores)[:, None] <= scores.T).sum(axis=1))


def test_random_embeddings_are_at_chance():
    n = 400
    rng = RNG(5)
    found = direction(
        rng.normal(size=(n, 16)),
        rng.normal(size=(n, 16)),
        items(n, classes_N=np.arange(n) % 10, groups_N=np.arange(n) % 40),
        resamples=200,
    )
    assert found["chance"] == {
        "r_at_1": 1 / n,
        "r_at_5": 5 / n,
        "r_at_10": 10 / n,
        "median_rank": 200.5,
        "class_at_1": pytest.approx(0.1),
    }
    assert found["class_at_1"] == pytest.approx(0.1, abs=0.05)
    assert found["median_rank"] == pytest.approx(200, abs=40)
    assert found["same_group"]["chance"] == pytest.approx(0.1)
    assert found["same_group"]["times_chance"] == pytest.approx(1.0, abs=0.5)
    low, high = found["ci"]["class_at_1"]
    assert low < found["class_at_1"] < high


def test_same_group_ranks_inside_the_group_only():
    # 4 groups of 3: inside a group only the second coordinate tells items apart
    groups = np.repeat(np.arange(4), 3)
    a = np.concatenate([np.eye(4)[groups] * 3, np.tile(np.eye(3), (4, 1))], axis=1)
    shuffled = a.copy()
    shuffled[:, 4:] = a[np.roll(np.arange(12).reshape(4, 3), 1, axis=1).ravel(), 4:]
    facts = items(12, groups_N=groups)
    assert same_group(a, a, facts, 0)["r_at_1"] == 1.0
    assert same_group(a, a, facts, 0)["times_chance"] == pytest.approx(3.0)
    assert same_group(a, shuffled, facts, 0)["r_at_1"] == 0.0


def test_groups_of_one_are_left_out():
    a, _ = pair(5)
    found = same_group(a, a, items(5, groups_N=np.array([0, 0, 1, 2, 3])), 0)
    assert found["n"] == 2
    assert found["chance"] == 0.5
    alone = same_group(a, a, items(5, groups_N=np.arange(5)), 0)
    assert alone == {"r_at_1": None, "chance": None, "times_chance": None, "n": 0}


def test_equal_captions_share_their_label_and_missing_ones_do_not():
    a = np.eye(4)
    b = np.eye(4)[[1, 0, 3, 2]]  # every query finds its neighbour
    found = direction(a, b, items(4, texts_N=np.array([7, 7, 0, 0])), resamples=0)
    assert found["r_at_1"] == 0.0
    assert found["equal_text"]["r_at_1"] == 0.5
    assert found["equal_text"]["duplicates"] == 2


def test_errors():
    a, b = pair(4)
    with pytest.raises(ValueError, match="no relevant item"):
        ranks(a, b, [0, 1, 2, 9], [0, 1, 2, 3])
    a[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        ranks(a, b, [0, 1, 2, 3], [0, 1, 2, 3])


def captioned(clips=30, each=5, noise=2.0):
    """Five captions per clip: (caption vectors, clip vectors, clip of each caption)."""
    rng = RNG(8)
    clip = rng.normal(size=(clips, 8))
    return (
        np.repeat(clip, each, 0) + noise * rng.normal(size=(clips * each, 8)),
        clip,
        np.repeat(np.arange(clips), each),
    )


def test_hit_rate_and_recall_differ_with_five_captions_per_clip():
    texts, clips, owner = captioned()
    found = ranks(clips, texts, np.arange(30), owner)
    scores = positive_scores(clips, texts)
    relevant = torch.from_numpy(np.arange(30)[:, None] == owner[None]).flatten()
    query = torch.arange(30).repeat_interleave(150)
    for column, k in enumerate(CUTS):
        recall = RetrievalRecall(top_k=k)(scores, relevant, indexes=query)
        assert found.recall_QK[:, column].mean() == pytest.approx(float(recall), abs=1e-6)
        assert k == 1 or found.hits(k).mean() > found.recall_QK[:, column].mean() + 0.1
    gain = RetrievalNormalizedDCG(top_k=10)(scores, relevant, indexes=query)
    assert found.gain_Q.mean() == pytest.approx(float(gain), abs=1e-6)
    peer = [
        average_precision_score(relevant.reshape(30, 150)[q], scores.reshape(30, 150)[q])
        for q in range(30)
    ]
    assert np.allclose(found.precision_Q, peer)


def test_map_at_10_divides_by_what_could_be_found():
    """Relevant at ranks 1, 3 and 20 of 30: torchmetrics divides by the two hits inside the ten."""
    base = np.stack([np.cos(np.arange(30) / 30), np.sin(np.arange(30) / 30)], axis=1)
    labels = np.isin(np.arange(30), [0, 2, 19]).astype(int)
    found = ranks([[1.0, 0.0]], base, [1], labels)
    assert found.precision_10_Q[0] == pytest.approx((1 + 2 / 3) / 3)
    assert found.precision_Q[0] == pytest.approx((1 + 2 / 3 + 3 / 20) / 3)
    many = ranks([[1.0, 0.0]], base, [1], (np.arange(30) < 12).astype(int))
    assert many.precision_10_Q[0] == pytest.approx(1.0)  # twelve could not all be found in ten
    assert many.gain_Q[0] == pytest.approx(1.0)


def test_equal_text_reports_both_rates():
    texts, clips, owner = captioned(noise=1.0)
    found = equal_text(np.repeat(clips, 5, 0), texts, owner + 1)
    shared = ranks(np.repeat(clips, 5, 0), texts, owner, owner)
    assert found["duplicates"] == 150
    assert found["r_at_5"] == pytest.approx(shared.hits(5).mean())
    assert found["recall_at_5"] == pytest.approx(shared.recall_QK[:, 1].mean())
    assert found["recall_at_1"] <= 0.2
    assert found["map_at_10"] == pytest.approx(shared.precision_10_Q.mean())


@pytest.mark.parametrize("chunk", [7, 1024])
def test_dual_softmax_is_the_product_of_the_shares_over_items_and_queries(chunk):
    a, b = pair(50, 6, noise=1.5)
    cosines = torch.from_numpy(normalize(a) @ normalize(b).T)
    scores = (torch.softmax(20 * cosines, dim=1) * torch.softmax(20 * cosines, dim=0)).numpy()
    own = np.diagonal(scores)[:, None]
    found = ranks(a, b, np.arange(50), np.arange(50), chunk=chunk, dual_softmax=20.0)
    assert np.array_equal(found.pessimistic_Q, (scores >= own).sum(axis=1))
    table = direction(a, b, items(50), resamples=0, dual_softmax=20.0)
    assert table["dual_softmax"]["mean_rank"] == found.pessimistic_Q.mean()
    assert table["mean_rank"] == direction(a, b, items(50), resamples=0)["mean_rank"]
    assert "dual_softmax" not in direction(a, b, items(50), resamples=0)


def test_dual_softmax_does_not_change_with_the_zero_of_the_scores():
    a, b = pair(50, 6, noise=0.8)
    cosines = normalize(a) @ normalize(b).T
    want = ranks(cosines, None, range(50), range(50), dual_softmax=20.0)
    assert 0.5 < want.hits(1).mean() < 1
    for shift in (-3.0, -1.0, 0.3, 50.0):
        found = ranks(cosines + shift, None, range(50), range(50), dual_softmax=20.0)
        assert np.array_equal(found.pessimistic_Q, want.pessimistic_Q)


@pytest.mark.parametrize("scale", [20.0, 5000.0])
def test_dual_softmax_leaves_ties_and_opposite_vectors(scale):
    a, b = pair(20, 6, noise=0.0)
    twice = np.concatenate([b, 3 * b])  # equal up to the last bit
    found = ranks(a, twice, range(20), range(40), dual_softmax=scale)
    assert found.pessimistic_Q.tolist() == [2] * 20
    away = ranks(a[:1], -b[:1], [0], [0], dual_softmax=scale)
    assert away.pessimistic_Q.tolist() == [1]
