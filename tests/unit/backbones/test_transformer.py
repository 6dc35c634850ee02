"""The shared encoder: parity with torch, padding and order laws, per-modality weights."""

import re

import pytest
import torch
from model_sizes import SIZES, Size, closed_form_params, linear_params, position_params
from torch import nn

from mmssl.backbones.relative import relative_buckets
from mmssl.backbones.tokens import DenseGelu, ExtraTokens
from mmssl.backbones.transformer import Transformer
from mmssl.frontends.patches import PatchEmbed
from mmssl.frontends.positions import FactorisedPositions
from mmssl.frontends.text import FrozenTextEmbedding
from mmssl.types import UserError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def shuffled(module):
    """All parameters random, so that no zero bias or unit gain hides an error."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module.eval()


def padding(rows, tokens, valid):
    return torch.arange(tokens)[None] >= torch.tensor(valid)[:, None].expand(rows, 1)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_layer_equals_torch_with_shared_weights(post_norm, masked):
    reference = nn.TransformerEncoderLayer(
        32, 4, 48, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=not post_norm
    )
    shuffled(reference)
    ours = Transformer(32, 1, heads=4, head_size=8, hidden=48, post_norm=post_norm).eval()
    block, ffn = ours.blocks[0], ours.blocks[0].ffn.parts["shared"]
    own = [
        *(block.norm1.parameters()), *(block.attention.qkv.parameters()),
        *(block.attention.out.parameters()), *(block.norm2.parameters()),
        *(ffn.up.parameters()), *(ffn.down.parameters()),
    ]  # fmt: skip
    theirs = [
        *(reference.norm1.parameters()),
        reference.self_attn.in_proj_weight, reference.self_attn.in_proj_bias,
        *(reference.self_attn.out_proj.parameters()), *(reference.norm2.parameters()),
        *(reference.linear1.parameters()), *(reference.linear2.parameters()),
    ]  # fmt: skip
    with torch.no_grad():
        for mine, other in zip(own, theirs, strict=True):
            mine.copy_(other)
    x = torch.randn(3, 7, 32)
    pad = padding(3, 7, [7, 4, 1]) if masked else None
    # a gradient keeps torch off its inference fast path
    expected = reference(x.requires_grad_(), src_key_padding_mask=pad)
    if ours.norm is not None:
        expected = nn.functional.layer_norm(expected, (32,), eps=1e-6)
    out, _ = ours(x, pad)
    keep = slice(None) if pad is None else ~pad
    torch.testing.assert_close(out[keep], expected[keep], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("relative", [0, 32])
def test_padded_content_changes_nothing(relative):
    model = shuffled(Transformer(16, 2, heads=2, head_size=8, relative_buckets=relative))
    pad = padding(3, 6, [6, 4, 2])
    x = torch.randn(3, 6, 16)
    other = x.clone()
    other[pad] = float("nan")
    (a, _), (b, _) = model(x, pad), model(other, pad)
    assert torch.equal(a, b)
    assert torch.isfinite(a).all()
    alone, _ = model(x[1:2, :4])
    torch.testing.assert_close(a[1:2, :4], alone, atol=1e-5, rtol=1e-4)


def test_padding_gets_no_gradient_and_a_row_of_padding_stays_finite():
    model = shuffled(Transformer(16, 2, heads=2, head_size=8, relative_buckets=8))
    x = torch.randn(2, 5, 16, requires_grad=True)
    pad = padding(2, 5, [3, 0])
    out, _ = model(x, pad)
    out[~pad].square().sum().backward()
    assert torch.all(x.grad[pad] == 0)
    assert x.grad[~pad].abs().min() > 0
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_global_token_ignores_the_order_of_the_others():
    model = shuffled(Transformer(24, 3, heads=3, head_size=8))
    extra = shuffled(ExtraTokens(24, ("agg",), registers=2))
    x = torch.randn(2, 9, 24)
    results = []
    for tokens in (x, x[:, torch.randperm(9)]):
        out, _ = model(extra(tokens, None, ("agg",))[0])
        results.append(extra.split(out, ("agg",))[0]["agg"])
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


def test_relative_bias_breaks_the_order_in_the_first_layer_only():
    model = shuffled(Transformer(16, 2, heads=2, head_size=8, relative_buckets=8))
    x = torch.randn(1, 6, 16)
    order = torch.randperm(6)
    assert (model(x)[0][:, order] - model(x[:, order])[0]).abs().max() > 1e-2
    assert sum("relative" in name for name, _ in model.named_parameters()) == 1
    nn.init.zeros_(model.relative.table.weight)
    torch.testing.assert_close(model(x)[0][:, order], model(x[:, order])[0], atol=1e-5, rtol=1e-4)


def test_relative_buckets_follow_the_t5_rule():
    table = relative_buckets(300, 32, 64)
    assert table[0, :9].tolist() == [0, *range(17, 25)][:9]
    assert table[8, :9].tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert int(table.max()) == 31
    assert int(table.min()) == 0
    # logarithmic part: 8 + floor(8 ln(d / 8) / ln 8), 64 and more share the last bucket
    assert table[[8, 16, 32, 64, 299], 0].tolist() == [8, 10, 13, 15, 15]
    assert table[0, [8, 16, 32, 64, 299]].tolist() == [24, 26, 29, 31, 31]
    assert torch.equal(table[0, 1:] - 16, table[1:, 0])


def test_norms_and_feed_forwards_per_modality_get_their_own_gradient():
    model = Transformer(
        16, 3, heads=2, head_size=8, norms_for=("audio", "video"),
        ffn_for=("audio", "video"), ffn_layers=2,
    )  # fmt: skip
    model(torch.randn(2, 4, 16), modality="audio")[0].square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is None for name, g in grads.items() if ".video." in name)
    touched = [name for name, g in grads.items() if g is not None]
    assert sum(".audio." in name for name in touched) == 2 * (3 * 2 + 1) + 2 * 4
    assert sum("attention" in name for name in touched) == 3 * 4
    assert sum("ffn.parts.shared" in name for name in touched) == 4
    model.zero_grad()
    model(torch.randn(2, 4, 16), modality="video")[0].square().sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if ".audio." in name)


def test_equal_copies_per_modality_equal_the_shared_model():
    shared = shuffled(Transformer(16, 2, heads=2, head_size=8))
    split = Transformer(
        16, 2, heads=2, head_size=8, norms_for=("a", "b"), ffn_for=("a", "b"), ffn_layers=2
    ).eval()
    common = shared.state_dict()
    split_names = {
        name: re.sub(r"parts\.[ab]\.", "parts.shared.", name) for name in split.state_dict()
    }
    state = {name: common[source] for name, source in split_names.items()}
    split.load_state_dict(state)
    x = torch.randn(2, 5, 16)
    assert torch.equal(split(x, modality="a")[0], shared(x)[0])
    assert torch.equal(split(x, modality="b")[0], shared(x, modality="b")[0])


def test_hidden_states_are_the_layers_outputs():
    model = shuffled(Transformer(16, 3, heads=2, head_size=8))
    x = torch.randn(2, 5, 16)
    out, hidden = model(x, return_hidden=True)
    assert len(hidden) == 3
    assert torch.equal(hidden[0], model.blocks[0](x))
    assert torch.equal(model.norm(hidden[2]), out)
    assert model(x)[1] == []


def test_checkpointing_changes_neither_output_nor_gradient():
    plain = Transformer(16, 3, heads=2, head_size=8, dropout=0.2)
    saving = Transformer(16, 3, heads=2, head_size=8, dropout=0.2, checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x, grads = torch.randn(2, 5, 16), []
    for model in (plain, saving):
        torch.manual_seed(5)
        model(x)[0].square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_dropout_is_off_in_evaluation():
    model = Transformer(16, 2, heads=2, head_size=8, dropout=0.5)
    x = torch.randn(2, 5, 16)
    assert not torch.equal(model(x)[0], model(x)[0])
    assert torch.equal(model.eval()(x)[0], model(x)[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"post_norm": True},
        {"relative_buckets": 32},
        {"norms_for": ("audio", "video", "text")},
        {"norms_for": ("audio", "video"), "ffn_for": ("audio", "video", "text"), "ffn_layers": 2},
    ],
)
@pytest.mark.parametrize("size", [SIZES["tiny"], Size(3, 24, 40, 2, 20)])
def test_closed_form_counts_every_parameter(size, options):
    model = Transformer(size.width, size.layers, size.heads, size.head_size, size.hidden, **options)
    counts = {k: len(v) if isinstance(v, tuple) else v for k, v in options.items()}
    assert sum(p.numel() for p in model.parameters()) == closed_form_params(size, **counts)


def numel(*parts):
    return sum(p.numel() for part in parts for p in part.parameters())


def built(name, **options):
    size = SIZES[name]
    return Transformer(size.width, size.layers, size.heads, size.head_size, size.hidden, **options)


@pytest.mark.parametrize(("name", "table"), [("base", 87.9), ("medium", 155.0), ("large", 306.1)])
def test_video_towers_are_within_one_percent_of_vatts_table(name, table):
    width, layers = SIZES[name].width, SIZES[name].layers
    with torch.device("meta"):
        total = numel(
            PatchEmbed((4, 16, 16), width, 3),
            FactorisedPositions((8, 14, 14), width, norm=True),
            ExtraTokens(width),
            built(name),
        )
    trunk = layers * (12 * width**2 + 13 * width) + 2 * width
    assert closed_form_params(SIZES[name]) == trunk
    inputs = linear_params(4 * 16 * 16 * 3, width) + position_params((8, 14, 14), width, norm=True)
    assert total == inputs + width + trunk
    assert abs(total / (table * 1e6) - 1) < 0.01


def test_audio_and_text_towers_equal_the_closed_form():
    with torch.device("meta"):
        audio = numel(
            PatchEmbed((128,), 768),
            FactorisedPositions((1200,), 768, norm=True),
            ExtraTokens(768),
            built("base"),
        )
        text = numel(
            FrozenTextEmbedding(65536, 512), ExtraTokens(512), built("text", relative_buckets=32)
        )
    inputs = linear_params(128, 768) + position_params((1200,), 768, norm=True) + 768
    assert audio == inputs + closed_form_params(SIZES["base"]) == 86_078_976
    trunk = closed_form_params(SIZES["text"], relative_buckets=32)
    # 8.8 % below the table's 20.9 M, which the table's own dimensions do not give
    assert text == linear_params(300, 512) + 512 + trunk == 19_070_208


def test_modality_agnostic_model_equals_the_closed_form():
    grids = {"video": (8, 14, 14), "audio": (1200,), "text": (16,)}
    raw = {"video": 3072, "audio": 128, "text": 300}
    width, total = 1024, 0
    with torch.device("meta"):
        total += numel(built("medium"))
        for modality, grid in grids.items():
            total += numel(
                torch.nn.Linear(raw[modality], width),
                DenseGelu(width, width),
                FactorisedPositions(grid, width, norm=True),
                ExtraTokens(width),
                DenseGelu(width, 1024),
            )
    own = sum(
        linear_params(raw[m], width) + 2 * linear_params(width, width) + 3 * width + n * width
        for m, n in (("video", 36), ("audio", 1200), ("text", 16))
    )
    # 4.7 % above the table's 155.0 M: that counts fewer of the per-modality projections
    assert total == closed_form_params(SIZES["medium"]) + own == 162_332_672


def test_bad_constructions_and_modalities_are_refused():
    with pytest.raises(UserError, match="at least one layer"):
        Transformer(32, 2)
    with pytest.raises(UserError, match="ffn_layers"):
        Transformer(64, 2, ffn_layers=1)
    with pytest.raises(UserError, match="ffn_layers"):
        Transformer(64, 2, ffn_for=("audio",), ffn_layers=3)
    model = Transformer(64, 1, norms_for=("audio", "video"))
    for modality in (None, "text"):
        with pytest.raises(UserError, match="no weights of its own"):
            model(torch.zeros(1, 2, 64), modality=modality)
