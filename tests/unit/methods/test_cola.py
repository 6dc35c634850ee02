"""COLA's acceptance list on configs/methods/audio/cola.yaml (Saeed et al. 2021)."""

import math
from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small_methods import equal_rows, full_batch, small, small_model, values
from tiny_run import gradients, take_rows
from torch import Tensor
from torch.nn import functional as F

from mmssl import config
from mmssl.build import data_shape
from mmssl.heads.embed import pool
from mmssl.heads.project import Head
from mmssl.heads.score import Bilinear
from mmssl.types import Batch, ViewBatch
from mmssl.views.plan import Seeds, plan

NAME = "audio/cola"


@pytest.fixture(scope="module")
def model():
    """Widths and depths are the published ones, on short crops; no layer is skipped at random.

    It stays in training mode: with the batch statistics of before the first step an untrained
    EfficientNet gives the same for all inputs.
    """
    steady = "towers.audio.backbone.drop_path=0"
    return small_model(small(NAME, "tasks.cola.heads.spaces.cola.dim=512", steady)).train()


def table(model, batch):
    """(B, B) bilinear scores, anchors against positives."""
    z = model.tasks["cola"].vectors(model.passes(batch))
    a, p = (z[view, "cola"][0][:, 0] for view in ("anchor", "positive"))
    return (a @ model.tasks["cola"].scores["crops"].score.weight @ p.T).detach()


# ---------------------------------------------------------------- the file


def test_the_encoder_and_the_projection_are_the_published_ones(model):
    tower = model.towers["audio"]
    assert type(tower.network).__name__ == "EfficientNetB0"
    spec = config.load(NAME)
    shape = data_shape("anchor", spec.views["anchor"])
    assert tower.signal.grid(shape) == (96, 64)  # 96 frames, 64 bands
    heads = model.tasks["cola"].embedder.heads.heads
    layers = [type(m).__name__ for m in heads["audio_to_cola"].layers]
    assert layers == ["Linear", "LayerNorm", "Tanh"]
    assert heads["audio_to_cola"].layers[0].in_features == 1280
    weight = model.tasks["cola"].scores["crops"].score.weight
    assert weight.shape == (512, 512)
    assert float(weight.detach().std()) == pytest.approx(0.05, rel=0.02)
    assert not list(model.tasks["cola"].scales.parameters())  # no temperature


def test_the_two_crops_are_cut_independently():
    views = config.load(NAME).views
    starts = []
    for i in range(400):
        cuts = plan(views, 10.0, {"audio"}, Seeds(0, f"clip-{i}", (1,)), training=True).cuts
        starts.append([cuts[n].start_s for n in ("anchor", "positive")])
    a, p = torch.tensor(starts, dtype=torch.float64).T
    room = 10 - 0.975
    for x in (a, p):
        assert 0 <= float(x.min()) < float(x.max()) <= room
        assert float(x.mean()) == pytest.approx(room / 2, abs=4 * room / math.sqrt(12 * 400))
    assert abs(float(torch.corrcoef(torch.stack([a, p]))[0, 1])) < 4 / math.sqrt(400)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("rows", [3, 8])
def test_constant_embeddings_give_the_log_of_the_batch(model, rows):
    batch = equal_rows(full_batch(model.spec, rows))
    batch.views["positive"] = replace(batch.views["positive"], data=batch.views["anchor"].data)
    assert values(model, batch) == pytest.approx({"cola.crops": math.log(rows)}, abs=1e-3)
    with torch.no_grad():
        model.tasks["cola"].scores["crops"].score.weight.mul_(0.1)
    try:
        assert values(model, batch)["cola.crops"] == pytest.approx(math.log(rows), abs=1e-4)
    finally:
        with torch.no_grad():
            model.tasks["cola"].scores["crops"].score.weight.mul_(10)


def test_the_log_of_the_published_batch():
    assert math.log(config.load(NAME).train.batch) == pytest.approx(6.9315, abs=5e-5)


def test_the_term_is_cross_entropy_from_anchors_to_positives_only(model):
    batch = full_batch(model.spec, 8)
    scores = table(model, batch)
    want = float(F.cross_entropy(scores, torch.arange(8)))
    assert values(model, batch)["cola.crops"] == pytest.approx(want, rel=1e-5, abs=1e-6)
    assert abs(want - float(F.cross_entropy(scores.T, torch.arange(8)))) > 1e-4


def test_the_matching_counts_and_the_order_does_not(model):
    batch = full_batch(model.spec, 6)
    want = values(model, batch)["cola.crops"]
    moved = take_rows(batch, [3, 1, 5, 0, 2, 4])
    assert values(model, moved)["cola.crops"] == pytest.approx(want, rel=1e-4)
    positive = batch.views["positive"]
    batch.views["positive"] = replace(positive, data=positive.data.roll(1, 0))
    assert abs(values(model, batch)["cola.crops"] - want) > 1e-4


def test_independent_features_start_at_33():
    """The published initial loss: logits of standard deviation 10 at B = 1024, not ln B."""
    torch.manual_seed(0)
    head, score = Head("linear_norm_tanh", 1280, 512), Bilinear(512, 0.05)
    with torch.no_grad():
        a, p = (head(torch.randn(1024, 1280)) for _ in range(2))
        scores = score(a, p)
        loss = F.cross_entropy(scores, torch.arange(1024))
    assert float(scores.std()) == pytest.approx(10, abs=1.5)
    assert float(loss) == pytest.approx(33, abs=4)


def test_two_crops_of_one_recording_are_no_negatives(model):
    batch = full_batch(model.spec, 4)
    batch.source_B[:] = torch.tensor([1, 2, 1, 3])
    scores = table(model, batch)
    scores[0, 2] = scores[2, 0] = -math.inf
    want = float(F.cross_entropy(scores, torch.arange(4)))
    assert values(model, batch)["cola.crops"] == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_gradient_flows_through_both_crops():
    model = small_model(small(NAME))
    batch = full_batch(model.spec, 3)
    passes = model.train().passes(batch)
    tokens = {v: passes.tokens(v).x_PND for v in ("anchor", "positive")}
    for x in tokens.values():
        x.retain_grad()
    model.tasks["cola"](passes, batch)["crops"].sum.backward()
    assert all(float(x.grad.abs().max()) > 0 for x in tokens.values())
    _, grads = gradients(model, batch)
    assert set(grads) == {n for n, _ in model.named_parameters()}
    assert passes.tower("anchor") is passes.tower("positive")


def test_downstream_reads_the_largest_value_of_each_channel(model):
    assert config.load(NAME).tasks["cola"].heads.spaces["cola"].pool == "max"
    assert model.towers["audio"].width == 1280


# ---------------------------------------------------------------- the toy set

TIMBRES, HARMONICS, SAMPLES, STEPS = 10, 12, 4800, 300
SMALL_NETWORK = (
    "towers.audio.backbone={kind: transformer, drop_path: null, width: 32, layers: 1,"
    " head_size: 16, hidden: 64}",
    "towers.audio.cut={kind: patches, patch: [7, 8]}",
    "tasks.cola.heads.spaces.cola.dim=64",
    *(f"views.{view}.crop_s={SAMPLES / 16000}" for view in ("anchor", "positive")),
)


def toy_batch(rows: int, seed: int) -> tuple[Batch, Tensor]:
    """Two crops of each recording share a timbre only: pitch, phase and loudness are free."""
    g = torch.Generator().manual_seed(seed)
    strengths = torch.rand(TIMBRES, HARMONICS, generator=torch.Generator().manual_seed(0)) ** 3
    strengths = F.normalize(strengths, dim=1)
    kind = torch.randint(0, TIMBRES, (rows,), generator=g)
    waves = {name: _tones(strengths[kind], g) for name in ("anchor", "positive")}
    place = torch.arange(rows)
    views = {name: _view(wave, g) for name, wave in waves.items()}
    return Batch(views, [str(i) for i in range(rows)], place, torch.zeros_like(place), place), kind


def _tones(strength: Tensor, g: torch.Generator) -> Tensor:
    rows = len(strength)
    base = 100 * 4 ** torch.rand(rows, 1, generator=g)
    phase = 2 * math.pi * torch.rand(rows, HARMONICS, generator=g)
    time = torch.arange(SAMPLES) / 16000
    wave = torch.zeros(rows, SAMPLES)
    for n in range(HARMONICS):
        angle = 2 * math.pi * (n + 1) * base * time + phase[:, n : n + 1]
        wave += strength[:, n : n + 1] * torch.sin(angle)
    loudness = 0.1 + 0.5 * torch.rand(rows, 1, generator=g)
    return loudness * wave + 0.02 * torch.randn(rows, SAMPLES, generator=g)


def _view(wave: Tensor, g: torch.Generator) -> ViewBatch:
    rows = torch.arange(len(wave))
    seeds = torch.randint(0, 2**62, (len(wave),), generator=g)
    full, one = torch.full_like(rows, SAMPLES), torch.ones(len(wave), 1, dtype=torch.bool)
    slots, start = torch.zeros_like(rows), torch.zeros(len(wave))
    return ViewBatch("audio", wave, full, rows, slots, seeds, start, one, 16000.0)


def probed(model) -> float:
    """Accuracy of a linear probe on the pooled features of 200 clips, fitted on 300."""

    def features(seed, rows):
        batch, kind = toy_batch(rows, seed)
        with torch.no_grad():
            x = pool(model.eval().passes(batch).tokens("anchor"), "max")
        return x.numpy(), kind.numpy()

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    return probe.fit(*features(1, 300)).score(*features(2, 200))


def test_a_linear_probe_gains_twenty_points_over_the_same_random_encoder():
    """On a small transformer: EfficientNet-B0 takes minutes on a CPU for the same."""
    model = small_model(small(NAME, *SMALL_NETWORK))
    before = probed(model)
    corpus, _ = toy_batch(640, 1000)
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    g = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        batch = take_rows(corpus, torch.randperm(640, generator=g)[:32].tolist())
        optimiser.param_groups[0]["lr"] = 5e-3 * (1 - step / STEPS)
        loss, _ = model.train()(batch, step, STEPS)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert probed(model) > before + 0.2
