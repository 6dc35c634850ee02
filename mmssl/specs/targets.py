"""Records of what masked tasks predict."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmssl.specs.base import Number, Spec
from mmssl.specs.quantizers import QuantizerSpec
from mmssl.specs.towers import TransformerSpec


class PatchTargetSpec(Spec):
    """The hidden input cells themselves; `normalize`: zero mean and unit variance per cell.

    `decoder`: predicts them from the visible tokens alone (MAE); for masks with `hide: drop`.
    """

    kind: Literal["patches"]
    normalize: bool = False
    loss: Literal["mse", "smooth_l1"] = "mse"
    decoder: TransformerSpec | None = None


class IdTargetSpec(Spec):
    """The hidden token ids.

    `head`: `linear`, behind one layer of the task's `hidden`, or `bert`: Linear, GELU, LayerNorm
    and the token table of the tower's own `summed` cut, with a bias. `sentence`: from [CLS] of the
    same pass, whether the pair of the view's `segments` is as in its document.
    """

    kind: Literal["ids"]
    head: Literal["linear", "bert"] = "linear"
    sentence: bool = False


class ReplacedTargetSpec(Spec):
    """Which tokens the generator, the tower of the masked view, has replaced (ELECTRA).

    `view`: a view of the discriminator's tower, which reads the masked view's replaced ids. Terms:
    `generator`, `replaced`.
    """

    kind: Literal["replaced"]
    view: str


class DecoderSpec(Spec):
    """LSTM that rebuilds the stem's input from the codes of all frames (wav2vec-C)."""

    layers: int = Field(3, gt=0)
    hidden: int = Field(768, gt=0)


class TranscriptSpec(Spec):
    """CTC on the tower's output (UniSpeech): `field` of `data.labels`, symbols between spaces.

    The fields are explained at `mmssl.targets.readers.Transcription`.
    """

    field: str
    symbols: list[str] = Field(min_length=1)
    replace: float = Field(0.5, ge=0, le=1)
    dropout: float = Field(0.1, ge=0, lt=1)


class CodeTargetSpec(Spec):
    """The own latent of a hidden frame among those of others (wav2vec 2.0).

    Terms: `nce`, `diversity`, `commitment`, `features` (penalty on the stem's output), with a
    `decoder` `consistency`, with `transcripts` `ctc`; watched: `accuracy`, `perplexity`,
    `transcribed`. Without a `quantizer` the latents themselves are compared. `negatives_of`: the
    hidden frames or all. `compare_in`: `space`, or the width of the tower.
    """

    kind: Literal["codes"]
    quantizer: QuantizerSpec | None = None
    space: int = Field(256, gt=0)  # width in which context and target are compared
    negatives: int = Field(100, gt=0)
    temperature: float = Field(0.1, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)  # of the latents in front of the quantizer
    negatives_of: Literal["hidden", "all"] = "hidden"
    compare_in: Literal["space", "width"] = "space"
    decoder: DecoderSpec | None = None
    transcripts: TranscriptSpec | None = None


class UnitTargetSpec(Spec):
    """Cluster ids of frames (HuBERT), from side-cars named in `data.frame_labels`.

    `classes`: clusters by label set, a list for several codebooks of one set.
    """

    kind: Literal["units"]
    classes: dict[str, int | list[int]] = Field(min_length=1)
    space: int = Field(256, gt=0)
    temperature: float = Field(0.1, gt=0)


class TimeSpansSpec(Spec):
    """Spans of frames (Mockingjay): see `mmssl.masking.TimeSpans`."""

    share: float = Field(0.15, gt=0, le=1)
    length: int = Field(7, gt=0)  # frames
    zero: float = Field(0.8, ge=0, le=1)
    swap: float = Field(0.1, ge=0, le=1)


class FrequencyBandSpec(Spec):
    """A band of features set to 0 (TERA); at most `share` of them."""

    share: float = Field(0.2, ge=0, le=1)


class SpecMasksSpec(Spec):
    """Masks of SpecAugment: so many of at most such a width (features, frames)."""

    bands: int = Field(2, ge=0)
    band_width: int = Field(27, ge=0)
    spans: int = Field(2, ge=0)
    span_width: int = Field(100, ge=0)
    span_share: float = Field(1.0, gt=0, le=1)


class MagnitudeNoiseSpec(Spec):
    """Gaussian noise on the input of some rows (TERA)."""

    probability: float = Field(0.15, ge=0, le=1)
    std: float = Field(0.2, ge=0)


class FrameTargetSpec(Spec):
    """Frames of a spectrogram, read in an altered form (Mockingjay, TERA); at least one part.

    Stands with `mask: {rule: all}`: the alteration itself says what is predicted.
    """

    kind: Literal["frames"]
    time: TimeSpansSpec | None = None
    frequency: FrequencyBandSpec | None = None
    masks: SpecMasksSpec | None = None
    noise: MagnitudeNoiseSpec | None = None


class PredictiveTargetSpec(Spec):
    """Frames that SpecAugment hides, and predictive information of latents (DAPC).

    Stands with `mask: {rule: all}`. Terms: `predictive`, `whiteness`, `reconstruction`.
    """

    kind: Literal["predictive"]
    latents: int = Field(16, gt=0)  # width of the bottleneck
    window: int = Field(4, gt=0)  # tokens of the past, and of the future
    ridge: float = Field(1e-6, gt=0)  # added to the covariance's diagonal
    decoder: list[Annotated[int, Field(gt=0)]] = [512, 512, 512]  # widths of its hidden layers
    masks: SpecMasksSpec = SpecMasksSpec()


class LatentTargetSpec(Spec):
    """Top layers of a teacher, the moving average of the backbone (data2vec).

    The fields are explained at `mmssl.targets.latents.LatentTarget`; `beta` is that of smooth_l1.
    """

    kind: Literal["latents"]
    layers: int = Field(8, gt=0)
    tap: Literal["layer", "ffn"] = "ffn"
    norm: Literal["instance", "layer"] = "instance"
    again: bool = False
    decay: Number = 0.999
    loss: Literal["scaled_square", "smooth_l1", "smooth_l1_sum"] = "scaled_square"
    beta: float = Field(1.0, gt=0)


TargetSpec = Annotated[
    PatchTargetSpec
    | IdTargetSpec
    | CodeTargetSpec
    | UnitTargetSpec
    | FrameTargetSpec
    | LatentTargetSpec
    | PredictiveTargetSpec
    | ReplacedTargetSpec,
    Field(discriminator="kind"),
]
