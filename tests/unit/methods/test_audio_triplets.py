"""Triplets of Jansen et al. 2018 and TRILL (Shor et al. 2020)."""

import math

import pytest
import torch
from small_methods import equal_rows, full_batch, small, small_model, values
from torch import Tensor
from torch.nn import functional as F

from mmssl import config
from mmssl.build import data_shape
from mmssl.tasks.base import mixed_in
from mmssl.types import Batch, UserError, ViewBatch
from mmssl.views.plan import Seeds, plan

JANSEN, TRILL = "audio/jansen_triplet", "audio/trill"


def test_equal_sounds_cost_the_margin_and_teach_nothing():
    model = small_model(small(TRILL)).eval()
    batch = equal_rows(full_batch(model.spec, 5))
    batch.views["near"] = batch.views["anchor"]
    assert values(model, batch)["trill.time"] == pytest.approx(0.1, abs=1e-5)
    loss, _ = model(batch, 0, 10)
    loss.backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-4


def test_the_term_is_facenets_over_the_batch():
    model = small_model(small(TRILL)).train()
    batch = full_batch(model.spec, 8)
    z = model.tasks["trill"].vectors(model.passes(batch))
    a, p = (F.normalize(z[v, "trill"][0][:, 0], dim=1).double() for v in ("anchor", "near"))
    d = torch.cdist(a, p).square().detach()
    losses, mined = [], 0
    for i in range(8):
        others = [float(d[i, j]) for j in range(8) if j != i]
        farther = [x for x in others if x > d[i, i]]
        mined += bool(farther)
        losses.append(max(0, float(d[i, i]) - (min(farther) if farther else max(others)) + 0.1))
    got = values(model, batch)
    assert got["trill.time"] == pytest.approx(sum(losses) / 8, abs=1e-5)
    assert got["trill.time.semi_hard"] == mined / 8
    assert got["trill.time.active"] == sum(x > 0 for x in losses) / 8


def test_watched_shares_carry_no_weight():
    model = small_model(small(TRILL)).train()
    batch = full_batch(model.spec, 6)
    loss, terms = model(batch, 0, 10)
    main = terms["trill.time"]
    assert loss.item() == pytest.approx(float(main.sum / main.count), rel=1e-5)


@pytest.mark.parametrize("duration_s", [1.95, 2.5, 10.0])
def test_windows_of_a_clip_do_not_overlap_and_stay_within_it(duration_s):
    views = config.load(TRILL).views
    gaps = []
    for i in range(1000):
        seeds = Seeds(0, f"clip-{i}", (1,))
        cuts = plan(views, duration_s, {"audio"}, seeds, training=True).cuts
        first, second = sorted([cuts["anchor"], cuts["near"]], key=lambda c: c.start_s)
        assert first.start_s >= 0
        assert second.end_s <= duration_s + 1e-9
        gaps.append(second.start_s - first.end_s)
    room = duration_s - 1.95
    assert min(gaps) >= -1e-9
    assert max(gaps) <= room + 1e-9
    assert sum(gaps) / 1000 == pytest.approx(room / 3, rel=0.1, abs=1e-9)


def test_a_clip_of_less_than_two_windows_has_no_pair():
    cuts = plan(config.load(TRILL).views, 1.9, {"audio"}, Seeds(0, "clip", (1,)), training=True)
    assert set(cuts.cuts) == {"anchor"}


def test_patches_are_those_of_vggish():
    spec = config.load(JANSEN)
    model = small_model(small(JANSEN))
    assert model.towers["audio"].signal.grid(data_shape("anchor", spec.views["anchor"])) == (96, 64)


def test_each_view_is_changed_in_its_own_way():
    """The anchor's spectrogram is plain; noise adds, mixing adds a quarter, a shift moves."""
    model = small_model(small(JANSEN)).train()
    batch = full_batch(model.spec, 6)
    for name in ("noisy", "shifted", "mixed"):
        batch.views[name].data = batch.views["anchor"].data.clone()
    signal = model.towers["audio"].signal
    plain = signal.linear(signal(batch.views["anchor"].data))
    views = model._mixed(batch).views
    assert views["anchor"].signal is None
    assert views["near"].signal is None
    noisy, shifted, mixed = (signal.linear(views[n].signal) for n in ("noisy", "shifted", "mixed"))
    assert bool((noisy >= plain - 1e-3).all())
    energy = plain.sum((1, 2, 3))
    torch.testing.assert_close(mixed.sum((1, 2, 3)), 1.25 * energy, rtol=1e-3, atol=0)
    index, found = mixed_in(batch, "mixed")
    assert found.all()
    added = mixed - plain
    want = plain[index] * (0.25 * energy / energy[index])[:, None, None, None]
    torch.testing.assert_close(added, want, rtol=1e-2, atol=1e-3)
    assert bool((shifted.sum((1, 2, 3)) <= energy * 1.001).all())
    assert not torch.allclose(shifted, plain, atol=1e-2)
    assert model.eval()._mixed(batch).views["noisy"].signal is None


def test_the_mixed_sound_is_the_negative():
    model = small_model(small(JANSEN)).train()
    batch = full_batch(model.spec, 6)
    altered = model._mixed(batch)
    z = model.tasks["triplets"].vectors(model.passes(altered))
    a, p = (F.normalize(z[v, "sound"][0][:, 0], dim=1) for v in ("anchor", "mixed"))
    index, _ = mixed_in(batch, "mixed")
    d = lambda x, y: (x - y).square().sum(1)  # noqa: E731
    want = (d(a, p) - d(a, a[index]) + 0.1).clamp(min=0).mean()
    got = values(model, batch)["triplets.mix"]
    assert got == pytest.approx(want.item(), abs=1e-5)


def test_mel_energies_need_a_logarithm_that_can_be_taken_back():
    with pytest.raises(UserError, match="mel_noise changes mel energies"):
        small_model(small(JANSEN, "towers.audio.frontend.log=ln_clip"))
    with pytest.raises(UserError, match="needs augmentation mel_mix"):
        small_model(small(JANSEN, "views.mixed.augment=[]"))
    with pytest.raises(UserError, match="compares unit vectors"):
        small_model(small(TRILL, "tasks.trill.pairs.time.score={kind: bilinear}"))
    with pytest.raises(UserError, match="needs objective critic"):
        small_model(
            small(
                TRILL,
                "tasks.trill.pairs.time.score={kind: fusion}",
                "tasks.trill.pairs.time.objective={kind: info_nce, margin: null}",
            )
        )


# ---------------------------------------------------------------- the toy set

HZ, SAMPLES, CLIPS = 16000, 4800, 40
SMALL_NETWORK = (
    "towers.audio.backbone={kind: transformer, channels: null, blocks: null, width: 32, layers: 1,"
    " head_size: 16, hidden: 64}",
    "towers.audio.cut={kind: patches, patch: [7, 8]}",
    "tasks.trill.heads.spaces.trill.dim=32",
    *(f"views.{view}.crop_s={SAMPLES / HZ}" for view in ("anchor", "near")),
)


def toy_batch(clips: Tensor, seed: int) -> Batch:
    """Windows of clips that have a pitch each, and speak in their own random timbres."""
    g = torch.Generator().manual_seed(seed)
    pitch = 100 * 6 ** (clips.double() / CLIPS)
    views = {}
    for name in ("anchor", "near"):
        strength = torch.rand(len(clips), 6, 6, generator=g).double() ** 2  # six sounds in turn
        place = torch.arange(SAMPLES) // (SAMPLES // 6)
        time = torch.arange(SAMPLES).double() / HZ
        wave = sum(
            strength[:, place.clamp(max=5), n]
            * torch.sin(2 * math.pi * (n + 1) * pitch[:, None] * time)
            for n in range(6)
        )
        wave = (0.1 * wave).float() + 0.01 * torch.randn(len(clips), SAMPLES, generator=g)
        rows = torch.arange(len(clips))
        zeros, one = torch.zeros_like(rows), torch.ones(len(clips), 1, dtype=torch.bool)
        start = torch.zeros(len(clips))
        views[name] = ViewBatch(
            "audio", wave, zeros + SAMPLES, rows, zeros, rows, start, one, float(HZ)
        )
    rows = torch.arange(len(clips))
    return Batch(views, [str(i) for i in rows], clips.clone(), zeros, rows, [{}] * len(clips))


def test_trill_finds_the_other_window_of_a_clip():
    model = small_model(small(TRILL, *SMALL_NETWORK))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    everyone = torch.arange(CLIPS)
    batches = [toy_batch(everyone, seed) for seed in range(1, 41)]
    for step in range(250):
        loss, _ = model.train()(batches[step % 40], step, 250)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    hits = []
    for seed in range(1000, 1004):
        batch = toy_batch(everyone, seed)
        with torch.no_grad():
            z = model.eval().tasks["trill"].vectors(model.passes(batch))
        a, p = (F.normalize(z[v, "trill"][0][:, 0], dim=1) for v in ("anchor", "near"))
        hits.append(float(((a @ p.T).argmax(1) == everyone).float().mean()))
    assert sum(hits) / 4 > 0.9, hits  # 0.97 on three kinds of arithmetic; chance: 0.025


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["views.near.within_s=0.01"], r"views\.near\.within_s: 0\.01 s, but windows .* s apart"),
        (["views.near.window=far.2"], r"views\.near\.within_s: is a distance .* `far\.2` is none"),
        (["views.near.window=near"], r"views\.near\.within_s: is a distance .* `near` is none"),
        (["views.anchor.crop_s=0"], r"views\.near\.within_s: .* have a `crop_s`"),
    ],
)
def test_a_distance_that_windows_cannot_keep_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        small_model(small("audio/trill", *changes))
