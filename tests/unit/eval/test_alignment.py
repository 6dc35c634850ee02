"""Translation by CSLS, mutual pairs, Procrustes and their refinement."""

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.neighbors import NearestNeighbors

from mmssl.build.players import prepared
from mmssl.eval.alignment import mutual, neighbourhood, procrustes, refined, translate


def turned(rows, width, seed=0, noise=0.0):
    """A cloud of clusters of unlike sizes, and the same turned, in another order; and both keys."""
    g = torch.Generator().manual_seed(seed)
    size = 1 / torch.arange(1, 21).float()
    which = torch.multinomial(size, rows, replacement=True, generator=g)
    centres = torch.randn(20, width, generator=g) * torch.linspace(2, 0.3, width)
    x = centres[which] + 0.5 * torch.randn(rows, width, generator=g)
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=g))
    order = torch.randperm(rows, generator=g)
    y = x @ turn.T + noise * torch.randn(rows, width, generator=g)
    return x, y[order], turn, order.argsort()


def test_procrustes_on_true_pairs_is_the_turn_and_scipys():
    x, y, turn, theirs = turned(500, 12)
    torch.testing.assert_close(procrustes(x, y[theirs]), turn, atol=1e-5, rtol=0)
    y = y + 0.3 * torch.randn_like(y)  # scipy: x @ R ~ y
    want, _ = scipy.linalg.orthogonal_procrustes(x.double().numpy(), y[theirs].double().numpy())
    got = procrustes(x.double(), y[theirs].double())
    np.testing.assert_allclose(got, want.T, atol=1e-6)


def test_csls_against_its_formula_and_sklearn():
    torch.manual_seed(0)
    x, y = torch.randn(40, 6).double(), torch.randn(60, 6).double()
    near = NearestNeighbors(n_neighbors=10, metric="cosine").fit(y.numpy())
    want = 1 - near.kneighbors(x.numpy())[0].mean(1)
    np.testing.assert_allclose(neighbourhood(x, y), want, atol=1e-9)
    of_y = neighbourhood(y, x).tolist()
    got, scores = translate(x, y)
    for i in range(40):
        row = [
            2 * float(torch.cosine_similarity(x[i], y[j], dim=0)) - want[i] - of_y[j]
            for j in range(60)
        ]
        assert got[i] == int(np.argmax(row))
        assert scores[i].item() == pytest.approx(max(row), abs=1e-9)


def test_mutual_pairs_are_each_others_translation():
    x, y, turn, theirs = turned(300, 10, noise=0.1)
    rows, found = mutual(x @ turn.T, y)
    back, there = translate(y, x @ turn.T)[0], translate(x @ turn.T, y)[0]
    assert torch.equal(there[rows], found)
    assert torch.equal(back[found], rows)
    assert len(rows) > 200
    assert (found == theirs[rows]).float().mean() > 0.98


def test_refinement_completes_a_map_that_is_nearly_right():
    x, y, turn, theirs = turned(1000, 20, noise=0.05)
    tilt = 0.12 * torch.randn(20, 20, generator=torch.Generator().manual_seed(1))
    start = turn @ torch.linalg.matrix_exp(tilt - tilt.T)
    before = (translate(x @ start.T, y)[0] == theirs).float().mean()
    got = refined(start, x, y)
    after = (translate(x @ got.T, y)[0] == theirs).float().mean()
    assert before < 0.9
    assert after > 0.99
    assert float((got - turn).abs().max()) < 0.02


def test_preparation_turns_with_the_table():
    """Centring and unit length commute with a rotation: the map of prepared rows is the same."""
    x, y, turn, theirs = turned(200, 6)
    a, b = prepared(x, True), prepared(y, True)
    torch.testing.assert_close(a @ turn.T, b[theirs], atol=1e-5, rtol=0)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(200))
    assert torch.equal(prepared(x, False), x)


def test_the_hub_would_be_chosen_by_the_cosine():
    """What CSLS is for: rows at some distance of which the middle is the nearest of all."""
    x = torch.eye(20) + 0.3
    y = torch.cat([torch.eye(20), torch.ones(1, 20)])
    cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(y).T
    assert cosine.argmax(1).eq(20).all()
    assert torch.equal(translate(x, y)[0], torch.arange(20))
