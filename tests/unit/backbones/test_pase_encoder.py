"""PASE's encoder: its arithmetic, and what padding and dummies must not do."""

import pytest
import torch
from conv_laws import dummies_change_nothing, padding_changes_nothing

from mmssl.backbones.pase import PASE, reflected
from mmssl.types import UserError


def small():
    torch.manual_seed(0)
    return PASE(1, 8000, 6, 31, (8, 8, 12), (20, 5, 5), (10, 1, 2), 10)


def test_a_second_is_a_hundred_frames_of_148_ms():
    net = PASE()
    (field,) = net.fields()
    assert (field.stride, field.size, field.first) == (160, 2370, 0.5)
    tokens, grid = net.eval()(torch.randn(1, 1, 16_000))
    assert (grid, tokens.shape) == ((100,), (1, 100, 100))


def test_the_layers_are_those_of_torch():
    net = small()
    x = torch.randn(2, 1, 400)
    y = x
    for i, (k, stride) in enumerate([(31, 1), (20, 10), (5, 1), (5, 2)]):
        y = torch.nn.functional.pad(y, ((k - 1) // 2,) * 2, mode="reflect")
        conv = net.convs[i - 1] if i else None
        weight = conv.weight if conv else net.sinc.filters()[:, None]
        y = torch.nn.functional.conv1d(y, weight, conv.bias if conv else None, stride)
        mean, var = y.mean((0, 2), keepdim=True), y.var((0, 2), keepdim=True, unbiased=False)
        y = (y - mean) / (var + 1e-5).sqrt()
        y = torch.where(y > 0, y, 0.25 * y)
    y = net.out(y)
    mean, var = y.mean((0, 2), keepdim=True), y.var((0, 2), keepdim=True, unbiased=False)
    y = (y - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(net.train()(x)[0], y.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_items_are_mirrored_at_their_own_ends():
    x = torch.arange(1.0, 7).expand(2, 1, 6)
    got = reflected(x, 2, torch.tensor([6, 4]))
    assert got[0, 0].tolist() == [3, 2, 1, 2, 3, 4, 5, 6, 5, 4]
    assert got[1, 0, :8].tolist() == [3, 2, 1, 2, 3, 4, 3, 2]
    assert torch.equal(reflected(x, 2, None)[0], got[0])
    assert reflected(x, 2, torch.tensor([1, 1]))[0, 0, :5].eq(1).all()


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(training):
    net = small()
    net.sinc = torch.nn.Conv1d(1, 6, 31)  # in fp64, which sinc filters refuse
    net = net.double().train(training)
    items = [torch.randn(1, 1, n).double() for n in (400, 230, 311)]
    padding_changes_nothing(net, items, training)


def test_dummies_change_nothing():
    dummies_change_nothing(small, torch.randn(3, 1, 400))


def test_short_sounds_are_refused():
    with pytest.raises(UserError, match="longer crop_s"):
        small().grid((15,))
    with pytest.raises(UserError, match=r"frontend\.kind: waveform"):
        small().grid((400, 64))
