"""Our objectives against those of pytorch-metric-learning, in double precision: values, gradients.

Its losses average, by default, over what is above zero alone; here a mean over all, or none at all.
It normalises rows itself: both sides start from the same rows that are not.
"""

import pytest
import torch
from torch.nn import functional as F

from mmssl.objectives.classification import softmax_cross_entropy
from mmssl.objectives.codes import codeword_logits
from mmssl.objectives.contrastive import info_nce
from mmssl.objectives.critic import semi_hard

pytest.importorskip("pytorch_metric_learning", reason="pip install --no-deps -r tests/peers.txt")
from pytorch_metric_learning.distances import (
    CosineSimilarity,
    DotProductSimilarity,
    LpDistance,
)
from pytorch_metric_learning.losses import (
    NCALoss,
    NormalizedSoftmaxLoss,
    NPairsLoss,
    NTXentLoss,
    SelfSupervisedLoss,
    SupConLoss,
    TripletMarginLoss,
)
from pytorch_metric_learning.miners import TripletMarginMiner
from pytorch_metric_learning.reducers import DoNothingReducer, MeanReducer

ROWS, WIDTH = 16, 6


def rows(seed, count=ROWS):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def agree(ours, theirs, *inputs):
    """Values and, of their sums, gradients."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    mine, other = (torch.autograd.grad(x.sum(), inputs) for x in (ours, theirs))
    assert all(x.any() for x in mine)
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def own(count=ROWS):
    return torch.eye(count, dtype=torch.bool)


def cosines(a, b):
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


# ---------------------------------------------------------------- softmax


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent(temperature):
    """Two views of N rows: each against its partner among all 2N - 1 others."""
    a, b = rows(0), rows(1)
    z = torch.cat([a, b])
    partner = own(2 * ROWS).roll(ROWS, 0)
    ours = info_nce(cosines(z, z) / temperature, partner, ~own(2 * ROWS)).mean()
    agree(ours, SelfSupervisedLoss(NTXentLoss(temperature=temperature))(a, b), a, b)


def test_info_nce_of_two_towers():
    a, b = rows(0), rows(1)
    ours = info_nce(cosines(a, b) / 0.2, own(), torch.ones_like(own())).mean()
    agree(ours, SelfSupervisedLoss(NTXentLoss(temperature=0.2), symmetric=False)(a, b), a, b)


def test_n_pairs():
    """Products of rows that are not normalised, without a temperature (Sohn 2016)."""
    a, b = rows(0), rows(1)
    peer = NPairsLoss(
        reducer=MeanReducer(), distance=DotProductSimilarity(normalize_embeddings=False)
    )
    theirs = peer(torch.cat([a, b]), torch.arange(ROWS).repeat(2))
    agree(info_nce(a @ b.T, own(), torch.ones_like(own())).mean(), theirs, a, b)


LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6])  # one row is alone


@pytest.mark.parametrize("form", ["mean", "pooled"])
def test_several_positives(form):
    """SupCon averages the losses of the positives (eq. 2), NCA the probabilities.

    A row whose label no other has costs nothing.
    """
    z = rows(0)
    same = LABELS[:, None] == LABELS
    ours = info_nce(cosines(z, z) / 0.1, same & ~own(), ~own(), form)
    options = {"distance": CosineSimilarity(), "reducer": DoNothingReducer()}
    peer = SupConLoss(0.1, **options) if form == "mean" else NCALoss(10.0, **options)
    found = peer(z, LABELS)["loss"]
    theirs = torch.zeros_like(ours).index_put((found["indices"],), found["losses"])
    assert ours[-1] == 0
    agree(ours, theirs, z)


def test_cosines_with_codewords():
    """HuBERT's logits are those of the normalised softmax (Zhai and Wu 2019)."""
    z, codewords = rows(0), rows(1, 7)
    peer = NormalizedSoftmaxLoss(7, WIDTH, temperature=0.1, reducer=MeanReducer())
    peer.W = torch.nn.Parameter(codewords.detach().T.clone())
    ours = softmax_cross_entropy(codeword_logits(z, codewords), LABELS).mean()
    theirs = peer(z, LABELS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    mine = torch.autograd.grad(ours, (z, codewords))
    other_z, other_W = torch.autograd.grad(theirs, (z, peer.W))
    torch.testing.assert_close(mine, (other_z, other_W.T), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- triplets


def near(*seeds):
    """Rows and noisy copies of them, of which one is the opposite."""
    a, noise = (rows(seed).detach() for seed in seeds)
    p = a + 1.5 * noise
    p[3] = -a[3]
    return a.requires_grad_(), p.requires_grad_()


@pytest.mark.parametrize("margin", [0.1, 0.5])
def test_semi_hard_triplets(margin):
    """Squared distances of unit vectors; of an anchor's mined triplets the one that costs most.

    Its miner returns every negative that is farther than the positive by less than the margin, ours
    the nearest. Where none is farther it has no semi-hard triplet, and ours takes the farthest: of
    the hard ones the cheapest.
    """
    a, p = near(0, 1)
    names, same = torch.arange(ROWS), torch.arange(ROWS)  # equal objects would mean equal sides
    distance = LpDistance(power=2)
    loss = TripletMarginLoss(margin, distance=distance, reducer=DoNothingReducer())

    def mined(kind):
        triplets = TripletMarginMiner(margin, kind, distance=distance)(a, names, p, same)
        each = loss(a, names, triplets, p, same)["loss"]["losses"]
        return [each[triplets[0] == i] for i in range(ROWS)]

    ours, found = semi_hard(cosines(a, p), own(), torch.ones_like(own()), margin)
    semi, hard = mined("semihard"), mined("hard")
    assert [len(h) < ROWS - 1 for h in hard] == found.tolist()
    # anchors with several, with none within the margin, and with none that is farther
    assert max(len(s) for s in semi) > 1
    assert {len(s) > 0 for s, farther in zip(semi, found, strict=True) if farther} == {True, False}
    assert not found.all()
    zero = 0 * a.sum()
    worst = [s.max() if len(s) else zero for s in semi]
    theirs = [w if farther else h.min() for w, h, farther in zip(worst, hard, found, strict=True)]
    agree(ours, torch.stack(theirs), a, p)


def test_given_triplets():
    """A negative that is not mined: a fixed other row of each (Jansen's mixed-in one)."""
    a, p = near(0, 1)
    names, index = torch.arange(ROWS), torch.arange(ROWS).roll(5)
    table, others = cosines(a, p), cosines(a, a)
    ours = (2 * (others[names, index] - table.diagonal()) + 0.1).clamp(min=0).mean()
    peer = TripletMarginLoss(0.1, distance=LpDistance(power=2), reducer=MeanReducer())
    agree(ours, peer(torch.cat([a, p]), None, (names, ROWS + names, index)), a, p)
