"""Recurrent trunks against torch's own, what a token sees, padding; and causal transformers."""

import math

import pytest
import torch
from torch import nn

from mmssl.backbones.recurrent import Recurrent
from mmssl.backbones.transformer import Transformer
from mmssl.targets.teacher import Teacher
from mmssl.types import UserError


def test_stacked_lstm_is_that_of_torch():
    torch.manual_seed(0)
    net, peer = Recurrent(6, 4, layers=2, cell="lstm"), nn.LSTM(4, 6, 2, batch_first=True)
    with torch.no_grad():
        for i, block in enumerate(net.blocks):
            for name, value in block.named_parameters():
                getattr(peer, name.replace("_l0", f"_l{i}")).copy_(value)
    x = torch.randn(3, 9, 4)
    torch.testing.assert_close(net(x)[0], peer(x)[0])


def test_gru_with_residuals_where_widths_match():
    """The composition of APC: input 4 to 6 without, then with residuals."""
    torch.manual_seed(0)
    net = Recurrent(6, 4, layers=3, residual=True)
    x = y = torch.randn(3, 9, 4)
    out, hidden = net(x, return_hidden=True)
    for i, found in enumerate(hidden):
        layer = nn.GRU(4 if i == 0 else 6, 6, batch_first=True)
        layer.load_state_dict(net.blocks[i].state_dict())
        y = layer(y)[0] + (y if i else 0)
        torch.testing.assert_close(found, y)
    assert torch.equal(out, hidden[-1])


def test_dropout_lies_between_layers_alone():
    net = Recurrent(6, 6, layers=1, dropout=0.9).train()
    x = torch.randn(2, 5, 6)
    assert torch.equal(net(x)[0], net.eval()(x)[0])
    deep = Recurrent(64, 6, layers=2, dropout=0.9).train()
    first = deep(x, return_hidden=True)[1][0]
    assert float((first == 0).float().mean()) == pytest.approx(0.9, abs=0.1)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_cells_keep_the_precision_of_their_weights_under_autocast(kind):
    torch.manual_seed(0)
    net = Recurrent(8, 8, 2, kind, residual=True)
    x = torch.randn(2, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)[0]
        assert torch.equal(net(x.bfloat16())[0], net(x.bfloat16().float())[0])
    assert torch.equal(out, net(x)[0])


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_teacher_of_recurrent_layers_follows(kind):
    torch.manual_seed(0)
    student = Recurrent(8, 8, 2, kind)
    teacher, x = Teacher(student, 0.0), torch.randn(2, 5, 8)
    torch.testing.assert_close(teacher.twin(x)[0], student(x)[0])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(2)
    teacher.update(0.0)
    torch.testing.assert_close(teacher.twin(x)[0], student(x)[0])
    assert not teacher.twin(x)[0].requires_grad


def causal(kind):
    torch.manual_seed(0)
    if kind == "transformer":
        options = {"head_size": 4, "relative_buckets": 8, "causal": True}
        net = Transformer(8, 2, **options)
        nn.init.normal_(net.relative.table.weight)
        return net.double().eval()
    return Recurrent(8, 8, 2, kind, residual=kind == "gru").double().eval()


KINDS = ("gru", "lstm", "transformer")


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_sees_all_before_it_and_none_behind(kind):
    net = causal(kind)
    x = torch.randn(1, 12, 8, dtype=torch.float64, requires_grad=True)
    out = net(x)[0]
    out[0, 7, 0].backward()
    assert x.grad[0, :8].abs().sum(-1).gt(0).all()
    assert x.grad[0, 8:].eq(0).all()
    torch.testing.assert_close(out[:, :8], net(x[:, :8])[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 7])
def test_a_padded_row_equals_itself_alone(kind, length):
    net = causal(kind)
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    pad = torch.arange(11) >= torch.tensor([[11], [length]])
    x[1, length:] = math.nan
    out, _ = net(x, pad)
    assert out.isfinite().all()
    torch.testing.assert_close(out[1:, :length], net(x[1:, :length])[0])
    torch.testing.assert_close(out[:1], net(x[:1])[0])


def test_a_conformer_cannot_be_causal():
    with pytest.raises(UserError, match=r"convolves both ways and knows no .* causal"):
        Transformer(8, 1, head_size=4, layer="conformer", causal=True)
