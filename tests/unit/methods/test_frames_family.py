"""Mockingjay, TERA, Audio ALBERT: analytic losses, alterations, shared layers, padding."""

import math
from dataclasses import replace

import pytest
import torch

from mmssl import config
from mmssl.build import build_model
from mmssl.check import fake_batch

SMALL = (
    "towers.audio.backbone.width=24",
    "towers.audio.backbone.head_size=12",
    "towers.audio.backbone.hidden=48",
    "towers.audio.backbone.dropout=0",
    "tasks.frames.hidden=24",
    "views.x.crop_s=2.0",
)
NAMES = ("mockingjay", "tera", "audio_albert")


def model_of(name, *overrides):
    torch.manual_seed(0)
    spec = config.load(f"runs/{name}_tiny", [*SMALL, *overrides])
    return build_model(spec, 0, None).train(), fake_batch(spec, 6, missing=False)


def seen_of(model, batch):
    return model.tasks["frames"]._seen(model.passes(batch, 0.0), batch)


@pytest.mark.parametrize("name", NAMES)
def test_predicting_the_mean_costs_what_normalised_features_deviate(name):
    model, batch = model_of(name)
    last = model.tasks["frames"].target.head[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    _, terms = model(batch, 0, 10)
    loss = float(terms["frames"].sum / terms["frames"].count)
    # log energies of white noise are skewed: less than the sqrt(2 / pi) = 0.798 of a Gaussian
    assert loss == pytest.approx(math.sqrt(2 / math.pi), rel=0.08)


def test_only_altered_cells_count_and_they_are_altered():
    model, batch = model_of(
        "tera", "tasks.frames.target.noise=null", "tasks.frames.target.time.zero=1"
    )
    seen = seen_of(model, batch)
    target = model.tasks["frames"].target
    clean = seen.tower.inputs(seen.view)[:, 0]
    loss = target._altered(seen.tower, seen.view).loss_PTF
    assert torch.equal((seen.altered[:, 0] != clean), loss & (clean != 0))
    assert int(target(seen)[""].count) == int(loss.sum())


def test_padding_changes_no_loss():
    model, batch = model_of("mockingjay")
    view = batch.views["x"]
    longer = torch.nn.functional.pad(view.data, (0, 8000))
    padded = replace(batch, views={"x": replace(view, data=longer)})
    (one, two) = (model.tasks["frames"](model.passes(b, 0.0), b)[""] for b in (batch, padded))
    assert int(one.count) == int(two.count)
    torch.testing.assert_close(one.sum, two.sum, atol=1e-2, rtol=1e-5)


def test_depth_of_audio_albert_costs_no_parameters():
    sizes = {
        sum(
            p.numel()
            for p in model_of("audio_albert", f"towers.audio.backbone.layers={n}")[0].parameters()
        )
        for n in (1, 3, 6)
    }
    assert len(sizes) == 1


def test_audio_albert_of_depth_one_is_mockingjay_of_depth_one():
    one = "towers.audio.backbone.layers=1"
    ours, batch = model_of("audio_albert", one, "tasks.frames.target.time.length=2")
    peer, _ = model_of(
        "mockingjay",
        one,
        "towers.audio.frontend.utterance.stack=3",
        "towers.audio.cut.patch=[1,120]",
        "tasks.frames.target.time.length=2",
        "tasks.frames.target.time.share=0.15",
    )
    peer.load_state_dict(ours.state_dict())
    losses = [float(m.eval()(batch, 0, 10)[0].detach()) for m in (ours, peer)]
    assert losses[0] == losses[1] > 0


def test_mockingjay_base_has_the_size_of_the_paper():
    with torch.device("meta"):
        model = build_model(config.load("speech/mockingjay"), 0, None)
    encoder = sum(p.numel() for p in model.towers.parameters())
    assert encoder == pytest.approx(21.4e6, rel=0.01)
