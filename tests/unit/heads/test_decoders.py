"""Decoders: start values, what they read, and parity with formulas."""

import math
from types import SimpleNamespace

import pytest
import torch
import torchaudio
from torch import nn
from torch.nn import functional as F

from mmssl.heads.decode import ConvDecoder, SequenceDecoder, Truth, WaveNet


def truth(signal, lengths=None, valid=None, meta=()):
    items = len(signal)
    lengths = torch.full((items,), signal.shape[2]) if lengths is None else torch.tensor(lengths)
    valid = torch.ones(items, dtype=torch.bool) if valid is None else torch.tensor(valid)
    view = SimpleNamespace(rows_P=torch.arange(items))
    classes = lambda label, names: torch.tensor(  # noqa: E731
        [names.index(m[label]) if m[label] in names else -1 for m in meta]
    )
    return Truth(signal, lengths, valid, view, SimpleNamespace(classes=classes))


def mean(term):
    return (term.sum / term.count).item()


def zeroed(layer):
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


# ---------------------------------------------------------------- slices


def test_slices_of_unit_variance_cost_1_with_a_zero_head_and_are_counted_one_by_one():
    torch.manual_seed(0)
    decoder = ConvDecoder(5, (4, 6), 3, (13, 8))
    assert decoder.decode(torch.randn(2, 1, 5)).shape == (2, 3, 13, 8)
    assert decoder.sizes == [(3, 2), (6, 4), (13, 8)]
    zeroed(decoder.blocks[-1].convs[-1])
    signal = torch.randn(200, 3, 13, 8)
    term = decoder(torch.randn(200, 1, 5), truth(signal))[""]
    assert int(term.count) == 600
    assert mean(term) == pytest.approx(1.0, abs=0.02)
    assert mean(term) == pytest.approx(float(signal.square().mean()), rel=1e-5)


def test_dummies_enter_neither_the_error_nor_the_statistics_of_the_mirror():
    torch.manual_seed(0)
    one, two = ConvDecoder(5, (4, 6), 1, (8, 8)), ConvDecoder(5, (4, 6), 1, (8, 8))
    two.load_state_dict(one.state_dict())
    code, signal = torch.randn(3, 1, 5), torch.randn(3, 1, 8, 8)
    a = one(code[:2], truth(signal[:2]))[""]
    b = two(code, truth(signal, valid=[True, True, False]))[""]
    torch.testing.assert_close(a.sum, b.sum)
    assert int(a.count) == int(b.count) == 2
    for p, q in zip(one.buffers(), two.buffers(), strict=True):
        torch.testing.assert_close(p, q)


# ---------------------------------------------------------------- frames


def test_frames_are_those_of_the_lstm_equations():
    """Gates in torch's order i, f, g, o; the first state is the vector, the first input zero."""
    torch.manual_seed(0)
    decoder, z = SequenceDecoder(4, 3).double(), torch.randn(2, 1, 4, dtype=torch.float64)
    w, u = decoder.cell.weight_ih, decoder.cell.weight_hh
    bias = decoder.cell.bias_ih + decoder.cell.bias_hh
    h, c, x, said = z[:, 0], torch.zeros(2, 4).double(), torch.zeros(2, 3).double(), []
    for _ in range(5):
        i, f, g, o = (x @ w.T + h @ u.T + bias).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        x = h @ decoder.out.weight.T + decoder.out.bias
        said.append(x)
    torch.testing.assert_close(decoder.decode(z, 5), torch.stack(said, 1))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_frames_are_said_from_the_vector_alone(cell):
    """What was true at earlier frames has no way to later ones; padding is not asked for."""
    torch.manual_seed(0)
    decoder, z = SequenceDecoder(4, 3, cell), torch.randn(2, 1, 4)
    signal = torch.randn(2, 1, 6, 3)
    term = decoder(z, truth(signal, [6, 4]))[""]
    assert int(term.count) == 10
    other = signal.clone()
    other[1, :, 4:] = 99
    other[:, :, 0] += 1
    changed = decoder(z, truth(other, [6, 4]))[""]
    guess = decoder.decode(z, 6)
    expected = (2 * (signal[:, 0, 0] - guess[:, 0]) + 1).mean(-1).sum()  # of the first frames alone
    torch.testing.assert_close(changed.sum - term.sum, expected, rtol=1e-4, atol=1e-5)
    longer = torch.cat([signal, torch.full((2, 1, 50, 3), 7.0)], 2)
    torch.testing.assert_close(decoder(z, truth(longer, [6, 4]))[""].sum, term.sum)


# ---------------------------------------------------------------- samples


def wavenet(**options):
    torch.manual_seed(0)
    return WaveNet(5, 4, **{"channels": 6, "skip": 7, "cycles": 2, "depth": 3, **options}).double()


def levels(items, samples):
    return torch.randint(0, 256, (items, samples), generator=torch.Generator().manual_seed(0))


def test_a_zero_head_costs_ln_256_per_valid_sample():
    decoder = wavenet()
    zeroed(decoder.out)
    wave = 0.1 * torch.randn(2, 1, 30)
    term = decoder(torch.randn(2, 7, 5).double(), truth(wave, [30, 11]))[""]
    assert int(term.count) == 41
    assert mean(term) == pytest.approx(math.log(256), abs=1e-9)


def test_the_term_is_the_cross_entropy_of_mu_law_levels():
    decoder, wave = wavenet(), (0.3 * torch.randn(2, 1, 30)).clamp(-1, 1)
    code = torch.randn(2, 8, 5).double()
    mu = 255
    companded = wave.sign() * (1 + mu * wave.abs()).log() / math.log(1 + mu)
    level = ((companded + 1) / 2 * mu + 0.5).long()[:, 0]
    assert torch.equal(level, torchaudio.functional.mu_law_encoding(wave, 256)[:, 0])
    logits = decoder.logits(level, code, None)
    expected = F.cross_entropy(logits.flatten(0, 1), level.flatten())
    assert mean(decoder(code, truth(wave))[""]) == pytest.approx(float(expected), rel=1e-9)


def test_a_sample_hears_the_past_as_far_as_the_dilations_reach_and_its_own_code():
    decoder, code = wavenet(), torch.randn(1, 10, 5).double().requires_grad_()
    table = decoder.enter.weight
    level = levels(1, 40) % 64 + 4 * torch.arange(40) // 40  # any
    level[0] = torch.randperm(256, generator=torch.Generator().manual_seed(1))[:40]  # all differ
    level[level == 128] = 255  # that of silence, in front of the first sample
    logits = decoder.logits(level, code, None)
    reach = 2 * (1 + 2 + 4) + 1
    for s in (0, 17, 39):
        by_level, by_code = torch.autograd.grad(
            logits[0, s].square().sum(), (table, code), retain_graph=True
        )
        heard = {t for t in range(40) if by_level[level[0, t]].any()}
        assert heard == set(range(max(0, s - reach), s))
        # a code reaches its own sample, and later ones through the memory of the layers
        cells = set(by_code[0].abs().sum(1).nonzero().flatten().tolist())
        assert cells <= set(range(max(0, s - reach) // 4, s // 4 + 1))
        assert s // 4 in cells
    # samples behind the last whole cell belong to it
    assert decoder.logits(levels(1, 43), code, None).shape == (1, 43, 256)


def test_one_layer_is_the_gated_unit():
    """WaveNet's equation 5 with a condition, written out for one dilation."""
    decoder = wavenet(cycles=1, depth=1)
    layer = decoder.layers[0]
    x, extra = torch.randn(2, 6, 9).double(), torch.randn(2, 12, 9).double()
    before = F.pad(x, (1, 0))[..., :-1]
    w, b = layer.conv.weight, layer.conv.bias
    both = torch.einsum("oc,pcs->pos", w[..., 0], before) + torch.einsum(
        "oc,pcs->pos", w[..., 1], x
    )
    both = both + b[:, None] + extra
    unit = both[:, :6].tanh() * both[:, 6:].sigmoid()
    out = torch.einsum("oc,pcs->pos", layer.out.weight[..., 0], unit) + layer.out.bias[:, None]
    rest, skip = layer(x, extra)
    torch.testing.assert_close(rest, x + out[:, :6])
    torch.testing.assert_close(skip, out[:, 6:])


def test_speakers_are_told_and_unknown_ones_are_no_one():
    decoder = wavenet(speakers=("who", ["ann", "bob"]))
    wave, code = 0.1 * torch.randn(3, 1, 20), torch.randn(1, 5, 5).double().expand(3, -1, -1)
    meta = [{"who": "bob"}, {"who": "ann"}, {"who": "eve"}]
    terms = decoder(code, truth(wave, meta=meta))
    assert int(terms["speakers"].sum) == 2
    assert int(terms["speakers"].count) == 3
    level = levels(1, 20).expand(3, -1)
    bob, ann, no_one = decoder.logits(level, code, torch.tensor([1, 0, -1]))
    assert float((bob - ann).abs().max()) > 1e-3
    with torch.no_grad():
        decoder.condition.weight[:, 5:] = 0
    for logits in decoder.logits(level, code, torch.tensor([1, 0, -1])):
        torch.testing.assert_close(logits, no_one)
