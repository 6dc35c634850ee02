"""The text methods at test size, batches with padding, and their weights under a peer's names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from small_methods import full_batch, small, small_model
from torch import Tensor, nn

from mmssl.check import SPECIAL
from mmssl.model import Model
from mmssl.tasks.masked import Masked
from mmssl.towers import Tower
from mmssl.types import Batch

LENGTH, SPLIT, LAYERS = 24, 6, 2
EXTRA = {
    "bert": (),
    "albert": ("towers.text.cut.width=8",),
    "electra": (
        "towers.text.cut.width=12",
        "towers.generator.backbone.width=8",
        "views.masked.length=24",
    ),
    "data2vec_text": ("tasks.latents.hidden=24", "tasks.latents.target.layers=2"),
}


def text_model(name: str, *overrides: str) -> Model:
    """A method at width 16 with two layers on rows of 24 ids."""
    towers = ("text", "generator") if name == "electra" else ("text",)
    sizes = [f"towers.{tower}.backbone.layers={LAYERS}" for tower in towers]
    spec = small(f"general/{name}", "views.text.length=24", *sizes, *EXTRA[name], *overrides)
    return small_model(spec)


def padded_batch(model: Model, rows: int = 4) -> Batch:
    """Rows of 24, 21, 18 ... ids; pairs break behind the sixth. All views hold the same text."""
    batch = full_batch(model.spec, rows)
    data = torch.randint(5, 512, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([LENGTH - 3 * (i % 4) for i in range(rows)])
    data[:, 0] = SPECIAL["bos"]
    data[torch.arange(rows), lengths - 1] = SPECIAL["eos"]
    data[torch.arange(LENGTH) >= lengths[:, None]] = SPECIAL["pad"]
    for name, view in batch.views.items():
        pairs = model.spec.views[name].segments.pairing != "single"
        if pairs:
            data[:, SPLIT - 1] = SPECIAL["eos"]
        split = torch.full((rows,), SPLIT if pairs else 0)
        order = torch.arange(rows) % 2 if pairs else torch.full((rows,), -1)
        batch.views[name] = replace(
            view, data=data, lengths_P=lengths, split_P=split, order_P=order
        )
    return batch


def seen_of(model: Model, batch: Batch) -> Any:
    """What the masked pass leaves for its target."""
    task = next(iter(model.tasks.values()))
    assert isinstance(task, Masked)
    return task._seen(model.passes(batch, 0.0), batch)


def zeroed(*layers: nn.Linear) -> None:
    """Maps that return zero."""
    with torch.no_grad():
        for layer in layers:
            layer.weight.zero_()
            layer.bias.zero_()


# ---------------------------------------------------------------- peers

BERT_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
ALBERT_LAYER = {
    "q": "attention.query",
    "k": "attention.key",
    "v": "attention.value",
    "out": "attention.dense",
    "norm1": "attention.LayerNorm",
    "up": "ffn",
    "down": "ffn_output",
    "norm2": "full_layer_layer_norm",
}


def peer_sizes(model: Model, tower: str = "text") -> dict[str, Any]:
    """Arguments of a peer's configuration."""
    spec = model.spec.towers[tower].backbone
    return {
        "vocab_size": 512,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.width // spec.head_size,
        "intermediate_size": spec.hidden,
        "hidden_act": "gelu",
        "attn_implementation": "eager",
    }


def linear_of(name: str, layer: nn.Module) -> dict[str, Tensor]:
    """Weight and bias of a map or a norm under a name."""
    return {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}


def embeddings_of(tower: Tower, root: str) -> dict[str, Tensor]:
    """The tables."""
    tables = tower.stem.tables
    return {
        f"{root}.word_embeddings.weight": tables.table.weight,
        f"{root}.position_embeddings.weight": tables.positions.axis0,
        f"{root}.token_type_embeddings.weight": tables.segments.weight,
        **linear_of(f"{root}.LayerNorm", tables.norm),
    }


def layers_of(tower: Tower, root: str, names: dict[str, str]) -> dict[str, Tensor]:
    """The layers; a shared one has the number 0."""
    out: dict[str, Tensor] = {}
    for i, block in enumerate(tower.trunk.blocks):
        where = f"{root}.{i}."
        qkv = block.attention.qkv
        for key, weight, bias in zip("qkv", qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True):
            out |= {f"{where}{names[key]}.weight": weight, f"{where}{names[key]}.bias": bias}
        ffn = block.ffn.parts["shared"]
        parts = {"out": block.attention.out, "up": ffn.up, "down": ffn.down}
        parts |= {"norm1": block.norm1.parts["shared"], "norm2": block.norm2.parts["shared"]}
        for key, part in parts.items():
            out |= linear_of(where + names[key], part)
    return out


def load_all(peer: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy the weights; every parameter of the peer must be among them."""
    left = set(peer.state_dict()) - set(weights)
    assert not left, left
    peer.load_state_dict({name: tensor.detach() for name, tensor in weights.items()})
    peer.eval()
