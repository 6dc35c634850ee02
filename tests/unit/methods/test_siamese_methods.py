"""The cards of BYOL-A, MoCo v2, SimSiam and Barlow Twins, on their own files."""

import math
from difflib import ndiff
from pathlib import Path

import pytest
import torch
from small_methods import full_batch, small, small_model, values
from torch import nn
from torch.nn import functional as F

from mmssl import config
from mmssl.build import data_shape
from mmssl.heads.mlp import MLP
from mmssl.schedules import resolve
from mmssl.train.optim import build_optimizer, set_learning_rate


def layers(head):
    return [type(m).__name__.replace("MaskedSync", "") for m in head.layers]


def projector(name):
    """The heads of a method as published, on an input of 8 numbers."""
    (task,) = config.load(name).tasks.values()
    specs = (task.projector, task.predictor)
    inputs = (8, task.projector.widths[-1])
    return [s and MLP(n, s.widths, s.norm, s.bias) for s, n in zip(specs, inputs, strict=True)]


# ---------------------------------------------------------------- the files


def test_byol_a_reads_96_frames_of_64_bands_twice():
    for name, steps, width in (("audio/byol_a", 12, 2048), ("audio/byol_a_v2", 24, 3072)):
        spec = config.load(name)
        assert data_shape("first", spec.views["first"]) == (15200,)
        assert spec.views["first"] == spec.views["second"]  # one window: the same second
        tower = small_model(small(name, f"towers.audio.backbone.hidden={2048}")).towers["audio"]
        assert tower.signal.grid((15200,)) == (96, 64)
        assert tower.grid_of((15200,)) == (steps, 1)
        assert tower.width == width


def test_byol_a_versions_differ_where_the_papers_say():
    one, two = (config.load(f"audio/byol_a{v}") for v in ("", "_v2"))
    assert (one.towers["audio"].augment.mix, two.towers["audio"].augment.mix) == (0.4, 0.2)
    assert (one.towers["audio"].augment.fader, two.towers["audio"].augment.fader) == (0, 1)
    assert (one.optim.lr, two.optim.lr) == (3e-4, 1e-4)
    assert one.tasks == two.tasks
    assert resolve(one.tasks["byol"].decay, 0.5) == 0.99


def test_heads_are_the_published_ones():
    head, predictor = projector("audio/byol_a")
    assert layers(head) == layers(predictor) == ["Linear", "BatchNorm", "ReLU", "Linear"]
    assert [m.out_features for m in head.layers if isinstance(m, nn.Linear)] == [4096, 256]
    head, predictor = projector("general/moco_v2")
    assert layers(head) == ["Linear", "ReLU", "Linear"]
    assert predictor is None
    assert sum(p.numel() for p in head.parameters()) == 8 * 2048 + 2048 + 2048 * 128 + 128
    head, predictor = projector("general/simsiam")
    norm = ["Linear", "BatchNorm"]
    assert layers(head) == [*norm, "ReLU", *norm, "ReLU", *norm]
    assert [m.bias is None for m in head.layers if isinstance(m, nn.Linear)] == [True] * 3
    assert not list(head.layers[-1].parameters())  # the last one without scale and shift
    assert len(list(head.layers[1].parameters())) == 2
    assert layers(predictor) == [*norm, "ReLU", "Linear"]
    assert predictor.layers[0].bias is None
    assert predictor.layers[-1].bias is not None
    head, predictor = projector("general/barlow_twins")
    assert layers(head) == [*norm, "ReLU", *norm, "ReLU", "Linear"]
    assert head.layers[-1].bias is None
    assert predictor is None


def test_an_mlp_equals_torchs_layers():
    torch.manual_seed(0)
    head = MLP(6, [5, 4, 3], "all").double()
    parts = []
    for i in range(3):
        linear, norm = nn.Linear(1, 1, bias=False), nn.BatchNorm1d((5, 4, 3)[i])
        linear.weight = head.layers[3 * i].weight
        parts += [linear, norm.double(), nn.ReLU()][: 2 if i == 2 else 3]
    x = torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(head(x), nn.Sequential(*parts)(x), atol=1e-9, rtol=0)
    valid = torch.arange(9) < 7
    more = torch.cat([x, torch.full((2, 6), 50.0, dtype=x.dtype)])
    torch.testing.assert_close(head(more, valid)[:7], head(x), atol=1e-9, rtol=0)


def test_published_constants_of_the_losses():
    objective = {n: next(iter(config.load(n).tasks.values())).objective for n in PUBLISHED}
    assert {n: o.model_dump() for n, o in objective.items()} == PUBLISHED
    assert math.log(objective["general/moco_v2"].size + 1) == pytest.approx(11.0904, abs=1e-4)


PUBLISHED = {
    "audio/byol_a": {"kind": "byol"},
    "general/moco": {"kind": "queue", "size": 65536, "temperature": 0.07, "symmetric": False},
    "general/moco_v2": {"kind": "queue", "size": 65536, "temperature": 0.2, "symmetric": False},
    "general/simsiam": {"kind": "cosine"},
    "general/barlow_twins": {"kind": "cross_correlation", "off_diagonal": 0.0051},
}


def test_moco_with_another_head_temperature_and_augmentation_is_version_2():
    one, two = (config.load(f"general/moco{v}").model_dump() for v in ("", "_v2"))
    task, published = one["tasks"]["moco"], two["tasks"]["moco"]
    assert task["projector"]["widths"] == [128]  # a linear map
    task["projector"]["widths"] = published["projector"]["widths"]
    task["objective"]["temperature"] = published["objective"]["temperature"]
    for name, view in one["views"].items():
        assert [a["kind"] for a in view["augment"]] == INSTANCE
        view["augment"] = two["views"][name]["augment"]
    assert [key for key in one if one[key] != two[key]] == ["name", "paper"]


INSTANCE = ["random_resized_crop", "grayscale", "color_jitter", "horizontal_flip"]


def test_the_rate_of_simsiams_predictor_does_not_decay():
    spec = small("simsiam_tiny")
    model = small_model(spec)
    optimizer = build_optimizer(model, model.parameter_policy(), spec.optim)
    set_learning_rate(optimizer.param_groups, 0.001, spec.optim.lr)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        assert rates[id(p)] == (spec.optim.lr if ".predictors." in name else 0.001), name


@pytest.mark.parametrize(
    ("crossed", "alone"),
    [
        ("simclr_av_tiny", "simclr_tiny"),
        ("byol_av_tiny", "byol_a_tiny"),
        ("barlow_av_tiny", "barlow_twins_tiny"),
    ],
)
def test_naming_a_modality_makes_a_method_of_sounds_audio_visual(crossed, alone):
    """Heads, loss and optimiser are those of the run on sounds: only what is read is another."""
    both, sounds = config.load(crossed), config.load(alone)
    assert [v.modality for v in sounds.views.values()] == ["audio", "audio"]
    assert [v.modality for v in both.views.values()] == ["audio", "video"]
    assert list(both.views) == list(sounds.views)
    assert sorted(both.towers) == ["audio", "video"]
    now, before = both.model_dump(), sounds.model_dump()
    differing = {key for key in now if now[key] != before[key]}
    assert differing <= {"name", "towers", "views", "data", "train"}
    spec = small(crossed)
    model = small_model(spec).train()
    loss, _ = model(full_batch(spec, 4), 0, 10)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.space_for("audio", "video")


def test_contributing_shows_how_moco_differs_from_version_2():
    text = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()
    shown = text.split("```diff\n")[1].split("```")[0].splitlines()[2:]
    old, new = (
        (config.builtin_root() / f"methods/general/{name}.yaml").read_text().splitlines()
        for name in ("moco_v2", "moco")
    )
    changed = {line for line in ndiff(old, new) if line[0] in "+-"}
    assert {f"{line[0]} {line[1:]}" for line in shown if line[0] in "+-"} == changed


# ---------------------------------------------------------------- the losses


def test_byol_a_starts_near_four():
    """Independent vectors: 2 per direction (the card's 1.997)."""
    wide = ["tasks.byol.projector.widths=[256, 256]", "tasks.byol.predictor.widths=[256, 256]"]
    model = small_model(small("audio/byol_a", *wide)).train()
    assert values(model, full_batch(model.spec, 8))["byol"] == pytest.approx(4.0, abs=0.4)


@pytest.mark.slow
def test_byol_a_does_not_collapse():
    """The card's monitor: the deviation of unit projections of 256 numbers, 1/16 if they are spread
    evenly, stays above 0.3/16 over 500 steps; 0.7/16 and more was found."""
    wide = [f"tasks.byol.{head}.widths=[256, 256]" for head in ("projector", "predictor")]
    model = small_model(small("audio/byol_a", *wide)).train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    found = []
    for step in range(500):
        batch = full_batch(model.spec, 8, step)
        draws = torch.Generator().manual_seed(step)
        hz, hiss = 100 * 20 ** torch.rand(8, 1, generator=draws), torch.rand(8, 1, generator=draws)
        sound = batch.views["first"].data
        seconds = torch.arange(sound.shape[1]) / 16000
        tones = 0.1 * torch.sin(2 * math.pi * hz * seconds)
        for view in batch.views.values():  # one second of sound, which the chain augments twice
            view.data = tones + 0.5 * hiss * sound
        loss, _ = model(batch, step, 500)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        model.after_step(step, 500)
        z = F.normalize(model.tasks["byol"].last["first"], dim=-1)
        found.append(float(z.std(0).mean()) * 16)
    assert min(found) > 0.3


def test_identical_views_with_an_identity_for_predictor_have_no_loss():
    """Equal weights and evaluation mode, as the card asks; the chain rests in evaluation."""
    model = small_model(small("audio/byol_a")).eval()
    head = model.tasks["byol"].predictors["audio"]
    head.layers = nn.ModuleList([nn.Identity()])
    batch = full_batch(model.spec, 4)
    batch.views["second"] = batch.views["first"]
    assert values(model, batch)["byol"] == pytest.approx(0, abs=1e-5)
