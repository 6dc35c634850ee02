"""A trained run back to a model that can be evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from mmssl import config
from mmssl.build import build_model
from mmssl.data.text import Tokenizer
from mmssl.model import Model
from mmssl.rng import seed_of
from mmssl.specs import RunSpec
from mmssl.train import checkpoint

Which = Literal["ema", "best", "last"]


def load_model(
    run: str | Path, which: Which = "ema", random: bool = False
) -> tuple[Model, RunSpec, Tokenizer | None]:
    """Model in evaluation mode, resolved configuration and tokenizer of a run folder.

    which: `ema` takes the averaged weights of the best checkpoint where the run kept them, else its
    plain weights; `best` the plain weights of the best checkpoint (the newest where the run did not
    validate); `last` those of the newest. random: fresh weights instead, the baseline of every
    metric.

    Raises:
        UserError: no complete checkpoint.
    """
    folder = checkpoint.find(run, "last" if which == "last" else "best")
    spec = config.load(folder / "config.yaml")
    file = folder / "tokenizer.model"
    tokenizer = Tokenizer.load(file) if file.is_file() else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(spec.train.seed, "random baseline"))
        if tokenizer is None:
            model = build_model(spec)
        else:
            words = (tokenizer.vocab_size, tokenizer.special, tokenizer.begins)
            model = build_model(spec, *words)
    if not random:
        averaged = which == "ema" and (folder / "ema.safetensors").is_file()
        model.load_state_dict(checkpoint.load_weights(folder, ema=averaged))
    return model.eval(), spec, tokenizer
