"""Acceptance of Audio2Vec and Audio Word2Vec (Tagliasacchi et al. 2020; Chung et al. 2016)."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from small_methods import full_batch, small, small_model

from mmssl import config
from mmssl.build import build_model
from mmssl.check import fake_batch


def with_view(batch, **changes):
    return replace(batch, views={"x": replace(batch.views["x"], **changes)})


def published(name):
    with torch.device("meta"):
        return build_model(config.load(f"audio/{name}"), 0, None)


def test_published_sizes():
    widths = [1, 64, 128, 256, 256, 512]
    pairs = list(pairwise(widths))
    encoder = sum(3 * a * b + 3 * b * b + 4 * b for a, b in pairs) + 512 * 128 + 128
    # mirrored from 3 x 2 cells on: norms of what enters and leaves, the last map is bare
    mirror = sum(3 * b * b + 2 * b + 3 * b * a + 2 * a for a, b in pairs[1:])
    for name, vectors, slices in (("cbow", 4, 1), ("skipgram", 1, 4)):
        model = published(f"audio2vec_{name}")
        assert sum(p.numel() for p in model.towers.parameters()) == encoder
        enter = (128 * vectors + 1) * 512 * 6
        last = 3 * 64 * 64 + 2 * 64 + (3 * 64 + 1) * slices
        assert sum(p.numel() for p in model.tasks.parameters()) == enter + mirror + last
    head = (2 * 128 + 1) * 64 + 65
    assert sum(p.numel() for p in published("audio2vec_gap").tasks.parameters()) == head
    lstm = 4 * 100 * (13 + 100 + 2)
    model = published("audio_word2vec")
    assert sum(p.numel() for p in model.parameters()) == 2 * lstm + 101 * 13


def test_cbow_beats_the_mean_of_its_neighbours():
    """The middle is the difference of the sides: their mean is worse than 0, which costs 1."""
    spec = small("audio2vec_cbow_tiny")
    model = small_model(spec).train()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    batch = full_batch(spec, 16)
    for _ in range(80):
        sides = torch.randn(16, 2, 1, 1, generator=generator) / 2**0.5
        shape = torch.ones(16, 1, 6, 40)
        signal = torch.zeros(16, 1, 61, 40)
        signal[:, :, :6], signal[:, :, 20:26] = sides[:, :1] * shape, sides[:, 1:] * shape
        signal[:, :, 10:16] = (sides[:, :1] - sides[:, 1:]) * shape
        loss, _ = model(with_view(batch, signal=signal), 0, 10)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    copied = (signal[:, :, :6] + signal[:, :, 20:26]) / 2
    baseline = float((copied - signal[:, :, 10:16]).square().mean())
    assert loss.item() < 0.5 * baseline


# ---------------------------------------------------------------- words


def test_padded_frames_change_neither_the_vector_nor_the_loss():
    spec = small("audio/audio_word2vec", "views.x.crop_s=0.9")
    model = small_model(spec).double().eval()
    view = full_batch(spec, 3).views["x"]
    batch = full_batch(spec, 3)
    lengths = torch.tensor([6400, 3000, 5000])
    task = model.tasks["words"]
    found = []
    for samples in (6400, 14400):  # 50 more frames of noise
        cut = with_view(batch, data=view.data[:, :samples].double(), lengths_P=lengths)
        passes = model.passes(cut, 0.0)
        encoded = task.encode(passes, cut)
        term = task(model.passes(cut, 0.0), cut)[""]
        found.append((encoded.x_PND, term.sum, term.count, encoded.truth.signal.shape[2]))
    assert found[1][3] == found[0][3] + 50
    for one, two in zip(found[0][:3], found[1][:3], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    frames = model.towers["audio"].frames(with_view(batch, lengths_P=lengths).views["x"])
    assert int(found[0][2]) == int(frames.sum())
    whole = passes.tokens("x").x_PND
    torch.testing.assert_close(found[1][0][:, 0], whole[torch.arange(3), frames - 1])


@pytest.fixture(scope="module")
def words():
    """A model of words of three units out of five, three frames each, and all such words."""
    options = ["towers.audio.backbone.width=48", "towers.audio.backbone.layers=1"]
    spec = small("audio/audio_word2vec", *options, "views.x.crop_s=0.105")
    model = small_model(spec).train()
    generator = torch.Generator().manual_seed(0)
    units = torch.randn(5, 13, generator=generator)
    spelled = torch.tensor(list(product(range(5), repeat=3)))
    frames = units[spelled].repeat_interleave(3, 1)[:, None]
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    batch = fake_batch(spec, 64, missing=False)
    assert batch.views["x"].data.shape[1] == 1680  # nine frames
    for k in range(250):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * (1 - k / 250)
        drawn = torch.randint(len(frames), (64,), generator=generator)
        loss, _ = model(with_view(batch, signal=frames[drawn]), 0, 10)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    everyone = fake_batch(spec, len(frames), missing=False)
    return model.eval(), with_view(everyone, signal=frames), spelled


def test_the_vector_is_what_a_word_is_said_from(words):
    """Vectors of other words raise the error by more than half."""
    model, batch, _ = words
    task = model.tasks["words"]
    with torch.no_grad():
        found = task.encode(model.passes(batch), batch)
        own = task.decoder(found.x_PND, found.truth)[""]
        order = torch.randperm(len(found.x_PND), generator=torch.Generator().manual_seed(1))
        others = task.decoder(found.x_PND[order], found.truth)[""]
    assert float(others.sum) > 1.5 * float(own.sum)


def test_vectors_are_the_farther_apart_the_more_units_differ(words):
    model, batch, spelled = words
    with torch.no_grad():
        z = model.tasks["words"].encode(model.passes(batch), batch).x_PND[:, 0]
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    edits = (spelled[:, None] != spelled).sum(-1)
    means = [float(distance[edits == k].mean()) for k in range(4)]
    assert means[0] < 1e-4
    assert means == sorted(means)
    assert means[3] > 1.2 * means[1]
