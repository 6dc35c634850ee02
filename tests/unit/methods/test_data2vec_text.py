"""data2vec for text on its method file (Baevski et al. 2022)."""

from dataclasses import replace

import pytest
import torch
from text_family import padded_batch, seen_of, text_model, zeroed
from tiny_run import gradients
from torch.nn import functional as F

from mmssl import config
from mmssl.build import build_model
from mmssl.check import SPECIAL

NAME = "data2vec_text"


def test_a_zero_head_costs_what_standardised_targets_deviate():
    """One layer: D values of unit variance below beta cost D / (2 beta), sum over D."""
    # not 0.02: at width 16 the epsilon of the targets' norm would show
    fresh = "towers.text.backbone.fresh=xavier"
    model = text_model(NAME, "tasks.latents.target.layers=1", fresh).eval()
    zeroed(model.tasks["latents"].target.head.layers[-1])
    _, terms = model(padded_batch(model), 0, 10)
    loss = terms["latents"]
    # no value of 16 with mean 0 and variance 1 exceeds sqrt(15) < 4
    assert float(loss.sum / loss.count) == pytest.approx(16 / 8, rel=1e-3)


def test_the_student_reads_altered_ids_and_the_teacher_all_of_them():
    model = text_model(NAME).train()
    batch = padded_batch(model)
    task = model.tasks["latents"]
    seen = seen_of(model, batch)
    assert (seen.altered != seen.view.data)[seen.hidden_PN].any()
    assert torch.equal(seen.altered[~seen.hidden_PN], seen.view.data[~seen.hidden_PN])
    assert task.embedding is None
    truth = task.target.truth(seen)
    other = replace(seen, hidden_PN=~seen.hidden_PN, altered=torch.ones_like(seen.altered))
    assert torch.equal(task.target.truth(other), truth)
    assert not truth.requires_grad
    assert torch.equal(task.target.truth(seen), truth)


def test_targets_are_the_mean_of_normed_feed_forward_outputs():
    model = text_model(NAME).eval()
    batch = padded_batch(model)
    seen, target = seen_of(model, batch), model.tasks["latents"].target
    tower = model.towers["text"]
    caught = []
    for block in tower.trunk.blocks:
        block.ffn.register_forward_hook(lambda _, args, out: caught.append(out))
    with torch.no_grad():
        tower.layers(seen.view)
    want = sum(F.layer_norm(x, (16,)) for x in caught) / 2
    valid = ~seen.tokens.pad_PN
    torch.testing.assert_close(target.truth(seen)[valid], want[valid], atol=1e-5, rtol=0)


def test_spans_are_always_replaced_by_the_mask():
    mask = "{rule: spans, length: 4, start_prob: 0.0875, shares: [1.0, 0.0]}"
    model = text_model(NAME, f"tasks.latents.mask={mask}")
    seen = seen_of(model, padded_batch(model))
    assert seen.hidden_PN.any(1).all()
    assert (seen.altered[seen.hidden_PN] == SPECIAL["mask"]).all()


def test_every_parameter_learns_and_the_teacher_follows():
    model = text_model(NAME)
    _, grads = gradients(model, padded_batch(model))
    assert set(grads) == {n for n, _ in model.named_parameters()}
    teacher = dict(model.tasks["latents"].target.teacher.twin.named_buffers())
    student = dict(model.towers["text"].trunk.named_parameters())
    assert set(teacher) == set(student)
    before = {n: t.clone() for n, t in teacher.items()}
    with torch.no_grad():
        for p in student.values():
            p += 1.0
    model.after_step(0, 100)  # decay 0.999 at the start
    for name, tensor in teacher.items():
        want = 0.999 * before[name] + 0.001 * student[name]
        torch.testing.assert_close(tensor, want, atol=1e-6, rtol=0)


def test_constants_of_the_file():
    spec = config.load("general/data2vec_text")
    task = spec.tasks["latents"]
    target = task.target
    assert (target.layers, target.tap, target.norm, target.loss) == (
        10,
        "ffn",
        "layer",
        "smooth_l1_sum",
    )
    assert (target.beta, task.hidden, task.mask.shares) == (4.0, 1536, (0.8, 0.1))
    with torch.device("meta"):
        model = build_model(spec, 50000, SPECIAL)
    # RoBERTa base without its 2 unused places, its one segment and its language head
    tables, layer = (50000 + 512) * 768 + 2 * 768, 12 * 768**2 + 13 * 768
    assert sum(p.numel() for p in model.towers.parameters()) == tables + 12 * layer
