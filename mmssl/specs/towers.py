"""Records of towers: front-end, cut, positions and backbone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmssl.specs.base import Modality, Number, Spec


class SpectrumSpec(Spec):
    """Log-mel (`log_mel`) or linear (`log_spectrogram`) spectrogram; lengths in samples.

    The log rules and framings are explained at `mmssl.frontends.spectra.SpectrumParams`.
    """

    kind: Literal["log_mel", "log_spectrogram"]
    sample_rate: int = Field(16000, gt=0)  # Hz; must equal the view's `hz`
    n_fft: int = Field(1024, gt=0)
    win: int = Field(400, gt=0)
    hop: int = Field(160, gt=0)
    n_mels: int = Field(64, gt=0)
    f_min: float = Field(60.0, ge=0)  # Hz
    f_max: float = Field(7800.0, ge=0)  # Hz; 0 = half the sampling rate
    power: Literal[1, 2] = 1
    framing: Literal["center", "valid", "pad_end"] = "center"
    window: Literal["hann", "hamming"] = "hann"
    mel_scale: Literal["htk", "slaney"] = "htk"
    mel_norm: Literal["", "slaney"] = ""
    log: Literal["ln_eps", "ln_1e4", "db", "ln_clip", "ln_clip5", "log10_eps", "none"] = "ln_clip"
    floor: float = Field(1e-5, gt=0)
    db_range: float = Field(80.0, gt=0)  # dB
    mean: float = 0.0  # subtracted, then divided by `std`
    std: float = Field(1.0, gt=0)


class WaveSpec(Spec):
    """The raw waveform."""

    kind: Literal["waveform"]


class FramesSpec(Spec):
    """Frames scaled to [-1, 1] (`signed`) or [0, 1] (`unit`), and what moves in them."""

    kind: Literal["frames"]
    values: Literal["signed", "unit"] = "signed"
    channels: Literal["rgb", "motion", "rgb_motion", "foreground"] = "rgb"  # see `Frames`
    motion_gain: float = Field(8.0, gt=0)


class IdsSpec(Spec):
    """Token ids as they are."""

    kind: Literal["ids"]


FrontendSpec = Annotated[
    SpectrumSpec | WaveSpec | FramesSpec | IdsSpec, Field(discriminator="kind")
]


class PatchSpec(Spec):
    """Non-overlapping linear patches: [time, bands], [samples] or [frames, height, width]."""

    kind: Literal["patches"]
    patch: list[int] = Field(min_length=1, max_length=3)


class StemSpec(Spec):
    """Strided, overlapping convolutions; one entry of `channels` and `strides` per layer.

    A stride or kernel is one number or one per axis ([time, bands] or [height, width]); no
    `kernels` means twice the stride. Video: the stack runs on each frame, then `temporal_kernel`
    frames are merged every `temporal_stride` frames.
    """

    kind: Literal["conv"]
    channels: list[int] = Field(min_length=1)
    strides: list[int | list[int]] = Field(min_length=1)
    kernels: list[int | list[int]] | None = None
    norm: Literal["layer", "group", "none"] = "layer"
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    fold: int = Field(1, gt=0)  # video: frames that enter the stack together
    temporal_kernel: int = Field(1, gt=0)
    temporal_stride: int = Field(1, gt=0)
    merge: int = Field(1, gt=0)  # video: merge x merge cells become one token of the backbone
    merge_time: int = Field(1, gt=0)  # video: so many bins of cells become one step of tokens


class EmbeddingSpec(Spec):
    """Look-up of ids: a trained table, or a frozen one followed by a trained linear map.

    `table`: a safetensors file with the frozen (V, table_width) matrix under the key `weight`;
    without it fixed random vectors stand in.
    """

    kind: Literal["embedding", "frozen"]
    table_width: int = Field(300, gt=0)
    table: str = ""


class WholeSpec(Spec):
    """No cutting: the backbone reads the map itself (convolutional networks)."""

    kind: Literal["whole"]


CutSpec = Annotated[PatchSpec | StemSpec | EmbeddingSpec | WholeSpec, Field(discriminator="kind")]


class PositionSpec(Spec):
    """Learned tables, one per axis of the token grid, summed.

    An empty `grid` takes the grid of the first view of the tower. Other grids are interpolated.
    """

    kind: Literal["learned", "none"] = "learned"
    grid: list[int] = []
    norm: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    fit: Literal["interpolate", "crop"] = "interpolate"  # grids of another size


class TransformerSpec(Spec):
    """The shared encoder.

    `own_norms`: LayerNorms per modality; `own_ffn`: so many first layers have feed-forward networks
    per modality, too. `relative_buckets`: T5's relative position bias in the first layer.
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


class ConvAV8Spec(Spec):
    """The eight-convolution network of L3-Net (stride 1) and AVE-Net (stride 2)."""

    kind: Literal["conv_av8"]
    stride: Literal[1, 2] = 2
    input_norm: bool = False  # OpenL3's batch norm on the input


class EfficientNetSpec(Spec):
    """EfficientNet-B0 without its classifier (COLA)."""

    kind: Literal["efficientnet_b0"]
    drop_path: float = Field(0.2, ge=0, lt=1)


ConvSpec = ConvAV8Spec | EfficientNetSpec
BackboneSpec = (
    Literal["shared"] | Annotated[TransformerSpec | ConvSpec, Field(discriminator="kind")]
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

    `pre` and `post`: a linear map with GELU before and after the backbone (VATT-MA); 0 = none.
    """

    modality: Modality
    frontend: FrontendSpec
    cut: CutSpec
    positions: PositionSpec = PositionSpec()
    backbone: BackboneSpec = "shared"
    globals: list[str] = ["agg"]
    registers: int = Field(0, ge=0)
    drop_tokens: Number = 0.0  # share of tokens left out in training
    pre: bool = False
    post: int = Field(0, ge=0)


class JointSpec(Trainable):
    """A tower over the tokens of other towers' passes, reduced over space or bands (`max`,
    `mean`).
    """

    of: list[str] = Field(min_length=2)  # views
    reduce: Literal["max", "mean", "none"] = "mean"
    backbone: TransformerSpec
    globals: list[str] = ["agg"]
