"""The records that flow from a shard to a loss.

Letters in shapes: B rows of the local batch, L slots of a row (text candidates, 1 elsewhere), P
encoded items (present slots only), N tokens, D width, T frames or steps, H height, W width, C
channels, S samples. All times are seconds on the clip's own clock, whose zero is the first video
frame (or the first audio sample where there is no video).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

MODALITIES = ("audio", "video", "text")

# Exit codes that tell a launcher what to do (names of sysexits.h). EX_SOFTWARE: no progress for
# `train.hang_s`; EX_TEMPFAIL: asked to stop, a checkpoint is written, the same command goes on.
HUNG, PREEMPTED = 70, 75


class UserError(ValueError):
    """Bad input that a user can mend: names the file, key or field and the remedy.

    The command line prints its message without a traceback.
    """


@dataclass(frozen=True)
class Sample:
    """One shard sample before decoding: bytes by field name (`mp4`, `flac`, `txt`, `json` ...)."""

    key: str
    restore_key: tuple[str | int, ...]
    fields: dict[str, bytes]


class Word(NamedTuple):
    """A word, or a phrase whose words have no times of their own, in seconds."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """What is said in a clip: `words` are in the order of their starts, `text` is all of it."""

    text: str
    words: tuple[Word, ...]

    def within(self, start_s: float, end_s: float) -> Transcript:
        """What overlaps a stretch by half of the shorter of the two, its times as they are."""
        middle = (start_s + end_s) / 2
        words = tuple(
            w
            for w in self.words
            if start_s <= (w.start_s + w.end_s) / 2 < end_s or w.start_s <= middle < w.end_s
        )
        if len(words) == len(self.words):
            return self
        return Transcript(" ".join(word.text for word in words), words)


@dataclass
class Clip:
    """Decoded media on one clock.

    waveform: (C, S) float32 in [-1, 1] at `audio_hz`, first sample at time `audio_start_s`.
    frames: (T, H, W, 3) uint8, frame t is shown at `frame_times_s[t]`.
    captions: every caption of the clip; empty where text is missing.
    transcript: what is said in it.
    meta: the rest of the sample's json (class, boxes ...), read by evaluation only.
    """

    key: str
    source: str
    index: int
    duration_s: float
    waveform: Tensor | None = None
    audio_hz: int = 0
    audio_start_s: float = 0.0
    frames: Tensor | None = None
    frame_times_s: Tensor | None = None
    captions: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    transcript: Transcript | None = None


class Pair(NamedTuple):
    """Two neighbouring segments of a document before they are joined: ids without markers.

    lent: what another row may have as its second segment. room: ids of both that the view may hold.
    ends: the ids of [CLS] and [SEP].
    """

    first: list[int]
    second: list[int]
    lent: list[int]
    room: int
    ends: tuple[int, int]


@dataclass
class FrameLabels:
    """Integer ids along time, read from a side-car; label 0 belongs to the view's start.

    ids: int64, (N, G) of one view, (P, N, G) of a batch; G codebooks (1 unless the side-car holds
    an ensemble); -1 where there is no label. rate_hz: labels per second, which need not be the rate
    of the tokens: `mmssl.data.labels.frame_ids` aligns them.
    """

    ids: Tensor
    rate_hz: float


@dataclass
class View:
    """One cut and augmented tensor of one modality, unpadded.

    data: audio (S,) float32; video (T, H, W, 3) uint8; text (N,) int64 token ids.
    rate: Hz for audio, frames per second for video, 0 for text.
    start_s: place of the first unit on the clip's clock.
    seed: seeds everything random that happens to this view later (masks, dropped tokens).
    split: where the second segment of a text pair begins; 0 for a single one.
    order: 0 where a text pair is as in its document, 1 where it is not; -1 for a single segment.
    pair: what other rows may borrow from until the batch is put together.
    labels: frame labels by name (`data.frame_labels`), cut as the view is.
    """

    data: Tensor
    rate: float
    start_s: float
    seed: int
    split: int = 0
    order: int = -1
    pair: Pair | None = None
    labels: dict[str, FrameLabels] = field(default_factory=dict)


_COLUMNS = (
    *("data", "lengths_P", "rows_P", "slots_P", "seeds_P", "start_s_P", "split_P", "order_P"),
    "signal",
)


@dataclass
class ViewBatch:
    """One view of a batch; holds the present items only (an absent item costs no compute).

    data: (P, ...) padded at the end of the first unpadded axis; lengths_P: valid samples, frames
    or ids.
    rows_P, slots_P: where item p sits in the (B, L) table; present_BL says which places are filled.
    seeds_P: int64 seeds of masks and dropped tokens, equal on every batch layout.
    split_P, order_P: of text in segments, as in `View`; None elsewhere.
    labels: frame labels by name (`data.frame_labels`), padded with -1; none for text.
    signal: what a tower reads instead of what its front-end makes of the data, e.g. an augmented
    spectrogram.
    A batch without any present item holds one dummy item and `dummy=True`: it is encoded with
    weight 0, so that every rank runs the same modules in the same order.
    """

    modality: str
    data: Tensor
    lengths_P: Tensor
    rows_P: Tensor
    slots_P: Tensor
    seeds_P: Tensor
    start_s_P: Tensor
    present_BL: Tensor
    rate: float
    dummy: bool = False
    split_P: Tensor | None = None
    order_P: Tensor | None = None
    labels: dict[str, FrameLabels] = field(default_factory=dict)
    signal: Tensor | None = None

    def columns(self) -> dict[str, Tensor]:
        """The tensors whose first axis is that of the P items, by field."""
        found = {name: getattr(self, name) for name in _COLUMNS}
        return {name: column for name, column in found.items() if column is not None}

    @property
    def present_B(self) -> Tensor:
        """(B,) bool: the row has at least one item."""
        return self.present_BL.any(dim=1)


@dataclass
class Batch:
    """Collated views of B rows.

    source_B: int64 id of the source recording (rows of one source are no negatives of each other).
    text_B: int64 id of the row's first caption, 0 where text is missing (equal captions are
    positives).
    index_B: row number in the source manifest. meta: one dict per row, filled for evaluation only.
    """

    views: dict[str, ViewBatch]
    keys: list[str]
    source_B: Tensor
    text_B: Tensor
    index_B: Tensor
    meta: list[dict[str, Any]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.keys)

    def classes(self, label: str, names: Sequence[str]) -> Tensor:
        """(B,) int64 place among `names` of a label of the rows' metadata, -1 for any other."""
        values = [meta.get(label) for meta in self.meta]
        found = [None if value is None else str(value) for value in values]
        return self.source_B.new_tensor([names.index(x) if x in names else -1 for x in found])

    def to(self, device: Any) -> Batch:
        """The same batch on another device."""
        moved: Batch = _moved(self, device)
        return replace(moved, views={k: _moved(view, device) for k, view in self.views.items()})


def _moved(record: Any, device: Any) -> Any:
    from torch import Tensor

    fields = vars(record)
    moved: dict[str, Any] = {
        k: v.to(device, non_blocking=True) for k, v in fields.items() if isinstance(v, Tensor)
    }
    if fields.get("labels"):
        moved["labels"] = {k: _moved(v, device) for k, v in fields["labels"].items()}
    return replace(record, **moved)


@dataclass(frozen=True)
class Floor:
    """A watched term that means a collapse where its mean stays below `least`.

    what: has collapsed. remedy: what a user can change.
    """

    least: float
    what: str
    remedy: str


class Term(NamedTuple):
    """A loss as (sum, count), both (1,) or scalar tensors; counts are summed over ranks before
    dividing.
    """

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count, which nobody needs


@dataclass(frozen=True)
class Codes:
    """What a quantizer returns for N frames: G groups of V entries, Q numbers in all groups.

    vectors_PNQ: chosen entries, groups side by side; with gradient to latents and codebook.
    ids_PNG: int64 chosen entries.
    soft_GV: probabilities of the entries without noise and temperature, summed over valid frames,
      with gradient (`mmssl.objectives.codes.diversity`); `hard_GV` where there are none.
    hard_GV: how many valid frames chose each entry, without gradient.
    commitment: loss that ties codebook and latents, summed over valid frames; 0 where there is
      none.
    count: number of valid frames.
    """

    vectors_PNQ: Tensor
    ids_PNG: Tensor
    soft_GV: Tensor
    hard_GV: Tensor
    commitment: Tensor
    count: Tensor


@dataclass
class Tokens:
    """What a tower returns for the P items of one view.

    x_PND: token outputs after the final norm; pad_PN: True where a token is padding or was dropped.
    stem_PMD: the stem's cells, quantised where the tower does that; they know their own place only.
      stem_pad_PM: their padding.
    grid: token grid, (T, F) for spectrograms, (T,) for waveforms and text, (T, H, W) for video;
      N is its product, tokens are in row-major order of the grid. stem_grid: the same for the M
      cells of the stem, finer than `grid` where the tower merges cells.
    extra: the global tokens by name, each (P, D).
    hide: how the pass hid tokens (`mmssl.towers.Mask`), None without a mask.
    features_PNE, raw_PNE: latents of a stem that shows them (`mmssl.towers.LatentStem`), behind and
      before its norm; a mask of latents does not touch them. None elsewhere.
    codes: what the tower's quantizer made of the stem's cells; None without one.
    motion_PM: how much moves inside each cell of the stem, in [0, 1]; None where the front-end does
      not tell.
    rate_hz, stem_rate_hz: tokens and cells of the stem per second (0 for text).
    """

    x_PND: Tensor
    pad_PN: Tensor
    stem_PMD: Tensor
    stem_pad_PM: Tensor
    grid: tuple[int, ...]
    stem_grid: tuple[int, ...]
    extra: dict[str, Tensor]
    rate_hz: float
    stem_rate_hz: float
    view: ViewBatch
    hide: str | None = None
    motion_PM: Tensor | None = None
    features_PNE: Tensor | None = None
    raw_PNE: Tensor | None = None
    codes: Codes | None = None
