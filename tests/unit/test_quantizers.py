"""Quantizers: exact choices, straight-through gradients, statistics over valid frames only."""

import math

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from mmssl.quantizers import GumbelQuantizer, VectorQuantizer
from mmssl.types import UserError

P, N, D = 3, 11, 6


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gumbel(seed=0, **options):
    torch.manual_seed(seed)
    return GumbelQuantizer(D, 8, groups=2, entries=5, **options)


def vector(seed=0, **options):
    torch.manual_seed(seed)
    return VectorQuantizer(D, groups=2, entries=5, **options)


def encode(quantizer, z, valid=None, seeds=None, temperature=1.0):
    seeds = torch.arange(len(z)) + 100 if seeds is None else seeds
    return quantizer(z, valid, temperature, quantizer.noise(seeds, z.shape[1]))


BOTH = [gumbel, vector]

# ---------------------------------------------------------------- values


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("shared", [False, True])
def test_vectors_are_exactly_the_chosen_entries(make, shared):
    quantizer = make(shared_codebook=shared)
    assert quantizer.codebook.shape[0] == (1 if shared else 2)
    codes = encode(quantizer, normal(P, N, D))
    book = quantizer.codebook.expand(2, -1, -1)
    expected = torch.cat([book[g][codes.ids_PNG[..., g]] for g in range(2)], -1)
    assert torch.equal(codes.vectors_PNQ, expected)
    assert codes.count.item() == P * N
    for g in range(2):
        counts = torch.bincount(codes.ids_PNG[..., g].flatten(), minlength=5)
        assert torch.equal(codes.hard_GV[g], counts.float())


def test_evaluation_chooses_the_largest_logit_without_noise():
    quantizer = gumbel().eval()
    z = normal(P, N, D)
    logits = F.linear(z, quantizer.logits.weight, quantizer.logits.bias).unflatten(-1, (2, 5))
    codes = quantizer(z)
    assert torch.equal(codes.ids_PNG, logits.argmax(-1))
    torch.testing.assert_close(codes.soft_GV, logits.softmax(-1).sum((0, 1)))
    assert torch.equal(quantizer(z, uniform_PNGV=torch.rand(P, N, 2, 5)).ids_PNG, codes.ids_PNG)
    assert codes.commitment.item() == 0


def test_initial_values_of_the_papers():
    torch.manual_seed(0)
    one = GumbelQuantizer(512, 256, 2, 320)
    assert one.logits.weight.mean().item() == pytest.approx(0, abs=0.01)
    assert one.logits.weight.std().item() == pytest.approx(1, abs=0.01)
    assert one.logits.bias.abs().sum() == 0
    assert one.codebook.shape == (2, 320, 128)
    assert one.codebook.min() >= 0
    assert one.codebook.max() < 1
    assert one.codebook.mean().item() == pytest.approx(0.5, abs=0.01)
    # 512 x 640 + 640 logits and 2 x 320 entries of 128
    assert sum(p.numel() for p in one.parameters()) == 512 * 640 + 640 + 640 * 128
    two = GumbelQuantizer(512, 512, 2, 320, shared_codebook=True, hidden=1024, activation=F.relu)
    assert two.codebook.shape == (1, 320, 256)
    assert two.hidden.weight.shape == (1024, 512)
    assert two.logits.weight.shape == (640, 1024)
    assert two.logits.weight.abs().max() <= 1 / 32  # torch's uniform init: 1 / sqrt(1024)
    z = normal(2, 3, 512)
    logits = two.eval().logits(F.relu(two.hidden(z))).unflatten(-1, (2, 320))
    assert torch.equal(two(z).ids_PNG, logits.argmax(-1))
    assert all(p.dim() > 0 for q in (one, two, vector()) for p in q.state_dict().values())


def test_drawn_ids_follow_the_softmax_of_the_logits():
    draws, entries = 100_000, 8
    quantizer = GumbelQuantizer(1, 2, groups=2, entries=entries)
    nn.init.zeros_(quantizer.logits.weight)
    with torch.no_grad():
        quantizer.logits.bias.copy_(normal(2 * entries, seed=3))
    codes = encode(quantizer, torch.zeros(10, draws // 10, 1), seeds=torch.arange(10))
    expected = quantizer.logits.bias.detach().double().reshape(2, entries).softmax(-1) * draws
    for g in range(2):
        assert stats.chisquare(codes.hard_GV[g].double(), expected[g]).pvalue > 1e-3
    # the groups choose independently
    pairs = torch.bincount(
        codes.ids_PNG[..., 0].flatten() * entries + codes.ids_PNG[..., 1].flatten()
    )
    product = (expected[0][:, None] * expected[1][None] / draws).flatten()
    assert stats.chisquare(pairs.double(), product).pvalue > 1e-3


def test_nearest_entry_of_each_group():
    quantizer = vector(project=False)
    with torch.no_grad():
        quantizer.codebook.normal_()
    z = normal(P, N, D)
    codes = encode(quantizer, z)
    distance = (z.unflatten(-1, (2, 3))[:, :, :, None] - quantizer.codebook[0]).norm(dim=-1)
    assert torch.equal(codes.ids_PNG, distance.argmin(-1))
    assert torch.equal(codes.soft_GV, codes.hard_GV)


# ---------------------------------------------------------------- gradients


def test_gumbel_gradient_is_that_of_the_relaxed_choice():
    quantizer = gumbel().double()
    z = normal(P, N, D, dtype=torch.float64).requires_grad_()
    uniform = torch.rand(P, N, 2, 5, generator=torch.Generator().manual_seed(1)).double()
    weight = normal(P, N, 8, seed=2, dtype=torch.float64)
    temperature = 0.7
    (quantizer(z, None, temperature, uniform).vectors_PNQ * weight).sum().backward()
    ours = [z.grad, quantizer.logits.weight.grad, quantizer.codebook.grad]
    z.grad = None
    quantizer.zero_grad()
    logits = quantizer.logits(z).unflatten(-1, (2, 5)) - (-uniform.log()).log()
    soft = (logits / temperature).softmax(-1)
    hard = F.one_hot(logits.argmax(-1), 5).double()
    through = hard - soft.detach() + soft
    vectors = torch.einsum("pngv,gvw->pngw", through, quantizer.codebook).flatten(2)
    (vectors * weight).sum().backward()
    for got, leaf in zip(ours, [z, quantizer.logits.weight, quantizer.codebook], strict=True):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-12, atol=1e-12)


def test_vector_quantiser_passes_the_gradient_as_it_is():
    quantizer = vector(project=False).double()
    z = normal(P, N, D, dtype=torch.float64).requires_grad_()
    weight = normal(P, N, D, seed=2, dtype=torch.float64)
    (encode(quantizer, z).vectors_PNQ * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    assert quantizer.codebook.grad is None  # it learns from its own loss only


def test_commitment_loss_and_the_share_of_each_side():
    quantizer = vector(project=False, commitment=0.25).double()
    with torch.no_grad():
        quantizer.codebook.normal_()
    z = normal(P, N, D, dtype=torch.float64).requires_grad_()
    codes = encode(quantizer, z)
    e = quantizer.codebook[0][codes.ids_PNG].flatten(2).detach()
    mean = codes.commitment / codes.count
    torch.testing.assert_close(mean, 1.25 * F.mse_loss(e, z))
    mean.backward()
    torch.testing.assert_close(z.grad, 0.25 * 2 * (z - e).detach() / z.numel())
    slope = 2 * (e - z).detach().unflatten(-1, (2, 3)) / z.numel()
    expected = (
        torch.zeros(5, 3).double().index_add_(0, codes.ids_PNG.flatten(), slope.reshape(-1, 3))
    )
    torch.testing.assert_close(quantizer.codebook.grad[0], expected)


def test_commitment_at_the_start_is_five_quarters_of_the_latents_power():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(512, groups=2, entries=320)  # vq-wav2vec, k-means form
    codes = quantizer(normal(2, 100, 512))
    # the group norm makes the power 1; the nearest entry takes a little off
    assert (codes.commitment / codes.count).item() == pytest.approx(1.2456, abs=0.005)


def test_projection_and_norm_equal_torch():
    quantizer = vector().double()
    with torch.no_grad():
        quantizer.norm.weight.normal_()
        quantizer.norm.bias.normal_()
        quantizer.codebook.normal_()
    z = normal(P, N, D, dtype=torch.float64)
    latents = quantizer.norm(quantizer.project(z.transpose(1, 2))).transpose(1, 2)
    plain = vector(project=False).double()
    plain.codebook = quantizer.codebook
    ours, expected = encode(quantizer, z), encode(plain, latents)
    assert torch.equal(ours.ids_PNG, expected.ids_PNG)
    torch.testing.assert_close(ours.commitment, expected.commitment)


# ---------------------------------------------------------------- rows, padding, precision


@pytest.mark.parametrize("make", BOTH)
def test_padding_changes_nothing_and_gets_no_gradient(make):
    quantizer, z, lengths = make().double(), normal(P, N, D, dtype=torch.float64), [11, 7, 4]
    if make is vector:
        with torch.no_grad():
            quantizer.codebook.normal_()
    longer = torch.cat([z, torch.full((P, 5, D), math.nan).double()], 1)
    valid = torch.arange(N + 5) < torch.tensor(lengths)[:, None]
    longer = longer.masked_fill(~valid[..., None], math.nan).requires_grad_()
    codes = encode(quantizer, longer, valid)
    assert codes.count.item() == sum(lengths)
    assert codes.hard_GV.sum(1).tolist() == [sum(lengths)] * 2
    soft, commitment = 0, 0
    for row, length in enumerate(lengths):
        alone = encode(quantizer, z[row : row + 1, :length], seeds=torch.tensor([100 + row]))
        assert torch.equal(alone.ids_PNG[0], codes.ids_PNG[row, :length])
        torch.testing.assert_close(alone.vectors_PNQ[0], codes.vectors_PNQ[row, :length])
        soft, commitment = soft + alone.soft_GV, commitment + alone.commitment
    torch.testing.assert_close(codes.soft_GV, soft)
    torch.testing.assert_close(codes.commitment, commitment)
    assert codes.vectors_PNQ[~valid].abs().sum() == 0
    (codes.vectors_PNQ.square().sum() + codes.commitment + codes.soft_GV[0, 0]).backward()
    assert torch.equal(longer.grad.abs().sum(-1) > 0, valid)
    assert all(torch.isfinite(p.grad).all() for p in quantizer.parameters() if p.grad is not None)


def test_a_row_draws_its_own_noise():
    quantizer, z, seeds = gumbel(), normal(1, N, D).expand(P, N, D), torch.tensor([5, 9, 5])
    ids = encode(quantizer, z, seeds=seeds).ids_PNG
    assert torch.equal(ids[0], ids[2])
    assert not torch.equal(ids[0], ids[1])
    assert torch.equal(encode(quantizer, z[:2], seeds=seeds[1:]).ids_PNG[0], ids[1])
    other = quantizer(z, None, 1.0, quantizer.noise(seeds, N, "second")).ids_PNG
    assert not torch.equal(other, ids)
    assert torch.equal(quantizer.noise(seeds, N + 3)[:, :N], quantizer.noise(seeds, N))
    assert vector().noise(seeds, N) is None


@pytest.mark.parametrize("make", BOTH)
def test_autocast_and_bf16_latents_are_computed_in_fp32(make):
    quantizer, z = make(), normal(P, N, D).bfloat16()
    plain = encode(quantizer, z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = encode(quantizer, z)
    assert cast.vectors_PNQ.dtype == torch.float32
    assert torch.equal(cast.vectors_PNQ, plain.vectors_PNQ)
    assert torch.equal(cast.soft_GV, plain.soft_GV)


def test_extreme_noise_and_logits_stay_finite():
    quantizer = gumbel()
    with torch.no_grad():
        quantizer.logits.weight.mul_(1e4)
    z = normal(P, N, D).requires_grad_()
    uniform = torch.zeros(P, N, 2, 5)
    uniform[..., 0] = 1 - 2**-24
    codes = quantizer(z, None, 0.1, uniform)
    (codes.vectors_PNQ.sum() + codes.soft_GV.square().sum()).backward()
    assert torch.isfinite(codes.vectors_PNQ).all()
    assert torch.isfinite(z.grad).all()


def test_what_is_refused():
    z = normal(P, N, D)
    with pytest.raises(ValueError, match=r"uniform numbers of shape \(3, 11, 2, 5\).*got none"):
        gumbel()(z)
    with pytest.raises(ValueError, match=r"got \(3, 11, 2, 4\)"):
        gumbel()(z, None, 1.0, torch.rand(P, N, 2, 4))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        gumbel()(z, None, 0.0, torch.rand(P, N, 2, 5))
    with pytest.raises(UserError, match="width 7 does not split into 2 groups"):
        GumbelQuantizer(D, 7, 2, 5)
    with pytest.raises(UserError, match="width 7 does not split into 2 groups"):
        VectorQuantizer(7, 2, 5)


# ---------------------------------------------------------------- an independent library


def peers(width=32, entries=40):
    pytest.importorskip("transformers")
    from transformers import Wav2Vec2Config
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2GumbelVectorQuantizer

    config = Wav2Vec2Config(
        conv_dim=(D,), conv_kernel=(3,), conv_stride=(2,), codevector_dim=width,
        num_codevector_groups=2, num_codevectors_per_group=entries,
    )  # fmt: skip
    peer = Wav2Vec2GumbelVectorQuantizer(config)
    ours = GumbelQuantizer(D, width, 2, entries)
    with torch.no_grad():
        peer.weight_proj.weight.copy_(ours.logits.weight)
        peer.weight_proj.bias.copy_(ours.logits.bias.normal_())
        peer.codevectors.copy_(ours.codebook.reshape(peer.codevectors.shape))
    return ours, peer


def entropy_sum(sum_gv):
    p = sum_gv / sum_gv.sum(-1, keepdim=True)
    return torch.xlogy(p, p).sum(-1).neg().exp().sum()


def test_evaluation_equals_transformers():
    ours, peer = peers()
    z, mask = normal(P, N, D), normal(P, N, seed=4) > 0
    vectors, perplexity = peer.eval()(z, mask)
    codes = ours.eval()(z)
    assert (codes.vectors_PNQ - vectors).abs().max().item() <= 1e-7
    hard = ours(z, mask).hard_GV
    assert entropy_sum(hard).item() == pytest.approx(perplexity.item(), rel=1e-6)


def test_training_with_the_same_noise_equals_transformers(monkeypatch):
    ours, peer = peers()
    z, mask = normal(P, N, D), normal(P, N, seed=4) > 0
    uniform = ours.noise(torch.arange(P), N)
    # torch's Gumbel numbers are -ln of exponential ones, which are -ln of uniform ones
    monkeypatch.setattr(
        torch.Tensor, "exponential_", lambda self: self.copy_(-uniform.log().reshape(self.shape))
    )
    peer.temperature = 1.3
    vectors, perplexity = peer.train()(z, mask)
    codes = ours(z, None, 1.3, uniform)
    assert (codes.vectors_PNQ - vectors).abs().max().item() <= 1e-6
    soft = ours(z, mask, 1.3, uniform).soft_GV
    assert entropy_sum(soft).item() == pytest.approx(perplexity.item(), rel=1e-5)
    weight = normal(*vectors.shape, seed=5)
    (vectors * weight).sum().backward()
    (codes.vectors_PNQ * weight).sum().backward()
    torch.testing.assert_close(
        ours.logits.weight.grad, peer.weight_proj.weight.grad, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        ours.codebook.grad.reshape(peer.codevectors.shape), peer.codevectors.grad,
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
