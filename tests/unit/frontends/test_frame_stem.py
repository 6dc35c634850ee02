"""Latents of spectrogram frames: what is seen, padding, and where a mask of them acts."""

import pytest
import torch

from mmssl import config
from mmssl.build import build_model
from mmssl.check import fake_batch
from mmssl.frontends.frame_stem import FrameStem
from mmssl.types import UserError

RUN = "runs/wav2vec2_conformer_tiny"


@pytest.mark.parametrize(("layers", "first"), [(0, 3), (2, 0)])
def test_a_latent_sees_its_own_frame_or_the_past(layers, first):
    torch.manual_seed(0)
    stem = FrameStem(8, 6, 5, layers)
    x = torch.randn(1, 1, 7, 6, requires_grad=True)
    stem.encode(x).features_PTC[0, 3].square().sum().backward()
    touched = x.grad[0, 0].abs().sum(-1) > 0
    assert touched.nonzero()[:, 0].tolist() == list(range(first, 4))


def test_what_stands_behind_the_end_reaches_nothing():
    torch.manual_seed(0)
    stem = FrameStem(8, 6, 5, layers=2)
    x = torch.randn(2, 1, 7, 6)
    whole, part = stem.encode(x), stem.encode(x[:, :, :4])
    assert whole.grid == (7, 1)
    torch.testing.assert_close(whole.tokens_PND[:, :4], part.tokens_PND)


def test_a_mask_of_features_replaces_the_latent_before_it_is_mapped():
    torch.manual_seed(0)
    spec = config.load(RUN, ["views.x.crop_s=0.5"])
    model, batch = build_model(spec, 0, None).eval(), fake_batch(spec, 2, missing=False)
    task, tower = model.tasks["mam"], model.towers["audio"]
    assert task.embedding.shape == (tower.latent_width,) == (128,)
    entered = []
    tower.trunk.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    seen = task._seen(model.passes(batch), batch)
    hidden = seen.hidden_PN
    expected = tower.stem.proj(torch.where(hidden[..., None], task.embedding, seen.features_PNE))
    torch.testing.assert_close(entered[0], expected)
    assert 0 < int(hidden.sum()) < hidden.numel()
    # the target reads what the mask did not touch
    clean = tower.stem.encode(tower.inputs(batch.views["x"])).features_PTC
    assert torch.equal(seen.features_PNE, clean)


def test_parts_that_do_not_fit_are_refused():
    spec = config.load(RUN)
    tree = spec.model_dump(by_alias=True, exclude_none=True)
    audio = tree["towers"]["audio"]
    tree["towers"]["audio"] = {**audio, "frontend": {"kind": "waveform"}}
    with pytest.raises(UserError, match="`frame_latents` reads a spectrogram"):
        build_model(type(spec).model_validate(tree), 0, None)
    tree["towers"]["audio"] = {**audio, "cut": {"kind": "patches", "patch": [1, 80]}}
    tree["tasks"]["mam"]["target"] = {"kind": "patches"}
    with pytest.raises(UserError, match="`features` are latents of the stem"):
        build_model(type(spec).model_validate(tree), 0, None)
