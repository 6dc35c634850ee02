"""Laws that hold for every method with MMV's objective, whatever its towers are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_methods import equal_rows, full_batch, small, small_model, values
from tiny_run import gradients, take_rows

from mmssl.check import fake_batch
from mmssl.model import Model
from mmssl.types import Batch, ViewBatch

CHANCE = {"released": lambda b: math.log(2 * b), "strict": lambda b: math.log(2 * b - 1),
          "symmetric": lambda b: 2 * math.log(b)}  # fmt: skip


def exact(name: str, *overrides: str) -> Model:
    """The small method in fp64."""
    return small_model(small(name, *overrides), dtype=torch.float64)


def constant_embeddings_give_chance(name: str, form: str, captions: int) -> None:
    """Acceptance 1: ln 2B, ln(2B - 1) or 2 ln B for both terms, at any number of captions."""
    overrides = [f"tasks.align.pairs.{p}.objective.form={form}" for p in ("va", "vt")]
    spec = small(name, *overrides, f"views.text.candidates={captions}")
    model, batch = small_model(spec, dtype=torch.float64), equal_rows(full_batch(spec, 16))
    for mode in (model.train, model.eval):
        got = values(mode(), batch)
        assert got == pytest.approx(
            {f"align.{p}": CHANCE[form](16) for p in ("va", "vt")}, abs=1e-9
        )


def order_is_free(name: str) -> None:
    """Acceptance 3: neither the order of the rows nor that of a row's captions matters."""
    model = exact(name).train()
    batch = fake_batch(model.spec, 6)
    want, grads = gradients(model, batch)
    for other in (take_rows(batch, [4, 1, 5, 0, 3, 2]), with_captions_reversed(batch)):
        got, others = gradients(model, other)
        assert float(got) == pytest.approx(float(want), rel=1e-6)
        for key, grad in grads.items():
            torch.testing.assert_close(others[key], grad, rtol=1e-5, atol=1e-8)


def with_captions_reversed(batch: Batch) -> Batch:
    """The captions of every row in the opposite order."""
    text = batch.views["text"]
    slots = text.present_BL.shape[1] - 1 - text.slots_P
    return replace(batch, views={**batch.views, "text": replace(text, slots_P=slots)})


def without(view: ViewBatch, rows: list[int]) -> ViewBatch:
    """The view with some rows absent; a dummy where nothing is left."""
    keep = ~torch.isin(view.rows_P, torch.tensor(rows))
    present = view.present_BL.clone()
    present[rows] = False
    dummy = not bool(keep.any())
    if dummy:
        keep[0] = True
    names = ("data", "lengths_P", "rows_P", "slots_P", "seeds_P", "start_s_P")
    return replace(
        view, present_BL=present, dummy=dummy, **{n: getattr(view, n)[keep] for n in names}
    )


def missing_texts_have_no_influence_but_their_videos_have(name: str) -> None:
    """Acceptance 4: rows without text neither score nor count, their videos are negatives."""
    model = exact(name).eval()
    batch = full_batch(model.spec, 5)
    batch.views["text"] = without(batch.views["text"], [1, 3])
    _, terms = model(batch, 0, 10)
    assert int(terms["align.vt"].count) == 3
    before = values(model, batch)
    video = batch.views["video"]
    data = video.data.clone()
    data[1] = 255 - data[1]
    batch.views["video"] = replace(video, data=data)
    after = values(model, batch)
    assert abs(after["align.vt"] - before["align.vt"]) > 1e-6


def no_text_at_all_is_zero(name: str) -> None:
    """Acceptance 4: without any text the term is 0, its gradient too, whatever the dummy holds."""
    model = exact(name, "tasks.align.pairs.va.weight=0")
    batch = full_batch(model.spec, 4)
    batch.views["text"] = without(batch.views["text"], [0, 1, 2, 3])
    loss, grads = gradients(model, batch)
    assert float(loss) == 0.0
    assert set(grads) == {n for n, _ in model.named_parameters()}
    assert all(float(g.abs().max()) == 0.0 for g in grads.values())


def a_dummys_content_has_no_influence(name: str) -> None:
    """What stands in for a missing modality changes neither loss nor gradients."""
    model = exact(name)
    batch = full_batch(model.spec, 4)
    results = []
    for ids in (7, 300):
        text = without(batch.views["text"], [0, 1, 2, 3])
        text = replace(text, data=torch.full_like(text.data, ids))
        part = replace(batch, views={**batch.views, "text": text})
        results.append(gradients(model, part))
    (loss, grads), (other, others) = results
    assert float(loss) == float(other) > 0
    for key, grad in grads.items():
        assert torch.equal(grad, others[key]), key
