"""Relative biases: WavLM's buckets and gate, BEiT's grid table."""

import pytest
import torch
from torch import nn

from mmssl.backbones.relative import GridBias, RelativeGate, grid_buckets, relative_buckets
from mmssl.backbones.transformer import Transformer
from mmssl.types import UserError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def shuffled(module, std=0.3):
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module.eval()


def test_buckets_of_wavlm():
    table = relative_buckets(1700, 320, 800)
    for distance, bucket in (
        (0, 0), (1, 161), (-1, 1), (79, 239), (100, 247), (200, 271), (400, 295),
        (799, 319), (1600, 319), (-800, 159), (-1699, 159),
    ):  # fmt: skip
        row = 0 if distance >= 0 else -distance
        assert int(table[row, row + distance]) == bucket


def test_gate_with_a_zero_map_is_exactly_one_and_three_quarters():
    gate = RelativeGate(24, 3)
    nn.init.zeros_(gate.linear.weight)
    factor = gate(torch.randn(2, 5, 24))
    assert factor.shape == (2, 3, 5, 1)
    assert torch.all(factor == 1.75)


def test_gate_reads_its_heads_slice_only_and_follows_the_formula():
    gate = shuffled(RelativeGate(24, 3))
    x = torch.randn(2, 5, 24)
    factor = gate(x)
    u = x[1, 4, 8:16]  # head 1
    sums = (gate.linear.weight @ u + gate.linear.bias).view(2, 4).sum(1)
    a, b = (1 / (1 + (-sums).exp())).tolist()
    expected = a * (b * gate.scale_H[1].item() - 1) + 2
    assert factor[1, 1, 4, 0].item() == pytest.approx(expected, rel=1e-5)
    x[..., 8:16] = 0
    assert torch.equal(gate(x)[:, [0, 2]], factor[:, [0, 2]])


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_zero_table_is_plain_attention(post_norm):
    size = {"heads": 2, "head_size": 8, "post_norm": post_norm}
    gated = shuffled(Transformer(16, 3, **size, relative_buckets=8, relative_use="gated"))
    plain = Transformer(16, 3, **size).eval()
    plain.load_state_dict(
        {k: v for k, v in gated.state_dict().items() if k in dict(plain.named_parameters())}
    )
    x = torch.randn(2, 6, 16)
    pad = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    assert (gated(x)[0] - plain(x)[0]).abs().max() > 1e-2
    nn.init.zeros_(gated.relative.table.weight)
    for mask in (None, pad):
        torch.testing.assert_close(gated(x, mask)[0], plain(x, mask)[0], atol=1e-6, rtol=1e-5)


def test_gates_belong_to_layers_and_the_table_to_all():
    model = Transformer(16, 3, heads=2, head_size=8, relative_buckets=8, relative_use="gated")
    x = torch.randn(2, 6, 16)
    model(x)[0].square().sum().backward()
    names = [n for n, p in model.named_parameters() if "gate" in n or "relative" in n]
    assert len(names) == 3 * 3 + 1
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(grads[n].abs().sum() > 0 for n in names)
    # of one gate by itself: 8 outputs per slice of 8, and one number per head
    assert sum(p.numel() for p in model.blocks[1].attention.gate.parameters()) == 8 * 8 + 8 + 2


@pytest.mark.parametrize("use", ["all", "gated"])
def test_padding_changes_nothing_under_a_bias_of_all_layers(use):
    model = shuffled(Transformer(16, 3, heads=2, head_size=8, relative_buckets=8, relative_use=use))
    x = torch.randn(2, 6, 16)
    pad = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    other = x.masked_fill(pad[..., None], float("nan"))
    assert torch.equal(model(x, pad)[0], model(other, pad)[0])
    alone = model(x[1:, :4])[0]
    torch.testing.assert_close(model(x, pad)[0][1:, :4], alone, atol=1e-5, rtol=1e-4)


def test_all_layers_use_the_table_that_first_leaves_to_one():
    one = Transformer(16, 2, heads=2, head_size=8, relative_buckets=8)
    every = shuffled(
        Transformer(16, 2, heads=2, head_size=8, relative_buckets=8, relative_use="all")
    )
    one.eval().load_state_dict(every.state_dict())
    x = torch.randn(1, 6, 16)
    hidden = [m(x, return_hidden=True)[1] for m in (one, every)]
    assert torch.equal(hidden[0][0], hidden[1][0])
    assert (hidden[0][1] - hidden[1][1]).abs().max() > 1e-3


def test_grid_table_equals_beits():
    vision = pytest.importorskip("transformers.models.data2vec.modeling_data2vec_vision")
    config = vision.Data2VecVisionConfig(num_attention_heads=3)
    peer = shuffled(vision.Data2VecVisionRelativePositionBias(config, (4, 4)))
    bias = GridBias(3, (4, 4), front=1)
    with torch.no_grad():
        bias.table.weight.copy_(peer.relative_position_bias_table)
    expected = peer((4, 4))
    torch.testing.assert_close(bias(17), expected.view(1, 3, 17, 17), atol=1e-6, rtol=1e-6)


def test_grid_buckets_of_other_shapes_tell_offsets_apart():
    index = grid_buckets((2, 3, 2), 2)
    assert index.shape == (14, 14)
    places = [(t, h, w) for t in range(2) for h in range(3) for w in range(2)]
    offset_of = {}
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            offset = tuple(x - y for x, y in zip(a, b, strict=True))
            bucket = int(index[2 + i, 2 + j])
            assert offset_of.setdefault(bucket, offset) == offset
    assert len(offset_of) == 3 * 5 * 3
    assert set(index[:2, 2:].flatten().tolist()) == {45}
    assert set(index[2:, :2].flatten().tolist()) == {46}
    assert set(index[:2, :2].flatten().tolist()) == {47}


def test_grid_bias_starts_at_zero_and_serves_every_layer():
    options = {"heads": 2, "head_size": 8}
    model = Transformer(
        16, 2, **options, relative_grid=(2, 3), relative_front=1, relative_use="all"
    )
    assert torch.all(model.relative.table.weight == 0)
    model(torch.randn(2, 7, 16))[0].square().sum().backward()
    assert model.relative.table.weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match="5 tokens do not fill"):
        model(torch.randn(2, 5, 16))


def test_bad_choices_are_refused():
    size = {"width": 16, "layers": 2, "heads": 2, "head_size": 8}
    with pytest.raises(UserError, match="relative_use: 'each'"):
        Transformer(**size, relative_buckets=8, relative_use="each")
    with pytest.raises(UserError, match="needs relative_buckets"):
        Transformer(**size, relative_use="gated")
    with pytest.raises(UserError, match="exclude each other"):
        Transformer(**size, relative_buckets=8, relative_grid=(2, 2))
    with pytest.raises(UserError, match="whole slices"):
        Transformer(16, 1, heads=3, head_size=8, relative_buckets=8, relative_use="gated")
