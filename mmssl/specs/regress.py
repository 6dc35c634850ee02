"""Records of dense regression."""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmssl.specs.base import Number, Spec
from mmssl.specs.frontends import KaldiSpec, SpectrumSpec, WaveSpec


class ProsodySpec(Spec):
    """Pitch, voicing, energy and zero crossings; see `mmssl.frontends.prosody.Prosody`."""

    kind: Literal["prosody"]
    sample_rate: int = Field(16000, gt=0)  # Hz; must equal the view's `hz`
    win: int = Field(400, gt=0)
    hop: int = Field(160, gt=0)
    f_min: float = Field(60.0, gt=0)  # Hz, of the fundamental
    f_max: float = Field(400.0, gt=0)


class FrameDecoderSpec(Spec):
    """A layer of `hidden` PReLUs and a linear map for every token."""

    kind: Literal["frames"] = "frames"
    hidden: int = Field(256, gt=0)


class WaveDecoderSpec(Spec):
    """Transposed convolutions to the waveform; see `mmssl.heads.regress.WaveDecoder`."""

    kind: Literal["waveform"]
    channels: list[Annotated[int, Field(gt=0)]] = Field([512, 256, 128], min_length=1)
    strides: list[Annotated[int, Field(gt=0)]] = [4, 4, 10]
    kernel: int = Field(30, gt=0)
    hidden: int = Field(64, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> WaveDecoderSpec:
        if len(self.channels) != len(self.strides) or self.kernel < max(self.strides):
            raise ValueError(
                "`channels` and `strides` need one entry per layer, no stride above `kernel`"
            )
        return self

    @property
    def samples(self) -> int:
        """Samples of a token."""
        return prod(self.strides)


class RegressSpec(Spec):
    """Every token predicts a signal of its own view at its time.

    `signal`: the front-end whose frames are predicted, or the waveform. `standardize`: its bands
    have zero mean and unit variance over all that training has seen. `error`: `square` or
    `absolute`.
    """

    kind: Literal["regress"]
    view: str
    signal: Annotated[
        SpectrumSpec | KaldiSpec | ProsodySpec | WaveSpec, Field(discriminator="kind")
    ]
    decoder: Annotated[FrameDecoderSpec | WaveDecoderSpec, Field(discriminator="kind")] = (
        FrameDecoderSpec()
    )
    error: Literal["square", "absolute"] = "square"
    standardize: bool = True
    weight: Number = 1.0

    @model_validator(mode="after")
    def _fits(self) -> RegressSpec:
        if isinstance(self.signal, WaveSpec) != isinstance(self.decoder, WaveDecoderSpec):
            raise ValueError("the signal `waveform` goes with the decoder `waveform`, no other")
        return self
