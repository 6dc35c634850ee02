"""MMV on its published networks and in its three graphs (Alayrac et al. 2020)."""

import math
from dataclasses import replace

import pytest
import torch
import triplet_laws as laws
from small_methods import full_batch, shrinking, small, small_model, values
from tiny_run import gradients
from toy_triplets import CAUSES, causes, quantised, recall_at_1, train, triplets

from mmssl import config
from mmssl.build import build_model, data_shape
from mmssl.check import SPECIAL, VOCABULARY
from mmssl.types import UserError

METHODS = ["avt/mmv_s3d", "avt/mmv_tsm50", "avt/mmv_shared", "avt/mmv_disjoint"]


def whole(name, *overrides):
    """The method at full size, without memory."""
    with torch.device("meta"):
        return build_model(config.load(name, list(overrides)), VOCABULARY, SPECIAL)


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize(
    ("name", "more", "grid", "width"),
    [
        ("avt/mmv_s3d", [], (4, 7, 7), 1024),
        ("avt/mmv_tsm50", [], (32, 7, 7), 2048),
        ("avt/mmv_tsm50", ["towers.video.backbone.channels=128"], (32, 7, 7), 4096),
        ("avt/mmv_shared", [], (2, 7, 7), 1024),
    ],
)
def test_networks_have_the_published_sizes(name, more, grid, width):
    model = whole(name, *more)
    spec = model.spec
    shapes = {v: data_shape(v, view) for v, view in spec.views.items()}
    frames = shapes["video"][0]
    assert shapes == {
        "video": (frames, 200, 200, 3), "audio": (4800 * frames,), "text": (16,)
    }  # fmt: skip
    towers = model.towers
    assert towers["video"].grid_of(shapes["video"]) == grid
    assert (towers["video"].width, towers["audio"].width, towers["text"].width) == (
        width, 2048, 2048,
    )  # fmt: skip
    assert towers["audio"].signal.grid(shapes["audio"]) == ({32: 150, 16: 75}[frames], 80)
    assert towers["audio"].grid_of(shapes["audio"]) == ({32: 5, 16: 3}[frames], 3)
    assert tuple(towers["text"].stem.table.shape) == (VOCABULARY, 300)
    assert tuple(towers["text"].stem.proj.weight.shape) == (2048, 300)
    assert not any(p.requires_grad for n, p in towers["text"].named_buffers())


def test_sounds_are_the_published_spectrogram():
    """80 mel bands from 80 to 7600 Hz, 42.67 ms every 21.34 ms, ln(1 + 10000 m) of magnitudes."""
    params = config.load("avt/mmv_s3d").towers["audio"].frontend
    assert params.win / params.sample_rate == pytest.approx(42.67e-3, abs=1e-5)
    assert params.hop / params.sample_rate == pytest.approx(21.34e-3, abs=1e-5)
    assert (params.n_mels, params.f_min, params.f_max, params.power) == (80, 80, 7600, 1)
    signal = small_model(small("avt/mmv_s3d")).towers["audio"].signal
    assert float(signal(torch.zeros(1, 4096)).abs().max()) == 0.0  # ln 1
    wave = torch.sin(2 * math.pi * 1000 * torch.arange(4096) / 48000)[None]
    one, ten = (torch.expm1(signal(x * wave)) for x in (1.0, 10.0))
    torch.testing.assert_close(ten, 10 * one, rtol=1e-3, atol=1e-4 * float(ten.max()))


def edges(heads):
    """{way: widths of its linear maps and BN where there is one}."""

    def layers(head):
        return [m.weight.shape[0] if isinstance(m, torch.nn.Linear) else type(m).__name__[-4:]
                for m in head.layers]  # fmt: skip

    found = {name: layers(head) for name, head in heads.heads.items()}
    return found | ({} if heads.va_vat is None else {"va_to_vat": layers(heads.va_vat)})


def test_graphs_have_the_published_edges():
    got = {n: edges(whole(n).tasks["align"].embedder.heads) for n in METHODS}
    norm, mlp = "Norm", [512, "Norm", "ReLU", 512, "Norm"]
    fac = {
        "video_to_va": mlp,
        "audio_to_va": [512],
        "text_to_vat": [256],
        "va_to_vat": ["ReLU", 256, norm],
    }
    assert got["avt/mmv_s3d"] == got["avt/mmv_tsm50"] == fac
    assert got["avt/mmv_shared"] == {f"{m}_to_all": mlp for m in ("video", "audio", "text")}
    assert got["avt/mmv_disjoint"] == {
        "video_to_va": mlp, "video_to_vt": mlp, "audio_to_va": [512], "text_to_vt": [512]
    }  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_file_is_the_published_training(name):
    spec = config.load(name)
    final = name in METHODS[:2]
    assert (spec.train.batch, spec.views["video"].crop_s) == ((4096, 3.2) if final else (512, 1.6))
    assert spec.views["text"].candidates == 5
    assert spec.views["video"].window == spec.views["audio"].window
    assert {p.objective.temperature for p in spec.tasks["align"].pairs.values()} == {0.07}
    assert (spec.optim.kind, spec.optim.lr, spec.optim.warmup) == ("adam", 2e-3, 5000)


@pytest.mark.parametrize(
    ("name", "view"),
    [
        (name, view)
        for name in [*METHODS, "avt/mil_nce"]
        for view in ("video", "audio", "text")
        if (name, view) != ("avt/mil_nce", "audio")
    ],
)
def test_a_tower_is_a_transformer_by_one_key(name, view):
    key = f"towers.{view}.use={view}_vatt"
    spec = config.load(name, [key, *shrinking(config.load(name, [key]))])
    assert spec.towers[view].backbone.kind == "transformer"
    model = small_model(spec)
    loss, grads = gradients(model, full_batch(spec, 4))
    assert math.isfinite(float(loss))
    trunk = [g for n, g in grads.items() if n.startswith(f"towers.{view}.own_trunk")]
    assert max(float(g.abs().max()) for g in trunk) > 0


# ---------------------------------------------------------------- the losses


@pytest.mark.parametrize("name", METHODS)
def test_constant_embeddings_give_chance(name):
    laws.constant_embeddings_give_chance(name, "released", 5)


@pytest.mark.parametrize("name", METHODS)
def test_order_of_rows_and_captions_is_free(name):
    laws.order_is_free(name)


@pytest.mark.parametrize("name", METHODS)
def test_missing_texts_have_no_influence_but_their_videos_have(name):
    laws.missing_texts_have_no_influence_but_their_videos_have(name)


@pytest.mark.parametrize("name", METHODS[:2])
def test_no_text_at_all_is_zero(name):
    laws.no_text_at_all_is_zero(name)


@pytest.mark.parametrize("name", METHODS)
def test_a_dummys_content_has_no_influence(name):
    laws.a_dummys_content_has_no_influence(name)


# ---------------------------------------------------------------- who teaches whom


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("off", "silent"), [("va", "audio"), ("vt", "text")])
def test_a_pair_teaches_its_own_two_towers(name, off, silent):
    model = small_model(small(name, f"tasks.align.pairs.{off}.weight=0"))
    _, grads = gradients(model, full_batch(model.spec, 4))
    reached = {
        n.split(".")[1] for n, g in grads.items() if n.startswith("towers") and g.abs().max() > 0
    }
    assert reached == {"video", "audio", "text"} - {silent}


@pytest.mark.parametrize(("name", "space"), zip(METHODS, ["vat", "vat", "all", None], strict=True))
def test_where_sound_and_text_meet(name, space):
    assert small_model(small(name)).eval().space_for("audio", "text") == space


def test_a_sentence_is_the_largest_word():
    """max over words of ReLU(W e + b); the order of words and what is behind the end are free."""
    model = small_model(small("avt/mmv_s3d")).eval()
    tower, heads = model.towers["text"], model.tasks["align"].embedder.heads
    batch = full_batch(model.spec, 4)
    view = batch.views["text"]
    words = tower.stem.table[view.data] @ tower.stem.proj.weight.T + tower.stem.proj.bias
    expected = heads.heads["text_to_vat"](words.clamp(min=0).amax(1))
    text = model.tasks["align"].vectors(model.passes(batch))["text", "vat"][0]
    torch.testing.assert_close(text.flatten(0, 1), expected)
    longer = torch.cat([view.data.flip(1), torch.full_like(view.data, 7)], 1)
    batch.views["text"] = replace(view, data=longer)
    again = model.tasks["align"].vectors(model.passes(batch))["text", "vat"][0]
    torch.testing.assert_close(again, text)


@pytest.mark.parametrize("name", METHODS[:2])
def test_a_clip_is_the_mean_of_its_valid_cells(name):
    """A short video and a short sound among longer ones have the vectors that they have alone."""
    model = small_model(small(name, "views.video.crop_s=2.0"), dtype=torch.float64).eval()
    batch = full_batch(model.spec, 2)
    video, audio = batch.views["video"], batch.views["audio"]
    lengths = torch.tensor([video.data.shape[1], 9]), torch.tensor([audio.data.shape[1], 4000])
    batch.views["video"] = replace(video, lengths_P=lengths[0])
    batch.views["audio"] = replace(audio, lengths_P=lengths[1])
    together = model.embed(batch)
    for key, view, n in (("video", video, 9), ("audio", audio, 4000)):
        batch.views[key] = replace(
            view, data=view.data[:, :n].clone(), lengths_P=torch.tensor([n, n])
        )
    alone = model.embed(batch)
    for key in (("video", "va"), ("audio", "va"), ("video", "vat"), ("audio", "vat")):
        torch.testing.assert_close(together[key][0][1], alone[key][0][1], atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- toy triplets

SAMPLES, PITCH_HZ = 3072, torch.tensor([200.0, 420, 750, 1200, 1900, 2900, 4400, 6500])


def toy_batch(rows, seed):
    """Causes as colours of the quarters of a picture and as loudness of eight tones; as words."""
    cause = causes(rows, seed)
    batch = triplets(cause, quantised(cause), seed)
    video, audio = batch.views["video"], batch.views["audio"]
    frames = video.data.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 2, -1, -1, -1)
    g = torch.Generator().manual_seed(seed)
    phase = 2 * math.pi * torch.rand(rows, CAUSES, 1, generator=g)
    time = torch.arange(SAMPLES) / 48000
    tones = torch.sin(2 * math.pi * PITCH_HZ[:, None] * time + phase)
    wave = 0.005 * ((3 * cause).exp()[..., None] * tones).sum(1)
    full = torch.ones(rows, dtype=torch.long)
    views = {
        "video": replace(video, data=frames.contiguous(), lengths_P=2 * full),
        "audio": replace(audio, data=wave, lengths_P=SAMPLES * full),
    }
    return replace(batch, views=batch.views | views)


def trained(name, steps):
    """Vectors of 256 triplets that were not trained on; the video network is TSM's, the faster."""
    use = ["towers.video.use=video_tsm50"]
    spec = config.load(name, use)
    sizes = [f"tasks.align.heads.spaces.{s}.dim=64" for s in spec.tasks["align"].heads.spaces]
    sizes += ["towers.video.backbone.channels=16", "towers.text.backbone.width=64"]
    sizes += ["views.video.crop_s=0.2", f"views.audio.crop_s={SAMPLES / 48000}"]
    sizes += ["views.text.length=5", "views.text.candidates=1"]
    model = small_model(config.load(name, [*use, *shrinking(spec), *sizes]))
    train(model, lambda step: toy_batch(96, 1000 + step), steps)
    return {key: z for key, (z, _) in model.eval().embed(toy_batch(256, 5)).items()}


def test_fine_and_coarse_spaces_compare_what_was_never_compared():
    """Acceptance 7: chance is 1 / 256."""
    z = trained("avt/mmv_tsm50", 130)
    video_audio = recall_at_1(z["video", "va"], z["audio", "va"])
    video_text = recall_at_1(z["video", "vat"], z["text", "vat"])
    assert video_audio > video_text > 50 / 256
    assert recall_at_1(z["audio", "vat"], z["text", "vat"]) > 10 / 256
    assert recall_at_1(z["text", "vat"], z["audio", "vat"]) > 10 / 256


def test_disjoint_spaces_do_not_compare_it():
    z = trained("avt/mmv_disjoint", 40)
    assert set(z) == {("video", "va"), ("audio", "va"), ("video", "vt"), ("text", "vt")}
    assert recall_at_1(z["video", "va"], z["audio", "va"]) > 10 / 256
    assert recall_at_1(z["audio", "va"], z["text", "vt"]) <= 4 / 256


def test_one_space_compares_it_too():
    z = trained("avt/mmv_shared", 80)
    assert recall_at_1(z["audio", "all"], z["text", "all"]) > 10 / 256


# ---------------------------------------------------------------- deflation by keys


@pytest.mark.parametrize(
    ("name", "key"), [("avt/mmv_s3d", "deflated=true"), ("avt/mmv_tsm50", "shift=0")]
)
def test_a_key_makes_the_trained_network_read_single_frames(name, key):
    video = small_model(small(name))
    image = small_model(small(name, f"towers.video.backbone.{key}"), seed=1)
    image.load_state_dict(video.state_dict())
    image.eval()
    batch = full_batch(image.spec, 3)
    view = batch.views["video"]
    tokens = image.passes(batch).tokens("video")
    assert tokens.grid == (8, 1, 1)
    assert tokens.rate_hz == view.rate
    frame = replace(view, data=view.data[:, 3:4].clone(), lengths_P=torch.ones_like(view.lengths_P))
    alone = image.passes(replace(batch, views=batch.views | {"video": frame})).tokens("video")
    torch.testing.assert_close(tokens.x_PND[:, 3:4], alone.x_PND)


def test_an_untrained_model_is_near_chance():
    got = values(small_model(small("avt/mmv_tsm50")).eval(), full_batch(small("avt/mmv_tsm50"), 6))
    assert all(value == pytest.approx(math.log(12), abs=1.0) for value in got.values())


def test_a_video_network_refuses_sound():
    spec = small("avt/mmv_s3d", "towers.audio.backbone={kind: s3dg, blocks: null}")
    with pytest.raises(UserError, match=r"towers\.audio\.backbone: s3dg reads video, not audio"):
        small_model(spec)
