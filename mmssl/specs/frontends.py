"""Front-ends of towers, and what cuts their signals into tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmssl.specs.base import Spec


class UtteranceSpec(Spec):
    """What is done to a spectrogram with the whole utterance in view.

    The fields are explained at `mmssl.frontends.kaldi.UtteranceFeatures`.
    """

    level_db: float | None = None
    deltas: int = Field(0, ge=0)
    cmvn: bool = False
    stack: int = Field(1, gt=0)


class KaldiSpec(Spec):
    """Kaldi's filter banks or cepstra; see `mmssl.frontends.kaldi.KaldiParams`."""

    kind: Literal["kaldi"]
    sample_rate: int = Field(16000, gt=0)  # Hz; must equal the view's `hz`
    win: int = Field(400, gt=0)
    hop: int = Field(160, gt=0)
    n_mels: int = Field(80, gt=0)
    f_min: float = Field(20.0, ge=0)  # Hz
    f_max: float = Field(0.0, ge=0)  # Hz; 0 = half the sampling rate
    window: Literal["povey", "hamming", "hanning", "rectangular", "blackman"] = "hamming"
    preemphasis: float = Field(0.97, ge=0, lt=1)
    ceps: int = Field(0, ge=0)
    lifter: float = Field(22.0, ge=0)
    utterance: UtteranceSpec | None = None


class SpectrumSpec(Spec):
    """Log-mel (`log_mel`) or linear (`log_spectrogram`) spectrogram; lengths in samples.

    `spectrum_stack`: three channels, see `mmssl.frontends.stack` (CLAR). The log rules and framings
    are explained at `mmssl.frontends.spectra.SpectrumParams`.
    """

    kind: Literal["log_mel", "log_spectrogram", "spectrum_stack"]
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
    utterance: UtteranceSpec | None = None


class WaveSpec(Spec):
    """The raw waveform."""

    kind: Literal["waveform"]


class FramesSpec(Spec):
    """Frames scaled to [-1, 1] (`signed`) or [0, 1] (`unit`), and what moves in them.

    `imagenet` standardises each colour by ImageNet's statistics.
    """

    kind: Literal["frames"]
    values: Literal["signed", "unit", "imagenet"] = "signed"
    channels: Literal["rgb", "motion", "rgb_motion", "foreground"] = "rgb"  # see `Frames`
    motion_gain: float = Field(8.0, gt=0)


class IdsSpec(Spec):
    """Token ids as they are."""

    kind: Literal["ids"]


FrontendSpec = Annotated[
    SpectrumSpec | KaldiSpec | WaveSpec | FramesSpec | IdsSpec, Field(discriminator="kind")
]


class PatchSpec(Spec):
    """Non-overlapping linear patches: [time, bands], [samples] or [frames, height, width]."""

    kind: Literal["patches"]
    patch: list[int] = Field(min_length=1, max_length=3)
    project: bool = True  # False: the backbone reads the patches themselves


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


class SummedSpec(Spec):
    """Token, place and segment vectors, LayerNorm, dropout; a linear map if narrower (BERT).

    Stands with `positions: {kind: none}`. `vocabulary`: ids; 0 = the tokenizer's. The other fields
    are explained at `mmssl.frontends.summed.EmbeddingTables`.
    """

    kind: Literal["summed"]
    vocabulary: int = Field(0, ge=0)
    width: int = Field(0, ge=0)  # of the tables; 0 = the backbone's
    places: int = Field(512, gt=0)
    segments: int = Field(0, ge=0)
    norm: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)
    eps: float = Field(1e-12, gt=0)


class BorrowedSpec(Spec):
    """The tables of another tower's `summed` cut, with a linear map of its own (ELECTRA)."""

    kind: Literal["borrowed"]
    of: str  # a tower further up


class WaveConvSpec(Spec):
    """Unpadded convolutions on the waveform, a LayerNorm and a linear map (wav2vec 2.0).

    The fields are explained at `mmssl.frontends.wave_stem.WaveStem`.
    """

    kind: Literal["wave_conv"]
    channels: int = Field(512, gt=0)
    kernels: list[int] = [10, 3, 3, 3, 3, 2, 2]
    strides: list[int] = [5, 2, 2, 2, 2, 2, 2]
    norm: Literal["group", "layer", "group1", "none"] = "group"
    bias: bool = False
    activation: Literal["gelu", "relu", "silu", "none"] = "gelu"
    log_compress: bool = False
    gradient_scale: float = Field(1.0, ge=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    project: bool = True
    synthesis: bool = False


class FrameLatentsSpec(Spec):
    """One latent per frame of a spectrogram, a LayerNorm and a linear map.

    `layers`: of an LSTM; 0 = a linear map. See `mmssl.frontends.frame_stem.FrameStem`.
    """

    kind: Literal["frame_latents"]
    latent: int = Field(256, gt=0)
    layers: int = Field(0, ge=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class WholeSpec(Spec):
    """No cutting: the backbone reads the map itself (convolutional networks)."""

    kind: Literal["whole"]


CutSpec = Annotated[
    PatchSpec
    | StemSpec
    | WaveConvSpec
    | FrameLatentsSpec
    | EmbeddingSpec
    | SummedSpec
    | BorrowedSpec
    | WholeSpec,
    Field(discriminator="kind"),
]
