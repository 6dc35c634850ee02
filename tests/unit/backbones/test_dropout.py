"""Dropout by 16 random bits: rate, scale, gradient; branches left out per row."""

import pytest
import torch

from mmssl.backbones.dropout import Dropout, DropPath


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_share_of_zeros_and_mean(rate):
    count = 400_000
    out = Dropout(rate)(torch.ones(4, count // 4))
    zeros = (out == 0).float().mean().item()
    sigma = (rate * (1 - rate) / count) ** 0.5
    assert abs(zeros - rate) < 5 * sigma + 2**-16
    assert abs(out.mean().item() - 1) < 5 * sigma / (1 - rate)
    kept = out[out != 0]
    assert torch.all(kept == kept[0])
    assert kept[0].item() == pytest.approx(1 / (1 - rate), rel=2e-4)


def test_scale_belongs_to_the_rounded_rate():
    out = Dropout(0.1)(torch.ones(1000))
    assert out.max().item() == pytest.approx(65536 / (65536 - 6554), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_the_mask_of_the_forward(dtype):
    x = torch.randn(7, 33, dtype=dtype, requires_grad=True)  # no multiple of four numbers
    out = Dropout(0.3)(x)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    assert torch.equal(out, x.detach() * x.grad)
    assert 0 < (x.grad == 0).float().mean() < 0.6


def test_draws_follow_the_global_seed_and_neighbours_are_independent():
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(Dropout(0.5)(torch.ones(40_000)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    kept = (results[0] > 0).float().view(-1, 4)  # the four draws of one random word
    together = torch.corrcoef(kept.T) - torch.eye(4)
    assert together.abs().max() < 0.05


@pytest.mark.parametrize("module", [Dropout(0.5), DropPath(0.5)])
def test_evaluation_and_rate_zero_change_nothing(module):
    x = torch.randn(3, 4)
    assert module.eval()(x) is x
    assert type(module)(0.0)(x) is x
    assert "0.5" in repr(module)
    assert not torch.equal(module.train()(x.expand(50, 3, 4)), x.expand(50, 3, 4))


def test_path_drops_whole_rows():
    x = torch.randn(2000, 3, 5)
    out = DropPath(0.25)(x)
    gone = (out == 0).flatten(1)
    assert torch.equal(gone.all(1), gone.any(1))
    assert abs(gone[:, 0].float().mean().item() - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5
    kept = ~gone[:, 0]
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
