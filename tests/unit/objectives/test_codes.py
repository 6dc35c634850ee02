"""Use of a codebook, and prediction of code ids by cosine."""

import math

import pytest
import torch
from torch.nn import functional as F

from mmssl.objectives import codes
from mmssl.quantizers import GumbelQuantizer


def share(soft, count):
    total, n = codes.diversity(soft, count)
    return (total / n).item()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_diversity_of_uniform_and_of_collapsed_codes():
    n = torch.tensor(50.0)
    assert share(torch.full((2, 320), 50 / 320), n) < 1e-4
    one = torch.zeros(2, 320)
    one[:, 7] = 50
    assert share(one, n) == pytest.approx(638 / 640, abs=1e-6)  # 0.9969
    assert codes.perplexity(one, n).item() == pytest.approx(2, abs=1e-6)
    assert codes.perplexity(torch.full((2, 320), 50 / 320), n).item() == pytest.approx(
        640, rel=1e-5
    )


def test_usage_is_that_of_the_least_used_group_and_of_what_is_possible():
    even, one = torch.full((320,), 4.0), torch.zeros(320)
    one[7] = 1280.0
    assert codes.usage(torch.stack([even, even])).item() == pytest.approx(1.0)
    assert codes.usage(torch.stack([even, one])).item() == pytest.approx(1 / 320)
    half = torch.cat([torch.full((160,), 8.0), torch.zeros(160)])
    assert codes.usage(torch.stack([even, half])).item() == pytest.approx(0.5)
    few = torch.zeros(2, 320)
    few[:, :20] = 1.0  # 20 frames cannot choose more than 20 entries
    assert codes.usage(few).item() == pytest.approx(1.0)
    assert codes.usage(torch.zeros(2, 5)).item() == 1.0  # no frames: nothing has collapsed


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 0.0), (1e4, 638 / 640)])
def test_diversity_of_logits_through_the_quantizer(scale, expected):
    quantizer = GumbelQuantizer(4, 8, 2, 320).eval()
    torch.nn.init.zeros_(quantizer.logits.weight)
    with torch.no_grad():
        quantizer.logits.bias[[5, 400]] = scale
    valid = torch.tensor([[True, True, False], [True, False, False]])
    made = quantizer(normal(2, 3, 4), valid)
    total, count = codes.diversity(made.soft_GV, made.count)
    assert count.item() == 3
    assert (total / count).item() == pytest.approx(expected, abs=1e-4)
    assert total.item() == pytest.approx(3 * expected, abs=3e-4)
    total.backward()  # probabilities that underflow to 0 included
    assert torch.isfinite(quantizer.logits.weight.grad).all()


def test_diversity_is_the_entropy_of_the_averaged_probabilities():
    logits = normal(30, 2, 9, dtype=torch.float64).requires_grad_()
    p = logits.softmax(-1)
    total, count = codes.diversity(p.sum(0), torch.tensor(30.0))
    mean = p.mean(0)
    used = torch.special.entr(mean).sum(-1).exp().sum()
    torch.testing.assert_close(total / count, ((18 - used) / 18))
    (ours,) = torch.autograd.grad(total / count, logits, retain_graph=True)
    (expected,) = torch.autograd.grad((18 - used) / 18, logits)
    torch.testing.assert_close(ours, expected)
    assert not codes.perplexity(p.sum(0), torch.tensor(30.0)).requires_grad


def test_no_frames_cost_nothing():
    soft = torch.zeros(2, 5, requires_grad=True)
    total, count = codes.diversity(soft, torch.tensor(0.0))
    total.backward()
    assert (total.item(), count.item()) == (0, 0)
    assert soft.grad.abs().sum() == 0


@pytest.mark.parametrize("classes", [100, 500, 504])
def test_zero_projection_costs_ln_of_the_codewords(classes):
    torch.manual_seed(classes)
    book, labels = torch.rand(classes, 256), torch.randint(classes, (400,))
    total, count = codes.codeword_cross_entropy(
        codes.codeword_logits(torch.zeros(400, 256), book), labels
    )
    assert (total / count).item() == pytest.approx(math.log(classes), abs=1e-5)
    # random predictions: the codewords' common part cancels, the rest adds about 0.05
    total, count = codes.codeword_cross_entropy(
        codes.codeword_logits(torch.randn(400, 256), book), labels
    )
    assert (total / count).item() == pytest.approx(math.log(classes) + 0.05, abs=0.06)


def test_logits_equal_torchaudio():
    generator = pytest.importorskip("torchaudio.models.wav2vec2.components").LogitGenerator
    torch.manual_seed(0)
    peer = generator(12, 20, 8, skip_masked=False, skip_nomask=False)
    x, labels = normal(2, 9, 12), torch.randint(20, (2, 9))
    mask = normal(2, 9, seed=1) > 0
    expected, _ = peer(x, labels, mask, ~mask)  # positive first, its own class blanked
    logits = codes.codeword_logits(peer.final_proj(x[mask]), peer.label_embeddings)
    own = labels[mask][:, None]
    torch.testing.assert_close(logits.gather(1, own)[:, 0], expected[:, 0])
    blanked = logits.scatter(1, own, -torch.inf)
    torch.testing.assert_close(blanked, expected[:, 1:])
    total, count = codes.codeword_cross_entropy(logits, labels[mask])
    zeros = torch.zeros(len(expected), dtype=torch.long)
    torch.testing.assert_close(total / count, F.cross_entropy(expected, zeros))


def test_frames_that_are_not_valid_do_not_count():
    x, book = normal(6, 8).requires_grad_(), normal(5, 8, seed=1)
    labels, valid = torch.tensor([0, 1, 2, 3, 4, -1]), torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    logits = codes.codeword_logits(x, book)
    total, count = codes.codeword_cross_entropy(logits, labels, valid)
    expected = F.cross_entropy(logits[valid], labels[valid], reduction="sum")
    torch.testing.assert_close(total, expected)
    assert count.item() == 4
    total.backward()
    assert torch.equal(x.grad.abs().sum(1) > 0, valid)


def test_logits_are_fp32_under_autocast():
    x, book = normal(6, 8), normal(5, 8, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codes.codeword_logits(x, book), codes.codeword_logits(x, book).float())
        logits = codes.codeword_logits(x, book)
    assert torch.equal(logits, codes.codeword_logits(x, book))
    assert codes.codeword_logits(x.bfloat16(), book).dtype == torch.float32
