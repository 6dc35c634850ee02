"""Records of tasks that rebuild a signal."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmssl.specs.base import Number, Spec
from mmssl.specs.quantizers import QuantizerSpec

Positive = Annotated[int, Field(gt=0)]


class SlicesSpec(Spec):
    """Slices of a spectrogram side by side, from the beginning of the view on (Audio2Vec).

    `past`, `future`: how many before and behind the middle one. `frames`: of each. `guard`: frames
    between two of them, as many as windows overlap. `read: around`: the others are encoded, their
    vectors joined in their order, and the middle one is rebuilt (CBoW); `middle`: the reverse
    (skip-gram).
    """

    past: int = Field(2, ge=0)
    future: int = Field(2, ge=0)
    frames: int = Field(96, gt=0)
    guard: int = Field(2, ge=0)
    read: Literal["around", "middle"] = "around"

    @model_validator(mode="after")
    def _has_neighbours(self) -> SlicesSpec:
        if self.count == 1:
            raise ValueError("a middle slice alone has no neighbours; give `past` or `future`")
        return self

    @property
    def count(self) -> int:
        """Number of slices."""
        return self.past + 1 + self.future

    @property
    def span(self) -> int:
        """Frames from the beginning of the first to the end of the last."""
        return self.count * (self.frames + self.guard) - self.guard


class ConvDecoderSpec(Spec):
    """The mirror of Audio2Vec's encoder, from one vector to slices; see `ConvDecoder`."""

    kind: Literal["conv"]
    channels: list[Positive] = Field([64, 128, 256, 256, 512], min_length=1)


class SequenceDecoderSpec(Spec):
    """A recurrent layer, from one vector to frames; see `SequenceDecoder`."""

    kind: Literal["sequence"]
    cell: Literal["gru", "lstm"] = "lstm"


class SpeakerSpec(Spec):
    """Who speaks: a `field` of `data.labels`; clips that have none of `classes` are no one's."""

    field: str
    classes: list[str] = Field(min_length=1)


class WaveNetSpec(Spec):
    """Dilated convolutions that say a waveform sample by sample; see `WaveNet`.

    `cycles` times `depth` layers, dilated by 1, 2, 4 ... Watched: `speakers`, the share of clips
    whose speaker is known.
    """

    kind: Literal["wavenet"]
    channels: int = Field(64, gt=0)
    skip: int = Field(256, gt=0)
    cycles: int = Field(2, gt=0)
    depth: int = Field(10, gt=0)
    speaker: SpeakerSpec | None = None


class ReconstructSpec(Spec):
    """Encode, quantise on request, decode: to the signal that was encoded, or to what is beside it.

    `pool`: one vector for each view or slice; empty: tokens in their order. `zeros`: share of the
    numbers read that are set to 0, in training (denoising). Terms: the error, named like the task,
    and a quantizer's `commitment`; watched: `perplexity`, `usage`, `diversity`. `weights`: of terms
    by name.
    """

    kind: Literal["reconstruct"]
    view: str
    slices: SlicesSpec | None = None
    pool: str = ""
    zeros: float = Field(0.0, ge=0, lt=1)
    quantizer: QuantizerSpec | None = None
    decoder: Annotated[
        ConvDecoderSpec | SequenceDecoderSpec | WaveNetSpec, Field(discriminator="kind")
    ]
    weight: Number = 1.0
    weights: dict[str, Number] = {}
