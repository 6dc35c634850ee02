"""BERT with its heads: masked words, and the order of sentences.

Its tokenizer is not read: an imported tower takes ids of the vocabulary it was made with, and says
how many there are (`cut.vocabulary`).
"""

from __future__ import annotations

from mmssl.interop.entries import Config, Flat, Key, one, only
from mmssl.interop.layout import Heads, Layout
from mmssl.interop.names import Row, Sizes, pair, stacked, tensor

_BLOCK, _LAYER = "tower.own_trunk.blocks.{n}", "encoder.layer.{n}"
_TABLES = "tower.stem.own"


def _heads(config: Config) -> tuple[int, int]:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise ValueError(f"hidden_size {width} is no multiple of it")
    return heads, width // heads


def _sizes(run: Flat) -> Sizes:
    return {}


_WORDS: tuple[Row, ...] = (
    *pair("task.target.head.dense", "cls.predictions.transform.dense"),
    *pair("task.target.head.norm", "cls.predictions.transform.LayerNorm"),
    *tensor("task.target.head.bias_V", "cls.predictions.bias"),
)
_TASK = {
    "task.kind": "masked",
    "task.mask.rule": "words",
    "task.mask.ratio": 0.15,
    "task.target.kind": "ids",
    "task.target.head": "bert",
}
_TIED = (only("tie_word_embeddings", True),)

BERT = Layout(
    "bert",
    "text",
    "BertModel",
    "bert",
    keys=(
        one("vocab_size", 30522, "tower.cut.vocabulary"),
        one("hidden_size", 768, "tower.backbone.width"),
        one("num_hidden_layers", 12, "tower.backbone.layers"),
        Key(
            "num_attention_heads",
            12,
            ("tower.backbone.heads", "tower.backbone.head_size"),
            read=_heads,
        ),
        one("intermediate_size", 3072, "tower.backbone.hidden"),
        only("hidden_act", "gelu"),
        one("hidden_dropout_prob", 0.1, "tower.backbone.dropout", "tower.cut.dropout"),
        one("attention_probs_dropout_prob", 0.1, "tower.backbone.attention_dropout"),
        one("max_position_embeddings", 512, "tower.cut.places", "view.length"),
        one("type_vocab_size", 2, "tower.cut.segments"),
        one("layer_norm_eps", 1e-12, "tower.backbone.eps", "tower.cut.eps"),
        only("position_embedding_type", "absolute"),
        only("is_decoder", False),
        only("add_cross_attention", False),
    ),
    constants={
        "tower.modality": "text",
        "tower.frontend.kind": "ids",
        "tower.cut.kind": "summed",
        "tower.positions.kind": "none",
        "tower.globals": [],
        "tower.backbone.kind": "transformer",
        "tower.backbone.post_norm": True,
        "tower.backbone.activation_dropout": 0.0,
        "tower.backbone.output_dropout": 0.0,
        "tower.backbone.fresh": "normal",
        "view.modality": "text",
    },
    rows=(
        *tensor(f"{_TABLES}.table.weight", "embeddings.word_embeddings.weight"),
        *tensor(f"{_TABLES}.positions.axis0", "embeddings.position_embeddings.weight"),
        *tensor(f"{_TABLES}.segments.weight", "embeddings.token_type_embeddings.weight"),
        *pair(f"{_TABLES}.norm", "embeddings.LayerNorm"),
        *stacked(
            f"{_BLOCK}.attention.qkv",
            *(f"{_LAYER}.attention.self.{part}" for part in ("query", "key", "value")),
        ),
        *pair(f"{_BLOCK}.attention.out", f"{_LAYER}.attention.output.dense"),
        *pair(f"{_BLOCK}.norm1.parts.shared", f"{_LAYER}.attention.output.LayerNorm"),
        *pair(f"{_BLOCK}.ffn.parts.shared.up", f"{_LAYER}.intermediate.dense"),
        *pair(f"{_BLOCK}.ffn.parts.shared.down", f"{_LAYER}.output.dense"),
        *pair(f"{_BLOCK}.norm2.parts.shared", f"{_LAYER}.output.LayerNorm"),
        *pair("task.target.sentence.pooler", "pooler.dense"),
    ),
    sizes=_sizes,
    task="mlm",
    heads=(
        Heads(
            "BertForPreTraining",
            marker="cls.seq_relationship.weight",
            keys=_TIED,
            constants={**_TASK, "task.target.sentence": True, "view.segments.pairing": "next"},
            rows=(*_WORDS, *pair("task.target.sentence.out", "cls.seq_relationship")),
        ),
        Heads("BertForMaskedLM", "cls.predictions.bias", _TIED, _TASK, _WORDS),
    ),
    aliases=(
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
        # the tables once more, and places counted
        (r"^cls\.predictions\.decoder\.(weight|bias)$", None),
        (r"^embeddings\.position_ids$", None),
    ),
    spare=("pooler.dense.weight", "pooler.dense.bias"),
    needs={
        "pooler.dense.weight": "their encoder pools the first token as BERT's sentence head does, "
        "which this run has not; export the masked words' head with heads=true"
    },
)
