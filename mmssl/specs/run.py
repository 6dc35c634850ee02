"""Records of data, optimisation and training, and of the whole run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmssl.specs.base import Number, Spec
from mmssl.specs.tasks import TaskSpec
from mmssl.specs.towers import JointSpec, TowerSpec, Trainable, TransformerSpec
from mmssl.specs.views import ViewSpec


class DataSpec(Spec):
    """Shard folders and how to read them."""

    # folder, [folders], which weigh as many samples as they hold, or {folder: weight}
    train: str | list[str] | dict[str, float] = ""
    # rows come from a folder in proportion to its weight to this power: 1 = as often as it weighs
    alpha: float = Field(1.0, ge=0, le=1)
    val: str = ""
    test: str = ""
    tokenizer: str = ""  # SentencePiece model, made by data_tools/train_tokenizer.py
    labels: list[str] = []  # metadata fields that `label` targets read in training
    # side-cars of data_tools/label_shards.py by the name tasks use, one file per shard folder
    frame_labels: dict[str, str | list[str]] = {}
    workers: int = Field(2, ge=0)  # per rank; 0 reads in the training process
    # rows that a reader puts together; 0 = all that a process takes at once. With fewer, a run can
    # go on with more processes
    rows: int = Field(0, ge=0)
    decoder: Literal["auto", "pyav", "decord", "torchcodec"] = "auto"
    shuffle_buffer: int = Field(0, ge=0)  # samples; 0 relies on Energon's shard shuffling
    max_pixels: int = Field(16_777_216, gt=0)  # refuse larger frames before decoding
    max_seconds: float = Field(600.0, gt=0)  # refuse longer clips before decoding
    max_bytes: int = Field(134_217_728, gt=0)  # refuse larger samples before reading
    # stop when more than this share of the last 1000 samples of a reader fails
    max_bad_share: float = Field(0.01, ge=0, le=1)
    isolate: bool = True  # decode in a child process that a bad file may kill; off: trusted files
    decode_seconds: float = Field(20.0, gt=0)  # time for one sample; needs `isolate`
    decode_mb: int = Field(1000, gt=0)  # memory for one sample beyond the start; needs `isolate`


class OptimSpec(Spec):
    """AdamW, Adam, SGD or LARS with warm-up and decay; lr is the peak value.

    SGD and LARS (see `mmssl.train.lars`): the first of `betas` is the momentum, `eps` is not read.
    """

    kind: Literal["adamw", "adam", "sgd", "lars"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    warmup: float = Field(0.05, ge=0)  # share of the steps if below 1, else steps
    hold: float = Field(0.0, ge=0, lt=1)  # share of the run at the peak, after the warm-up
    decay: Literal["cosine", "quarter_cosine", "linear", "exponential", "constant"] = "cosine"
    final_lr: float = Field(0.0, ge=0)  # share of the peak at the last step
    clip: float = Field(1.0, ge=0)  # gradient norm; 0 = off
    # decay of the averaged weights used by evaluation, smaller in the first steps; 0 = none
    ema: Number = 0.0

    @model_validator(mode="after")
    def _can_decay(self) -> OptimSpec:
        if self.decay == "exponential" and self.final_lr <= 0:
            raise ValueError("an `exponential` decay needs `final_lr` above 0")
        return self


class TrainSpec(Spec):
    """Steps, batch and hardware. The batch is global: over all ranks and accumulation steps."""

    steps: int = Field(1000, gt=0)
    batch: int = Field(32, gt=0)  # rows per optimiser step, all ranks together
    # micro-batches per optimiser step; losses and batch norms across rows see one at a time
    accumulate: int = Field(1, gt=0)
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    zero: Literal[0, 1, 2, 3] = 0
    checkpoint_activations: bool = False
    # items of a view that are encoded at once, and again in the backward; losses see all of them:
    # large batches in little memory; 0 = all
    chunk: int = Field(0, ge=0)
    log_every: int = Field(10, gt=0)
    reference: str = ""  # loss curve to compare with, of python -m mmssl.train.reference
    save_every: int = Field(0, ge=0)  # steps; 0 = at the end only
    keep_last: int = Field(3, ge=0)  # so many of the newest checkpoints stay; 0 = all
    keep_every: int = Field(0, ge=0)  # steps; checkpoints of multiples of it stay, too
    copy_to: str = ""  # address (fsspec) to which checkpoints are copied, and fetched from if lost
    # a checkpoint that cannot be written, e.g. on a full disk; the last one of a run always stops
    on_save_error: Literal["stop", "continue"] = "stop"
    # steps in a row that are skipped for a loss or gradient that is not finite, before the run goes
    # back to its last checkpoint (with other data); the second time it stops
    bad_steps: int = Field(10, gt=0)
    # a rank ends that is so long at one step, evaluation or checkpoint, or at building the model or
    # at finding, fetching, converting and restoring a checkpoint on the way there; 0 = never
    hang_s: float = Field(1800.0, ge=0)
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
    towers: dict[str, TowerSpec]
    joints: dict[str, JointSpec] = {}
    views: dict[str, ViewSpec]
    tasks: dict[str, TaskSpec]  # empty: towers to start from or to evaluate, see `mmssl import`
    optim: OptimSpec = OptimSpec()
    train: TrainSpec = TrainSpec()
    data: DataSpec = DataSpec()
    validation: ValidateSpec = Field(ValidateSpec(), alias="validate")

    @model_validator(mode="after")
    def _reads_something(self) -> RunSpec:
        tables = bool(self.tasks) and all(t.kind == "alignment" for t in self.tasks.values())
        if not (tables or (self.towers and self.views)):
            raise ValueError("`towers` and `views` need one entry at least")
        if tables and (self.towers or self.views):
            raise ValueError("an `alignment` reads tables: leave `towers` and `views` empty, {}")
        return self
