"""Acceptance lists of AVOL-Net, LVS, EZ-VSL, DAVEnet, matchmaps and DenseAV on their own files."""

import math

import numpy as np
import pytest
import torch
from small_methods import equal_rows, full_batch, small, small_model, values
from tiny_run import gradients, take_rows
from torch.nn import functional as F

from data_tools.synth_media import RATE, write_clip
from mmssl import config
from mmssl.build import build_model, data_shape
from mmssl.check import fake_batch
from mmssl.demos import localize as demo
from mmssl.eval import measure
from mmssl.eval.embed import collect
from mmssl.eval.suites import numbers
from mmssl.heads.score import ScoreMap
from mmssl.objectives.negatives import partners
from mmssl.tasks.base import row_seeds
from mmssl.types import Batch, ViewBatch

LOCAL = ("avol_net", "lvs", "ez_vsl", "davenet", "matchmap", "dense_av")
PAIRS = LOCAL[1:]
WHERE = "align.where"


def exact(name, *overrides):
    """The method on the networks of its tiny run and one picture of 4 x 4 cells, in fp64."""
    sizes = ["views.video={crop_s: 1.0, size: 64}", "views.audio.crop_s=1.0", *overrides]
    if name in ("matchmap", "dense_av"):
        sizes.append("tasks.align.pairs.where.score.aligned=false")
    spec = config.load(f"configs/runs/{name}_tiny.yaml", sizes)
    return small_model(spec, dtype=torch.float64)


def parts(model, batch):
    """(cells, seen), (steps, heard) as the method's score reads them, and the score."""
    score, views = next(t.sound_map() for t in model.tasks.values())
    passes = model.passes(batch)
    return *(score.embed(passes, view)[0] for view in views), score


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize(
    ("name", "cells", "steps"),
    [
        ("avol_net", (1, 14, 14), (12, 16)),
        ("lvs", (1, 14, 14), (7, 9)),
        ("ez_vsl", (1, 7, 7), (7, 9)),
        ("davenet", (1, 14, 14), (128, 1)),
        ("matchmap", (1, 14, 14), (128, 1)),
        ("dense_av", (1, 28, 28), (499,)),
    ],
)
def test_grids_are_the_published_ones(name, cells, steps):
    spec = config.load(f"av/{name}")
    with torch.device("meta"):
        towers = build_model(spec).towers
    got = {v: towers[v].grid_of(data_shape(v, view)) for v, view in spec.views.items()}
    assert got == {"video": cells, "audio": steps}
    assert spec.views["video"].crop_s == 1 / spec.views["video"].fps  # one frame


def test_avol_net_projects_as_published():
    with torch.device("meta"):
        score = build_model(config.load("av/avol_net")).tasks["avc"].score
    for head in score.score.maps_of.values():
        sizes = [tuple(p.shape) for p in head.parameters()]
        assert sizes == [(128, 512), (128,), (128, 128), (128,)]
    assert score.score.score.normalize == "none"


# ---------------------------------------------------------------- at the start


@pytest.mark.parametrize("name", ["ez_vsl", "dense_av"])
def test_constant_features_give_chance(name):
    """ln B in each direction, whatever the temperature."""
    model = exact(name).eval()
    batch = equal_rows(full_batch(model.spec, 12))
    assert values(model, batch)[WHERE] == pytest.approx(math.log(12), abs=1e-9)


def test_equal_rows_leave_lvs_the_background_to_tell():
    """ln(B + exp((background - foreground) / 0.07)); ln(B + 1) where all cells are alike."""
    model = exact("lvs").eval()
    batch = equal_rows(full_batch(model.spec, 12))
    video, audio, score = parts(model, batch)
    gap = score.pairs(video, audio, background=True) - score.pairs(video, audio)
    want = (12 + (gap / 0.07).exp()).log().mean()
    assert values(model, batch)[WHERE] == pytest.approx(float(want.detach()), rel=1e-6)
    flat = torch.ones(12, 1, 16, 4)
    table = ScoreMap("soft", sharpness=33.3, above=0.65, below=0.4)
    same = table.pairs(flat, flat[:, :, 0], background=True)
    torch.testing.assert_close(same, table.pairs(flat, flat[:, :, 0]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_untrained_avol_net_is_undecided(seed):
    model = small_model(small("av/avol_net"), seed)
    for mode in (model.eval, model.train):
        mode()
        loss = values(model, full_batch(model.spec, 8))["avc"]
        assert loss == pytest.approx(math.log(2), abs=0.05)


@pytest.mark.parametrize("name", ["davenet", "matchmap"])
def test_features_of_zeros_lose_the_margin_twice(name):
    model = exact(name).train()
    for view in ("video", "audio"):
        score = model.tasks["align"].scores["where"]
        for p in [*model.towers[view].parameters(), *score.maps_of.parameters()]:
            p.data.zero_()
    assert values(model, full_batch(model.spec, 5))[WHERE] == 2.0


# ---------------------------------------------------------------- objectives by hand


def test_ez_vsl_adds_cross_entropies_of_rows_and_columns():
    model = exact("ez_vsl").eval()
    batch = full_batch(model.spec, 6)
    (cells, _), (sound, _), _ = parts(model, batch)
    unit = [F.normalize(x, dim=-1) for x in (cells[:, 0], sound[:, 0])]
    best = torch.einsum("qsd,cd->qcs", *unit).amax(-1) / 0.03
    rows = torch.arange(6)
    want = F.cross_entropy(best, rows) + F.cross_entropy(best.T, rows)
    loss, _ = model(batch, 0, 10)
    assert float(loss) == pytest.approx(float(want.detach()), rel=1e-5)


def test_lvs_is_its_tri_map_loss():
    """Chen et al. 2021, eqs. 3-6, with the other pictures' soft positives as in the release."""
    model = exact("lvs").eval()
    batch = full_batch(model.spec, 5)
    (cells, _), (sound, _), _ = parts(model, batch)
    unit = [F.normalize(x, dim=-1) for x in (cells[:, 0], sound[:, 0])]
    sims = torch.einsum("qsd,cd->qcs", *unit)
    mask = torch.sigmoid((sims - 0.65) / 0.03)
    unlike = 1 - torch.sigmoid((sims - 0.4) / 0.03)
    fore, back = ((m * sims).sum(-1) / m.sum(-1) for m in (mask, unlike))
    logits = torch.cat([fore, back.diagonal()[:, None]], 1) / 0.07
    want = F.cross_entropy(logits, torch.arange(5))
    assert values(model, batch)[WHERE] == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize("name", ["davenet", "matchmap"])
def test_triplets_ask_one_impostor_on_each_side(name):
    model = exact(name).eval()
    batch = full_batch(model.spec, 6)
    batch.source_B[:2] = 7  # rows 0 and 1 are of one recording
    video, audio, score = parts(model, batch)
    table = score(video, audio)[..., 0]
    seeds, there = row_seeds(batch, "video"), torch.ones(6, dtype=torch.bool)
    picture, sound = (partners(batch.source_B, seeds, there, f"where/{s}")[0] for s in "ab")
    own, rows = table.diagonal(), torch.arange(6)
    assert bool((picture != rows).all())
    assert not torch.equal(picture, sound)  # two draws
    assert batch.source_B[picture[0]] != 7
    want = (table[picture, rows] - own + 1).clamp(min=0) + (table[rows, sound] - own + 1).clamp(
        min=0
    )
    assert values(model, batch)[WHERE] == pytest.approx(float(want.mean()), rel=1e-6)


def test_rows_without_an_impostor_are_not_counted():
    model = exact("davenet").train()
    batch = full_batch(model.spec, 4)
    batch.source_B[:] = 3
    loss, terms = model(batch, 0, 10)
    assert int(terms[WHERE].count) == 0
    assert float(loss.detach()) == 0


def test_dense_av_adds_its_penalties():
    model = exact("dense_av").eval()
    batch = full_batch(model.spec, 5)
    got = values(model, batch)
    weights = {"negative": 0.01, "variation": 0.01, "overlap": 0.05, "temperature": 0.1}
    loss, _ = model(batch, 0, 10)
    want = got[WHERE] + sum(w * got[f"{WHERE}.{name}"] for name, w in weights.items())
    assert float(loss) == pytest.approx(want, rel=1e-5)
    assert got[f"{WHERE}.overlap"] > 0
    scale = model.tasks["align"].scales["where"].log_scale
    for log_scale, penalty in ((0.5, 0.0), (-0.5, 0.25)):
        scale.data.fill_(log_scale)
        assert values(model, batch)[f"{WHERE}.temperature"] == pytest.approx(penalty)


# ---------------------------------------------------------------- laws of the scores


def test_matchmaps_agree_where_they_must():
    g = torch.Generator().manual_seed(0)
    video = torch.randn(3, 1, 6, 8, generator=g, dtype=torch.float64)
    audio = torch.randn(3, 5, 8, generator=g, dtype=torch.float64)
    valid = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    kinds = {"sisa": ("mean", "mean"), "misa": ("max", "mean"), "sima": ("mean", "max")}
    scores = {n: ScoreMap(*kind, normalize="none") for n, kind in kinds.items()}
    mean = torch.stack([a[v].mean(0) for a, v in zip(audio, valid, strict=True)])
    sisa = scores["sisa"](video, audio, None, valid)
    torch.testing.assert_close(sisa, video.mean((1, 2)) @ mean.T, rtol=0, atol=1e-5)
    one = [s(video[:, :, :1], audio[:, :1]) for s in scores.values()]
    torch.testing.assert_close(one[0], one[1])
    torch.testing.assert_close(one[0], one[2])
    cells, frames = torch.randperm(6, generator=g), torch.randperm(5, generator=g)
    misa = scores["misa"](video, audio, None, valid)
    torch.testing.assert_close(scores["misa"](video[:, :, cells], audio, None, valid), misa)
    moved = scores["misa"](video, audio[:, frames], None, valid[:, frames])
    torch.testing.assert_close(moved, misa)
    assert not torch.allclose(scores["misa"](video, audio[:, frames], None, valid), misa)


@pytest.mark.parametrize("name", ["davenet", "matchmap"])
def test_padding_behind_a_caption_changes_nothing(name):
    """Five seconds of zeros behind it: the score's side of the sound differs by less than 1e-5."""
    model = exact(name).float().eval()
    batch = full_batch(model.spec, 3)
    audio = batch.views["audio"]
    padded = F.pad(audio.data, (0, 5 * 16000))
    longer = {**batch.views, "audio": type(audio)(**{**vars(audio), "data": padded})}
    short = model.dense(batch)
    long = model.dense(type(batch)(**{**vars(batch), "views": longer}))
    kept = long.audio[long.audio_valid].reshape(short.audio.shape)
    torch.testing.assert_close(kept, short.audio, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LOCAL)
def test_absent_rows_change_neither_loss_nor_gradient(name):
    """Rows 1 and 2 lack sound or picture: they say nothing and are nobody's partners."""
    model = exact(name)
    batch = fake_batch(model.spec, 6)
    loss, grads = gradients(model, batch)
    both = take_rows(batch, [0, 3, 4, 5])
    if name in ("lvs", "ez_vsl", "dense_av"):  # a candidate needs one side only
        _, terms = model(batch, 0, 10)
        assert int(terms[WHERE].count) == 4
        return
    alone, others = gradients(model, both)
    for norm in (m for m in model.modules() if hasattr(m, "running_mean")):
        assert torch.isfinite(norm.running_mean).all()
    if name == "davenet":  # without batch norm nothing else joins the rows
        assert float(loss) == pytest.approx(float(alone), rel=1e-6)
        for key, grad in grads.items():
            torch.testing.assert_close(others[key], grad, rtol=1e-5, atol=1e-9)


def test_an_avol_nets_gradient_reaches_one_cell_per_picture():
    model = exact("avol_net").train()
    batch = full_batch(model.spec, 4)
    (cells, seen), (sound, heard), _ = parts(model, batch)
    cells = cells.detach().requires_grad_()
    logits = model.tasks["avc"].score(None, (cells, seen), (sound.detach(), heard))
    logits.sum().backward()
    touched = cells.grad.abs().sum(-1) > 0
    best = torch.einsum("ptsd,pd->pts", cells, sound[:, 0]).argmax(-1)
    assert touched.sum(-1).eq(1).all()
    assert torch.equal(touched.float().argmax(-1), best)


# ---------------------------------------------------------------- other towers

TRANSFORMERS = ["shared={width: 16, layers: 1, head_size: 8, hidden: 32}"] + [
    f"towers.{view}={{use: {view}_tiny, post: 16}}" for view in ("video", "audio")
]


@pytest.mark.parametrize("name", LOCAL)
def test_every_method_runs_on_the_shared_transformer(name):
    """Only the lines of the towers and the width change."""
    task = "tasks.avc" if name == "avol_net" else "tasks.align.pairs.where"
    views = ["views.video={crop_s: 2.0, fps: 2, size: 32}", "views.audio={crop_s: 2.0, hz: 16000}"]
    spec = config.load(f"av/{name}", [*TRANSFORMERS, *views, f"{task}.score.dim=16"])
    model = small_model(spec)
    loss, grads = gradients(model, full_batch(spec, 4))
    assert math.isfinite(float(loss))
    assert all(float(g.abs().max()) > 0 for n, g in grads.items() if n.startswith("trunk.layers"))
    dense = model.eval().dense(full_batch(spec, 4))
    assert dense.grid == (2, 2, 2)


# ---------------------------------------------------------------- maps


def tiny(name):
    spec = config.load(f"configs/runs/{name}_tiny.yaml")
    return small_model(spec).eval(), spec


@pytest.mark.parametrize("name", LOCAL)
def test_a_map_has_the_geometry_of_the_picture(name):
    """What changes in one corner at one instant changes that part of the map most."""
    model, spec = tiny(name)
    batch = full_batch(spec, 2)
    batch.views["video"].start_s_P[:] = 3.0
    maps = []
    for noise in (0, 255):
        batch.views["video"].data[:, 2, :32, -32:] = noise  # upper right corner, third frame
        dense = model.dense(batch)
        maps.append(model.score_maps(dense.video, dense.audio, dense.audio_valid))
    assert dense.grid == (4, 8, 8)
    torch.testing.assert_close(dense.times_s[0], 3.0 + torch.arange(4.0).to(dense.times_s))
    change = (maps[1] - maps[0]).abs().reshape(2, 4, 8, 8)
    for p in range(2):
        t, row, column = np.unravel_index(int(change[p].argmax()), (4, 8, 8))
        assert t == 2
        assert row < 3
        assert column > 4


@pytest.mark.parametrize("name", LOCAL)
def test_evaluation_and_demo_draw_the_methods_own_map(name, tmp_path):
    model, spec = tiny(name)
    batch = full_batch(spec, 4)
    boxes = {"fps": 10, "sounding": [[0, 0, 64, 128]] * 40, "silent": [[64, 0, 128, 128]] * 40}
    batch.meta[:] = [{"boxes": boxes, "stored_size": [128, 128], "kind": "two"} for _ in range(4)]
    rows, encoded = collect({"it": model}, [batch])
    found = numbers(rows, encoded["it"], model, spec, measure.Protocol(resamples=0))
    local = found["localization"]
    assert local["pointing_sounding"] + local["pointing_silent"] == pytest.approx(1)
    assert 0 < local["ciou"]["model"]["absolute"]["mean"] < 1
    path = tmp_path / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (50, 128, 192, 3)).astype(np.uint8)
    tone = 0.3 * np.sin(np.arange(5 * RATE) * 0.2)
    write_clip(path, frames, tone, 10)
    heat = demo.heat_of(model, spec.views, path.read_bytes(), path)
    assert heat.maps_NHW.shape[1:] == (8, 8)
    assert heat.times_N == pytest.approx(np.arange(5.0))
    assert np.isfinite(heat.maps_NHW).all()
    assert heat.maps_NHW.std() > 0


# ---------------------------------------------------------------- AVOL-Net's scene

SIDE, SAMPLES, COLOURS = 16, 960, 8
SMALL_NETWORKS = [
    "views.video.size=16",
    "views.video.augment=[]",
    f"views.audio.crop_s={SAMPLES / 48000}",
    "tasks.avc.score.cells=stem",  # a cell knows its own quadrant only
    "tasks.avc.score.dim=32",
    "tasks.avc.score.form=linear",
    "tasks.avc.target.draw=both",
] + [
    f"towers.{view}={{cut: {{kind: patches, patch: {patch}}}, backbone: {{kind: transformer, "
    "stride: null, width: 32, layers: 1, head_size: 16, hidden: 64}}"
    for view, patch in (("video", [1, 8, 8]), ("audio", [2, 32]))
]


def scene(rows, seed):
    """Two of eight colours in two quadrants of a grey picture, and the tone of the first one.

    Returns:
        batch, quadrants (rows, 2) of the colours, and the tones (rows, 3, S): of the first, of the
        second and of a colour that is not shown.
    """
    g = torch.Generator().manual_seed(seed)
    kinds = torch.rand(rows, COLOURS, generator=g).argsort(1)[:, :3]
    places = torch.rand(rows, 4, generator=g).argsort(1)[:, :2]
    palette = torch.tensor([[48 + 160 * ((k >> i) & 1) for i in range(3)] for k in range(8)])
    quarters = torch.full((rows, 4, 3), 128)
    quarters.scatter_(1, places[..., None].expand(-1, -1, 3), palette[kinds[:, :2]])
    frames = quarters.reshape(rows, 1, 2, 1, 2, 1, 3).expand(-1, -1, -1, 8, -1, 8, -1)
    noise = torch.randint(-20, 20, (rows, 1, SIDE, SIDE, 3), generator=g)
    frames = (frames.reshape(rows, 1, SIDE, SIDE, 3) + noise).to(torch.uint8)
    phase = 2 * math.pi * torch.rand(rows, 3, 1, generator=g)
    time = torch.arange(SAMPLES) / 48000
    tones = 0.3 * torch.sin(2 * math.pi * (1500 + 2700 * kinds[..., None]) * time + phase)
    index, views = torch.arange(rows), {}
    one, start = torch.ones(rows, 1, dtype=torch.bool), torch.zeros(rows)
    for name, data, rate in (("video", frames, 25.0), ("audio", tones[:, 0], 48000.0)):
        seeds = torch.randint(0, 2**62, (rows,), generator=g)
        full = torch.full_like(index, data.shape[1])
        zeros = torch.zeros_like(index)
        views[name] = ViewBatch(name, data, full, index, zeros, seeds, start, one, rate)
    keys = [str(i) for i in range(rows)]
    return Batch(views, keys, index, torch.zeros_like(index), index), places, tones


def test_avol_net_points_at_what_sounds_and_moves_with_the_sound():
    """Peak in the tone's quadrant, moves with the tone, and low where nothing sounds: 90 %."""
    model = small_model(small("av/avol_net", *SMALL_NETWORKS))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(300):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - step / 300)
        loss, _ = model.train()(scene(128, 100 + step)[0], step, 300)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    batch, places, tones = scene(256, 1)
    model.eval()
    for heard, place in ((0, places[:, 0]), (1, places[:, 1]), (2, None)):
        batch.views["audio"].data[:] = tones[:, heard]
        dense = model.dense(batch)
        maps = model.score_maps(dense.video, dense.audio, dense.audio_valid)[:, 0]
        if place is not None:
            assert float((maps.argmax(1) == place).float().mean()) > 0.9
        else:
            logits = model.match_logit(batch, torch.arange(256))
            assert float((logits.sigmoid() < 0.5).float().mean()) > 0.9
