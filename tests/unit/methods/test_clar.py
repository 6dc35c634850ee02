"""CLAR's acceptance list (Al-Tahan and Mohsenzadeh 2021)."""

import math
from dataclasses import replace

import pytest
import torch
from small_methods import equal_rows, full_batch, small, small_model, values

from mmssl import config

NAME = "audio/clar"
RAW = "towers.audio.use=audio_clar_raw"
VIEWS, CLASSES = "contrast.views", ("classes", "classes.two")


@pytest.fixture(scope="module")
def model():
    return small_model(small(NAME)).eval()


def blind(model):
    """Class logits of zero."""
    with torch.no_grad():
        for p in model.tasks["classes"].out.parameters():
            p.zero_()
    return model


def test_equal_vectors_and_blind_classes():
    model = blind(small_model(small(NAME)).eval())
    batch = equal_rows(full_batch(model.spec, 8))
    batch.views["two"] = batch.views["one"]
    got = values(model, batch)
    assert got[VIEWS] == pytest.approx(math.log(15), abs=1e-4)
    assert [got[c] for c in CLASSES] == pytest.approx([math.log(10)] * 2, abs=1e-5)
    loss, _ = model(batch, 0, 10)
    assert loss.item() == pytest.approx(math.log(15) + 2 * math.log(10), abs=1e-3)
    rows = config.load(NAME).train.batch
    assert math.log(2 * rows - 1) + 2 * math.log(10) == pytest.approx(10.8415, abs=1e-4)


def test_only_labelled_rows_are_classified(model):
    batch = full_batch(model.spec, 6)
    _, terms = model(batch, 0, 10)
    alone = values(model, replace(batch, meta=[*batch.meta[:2], {}, {}, {"digit": "none"}, {}]))
    two = replace(batch, meta=[*batch.meta[:2], *[{}] * 4])
    _, some = model(two, 0, 10)
    assert [int(terms[c].count) for c in CLASSES] == [6, 6]
    assert [int(some[c].count) for c in CLASSES] == [2, 2]
    assert alone[VIEWS] == pytest.approx(values(model, batch)[VIEWS])


def test_without_labels_the_classes_learn_nothing():
    model = small_model(small(NAME)).train()
    batch = replace(full_batch(model.spec, 6), meta=[{}] * 6)
    loss, terms = model(batch, 0, 10)
    loss.backward()
    assert [float(terms[c].sum) for c in CLASSES] == [0, 0]
    assert all(not p.grad.any() for p in model.tasks["classes"].parameters())
    head = model.tasks["contrast"].embedder.heads.heads["audio_to_u"].layers[0]
    assert float(head.weight.grad.abs().max()) > 0


def test_classes_are_read_before_the_vector_is_normalised(model):
    batch = full_batch(model.spec, 6)
    u = model.tasks["contrast"].vectors(model.passes(batch))["one", "u"][0][:, 0]
    norm, relu, linear = model.tasks["classes"].out.layers
    logits = linear(relu(norm(u, torch.ones(6, dtype=torch.bool))))
    want = torch.nn.functional.cross_entropy(logits, torch.arange(6))
    assert values(model, batch)["classes"] == pytest.approx(want.item(), rel=1e-5)
    assert not torch.allclose(u.norm(dim=1), torch.ones(6))


def test_both_branches_have_the_published_widths():
    spectral, raw = config.load(NAME), config.load(NAME, [RAW])
    assert spectral.towers["audio"].frontend.kind == "spectrum_stack"
    assert raw.towers["audio"].backbone.kind == "wave_resnet18"
    model = small_model(small(NAME, RAW)).train()
    assert model.towers["audio"].width == 512
    loss, _ = model(full_batch(model.spec, 4), 0, 10)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
