"""Acceptance lists of MixIT (2020), PIT (2017) and denoising pre-training (2021)."""

import math

import pytest
import torch
from safetensors.torch import save_file
from small_methods import small, small_model

from mmssl import config
from mmssl.build import build_model
from mmssl.check import fake_batch
from mmssl.train.start import load_start_weights


def test_published_sizes():
    """torchaudio's Conv-TasNet of one and of two sources, in millions; TDCN++'s blocks."""
    with torch.device("meta"):
        found = {
            name: build_model(config.load(f"separation/{name}"))
            for name in ("mixit", "pit", "denoising")
        }
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in found.items()}
    assert round(count["denoising"] / 1e3) == 4919
    assert round(count["pit"] / 1e3) == 4985
    trunk = found["mixit"].towers["audio"].trunk
    assert len(trunk.blocks) == 32
    assert {b.along.dilation[0] for b in trunk.blocks} == {1 << i for i in range(8)}
    assert found["mixit"].tasks["separate"].head.masks.out_features == 8 * 256


def test_a_denoiser_lends_all_but_the_masks(tmp_path):
    stage_one = small_model(small("separation/denoising"), seed=7)
    file = tmp_path / "weights.safetensors"
    save_file(stage_one.state_dict(), file)
    spec = small("separation/pit", f"towers.audio.init={file}")
    model = small_model(spec)
    fresh = {n: p.clone() for n, p in model.state_dict().items()}
    loaded = load_start_weights(model, spec)
    theirs = stage_one.state_dict()
    left = [n for n in model.state_dict() if n not in loaded]
    assert left == ["tasks.separate.head.masks.weight", "tasks.separate.head.masks.bias"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, (theirs if name in loaded else fresh)[name]), name


@pytest.mark.parametrize("name", ["mixit", "pit", "denoising"])
def test_one_batch_is_learned(name):
    """Fifty steps on six clips: what remains is far below the loss of the mixture itself."""
    extra = ["tasks.separate.objective.outputs=3"] if name == "mixit" else []
    model = small_model(small(f"separation/{name}", *extra)).train()
    batch = fake_batch(model.spec, 6, 0, missing=False)
    for view in batch.views.values():  # tones instead of noise, the same in every view
        pitch = torch.arange(len(view.data))[:, None] + 2
        time = torch.arange(view.data.shape[1]) / view.data.shape[1]
        view.data = (2 * math.pi * 40 * pitch * time).sin() * 0.3
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for step in range(50):
        loss, _ = model(batch, step, 50)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 3.0
    assert losses[-1] < -3.0
