"""Run folders of small methods with a real tokenizer, and media to encode."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from small_methods import small
from tiny_run import recipe, tiny_spec

from data_tools.train_tokenizer import Options, train_model
from mmssl.build import build_model
from mmssl.data.text import Tokenizer
from mmssl.embed.model import EmbeddingModel
from mmssl.interop.huggingface import write_run
from mmssl.specs import RunSpec

WORDS = ["a dog barks at the door", "a cat sleeps", "rain falls on a tin roof", "the sea at night"]


@cache
def tokenizer() -> Tokenizer:
    """A model of a few words and all bytes."""
    return Tokenizer(train_model(WORDS, Options(vocab=320)))


def spec_of(name: str) -> RunSpec:
    """`tiny` is the flagship's wiring; the others are published methods."""
    return tiny_spec(**recipe()) if name == "tiny" else small(name)


def embedding(name: str, spec: RunSpec | None = None) -> EmbeddingModel:
    """The interface of a run with seeded weights."""
    torch.manual_seed(0)
    words = tokenizer()
    model = build_model(spec or spec_of(name), words.vocab_size, words.special, words.begins)
    for part in model.modules():  # batch norms as after training, not the identity
        if isinstance(getattr(part, "running_mean", None), torch.Tensor):
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 2.0)
    has_text = any(v.modality == "text" for v in model.spec.views.values())
    return EmbeddingModel(model, words if has_text else None)


def run_folder(path: Path, name: str = "tiny") -> EmbeddingModel:
    """Write a run folder; returns the interface of the same weights."""
    made = embedding(name)
    write_run(path, made.spec, made.model.state_dict(), "test")
    if made.tokenizer is not None:
        (path / "tokenizer.model").write_bytes(made.tokenizer.model)
    return made
