"""DAPC: what each of its three terms reads, its analytic losses, padding."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from mmssl import config
from mmssl.build import build_model
from mmssl.check import fake_batch
from mmssl.objectives.predictive import predictive_information, whiteness
from mmssl.types import UserError

SMALL = (
    "towers.audio.backbone.width=24",
    "towers.audio.backbone.head_size=12",
    "towers.audio.backbone.hidden=48",
    "towers.audio.backbone.dropout=0",
    "tasks.frames.target.latents=3",
    "tasks.frames.target.decoder=[16, 16]",
)


def model_of(*overrides):
    torch.manual_seed(0)
    spec = config.load("runs/dapc_tiny", [*SMALL, *overrides])
    return build_model(spec, 0, None).train(), fake_batch(spec, 6, missing=False)


def run(model, batch):
    """Seen, and means of the terms."""
    task = model.tasks["frames"]
    seen = task._seen(model.passes(batch, 0.0), batch)
    return seen, {name: (t.sum / t.count).item() for name, t in task.target(seen).items()}


def test_only_hidden_cells_are_reconstructed():
    model, batch = model_of()
    target = model.tasks["frames"].target
    with torch.no_grad():
        target.head[-1].weight.zero_()
        target.head[-1].bias.fill_(0.5)
    seen, terms = run(model, batch)
    clean = seen.tower.inputs(seen.view)[:, 0]
    hidden = target._altered(seen.tower, seen.view).loss_PTF
    assert 0 < int(hidden.sum()) < hidden.numel()
    expected = (clean[hidden] - 0.5).square().mean().item()
    assert terms["reconstruction"] == pytest.approx(expected, rel=1e-6)
    assert seen.altered[:, 0][hidden].abs().max() == 0
    assert torch.equal(seen.altered[:, 0][~hidden], clean[~hidden])


def test_information_is_that_of_the_latents_of_a_pass_that_sees_everything():
    model, batch = model_of()
    _, terms = run(model, batch)
    plain = model.passes(batch, 0.0).tokens("x")
    z = model.tasks["frames"].target.head[0](plain.x_PND)
    total, count = predictive_information(z, ~plain.pad_PN, 4)
    assert terms["predictive"] == pytest.approx(-(total / count).item(), rel=1e-5)
    total, count = whiteness(z, ~plain.pad_PN)
    assert terms["whiteness"] == pytest.approx((total / count).item(), rel=1e-5)
    other, _ = model_of("tasks.frames.target.masks.spans=0")
    _, changed = run(other, batch)
    for name in ("predictive", "whiteness"):
        assert changed[name] == pytest.approx(terms[name], rel=1e-6)
    assert changed["reconstruction"] != pytest.approx(terms["reconstruction"], rel=1e-3)


def test_the_loss_is_weighted_as_in_the_release_and_reaches_every_part():
    model, batch = model_of()
    loss, terms = model(batch, 0, 10)
    mean = {name: (t.sum / t.count).item() for name, t in terms.items()}
    expected = mean["frames.predictive"] + 0.1 * mean["frames.whiteness"]
    assert loss.item() == pytest.approx(expected + 500 * mean["frames.reconstruction"], rel=1e-5)
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_padding_and_absent_rows_change_no_term():
    model, batch = model_of()
    _, terms = run(model, batch)
    view = batch.views["x"]
    longer = replace(batch, views={"x": replace(view, data=F.pad(view.data, (0, 4000)))})
    _, padded = run(model, longer)
    assert padded == pytest.approx(terms, rel=1e-4)
    dummy = replace(view, present_BL=torch.zeros_like(view.present_BL), dummy=True)
    task = model.tasks["frames"]
    gone = replace(batch, views={"x": dummy})
    absent = task.target(task._seen(model.passes(gone, 0.0), gone))
    assert {n: (t.sum.item(), t.count.item()) for n, t in absent.items()} == dict.fromkeys(
        absent, (0.0, 0.0)
    )


def test_it_needs_frames():
    with pytest.raises(UserError, match=r"`predictive` needs a spectrogram and mask\.rule all"):
        model_of("tasks.frames.mask.rule=random")
