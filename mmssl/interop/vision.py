"""MAE of images with its decoder, and the encoder of VideoMAE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmssl.frontends.fixed_positions import SinusoidPositions
from mmssl.interop.entries import Config, Flat, Key, one, only
from mmssl.interop.layout import Heads, Layout
from mmssl.interop.names import Fixed, Row, Rule, Sizes, pair, reshaped, stack, stacked, tensor

_BLOCK, _LAYER = "own_trunk.blocks.{n}", "encoder.layer.{n}"
_COLOURS = 3
_FPS = 8.0  # of an imported video model; its file names a number of frames only
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_RANGES = {
    "imagenet": (_MEAN, _STD),
    "signed": ((0.5,) * 3, (0.5,) * 3),
    "unit": ((0.0,) * 3, (1.0,) * 3),
}

# ---------------------------------------------------------------- config.json


def _heads(part: str = "") -> Any:
    def read(config: Config) -> tuple[int, int]:
        width, heads = config[f"{part}hidden_size"], config[f"{part}num_attention_heads"]
        if width % heads:
            raise ValueError(f"{part}hidden_size {width} is no multiple of it")
        return heads, width // heads

    return read


def _side(value: Any) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ValueError("here pictures and patches are square")
    return int(sides.pop())


def _size(config: Config) -> tuple[int]:
    return (_side(config["image_size"]),)


def _patch(config: Config) -> tuple[list[int]]:
    side = _side(config["patch_size"])
    return ([config.get("tubelet_size", 1), side, side],)


def _patch_side(run: Flat) -> int:
    _, height, width = run["tower.cut.patch"]
    if height != width:
        raise ValueError(f"cut.patch: {height} x {width} pixels are no square")
    return int(height)


def _frames(run: Flat) -> int:
    """As frames are picked."""
    seconds, fps = float(run["view.crop_s"]), float(run["view.fps"])
    return max(1, math.floor(seconds * fps + 0.5))


def _picture(run: Flat) -> int:
    if _frames(run) != 1 or run["tower.cut.patch"][0] != 1:
        raise ValueError(
            f"{_frames(run)} frames in patches of {run['tower.cut.patch'][0]} are no picture; give "
            "a view of one frame, or choose format=videomae"
        )
    return int(run["view.size"])


def _range(config: Config) -> tuple[str]:
    found = (tuple(config["image_mean"]), tuple(config["image_std"]))
    for name, (mean, std) in _RANGES.items():
        if torch.allclose(torch.tensor(found), torch.tensor((mean, std)), atol=1e-6):
            return (name,)
    raise ValueError("here pixels are scaled to [0, 1], to [-1, 1] or by ImageNet's statistics")


def _of_range(which: int) -> Any:
    return lambda run: list(_RANGES[run["tower.frontend.values"]][which])


def _square(run: Flat) -> dict[str, int]:
    return {"height": run["view.size"], "width": run["view.size"]}


_COMMON = (
    one("hidden_size", 768, "tower.backbone.width"),
    one("num_hidden_layers", 12, "tower.backbone.layers"),
    Key(
        "num_attention_heads",
        12,
        ("tower.backbone.heads", "tower.backbone.head_size"),
        read=_heads(),
    ),
    one("intermediate_size", 3072, "tower.backbone.hidden"),
    only("hidden_act", "gelu"),
    one("hidden_dropout_prob", 0.0, "tower.backbone.dropout"),
    one("attention_probs_dropout_prob", 0.0, "tower.backbone.attention_dropout"),
    one("layer_norm_eps", 1e-12, "tower.backbone.eps"),
    only("num_channels", _COLOURS),
    Key("patch_size", 16, ("tower.cut.patch",), read=_patch, write=_patch_side),
)
_CONSTANTS = {
    "tower.modality": "video",
    "tower.frontend.kind": "frames",
    "tower.cut.kind": "patches",
    "tower.positions.kind": "sinusoid",
    "tower.backbone.kind": "transformer",
    "tower.backbone.activation_dropout": 0.0,
    "view.modality": "video",
}
_FILES = (
    Key("image_mean", _MEAN, ("tower.frontend.values",), read=_range, write=_of_range(0)),
    Key("image_std", _STD, write=_of_range(1)),
)

# ---------------------------------------------------------------- tensors


def _layers(ours: str, theirs: str, *attention: Row) -> tuple[Row, ...]:
    return (
        *attention,
        *pair(f"{ours}.attention.out", f"{theirs}.attention.output.dense"),
        *pair(f"{ours}.norm1.parts.shared", f"{theirs}.layernorm_before"),
        *pair(f"{ours}.ffn.parts.shared.up", f"{theirs}.intermediate.dense"),
        *pair(f"{ours}.ffn.parts.shared.down", f"{theirs}.output.dense"),
        *pair(f"{ours}.norm2.parts.shared", f"{theirs}.layernorm_after"),
    )


def _parts(theirs: str) -> list[str]:
    return [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")]


def _flat_patch(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    return [tensors[0].flatten(1)]


def _square_patch(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    return [tensors[0].reshape(-1, _COLOURS, sizes["patch"], sizes["patch"])]


def _solid_patch(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    axes = (sizes["frames"], sizes["patch"], sizes["patch"])
    return [tensors[0].reshape(-1, _COLOURS, *axes)]


def _colours_first(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    """Rows of a patch in the order (pixels, colours) to (colours, pixels)."""
    (x,) = tensors
    return [x.reshape(-1, _COLOURS, *x.shape[1:]).transpose(0, 1).flatten(0, 1)]


def _colours_last(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    (x,) = tensors
    return [x.reshape(_COLOURS, -1, *x.shape[1:]).transpose(0, 1).flatten(0, 1)]


def _table(width: str) -> Any:
    """Sines and cosines of the patches; the class token in front has zeros."""

    def make(sizes: Sizes) -> Tensor:
        places = SinusoidPositions(sizes[width], "axes").vectors((sizes["grid"], sizes["grid"]))
        return torch.cat([torch.zeros(1, sizes[width]), places]).unsqueeze(0)

    return make


def _sizes(run: Flat) -> Sizes:
    frames, patch, _ = map(int, run["tower.cut.patch"])
    return {
        "width": run["tower.backbone.width"],
        "decoder": run.get("task.target.decoder.width", 0),
        "frames": frames,
        "patch": patch,
        "grid": run["view.size"] // patch,
    }


_OUTER: tuple[Row, ...] = (
    *tensor("tower.stem.proj.bias", "embeddings.patch_embeddings.projection.bias"),
    *pair("tower.own_trunk.norm.parts.shared", "layernorm"),
)

# ---------------------------------------------------------------- MAE

_DECODER, _THEIR_DECODER = "task.target.head.trunk.blocks.{n}", "decoder.decoder_encoder.layer.{n}"
_PIXELS = tuple(
    Rule(
        (f"task.target.head.head.{part}",),
        (f"decoder.decoder_pred.{part}",),
        _colours_first,
        _colours_last,
    )
    for part in ("weight", "bias")
)

_RECONSTRUCTION = Heads(
    "ViTMAEForPreTraining",
    marker="decoder.mask_token",
    keys=(
        one("decoder_hidden_size", 512, "task.target.decoder.width"),
        one("decoder_num_hidden_layers", 8, "task.target.decoder.layers"),
        Key(
            "decoder_num_attention_heads",
            16,
            ("task.target.decoder.heads", "task.target.decoder.head_size"),
            read=_heads("decoder_"),
        ),
        one("decoder_intermediate_size", 2048, "task.target.decoder.hidden"),
        one("hidden_dropout_prob", 0.0, "task.target.decoder.dropout"),
        one("attention_probs_dropout_prob", 0.0, "task.target.decoder.attention_dropout"),
        one("layer_norm_eps", 1e-12, "task.target.decoder.eps"),
        one("mask_ratio", 0.75, "task.mask.ratio"),
        one("norm_pix_loss", False, "task.target.normalize"),
    ),
    constants={
        "task.kind": "masked",
        "task.mask.rule": "random",
        "task.mask.hide": "drop",
        "task.target.kind": "patches",
        "task.target.decoder.kind": "transformer",
        "task.target.decoder.activation_dropout": 0.0,
    },
    rows=(
        *pair("task.target.head.enter", "decoder.decoder_embed"),
        *reshaped("task.target.head.mask_E", "decoder.mask_token", 2),
        *_layers(
            _DECODER, _THEIR_DECODER, *stacked(f"{_DECODER}.attention.qkv", *_parts(_THEIR_DECODER))
        ),
        *pair("task.target.head.trunk.norm.parts.shared", "decoder.decoder_norm"),
        *_PIXELS,
        Fixed("decoder.decoder_pos_embed", _table("decoder")),
    ),
)

VIT_MAE = Layout(
    "vit_mae",
    "video",
    "ViTMAEModel",
    "vit",
    keys=(
        *_COMMON,
        only("qkv_bias", True),
        Key("image_size", 224, ("view.size",), (), _size, _picture),
    ),
    constants={
        **_CONSTANTS,
        "tower.positions.layout": "axes",
        "tower.globals": ["cls"],
        "view.crop_s": 1.0,
        "view.fps": 1.0,
    },
    rows=(
        Rule(
            ("tower.stem.proj.weight",),
            ("embeddings.patch_embeddings.projection.weight",),
            _flat_patch,
            _square_patch,
        ),
        *_OUTER,
        *reshaped("tower.extra.globals_GD", "embeddings.cls_token", 1),
        Fixed("embeddings.position_embeddings", _table("width")),
        *_layers(
            f"tower.{_BLOCK}",
            _LAYER,
            *stacked(f"tower.{_BLOCK}.attention.qkv", *_parts(_LAYER)),
        ),
    ),
    sizes=_sizes,
    task="mae",
    heads=(_RECONSTRUCTION,),
    files=(*_FILES, Key("size", None, write=_square)),
    preprocessor={"image_processor_type": "ViTImageProcessor"},
)

# ---------------------------------------------------------------- VideoMAE


def _with_key_bias(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    query, value = tensors
    return [torch.cat([query, torch.zeros_like(query), value])]


def _without_key_bias(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    """The bias of the keys moves all scores of a query alike: the softmax does not see it."""
    query, _, value = tensors[0].chunk(3)
    return [query, value]


VIDEO_MAE = Layout(
    "videomae",
    "video",
    "VideoMAEModel",
    "videomae",
    keys=(
        *_COMMON,
        only("qv_bias", True),
        Key("tubelet_size", 2, write=lambda run: run["tower.cut.patch"][0]),
        Key("image_size", 224, ("view.size",), read=_size),
        Key(
            "num_frames",
            16,
            ("view.crop_s", "view.fps"),
            read=lambda config: (config["num_frames"] / _FPS, _FPS),
            write=_frames,
        ),
        Key(
            "use_mean_pooling",
            True,
            ("tower.backbone.final_norm",),
            read=lambda config: (not config["use_mean_pooling"],),
            write=lambda run: not run["tower.backbone.final_norm"],
        ),
    ),
    constants={
        **_CONSTANTS,
        "tower.positions.layout": "interleaved",
        "tower.globals": [],
    },
    rows=(
        Rule(
            ("tower.stem.proj.weight",),
            ("embeddings.patch_embeddings.projection.weight",),
            _flat_patch,
            _solid_patch,
        ),
        *_OUTER,
        *_layers(
            f"tower.{_BLOCK}",
            _LAYER,
            stack(
                f"tower.{_BLOCK}.attention.qkv.weight",
                *(f"{name}.weight" for name in _parts(_LAYER)),
            ),
            Rule(
                (f"tower.{_BLOCK}.attention.qkv.bias",),
                tuple(f"{_LAYER}.attention.attention.{part}_bias" for part in ("q", "v")),
                _with_key_bias,
                _without_key_bias,
            ),
        ),
    ),
    sizes=_sizes,
    files=(
        *_FILES,
        Key("size", None, write=lambda run: {"shortest_edge": run["view.size"]}),
        Key("crop_size", None, write=_square),
    ),
    preprocessor={"image_processor_type": "VideoMAEImageProcessor"},
    aliases=(
        (r"\.attention\.attention\.query\.bias$", ".attention.attention.q_bias"),
        (r"\.attention\.attention\.value\.bias$", ".attention.attention.v_bias"),
    ),
    without="their decoder normalises with another constant behind its last layer and reconstructs "
    "colours one by one",
)
