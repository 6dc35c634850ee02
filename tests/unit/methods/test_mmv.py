"""MMV's acceptance list on configs/methods/avt/mmv_fac.yaml (Alayrac et al. 2020)."""

import math
from dataclasses import replace

import pytest
import torch
import triplet_laws as laws
from small_methods import full_batch, small, small_model, values
from tiny_run import gradients
from torch.nn import functional as F
from toy_triplets import causes, quantised, recall_at_1, toy_model, train, triplets

from mmssl import config
from mmssl.build import build_model
from mmssl.check import SPECIAL, VOCABULARY

NAME = "avt/mmv_fac"


# ---------------------------------------------------------------- chance, order, masks


@pytest.mark.parametrize(
    ("form", "captions"), [("released", 1), ("released", 5), ("strict", 2), ("symmetric", 2)]
)
def test_constant_embeddings_give_chance(form, captions):
    laws.constant_embeddings_give_chance(NAME, form, captions)


def test_the_published_numbers_of_chance():
    assert math.log(2 * 16) == pytest.approx(3.4657, abs=5e-5)
    assert math.log(2 * 16 - 1) == pytest.approx(3.4340, abs=5e-5)
    spec = config.load(NAME)
    assert math.log(2 * spec.train.batch) == pytest.approx(9.011, abs=5e-4)  # the file's header


def test_order_of_rows_and_captions_is_free():
    laws.order_is_free(NAME)


def test_missing_texts_have_no_influence_but_their_videos_have():
    laws.missing_texts_have_no_influence_but_their_videos_have(NAME)


def test_no_text_at_all_is_zero():
    laws.no_text_at_all_is_zero(NAME)


def test_a_dummys_content_has_no_influence():
    laws.a_dummys_content_has_no_influence(NAME)


# ---------------------------------------------------------------- fine and coarse spaces


def test_the_file_is_the_published_graph():
    spec = config.load(NAME)
    task = spec.tasks["align"]
    assert task.heads.graph == "fac"
    assert {n: s.dim for n, s in task.heads.spaces.items()} == {"va": 512, "vat": 256}
    assert {n: p.objective.temperature for n, p in task.pairs.items()} == {"va": 0.07, "vt": 0.07}
    assert {p.objective.form for p in task.pairs.values()} == {"released"}
    assert not any(p.objective.learned for p in task.pairs.values())
    assert spec.views["text"].candidates == 5
    with torch.device("meta"):
        heads = build_model(spec, VOCABULARY, SPECIAL).tasks["align"].embedder.heads
    assert sorted(heads.heads) == ["audio_to_va", "text_to_vat", "video_to_va"]
    first, second = heads.heads["video_to_va"].layers[0], heads.heads["video_to_va"].layers[3]
    assert first.bias is not None
    assert second.bias is None


def test_audio_reaches_the_coarse_space_in_evaluation_only():
    spec = small(NAME)
    model, batch = small_model(spec), full_batch(spec, 4)
    model.train()
    trained = set(model.tasks["align"].vectors(model.passes(batch)))
    assert trained == {("video", "va"), ("audio", "va"), ("video", "vat"), ("text", "vat")}
    assert set(model.embed(batch)) == trained | {("audio", "vat")}
    model.eval()
    assert model.space_for("audio", "text") == "vat"
    assert model.space_for("video", "audio") == "va"
    assert model.space_for("text", "video") == "vat"


def test_spaces_are_known_while_training_too():
    model = small_model(small(NAME)).train()
    assert model.space_for("audio", "text") == "vat"
    assert model.training


def test_evaluation_leaves_the_batch_statistics_alone():
    spec = small(NAME)
    model, batch = small_model(spec).train(), full_batch(spec, 4)
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.embed(batch)
    assert model.training
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    model(batch, 0, 10)
    changed = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert changed == {n for n in before if "running" in n or "num_batches" in n}


def test_the_coarse_audio_vector_goes_through_the_videos_head():
    spec = small(NAME)
    model, batch = small_model(spec).eval(), full_batch(spec, 4)
    heads = model.tasks["align"].embedder.heads
    z = model.tasks["align"].vectors(model.passes(batch))
    _, linear, norm = heads.va_vat.layers
    for view in ("audio", "video"):
        coarse = norm(linear(F.relu(z[view, "va"][0][:, 0])))
        torch.testing.assert_close(z[view, "vat"][0][:, 0], coarse)


def test_text_teaches_the_video_and_never_the_audio():
    spec = small(NAME, "tasks.align.pairs.va.weight=0")
    model = small_model(spec)
    _, grads = gradients(model, full_batch(spec, 4))
    reached = {
        n.split(".")[1] for n, g in grads.items() if n.startswith("towers") and g.abs().max() > 0
    }
    assert reached == {"video", "text"}


# ---------------------------------------------------------------- toy triplets


def batch_of(seed, rows):
    cause = causes(rows, seed)
    return triplets(cause, quantised(cause), seed)


@pytest.fixture(scope="module")
def trained():
    model = toy_model(NAME)
    train(model, lambda step: batch_of(1000 + step, 96), 130)
    return model.eval()


def test_toy_triplets_are_found_and_audio_text_though_never_trained(trained):
    """Acceptance 7: 256 triplets that were not trained on, chance 1 / 256."""
    z = {key: vectors for key, (vectors, _) in trained.embed(batch_of(5, 256)).items()}
    video_audio = recall_at_1(z["video", "va"], z["audio", "va"])
    video_text = recall_at_1(z["video", "vat"], z["text", "vat"])
    audio_text = recall_at_1(z["audio", "vat"], z["text", "vat"])
    assert video_audio > video_text > 50 / 256
    assert audio_text > 10 / 256


def test_rolled_audio_makes_a_trained_loss_worse_than_chance(trained):
    batch = batch_of(5, 64)
    right = values(trained, batch)
    audio = batch.views["audio"]
    batch.views["audio"] = replace(audio, data=audio.data.roll(1, 0))
    wrong = values(trained, batch)
    assert right["align.va"] < 0.75 * math.log(128)
    assert wrong["align.va"] > math.log(128)
    assert wrong["align.vt"] == pytest.approx(right["align.vt"], rel=1e-6)


def test_disjoint_spaces_cannot_compare_audio_and_text():
    spaces = ("graph=disjoint", "spaces.vat=null", "spaces.vt.dim=32")
    model = toy_model(
        NAME, *(f"tasks.align.heads.{s}" for s in spaces), "tasks.align.pairs.vt.space=vt"
    )
    train(model, lambda step: batch_of(1000 + step, 64), 40)
    model.eval()
    assert model.space_for("audio", "text") is None
    z = {key: vectors for key, (vectors, _) in model.embed(batch_of(5, 256)).items()}
    assert set(z) == {("video", "va"), ("audio", "va"), ("video", "vt"), ("text", "vt")}
    assert recall_at_1(z["audio", "va"], z["text", "vt"]) <= 4 / 256
