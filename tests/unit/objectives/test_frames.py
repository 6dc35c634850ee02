"""Contrast of frames within a row: choice of negatives, analytic values, an independent library."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from mmssl.objectives import codes, frames
from mmssl.objectives.frames import (
    Negatives,
    draw_negatives,
    frame_bce,
    frame_dot_nce,
    frame_nce,
    marked,
    take,
)
from mmssl.quantizers import GumbelQuantizer

P, N, D = 3, 20, 8


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask_of(*counts, frames=N, seed=0):
    """A random mask with the given number of marked frames in each row."""
    order = torch.rand(len(counts), frames, generator=torch.Generator().manual_seed(seed))
    return order.argsort(1).argsort(1) < torch.tensor(counts)[:, None]


SEEDS = torch.arange(P) + 40
RAGGED = mask_of(9, 14, 5)

# ---------------------------------------------------------------- the dense layout


def test_marked_frames_come_first_in_time_order():
    where = marked(RAGGED)
    assert where.index_PM.shape == (P, 14)
    assert where.filled_PM.sum(1).tolist() == [9, 14, 5]
    x = normal(P, N, D).requires_grad_()
    dense = take(x, where)
    for row in range(P):
        count = int(RAGGED[row].sum())
        assert torch.equal(dense[row, :count], x[row][RAGGED[row]])
        assert dense[row, count:].abs().sum() == 0
        assert len(set(where.index_PM[row].tolist())) == 14
    dense.sum().backward()
    assert torch.equal(x.grad[..., 0] == 1, RAGGED)
    with torch.no_grad():
        x[~RAGGED] = math.nan
    assert torch.isfinite(take(x, where)).all()


def test_an_empty_mask_has_one_empty_place():
    where = marked(torch.zeros(2, 6, dtype=torch.bool))
    assert where.filled_PM.tolist() == [[False], [False]]
    drawn = draw_negatives(torch.arange(2), where, 5)
    x = normal(2, 6, D).requires_grad_()
    dense = take(x, where)
    loss = frame_nce(dense, dense, dense, drawn)
    assert (loss.sum.item(), loss.count.item(), loss.correct.item()) == (0, 0, 0)
    loss.sum.backward()
    assert x.grad.abs().sum() == 0


# ---------------------------------------------------------------- negatives


def test_negatives_are_hidden_frames_of_the_row_and_never_the_frame_itself():
    where = marked(RAGGED)
    drawn = draw_negatives(SEEDS, where, 100)
    assert torch.equal(drawn.asked_PM, where.filled_PM)
    for row in range(P):
        count = int(RAGGED[row].sum())
        place = drawn.index_PMK[row, :count]
        assert (place != torch.arange(count)[:, None]).all()
        assert RAGGED[row][where.index_PM[row][place]].all()
        assert set(place.flatten().tolist()) == set(range(count))


def test_negatives_are_uniform():
    drawn = draw_negatives(torch.tensor([3]), marked(mask_of(6, frames=9)), 20_000)
    for place in range(6):
        counts = torch.bincount(drawn.index_PMK[0, place], minlength=6)
        assert counts[place] == 0
        others = np.delete(counts.numpy(), place)
        assert stats.chisquare(others).pvalue > 1e-3


def test_negatives_among_all_valid_frames():
    valid = torch.arange(N) < torch.tensor([20, 17, 12])[:, None]
    hidden = mask_of(9, 14, 5) & valid
    where, among = marked(hidden), marked(valid)
    drawn = draw_negatives(SEEDS, where, 300, among)
    for row in range(P):
        count = int(hidden[row].sum())
        frame = among.index_PM[row][drawn.index_PMK[row, :count]]
        own = where.index_PM[row, :count, None]
        assert (frame != own).all()
        assert valid[row][frame].all()
        for t in range(count):
            everyone = set(valid[row].nonzero()[:, 0].tolist()) - {int(own[t])}
            assert set(frame[t].tolist()) == everyone
    # frames that are no candidates themselves draw from all candidates
    visible = marked(valid & ~hidden)
    drawn = draw_negatives(SEEDS, where, 300, visible)
    for row in range(P):
        frame = visible.index_PM[row][drawn.index_PMK[row, 0]]
        assert set(frame.tolist()) == set((valid & ~hidden)[row].nonzero()[:, 0].tolist())


def test_a_row_draws_whatever_its_batch():
    where = marked(RAGGED)
    drawn = draw_negatives(SEEDS, where, 10)
    for row in range(P):
        alone = draw_negatives(SEEDS[row : row + 1], marked(RAGGED[row : row + 1]), 10)
        count = int(RAGGED[row].sum())
        assert torch.equal(alone.index_PMK[0], drawn.index_PMK[row, :count])
    again = draw_negatives(SEEDS, where, 10, stream="other")
    assert not torch.equal(again.index_PMK, drawn.index_PMK)


def test_a_lone_hidden_frame_is_not_asked():
    mask = mask_of(1, 4, 0)
    where = marked(mask)
    drawn = draw_negatives(SEEDS, where, 7)
    assert drawn.asked_PM.sum(1).tolist() == [0, 4, 0]
    x = take(normal(P, N, D), where)
    assert frame_nce(x, x, x, drawn).count.item() == 4


# ---------------------------------------------------------------- values


def naive(context, positive, candidate, drawn, temperature=0.1):
    """Frame by frame, as the paper writes it."""
    total, count, hits = 0, 0, 0
    for p, m in drawn.asked_PM.nonzero().tolist():
        rivals = candidate[p][drawn.index_PMK[p, m]]
        keep = (rivals != positive[p, m]).any(-1)
        own = F.cosine_similarity(context[p, m], positive[p, m], dim=0)
        other = F.cosine_similarity(context[p, m][None], rivals[keep], dim=1)
        logits = torch.cat([own[None], other]) / temperature
        total = total - logits.log_softmax(0)[0]
        count, hits = count + 1, hits + int(keep.any() and own > other.max())
    return total, count, hits


def test_loss_and_gradient_equal_the_formula_frame_by_frame():
    where = marked(RAGGED)
    context = normal(P, N, D, dtype=torch.float64).requires_grad_()
    target = normal(P, N, D, seed=1, dtype=torch.float64)
    target[:, ::3] = target[:, :1]  # many equal targets
    target.requires_grad_()
    drawn = draw_negatives(SEEDS, where, 12)
    c, q = take(context, where), take(target, where)
    loss = frame_nce(c, q, q, drawn)
    total, count, hits = naive(c, q, q, drawn)
    torch.testing.assert_close(loss.sum, total)
    assert (loss.count.item(), loss.correct.item()) == (count, hits)
    ours = torch.autograd.grad(loss.sum, (context, target), retain_graph=True)
    expected = torch.autograd.grad(total, (context, target))
    torch.testing.assert_close(ours, expected)
    assert torch.equal(ours[0].abs().sum(-1) > 0, RAGGED)


@pytest.mark.parametrize("far", [1.0, 1e4])
def test_dot_products_of_any_size_are_those_of_the_formula(far):
    """A candidate that was not drawn says nothing, however alike; one drawn twice counts twice."""
    context = torch.eye(3)[None].clone().requires_grad_()  # of three frames
    candidates = torch.tensor([[[2.0, 0, 0], [1.0, 3, 0], [far, far, far]]], requires_grad=True)
    drawn = Negatives(torch.tensor([[[0, 1], [1, 1], [0, 0]]]), torch.ones(1, 3, dtype=torch.bool))
    positive = torch.tensor([[[1.0, 0, 0], [0, 5.0, 0], [0, 0, -far]]])
    loss = frame_dot_nce(context, positive, candidates, drawn)
    logits = torch.tensor([[1.0, 2, 1], [5.0, 3, 3], [-far, 0, 0]])
    torch.testing.assert_close(loss.sum, -logits.log_softmax(1)[:, 0].sum())
    assert loss.correct == 1
    loss.sum.backward()
    assert context.grad.isfinite().all()
    assert not candidates.grad[0, 2].any()
    shares = logits.softmax(1)
    expected = torch.tensor(
        [[shares[0, 1], 0, shares[2, 1:].sum()], [shares[0, 2], shares[1, 1:].sum(), 0]]
    )
    torch.testing.assert_close(candidates.grad[0, :2], expected)


def test_targets_and_candidates_may_differ():
    valid = torch.ones_like(RAGGED)
    where, among = marked(RAGGED), marked(valid)
    drawn = draw_negatives(SEEDS, where, 12, among)
    context, target, others = (normal(P, N, D, seed=s).double() for s in (1, 2, 3))
    others[:, 5:15] = target[:, 5:15]  # a second quantisation that agrees on some frames
    args = take(context, where), take(target, where), take(others, among)
    torch.testing.assert_close(frame_nce(*args, drawn).sum, naive(*args, drawn)[0])


def test_zero_context_costs_ln_of_the_negatives_that_stay():
    where = marked(mask_of(40, 40, 40, frames=60))
    drawn = draw_negatives(SEEDS, where, 100)
    zero = torch.zeros(P, 40, D)
    loss = frame_nce(zero, *2 * [normal(P, 40, D)], drawn)  # continuous: none are equal
    assert (loss.sum / loss.count).item() == pytest.approx(math.log(101), abs=1e-5)
    assert loss.correct.item() == 0
    ids = torch.randint(3, (P, 40, 2), generator=torch.Generator().manual_seed(0))
    vectors = ids.float() @ normal(2, D)
    stay = torch.zeros(())
    for p in range(P):
        rivals = ids[p][drawn.index_PMK[p]]  # (M, K, G)
        stay = stay + (1 + (rivals != ids[p][:, None]).any(-1).sum(-1)).log().sum()
    same = frames.identical(ids, ids)
    for given in (same, None):
        loss = frame_nce(zero, vectors, vectors, drawn, same_PMC=given)
        assert loss.sum.item() == pytest.approx(stay.item(), rel=1e-6)
        assert (loss.sum / loss.count).item() < math.log(101)


def test_collapsed_targets_cost_nothing_and_count_as_misses():
    where = marked(RAGGED)
    drawn = draw_negatives(SEEDS, where, 10)
    context = take(normal(P, N, D), where).requires_grad_()
    target = torch.ones(P, 14, D)
    loss = frame_nce(context, target, target, drawn)
    assert loss.sum.item() == pytest.approx(0, abs=1e-5)
    assert (loss.count.item(), loss.correct.item()) == (28, 0)
    loss.sum.backward()
    assert context.grad.abs().max() < 1e-6


def test_perfect_context_is_a_hit():
    where = marked(RAGGED)
    drawn = draw_negatives(SEEDS, where, 10)
    x = take(normal(P, N, D), where)
    loss = frame_nce(x, x, x, drawn)
    assert loss.correct.item() == loss.count.item() == 28


def test_equal_vectors_and_ids_are_found():
    x = normal(2, 6, 4)
    x[0, 3], x[0, 5], x[1, 2] = x[0, 1], -x[0, 1], 0.0
    x[1, 4] = -0.0
    x[0, 4] = x[0, 0] * torch.tensor([-1, -1, 1, 1])
    expected = (x[:, :, None] == x[:, None]).all(-1)
    assert torch.equal(frames.identical(x, x), expected)
    assert torch.equal(frames.identical(x.double(), x.double()), expected)
    ids = torch.randint(4, (3, 50, 2), generator=torch.Generator().manual_seed(1))
    expected = (ids[:, :, None] == ids[:, None]).all(-1)
    assert expected.float().mean() < 0.2
    assert torch.equal(frames.identical(ids, ids), expected)


def test_bf16_under_autocast_is_computed_in_fp32():
    where = marked(RAGGED)
    drawn = draw_negatives(SEEDS, where, 10)
    c, q = (take(normal(P, N, D, seed=s), where).bfloat16() for s in (1, 2))
    for loss in (frame_nce, frame_bce):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = loss(c, q, q, drawn)
        assert torch.equal(ours.sum, loss(c.float(), q.float(), q.float(), drawn).sum)


def test_binary_loss_equals_the_formula_and_its_analytic_start():
    where = marked(RAGGED)
    drawn = draw_negatives(SEEDS, where, 10)
    c, q = (take(normal(P, N, D, seed=s).double(), where) for s in (1, 2))
    total = torch.zeros(()).double()
    for p, m in drawn.asked_PM.nonzero().tolist():
        total = total - F.logsigmoid(c[p, m] @ q[p, m])
        total = total - F.logsigmoid(-(q[p][drawn.index_PMK[p, m]] @ c[p, m])).sum()
    torch.testing.assert_close(frame_bce(c, q, q, drawn).sum, total)
    loss = frame_bce(torch.zeros_like(c), q, q, drawn)
    assert (loss.sum / loss.count).item() == pytest.approx(11 * math.log(2), abs=1e-9)  # 7.6246


# ---------------------------------------------------------------- an independent library


def pretraining_model(entries):
    """A small random Wav2Vec2ForPreTraining without dropout."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2),
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        codevector_dim=16, proj_codevector_dim=12, num_codevector_groups=2,
        num_codevectors_per_group=entries, layerdrop=0.0, hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0,
        feat_quantizer_dropout=0.0, final_dropout=0.0, diversity_loss_weight=0.1,
    )  # fmt: skip
    return transformers.Wav2Vec2ForPreTraining(config)


def twin(peer):
    """The peer's quantizer as ours."""
    theirs, config = peer.quantizer, peer.config
    ours = GumbelQuantizer(16, config.codevector_dim, 2, config.num_codevectors_per_group)
    with torch.no_grad():
        ours.logits.weight.copy_(theirs.weight_proj.weight)
        ours.logits.bias.copy_(theirs.weight_proj.bias)
        ours.codebook.copy_(theirs.codevectors.reshape(ours.codebook.shape))
    return ours.train(peer.training)


def sampled(where, drawn, n):
    """Our negatives as the peer wants them: frame numbers of the flattened batch, (P, N, K)."""
    out = torch.zeros(len(where.index_PM), n, drawn.index_PMK.shape[2], dtype=torch.long)
    for p, m in where.filled_PM.nonzero().tolist():
        out[p, where.index_PM[p, m]] = where.index_PM[p][drawn.index_PMK[p, m]] + p * n
    return out


def filled_pairs(where):
    return where.filled_PM[:, None] & where.filled_PM[..., None]


@pytest.mark.parametrize(("training", "entries"), [(False, 4), (True, 320)])
def test_losses_and_gradients_equal_transformers(monkeypatch, training, entries):
    peer = pretraining_model(entries).train(training)
    wave = normal(P, 2000)
    n = int(peer._get_feat_extract_output_lengths(2000))
    mask = mask_of(70, 60, 51, frames=n)
    where = marked(mask)
    drawn = draw_negatives(SEEDS, where, 100)
    quantizer = twin(peer)
    uniform = quantizer.noise(SEEDS, n)
    monkeypatch.setattr(
        torch.Tensor, "exponential_", lambda self: self.copy_(-uniform.log().reshape(self.shape))
    )
    peer.quantizer.temperature = 2.0
    seen = {}
    peer.project_hid.register_forward_hook(lambda m, x, y: seen.update(context=x[0]))
    peer.quantizer.register_forward_hook(lambda m, x, y: seen.update(z=x[0]))
    out = peer(wave, mask_time_indices=mask, sampled_negative_indices=sampled(where, drawn, n))

    noise = take(uniform.flatten(2), where).unflatten(-1, uniform.shape[2:])
    made = quantizer(take(seen["z"], where), where.filled_PM, 2.0, noise)
    context = peer.project_hid(take(seen["context"], where))
    target = peer.project_q(made.vectors_PNQ)
    same = frames.identical(made.ids_PNG, made.ids_PNG) & filled_pairs(where)
    assert same.sum() > 190  # the 181 frames themselves, and some that share their codes
    theirs = take(out.projected_quantized_states, where)
    seen_equal = frames.identical(theirs, theirs) & filled_pairs(where)
    # Training: the peer's one-hot is rounded, 1 - p + p, and it misses some equal vectors.
    assert torch.equal(seen_equal, seen_equal & same) if training else torch.equal(seen_equal, same)
    nce = frame_nce(context, target, target, drawn, same_PMC=seen_equal)
    assert nce.count.item() == 181
    assert nce.sum.item() == pytest.approx(out.contrastive_loss.item(), rel=1e-5)
    usage = made.soft_GV if training else made.hard_GV  # the peer evaluates hard choices
    diversity, _ = codes.diversity(usage, made.count)
    assert diversity.item() == pytest.approx(out.diversity_loss.item(), rel=1e-5)
    perplexity = codes.perplexity(usage, made.count)
    assert perplexity.item() == pytest.approx(out.codevector_perplexity.item(), rel=1e-5)

    total = nce.sum + 0.1 * diversity
    names = ["project_q.weight", "project_hid.weight", "wav2vec2.encoder.layer_norm.weight"]
    names += ["wav2vec2.feature_extractor.conv_layers.1.conv.weight"]
    leaves = [peer.get_parameter(name) for name in names]
    ours = torch.autograd.grad(total, [*leaves, quantizer.codebook, *quantizer.logits.parameters()],
                               retain_graph=True, allow_unused=True)  # fmt: skip
    weights = [peer.quantizer.codevectors, *peer.quantizer.weight_proj.parameters()]
    theirs = torch.autograd.grad(out.loss, [*leaves, *weights], allow_unused=True)
    for got, expected in zip(ours, theirs, strict=True):
        if expected is None:  # evaluation chooses by argmax: the logits learn nothing
            assert not training
            assert got is None
            continue
        difference = (got.reshape(expected.shape) - expected).abs().max()
        assert difference.item() <= 1e-4 * expected.abs().max().item()
