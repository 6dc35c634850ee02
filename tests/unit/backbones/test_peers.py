"""The speech and text encoders of transformers, rebuilt from the parts: every layer's output.

Small, randomly initialised peers; their weights are copied into a stem, positions and a stack of
layers.
"""

import pytest
import torch
from torch import nn

from mmssl.backbones.transformer import Transformer
from mmssl.frontends.conv_positions import ConvPositions, ConvStackPositions
from mmssl.frontends.patches import padding_mask
from mmssl.frontends.wave_stem import WaveStem

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (16,) * 7,
}  # fmt: skip
SIZE = {"width": 32, "layers": 3, "heads": 4, "head_size": 8, "hidden": 48, "eps": 1e-5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def shuffled(module, std=0.15):
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module.eval()


def put(mine, other):
    mine.load_state_dict(other.state_dict())


def put_linears(mine, others):
    with torch.no_grad():
        mine.weight.copy_(torch.cat([m.weight for m in others]))
        mine.bias.copy_(torch.cat([m.bias for m in others]))


def put_stem(stem, peer):
    for conv, norm, layer in zip(
        stem.convs, stem.norms, peer.feature_extractor.conv_layers, strict=True
    ):
        put(conv, layer.conv)
        assert hasattr(layer, "layer_norm") == bool(list(norm.parameters()))
        if hasattr(layer, "layer_norm"):
            put(norm, layer.layer_norm)
    put(stem.features, peer.feature_projection.layer_norm)
    put(stem.proj, peer.feature_projection.projection)


def put_layers(trunk, encoder):
    put((trunk.input_norm or trunk.norm).parts["shared"], encoder.layer_norm)
    for block, layer in zip(trunk.blocks, encoder.layers, strict=True):
        heads, ffn = layer.attention, layer.feed_forward
        put_linears(block.attention.qkv, [heads.q_proj, heads.k_proj, heads.v_proj])
        put(block.attention.out, heads.out_proj)
        put(block.norm1.parts["shared"], layer.layer_norm)
        put(block.norm2.parts["shared"], layer.final_layer_norm)
        put(block.ffn.parts["shared"].up, ffn.intermediate_dense)
        put(block.ffn.parts["shared"].down, ffn.output_dense)
        if block.attention.gate is not None:
            put(block.attention.gate.linear, heads.gru_rel_pos_linear)
            with torch.no_grad():
                block.attention.gate.scale_H.copy_(heads.gru_rel_pos_const.flatten())
    if trunk.relative is not None:
        put(trunk.relative.table, encoder.layers[0].attention.rel_attn_embed)


def ours(peer, norm, bias, positions, **options):
    stem = WaveStem(32, 16, norm=norm, bias=bias).eval()
    trunk = Transformer(**SIZE, **options).eval()
    put_stem(stem, peer)
    put_layers(trunk, peer.encoder)

    def run(wave, lengths=None):
        tokens, grid = stem(wave[:, None], lengths)
        pad = None if lengths is None else padding_mask(stem.out_lengths(lengths), grid)
        return trunk(positions(tokens, grid, pad), pad, return_hidden=True), pad

    return run


def wide_positions(peer):
    positions = ConvPositions(32)
    put(positions.conv, peer.encoder.pos_conv_embed.conv)
    return positions


def stacked_positions(peer):
    positions = ConvStackPositions(32)
    for conv, layer in zip(positions.convs, peer.encoder.pos_conv_embed.layers, strict=True):
        put(conv, layer.conv)
    return positions


def check(run, peer, wave):
    """Every layer's output equals the peer's to 1e-5."""
    with torch.no_grad():
        (out, hidden), _ = run(wave)
        theirs = peer(wave, output_hidden_states=True)
    assert len(theirs.hidden_states) == len(hidden) + 1 == 4
    assert hidden[0].shape[1] == 49
    torch.testing.assert_close(out, theirs.last_hidden_state, atol=1e-5, rtol=1e-5)
    for i, mine in enumerate(hidden[:-1]):
        assert (mine - hidden[i + 1]).abs().max() > 1e-2
        torch.testing.assert_close(mine, theirs.hidden_states[i + 1], atol=1e-5, rtol=1e-5)


POST = {"post_norm": True, "input_norm": True}
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}


def test_wav2vec2_base():
    peer = shuffled(transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SMALL)))
    run = ours(peer, "group", False, wide_positions(peer), **POST)
    check(run, peer, torch.randn(2, 16000))


def test_wav2vec2_large():
    config = transformers.Wav2Vec2Config(**SMALL, **STABLE, conv_bias=True)
    peer = shuffled(transformers.Wav2Vec2Model(config))
    check(ours(peer, "layer", True, wide_positions(peer)), peer, torch.randn(2, 16000))


def test_wav2vec2_large_with_padding():
    config = transformers.Wav2Vec2Config(**SMALL, **STABLE, conv_bias=True)
    peer = shuffled(transformers.Wav2Vec2Model(config))
    wave, lengths = torch.randn(2, 16000), torch.tensor([16000, 9000])
    seen = torch.arange(16000) < lengths[:, None]
    wave = wave * seen
    run = ours(peer, "layer", True, wide_positions(peer))
    with torch.no_grad():
        (out, hidden), pad = run(wave, lengths)
        theirs = peer(wave, attention_mask=seen.long(), output_hidden_states=True)
    assert (~pad).sum(1).tolist() == [49, 27]
    torch.testing.assert_close(out[~pad], theirs.last_hidden_state[~pad], atol=1e-5, rtol=1e-5)
    for mine, other in zip(hidden[:-1], theirs.hidden_states[1:], strict=False):
        torch.testing.assert_close(mine[~pad], other[~pad], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stable", [False, True])
def test_hubert(stable):
    config = transformers.HubertConfig(**SMALL, **(STABLE if stable else {}), conv_bias=False)
    peer = shuffled(transformers.HubertModel(config))
    run = (
        ours(peer, "layer", False, wide_positions(peer))
        if stable
        else ours(peer, "group", False, wide_positions(peer), **POST)
    )
    check(run, peer, torch.randn(2, 16000))


@pytest.mark.parametrize("stable", [False, True])
def test_wavlm(stable):
    # few buckets, so that 49 frames reach the logarithmic ones
    config = transformers.WavLMConfig(
        **SMALL, **(STABLE if stable else {}), num_buckets=20, max_bucket_distance=30
    )
    peer = shuffled(transformers.WavLMModel(config))
    bias = {"relative_buckets": 20, "relative_distance": 30, "relative_use": "gated"}
    run = (
        ours(peer, "layer", False, wide_positions(peer), **bias)
        if stable
        else ours(peer, "group", False, wide_positions(peer), **POST, **bias)
    )
    check(run, peer, torch.randn(2, 16000))


def test_data2vec_audio():
    config = transformers.Data2VecAudioConfig(**SMALL, num_conv_pos_embeddings=5)
    peer = shuffled(transformers.Data2VecAudioModel(config))
    check(ours(peer, "layer", False, stacked_positions(peer), **POST), peer, torch.randn(2, 16000))


@pytest.mark.parametrize("masked", [False, True])
def test_bert(masked):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=20,
    )  # fmt: skip
    peer = shuffled(transformers.BertModel(config, add_pooling_layer=False))
    trunk = Transformer(**{**SIZE, "eps": 1e-12}, **POST).eval()
    put(trunk.input_norm.parts["shared"], peer.embeddings.LayerNorm)
    for block, layer in zip(trunk.blocks, peer.encoder.layer, strict=True):
        heads = layer.attention.self
        put_linears(block.attention.qkv, [heads.query, heads.key, heads.value])
        put(block.attention.out, layer.attention.output.dense)
        put(block.norm1.parts["shared"], layer.attention.output.LayerNorm)
        put(block.ffn.parts["shared"].up, layer.intermediate.dense)
        put(block.ffn.parts["shared"].down, layer.output.dense)
        put(block.norm2.parts["shared"], layer.output.LayerNorm)
    ids = torch.randint(0, 50, (2, 11))
    pad = torch.arange(11)[None] >= torch.tensor([[11], [7 if masked else 11]])
    table = peer.embeddings
    x = (
        table.word_embeddings(ids)
        + table.position_embeddings.weight[:11]
        + table.token_type_embeddings.weight[0]
    )
    with torch.no_grad():
        out, hidden = trunk(x, pad if masked else None, return_hidden=True)
        theirs = peer(ids, attention_mask=(~pad).long(), output_hidden_states=True)
    torch.testing.assert_close(out[~pad], theirs.last_hidden_state[~pad], atol=1e-5, rtol=1e-5)
    for mine, other in zip(hidden, theirs.hidden_states[1:], strict=True):
        torch.testing.assert_close(mine[~pad], other[~pad], atol=1e-5, rtol=1e-5)


def test_data2vec_vision_layers():
    """A pre-norm stack with layer scale and one grid table for all layers; keys have no bias."""
    module = pytest.importorskip("transformers.models.data2vec.modeling_data2vec_vision")
    config = module.Data2VecVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=64, patch_size=16, use_shared_relative_position_bias=True,
        layer_scale_init_value=0.1, layer_norm_eps=1e-5,
    )  # fmt: skip
    config._attn_implementation = "eager"
    peer = shuffled(module.Data2VecVisionEncoder(config, (4, 4)))
    trunk = Transformer(
        **{**SIZE, "layers": 2}, layer_scale=0.1, relative_grid=(4, 4), relative_front=1,
        relative_use="all",
    ).eval()  # fmt: skip
    with torch.no_grad():
        trunk.relative.table.weight.copy_(peer.relative_position_bias.relative_position_bias_table)
        for block, layer in zip(trunk.blocks, peer.layer, strict=True):
            heads = layer.attention.attention
            block.attention.qkv.weight.copy_(
                torch.cat([heads.query.weight, heads.key.weight, heads.value.weight])
            )
            block.attention.qkv.bias.copy_(
                torch.cat([heads.query.bias, torch.zeros(32), heads.value.bias])
            )
            block.scale1_D.copy_(layer.lambda_1)
            block.scale2_D.copy_(layer.lambda_2)
            put(block.attention.out, layer.attention.output.dense)
            put(block.norm1.parts["shared"], layer.layernorm_before)
            put(block.norm2.parts["shared"], layer.layernorm_after)
            put(block.ffn.parts["shared"].up, layer.intermediate.dense)
            put(block.ffn.parts["shared"].down, layer.output.dense)
        x = torch.randn(2, 17, 32)
        _, hidden = trunk(x, return_hidden=True)
        theirs = peer(x, output_hidden_states=True, resolution=(64, 64)).hidden_states
    for mine, other in zip(hidden, theirs[1:], strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_parameter_counts_of_the_published_encoders():
    """Measured on the transformers classes, which also hold one mask vector (width 768)."""

    def total(positions, stem, **options):
        trunk = Transformer(768, 12, post_norm=True, input_norm=True, **options)
        return 768 + sum(p.numel() for part in (stem, positions, trunk) for p in part.parameters())

    with torch.device("meta"):
        base = WaveStem(768)
        gated = {"relative_buckets": 320, "relative_distance": 800, "relative_use": "gated"}
        assert total(ConvPositions(768), base) == 94_371_712  # HuBERT, wav2vec 2.0 BASE
        assert total(ConvPositions(768), base, **gated) == 94_381_936  # WavLM Base
        layered = WaveStem(768, norm="layer")
        assert total(ConvStackPositions(768), layered) == 93_164_288  # data2vec audio
