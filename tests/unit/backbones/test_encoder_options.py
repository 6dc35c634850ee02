"""Options of the encoder: shared layers, LayerDrop, dropouts, scales, initial values, taps."""

import pytest
import torch
from torch import nn

from mmssl.backbones.transformer import Transformer
from mmssl.types import UserError

SIZE = {"width": 16, "heads": 2, "head_size": 8, "hidden": 24}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def shuffled(module, std=0.3):
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module.eval()


def numel(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("layer", ["transformer", "conformer"])
def test_shared_layers_count_once_and_depth_still_matters(layer):
    options = {**SIZE, "share_layers": True, "layer": layer}
    shallow, deep = (shuffled(Transformer(layers=n, **options)) for n in (2, 6))
    assert numel(shallow) == numel(deep) == numel(Transformer(layers=1, **options))
    deep.load_state_dict(shallow.state_dict())
    x = torch.randn(2, 5, 16)
    hidden = [m(x, return_hidden=True)[1] for m in (shallow, deep)]
    assert [len(h) for h in hidden] == [2, 6]
    assert torch.equal(hidden[0][1], hidden[1][1])
    assert (hidden[1][5] - hidden[1][1]).abs().max() > 1e-3


def test_gradient_of_a_shared_layer_is_the_sum_over_depths():
    shared = shuffled(Transformer(layers=3, share_layers=True, **SIZE))
    unrolled = Transformer(layers=3, **SIZE).eval()
    state = shared.state_dict()
    unrolled.load_state_dict(
        {k: state[k.replace("blocks.1.", "blocks.0.").replace("blocks.2.", "blocks.0.")]
         for k in unrolled.state_dict()}
    )  # fmt: skip
    x = torch.randn(2, 5, 16)
    for model in (shared, unrolled):
        model(x)[0].square().sum().backward()
    for name, p in shared.blocks[0].named_parameters():
        total = sum(dict(block.named_parameters())[name].grad for block in unrolled.blocks)
        torch.testing.assert_close(p.grad, total, atol=1e-5, rtol=1e-5)


def test_layers_that_differ_cannot_be_shared():
    for bad in (
        {"ffn_for": ("a", "b"), "ffn_layers": 1},
        {"drop_path": 0.1},
        {"layer": "conformer", "conv_kernels": (5, 3)},
    ):
        with pytest.raises(UserError, match="share_layers"):
            Transformer(layers=2, share_layers=True, **SIZE, **bad)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dropped_layer_gets_a_zero_gradient(post_norm, checkpointing):
    model = Transformer(
        layers=3, post_norm=post_norm, layer_drop=1.0, checkpointing=checkpointing, **SIZE
    )
    x = torch.randn(2, 5, 16, requires_grad=True)
    out, hidden = model(x, return_hidden=True)
    assert all(torch.equal(h, x) for h in hidden)
    out.square().sum().backward()
    assert all(torch.all(p.grad == 0) for p in model.blocks.parameters())
    assert x.grad.abs().sum() > 0


def test_the_first_layer_can_be_kept():
    model = Transformer(layers=3, layer_drop=1.0, keep_first=True, **SIZE)
    x = torch.randn(2, 5, 16)
    _, hidden = model(x, return_hidden=True)
    assert torch.equal(hidden[0], model.blocks[0](x))
    assert torch.equal(hidden[2], hidden[0])


def test_layers_are_dropped_for_the_whole_batch_at_the_rate_and_never_in_evaluation():
    model = Transformer(layers=4, layer_drop=0.3, **SIZE)
    plain = Transformer(layers=4, **SIZE)
    plain.load_state_dict(model.state_dict())
    x, dropped = torch.randn(3, 5, 16), []
    for _ in range(60):
        _, hidden = model(x, return_hidden=True)
        same = [(a == b).flatten(1).all(1) for a, b in zip([x, *hidden], hidden, strict=False)]
        assert all(torch.all(s == s[0]) for s in same)
        dropped += [bool(s[0]) for s in same]
    assert abs(sum(dropped) / 240 - 0.3) < 4 * (0.3 * 0.7 / 240) ** 0.5
    assert torch.equal(model.eval()(x)[0], plain.eval()(x)[0])


def test_hidden_dropouts_follow_unless_given():
    model = Transformer(layers=1, dropout=0.1, **SIZE)

    def rates(m):
        b = m.blocks[0]
        ffn = b.ffn.parts["shared"]
        return [
            m.input_dropout.rate, b.attention.dropout.rate, ffn.dropout.rate, b.dropout.rate,
            m.dropout.rate,
        ]  # fmt: skip

    assert rates(model) == [0.0, 0.1, 0.1, 0.1, 0.1]
    speech = Transformer(
        layers=1, dropout=0.1, attention_dropout=0.2, activation_dropout=0.0, post_norm=True,
        input_norm=True, **SIZE,
    )  # fmt: skip
    assert rates(speech) == [0.1, 0.2, 0.0, 0.1, 0.0]
    both = Transformer(layers=1, dropout=0.1, input_dropout=0.3, output_dropout=0.4, **SIZE)
    assert rates(both) == [0.3, 0.1, 0.1, 0.1, 0.4]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("relative", [{}, {"relative_buckets": 8, "relative_use": "gated"}])
def test_attention_with_dropout_is_the_fused_one_where_nothing_falls(masked, relative):
    tiny = 2.0**-40  # rounds to a rate of zero, so only the path differs
    own = Transformer(layers=2, attention_dropout=tiny, **SIZE, **relative)
    plain = Transformer(layers=2, **SIZE, **relative)
    plain.load_state_dict(own.state_dict())
    x = torch.randn(2, 6, 16)
    pad = torch.tensor([[False] * 6, [False] * 4 + [True] * 2]) if masked else None
    torch.testing.assert_close(own(x, pad)[0], plain(x, pad)[0], atol=1e-6, rtol=1e-5)


def test_attention_dropout_acts_in_training_only():
    model = Transformer(layers=1, attention_dropout=0.5, **SIZE)
    x = torch.randn(2, 6, 16)
    assert not torch.equal(model(x)[0], model(x)[0])
    assert torch.equal(model.eval()(x)[0], model(x)[0])


def test_checkpointing_keeps_dropout_and_taps():
    options = {
        "layers": 3, "dropout": 0.2, "layer_drop": 0.4, "drop_path": 0.3,
    }  # fmt: skip
    plain = Transformer(**SIZE, **options)
    saving = Transformer(checkpointing=True, **SIZE, **options)
    saving.load_state_dict(plain.state_dict())
    x, results = torch.randn(4, 5, 16), []
    for model in (plain, saving):
        torch.manual_seed(5)
        out, hidden = model(x, return_hidden=True, tap="ffn")
        hidden = list(hidden)
        out.square().sum().backward()
        results.append([out, *hidden, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("post_norm", [False, True])
def test_tapped_feed_forwards_are_what_the_residual_receives(post_norm):
    model = shuffled(Transformer(layers=3, post_norm=post_norm, **SIZE))
    x = torch.randn(2, 5, 16)
    _, layers = model(x, return_hidden=True)
    out, ffns = model(x, return_hidden=True, tap="ffn")
    assert len(ffns) == 3
    block = model.blocks[1]
    seen = layers[0] if post_norm else block.norm1(layers[0])
    middle = layers[0] + block.attention(seen)
    if post_norm:
        middle = block.norm1(middle)
        assert torch.equal(ffns[1], block.ffn(middle))
        assert torch.equal(layers[1], block.norm2(middle + ffns[1]))
    else:
        assert torch.equal(ffns[1], block.ffn(block.norm2(middle)))
        assert torch.equal(layers[1], middle + ffns[1])
    assert torch.equal(out, model(x)[0])
    with pytest.raises(UserError, match="tap: 'attention'"):
        model(x, return_hidden=True, tap="attention")


def test_layer_scale_weighs_both_branches():
    scaled = Transformer(layers=1, layer_scale=1e-4, **SIZE)
    assert torch.all(scaled.blocks[0].scale1_D == 1e-4)
    assert numel(scaled) == numel(Transformer(layers=1, **SIZE)) + 2 * 16
    shuffled(scaled)
    block = scaled.blocks[0]
    x = torch.randn(2, 5, 16)
    middle = x + block.scale1_D * block.attention(block.norm1(x))
    expected = middle + block.scale2_D * block.ffn(block.norm2(middle))
    torch.testing.assert_close(block(x), expected)


def test_drop_path_grows_with_depth_and_leaves_rows_alone():
    model = Transformer(layers=3, drop_path=0.4, **SIZE)
    assert [block.path.rate for block in model.blocks] == [0.0, 0.2, 0.4]
    x = torch.randn(500, 3, 16)
    _, hidden = model(x, return_hidden=True)
    both = (hidden[2] == hidden[1]).flatten(1).all(1).float().mean().item()
    assert abs(both - 0.16) < 5 * (0.16 * 0.84 / 500) ** 0.5
    assert not torch.any((hidden[0] == x).flatten(1).all(1))


def test_normal_initial_values():
    model = Transformer(
        width=256, layers=2, init="normal", relative_buckets=8, relative_use="gated"
    )
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 2 * 5
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert torch.all(linear.bias == 0)
    with pytest.raises(UserError, match="init: 'zeros'"):
        Transformer(width=16, layers=1, heads=1, init="zeros")


def test_final_norm_is_where_layers_do_not_end_in_one():
    def has(**options):
        return Transformer(layers=1, **SIZE, **options).norm is not None

    assert has()
    assert has(layer="conformer", final_norm=True)
    assert not has(post_norm=True)
    assert not has(layer="conformer")
    assert not has(final_norm=False)


def test_bad_layers_are_refused():
    with pytest.raises(UserError, match="layer: 'mamba'"):
        Transformer(layers=1, layer="mamba", **SIZE)
    for bad in ({"post_norm": True}, {"layer_scale": 0.1}, {"drop_path": 0.1}):
        with pytest.raises(UserError, match="knows no post_norm"):
            Transformer(layers=1, layer="conformer", **SIZE, **bad)
