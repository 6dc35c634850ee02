"""LIM's acceptance list (Ravanelli and Bengio 2019); the bounds are in test_critic.py."""

import math

import pytest
import torch
from small_methods import full_batch, small, small_model, values
from torch.nn import functional as F

from mmssl import config
from mmssl.tasks.base import Impostors

NAME = "audio/lim"


def test_a_critic_of_zeros_costs_two_bits():
    model = small_model(small(NAME)).train()
    with torch.no_grad():
        for p in model.tasks["lim"].scores.parameters():
            p.zero_()
    got = values(model, full_batch(model.spec, 6))
    assert got["lim.chunks"] == pytest.approx(2 * math.log(2), abs=1e-6)


@pytest.mark.parametrize("bound", ["bce", "mine", "nce"])
def test_the_term_is_the_bound_of_own_and_of_one_other_recording(bound):
    spec = small(NAME, f"tasks.lim.pairs.chunks.objective.bound={bound}")
    model = small_model(spec).eval()
    batch = full_batch(spec, 6)
    task = model.tasks["lim"]
    z = task.vectors(model.passes(batch))
    a, b = (z[v, "z"][0][:, 0] for v in ("first", "second"))
    index, found = Impostors(batch, "first", torch.ones(6).bool()).draw("chunks/b")
    assert found.all()
    critic = task.scores["chunks"].score
    p, n = critic.pairs(a, b), critic.pairs(a, b[index])
    want = {
        "bce": -(F.logsigmoid(p).mean() + F.logsigmoid(-n).mean()),
        "mine": -(p.mean() - n.exp().mean().log()),
        "nce": -(p - (p.exp() + n.exp().sum()).log()).mean(),
    }[bound]
    assert values(model, batch)["lim.chunks"] == pytest.approx(want.item(), rel=1e-5, abs=1e-6)


def test_no_negative_is_of_the_own_recording():
    batch = full_batch(small(NAME), 40)
    g = torch.Generator().manual_seed(0)
    drawn = 0
    for i in range(300):
        batch.source_B[:] = torch.randint(0, 30, (40,), generator=g)
        index, found = Impostors(batch, "first", torch.ones(40).bool()).draw(f"{i}")
        assert not (batch.source_B[index] == batch.source_B)[found].any()
        drawn += int(found.sum())
    assert drawn > 10_000


def test_encoder_and_critic_learn_together():
    model = small_model(small(NAME)).train()
    loss, _ = model(full_batch(model.spec, 6), 0, 10)
    loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in model.tasks["lim"].parameters())
    sinc = model.towers["audio"].network.sinc
    assert float(sinc.low_hz.grad.abs().max()) > 0
    assert float(sinc.band_hz.grad.abs().max()) > 0


def test_the_file_says_what_the_paper_says():
    spec = config.load(NAME)
    view = spec.views["first"]
    assert round(view.crop_s * view.hz) == spec.towers["audio"].backbone.samples == 3200
    assert spec.tasks["lim"].pairs["chunks"].score.hidden == 256
