"""The future task: what meets what, negatives, analytic values, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmssl import config
from mmssl.build import build_model
from mmssl.check import fake_batch
from mmssl.heads.predict import StepHeads
from mmssl.specs import RunSpec
from mmssl.targets.later import Heard
from mmssl.types import UserError

SMALL = (
    "towers.audio.cut.channels=16",
    "towers.audio.cut.kernels=[8, 4]",
    "towers.audio.cut.strides=[4, 2]",
    "towers.audio.backbone.width=16",
    "towers.audio.backbone.kernels=[2, 3]",
    "views.x.hz=8000",
    "views.x.crop_s=0.03",  # 28 tokens
    "tasks.future.steps=4",
)
CONTINUOUS = ("towers.audio.quantizer=null",)  # wav2vec
GUMBEL = tuple(f"towers.audio.quantizer.{k}" for k in ("width=16", "hidden=32", "entries=20"))


def model_of(*overrides, seed=0):
    torch.manual_seed(seed)
    spec = config.load("speech/vq_wav2vec", [*SMALL, *overrides])
    return build_model(spec, 0, None).train()


def batch_of(model, rows=3, seed=0):
    return fake_batch(model.spec, rows, seed, missing=False)


def shorter(batch, *lengths):
    view = batch.views["x"]
    return replace(batch, views={"x": replace(view, lengths_P=torch.tensor(lengths))})


def heard_of(model, batch):
    tokens = model.passes(batch, 0.0).tokens("x")
    return Heard("future", "x", "x", tokens, ~tokens.pad_PN, model.passes(batch, 0.0))


@pytest.mark.parametrize("quantizer", [CONTINUOUS, GUMBEL])
def test_the_loss_is_the_formula_over_all_pairs(quantizer):
    model = model_of(*quantizer)
    batch = shorter(batch_of(model), 240, 150, 240)
    task = model.tasks["future"]
    heard = heard_of(model, batch)
    tokens, truth = heard.tokens, task.target.truth(heard)
    z = tokens.features_PNE if tokens.codes is None else tokens.codes.vectors_PNQ
    lengths = heard.valid_PN.sum(1).tolist()
    assert lengths == [28, 17, 28]
    total, count = torch.zeros(()), 0
    for row, length in enumerate(lengths):
        for step, ahead in enumerate((3, 4, 5, 6)):
            for t in range(length - ahead):
                h = task.target.heads(tokens.x_PND[row : row + 1, t : t + 1], step)[0, 0]
                rivals = z[row, truth.negatives.index_PMK[row, t + ahead]]
                total = total - F.logsigmoid(h @ z[row, t + ahead])
                total = total - F.logsigmoid(-(rivals @ h)).sum()
                count += 1
    term = task(model.passes(batch, 0.0), batch)[""]
    assert int(term.count) == count
    torch.testing.assert_close(term.sum, total, rtol=1e-5, atol=0)


def test_negatives_are_other_valid_frames_of_the_row():
    model = model_of(*CONTINUOUS, "tasks.future.target.negatives=2000")
    heard = heard_of(model, shorter(batch_of(model), 240, 150, 240))
    index_PMK = model.tasks["future"].target.truth(heard).negatives.index_PMK
    for row, length in enumerate(heard.valid_PN.sum(1).tolist()):
        for frame in range(length):
            others = set(range(length)) - {frame}
            assert set(index_PMK[row, frame].tolist()) == others


def test_a_context_does_not_hear_what_its_first_step_predicts():
    """Fields of 20 samples every 8: ceil(20 / 8) = 3 frames ahead is the first without overlap."""
    model = model_of(*CONTINUOUS, "towers.audio.cut.norm=none").double()
    for block in model.towers["audio"].trunk.blocks:
        block.norm = Plain()
    assert model.tasks["future"].steps == (3, 4, 5, 6)
    batch = batch_of(model, 1)
    view = batch.views["x"]
    wave = view.data.double().requires_grad_()
    heard = heard_of(model, replace(batch, views={"x": replace(view, data=wave)}))
    (context,) = torch.autograd.grad(heard.tokens.x_PND[0, 10].sum(), wave, retain_graph=True)
    last = int(context[0].nonzero()[-1])
    for ahead, overlaps in ((1, True), (2, True), (3, False)):
        latent = heard.tokens.features_PNE[0, 10 + ahead]
        (later,) = torch.autograd.grad(latent.sum(), wave, retain_graph=True)
        assert (int(later[0].nonzero()[0]) <= last) == overlaps


class Plain(nn.Module):
    def forward(self, x, pad=None):
        return x


def trained_on_noise(*overrides):
    """Mean loss of the last 40 of 160 steps, each on noise that was never heard before."""
    model = model_of(*CONTINUOUS, "tasks.future.steps=1", "views.x.crop_s=0.05", *overrides)
    optimiser = torch.optim.Adam(model.parameters(), 6e-3)
    found = []
    for step in range(160):
        loss, _ = model(batch_of(model, 6, step), step, 160)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    return sum(found[-40:]) / 40


def test_noise_cannot_be_predicted_but_where_frames_overlap():
    floor = math.log(11) + 10 * math.log(11 / 10)
    assert floor == pytest.approx(3.351, abs=1e-3)
    assert floor - 0.01 < trained_on_noise() < floor + 0.1
    assert trained_on_noise("tasks.future.first=1") < floor - 0.2


def test_steps_beyond_the_view_are_left_out():
    model = model_of(*CONTINUOUS, "tasks.future.first=26")
    terms = model.tasks["future"](model.passes(batch_of(model), 0.0), batch_of(model))
    assert int(terms[""].count) == 3 * (2 + 1)
    model = model_of(*CONTINUOUS, "tasks.future.first=28")
    with pytest.raises(UserError, match=r"tasks\.future: 28 tokens of views\.x, .* is 28 ahead"):
        model(batch_of(model), 0, 10)


def test_heads_are_the_transposed_convolution_of_wav2vec():
    torch.manual_seed(0)
    heads, peer = StepHeads(6, 4, 3), nn.ConvTranspose2d(6, 4, (1, 3))
    bound = 1 / math.sqrt(4 * 3)
    for parameter in (*heads.parameters(), *peer.parameters()):
        assert 0.5 * bound < float(parameter.detach().abs().max()) <= bound
    with torch.no_grad():
        peer.weight.copy_(heads.weight_SKD.permute(2, 1, 0)[:, :, None])
        peer.bias.copy_(heads.bias_K)
    x_PND = torch.randn(2, 5, 6)
    theirs = peer(x_PND.transpose(1, 2)[..., None])  # (P, K, N, S)
    for step in range(3):
        torch.testing.assert_close(heads(x_PND, step), theirs[..., step].transpose(1, 2))


TRANSFORMER = {"kind": "transformer", "width": 16, "layers": 1, "head_size": 8}
PATCHES = {"kind": "patches", "patch": [8]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": TRANSFORMER}, r"tasks\.future: the backbone of towers\.audio sees what"),
        ({"cut": PATCHES}, r"tasks\.future\.target: `latents` needs latents of the stem"),
    ],
)
def test_towers_that_cannot_predict_are_refused(change, message):
    tree = config.load("speech/vq_wav2vec", [*SMALL, *GUMBEL]).model_dump(by_alias=True)
    tree["towers"]["audio"] |= change
    with pytest.raises(UserError, match=message):
        build_model(RunSpec.model_validate(tree), 0, None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("towers.audio.cut.channels=8", r"8 channels without a projection .* width 16"),
        ("towers.audio.quantizer.width=8", r"quantizer\.width: 8 for a backbone of width 16"),
        ("tasks.future.view=y", r"tasks\.future\.view: no view 'y'"),
    ],
)
def test_parts_that_do_not_fit_are_named(override, message):
    with pytest.raises(UserError, match=message):
        build_model(config.load("speech/vq_wav2vec", [*SMALL, *GUMBEL, override]), 0, None)


def masked(**mask_and_target):
    return {"kind": "masked", "view": "x", **mask_and_target}


TEACHER = masked(mask={"rule": "random"}, target={"kind": "latents", "layers": 1})
PASSING_BY = masked(mask={"rule": "random", "hide": "features"}, target={"kind": "codes"})


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            TEACHER,
            r"tasks\.m\.target: a teacher needs a transformer; the backbone of towers\.audio",
        ),
        (PASSING_BY, r"tasks\.m\.mask\.hide: `features` would pass by the tower's quantizer"),
    ],
)
def test_masked_tasks_that_a_tower_of_codes_cannot_do(task, message):
    tree = config.load("speech/vq_wav2vec", [*SMALL, *GUMBEL]).model_dump(by_alias=True)
    tree["tasks"] = {"m": task}
    with pytest.raises(UserError, match=message):
        build_model(RunSpec.model_validate(tree), 0, None)


def test_text_has_nothing_to_quantise():
    tree = config.load("general/bert").model_dump(by_alias=True)
    tree["towers"]["text"]["quantizer"] = {"kind": "gumbel"}
    with (
        torch.device("meta"),
        pytest.raises(UserError, match=r"towers\.text\.quantizer: quantises"),
    ):
        build_model(RunSpec.model_validate(tree), 64, {"pad": 0, "mask": 4})
