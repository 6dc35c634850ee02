"""Forms of the map score that localization methods use: soft masks, heads, penalties."""

import math
from itertools import combinations

import pytest
import torch
from torch.nn import functional as F

from mmssl.heads.project import Head
from mmssl.heads.reducers import reducer
from mmssl.heads.score import ScoreMap
from mmssl.objectives.dense import negative_part, overlap, variation
from mmssl.types import UserError


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- soft masks (LVS)


def soft_mean(values, sharpness, above):
    """The weighted mean in plain words."""
    weights = [1 / (1 + math.exp(-sharpness * (v - above))) for v in values]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize("aligned", [False, True])
def test_soft_masks_against_loops(aligned):
    score = ScoreMap("soft", aligned=aligned, sharpness=1 / 0.03, above=0.65, below=0.4)
    video, audio = rand(3, 2, 5, 4), rand(3, 1 if not aligned else 2, 4, seed=1)
    seen = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(2)) < 0.7
    seen[..., 0] = True
    table = score(video, audio, seen)
    behind = score.pairs(video, audio, seen, background=True)
    for q in range(3):
        for c in range(3):
            groups = [(audio[c, t], [t]) for t in range(2)] if aligned else [(audio[c, 0], [0, 1])]
            fore, back = [], []
            for sound, bins in groups:
                cosines = [
                    float(F.cosine_similarity(video[q, t, s], sound, dim=0))
                    for t in bins
                    for s in range(5)
                    if seen[q, t, s]
                ]
                fore.append(soft_mean(cosines, 1 / 0.03, 0.65))
                back.append(soft_mean(cosines, -1 / 0.03, 0.4))
            assert float(table[q, c]) == pytest.approx(sum(fore) / len(fore), rel=1e-9)
            if q == c:
                assert float(behind[q]) == pytest.approx(sum(back) / len(back), rel=1e-9)
    torch.testing.assert_close(score.pairs(video, audio, seen), table.diagonal())


def test_soft_masks_do_not_vanish_far_from_the_threshold():
    far = torch.tensor([[-1.0, -0.9, -1.0]], requires_grad=True)  # weights of 1e-24 and below
    value = reducer("soft", 100.0, 0.65)(far, None)
    value.sum().backward()
    assert -0.901 < float(value.detach()) < -0.9
    assert torch.isfinite(far.grad).all()
    nothing = reducer("soft", 100.0, 0.65)(far, torch.zeros(1, 3, dtype=torch.bool))
    assert float(nothing.detach()) == 0


def test_masked_entries_have_no_influence_on_a_soft_mean():
    x = rand(2, 6).requires_grad_()
    mask = torch.tensor([[True, True, False, True, False, True], [False] * 6])
    noisy = torch.where(mask, x.detach(), torch.full((), 50.0).double())
    soft = reducer("soft", 5.0, 0.2)
    torch.testing.assert_close(soft(noisy, mask), soft(x, mask).detach(), rtol=0, atol=1e-15)
    soft(x, mask).sum().backward()
    assert torch.equal(x.grad.abs() > 0, mask)


# ---------------------------------------------------------------- heads (DenseAV)


@pytest.mark.parametrize("normalize", ["both", "none"])
def test_the_best_cell_of_the_best_head_counts(normalize):
    """Mean over valid steps of the maximum over heads and cells (Hamilton et al. 2024)."""
    score = ScoreMap(heads=2, normalize=normalize, chunk=2)
    video, audio = rand(3, 2, 4, 6), rand(4, 5, 6, seed=1)
    seen = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(2)) < 0.6
    heard = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) < 0.6
    seen[:, 0, 0], heard[:, 0] = True, True
    table = score(video, audio, seen, heard)
    for q in range(3):
        for c in range(4):
            steps = []
            for u in heard[c].nonzero()[:, 0]:
                cells = video[q][seen[q]]
                parts = [slice(0, 3), slice(3, 6)]
                sims = [
                    F.cosine_similarity(cell[p], audio[c, u, p], dim=0)
                    if normalize == "both"
                    else cell[p] @ audio[c, u, p]
                    for cell in cells
                    for p in parts
                ]
                steps.append(max(map(float, sims)))
            assert float(table[q, c]) == pytest.approx(sum(steps) / len(steps), rel=1e-12)
    torch.testing.assert_close(
        score.pairs(video, audio[:3], seen, heard[:3]), table[:, :3].diagonal()
    )


def test_the_gradient_reaches_one_cell_and_one_head_per_step():
    score = ScoreMap(heads=2, normalize="none")
    video, audio = rand(1, 1, 9, 6).requires_grad_(), rand(1, 1, 6, seed=1)
    score(video, audio).sum().backward()
    sims, _ = score.by_head(video.detach(), audio)
    cell, head = divmod(int(sims[0, 0].argmax()), 2)
    touched = video.grad[0, 0].reshape(9, 2, 3).abs().sum(-1) > 0
    assert touched.nonzero().tolist() == [[cell, head]]


def test_maps_show_the_best_head():
    score = ScoreMap(heads=3, normalize="none", aligned=True)
    video, audio = rand(2, 4, 5, 6), rand(2, 4, 6, seed=1)
    products = video.reshape(2, 4, 5, 3, 2) * audio.reshape(2, 4, 1, 3, 2)
    torch.testing.assert_close(score.maps(video, audio), products.sum(-1).amax(-1))


# ---------------------------------------------------------------- penalties


def test_penalties_against_loops():
    sims = rand(2, 5, 4, 3)
    valid = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    valid[:, :2, 0], valid[0, 3] = True, False
    for p in range(2):
        places = valid[p].nonzero().tolist()
        below = [float(sims[p, u, n, k].clamp(max=0) ** 2) for u, n in places for k in range(3)]
        assert float(negative_part(sims, valid)[p]) == pytest.approx(sum(below) / len(below))
        pairs = [
            sum(
                float((sims[p, u, n, k] * sims[p, u, n, j]).abs())
                for k, j in combinations(range(3), 2)
            )
            for u, n in places
        ]
        assert float(overlap(sims, valid)[p]) == pytest.approx(sum(pairs) / len(pairs))
        best = {u: float(sims[p, u][valid[p, u]].max()) for u in range(5) if valid[p, u].any()}
        jumps = [(best[u + 1] - best[u]) ** 2 for u in best if u + 1 in best]
        assert float(variation(sims, valid)[p]) == pytest.approx(sum(jumps) / len(jumps))


@pytest.mark.parametrize("penalty", [negative_part, variation, overlap])
def test_invalid_places_have_no_influence_on_penalties(penalty):
    sims = rand(2, 4, 3, 2).requires_grad_()
    valid = torch.ones(2, 4, 3, dtype=torch.bool)
    valid[0, 2:], valid[:, :, 2], valid[1] = False, False, False
    noisy = torch.where(valid[..., None], sims.detach(), torch.full((), 1e3).double())
    torch.testing.assert_close(penalty(noisy, valid), penalty(sims, valid).detach())
    penalty(sims, valid).sum().backward()
    assert torch.isfinite(sims.grad).all()
    assert float(sims.grad[~valid].abs().sum()) == 0
    assert float(penalty(sims, valid)[1].detach()) == 0


def test_penalties_have_their_analytic_values():
    valid = torch.ones(2, 4, 3, dtype=torch.bool)
    same = torch.full((2, 4, 3, 2), -0.5)
    assert negative_part(same, valid).tolist() == [0.25, 0.25]
    assert negative_part(-same, valid).tolist() == variation(same, valid).tolist() == [0.0, 0.0]
    assert overlap(same, valid).tolist() == [0.25, 0.25]
    alone = torch.stack([same[..., 0], torch.zeros_like(same[..., 0])], -1)
    assert overlap(alone, valid).tolist() == [0.0, 0.0]


# ---------------------------------------------------------------- forms of the projections


def test_no_projection_needs_equal_widths():
    x = rand(3, 8)
    assert Head("none", 8, 8)(x) is x
    with pytest.raises(UserError, match=r"`none` keeps the width of 8, but 4 is asked for"):
        Head("none", 8, 4)
