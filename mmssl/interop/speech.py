"""wav2vec 2.0 (both norm positions), its Conformer, HuBERT, WavLM and data2vec for speech."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmssl.interop.entries import Config, Flat, Key, one, only
from mmssl.interop.layout import Heads, Layout
from mmssl.interop.names import Fixed, Row, Rule, Sizes, pair, reshaped, stacked, tensor

_DIM = [512] * 7
_KERNELS = [10, 3, 3, 3, 3, 2, 2]
_STRIDES = [5, 2, 2, 2, 2, 2, 2]
_BLOCK, _LAYER = "tower.own_trunk.blocks.{n}", "encoder.layers.{n}"

# ---------------------------------------------------------------- config.json


def _heads(config: Config) -> tuple[int, int]:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise ValueError(f"hidden_size {width} is no multiple of it")
    return heads, width // heads


def _channels(config: Config) -> tuple[int]:
    dims = config["conv_dim"]
    if len(set(dims)) != 1:
        raise ValueError("here all convolutions have equally many channels")
    return (dims[0],)


def _mask_share(run: Flat) -> float:
    """Their share counts the tokens of the spans; without a task there is no mask vector."""
    if not run.get("task.embedding"):
        return 0.0
    return float(round(run["task.mask.start_prob"] * run["task.mask.length"], 12))


def _start_share(config: Config) -> tuple[float]:
    return (round(config["mask_time_prob"] / config["mask_time_length"], 12),)


# the convolutions' own norms have their library's 1e-5, whatever layer_norm_eps says
_COMMON = (
    one("hidden_size", 768, "tower.backbone.width"),
    one("num_hidden_layers", 12, "tower.backbone.layers"),
    Key(
        "num_attention_heads",
        12,
        ("tower.backbone.heads", "tower.backbone.head_size"),
        read=_heads,
    ),
    one("intermediate_size", 3072, "tower.backbone.hidden"),
    one("hidden_dropout", 0.1, "tower.backbone.dropout"),
    one("activation_dropout", 0.1, "tower.backbone.activation_dropout"),
    one("attention_dropout", 0.1, "tower.backbone.attention_dropout"),
    one("layerdrop", 0.1, "tower.backbone.layer_drop"),
    one("layer_norm_eps", 1e-5, "tower.backbone.eps", only=(1e-5,)),
    one("feat_proj_dropout", 0.0, "tower.cut.dropout"),
    one("feat_extract_activation", "gelu", "tower.cut.activation", only=("gelu",)),
    Key(
        "conv_dim",
        _DIM,
        ("tower.cut.channels",),
        read=_channels,
        write=lambda run: [run["tower.cut.channels"]] * len(run["tower.cut.kernels"]),
    ),
    one("conv_kernel", _KERNELS, "tower.cut.kernels"),
    one("conv_stride", _STRIDES, "tower.cut.strides"),
    one("conv_bias", False, "tower.cut.bias"),
    only("add_adapter", False),
    # read with the heads: without a mask there is no mask vector
    Key("mask_time_prob", 0.05, write=_mask_share),
    Key("mask_feature_prob", 0.0, write=lambda run: 0.0),
)
_GELU = only("hidden_act", "gelu")
_NORM = one("feat_extract_norm", "group", "tower.cut.norm", only=("group", "layer"))
_PLACES = (
    one("num_conv_pos_embeddings", 128, "tower.positions.kernel"),
    one("num_conv_pos_embedding_groups", 16, "tower.positions.groups"),
)
_ORDER = Key(
    "do_stable_layer_norm",
    False,
    ("tower.backbone.post_norm", "tower.backbone.input_norm"),
    read=lambda config: (not config["do_stable_layer_norm"],) * 2,
    write=lambda run: not run["tower.backbone.post_norm"],
)
_CONSTANTS = {
    "tower.modality": "audio",
    "tower.frontend.kind": "waveform",
    "tower.cut.kind": "wave_conv",
    "tower.positions.kind": "conv",
    "tower.globals": [],
    "tower.backbone.kind": "transformer",
    "tower.backbone.fresh": "normal",
    "view.modality": "audio",
    "view.crop_s": 15.625,
}
_FILES = (
    one("sampling_rate", 16000, "view.hz"),
    one("do_normalize", True, "view.normalize"),
    # their group norm counts padding: such models read zeros without a mask
    Key("return_attention_mask", False, write=lambda run: run["tower.cut.norm"] == "layer"),
)
_PREPROCESSOR = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
}
_OLD_NAMES = (
    (r"^(.*\.pos_conv_embed\.conv)\.weight_g$", r"\1.parametrizations.weight.original0"),
    (r"^(.*\.pos_conv_embed\.conv)\.weight_v$", r"\1.parametrizations.weight.original1"),
)

# ---------------------------------------------------------------- tensors

_STEM: tuple[Row, ...] = (
    *pair("tower.stem.convs.{n}", "feature_extractor.conv_layers.{n}.conv"),
    *pair("tower.stem.norms.{n}", "feature_extractor.conv_layers.{n}.layer_norm"),
    *pair("tower.stem.features", "feature_projection.layer_norm"),
    *pair("tower.stem.proj", "feature_projection.projection"),
    *tensor("task.embedding", "masked_spec_embed"),
)
_PLACED = ("bias", "parametrizations.weight.original0", "parametrizations.weight.original1")
_POSITIONS: tuple[Row, ...] = tuple(
    row
    for part in _PLACED
    for row in tensor(f"tower.positions.conv.{part}", f"encoder.pos_conv_embed.conv.{part}")
)
_LAYERS: tuple[Row, ...] = (
    *stacked(
        f"{_BLOCK}.attention.qkv", *(f"{_LAYER}.attention.{part}_proj" for part in ("q", "k", "v"))
    ),
    *pair(f"{_BLOCK}.attention.out", f"{_LAYER}.attention.out_proj"),
    *pair(f"{_BLOCK}.norm1.parts.shared", f"{_LAYER}.layer_norm"),
    *pair(f"{_BLOCK}.ffn.parts.shared.up", f"{_LAYER}.feed_forward.intermediate_dense"),
    *pair(f"{_BLOCK}.ffn.parts.shared.down", f"{_LAYER}.feed_forward.output_dense"),
    *pair(f"{_BLOCK}.norm2.parts.shared", f"{_LAYER}.final_layer_norm"),
)
# one of the two is there: before the first layer (post-norm), or behind the last
_OUTER: tuple[Row, ...] = (
    *pair("tower.own_trunk.input_norm.parts.shared", "encoder.layer_norm"),
    *pair("tower.own_trunk.norm.parts.shared", "encoder.layer_norm"),
)
_ENCODER = (*_STEM, *_POSITIONS, *_LAYERS, *_OUTER)


def _books(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    return [tensors[0].reshape(sizes["groups"], sizes["entries"], -1)]


def _book(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    return [tensors[0].flatten(0, 1).unsqueeze(0)]


def _sizes(run: Flat) -> Sizes:
    paths = {
        "width": "tower.backbone.width",
        "groups": "task.target.quantizer.groups",
        "entries": "task.target.quantizer.entries",
    }
    return {key: run[path] for key, path in paths.items() if path in run}


# ---------------------------------------------------------------- heads


def _codes(name: str) -> Heads:
    """The contrastive head of wav2vec 2.0."""
    return Heads(
        name,
        marker="quantizer.codevectors",
        keys=(
            Key("mask_time_prob", 0.05, ("task.mask.start_prob",), (), _start_share, _mask_share),
            one("mask_time_length", 10, "task.mask.length"),
            one("mask_time_min_masks", 2, "task.mask.min_spans"),
            one("num_codevector_groups", 2, "task.target.quantizer.groups"),
            one("num_codevectors_per_group", 320, "task.target.quantizer.entries"),
            one("codevector_dim", 256, "task.target.quantizer.width"),
            one("proj_codevector_dim", 256, "task.target.space"),
            one("num_negatives", 100, "task.target.negatives"),
            one("contrastive_logits_temperature", 0.1, "task.target.temperature"),
            one("feat_quantizer_dropout", 0.0, "task.target.dropout"),
            Key(
                "diversity_loss_weight",
                0.1,
                ("task.weights.diversity",),
                write=lambda run: run.get("task.weights.diversity", 0.1),
            ),
        ),
        constants={
            "task.kind": "masked",
            "task.mask.rule": "spans",
            "task.mask.hide": "latents",
            "task.target.kind": "codes",
            "task.target.quantizer.kind": "gumbel",
        },
        rows=(
            Rule(("task.target.quantizer.codebook",), ("quantizer.codevectors",), _books, _book),
            *pair("task.target.quantizer.logits", "quantizer.weight_proj"),
            *pair("task.target.of_context", "project_hid"),
            *pair("task.target.of_code", "project_q"),
        ),
    )


# ---------------------------------------------------------------- model types


def _layout(name: str, encoder: str, prefix: str, **parts: Any) -> Layout:
    shared: dict[str, Any] = {
        "constants": _CONSTANTS,
        "rows": _ENCODER,
        "aliases": _OLD_NAMES,
    }
    return Layout(
        name,
        "audio",
        encoder,
        prefix,
        sizes=_sizes,
        task="mam",
        files=_FILES,
        preprocessor=_PREPROCESSOR,
        spare=("masked_spec_embed",),
        **{**shared, **parts},
    )


WAV2VEC2 = _layout(
    "wav2vec2",
    "Wav2Vec2Model",
    "wav2vec2",
    keys=(*_COMMON, _GELU, _NORM, *_PLACES, _ORDER, only("adapter_attn_dim", None)),
    heads=(_codes("Wav2Vec2ForPreTraining"),),
)

HUBERT = _layout(
    "hubert",
    "HubertModel",
    "hubert",
    keys=(
        *(key for key in _COMMON if key.name != "add_adapter"),
        *(_GELU, _NORM, *_PLACES, _ORDER),
        only("feat_proj_layer_norm", True),
        only("conv_pos_batch_norm", False),
    ),
)

WAVLM = _layout(
    "wavlm",
    "WavLMModel",
    "wavlm",
    keys=(
        *(*_COMMON, _GELU, _NORM, *_PLACES, _ORDER),
        one("num_buckets", 320, "tower.backbone.relative_buckets"),
        one("max_bucket_distance", 800, "tower.backbone.relative_distance"),
    ),
    constants={
        **_CONSTANTS,
        "tower.backbone.relative_use": "gated",
        "tower.backbone.keep_first": True,
    },
    rows=(
        *_ENCODER,
        *tensor(
            "tower.own_trunk.relative.table.weight",
            "encoder.layers.0.attention.rel_attn_embed.weight",
        ),
        *pair(f"{_BLOCK}.attention.gate.linear", f"{_LAYER}.attention.gru_rel_pos_linear"),
        *reshaped(
            f"{_BLOCK}.attention.gate.scale_H", f"{_LAYER}.attention.gru_rel_pos_const", 1, 2
        ),
    ),
)


def _several(config: Config) -> tuple[int]:
    if config["num_conv_pos_embeddings"] < 2:
        raise ValueError("here a single convolution has a normalised weight; use 2 or more")
    return (config["num_conv_pos_embeddings"],)


DATA2VEC_AUDIO = _layout(
    "data2vec-audio",
    "Data2VecAudioModel",
    "data2vec_audio",
    keys=(
        *(*_COMMON, _GELU),
        Key("num_conv_pos_embeddings", 5, ("tower.positions.layers",), read=_several),
        one("conv_pos_kernel_size", 19, "tower.positions.kernel"),
        one("num_conv_pos_embedding_groups", 16, "tower.positions.groups"),
    ),
    constants={
        **_CONSTANTS,
        "tower.cut.norm": "layer",
        "tower.backbone.post_norm": True,
        "tower.backbone.input_norm": True,
    },
    rows=(
        *(*_STEM, *_LAYERS, *_OUTER),
        *pair("tower.positions.convs.{n}", "encoder.pos_conv_embed.layers.{n}.conv"),
    ),
)


# Their Conformer makes a positional convolution and never calls it: the smallest one is written.
def _dead_bias(sizes: Sizes) -> Tensor:
    return torch.zeros(sizes["width"])


def _dead_gain(sizes: Sizes) -> Tensor:
    return torch.zeros(1, 1, 1)


def _dead_direction(sizes: Sizes) -> Tensor:
    return torch.ones(sizes["width"], 1, 1)


def _counter(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    return [tensors[0].reshape(1)]


def _scalar(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    return [tensors[0].reshape(())]


_CONV, _THEIR_CONV = f"{_BLOCK}.conv", f"{_LAYER}.conv_module"
_CONFORMER: tuple[Row, ...] = (
    *pair(f"{_BLOCK}.norm1.parts.shared", f"{_LAYER}.ffn1_layer_norm"),
    *pair(f"{_BLOCK}.ffn1.parts.shared.up", f"{_LAYER}.ffn1.intermediate_dense"),
    *pair(f"{_BLOCK}.ffn1.parts.shared.down", f"{_LAYER}.ffn1.output_dense"),
    *pair(f"{_BLOCK}.norm2.parts.shared", f"{_LAYER}.self_attn_layer_norm"),
    *stacked(
        f"{_BLOCK}.attention.qkv",
        *(f"{_LAYER}.self_attn.linear_{part}" for part in ("q", "k", "v")),
    ),
    *pair(f"{_BLOCK}.attention.out", f"{_LAYER}.self_attn.linear_out"),
    *pair(f"{_BLOCK}.norm3.parts.shared", f"{_THEIR_CONV}.layer_norm"),
    *reshaped(f"{_CONV}.inward.weight", f"{_THEIR_CONV}.pointwise_conv1.weight", 0, 1),
    *tensor(f"{_CONV}.depthwise.weight", f"{_THEIR_CONV}.depthwise_conv.weight"),
    *pair(f"{_CONV}.norm", f"{_THEIR_CONV}.batch_norm"),
    *tensor(f"{_CONV}.norm.running_mean", f"{_THEIR_CONV}.batch_norm.running_mean"),
    *tensor(f"{_CONV}.norm.running_var", f"{_THEIR_CONV}.batch_norm.running_var"),
    Rule(
        (f"{_CONV}.norm.num_batches_tracked",),
        (f"{_THEIR_CONV}.batch_norm.num_batches_tracked",),
        _counter,
        _scalar,
    ),
    *reshaped(f"{_CONV}.outward.weight", f"{_THEIR_CONV}.pointwise_conv2.weight", 0, 1),
    *pair(f"{_BLOCK}.norm4.parts.shared", f"{_LAYER}.ffn2_layer_norm"),
    *pair(f"{_BLOCK}.ffn2.parts.shared.up", f"{_LAYER}.ffn2.intermediate_dense"),
    *pair(f"{_BLOCK}.ffn2.parts.shared.down", f"{_LAYER}.ffn2.output_dense"),
    *pair(f"{_BLOCK}.norm.parts.shared", f"{_LAYER}.final_layer_norm"),
    *pair("tower.own_trunk.norm.parts.shared", "encoder.layer_norm"),
    *(
        Fixed(f"encoder.pos_conv_embed.conv.{part}", make, dead=True)
        for part, make in zip(_PLACED, (_dead_bias, _dead_gain, _dead_direction), strict=True)
    ),
)


WAV2VEC2_CONFORMER = _layout(
    "wav2vec2-conformer",
    "Wav2Vec2ConformerModel",
    "wav2vec2_conformer",
    keys=(
        *(*_COMMON, _NORM),
        only("hidden_act", "swish", "silu", absent="gelu"),
        only("position_embeddings_type", None, "none", absent="relative"),
        one("conv_depthwise_kernel_size", 31, "tower.backbone.conv_kernels"),
        Key("num_conv_pos_embeddings", 128, write=lambda run: 1),
        Key("num_conv_pos_embedding_groups", 16, write=lambda run: run["tower.backbone.width"]),
    ),
    constants={
        **_CONSTANTS,
        "tower.positions.kind": "none",
        "tower.backbone.layer": "conformer",
        "tower.backbone.conv_norm": "batch",
        "tower.backbone.conv_bias": False,
        "tower.backbone.final_norm": True,
    },
    rows=(*_STEM, *_CONFORMER),
    heads=(_codes("Wav2Vec2ConformerForPreTraining"),),
)
