"""Global tokens, registers and DropToken."""

import pytest
import torch

from mmssl.backbones.tokens import DenseGelu, DropToken, ExtraTokens, drop_tokens
from mmssl.types import UserError


def uniforms(rows, tokens, seed=0):
    return torch.rand(rows, tokens, generator=torch.Generator().manual_seed(seed))


def test_extra_tokens_come_first_and_leave_again():
    extra = ExtraTokens(4, ("align", "masked"), registers=3)
    x, pad = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.bool)
    pad[1, 3:] = True
    longer, longer_pad = extra(x, pad, ("masked",))
    assert longer.shape == (2, 9, 4)
    assert extra.count(("masked",)) == 4
    assert torch.equal(longer[:, 0], extra.globals_GD[1].expand(2, 4))
    assert torch.equal(longer[:, 1:4], extra.registers_RD.expand(2, 3, 4))
    assert longer_pad.sum(1).tolist() == [0, 2]
    assert torch.equal(longer_pad[:, 4:], pad)
    named, tokens = extra.split(longer, ("masked",))
    assert torch.equal(named["masked"], longer[:, 0])
    assert torch.equal(tokens, x)


def test_each_pass_trains_its_own_global_token():
    extra = ExtraTokens(4, ("align", "masked"))
    out, pad = extra(torch.randn(2, 5, 4), None, ("masked",))
    assert pad is None
    extra.split(out, ("masked",))[0]["masked"].sum().backward()
    assert extra.globals_GD.grad.tolist() == [[0.0] * 4, [2.0] * 4]
    with pytest.raises(UserError, match="global tokens"):
        extra(torch.randn(2, 5, 4), None, ("agg",))


@pytest.mark.parametrize(
    ("tokens", "drop", "kept"), [(1568, 0.5, 784), (1200, 0.5, 600), (7, 0.9, 1)]
)
def test_drop_keeps_the_published_number(tokens, drop, kept):
    x = torch.arange(tokens, dtype=torch.float32)[None, :, None].expand(3, -1, 2)
    out, index, pad = drop_tokens(x, uniforms(3, tokens), drop)
    assert out.shape == (3, kept, 2)
    assert torch.equal(out[..., 0], index.float())
    assert all(len(set(row.tolist())) == kept for row in index)
    assert torch.all(index.diff(dim=1) > 0)
    assert not pad.any()


def test_keeping_all_is_no_drop_at_all():
    x = torch.randn(2, 9, 4)
    out, index, _ = drop_tokens(x, uniforms(2, 9), 0.0)
    assert torch.equal(out, x)
    assert index.tolist() == [list(range(9))] * 2
    assert DropToken()(x, uniforms(2, 9), 0.0)[0] is x


def test_evaluation_drops_nothing():
    x, pad = torch.randn(2, 9, 4), torch.zeros(2, 9, dtype=torch.bool)
    out, index, same = DropToken().eval()(x, None, 0.5, pad)
    assert out is x
    assert index is None
    assert same is pad


def test_training_drops_by_the_callers_numbers():
    x, u = torch.randn(4, 10, 2), uniforms(4, 10)
    out, index, _ = DropToken()(x, u, 0.5)
    for row in range(4):
        assert set(index[row].tolist()) == set(u[row].argsort()[:5].tolist())
        alone = DropToken()(x[row : row + 1], u[row : row + 1], 0.5)[0]
        assert torch.equal(out[row : row + 1], alone)
    same_u = u[:1].expand(4, 10)
    assert torch.equal(drop_tokens(x, same_u, 0.5)[1], drop_tokens(x, u[:1], 0.5)[1].expand(4, 5))


def test_every_token_is_kept_equally_often():
    _, index, _ = drop_tokens(torch.zeros(4000, 8, 1), uniforms(4000, 8), 0.5)
    share = torch.bincount(index.flatten(), minlength=8) / 4000
    assert (share - 0.5).abs().max() < 0.04  # five standard deviations


def test_padding_is_never_kept_as_content():
    x = torch.arange(8.0)[None, :, None].expand(3, 8, 1)
    pad = torch.arange(8)[None] >= torch.tensor([8, 4, 0])[:, None]
    out, index, kept_pad = drop_tokens(x, uniforms(3, 8), 0.5, pad)
    assert (~kept_pad).sum(1).tolist() == [4, 2, 0]
    assert torch.all(out[1, :2, 0] < 4)
    assert torch.all(index[1, :2].diff() > 0)
    assert kept_pad[1].tolist() == [False, False, True, True]


def test_gradient_reaches_kept_tokens_only():
    x = torch.randn(2, 6, 3, requires_grad=True)
    out, index, _ = drop_tokens(x, uniforms(2, 6), 0.5)
    out.sum().backward()
    kept = torch.zeros(2, 6, dtype=torch.bool).scatter(1, index, True)
    assert torch.equal(x.grad, kept[..., None].expand(2, 6, 3).float())


def test_wrong_drops_are_refused():
    with pytest.raises(UserError, match="must lie in"):
        DropToken()(torch.zeros(1, 4, 2), uniforms(1, 4), 1.0)
    with pytest.raises(UserError, match="uniform number"):
        DropToken()(torch.zeros(1, 4, 2), None, 0.5)


def test_dense_gelu_is_its_formula():
    dense = DenseGelu(4, 6)
    x = torch.randn(3, 4)
    expected = torch.nn.functional.gelu(x @ dense.linear.weight.T + dense.linear.bias)
    torch.testing.assert_close(dense(x), expected)
