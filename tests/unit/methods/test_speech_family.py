"""wav2vec 2.0, HuBERT, WavLM, data2vec: parameter counts, analytic losses, what reaches what."""

import math
from dataclasses import replace

import pytest
import torch
from small_methods import WAVE_TOWER

from mmssl import config
from mmssl.build import build_model
from mmssl.check import fake_batch
from mmssl.targets import latents
from mmssl.tasks.masked import Masked
from mmssl.train.health import effective_rank

TINY = (
    "towers.audio.cut.channels=16",
    "towers.audio.backbone.width=32",
    "towers.audio.backbone.head_size=16",
    "towers.audio.backbone.hidden=64",
    "towers.audio.backbone.layers=3",
    "towers.audio.backbone.dropout=0",
    "towers.audio.positions.groups=4",
    "views.x.crop_s=1.0",
)


def model_of(name, *overrides, seed=0):
    torch.manual_seed(seed)
    wave = WAVE_TOWER.get(f"{name}_tiny", ())
    spec = config.load(f"runs/{name}_tiny", [*wave, *TINY, *overrides])
    return build_model(spec, 0, None).train(), spec


def batch_of(spec, rows=4, seed=0):
    return fake_batch(spec, rows, seed, missing=False)


def masked(model):
    return next(task for task in model.tasks.values() if isinstance(task, Masked))


def value(terms, name):
    return float(terms[name].sum / terms[name].count)


def encoder_size(model):
    """Parameters of the tower and the mask embedding, as the encoder classes of others count."""
    return sum(p.numel() for p in model.towers.parameters()) + masked(model).embedding.numel()


# Measured on transformers' classes.
SIZES = {
    "wav2vec2_base": (95_044_608, None),
    "wav2vec2_large": (317_390_592, None),
    "hubert_it1": (None, 94_371_712),
    "wavlm_base": (None, 94_381_936),
    "data2vec_audio": (None, 93_164_288),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_are_those_of_the_released_models(name):
    spec = config.load(f"speech/{name}")
    with torch.device("meta"):
        model = build_model(spec, 0, None)
    whole, encoder = SIZES[name]
    if whole is not None:
        assert sum(p.numel() for p in model.parameters()) == whole
    if encoder is not None:
        assert encoder_size(model) == encoder


# ---------------------------------------------------------------- wav2vec 2.0


def test_an_empty_head_of_wav2vec2_scores_as_many_negatives_as_differ():
    model, spec = model_of("wav2vec2_base", "tasks.mam.target.negatives=100")
    target = masked(model).target
    with torch.no_grad():
        for parameter in target.of_context.parameters():
            parameter.zero_()
    _, terms = model(batch_of(spec), 0, 10)
    assert 3.5 < value(terms, "mam.nce") <= math.log(101) + 1e-5
    assert value(terms, "mam.diversity") < 1 - 2 / 128 + 1e-5
    assert 2 <= value(terms, "mam.perplexity") <= 128


def test_a_fresh_wav2vec2_costs_a_little_less_or_more_than_chance():
    """Heads and codebook of BASE on a narrow tower: the card's range for random weights."""
    sizes = ("quantizer.entries=320", "quantizer.width=256", "space=256", "negatives=100")
    changes = [f"tasks.mam.target.{text}" for text in sizes]
    model, spec = model_of("wav2vec2_base", *changes, "views.x.crop_s=4.0")
    with torch.no_grad():
        _, terms = model(batch_of(spec), 0, 10)
    assert int(terms["mam.nce"].count) > 400
    assert 4.58 < value(terms, "mam.nce") < 4.67


def test_gradients_of_wav2vec2_reach_every_part_and_the_penalty_the_convolutions_alone():
    model, spec = model_of("wav2vec2_base")
    task = masked(model)
    terms = task(model.passes(batch_of(spec), 0.0), batch_of(spec))
    terms["features"].sum.backward()
    moved = {
        n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    assert moved
    assert all(".stem.convs." in n or ".stem.norms." in n for n in moved)
    model.zero_grad(set_to_none=True)
    task(model.passes(batch_of(spec), 0.0), batch_of(spec))["nce"].sum.backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert not unused


def test_what_is_under_the_mask_reaches_the_quantiser_alone():
    # a norm per frame: the group norm of BASE lets every frame know a little of every other
    model, spec = model_of("wav2vec2_base", "towers.audio.cut.norm=layer")
    model.eval()
    task, batch = masked(model), batch_of(spec, 2)
    seen = task._seen(model.passes(batch), batch)
    view, hidden = batch.views["x"], seen.hidden_PN[0]
    frame = next(i for i in range(1, 90) if hidden[i - 1] and hidden[i])
    other = view.data.clone()
    # frame i sees samples 80 i to 80 i + 160: these are those of two hidden frames
    other[0, frame * 80 : (frame + 1) * 80] += 1.0
    changed = replace(batch, views={"x": replace(view, data=other)})
    again = task._seen(model.passes(changed), changed)
    torch.testing.assert_close(again.tokens.x_PND, seen.tokens.x_PND, atol=1e-6, rtol=0)
    moved = (again.features_PNE - seen.features_PNE).abs().amax(-1)[0]
    assert moved.nonzero()[:, 0].tolist() == [frame - 1, frame]


# ---------------------------------------------------------------- HuBERT, WavLM


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("hubert_it1", {"units_mfcc_0": 50, "units_mfcc_1": 200, "units_mfcc_2": 500}),
        ("wavlm_base", {"units": 100}),
    ],
)
def test_an_empty_projection_costs_the_logarithm_of_the_clusters(name, classes):
    model, spec = model_of(name)
    target = masked(model).target
    with torch.no_grad():
        for key, parameter in target.named_parameters():
            if key.startswith("project"):
                parameter.zero_()
    _, terms = model(batch_of(spec), 0, 10)
    for term, count in classes.items():
        assert value(terms, f"mam.{term}") == pytest.approx(math.log(count), abs=1e-5)


def test_only_masked_frames_with_a_label_count():
    model, spec = model_of("hubert_it1")
    batch = batch_of(spec)
    task = masked(model)
    seen = task._seen(model.passes(batch, 0.0), batch)
    terms = task.target(seen)
    assert int(terms["units_mfcc_0"].count) == int(seen.hidden_PN.sum())
    labels = batch.views["x"].labels["mfcc"]
    labels.ids[0] = -1
    terms = task.target(seen)
    assert int(terms["units_mfcc_0"].count) == int(seen.hidden_PN[1:].sum())


def test_wavlm_mixes_in_training_and_not_in_evaluation():
    model, spec = model_of("wavlm_base", "views.x.mix.probability=1.0")
    batch = batch_of(spec)
    mixed = model._mixed(batch).views["x"]
    assert not torch.equal(mixed.data, batch.views["x"].data)
    for name, labels in batch.views["x"].labels.items():  # those of the utterance without the mix
        assert torch.equal(mixed.labels[name].ids, labels.ids)
    assert torch.equal(model.eval()._mixed(batch).views["x"].data, batch.views["x"].data)


# ---------------------------------------------------------------- data2vec


def data2vec(*overrides):
    # larger first weights: at this width the published ones leave variances near the norm's eps
    options = ("tasks.latents.target.layers=1", "towers.audio.backbone.fresh=xavier")
    return model_of("data2vec_audio", *options, *overrides)


def test_an_empty_head_of_data2vec_costs_the_root_of_the_width():
    model, spec = data2vec()
    with torch.no_grad():
        for parameter in masked(model).target.head.parameters():
            parameter.zero_()
    _, terms = model(batch_of(spec), 0, 10)
    # instance norm: every channel of a row has unit variance over all its frames
    assert value(terms, "latents") == pytest.approx(math.sqrt(32), rel=0.05)
    assert value(terms, "latents.target_std") == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_averaged_layers_cost_what_independent_ones_would_or_more(layers):
    """sqrt(D) / K if the layers are independent, sqrt(D) if they are equal (27.71 / 8 for BASE)."""
    model, spec = data2vec(f"tasks.latents.target.layers={layers}")
    with torch.no_grad():
        for parameter in masked(model).target.head.parameters():
            parameter.zero_()
        _, terms = model(batch_of(spec, rows=16), 0, 10)
    assert 0.9 / layers < value(terms, "latents") / math.sqrt(32) < 1.05
    assert math.sqrt(768) / 8 == pytest.approx(3.46, abs=0.005)


def test_the_teacher_sees_everything_and_learns_nothing_by_gradient():
    model, spec = data2vec()
    task, batch = masked(model), batch_of(spec)
    seen = task._seen(model.passes(batch, 0.0), batch)
    truth = task.target.truth(seen)
    task.name = "another stream"
    other = task._seen(model.passes(batch, 0.0), batch)
    assert not torch.equal(other.hidden_PN, seen.hidden_PN)
    assert torch.equal(task.target.truth(other), truth)
    assert not truth.requires_grad
    assert not any("teacher" in name for name, _ in model.named_parameters())


def test_the_teacher_moves_with_the_steps_of_training():
    model, _ = data2vec("tasks.latents.target.decay=0.5")
    teacher = masked(model).target.teacher
    before = {k: v.clone() for k, v in teacher.twin.state_dict().items()}
    with torch.no_grad():
        for parameter in model.towers["audio"].trunk.parameters():
            parameter.add_(1.0)
    model.after_step(0, 10)
    for name, after in teacher.twin.state_dict().items():
        torch.testing.assert_close(after, before[name] + 0.5)


def test_decay_of_the_teacher_is_the_papers():
    from mmssl.schedules import resolve

    spec = config.load("speech/data2vec_audio")
    decay = spec.tasks["latents"].target.decay
    assert resolve(decay, 15_000 / 400_000) == pytest.approx(0.99945)
    assert resolve(decay, 30_001 / 400_000) == 0.9999


# ---------------------------------------------------------------- collapses


def low(model, terms):
    """Terms below their floors."""
    floors = {name: floor for name, floor in model.floors.items() if name in terms}
    return [name for name, floor in floors.items() if value(terms, name) < floor.least]


def test_a_group_that_knows_one_code_is_below_the_floor():
    model, spec = model_of("wav2vec2_base")
    batch = batch_of(spec)
    _, terms = model(batch, 0, 10)
    assert low(model, terms) == []
    quantizer = masked(model).target.quantizer
    with torch.no_grad():
        quantizer.logits.bias[70] = 1e4  # the second of the two groups
    _, terms = model(batch, 0, 10)
    assert low(model, terms) == ["mam.usage"]
    assert value(terms, "mam.usage") == pytest.approx(1 / 64)


def test_units_that_are_always_the_same_are_below_the_floor():
    model, spec = model_of("hubert_it1")
    batch = batch_of(spec)
    _, terms = model(batch, 0, 10)
    assert low(model, terms) == []
    assert 1.5 < value(terms, "mam.predicted") <= 50
    with torch.no_grad():
        masked(model).target.codewords_mfcc_0.copy_(torch.ones(50, 64))
    _, terms = model(batch, 0, 10)
    assert value(terms, "mam.predicted") == pytest.approx(1.0)
    assert low(model, terms) == ["mam.predicted"]


def test_a_teacher_that_says_the_same_of_all_frames_is_below_the_floor():
    model, spec = model_of("data2vec_audio")
    batch, teacher = batch_of(spec), masked(model).target.teacher
    model(batch, 0, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    model.after_step(0, 10)
    _, terms = model(batch, 1, 10)
    assert low(model, terms) == []
    assert effective_rank(model.last_embeddings["latents.targets"]) > 8
    with torch.no_grad():
        for name, buffer in teacher.twin.named_buffers():
            if ".ffn." in name:
                buffer.zero_()
    _, terms = model(batch, 1, 10)
    assert low(model, terms) == ["latents.target_std"]
    assert effective_rank(model.last_embeddings["latents.targets"]) == 0


def test_a_teacher_that_is_the_student_is_below_the_floor():
    model, spec = model_of("data2vec_audio", "tasks.latents.target.decay=0")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    model.after_step(0, 10)
    _, terms = model(batch_of(spec), 1, 10)
    assert low(model, terms) == ["latents.teacher_lag"]


def test_the_vectors_whose_rank_is_watched_are_a_sample_of_the_hidden_frames(monkeypatch):
    monkeypatch.setattr(latents, "_WATCHED", 20)
    model, spec = model_of("data2vec_audio")
    task, batch = masked(model), batch_of(spec)
    seen = task._seen(model.passes(batch), batch)
    task.target(seen)
    truth_HD = task.target.truth(seen)[seen.hidden_PN]
    assert len(truth_HD) > 60
    assert torch.equal(task.target.last["targets"], truth_HD[:: len(truth_HD) // 20])
