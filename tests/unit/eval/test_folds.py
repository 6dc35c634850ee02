"""Folds, linear probe and neighbours against scikit-learn and hand-made cases."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torchmetrics.functional.classification import multilabel_auroc, multilabel_average_precision

from mmssl.eval import folds
from mmssl.eval.finetune import subset
from mmssl.eval.items import Protocol
from mmssl.eval.knn import neighbours
from mmssl.eval.probe import GRID, linear
from mmssl.types import UserError

RNG = np.random.default_rng


def clouds(n=120, width=6, classes=4, seed=0):
    """Points around class centres, with class, fold and source."""
    rng = RNG(seed)
    y = np.arange(n) % classes
    x = 1.2 * rng.normal(size=(classes, width))[y] + rng.normal(size=(n, width))
    x[:, 0] *= 100  # scales differ, as in real features
    metas = [
        {"kind": f"c{c}", "fold": str(1 + (i // classes) % 5), "source": i} for i, c in enumerate(y)
    ]
    return x, metas


def prepared(**changes):
    x, metas = clouds(**changes)
    labels, kept = folds.read_labels(metas, "kind")
    assert len(kept) == len(metas)
    return x, labels, folds.read_folds(metas, "fold")


def test_folds_are_those_of_the_clips():
    _, metas = clouds()
    found = folds.read_folds(metas, "fold")
    assert [fold.name for fold in found] == list("12345")
    for i, fold in enumerate(found):
        names = {part: {metas[r]["fold"] for r in getattr(fold, part)} for part in ("test", "dev")}
        assert names == {"test": {str(i + 1)}, "dev": {str((i + 1) % 5 + 1)}}
        together = np.concatenate([fold.train, fold.dev, fold.test])
        assert sorted(together) == list(range(len(metas)))


def test_numbered_folds_are_in_the_order_of_numbers_and_splits_make_one_fold():
    numbered = [{"f": str(1 + i % 11)} for i in range(22)]
    assert [f.name for f in folds.read_folds(numbered, "f")][-2:] == ["10", "11"]
    (only,) = folds.read_folds([{"f": s} for s in ("train", "valid", "test", "train")], "f")
    assert (only.train.tolist(), only.dev.tolist(), only.test.tolist()) == ([0, 3], [1], [2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([None, None], "fold=f: no clip of this data has that field; there are class, f"),
        (["1", None, "2", "3"], "1 of 4 labelled clips do not have that field"),
        (["1", "2"], "only the folds 1, 2; three are needed"),
        (["1", "2", "4"], "fold 3 has no labelled clip"),
        (["train", "test"], "no clip of `val`"),
        (["train", "valid", "eval"], "fold=f: eval beside train, valid; name splits train, val,"),
    ],
)
def test_folds_that_cannot_be_used(values, message):
    with pytest.raises(UserError, match=message):
        folds.read_folds([{"class": "a", "f": value} for value in values], "f")


def test_labels():
    labels, kept = folds.read_labels([{"y": 3}, {}, {"y": 1}, {"y": 3}], "y")
    assert (labels.names, labels.multi, kept.tolist()) == (["1", "3"], False, [0, 2, 3])
    assert labels.ids_N.tolist() == [1, 0, 1]
    several, _ = folds.read_labels([{"y": ["a", "b"]}, {"y": []}, {"y": ["b"]}], "y")
    assert several.multi
    assert several.table_NK.astype(int).tolist() == [[1, 1], [0, 0], [0, 1]]
    with pytest.raises(UserError, match="label=z: no clip of this data has that field; there are"):
        folds.read_labels([{"y": 1}], "z")
    with pytest.raises(UserError, match="all 2 clips are of one class, a"):
        folds.read_labels([{"y": "a"}, {"y": "a"}], "y")


def test_sources_in_several_folds_are_counted():
    _, metas = clouds()
    found = folds.read_folds(metas, "fold")
    assert folds.shared_sources(found, np.arange(len(metas))) == 0
    assert folds.shared_sources(found, np.arange(len(metas)) // 8) == 15


def test_probe_is_the_regression_chosen_on_the_next_fold():
    x, labels, parts = prepared()
    scores, chosen = linear(x, labels, parts)
    y = labels.ids_N
    for fold in parts:

        def accuracy(c, train, test):
            scale = StandardScaler().fit(x[train])
            model = LogisticRegression(C=c, max_iter=500).fit(scale.transform(x[train]), y[train])
            return (model.predict(scale.transform(x[test])) == y[test]).mean()

        on_dev = [accuracy(c, fold.train, fold.dev) for c in GRID]
        assert chosen[fold.name] == GRID[int(np.argmax(on_dev))]
        wanted = accuracy(chosen[fold.name], fold.rest, fold.test)
        assert folds.score(scores, labels, fold.test)["accuracy"] == pytest.approx(wanted)
    assert not np.isnan(scores).any()


@pytest.mark.parametrize("multi", [False, True])
def test_far_more_features_than_rows_change_no_optimum(multi):
    """The fit in the span of the rows is the one of all features, scores and all."""
    _, labels, parts = prepared()
    x_ND = RNG(2).normal(size=(120, 700))
    x_ND[:, :4] += 2 * labels.table_NK
    if multi:
        labels = folds.Labels(labels.names, labels.table_NK | (RNG(3).random((120, 4)) < 0.2), True)
    scores, _ = linear(x_ND, labels, parts, grid=(0.01,))
    for fold in parts:
        scale = StandardScaler().fit(x_ND[fold.rest])
        train, test = scale.transform(x_ND[fold.rest]), scale.transform(x_ND[fold.test])
        model = LogisticRegression(C=0.01, max_iter=500, tol=1e-6)
        if multi:
            fits = [
                model.fit(train, one).predict_proba(test)[:, 1]
                for one in labels.table_NK[fold.rest].T
            ]
            wanted = np.stack(fits, 1)
        else:
            wanted = model.fit(train, labels.ids_N[fold.rest]).predict_proba(test)
        assert np.allclose(scores[fold.test], wanted, atol=1e-3)


@pytest.mark.parametrize("width", [3, 700])
def test_features_that_never_vary_are_at_chance(width):
    """Those of a collapsed network, few or far more than rows."""
    _, labels, parts = prepared()
    scores, _ = linear(np.ones((120, width)), labels, parts, grid=(0.01,))
    for fold in parts:
        assert np.ptp(scores[fold.test], axis=0).max() == 0


def test_one_strength_needs_no_choice_and_noise_is_at_chance():
    x, labels, parts = prepared()
    assert set(linear(x, labels, parts, grid=(0.01,))[1].values()) == {0.01}
    noise, _ = linear(RNG(1).normal(size=(120, 3)), labels, parts, grid=(0.01,))
    found = folds.summary(noise, labels, parts, np.arange(120), Protocol(0, 200))
    assert 0.1 < found["mean"] < 0.4
    assert found["ci"]["mean"][0] < found["mean"] < found["ci"]["mean"][1]
    values = [part["accuracy"] for part in found["folds"].values()]
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    assert found["n"] == 120


def test_majority_names_the_commonest_class_of_the_other_folds():
    metas = [{"y": "ab"[i % 3 == 0], "f": str(i % 4)} for i in range(60)]
    labels, _ = folds.read_labels(metas, "y")
    parts = folds.read_folds(metas, "f")
    scores = folds.majority(labels, parts)
    assert folds.summary(scores, labels, parts, np.arange(60), Protocol(0, 0))[
        "mean"
    ] == pytest.approx(2 / 3)


def test_majority_among_the_other_clips_does_not_see_the_asked_one():
    labels, _ = folds.read_labels([{"y": "ab"[i >= 10]} for i in range(15)], "y")
    everyone = np.arange(15)
    scores = folds.majority(labels, [folds.Fold("all", everyone, everyone[:0], everyone)])
    assert np.allclose(scores[:10], [9 / 14, 5 / 14])
    assert np.allclose(scores[10:], [10 / 14, 4 / 14])


def test_a_training_part_of_one_class_is_refused():
    metas = [{"y": "ab"[f == "1"], "f": f} for f in "112233"]
    labels, _ = folds.read_labels(metas, "y")
    with pytest.raises(UserError, match="fold 1: its 2 training clips do not differ"):
        linear(np.zeros((6, 2)), labels, folds.read_folds(metas, "f"))


def several(n=90, seed=0):
    rng = RNG(seed)
    table = rng.random((n, 3)) < 0.4
    metas = [
        {"y": [c for c, has in zip("abc", row, strict=True) if has], "f": str(i % 3)}
        for i, row in enumerate(table)
    ]
    labels, _ = folds.read_labels(metas, "y")
    x = table @ rng.normal(size=(3, 5)) + 0.7 * rng.normal(size=(n, 5))
    return x, labels, folds.read_folds(metas, "f")


def test_several_labels_by_macro_map_and_d_prime():
    x, labels, parts = several()
    scores, _ = linear(x, labels, parts, grid=(1.0,))
    rows = parts[0].test
    found = folds.score(scores, labels, rows)
    guess, truth = torch.from_numpy(scores[rows]), torch.from_numpy(labels.table_NK[rows]).long()
    peer = multilabel_average_precision(guess, truth, 3, average="macro")
    assert found["map"] == pytest.approx(float(peer), abs=1e-6)
    auc = float(multilabel_auroc(guess, truth, 3, average="macro"))
    assert found["auc"] == pytest.approx(auc, abs=1e-6)
    assert found["d_prime"] == pytest.approx(np.sqrt(2) * norm.ppf(auc), abs=1e-4)
    assert found["map"] > 0.7


def test_classes_that_say_nothing_are_left_out():
    labels = folds.Labels(["a", "b"], np.array([[1, 0], [0, 0], [1, 0]], bool), True)
    found = folds.score(np.array([[0.9, 0.1], [0.2, 0.5], [0.4, 0.3]]), labels, np.arange(3))
    assert (found["map"], found["auc"], found["classes"]) == (1.0, 1.0, 1)
    with pytest.raises(UserError, match="no class that only some"):
        folds.score(np.zeros((3, 2)), labels, np.array([1]))


@pytest.mark.filterwarnings("error")
def test_a_label_of_all_training_clips_leaves_a_regression_of_the_other():
    x, labels, parts = several()
    table = labels.table_NK[:, :2].copy()
    table[:, 0] = True
    held = folds.Labels(["a", "b"], table, True)
    scores, _ = linear(x, held, parts, grid=(1.0,))
    for fold in parts:
        scale = StandardScaler().fit(x[fold.rest])
        model = LogisticRegression(max_iter=500)
        model.fit(scale.transform(x[fold.rest]), table[fold.rest, 1])
        wanted = model.predict_proba(scale.transform(x[fold.test]))[:, 1]
        assert np.allclose(scores[fold.test], np.stack([np.ones(30), wanted], axis=1))
    table[:, 1] = False
    with pytest.raises(UserError, match="fold 0: its 30 training clips do not differ"):
        linear(x, held, parts)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_neighbours_are_those_of_scikit_learn(k):
    x, labels, parts = prepared(n=100)
    votes = neighbours(x, labels, parts, np.arange(100), ks=(k,))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for fold in parts:
        for tail, weights in (
            ("", "uniform"),
            ("_weighted", lambda d: np.exp((1 - d) / 0.07)),
        ):
            peer = KNeighborsClassifier(k, metric="cosine", weights=weights, algorithm="brute")
            peer.fit(unit[fold.rest], labels.ids_N[fold.rest])
            own = votes[f"k{k}{tail}"][fold.test]
            share = own / own.sum(axis=1, keepdims=True)
            assert np.allclose(share, peer.predict_proba(unit[fold.test]), atol=1e-6)


def test_neighbours_of_the_same_source_are_not_asked():
    x = np.repeat(RNG(0).normal(size=(10, 4)), 2, axis=0)  # every point twice, of one source
    metas = [{"y": str(i // 2 % 2), "f": str(i % 4)} for i in range(20)]
    labels, _ = folds.read_labels(metas, "y")
    parts = folds.read_folds(metas, "f")
    alone = neighbours(x, labels, parts, np.arange(20), ks=(1,))["k1"]
    assert folds.score(alone, labels, np.arange(20))["accuracy"] == 1.0
    sources = np.arange(20) // 2
    apart = neighbours(x, labels, parts, sources, ks=(1,))["k1"]
    assert folds.score(apart, labels, np.arange(20))["accuracy"] < 1.0
    assert sorted(neighbours(x, labels, parts, sources, ks=(5, 200))) == ["k5", "k5_weighted"]
    with pytest.raises(UserError, match="no clip of another source"):
        neighbours(x, labels, parts, np.zeros(20), ks=(1,))


def test_subsets_of_labels_are_stratified_and_nested():
    labels = folds.Labels(
        ["a", "b", "c"], np.eye(3, dtype=bool)[np.repeat([0, 1, 2], [200, 90, 10])], False
    )
    rows = np.arange(300)
    small, middle, whole = (subset(labels, rows, share, 7) for share in (0.01, 0.1, 1.0))
    assert np.bincount(labels.ids_N[small]).tolist() == [2, 1, 1]
    assert np.bincount(labels.ids_N[middle]).tolist() == [20, 9, 1]
    assert whole.tolist() == rows.tolist()
    assert set(small) < set(middle)
    assert not np.array_equal(subset(labels, rows, 0.1, 8), middle)


def test_clips_without_a_label_are_drawn_as_a_class():
    table = np.zeros((100, 2), bool)
    table[:40, 0] = table[20:60, 1] = True
    labels, rows = folds.Labels(["a", "b"], table, True), np.arange(100)
    assert subset(labels, rows, 1.0, 0).tolist() == rows.tolist()
    small, half = subset(labels, rows, 0.1, 0), subset(labels, rows, 0.5, 0)
    assert ((small >= 60).sum(), (half >= 60).sum()) == (4, 20)
    assert set(small) < set(half)
    assert len(subset(labels, rows[60:], 0.01, 0)) == 1
