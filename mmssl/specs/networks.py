"""Records of convolutional networks that read a whole map."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmssl.specs.base import Spec


class ConvAV8Spec(Spec):
    """The eight-convolution network of L3-Net (stride 1) and AVE-Net (stride 2)."""

    kind: Literal["conv_av8"]
    stride: Literal[1, 2] = 2
    input_norm: bool = False  # OpenL3's batch norm on the input
    width: int = Field(64, gt=0)  # channels of the first two convolutions


class EfficientNetSpec(Spec):
    """EfficientNet-B0 without its classifier (COLA)."""

    kind: Literal["efficientnet_b0"]
    drop_path: float = Field(0.2, ge=0, lt=1)


class ResNet18Spec(Spec):
    """ResNet-18 up to its last block; `stride`: pixels per cell."""

    kind: Literal["resnet18"]
    stride: Literal[8, 16, 32] = 32


class ResNet50Spec(Spec):
    """ResNet-50 up to its last block; `zero_init`: residual branches start at 0."""

    kind: Literal["resnet50"]
    zero_init: bool = False


class BYOLASpec(Spec):
    """BYOL-A's encoders; see `mmssl.backbones.byola.BYOLA`."""

    kind: Literal["byol_a"]
    version: Literal[1, 2] = 1
    bands: int = Field(64, gt=0)
    hidden: int = Field(2048, gt=0)
    dropout: float = Field(0.3, ge=0, lt=1)


class VGG16Spec(Spec):
    """VGG-16 up to conv5, and a 3x3 convolution to `outputs` channels unless 0."""

    kind: Literal["vgg16"]
    outputs: int = Field(0, ge=0)


class AlexNetSpec(Spec):
    """AlexNet with batch norm up to its last convolution; `channels` of its five."""

    kind: Literal["alexnet"]
    channels: list[Annotated[int, Field(gt=0)]] = Field(
        [64, 192, 384, 256, 256], min_length=5, max_length=5
    )


class SpeechConvSpec(Spec):
    """Convolutions along time over all `bands` (DAVEnet, matchmaps); see `SpeechConv`.

    One entry of `channels`, `kernels` and `pools` (0 = none) per layer.
    """

    kind: Literal["speech_conv"]
    bands: int = Field(40, gt=0)
    channels: list[int] = [128, 256, 512, 512, 1024]
    kernels: list[int] = [1, 11, 17, 17, 17]
    pools: list[Literal[0, 3, 4]] = [0, 3, 3, 3, 3]
    norm: bool = True

    @model_validator(mode="after")
    def _layers(self) -> SpeechConvSpec:
        if not len(self.channels) == len(self.kernels) == len(self.pools) > 0:
            raise ValueError("`channels`, `kernels` and `pools` need one entry per layer")
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise ValueError("`kernels` must be odd, so that each step stays in its middle")
        return self


class ResNetSpec(Spec):
    """Pre-activation ResNet-50; with `shift` on videos TSM-ResNet50 (MMV).

    The fields are explained at `mmssl.backbones.resnet.ResNetV2`.
    """

    kind: Literal["resnet_v2"]
    channels: int = Field(64, gt=0)
    blocks: list[Annotated[int, Field(gt=0)]] = Field([3, 4, 6, 3], min_length=4, max_length=4)
    shift: float = Field(0.0, ge=0, le=0.5)


class S3DGSpec(Spec):
    """Gated separable 3D Inception on videos (MIL-NCE, MMV).

    The fields are explained at `mmssl.backbones.s3d.S3DG`.
    """

    kind: Literal["s3dg"]
    channels: int = Field(64, gt=0, multiple_of=8)
    first_frames: Literal[1, 3, 5, 7] = 7
    gating: bool = True
    deflated: bool = False


class Audio2VecSpec(Spec):
    """Audio2Vec's encoder of slices of a spectrogram.

    The fields are explained at `mmssl.backbones.audio2vec.Audio2Vec`.
    """

    kind: Literal["audio2vec"]
    bands: int = Field(64, gt=0)
    frames: int = Field(96, gt=0)
    shift: int = Field(96, gt=0)
    channels: list[Annotated[int, Field(gt=0)]] = Field([64, 128, 256, 256, 512], min_length=1)
    width: int = Field(128, gt=0)


class SincNetSpec(Spec):
    """SincNet and linear layers on chunks of a waveform (LIM).

    The fields are explained at `mmssl.backbones.waves.SincNet`.
    """

    kind: Literal["sincnet"]
    sample_rate: int = Field(16000, gt=0)  # Hz; must equal the view's `hz`
    samples: int = Field(3200, gt=0)
    shift: int = Field(160, gt=0)
    filters: int = Field(80, gt=0)
    kernel: int = Field(251, gt=0)
    widths: list[Annotated[int, Field(gt=0)]] = Field([2048, 2048], min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> SincNetSpec:
        if self.kernel % 2 == 0:
            raise ValueError(f"`kernel` ({self.kernel}) must be odd: a filter has a middle tap")
        if self.samples < self.kernel + 74:
            raise ValueError(
                f"`samples` ({self.samples}) must be at least `kernel` + 74: three poolings by 3"
            )
        return self


class PASESpec(Spec):
    """Sinc filters and convolutions on the waveform; see `mmssl.backbones.pase.PASE`."""

    kind: Literal["pase"]
    sample_rate: int = Field(16000, gt=0)  # Hz; must equal the view's `hz`
    filters: int = Field(64, gt=0)
    kernel: int = Field(251, gt=0)
    channels: list[Annotated[int, Field(gt=0)]] = [64, 128, 128, 256, 256, 512, 512]
    kernels: list[Annotated[int, Field(gt=0)]] = [20, 11, 11, 11, 11, 11, 11]
    strides: list[Annotated[int, Field(gt=0)]] = [10, 2, 1, 2, 1, 2, 2]
    width: int = Field(100, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> PASESpec:
        if self.kernel % 2 == 0:
            raise ValueError(f"`kernel` ({self.kernel}) must be odd: a filter has a middle tap")
        if not len(self.channels) == len(self.kernels) == len(self.strides) > 0:
            raise ValueError("`channels`, `kernels` and `strides` need one entry per layer")
        return self


class WaveResNetSpec(Spec):
    """ResNet-18 in one dimension on the waveform (CLAR)."""

    kind: Literal["wave_resnet18"]
    channels: int = Field(64, gt=0)


class DilatedConvSpec(Spec):
    """Dilated convolutions over time: the mask network of Conv-TasNet.

    `width_in`: of what enters. The other fields are explained at
    `mmssl.backbones.dilated.DilatedConvs`.
    """

    kind: Literal["dilated_conv"]
    width_in: int = Field(512, gt=0)
    width: int = Field(128, gt=0)
    hidden: int = Field(512, gt=0)
    kernel: int = Field(3, gt=0)
    blocks: int = Field(8, gt=0)
    repeats: int = Field(3, gt=0)
    norm: Literal["global", "feature"] = "global"
    long_skips: bool = False

    @property
    def layers(self) -> int:
        """Number of blocks in all repeats."""
        return self.blocks * self.repeats

    @model_validator(mode="after")
    def _fits(self) -> DilatedConvSpec:
        if self.kernel % 2 == 0:
            raise ValueError(f"`kernel` ({self.kernel}) must be odd: it sees both sides alike")
        return self


ConvSpec = (
    ConvAV8Spec
    | EfficientNetSpec
    | ResNet18Spec
    | ResNet50Spec
    | BYOLASpec
    | VGG16Spec
    | AlexNetSpec
    | SpeechConvSpec
    | ResNetSpec
    | S3DGSpec
    | SincNetSpec
    | PASESpec
    | WaveResNetSpec
    | Audio2VecSpec
)
