"""wav2vec 2.0 on frames of spectrograms: the Conformer for audio in general, wav2vec-C."""

import math
from dataclasses import replace

import pytest
import torch
import torchaudio

from mmssl import config
from mmssl.build import build_model
from mmssl.check import fake_batch


def model_of(name, *overrides, seed=0):
    torch.manual_seed(seed)
    spec = config.load(name, list(overrides))
    return build_model(spec, 0, None).train(), spec


def value(terms, name):
    return float(terms[name].sum / terms[name].count)


# ---------------------------------------------------------------- Conformer

CONFORMER = "speech/wav2vec2_conformer"
SMALL = ("towers.audio.backbone.width=256", "towers.audio.backbone.head_size=32")


@pytest.mark.parametrize(
    ("overrides", "millions", "heads"), [((), 87.94, 12), (SMALL, 18.36, 8)], ids=["large", "small"]
)
def test_the_conformer_has_the_size_of_the_paper(overrides, millions, heads):
    spec = config.load(CONFORMER, overrides)
    with torch.device("meta"):
        model = build_model(spec, 0, None)
    size = sum(p.numel() for p in model.towers.parameters())
    assert round(size / 1e6, 2) == millions
    attention = model.towers["audio"].trunk.blocks[0].attention
    assert attention.heads == heads
    assert model.towers["audio"].token_rate(16000.0) == 25.0


def test_the_configured_layers_are_those_of_torchaudio():
    size = "towers.audio.backbone.width=32", "towers.audio.backbone.head_size=8"
    depth = "towers.audio.backbone.layers=2", "towers.audio.backbone.conv_kernels=[31, 15]"
    model, _ = model_of(CONFORMER, *size, *depth)
    for block, kernel in zip(model.towers["audio"].trunk.blocks, (31, 15), strict=True):
        block.eval()
        peer = torchaudio.models.conformer.ConformerLayer(
            32, 1024, 4, kernel, use_group_norm=True, convolution_first=True
        ).eval()
        ffn1, ffn2, conv = peer.ffn1.sequential, peer.ffn2.sequential, peer.conv_module.sequential
        up1, up2 = block.ffn1.parts["shared"], block.ffn2.parts["shared"]
        pairs = [
            (block.norm1, ffn1[0]), (up1.up, ffn1[1]), (up1.down, ffn1[4]),
            (block.norm4, ffn2[0]), (up2.up, ffn2[1]), (up2.down, ffn2[4]),
            (block.norm2, peer.self_attn_layer_norm),
            (block.attention.out, peer.self_attn.out_proj),
            (block.norm3, peer.conv_module.layer_norm), (block.conv.inward, conv[0]),
            (block.conv.depthwise, conv[2]), (block.conv.norm, conv[3]),
            (block.conv.outward, conv[5]), (block.norm, peer.final_layer_norm),
        ]  # fmt: skip
        with torch.no_grad():
            for ours, theirs in pairs:
                for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                    other.copy_(mine.normal_(std=0.2).view_as(other))
            peer.self_attn.in_proj_weight.copy_(block.attention.qkv.weight)
            peer.self_attn.in_proj_bias.copy_(block.attention.qkv.bias)
        x = torch.randn(2, 40, 32)
        expected = peer(x.transpose(0, 1), None).transpose(0, 1)
        torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_an_empty_head_of_the_conformer_costs_the_logarithm_of_101():
    model, spec = model_of(
        "runs/wav2vec2_conformer_tiny", "tasks.mam.target.negatives=100", "views.x.crop_s=4.0"
    )
    with torch.no_grad():
        for parameter in model.tasks["mam"].target.of_context.parameters():
            parameter.zero_()
    _, terms = model(fake_batch(spec, 4, missing=False), 0, 10)
    assert value(terms, "mam.nce") == pytest.approx(math.log(101), abs=1e-5)
    assert {"mam.diversity", "mam.perplexity"}.isdisjoint(terms)


def test_the_targets_of_the_conformer_are_trained_too():
    model, spec = model_of("runs/wav2vec2_conformer_tiny")
    loss, _ = model(fake_batch(spec, 4, missing=False), 0, 10)
    loss.backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    # a softmax does not see what is added to all keys
    assert all("qkv.bias" in n for n in unused)


# ---------------------------------------------------------------- wav2vec-C

REBUILDING = "runs/wav2vec_c_tiny"


def test_without_its_weight_the_consistency_of_wav2vec_c_changes_nothing():
    own, spec = model_of(REBUILDING, "tasks.mam.weights.consistency=0")
    plain, _ = model_of(REBUILDING, "tasks.mam.target.decoder=null")
    plain.load_state_dict(own.state_dict(), strict=False)
    batch, losses = fake_batch(spec, 4, missing=False), []
    for model in (own, plain):
        torch.manual_seed(1)  # of dropout
        loss, _ = model(batch, 3, 10)
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    grads = dict(own.named_parameters())
    assert all(torch.equal(p.grad, grads[n].grad) for n, p in plain.named_parameters())


def test_an_empty_decoder_of_wav2vec_c_costs_the_power_of_normalised_frames():
    model, spec = model_of(REBUILDING)
    with torch.no_grad():
        for parameter in model.tasks["mam"].target.readers["consistency"].out.parameters():
            parameter.zero_()
    batch = fake_batch(spec, 4, missing=False)
    _, terms = model(batch, 0, 10)
    # 98 frames, of which the unbiased deviation is 1
    assert value(terms, "mam.consistency") == pytest.approx(97 / 98, abs=1e-4)
    assert int(terms["mam.consistency"].count) == 4 * 49


@pytest.mark.parametrize("quantizer", ["gumbel", "nearest"])
def test_consistency_reaches_codes_encoder_and_decoder_alone(quantizer):
    where = "tasks.mam.target.quantizer"
    change = [f"{where}.kind=nearest", f"{where}.width=null", f"{where}.temperature=null"]
    change = [] if quantizer == "gumbel" else change
    model, spec = model_of(REBUILDING, *change)
    batch = fake_batch(spec, 4, missing=False)
    model.tasks["mam"](model.passes(batch, 0.0), batch)["consistency"].sum.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    parts = ("stem.encoder.", "stem.features.", "target.quantizer.", "target.readers.")
    assert all(any(part in name for part in parts) for name in moved)
    # the straight-through codebook of `nearest` learns from its own loss
    parts += (".codebook",) if quantizer == "gumbel" else ()
    assert all(any(part in name for name in moved) for part in parts)


def test_the_decoder_sees_codes_of_every_frame_and_padding_counts_nowhere():
    model, spec = model_of(REBUILDING)
    model.eval()
    batch = fake_batch(spec, 2, missing=False)
    view = batch.views["x"]
    short = replace(view, lengths_P=torch.tensor([8000, 4200]))
    wild = short.data.clone()
    wild[1, 4200:] = 3.0
    task = model.tasks["mam"]
    found = []
    for data in (short.data, wild):
        changed = replace(batch, views={"x": replace(short, data=data)})
        found.append(task(model.passes(changed), changed)["consistency"])
    assert torch.equal(found[0].sum, found[1].sum)
    assert int(found[0].count) == 49 + 25
