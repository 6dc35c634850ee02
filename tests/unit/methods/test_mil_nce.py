"""MIL-NCE on configs/methods/avt/mil_nce.yaml (Miech et al. 2020)."""

import math
from dataclasses import replace

import pytest
import torch
from small_methods import equal_rows, full_batch, small, small_model, values
from tiny_run import gradients
from triplet_laws import exact, order_is_free, without

from mmssl import config
from mmssl.build import build_model, data_shape
from mmssl.check import SPECIAL, VOCABULARY

NAME = "avt/mil_nce"


def vectors(model, batch):
    """Videos (B, S) and narrations (B, L, S) as the score reads them."""
    z = model.tasks["align"].vectors(model.passes(batch))
    return z["video", "vt"][0][:, 0], z["text", "vt"][0]


def released(video, text):
    """The authors' loss: lse of row and column of the table, own narrations twice, minus own."""
    rows, slots = text.shape[:2]

    def lse(pairs):
        """Of video i and narration k of row j, for (i, j, k)."""
        return math.log(math.fsum(math.exp(float(video[i] @ text[j, k])) for i, j, k in pairs))

    places = [(j, k) for j in range(rows) for k in range(slots)]
    losses = [
        lse([(i, j, k) for j, k in places] + [(j, i, k) for j, k in places])
        - lse([(i, i, k) for k in range(slots)])
        for i in range(rows)
    ]
    return math.fsum(losses) / rows


def test_the_file_is_the_released_recipe():
    spec = config.load(NAME)
    with torch.device("meta"):
        model = build_model(spec, VOCABULARY, SPECIAL)
    shape = data_shape("video", spec.views["video"])
    assert shape == (16, 224, 224, 3)
    assert model.towers["video"].grid_of(shape) == (2, 7, 7)
    assert sum(p.numel() for p in model.towers["video"].parameters()) == 9_125_072
    heads = model.tasks["align"].embedder.heads.heads
    maps = {name: [tuple(p.shape) for p in head.parameters()] for name, head in heads.items()}
    assert maps == {
        "video_to_vt": [(512, 1024), (512,)], "text_to_vt": [(512, 2048), (512,)]
    }  # fmt: skip
    assert (spec.views["text"].candidates, spec.views["text"].length) == (4, 20)
    assert (spec.optim.kind, spec.optim.lr, spec.optim.warmup) == ("adam", 1e-3, 10000)
    # 300 epochs of 1 238 911 videos
    assert spec.train.steps * spec.train.batch == pytest.approx(300 * 1238911, rel=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_is_the_released_one(training):
    model = exact(NAME).train(training)
    batch = full_batch(model.spec, 5)
    expected = released(*vectors(model, batch))
    assert values(model, batch)["align.vt"] == pytest.approx(expected, rel=1e-6)


def test_vectors_have_their_own_length_and_no_temperature():
    """Twice the vectors of both sides are four times the logits: not so for unit vectors."""
    model = exact(NAME).eval()
    batch = full_batch(model.spec, 4)
    video, text = vectors(model, batch)
    with torch.no_grad():
        for head in model.tasks["align"].embedder.heads.heads.values():
            for p in head.parameters():
                p.mul_(2)
    doubled = values(model, batch)["align.vt"]
    assert doubled == pytest.approx(released(2 * video, 2 * text), rel=1e-6)
    assert abs(doubled - released(video, text)) > 1e-4
    assert float(model.tasks["align"].scales["vt"].scale) == 1.0


@pytest.mark.parametrize("narrations", [1, 4])
def test_constant_embeddings_give_chance(narrations):
    """ln 2B at any number of narrations."""
    spec = small(NAME, f"views.text.candidates={narrations}")
    model, batch = small_model(spec, dtype=torch.float64), equal_rows(full_batch(spec, 16))
    for mode in (model.train, model.eval):
        assert values(mode(), batch)["align.vt"] == pytest.approx(math.log(32), abs=1e-9)


def test_order_of_rows_and_narrations_is_free():
    order_is_free(NAME)


def test_one_fitting_narration_is_enough():
    """Where one narration fits far better, what the others say hardly matters."""
    g = torch.Generator().manual_seed(0)
    video, text = torch.randn(4, 32, generator=g), torch.randn(4, 3, 32, generator=g)
    text[:, 1] = 2 * video
    noise = text.clone()
    noise[:, 2] = torch.randn(4, 32, generator=g)
    assert released(video, text) == pytest.approx(math.log(2), abs=0.01)  # counted twice
    assert released(video, noise) == pytest.approx(math.log(2), abs=0.01)


def test_rows_without_narration_count_for_nothing_but_their_videos_do():
    model = exact(NAME).eval()
    batch = full_batch(model.spec, 5)
    batch.views["text"] = without(batch.views["text"], [1, 3])
    _, terms = model(batch, 0, 10)
    assert int(terms["align.vt"].count) == 3
    before = values(model, batch)["align.vt"]
    video = batch.views["video"]
    data = video.data.clone()
    data[1] = 255 - data[1]
    batch.views["video"] = replace(video, data=data)
    assert abs(values(model, batch)["align.vt"] - before) > 1e-6
    empty = replace(batch, views={**batch.views, "text": without(batch.views["text"], [0, 2, 4])})
    loss, grads = gradients(model, empty)
    assert float(loss) == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in grads.values())


def test_fewer_narrations_than_places_are_as_many_as_there_are():
    """A clip with one narration scores that one; the empty places compete with nobody."""
    model = exact(NAME).eval()
    batch = full_batch(model.spec, 4)
    text = batch.views["text"]
    keep = ~((text.rows_P == 1) & (text.slots_P > 0))
    present = text.present_BL.clone()
    present[1, 1:] = False
    names = ("data", "lengths_P", "rows_P", "slots_P", "seeds_P", "start_s_P")
    fewer = {n: getattr(text, n)[keep] for n in names}
    batch.views["text"] = replace(text, present_BL=present, **fewer)
    video, z = vectors(model, batch)
    logits = torch.einsum("is,jls->ijl", video, z)
    losses = []
    for i in range(4):
        row, column = logits[i][present], logits[:, i][:, present[i]]
        both = torch.cat([row, column.flatten()])
        losses.append(both.logsumexp(0) - logits[i, i][present[i]].logsumexp(0))
    got = values(model, batch)["align.vt"]
    assert got == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)
