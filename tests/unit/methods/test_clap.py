"""CLAP's file and loss (Wu et al. 2023)."""

import math

import pytest
import torch
from small_methods import equal_rows, full_batch, small, small_model, values
from transformers.models.clap.modeling_clap import contrastive_loss

from mmssl import config
from mmssl.build import build_model, data_shape

NAME = "audio/clap"


def test_the_file_says_what_the_paper_says():
    spec = config.load(NAME)
    with torch.device("meta"):
        model = build_model(spec, 50265)
    audio = model.towers["audio"]
    shape = data_shape("audio", spec.views["audio"])
    assert audio.signal.grid(shape) == (1001, 64)  # 10 s at 48 kHz
    assert audio.grid_of(shape) == (62, 4)
    for view in ("audio", "text"):
        head = model.tasks["align"].embedder.heads.heads[f"{view}_to_at"]
        sizes = [tuple(p.shape) for p in head.parameters()]
        assert sizes == [(512, 768), (512,), (512, 512), (512,)]


def test_the_loss_is_that_of_transformers():
    model = small_model(small(NAME), dtype=torch.float64).eval()
    batch = full_batch(model.spec, 6)
    vectors = model.embed(batch)
    audio, text = (vectors[m, "at"][0] for m in ("audio", "text"))
    logits = audio @ text.T / 0.07
    want = (contrastive_loss(logits) + contrastive_loss(logits.T)) / 2
    assert values(model, batch)["align.at"] == pytest.approx(float(want.detach()), rel=1e-6)


def test_constant_features_give_chance():
    model = small_model(small(NAME), dtype=torch.float64).eval()
    batch = equal_rows(full_batch(model.spec, 9))
    assert values(model, batch)["align.at"] == pytest.approx(math.log(9), abs=1e-9)
