"""MAE: only hidden patches cost, visible ones alone are encoded."""

from dataclasses import replace

import pytest
import torch

from mmssl import config
from mmssl.build import build_model
from mmssl.check import fake_batch
from mmssl.masking import random_mask
from mmssl.objectives.regression import patch_normalise

SMALL = (
    "towers.x.backbone.width=24",
    "towers.x.backbone.head_size=12",
    "towers.x.backbone.hidden=48",
    "towers.x.backbone.layers=2",
    "tasks.mae.target.decoder.width=12",
    "tasks.mae.target.decoder.heads=2",
    "tasks.mae.target.decoder.head_size=6",
    "tasks.mae.target.decoder.hidden=24",
)


def model_of(name, *overrides):
    torch.manual_seed(0)
    spec = config.load(f"runs/{name}", [*SMALL, *overrides])
    model = build_model(spec, 0, None).train()
    return model, fake_batch(spec, 3, missing=False)


def seen_of(model, batch):
    return model.tasks["mae"]._seen(model.passes(batch, 0.0), batch)


def test_the_published_encoder_and_decoder_have_their_sizes():
    spec = config.load("general/mae")
    with torch.device("meta"):
        model = build_model(spec, 0, None)
    decoder = sum(p.numel() for p in model.tasks["mae"].target.head.parameters())
    encoder = sum(p.numel() for p in model.towers.parameters())
    # ViT-B with a class token and fixed positions; the decoder of the release
    assert encoder == 768 * 768 + 768 + 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert decoder == (768 + 1) * 512 + 512 + 8 * (12 * 512**2 + 13 * 512) + 2 * 512 + 513 * 768


@pytest.mark.parametrize("name", ["mae_tiny", "mae_audio_tiny"])
def test_predicting_nothing_costs_the_variance_of_a_patch(name):
    model, batch = model_of(name)
    head = model.tasks["mae"].target.head.head
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    _, terms = model(batch, 0, 10)
    values = head.out_features
    loss = float(terms["mae"].sum / terms["mae"].count)
    assert loss == pytest.approx((values - 1) / values, rel=2e-3)


@pytest.mark.parametrize(("values", "loss"), [(192, 0.99478), (768, 0.998698)])
def test_zero_costs_the_biased_variance_of_unbiased_patches(values, loss):
    x = torch.rand(4, 49, values, generator=torch.Generator().manual_seed(0)).double()
    assert float(patch_normalise(x).square().mean()) == pytest.approx(loss, abs=2e-5)
    assert loss == pytest.approx((values - 1) / values, abs=2e-5)


def test_three_quarters_are_hidden_and_only_the_rest_is_encoded():
    model, batch = model_of("mae_tiny")
    seen = seen_of(model, batch)
    assert seen.hidden_PN.sum(1).tolist() == [108] * 3  # of 144
    assert torch.equal(seen.tokens.pad_PN, seen.hidden_PN)
    lengths = []
    trunk = model.towers["x"].trunk
    trunk.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    seen_of(model, batch)
    assert lengths == [1 + 36]
    ratio = config.load("general/mae").tasks["mae"].mask.ratio
    assert random_mask(torch.arange(5), (14, 14), ratio).sum(1).tolist() == [147] * 5


def test_hidden_pixels_change_no_encoding_and_visible_ones_do():
    model, batch = model_of("mae_tiny")
    model.eval()
    seen = seen_of(model, batch)
    view = batch.views["x"]
    hidden = seen.hidden_PN[0].reshape(12, 12)
    for wanted in (True, False):
        row, column = (hidden == wanted).nonzero()[0].tolist()
        data = view.data.clone()
        data[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] ^= 255
        changed = replace(batch, views={"x": replace(view, data=data)})
        again = seen_of(model, changed)
        assert torch.equal(again.tokens.x_PND, seen.tokens.x_PND) == wanted


def test_the_decoder_sees_the_class_token_and_no_padding():
    model, batch = model_of("mae_tiny")
    model.eval()
    head, seen = model.tasks["mae"].target.head, seen_of(model, batch)
    with torch.no_grad():
        before = head(seen.tokens, seen.hidden_PN)
        other = {name: x + 1.0 for name, x in seen.tokens.extra.items()}
        assert list(other) == ["cls"]
        moved = head(replace(seen.tokens, extra=other), seen.hidden_PN)
        assert before.shape == moved.shape == (3, 144, 192)
        assert float((moved - before).abs().amax(-1).min()) > 0
        # a patch that is neither visible nor hidden is padding
        hidden = seen.hidden_PN.clone()
        hidden[:, hidden[0].nonzero()[0]] = False
        fewer = head(seen.tokens, hidden)
        noise = seen.tokens.x_PND + 9.0 * (seen.tokens.pad_PN & ~hidden)[..., None]
        again = head(replace(seen.tokens, x_PND=noise), hidden)
    torch.testing.assert_close(again[hidden], fewer[hidden])


def test_a_decoder_and_dropped_tokens_need_each_other():
    from mmssl.types import UserError

    with pytest.raises(UserError, match=r"mask\.hide drop and target\.decoder"):
        model_of("mae_tiny", "tasks.mae.mask.hide=latents")
