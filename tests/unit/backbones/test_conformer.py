"""The Conformer layer: parity with torchaudio and transformers, padding laws."""

import pytest
import torch
import torchaudio
from torch import nn

from mmssl.backbones.conformer import ConformerBlock, ConvOptions, TimeConv
from mmssl.backbones.layers import LayerOptions
from mmssl.backbones.transformer import Transformer
from mmssl.types import UserError

OPTIONS = LayerOptions(32, 48, 4, 8, eps=1e-5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def shuffled(module, std=0.2):
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    for name, buffer in module.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return module.eval()


def copy(pairs):
    """{module: module} or tensors: weights of equal numbers, whatever their shape."""
    with torch.no_grad():
        for mine, other in pairs:
            if isinstance(mine, nn.Module):
                copy(zip(mine.parameters(), other.parameters(), strict=True))
            else:
                mine.copy_(other.view_as(mine))


@pytest.mark.parametrize(("first", "norm"), [(True, "group"), (False, "batch"), (False, "group")])
@pytest.mark.parametrize("masked", [False, True])
def test_layer_equals_torchaudio(first, norm, masked):
    peer = shuffled(
        torchaudio.models.conformer.ConformerLayer(
            32, 48, 4, 7, use_group_norm=norm == "group", convolution_first=first
        )
    )
    ours = ConformerBlock(OPTIONS, (), ConvOptions(7, first, norm)).eval()
    conv, convs = peer.conv_module, peer.conv_module.sequential
    ffns = [(ours.ffn1, peer.ffn1.sequential), (ours.ffn2, peer.ffn2.sequential)]
    copy(
        [
            *((f.parts["shared"].up, other[1]) for f, other in ffns),
            *((f.parts["shared"].down, other[4]) for f, other in ffns),
            (ours.norm1, peer.ffn1.sequential[0]), (ours.norm2, peer.self_attn_layer_norm),
            (ours.norm3, conv.layer_norm), (ours.norm4, peer.ffn2.sequential[0]),
            (ours.norm, peer.final_layer_norm),
            (ours.attention.qkv.weight, peer.self_attn.in_proj_weight),
            (ours.attention.qkv.bias, peer.self_attn.in_proj_bias),
            (ours.attention.out, peer.self_attn.out_proj),
            (ours.conv.inward, convs[0]), (ours.conv.depthwise, convs[2]),
            (ours.conv.norm, convs[3]), (ours.conv.outward, convs[5]),
        ]
    )  # fmt: skip
    if norm == "batch":
        ours.conv.norm.running_mean.copy_(convs[3].running_mean)
        ours.conv.norm.running_var.copy_(convs[3].running_var)
    x = torch.randn(2, 9, 32)
    if not masked:
        expected = peer(x.transpose(0, 1), None).transpose(0, 1)
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
        return
    # the peer lets padding into its convolution: compare with the item by itself
    look = (torch.arange(9) < torch.tensor([[9], [6]]))[:, None, None, :]
    alone = peer(x[1:, :6].transpose(0, 1), None).transpose(0, 1)
    torch.testing.assert_close(ours(x, look)[1:, :6], alone, atol=1e-5, rtol=1e-5)


def test_layer_equals_transformers_without_convolution_biases():
    name = "transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer"
    module = pytest.importorskip(name)
    config = module.Wav2Vec2ConformerConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=48, conv_depthwise_kernel_size=7,
        position_embeddings_type=None, hidden_act="swish",
    )  # fmt: skip
    peer = shuffled(module.Wav2Vec2ConformerEncoderLayer(config))
    ours = ConformerBlock(OPTIONS, (), ConvOptions(7, norm="batch", bias=False)).eval()
    heads, conv = peer.self_attn, peer.conv_module
    ffns = [(ours.ffn1.parts["shared"], peer.ffn1), (ours.ffn2.parts["shared"], peer.ffn2)]
    qkv = [heads.linear_q, heads.linear_k, heads.linear_v]
    copy(
        [
            *((f.up, other.intermediate_dense) for f, other in ffns),
            *((f.down, other.output_dense) for f, other in ffns),
            (ours.norm1, peer.ffn1_layer_norm), (ours.norm2, peer.self_attn_layer_norm),
            (ours.norm3, conv.layer_norm), (ours.norm4, peer.ffn2_layer_norm),
            (ours.norm, peer.final_layer_norm),
            (ours.attention.qkv.weight, torch.cat([m.weight for m in qkv])),
            (ours.attention.qkv.bias, torch.cat([m.bias for m in qkv])),
            (ours.attention.out, heads.linear_out),
            (ours.conv.inward, conv.pointwise_conv1), (ours.conv.depthwise, conv.depthwise_conv),
            (ours.conv.norm, conv.batch_norm), (ours.conv.outward, conv.pointwise_conv2),
        ]
    )  # fmt: skip
    ours.conv.norm.running_mean.copy_(conv.batch_norm.running_mean)
    ours.conv.norm.running_var.copy_(conv.batch_norm.running_var)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(ours(x), peer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("training", [False, True])
def test_padded_content_changes_nothing(norm, training):
    model = Transformer(
        32, 2, heads=4, head_size=8, layer="conformer", conv_kernels=(7, 5), conv_norm=norm
    )
    shuffled(model).train(training)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    pad = torch.arange(9)[None] >= torch.tensor([[9], [6], [3]])
    x = torch.randn(3, 9, 32)
    outs = []
    for content in (0.0, 5.0, float("nan")):
        model.load_state_dict(state)
        outs.append(model(x.masked_fill(pad[..., None], content), pad)[0][~pad])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    if norm == "group" or not training:
        alone = model(x[1:2, :6])[0]
        padded = model(x, pad)[0][1:2, :6]
        torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)


def test_padding_gets_no_gradient():
    model = shuffled(Transformer(32, 2, heads=4, head_size=8, layer="conformer"))
    pad = torch.arange(9)[None] >= torch.tensor([[9], [6]])
    x = torch.randn(2, 9, 32, requires_grad=True)
    model(x, pad)[0][~pad].square().sum().backward()
    assert torch.all(x.grad[pad] == 0)
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_rows_are_independent_under_the_group_norm():
    model = shuffled(Transformer(32, 2, heads=4, head_size=8, layer="conformer")).train()
    x = torch.randn(2, 9, 32)
    both = model(x)[0]
    x[1] = 7.0
    assert torch.equal(model(x)[0][0], both[0])


def test_the_convolution_sees_its_kernel_only():
    conv = TimeConv(OPTIONS, ConvOptions(5, norm="batch")).eval()
    x = torch.randn(1, 12, 32, requires_grad=True)
    conv(x)[0, 6].sum().backward()
    touched = x.grad[0].abs().sum(1) > 0
    assert torch.nonzero(touched).flatten().tolist() == [4, 5, 6, 7, 8]


def test_kernels_per_layer_and_the_papers_sizes():
    kernels = (31, *(15,) * 11)
    with torch.device("meta"):
        small, large = (
            Transformer(
                d, 12, heads=h, head_size=d // h, hidden=f, layer="conformer",
                conv_kernels=kernels, conv_first=True,
            )
            for d, h, f in ((256, 8, 1024), (768, 12, 3072))
        )  # fmt: skip
        wide = Transformer(768, 12, heads=12, hidden=1024, layer="conformer", conv_kernels=kernels)
    assert [block.conv.depthwise.kernel_size[0] for block in small.blocks] == list(kernels)
    count = [sum(p.numel() for p in m.parameters()) for m in (small, wide, large)]
    # with the two linear maps of the input: 18.36 M and 87.94 M
    assert abs(count[0] + 2 * 256 * 257 - 18.36e6) < 0.05e6, count
    assert abs(count[1] + 256 * 257 + 768 * 257 - 87.94e6) < 0.05e6, count


def test_per_modality_parts_and_bad_kernels():
    model = Transformer(
        32, 2, heads=4, head_size=8, layer="conformer", norms_for=("audio", "video"),
        ffn_for=("audio", "video"), ffn_layers=1, conv_kernels=3,
    )  # fmt: skip
    model(torch.randn(2, 4, 32), modality="audio")[0].square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is None for name, g in grads.items() if ".video." in name)
    assert all(g is not None for name, g in grads.items() if ".video." not in name)
    with pytest.raises(UserError, match="4 is even"):
        ConvOptions(4)
    with pytest.raises(UserError, match="conv_norm: 'layer'"):
        ConvOptions(3, norm="layer")
    with pytest.raises(UserError, match="3 kernels for 2 layers"):
        Transformer(32, 2, heads=4, head_size=8, layer="conformer", conv_kernels=(3, 3, 3))
