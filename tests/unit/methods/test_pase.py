"""PASE's acceptance list (Pascual et al. 2019); the encoder's is in test_pase_encoder.py."""

import math

import pytest
import torch
from small_methods import full_batch, small, small_model, values
from torch.nn import functional as F

from mmssl import config
from mmssl.tasks.base import Impostors
from mmssl.types import UserError

NAME = "speech/pase"


@pytest.fixture(scope="module")
def model():
    return small_model(small(NAME))


def last_layers(model):
    for name in ("waveform", "lps", "mfcc", "prosody"):
        yield model.tasks[name].decoder.layers[-1]
    yield from (model.tasks["mi"].scores[k].score.out for k in ("lim", "gim"))
    yield model.tasks["spc"].head[-1]


def test_heads_of_zeros():
    model = small_model(small(NAME)).train()
    for layer in last_layers(model):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    batch = full_batch(model.spec, 6)
    got = values(model, batch)
    assert got["lps"] == pytest.approx(1.0, abs=1e-4)
    assert got["mfcc"] == pytest.approx(1.0, abs=1e-4)
    assert got["mi.lim"] == got["mi.gim"] == pytest.approx(2 * math.log(2), abs=1e-6)
    assert got["spc"] == pytest.approx(math.log(2), abs=1e-6)
    task = model.tasks["prosody"]  # noise has no voice: two of four numbers never change
    truth, valid = task.truth(batch.views["anchor"], 40)
    assert got["prosody"] == pytest.approx(float(truth[valid].square().mean()), rel=1e-3)


def test_pitch_and_voicing_of_voices_cost_one_at_heads_of_zeros():
    """Every number of prosody varies: voices that rise, each silent but for hiss in one half."""
    model = small_model(small(NAME)).train()
    last = model.tasks["prosody"].decoder.layers[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    batch = full_batch(model.spec, 6)
    wave = batch.views["anchor"].data
    seconds = torch.arange(wave.shape[1]) / 16000
    start = torch.linspace(90, 240, 6)[:, None]
    phase = 2 * math.pi * (start * seconds + 60 * seconds**2)
    voice = sum(torch.sin(n * phase) / n for n in range(1, 9))
    first_half = (seconds < seconds[-1] / 2) == (torch.arange(6) % 2 == 0)[:, None]
    batch.views["anchor"].data = 0.2 * voice * first_half + 0.01 * wave
    assert values(model, batch)["prosody"] == pytest.approx(1.0, abs=1e-3)


def test_frames_are_compared_with_those_of_the_same_index(model):
    """LIM from its formula, on the encoder's tokens: own frame t, and frame t of another row."""
    model.eval()
    batch = full_batch(model.spec, 6)
    passes = model.passes(batch)
    a, b = (passes.tokens(v).x_PND.unflatten(1, (8, 5)) for v in ("anchor", "context"))
    a, b = (x.mean(2) for x in (a, b))  # the 40 frames of a small view in 8 steps
    index, found = Impostors(batch, "anchor", torch.ones(6).bool()).draw("lim/b")
    assert found.all()
    critic = model.tasks["mi"].scores["lim"].score
    own = torch.stack([critic.pairs(a[:, t], b[:, t]) for t in range(8)])
    false = torch.stack([critic.pairs(a[:, t], b[index, t]) for t in range(8)])
    want = -(F.logsigmoid(own) + F.logsigmoid(-false)).mean()
    assert values(model, batch)["mi.lim"] == pytest.approx(want.item(), rel=1e-5)


def test_a_context_that_is_the_random_chunk_tells_nothing(model):
    """Own and false pairs are the same pairs: no critic is better than even."""
    model.eval()
    batch = full_batch(model.spec, 6)
    data = batch.views["context"].data
    data[:] = data[:1]
    got, passes = values(model, batch), model.passes(batch)
    for name, pool in (("lim", "frames"), ("gim", "mean")):
        z = {v: model.tasks["mi"].vectors(passes)[v, pool][0] for v in ("anchor", "context")}
        own = model.tasks["mi"].scores[name].pairs((z["anchor"],), (z["context"],))
        loss = (F.softplus(-own) + F.softplus(own)).mean()
        assert got[f"mi.{name}"] == pytest.approx(loss.item(), rel=1e-5)
        assert loss.item() >= 2 * math.log(2)


def test_later_and_earlier_stretches():
    task = small_model(config.load(NAME, ["towers.audio.backbone.channels=[8,8,8,8,8,8,8]"])).tasks[
        "spc"
    ]
    steps = torch.tensor([41, 100, 60, 40]).repeat_interleave(500)
    seeds = torch.randint(0, 2**62, (2000,), generator=torch.Generator().manual_seed(0))
    (step, after, before), fits = task.places(steps, seeds)
    assert fits.tolist() == (steps > 40).tolist()
    step, after, before, steps = (x[fits] for x in (step, after, before, steps))
    assert (after - step >= 16).all()
    assert (after + 4 < steps).all()
    assert (before >= 0).all()
    assert (step - (before + 4) >= 16).all()
    whole = steps == 100
    for drawn, last in ((step, 79), (after, 95), (before, 59)):
        assert int(drawn[whole].max()) > last - 16
    assert (step[steps == 41] == 20).all()


def test_reversing_the_frames_swaps_later_and_earlier(model):
    """Step t becomes N - 1 - t, a later stretch one that is as far before it, and the reverse."""
    task = model.tasks["spc"]
    steps = torch.full((64,), 40)
    (step, after, before), _ = task.places(steps, torch.arange(64))
    frames, gap = task.spec.frames, task.spec.gap
    turned, first, last = 39 - step, 39 - (after + frames - 1), 39 - before
    assert (turned - (first + frames - 1) >= gap).all()
    assert (last - (frames - 1) - turned >= gap).all()
    x = torch.randn(64, 40, 16)
    marked = x.gather(1, (after[:, None] + torch.arange(frames))[..., None].expand(-1, -1, 16))
    there = x.flip(1).gather(
        1, (first[:, None] + torch.arange(frames))[..., None].expand(-1, -1, 16)
    )
    torch.testing.assert_close(there, marked.flip(1))


def test_seven_workers_train_one_encoder():
    model = small_model(small(NAME)).train()
    batch = full_batch(model.spec, 6)
    sinc = model.towers["audio"].network.sinc.low_hz
    for name, task in model.tasks.items():
        model.zero_grad()
        for term, (total, count) in task(model.passes(batch), batch).items():
            if task.weight(term)[-1]:
                (total / count).backward(retain_graph=True)
        assert float(sinc.grad.abs().max()) > 0, name
        for other, p in model.tasks.named_parameters():
            assert (p.grad is None) == (other.split(".")[0] != name), other


def test_the_context_is_what_nobody_regresses():
    """Its sound reaches LIM and GIM only."""
    model = small_model(small(NAME)).eval()
    batch = full_batch(model.spec, 6)
    before = values(model, batch)
    batch.views["context"].data *= -1
    after = values(model, batch)
    changed = {name for name in before if abs(before[name] - after[name]) > 1e-7}
    assert changed == {"mi.lim", "mi.gim"}


def test_another_backbone_by_a_preset():
    """The workers read any tokens: one every 10 ms of a waveform, on the shared transformer."""
    tower = "towers.audio={modality: audio, frontend: {kind: waveform}, backbone: shared, "
    tower += "cut: {kind: patches, patch: [160]}, use: null}"
    shared = "shared={width: 100, layers: 1, heads: 2}"
    spec = config.load(NAME, [tower, shared])
    model = small_model(spec)
    loss, _ = model(full_batch(spec, 2), 0, 10)
    loss.backward()
    assert all(p.grad is not None for p in model.trunk.parameters())


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="per_step: compares the steps of a space"):
        small_model(small(NAME, "tasks.mi.pairs.gim.objective.per_step=true"))
    with pytest.raises(UserError, match=r"tasks\.spc\.pool: not read"):
        small_model(small(NAME, "tasks.spc.pool=mean"))
    with pytest.raises(UserError, match=r"views\.anchor\.hz: 8000 Hz, but sample_rate"):
        small_model(small(NAME, "views.anchor.hz=8000"))
    with pytest.raises(UserError, match="must be odd"):
        small(NAME, "towers.audio.backbone.kernel=250")
    with pytest.raises(UserError, match="one entry per layer"):
        small(NAME, "towers.audio.backbone.strides=[10]")


def test_the_file_says_what_the_paper_says():
    spec = config.load(NAME)
    network = small_model(spec).towers["audio"].network
    assert network.grid((16_000,)) == (100,)
    (field,) = network.fields()
    assert (field.stride, field.size) == (160, 2370)
    tasks = spec.tasks
    assert [tasks[n].decoder.hidden for n in ("waveform", "lps", "mfcc", "prosody")] == [
        64,
        *[256] * 3,
    ]
    assert [p.score.hidden for p in tasks["mi"].pairs.values()] == [256, 256]
    assert (tasks["spc"].target.frames, tasks["spc"].target.gap, tasks["spc"].embed) == (
        5,
        16,
        [256],
    )
    assert (spec.optim.lr, spec.train.batch, spec.optim.final_lr) == (5e-4, 32, 0.5**5)
