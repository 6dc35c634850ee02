"""`classify` by clusters: epochs, labels, weights and the new top layer."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_methods import full_batch, small, small_model
from torch.nn import functional as F
from toy_inv import HIDDEN, ROWS, Encoder, ToyInv, batch_of

from mmssl.specs import ClusterSpec
from mmssl.targets.clusters import whitened
from mmssl.tasks.clustered import Clustered
from mmssl.towers import Passes
from mmssl.types import UserError

SMALL = ("tasks.cluster.target.clips=12", "tasks.cluster.target.clusters=3")


def started(*overrides):
    spec = small("deep_cluster_tiny", *SMALL, *overrides)
    return small_model(spec).train()


def rows(model, first, count=6, seed=0):
    batch = full_batch(model.spec, count, seed)
    return replace(batch, index_B=torch.arange(first, first + count))


def test_whitening_is_scikit_learns():
    decomposition = pytest.importorskip("sklearn.decomposition")
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(200, 8)) @ rng.normal(size=(8, 8))).astype(np.float32)
    found = whitened(x, 5)
    want = decomposition.PCA(5, whiten=True, svd_solver="full").fit_transform(x.astype(np.float64))
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    signs = np.sign((found * want).sum(0))
    np.testing.assert_allclose(found * signs, want, atol=1e-5)
    assert whitened(np.concatenate([x, x[:, :1]], 1), 9).shape == (200, 8)  # no ninth varies


def test_labels_come_at_the_end_of_an_epoch_and_are_kept_for_the_next():
    model = started()
    task = model.tasks["cluster"]
    top = task.out.weight.detach().clone()
    loss, terms = model(rows(model, 0), 0, 10)
    assert float(loss.detach()) == 0
    assert not terms  # so that it is no alarm
    model.after_step(0, 10)
    assert int(task.seen) == 6
    assert int(task.known_N.sum()) == 6
    assert not (task.labels_N >= 0).any()
    model(rows(model, 6, seed=1), 1, 10)
    model.after_step(1, 10)
    assert (int(task.seen), int(task.epoch)) == (0, 1)
    assert sorted(task.labels_N.unique().tolist()) == [0, 1, 2]
    # the top layer is new: small, and its bias 0, so that all clusters look alike
    assert not torch.equal(task.out.weight, top)
    assert float(task.out.weight.detach().std()) == pytest.approx(0.01, rel=0.3)
    assert not task.out.bias.any()
    torch.nn.init.zeros_(task.out.weight)
    _, terms = model(rows(model, 0), 2, 10)
    mean = float(terms["cluster"].sum / terms["cluster"].count)
    assert mean == pytest.approx(math.log(3), abs=1e-6)


def test_labels_are_the_clusters_of_the_kept_features():
    """Three far blobs of features of sizes 2, 4 and 6."""
    model = started("tasks.cluster.target.components=2")
    task = model.tasks["cluster"]
    truth = torch.tensor([0] * 2 + [1] * 4 + [2] * 6)
    angle = truth * 2 * math.pi / 3
    task.features_ND[:, 0], task.features_ND[:, 1] = angle.cos(), angle.sin()
    task.features_ND[:, :2] += 0.05 * torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    task.known_N.fill_(True)
    task.seen.fill_(12)
    model.after_step(0, 10)
    pairs = {(int(a), int(b)) for a, b in zip(truth, task.labels_N, strict=True)}
    assert len(pairs) == 3
    # a clip weighs the inverse of its cluster's size; all clips together weigh as many as they are
    weight = task._weights()[task.labels_N]
    torch.testing.assert_close(weight, 4 / torch.tensor([2.0] * 2 + [4.0] * 4 + [6.0] * 6))
    batch = rows(model, 0)
    _, terms = model(batch, 1, 10)
    heard = []
    task.out.register_forward_hook(lambda _, __, out: heard.append(out.detach()))
    model(batch, 1, 10)
    want = F.cross_entropy(heard[0], task.labels_N[:6], weight=task._weights())
    torch.testing.assert_close(
        float(terms["cluster"].sum / terms["cluster"].count), float(want), rtol=1e-5, atol=0
    )


def test_of_a_clip_that_comes_twice_the_last_features_stay():
    model = started()
    batch = rows(model, 0)
    model(replace(batch, index_B=torch.tensor([3, 1, 3, 1, 3, 2])), 0, 10)
    read = model.tasks["cluster"]._read[0][0]
    model.after_step(0, 10)
    kept = model.tasks["cluster"].features_ND
    for clip, row in ((1, 3), (2, 5), (3, 4)):
        assert torch.equal(kept[clip], read[row])


def test_other_data_has_no_labels_and_leaves_no_trace():
    model = started().eval()
    model.tasks["cluster"].epoch.fill_(1)
    _, terms = model(rows(model, 100), 0, 10)
    model.after_step(0, 10)
    assert float(terms["cluster"].count) == 0
    assert not model.tasks["cluster"].known_N.any()


def test_what_does_not_fit_is_refused():
    model = started()
    with pytest.raises(UserError, match=r"clips: 12, but the data has a clip of number 15"):
        model(rows(model, 10), 0, 10)
    with pytest.raises(UserError, match=r"name one data\.train"):
        started("data.train=[a, b]")
    with pytest.raises(UserError, match=r"target.*13 `clusters` of 12 `clips`"):
        started("tasks.cluster.target.clusters=13")
    model.tasks["cluster"].seen.fill_(12)  # of clips without the view
    model(replace(rows(model, 0, 2)), 0, 10)
    with pytest.raises(UserError, match=r"tasks\.cluster\.target\.clusters: .*3 clusters of 2 "):
        model.after_step(0, 10)


@pytest.mark.slow
def test_clusters_settle_on_what_views_share():
    """TOY-INV, 20 clusters, 60 epochs of 30 steps: those of two epochs agree ever more.

    Mutual information of successive epochs, normalised, found: 0.04, and in the end 0.80; share of
    neighbours of the right class 0.41, then 1.00.
    """
    metrics = pytest.importorskip("sklearn.metrics")
    rows, steps, epochs = 256, 30, 60
    torch.manual_seed(0)
    toy, encoder = ToyInv(), Encoder()
    options = {"kind": "clusters", "view": "a", "clusters": 20, "components": 64}
    # an epoch is as many rows as there are clips: those behind the 2,000 rows never come
    spec = ClusterSpec.model_validate({**options, "clips": rows * steps})
    task = Clustered("cluster", spec, HIDDEN, "mean", [], 1.0, 0)
    assert toy.score(encoder.eval().net) < 0.5
    parameters = [*encoder.train().parameters(), *task.parameters()]
    optimiser = torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-4)
    labels = []
    for step in range(epochs * steps):
        picked, views = toy.batch(rows)
        batch = replace(batch_of(picked, views), index_B=picked)
        position = step / (epochs * steps)
        term = task(Passes({"x": encoder}, {}, {"a": "x"}, batch, position), batch)[""]
        optimiser.zero_grad()
        (term.sum / term.count.clamp(min=1)).backward()
        optimiser.step()
        task.after_step(position)
        if (step + 1) % steps == 0:
            labels.append(task.labels_N[:ROWS].clone())
    assert int(task.epoch) == epochs

    def agreement(one, two):
        both = (one >= 0) & (two >= 0)
        return metrics.normalized_mutual_info_score(one[both], two[both])

    assert agreement(*labels[:2]) < 0.1
    last = [agreement(*pair) for pair in zip(labels[-6:-1], labels[-5:], strict=True)]
    assert sum(last) / 5 > 0.7
    assert toy.score(encoder.eval().net) > 0.97
