"""AVE-Net's acceptance list on configs/methods/av/ave_net.yaml (Arandjelovic, Zisserman 2018)."""

import math

import pytest
import torch
from small_methods import full_batch, small, small_model
from torch import Tensor
from torch.nn import functional as F

from mmssl import config
from mmssl.build import build_model, data_shape
from mmssl.heads.match import VectorMatch
from mmssl.heads.score import Distance
from mmssl.objectives.negatives import coin
from mmssl.types import Batch, ViewBatch

NAME = "av/ave_net"
CLASSES = 4


def vectors(model, batch):
    """Unit vectors of both views, by the match's own maps."""
    score, passes = model.tasks["avc"].score, model.passes(batch)
    with torch.no_grad():
        return [F.normalize(score.read(passes, v, v)[0], dim=-1) for v in ("video", "audio")]


# ---------------------------------------------------------------- the file


def test_networks_and_grids_are_the_published_ones():
    spec = config.load(NAME)
    with torch.device("meta"):
        model = build_model(spec)
    shapes = {v: data_shape(v, view) for v, view in spec.views.items()}
    assert shapes == {"video": (1, 224, 224, 3), "audio": (48000,)}
    assert model.towers["video"].grid_of(shapes["video"]) == (1, 14, 14)
    frames, bands = model.towers["audio"].signal.grid(shapes["audio"])
    assert (frames, bands) == (197, 257)
    assert model.towers["audio"].grid_of(shapes["audio"]) == (12, 16)
    for view in ("video", "audio"):
        maps = model.tasks["avc"].score.reader.mlps[view]
        sizes = [tuple(p.shape) for p in maps.parameters()]
        assert sizes == [(128, 512), (128,), (128, 128), (128,)]


def test_the_positive_sound_starts_on_the_grid_of_frames():
    """Shortcut rule: picture and sound of a clip share one start, on the video's 0.04 s grid."""
    views = config.load(NAME).views
    assert views["video"].window == views["audio"].window
    assert views["video"].crop_s == 1 / views["video"].fps


# ---------------------------------------------------------------- at the start


def test_untrained_distances_are_those_of_random_unit_vectors():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 128, generator=g) for _ in range(2))
    distances = Distance().distances(a, b)
    assert float(distances.mean()) == pytest.approx(math.sqrt(2), abs=0.01)
    assert float(distances.std()) == pytest.approx(0.06, abs=0.01)
    logits = Distance().pairs(a, b)
    loss = (F.softplus(-logits).mean() + F.softplus(logits).mean()) / 2
    assert float(loss.detach()) == pytest.approx(0.693, abs=0.03)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_untrained_network_is_undecided(seed):
    model = small_model(small(NAME), seed)
    batch = full_batch(model.spec, 8)
    for mode in (model.eval, model.train):
        mode()
        video, audio = vectors(model, batch)
        distance = (video[:, None] - audio[None]).norm(dim=-1)
        assert float(distance.mean()) == pytest.approx(math.sqrt(2), abs=0.1)
        _, terms = model(batch, 0, 10)
        loss = float(terms["avc"].sum / terms["avc"].count)
        assert loss == pytest.approx(math.log(2), abs=0.03)


def test_the_coin_is_balanced():
    assert config.load(NAME).tasks["avc"].target.draw == "coin"
    seeds = torch.randint(0, 2**62, (4000,), generator=torch.Generator().manual_seed(0))
    share = float(coin(seeds, 0.5, "avc/coin").float().mean())
    assert share == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(4000))


def test_every_row_is_asked_once():
    model = small_model(small(NAME)).train()
    _, terms = model(full_batch(model.spec, 6), 0, 10)
    assert int(terms["avc"].count) == 6


# ---------------------------------------------------------------- the sign


def test_a_match_pulls_vectors_together_and_a_mismatch_pushes_them_apart():
    model = small_model(small(NAME))
    score = model.tasks["avc"].score
    assert isinstance(score, VectorMatch)
    # (mismatch, match): positive and negative weight, both logits 0 at the square root of 2
    assert score.score.weight.tolist() == [1.0, -1.0]
    assert score.score.bias.tolist() == pytest.approx([-math.sqrt(2), math.sqrt(2)])
    a, b = F.normalize(torch.randn(2, 20, 128, generator=torch.Generator().manual_seed(0)), dim=-1)
    for match in (True, False):
        x = a.clone().requires_grad_()
        logits = score.score.pairs(x, b)
        F.softplus(-logits if match else logits).sum().backward()
        moved = F.normalize(x.detach() - 0.1 * x.grad, dim=-1)
        change = (moved - b).norm(dim=-1) - (a - b).norm(dim=-1)
        assert (change < 0).all() if match else (change > 0).all()


# ---------------------------------------------------------------- the toy set

SIDE, SAMPLES = 16, 960
SMALL_NETWORKS = [
    f"towers.{view}.{key}"
    for view, patch in (("video", [1, 8, 8]), ("audio", [2, 32]))
    for key in (
        "backbone={kind: transformer, stride: null, width: 32, layers: 1, "
        "head_size: 16, hidden: 64}",
        f"cut={{kind: patches, patch: {patch}}}",
    )
]


def toy_model(seed=0):
    """The method on small transformers, one frame of 16 px and 20 ms of sound."""
    sizes = [f"views.video.size={SIDE}", f"views.audio.crop_s={SAMPLES / 48000}"]
    return small_model(small(NAME, *SMALL_NETWORKS, *sizes), seed)


def toy_batch(rows: int, seed: int) -> tuple[Batch, Tensor]:
    """Four colours in noise, paired with four tones of random phase; also each row's class."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, CLASSES, (rows,), generator=g)
    colours = torch.tensor([[48, 48, 48], [208, 48, 48], [48, 208, 48], [208, 208, 48]])
    noise = torch.randint(-40, 40, (rows, 1, SIDE, SIDE, 3), generator=g)
    frames = (colours[kind][:, None, None, None] + noise).to(torch.uint8)
    time = torch.arange(SAMPLES) / 48000
    phase = 2 * math.pi * torch.rand(rows, 1, generator=g)
    wave = 0.3 * torch.sin(2 * math.pi * (1500 + 2900 * kind[:, None]) * time + phase)
    wave = wave + 0.01 * torch.randn(rows, SAMPLES, generator=g)
    views = {"video": _view("video", frames, 25.0, g), "audio": _view("audio", wave, 48000.0, g)}
    place = torch.arange(rows)
    return Batch(views, [str(i) for i in range(rows)], place, torch.zeros_like(place), place), kind


def _view(modality: str, data: Tensor, rate: float, g: torch.Generator) -> ViewBatch:
    rows = torch.arange(len(data))
    seeds = torch.randint(0, 2**62, (len(data),), generator=g)
    full, one = torch.full_like(rows, data.shape[1]), torch.ones(len(data), 1, dtype=torch.bool)
    slots, start = torch.zeros_like(rows), torch.zeros(len(data))
    return ViewBatch(modality, data, full, rows, slots, seeds, start, one, rate)


def trained(sign: float):
    """Recall by class of sound to picture, and the accuracy, after a short training."""
    model = toy_model()
    with torch.no_grad():
        model.tasks["avc"].score.score.weight.mul_(sign)
        model.tasks["avc"].score.score.bias.mul_(sign)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(150):
        loss, _ = model.train()(toy_batch(64, 100 + step)[0], step, 150)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    batch, kind = toy_batch(256, 1)
    model.eval()
    video, audio = vectors(model, batch)
    nearest = (audio[:, None] - video[None]).norm(dim=-1).argmin(1)
    own = model.match_logit(batch, torch.arange(256))
    other = model.match_logit(batch, torch.arange(256).roll(1))
    accuracy = ((own > 0).float().mean() + (other < 0).float().mean()) / 2
    return float((kind[nearest] == kind).float().mean()), float(accuracy)


def test_sounds_find_pictures_of_their_class():
    recall, accuracy = trained(1.0)
    assert recall > 0.8
    # every false partner of the same class, one in four, cannot be told apart
    assert accuracy == pytest.approx(1 - 1 / (2 * CLASSES), abs=0.06)


def test_the_wrong_sign_decides_as_well_and_finds_nothing():
    recall, accuracy = trained(-1.0)
    assert recall < 0.5
    assert accuracy > 0.75
