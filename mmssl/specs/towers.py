"""Records of towers: front-end, cut, positions and backbone."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mmssl.specs.base import Modality, Number, Spec
from mmssl.specs.frontends import CutSpec, FrontendSpec
from mmssl.specs.networks import ConvSpec, DilatedConvSpec
from mmssl.specs.quantizers import QuantizerSpec


class PositionSpec(Spec):
    """Learned tables, one per axis of the token grid, summed.

    An empty `grid` takes the grid of the first view of the tower. Other grids are interpolated.
    """

    kind: Literal["learned", "none"] = "learned"
    grid: list[int] = []
    norm: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    fit: Literal["interpolate", "crop"] = "interpolate"  # grids of another size


class ConvPositionSpec(Spec):
    """Positions by grouped convolutions along time: one (wav2vec 2.0) or several (data2vec)."""

    kind: Literal["conv"]
    layers: int = Field(1, gt=0)
    kernel: int = Field(128, gt=0)
    groups: int = Field(16, gt=0)


class FixedPositionSpec(Spec):
    """Sines and cosines, of the token's number (`interleaved`) or of every axis (`axes`, MAE)."""

    kind: Literal["sinusoid"]
    layout: Literal["interleaved", "axes"] = "axes"
    dropout: float = Field(0.0, ge=0, lt=1)


def _learned_unless_said(value: Any) -> Any:
    return {"kind": "learned", **value} if isinstance(value, dict) else value


AnyPositionSpec = Annotated[
    PositionSpec | ConvPositionSpec | FixedPositionSpec,
    Field(discriminator="kind"),
    BeforeValidator(_learned_unless_said),
]


class TransformerSpec(Spec):
    """The shared encoder.

    `own_norms`: LayerNorms per modality; `own_ffn`: so many first layers have feed-forward networks
    per modality, too. `relative_buckets`: T5's relative position bias in the first layer. The other
    fields are explained at `mmssl.backbones.transformer.Transformer`.
    """

    kind: Literal["transformer"] = "transformer"
    width: int = Field(768, gt=0)
    layers: int = Field(12, gt=0)
    heads: int = Field(0, ge=0)  # 0 = width / head_size
    head_size: int = Field(64, gt=0)
    hidden: int = Field(0, ge=0)  # width of the feed-forward networks; 0 = 4 x width
    dropout: float = Field(0.0, ge=0, lt=1)
    post_norm: bool = False
    own_norms: bool = False
    own_ffn: int = Field(0, ge=0)
    relative_buckets: int = Field(0, ge=0)
    relative_distance: int = Field(64, gt=0)
    relative_use: Literal["first", "all", "gated"] = "first"
    relative_grid: list[int] = []
    eps: float = Field(1e-6, gt=0)
    fresh: Literal["xavier", "normal"] = "xavier"  # how linear maps start without `init`
    input_norm: bool = False
    final_norm: bool | None = None
    share_layers: bool = False
    attention_dropout: float | None = Field(None, ge=0, lt=1)
    activation_dropout: float | None = Field(None, ge=0, lt=1)
    output_dropout: float | None = Field(None, ge=0, lt=1)
    layer_drop: float = Field(0.0, ge=0, lt=1)
    keep_first: bool = False  # layer_drop spares the first layer
    drop_path: float = Field(0.0, ge=0, lt=1)
    layer_scale: float = Field(0.0, ge=0)
    layer: Literal["transformer", "conformer"] = "transformer"
    conv_kernels: int | list[int] = 31
    conv_first: bool = False
    conv_norm: Literal["group", "batch"] = "group"
    conv_bias: bool = True
    causal: bool = False


class CausalConvSpec(Spec):
    """Causal convolutions: the context network of (vq-)wav2vec; one kernel per layer."""

    kind: Literal["causal_conv"]
    width: int = Field(512, gt=0)
    kernels: list[Annotated[int, Field(gt=0)]] = Field(list(range(2, 14)), min_length=1)
    activation: Literal["gelu", "relu", "silu"] = "relu"
    skips: bool = True

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.kernels)


class RecurrentSpec(Spec):
    """GRU or LSTM layers, the context network of APC and CPC; see `Recurrent`.

    `width_in`: of what enters; 0 = `width`.
    """

    kind: Literal["recurrent"]
    cell: Literal["gru", "lstm"] = "gru"
    width_in: int = Field(0, ge=0)
    width: int = Field(512, gt=0)
    layers: int = Field(1, gt=0)
    residual: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)


class PointwiseSpec(Spec):
    """No backbone: every token is what the cut makes of it (VQ-VAE), or the ReLU of that (words in
    MIL-NCE, MMV).
    """

    kind: Literal["relu", "identity"]
    width: int = Field(2048, gt=0)


BackboneSpec = (
    Literal["shared"]
    | Annotated[
        TransformerSpec
        | CausalConvSpec
        | DilatedConvSpec
        | RecurrentSpec
        | PointwiseSpec
        | ConvSpec,
        Field(discriminator="kind"),
    ]
)


class Trainable(Spec):
    """How a tower starts and learns."""

    init: str = (
        ""  # run folder, checkpoint or safetensors file with weights of a tower of this name
    )
    freeze: bool = False
    lr_scale: float = Field(1.0, ge=0)
    layer_decay: float = Field(1.0, gt=0, le=1)  # lr factor per layer below the top


class TowerSpec(Trainable):
    """Front-end, cut, positions and backbone of one modality.

    `quantizer`: the backbone reads the codes of the stem's cells instead of the cells (vq-wav2vec).
    `pre` and `post`: a linear map with GELU before and after the backbone (VATT-MA); 0 = none.
    `augment`: of the spectrograms of all its views, each by itself.
    """

    modality: Modality
    frontend: FrontendSpec
    augment: SpectrumAugmentSpec | None = None
    cut: CutSpec
    quantizer: QuantizerSpec | None = None
    positions: AnyPositionSpec = PositionSpec()
    backbone: BackboneSpec = "shared"
    globals: list[str] = ["agg"]
    registers: int = Field(0, ge=0)
    drop_tokens: Number = 0.0  # share of tokens left out in training
    pre: bool = False
    post: int = Field(0, ge=0)


class SpectrumAugmentSpec(Spec):
    """What training does to spectrograms in the log domain (BYOL-A); for a normalised front-end.

    The fields are explained at `mmssl.frontends.augment.SpectrumAugment`.
    """

    mix: float = Field(0.4, ge=0, lt=1)
    bank: int = Field(2048, gt=0)
    canvas: float = Field(1.5, ge=0)
    time: tuple[float, float] = (0.6, 1.5)
    bands: tuple[float, float] = (0.6, 1.5)
    fader: float = Field(0.0, ge=0)
    standardize: bool = True

    @model_validator(mode="after")
    def _can_crop(self) -> SpectrumAugmentSpec:
        if 0 < self.canvas < 1:
            raise ValueError("`canvas` is at least 1 (as large as the input), or 0 for no crop")
        if any(low <= 0 or high < low for low, high in (self.time, self.bands)):
            raise ValueError("`time` and `bands` are shares [low, high] above 0 with low <= high")
        return self


class JointSpec(Trainable):
    """A tower over the tokens of other towers' passes, reduced over space or bands (`max`,
    `mean`).
    """

    of: list[str] = Field(min_length=2)  # views
    reduce: Literal["max", "mean", "none"] = "mean"
    backbone: TransformerSpec
    globals: list[str] = ["agg"]
