"""Every record a YAML file may contain: typed, frozen, unknown keys refused.

A run = towers + views + tasks + optimisation + data. `config.py` fills presets in and reports
misspelt keys; `build.py` turns these records into modules.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Modality = Literal["audio", "video", "text"]


class Spec(BaseModel):
    """Base of all records: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Schedule(Spec):
    """A number that changes with the data position (share of the run's steps, 0 to 1).

    `linear` and `cosine` go from `start` to `end` between `begin` and `until`; `steps` takes the
    value of the last `points` entry [position, value] that has been reached.
    """

    kind: Literal["linear", "cosine", "steps"]
    start: float = 0.0
    end: float = 0.0
    begin: float = Field(0.0, ge=0, le=1)
    until: float = Field(1.0, ge=0, le=1)
    points: list[tuple[float, float]] = []

    @model_validator(mode="after")
    def _complete(self) -> Schedule:
        if self.kind == "steps" and (not self.points or self.points[0][0] != 0.0):
            raise ValueError("a `steps` schedule needs `points` that begin at position 0")
        if self.kind != "steps" and self.until <= self.begin:
            raise ValueError("`until` must lie after `begin`")
        return self


Number = float | Schedule


# ---------------------------------------------------------------- views


class AugmentSpec(Spec):
    """One augmentation, applied in training only; `options` are the constructor's arguments."""

    kind: str
    options: dict[str, Any] = {}


class ViewSpec(Spec):
    """One cut of a clip: which modality, how long, at which rate.

    Views with the same `window` share the random start of their cut, so that they stay in sync.
    """

    modality: Modality
    tower: str = ""  # empty: the tower named like the modality
    window: str = "clip"
    crop_s: float = Field(0.0, ge=0)  # seconds; 0 = from the window's start to the end of the clip
    hz: int = Field(16000, gt=0)  # audio sampling rate
    fps: float = Field(8.0, gt=0)  # video frames per second
    size: int = Field(
        0, ge=0
    )  # video side in pixels after resize and centre/random crop; 0 = as stored
    length: int = Field(16, gt=0)  # text ids, end marker included
    candidates: int = Field(1, gt=0)  # text candidates per row
    normalize: bool = False  # audio: zero mean, unit variance per crop
    augment: list[AugmentSpec] = []


# ---------------------------------------------------------------- towers


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


# ---------------------------------------------------------------- tasks


class SpaceSpec(Spec):
    """A common space and what it is made from.

    pool: a global token's name, `mean` or `max` over all tokens, `peaks`: the mean over time of the
    strongest cell of each step, or `steps`: the same without the mean, every step projected by
    itself and concatenated, so that a dot product adds up what happens at the same time. One for
    all, or one per modality.
    """

    dim: int = Field(512, gt=0)
    pool: str | dict[Modality, str] = "agg"
    steps: int = Field(8, gt=0)
    members: list[Modality] = []  # modalities of the space; empty = those of the pairs that use it


class HeadsSpec(Spec):
    """Projection heads into the common spaces; graphs and forms as in `mmssl.heads.project`."""

    graph: Literal["linear", "shared", "disjoint", "fac"] = "linear"
    form: str = ""  # empty: LayerNorm + linear (`linear`), MLP with batch norm (`shared`)
    spaces: dict[str, SpaceSpec] = {"common": SpaceSpec()}
    hidden: int = Field(0, ge=0)  # width of the hidden layer; 0 = the space's
    bias: bool = True  # of the first video layer (MMV has it, VATT has not)
    audio_norm: bool = False  # fac: lets audio->vat be trained, with a batch norm of its own


class DotSpec(Spec):
    """Dot product, of unit vectors unless `normalize` is off."""

    kind: Literal["dot"] = "dot"
    normalize: bool = True


class BilinearSpec(Spec):
    """g^T W g' (COLA)."""

    kind: Literal["bilinear"]
    std: float = Field(0.05, gt=0)


class DistanceSpec(Spec):
    """Affine function of the Euclidean distance of unit vectors (AVE-Net).

    To begin with, the log-odds of a match are 2 * slope * (threshold - distance).
    """

    kind: Literal["distance"]
    slope: float = Field(1.0, gt=0)
    threshold: float = Field(2**0.5, gt=0, le=2)


class FusionSpec(Spec):
    """MLP on the concatenated vectors (L3-Net)."""

    kind: Literal["fusion"]
    hidden: int = Field(128, gt=0)


class JointScoreSpec(Spec):
    """Linear read-out of a joint tower's first global token."""

    kind: Literal["joint"]
    joint: str


class MapSpec(Spec):
    """Similarity of every video cell with audio or text, reduced over cells, then over steps.

    `query`: the other side's `steps`, or one vector pooled from it (a global token's name, `mean`,
    `max`, `peaks`). `aligned`: a step is compared only with the cells of the same instant; a pooled
    query with the cells of every instant in turn. `cells`: those that leave the backbone, or those
    of the `stem`, which know their own place only. `sharpness`: of `lse`. `normalize`: which side
    has unit length.
    """

    kind: Literal["map"]
    dim: int = Field(128, gt=0)
    space: Literal["max", "mean", "lse"] = "max"
    time: Literal["mean", "max"] = "mean"
    aligned: bool = False
    cells: Literal["backbone", "stem"] = "backbone"
    query: str = "steps"
    sharpness: float = Field(10.0, gt=0)
    normalize: Literal["both", "steps", "none"] = "both"


ScoreSpec = Annotated[DotSpec | BilinearSpec | DistanceSpec | MapSpec, Field(discriminator="kind")]
MatchScoreSpec = Annotated[DistanceSpec | FusionSpec | JointScoreSpec, Field(discriminator="kind")]


class InfoNCESpec(Spec):
    """Softmax over the global batch. `max_scale` caps the learned 1/temperature."""

    kind: Literal["info_nce"] = "info_nce"
    form: Literal["symmetric", "one_way"] = "symmetric"
    temperature: float = Field(0.07, gt=0)
    learned: bool = True
    max_scale: float = Field(100.0, gt=0)
    equal_text: bool = False  # rows with equal captions are positives


class MilNCESpec(Spec):
    """MIL-NCE of MMV/VATT in its three forms (NCE when every row has one candidate)."""

    kind: Literal["mil_nce"]
    form: Literal["released", "strict", "symmetric"] = "released"
    temperature: float = Field(0.07, gt=0)
    learned: bool = False
    max_scale: float = Field(100.0, gt=0)
    equal_text: bool = False


class SigmoidSpec(Spec):
    """Independent yes/no for every pair (SigLIP)."""

    kind: Literal["sigmoid"]
    scale: float = Field(10.0, gt=0)
    bias: float = -10.0
    equal_text: bool = False


PairObjective = Annotated[InfoNCESpec | MilNCESpec | SigmoidSpec, Field(discriminator="kind")]


class PairSpec(Spec):
    """Two views (or a joint tower) compared in one space."""

    between: tuple[str, str]
    space: str = ""  # empty: the only space
    score: ScoreSpec = DotSpec()
    objective: PairObjective = InfoNCESpec()
    weight: Number = 1.0


class PairsSpec(Spec):
    """Contrastive task over named pairs that share projection heads."""

    kind: Literal["pairs"]
    heads: HeadsSpec = HeadsSpec()
    pairs: dict[str, PairSpec] = Field(min_length=1)
    chunk: int = Field(1024, gt=0)  # query rows per block of logits
    weight: Number = 1.0


class MatchSpec(Spec):
    """Does this video belong to this audio?

    `coin`: half of the rows keep their own partner (AVE-Net); `both`: every row serves once with
    its own and once with another partner. `shifted`: a further audio view of the same clip, at
    another time, as an extra negative. `hard`: share of negatives that are the most similar row of
    the batch.
    """

    kind: Literal["match"]
    between: tuple[str, str]
    draw: Literal["coin", "both"] = "both"
    shifted: str = ""
    hard: Number = 0.0


class LabelSpec(Spec):
    """A label carried by the samples' metadata."""

    kind: Literal["label"]
    view: str
    field: str
    classes: list[str] = Field(min_length=2)


class ClassifySpec(Spec):
    """Cross-entropy on a label."""

    kind: Literal["classify"]
    target: Annotated[MatchSpec | LabelSpec, Field(discriminator="kind")]
    score: MatchScoreSpec = FusionSpec(kind="fusion")
    pool: str = "agg"
    norm: bool = False  # batch norm between pooling and MLP
    embed: list[int] = []  # widths of an MLP between pooling and score (AVE-Net: 128, 128)
    weight: Number = 1.0


class MaskSpec(Spec):
    """Which tokens are hidden."""

    rule: Literal["random", "blocks", "tubes", "spans", "words"]
    ratio: Number = 0.5
    length: int = Field(10, gt=0)  # spans: tokens per span
    start_prob: float = Field(0.065, gt=0, le=1)  # spans
    block: tuple[int, int] = (5, 5)  # blocks: cells per side
    inverse: bool = True  # blocks: stay visible instead of being hidden
    shares: tuple[float, float] = (0.8, 0.1)  # words: share replaced by the mask and by random ids


class PatchTargetSpec(Spec):
    """The hidden input cells themselves; `normalize`: zero mean and unit variance per cell."""

    kind: Literal["patches"]
    normalize: bool = False
    loss: Literal["mse", "smooth_l1"] = "mse"


class IdTargetSpec(Spec):
    """The hidden token ids."""

    kind: Literal["ids"]


class MaskedSpec(Spec):
    """Masked prediction: hide, encode, predict what was hidden. `rows`: share of rows that take
    part.
    """

    kind: Literal["masked"]
    view: str
    mask: MaskSpec
    target: Annotated[PatchTargetSpec | IdTargetSpec, Field(discriminator="kind")]
    hidden: int = Field(0, ge=0)  # width of one hidden layer in the prediction head; 0 = linear
    rows: float = Field(1.0, gt=0, le=1)
    weight: Number = 1.0


TaskSpec = Annotated[PairsSpec | ClassifySpec | MaskedSpec, Field(discriminator="kind")]


# ---------------------------------------------------------------- data


class DataSpec(Spec):
    """Shard folders and how to read them."""

    train: str | dict[str, float] = ""  # folder, or {folder: blend weight}
    val: str = ""
    test: str = ""
    tokenizer: str = ""  # SentencePiece model, made by data_tools/train_tokenizer.py
    labels: list[str] = []  # metadata fields that `label` targets read in training
    workers: int = Field(2, ge=0)  # per rank; 0 reads in the training process
    decoder: Literal["auto", "pyav", "decord", "torchcodec"] = "auto"
    shuffle_buffer: int = Field(0, ge=0)  # samples; 0 relies on Energon's shard shuffling
    max_pixels: int = Field(16_777_216, gt=0)  # refuse larger frames before decoding
    max_seconds: float = Field(600.0, gt=0)  # refuse longer clips before decoding
    max_bad_share: float = Field(
        0.01, ge=0, le=1
    )  # stop when more samples than this fail in a window


# ---------------------------------------------------------------- optimisation and run


class OptimSpec(Spec):
    """AdamW/Adam with warm-up and decay; lr is the peak value."""

    kind: Literal["adamw", "adam"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    warmup: float = Field(0.05, ge=0)  # share of the steps if below 1, else steps
    decay: Literal["cosine", "quarter_cosine", "constant"] = "cosine"
    final_lr: float = Field(0.0, ge=0)  # share of the peak at the last step
    clip: float = Field(1.0, ge=0)  # gradient norm; 0 = off
    ema: Number = 0.0  # decay of the averaged weights used by evaluation; 0 = none


class TrainSpec(Spec):
    """Steps, batch and hardware. The batch is global: over all ranks and accumulation steps."""

    steps: int = Field(1000, gt=0)
    batch: int = Field(32, gt=0)  # rows per optimiser step, all ranks together
    accumulate: int = Field(1, gt=0)  # micro-batches per optimiser step
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    zero: Literal[0, 1, 2, 3] = 0
    checkpoint_activations: bool = False
    log_every: int = Field(10, gt=0)
    save_every: int = Field(0, ge=0)  # steps; 0 = at the end only
    threads: int = Field(0, ge=0)  # torch threads per rank on CPU; 0 = torch's default


class ValidateSpec(Spec):
    """Evaluation inside training on fixed subsets."""

    every: int = Field(0, ge=0)  # steps; 0 = off
    clips: int = Field(200, gt=0)
    metric: str = ""  # e.g. "retrieval.audio->video.r_at_10"; its best checkpoint is kept
    patience: int = Field(
        0, ge=0
    )  # stop after that many evaluations without improvement; 0 = never


class TrunkSpec(TransformerSpec, Trainable):
    """The transformer of every tower with `backbone: shared`."""


class RunSpec(Spec):
    """One run: everything `mmssl train` needs."""

    name: str
    paper: str = ""
    out: str = ""  # run folder; empty = runs/<name>
    shared: TrunkSpec | None = None
    towers: dict[str, TowerSpec] = Field(min_length=1)
    joints: dict[str, JointSpec] = {}
    views: dict[str, ViewSpec] = Field(min_length=1)
    tasks: dict[str, TaskSpec] = Field(min_length=1)
    optim: OptimSpec = OptimSpec()
    train: TrainSpec = TrainSpec()
    data: DataSpec = DataSpec()
    validation: ValidateSpec = Field(ValidateSpec(), alias="validate")
