"""Records of views: what is cut from a clip, and how it is augmented."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from mmssl.specs.base import Modality, Spec


class AugmentSpec(Spec):
    """One augmentation, applied in training only; `options` are the constructor's arguments."""

    kind: str
    options: dict[str, Any] = {}


class MixSpec(Spec):
    """Utterance mixing (WavLM): a part of another row of the batch is laid over some rows.

    Labels stay those of the row itself.
    """

    probability: float = Field(0.2, ge=0, le=1)  # of a row to be mixed
    db: tuple[float, float] = (-5.0, 5.0)  # power of the row relative to what is laid over it


class SegmentsSpec(Spec):
    """A text view of the whole document, the captions of a sample in their order.

    `single`: [CLS] text [SEP]. `next` and `order`: [CLS] A [SEP] B [SEP], where half of the B are
    from another document of the batch (BERT), or half of the pairs are swapped (ALBERT). `short`:
    share of rows that are shortened to a random number of ids.
    """

    pairing: Literal["single", "next", "order"]
    short: float = Field(0.0, ge=0, le=1)


class CodesSpec(Spec):
    """An audio view that holds ids of a side-car instead of the signal they were made of.

    `labels`: its name in `data.frame_labels`; `classes`: how many it tells apart. Its rate must be
    the view's `hz`. Class k is read as id k + 2, behind padding and mask.
    """

    special: ClassVar[dict[str, int]] = {"pad": 0, "mask": 1}

    labels: str
    classes: int = Field(gt=1)

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return len(self.special) + self.classes


class ViewSpec(Spec):
    """One cut of a clip: which modality, how long, at which rate.

    Views with the same `window` share the random start of their cut, so that they stay in sync;
    windows `NAME.1`, `NAME.2` ... lie beside each other, and clips that are too short for all of
    them have views of the first alone.
    """

    modality: Modality
    tower: str = ""  # empty: the tower named like the modality
    window: str = "clip"
    crop_s: float = Field(0.0, ge=0)  # seconds; 0 = from the window's start to the end of the clip
    # of windows NAME.1, NAME.2 ...: seconds from the first start to the last, at most; None: any
    within_s: float | None = Field(None, gt=0)
    hz: int = Field(16000, gt=0)  # audio sampling rate
    fps: float = Field(8.0, gt=0)  # video frames per second
    size: int = Field(
        0, ge=0
    )  # video side in pixels after resize and centre/random crop; 0 = as stored
    length: int = Field(16, gt=0)  # text ids, end marker included
    candidates: int = Field(1, gt=0)  # text candidates per row
    # text: the captions of a clip, or what is said in the cut: `crop_s` long, in its `window`
    texts: Literal["captions", "transcript"] = "captions"
    segments: SegmentsSpec | None = None  # text: not captions one by one, but documents
    normalize: bool = False  # audio: zero mean, unit variance per crop
    augment: list[AugmentSpec] = []
    mix: MixSpec | None = None  # audio, in training
    codes: CodesSpec | None = None  # audio: ids of a side-car at `hz`, nothing is decoded

    @model_validator(mode="after")
    def _holds_segments(self) -> ViewSpec:
        if self.segments is None:
            return self
        if self.modality != "text" or self.candidates > 1 or self.length < 5:
            raise ValueError(
                "`segments` needs a text view of at least 5 ids with one candidate per row"
            )
        return self

    @model_validator(mode="after")
    def _holds_speech(self) -> ViewSpec:
        if self.texts == "transcript" and self.modality != "text":
            raise ValueError("`texts: transcript` needs a text view")
        return self

    @model_validator(mode="after")
    def _holds_codes(self) -> ViewSpec:
        signal = self.augment or self.mix is not None or self.normalize
        if self.codes is not None and (self.modality != "audio" or signal):
            raise ValueError("`codes` need an audio view without augment, mix and normalize")
        return self

    @property
    def tower_name(self) -> str:
        """The tower that reads the view."""
        return self.tower or self.modality
