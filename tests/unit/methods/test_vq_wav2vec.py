"""vq-wav2vec's acceptance list on its method files (Baevski et al. 2020), both quantisers."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_run import absent_rows, gradients, take_rows

from mmssl import config
from mmssl.build import build_model
from mmssl.check import fake_batch
from mmssl.schedules import resolve
from mmssl.towers import time_steps

BOTH = ("vq_wav2vec", "vq_wav2vec_kmeans")
SMALL = (
    "towers.audio.cut.channels=16",
    "towers.audio.backbone.width=16",
    "towers.audio.backbone.kernels=[2, 3]",
    "views.x.crop_s=0.3",  # 28 tokens
)
SIZES = {
    "vq_wav2vec": ("width=16", "hidden=32", "entries=12"),
    "vq_wav2vec_kmeans": ("entries=12",),
}


def model_of(name, *overrides, small=True, seed=0):
    torch.manual_seed(seed)
    sizes = [f"towers.audio.quantizer.{size}" for size in SIZES[name]]
    spec = config.load(
        f"speech/{name}", [*(SMALL if small else ()), *(sizes if small else ()), *overrides]
    )
    return build_model(spec, 0, None).train()


def batch_of(model, rows=3, seed=0):
    return fake_batch(model.spec, rows, seed, missing=False)


def shorter(batch, *lengths):
    view = batch.views["x"]
    return replace(batch, views={"x": replace(view, lengths_P=torch.tensor(lengths))})


def values(model, batch, position=0.0):
    _, terms = model(batch, round(100 * position), 100)
    return {name: float(t.sum / t.count) for name, t in terms.items()}


def size(module):
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize(
    ("name", "steps", "quantiser", "total"),
    [
        ("vq_wav2vec", 12, 1_263_232, 34_063_488),  # 34.06 M, the release's 12 steps
        ("vq_wav2vec", 8, 1_263_232, 33_014_912),
        ("vq_wav2vec_kmeans", 8, 214_016, 31_965_696),
    ],
)
def test_published_sizes(name, steps, quantiser, total):
    spec = config.load(f"speech/{name}", [f"tasks.future.steps={steps}"])
    with torch.device("meta"):
        model = build_model(spec, 0, None)
    tower = model.towers["audio"]
    assert size(tower.stem) == 10 * 512 + 23 * 512**2 + 8 * 1024
    assert size(tower.trunk) == 90 * 512**2 + 12 * 3 * 512
    assert size(tower.quantizer) == quantiser
    assert size(model.tasks["future"]) == steps * 512**2 + 512
    assert size(model) == total


def test_frames_and_steps_of_the_release():
    spec = config.load("speech/vq_wav2vec", ["tasks.future.steps=12"])
    with torch.device("meta"):
        model = build_model(spec, 0, None)
    tower = model.towers["audio"]
    assert tower.stem.fields()[0][:2] == (160, 465)  # 100 Hz, 465 samples
    assert model.tasks["future"].steps == tuple(range(3, 15))
    assert tower.grid_of((150_000,)) == (935,)
    assert tower.stem.activation.__class__ is tower.quantizer.activation.__class__ is torch.nn.ReLU


def test_temperature_falls_in_a_straight_line_over_seven_tenths():
    tau = config.load("speech/vq_wav2vec").towers["audio"].quantizer.temperature
    assert [resolve(tau, at) for at in (0, 0.35, 0.7, 1)] == pytest.approx([2, 1.25, 0.5, 0.5])


# ---------------------------------------------------------------- analytic values


@pytest.mark.parametrize("name", BOTH)
def test_empty_heads_cost_eleven_times_ln_2(name):
    model = model_of(name)
    with torch.no_grad():
        for parameter in model.tasks["future"].target.parameters():
            parameter.zero_()
    batch = shorter(batch_of(model), 4800, 2400, 4800)
    found = values(model, batch)
    assert found["future"] == pytest.approx(11 * math.log(2), abs=1e-5)
    assert 11 * math.log(2) == pytest.approx(7.6246, abs=1e-4)
    if name == "vq_wav2vec":
        assert found["future.diversity"] < 1 - 2 / 24


def test_commitment_of_the_published_size_starts_at_five_quarters():
    """1.25 of the latents' power, which the group norm makes 1; the nearest entry takes some."""
    short = ("views.x.crop_s=0.5", "tasks.future.steps=1", "towers.audio.backbone.kernels=[1]")
    model = model_of("vq_wav2vec_kmeans", *short, small=False)
    found = values(model, batch_of(model, 2))
    assert found["future.commitment"] == pytest.approx(1.2456, abs=0.005)


@pytest.mark.parametrize("name", BOTH)
def test_the_loss_adds_the_commitment_and_nothing_else(name):
    model = model_of(name)
    loss, terms = model(batch_of(model), 0, 10)
    mean = {key: float(t.sum / t.count) for key, t in terms.items()}
    expected = mean["future"] + mean.get("future.commitment", 0.0)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert ("future.commitment" in mean) == (name == "vq_wav2vec_kmeans")


def test_a_collapsed_codebook_has_a_perplexity_of_its_groups():
    model = model_of("vq_wav2vec")
    with torch.no_grad():
        model.towers["audio"].quantizer.logits.bias.view(2, 12)[:, 3] = 1000.0
    assert values(model, batch_of(model))["future.perplexity"] == pytest.approx(2.0, abs=1e-5)


# ---------------------------------------------------------------- what reaches what


def reached(model, term):
    model.zero_grad(set_to_none=True)
    batch = batch_of(model)
    model.tasks["future"](model.passes(batch, 0.0), batch)[term].sum.backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_the_prediction_teaches_the_gumbel_codebook_and_everything_else():
    model = model_of("vq_wav2vec")
    assert reached(model, "") == {n for n, _ in model.named_parameters()}


def test_the_kmeans_codebook_learns_from_its_own_loss_alone():
    model = model_of("vq_wav2vec_kmeans")
    every = {n for n, _ in model.named_parameters()}
    assert reached(model, "") == every - {"towers.audio.quantizer.codebook"}
    front = {n for n in every if n.startswith(("towers.audio.stem.", "towers.audio.quantizer."))}
    assert reached(model, "commitment") == front


def test_the_backbone_reads_codes_alone():
    """Frames of equal codes are equal to it, whatever their latents."""
    model = model_of("vq_wav2vec").eval()
    batch = batch_of(model)
    entered = []
    model.towers["audio"].trunk.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    tokens = model.passes(batch).tokens("x")
    ids_PNG, book = tokens.codes.ids_PNG, model.towers["audio"].quantizer.codebook[0]
    assert torch.equal(entered[0], book[ids_PNG].flatten(2))
    assert torch.equal(tokens.stem_PMD, entered[0])
    assert not torch.allclose(tokens.features_PNE, entered[0])


@pytest.mark.parametrize("name", BOTH)
def test_evaluation_draws_no_noise_and_training_draws_its_own(name):
    model, noisy = model_of(name), name == "vq_wav2vec"
    batch = batch_of(model)
    other = replace(batch.views["x"], seeds_P=batch.views["x"].seeds_P + 1)

    def ids(view):
        return model.towers["audio"].encode(view, 0.0).codes.ids_PNG

    assert torch.equal(ids(batch.views["x"]), ids(batch.views["x"]))
    assert torch.equal(ids(batch.views["x"]), ids(other)) != noisy
    model.eval()
    assert torch.equal(ids(batch.views["x"]), ids(other))


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("name", BOTH)
def test_a_padded_item_equals_itself_stored_short(name):
    model = model_of(name).double().eval()
    tower = model.towers["audio"]
    view = shorter(batch_of(model), 4800, 2400, 4800).views["x"]
    view = replace(view, data=view.data.double())
    alone = {c: getattr(view, c)[1:2] for c in ("lengths_P", "rows_P", "slots_P", "seeds_P")}
    short = tower.encode(replace(view, data=view.data[1:2, :2400], **alone), 1.0)
    noisy = view.data.clone()
    noisy[1, 2400:] = 9.0
    long = tower.encode(replace(view, data=noisy), 1.0)
    kept = ~long.pad_PN[1]
    assert int(kept.sum()) == short.x_PND.shape[1]
    assert torch.equal(long.codes.ids_PNG[1][kept], short.codes.ids_PNG[0])
    torch.testing.assert_close(time_steps(long)[0][1][kept], short.x_PND[0])


@pytest.mark.parametrize("name", BOTH)
def test_rows_without_sound_change_neither_loss_nor_gradient(name):
    model = model_of(name)
    batch = batch_of(model)
    loss, grads = gradients(model, batch)
    more, others = gradients(model, absent_rows(batch, 2))
    assert torch.equal(loss, more)
    assert all(torch.equal(grads[n], others[n]) for n in grads)
    empty, zero = gradients(model, take_rows(absent_rows(batch, 1), [3]))
    assert float(empty) == 0.0
    assert set(zero) == set(grads) == {n for n, _ in model.named_parameters()}
    assert all(not g.any() for g in zero.values())
