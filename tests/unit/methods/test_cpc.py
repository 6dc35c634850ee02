"""Acceptance lists of CPC, CPC2 (2018, 2021) and wav2vec (2019) on their method files."""

import math
from dataclasses import replace

import pytest
import torch
from small_methods import full_batch, small, small_model, values
from tiny_run import absent_rows, gradients, take_rows
from torch.nn import functional as F

from mmssl import config
from mmssl.build import build_model
from mmssl.targets.later import Heard
from mmssl.types import UserError

ALL = ("cpc", "cpc2", "wav2vec")


def model_of(name, *overrides):
    return small_model(small(f"audio/{name}", *overrides)).train()


def views_of(batch):
    return ("past", "clean") if "past" in batch.views else ("x", "x")


def shorter(batch, *lengths):
    lengths = torch.tensor(lengths)
    return replace(batch, views={n: replace(v, lengths_P=lengths) for n, v in batch.views.items()})


def heard_of(model, batch):
    passes, (name, predicts) = model.passes(batch, 0.0), views_of(batch)
    tokens = passes.tokens(name)
    return Heard("future", name, predicts, tokens, ~tokens.pad_PN, passes)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_published_sizes():
    with torch.device("meta"):
        found = {name: build_model(config.load(f"audio/{name}"), 0, None) for name in ALL}
        large = build_model(config.load("audio/wav2vec", ["towers.audio.use=wave_vq"]), 0, None)
    conv5 = 10 * 512 + 20 * 512**2
    gru, lstm = 3 * 256 * (512 + 256 + 2), 2 * 4 * 256 * (512 + 2)
    towers = {name: model.towers["audio"] for name, model in found.items()}
    assert count(towers["cpc"]) == conv5 + 5 * 3 * 512 + gru
    assert count(towers["cpc2"]) == 10 * 256 + 20 * 256**2 + 5 * 3 * 256 + lstm
    assert count(towers["wav2vec"]) == conv5 + 5 * 2 * 512 + 9 * (3 * 512**2 + 3 * 512)
    assert count(found["cpc"].tasks) == 12 * 256 * 512
    assert count(found["wav2vec"].tasks) == 12 * 512**2 + 512
    assert round(count(large) / 1e5) == 328
    assert all(t.stem.fields()[0][:2] == (160, 465) for t in towers.values())
    assert towers["cpc"].grid_of((20_480,)) == (126,)
    steps = {
        name: (m.tasks["future"].steps[0], m.tasks["future"].steps[-1]) for name, m in found.items()
    }
    assert steps == {"cpc": (1, 12), "cpc2": (1, 12), "wav2vec": (3, 14)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cpc", math.log(129)), ("cpc2", math.log(129)), ("wav2vec", 11 * math.log(2))],
)
def test_empty_heads(name, expected):
    model = model_of(name)
    with torch.no_grad():
        for parameter in model.tasks["future"].target.heads.parameters():
            parameter.zero_()
    found = values(model, shorter(full_batch(model.spec, 3), 6400, 4000, 6400))
    assert found["future"] == pytest.approx(expected, abs=1e-5)
    assert found["future.accuracy"] == 0


@pytest.mark.parametrize("name", ["cpc", "cpc2"])
def test_the_loss_is_the_formula_over_all_pairs(name):
    model = model_of(name, "tasks.future.steps=3", "tasks.future.target.negatives=9").double()
    batch = full_batch(model.spec, 3)
    batch = replace(
        batch, views={n: replace(v, data=v.data.double()) for n, v in batch.views.items()}
    )
    batch = shorter(batch, 6400, 4000, 6400)
    task, heard = model.tasks["future"], heard_of(model, batch)
    truth = task.target.truth(heard)
    z = model.towers["audio"].encode(batch.views[heard.predicts], 0.0).features_PNE
    torch.testing.assert_close(truth.latents_PNE, z, rtol=0, atol=0)
    lengths, index = heard.valid_PN.sum(1).tolist(), truth.negatives.index_PMK
    assert lengths == [38, 23, 38]
    total, asked, flat = 0.0, 0, z.flatten(0, 1)
    for p, length in enumerate(lengths):
        for step, ahead in enumerate((1, 2, 3)):
            for t in range(length - ahead):
                guess = truth.context_PND[p, t] @ task.target.heads.weight_SKD[step].T
                scores = torch.cat([z[p, t + ahead][None], flat[index[p, t]]]) @ guess
                scores = scores / (256 if name == "cpc2" else 1)
                total, asked = total + scores.logsumexp(0) - scores[0], asked + 1
    term = task(model.passes(batch, 0.0), batch)[""]
    assert int(term.count) == asked
    torch.testing.assert_close(term.sum, total)


def test_negatives_of_cpc_are_shared_by_the_steps_and_never_frame_t():
    model = model_of("cpc", "tasks.future.target.negatives=3000")
    truth = model.tasks["future"].target.truth(heard_of(model, full_batch(model.spec, 3)))
    for t in (0, 17):
        assert torch.equal(truth.of(1).index_PMK[0, t], truth.of(5).index_PMK[0, t])
        drawn = set(truth.negatives.index_PMK[1, t].tolist())
        assert drawn == {n for n in range(3 * 38) if n % 38 != t}


# ---------------------------------------------------------------- past and future


def test_an_identical_past_is_cpc_bit_for_bit():
    overrides = [f"tasks.future.target.{k}" for k in ("predictor=null", "temperature=1")]
    two = model_of("cpc2", *overrides)
    tree = two.spec.model_dump(by_alias=True)
    tree["tasks"]["future"] |= {"view": "clean", "predicts": ""}
    one = small_model(type(two.spec).model_validate(tree)).train()
    one.load_state_dict(two.state_dict())
    batch = full_batch(two.spec, 3)
    same = replace(batch, views=batch.views | {"past": batch.views["clean"]})
    loss, grads = gradients(two, same)
    other, theirs = gradients(one, same)
    assert torch.equal(loss, other)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-5, atol=1e-7)
    assert not torch.equal(loss, gradients(two, batch)[0])


def test_what_is_predicted_is_clean_and_both_views_teach():
    model = model_of("cpc2")
    batch = full_batch(model.spec, 2)
    waves = {n: v.data.requires_grad_() for n, v in batch.views.items()}
    batch = replace(batch, views={n: replace(v, data=waves[n]) for n, v in batch.views.items()})
    truth = model.tasks["future"].target.truth(heard_of(model, batch))
    (clean,) = torch.autograd.grad(truth.latents_PNE.sum(), waves["clean"], retain_graph=True)
    assert clean.any()
    pool = truth.latents_PNE.sum() + truth.pool_QCE.sum()
    assert torch.autograd.grad(pool, waves["past"], retain_graph=True, allow_unused=True) == (None,)
    context = truth.context_PND[..., 0].sum()
    assert torch.autograd.grad(context, waves["clean"], retain_graph=True, allow_unused=True) == (
        None,
    )
    model.tasks["future"](model.passes(batch, 0.0), batch)[""].sum.backward()
    assert all(wave.grad.any() for wave in waves.values())


@pytest.mark.parametrize("name", ["cpc", "cpc2"])
def test_a_context_hears_nothing_behind_its_own_frame(name):
    model = model_of(name).double()
    batch = full_batch(model.spec, 2)
    heard = views_of(batch)[0]
    wave = batch.views[heard].data.double().requires_grad_()
    views = {n: replace(v, data=v.data.double()) for n, v in batch.views.items()}
    views[heard] = replace(views[heard], data=wave)
    truth = model.tasks["future"].target.truth(heard_of(model, replace(batch, views=views)))
    (grad,) = torch.autograd.grad(truth.context_PND[0, 10, 0], wave)
    assert grad[0, : 10 * 160 + 465].any()
    assert grad[0, 10 * 160 + 465 :].eq(0).all()
    assert grad[1].eq(0).all()


def noise_of(model, seed):
    """Waves in which nothing can be told from what came before."""
    batch = full_batch(model.spec, 8, seed)
    view = batch.views["x"]
    wave = torch.randn(view.data.shape, generator=torch.Generator().manual_seed(seed))
    return replace(batch, views={"x": replace(view, data=wave)})


def test_noise_stays_at_chance_where_frames_do_not_overlap():
    """Fields of 465 samples every 160: a context has heard parts of the next two frames, no more.

    Accuracy over that of guessing, found on new noise after 100 steps: 30.7, 5.1 and then 0.82,
    0.92, 0.92, which 7,000 frames each know to about 0.14.
    """
    model = model_of("cpc", "tasks.future.steps=5", "views.x.crop_s=0.5")
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(100):
        loss, _ = model(noise_of(model, step), step, 100)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    target = model.tasks["future"].target
    hits, asked = torch.zeros(5), torch.zeros(5)
    with torch.no_grad():
        for seed in range(1000, 1020):
            truth = target.truth(heard_of(model, noise_of(model, seed)))
            for step, ahead in enumerate(range(1, 6)):
                term = target(truth.context_PND[:, :-ahead], truth, step, ahead)["accuracy"]
                hits[step] += term.sum
                asked[step] += term.count
    over_chance = (129 * hits / asked).tolist()
    assert over_chance[0] > 10
    assert over_chance[1] > 2
    assert all(0.5 < x < 1.5 for x in over_chance[2:]), over_chance
    assert sum(over_chance[2:]) / 3 == pytest.approx(1, abs=0.25)


def test_wav2vec_sees_19_frames_without_its_norms():
    model = model_of(
        "wav2vec", "towers.audio.backbone.kernels=[3, 3, 3, 3, 3, 3, 3, 3, 3]"
    ).double()
    trunk = model.towers["audio"].trunk
    for block in trunk.blocks:
        block.norm.forward = lambda x, pad: x
        block.activation = torch.nn.GELU()
    x = torch.randn(1, 40, 16, dtype=torch.float64, requires_grad=True)
    trunk(x)[0][0, 30].sum().backward()
    assert x.grad.abs().sum(-1)[0].nonzero()[:, 0].tolist() == list(range(12, 31))


def test_base_wav2vec_has_no_skips():
    block = model_of("wav2vec").towers["audio"].trunk.blocks[0].eval()
    x = torch.randn(2, 9, 16)
    peer = F.conv1d(
        F.pad(x.transpose(1, 2), (1, 0), mode="replicate"), block.conv.weight, block.conv.bias
    )
    torch.testing.assert_close(block(x, None), F.group_norm(peer, 1).relu().transpose(1, 2))


# ---------------------------------------------------------------- rows and towers


@pytest.mark.parametrize("name", ALL)
def test_rows_without_sound_change_neither_loss_nor_gradient(name):
    model = model_of(name, "tasks.future.steps=2")
    batch = full_batch(model.spec, 3)
    loss, grads = gradients(model, batch)
    more, others = gradients(model, absent_rows(batch, 2))
    assert torch.equal(loss, more)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, others[key], rtol=1e-5, atol=1e-7)
    empty, zero = gradients(model, take_rows(absent_rows(batch, 1), [3]))
    assert float(empty) == 0.0
    assert set(zero) == {n for n, _ in model.named_parameters()}
    assert all(not g.any() for g in zero.values())


def test_cpc_on_the_shared_transformer():
    """Another backbone is one line."""
    shared = "shared={width: 512, layers: 1, head_size: 256, hidden: 32, causal: true}"
    spec = config.load("audio/cpc", ["towers.audio.backbone=shared", shared, "views.x.crop_s=0.2"])
    model = small_model(spec).train()
    loss, grads = gradients(model, full_batch(spec, 2))
    assert float(loss) == pytest.approx(math.log(129), abs=1)
    assert set(grads) == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        (
            "cpc2",
            "views.clean.crop_s=1.0",
            r"tasks\.future\.predicts: views\.clean\.crop_s differs",
        ),
        ("cpc2", "views.clean.window=w", r"tasks\.future\.predicts: views\.clean\.window differs"),
        ("cpc2", "tasks.future.predicts=z", r"tasks\.future\.predicts: no view 'z'"),
        (
            "cpc2",
            "tasks.future.target.predictor.width=128",
            r"tasks\.future\.target\.predictor: needs the tower's width \(256\), not 128",
        ),
        (
            "cpc2",
            "tasks.future.target.predictor.causal=false",
            r"tasks\.future\.target\.predictor: .* and causal: true",
        ),
        ("cpc", "towers.audio.backbone.width_in=256", r"512 channels without a projection .* 256"),
    ],
)
def test_parts_that_do_not_fit_are_named(name, override, message):
    with pytest.raises(UserError, match=message):
        build_model(config.load(f"audio/{name}", [override]), 0, None)
