"""SimCLR's acceptance list (Chen et al. 2020) on frames, on spectrograms and across modalities."""

import math

import pytest
import torch
from small_methods import equal_rows, full_batch, small, small_model, values
from tiny_run import gradients, take_rows
from torch.nn import functional as F

from mmssl import config
from mmssl.check import fake_batch

FRAMES, SOUNDS, BOTH = "general/simclr", "audio/simclr", "simclr_av_tiny"
SHARED = (
    "shared={width: 16, layers: 1, head_size: 8, hidden: 32}",
    "towers.audio.backbone=shared",
    "towers.audio.cut={kind: patches, patch: [6, 8]}",
)


def flat(model, batch):
    """(2B, D) unit vectors, first the one side, then the other."""
    z = model.tasks["simclr"].vectors(model.passes(batch))
    return torch.cat(
        [F.normalize(z[view, "z"][0][:, 0], dim=1) for view in ("one", "two")]
    ).detach()


def nt_xent(z_ND, temperature):
    """Written out: every row against its partner among all others."""
    size = len(z_ND)
    table = (z_ND @ z_ND.T / temperature).fill_diagonal_(-math.inf)
    return float(F.cross_entropy(table, torch.arange(size).roll(size // 2)))


def temperature(spec):
    return spec.tasks["simclr"].pairs["views"].objective.temperature


@pytest.mark.parametrize("name", [FRAMES, SOUNDS, BOTH])
def test_the_term_is_nt_xent(name):
    spec = small(name)
    model = small_model(spec).train()
    batch = full_batch(spec, 5)
    want = nt_xent(flat(model, batch).double(), temperature(spec))
    assert values(model, batch)["simclr.views"] == pytest.approx(want, rel=1e-5)


def test_it_is_lightlys():
    loss = pytest.importorskip("lightly.loss", reason="pip install --no-deps -r tests/peers.txt")
    model = small_model(small(SOUNDS)).train()
    batch = full_batch(model.spec, 6)
    a, b = flat(model, batch).chunk(2)
    want = float(loss.NTXentLoss(temperature=0.2)(a, b))
    assert values(model, batch)["simclr.views"] == pytest.approx(want, rel=1e-5)


def test_it_is_that_of_pytorch_metric_learning():
    """In double precision, down to the gradients of all parameters."""
    peer = pytest.importorskip(
        "pytorch_metric_learning.losses", reason="pip install --no-deps -r tests/peers.txt"
    )
    model = small_model(small(SOUNDS), dtype=torch.float64).train()
    batch = full_batch(model.spec, 6)
    ours, grads = gradients(model, batch)
    z = model.tasks["simclr"].vectors(model.passes(batch))
    a, b = (z[view, "z"][0][:, 0] for view in ("one", "two"))
    theirs = peer.SelfSupervisedLoss(peer.NTXentLoss(temperature=0.2), symmetric=True)(a, b)
    assert float(ours) == pytest.approx(float(theirs.detach()), abs=1e-6)
    found = torch.autograd.grad(theirs, [p for n, p in model.named_parameters() if n in grads])
    for grad, other in zip(grads.values(), found, strict=True):  # the temperature is kept in fp32
        torch.testing.assert_close(grad, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [4, 16])
def test_equal_vectors_give_the_log_of_all_others(rows):
    model = small_model(small(SOUNDS)).eval()
    batch = equal_rows(full_batch(model.spec, rows))
    batch.views["two"] = batch.views["one"]
    got = values(model, batch)["simclr.views"]
    assert got == pytest.approx(math.log(2 * rows - 1), abs=1e-4)


def test_the_order_does_not_count_and_the_matching_does():
    model = small_model(small(SOUNDS)).train()
    batch = full_batch(model.spec, 6)
    want = values(model, batch)["simclr.views"]
    moved = take_rows(batch, [3, 1, 5, 0, 2, 4])
    assert values(model, moved)["simclr.views"] == pytest.approx(want, rel=1e-4)
    views = batch.views
    views["one"], views["two"] = views["two"], views["one"]
    assert values(model, batch)["simclr.views"] == pytest.approx(want, rel=1e-4)
    views["two"].data = views["two"].data.roll(1, 0)
    assert abs(values(model, batch)["simclr.views"] - want) > 1e-4


def test_rows_without_a_side_and_equal_recordings_compete_with_nobody():
    model = small_model(small(BOTH)).eval()
    batch = fake_batch(model.spec, 6)  # row 1 lacks sound, row 2 frames
    batch.source_B[3] = batch.source_B[0]
    z = flat(model, batch).double()
    table = (z @ z.T / temperature(model.spec)).fill_diagonal_(-math.inf)
    absent = [1, 6 + 2]
    table[:, absent] = -math.inf
    for i, j in ((0, 3), (0, 9), (6, 3), (6, 9)):
        table[i, j] = table[j, i] = -math.inf
    loss = torch.logsumexp(table, 1) - table[torch.arange(12), torch.arange(12).roll(6)]
    kept = [i for i in range(12) if i % 6 not in (1, 2)]
    got = values(model, batch)["simclr.views"]
    assert got == pytest.approx(float(loss[kept].mean()), rel=1e-5)


def test_the_shared_transformer_takes_the_place_of_the_network():
    model = small_model(small(SOUNDS, *SHARED)).train()
    loss, _ = model(full_batch(model.spec, 4), 0, 10)
    loss.backward()
    assert model.trunk is not None
    assert all(p.grad is not None for p in model.parameters())


def test_the_files_say_what_the_paper_says():
    spec = config.load(FRAMES)
    assert spec.optim.lr == pytest.approx(0.3 * spec.train.batch / 256)
    assert math.log(2 * spec.train.batch - 1) == pytest.approx(9.0108, abs=1e-4)
    assert [a.kind for a in spec.views["one"].augment] == [
        "random_resized_crop",
        "horizontal_flip",
        "color_jitter",
        "grayscale",
        "blur",
    ]
