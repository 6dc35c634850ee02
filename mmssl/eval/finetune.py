"""`mmssl eval finetune RUN label=FIELD fold=FIELD`: the whole tower trained with few or all labels.

Letters in shapes: N clips, P items of a batch, D width, K classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor, nn

from mmssl.eval import folds as folding
from mmssl.eval.embed import Rows, frozen
from mmssl.eval.features import pooled, whole_view
from mmssl.eval.folds import Fold, Labels
from mmssl.eval.items import Metrics
from mmssl.eval.results import Results, interval_of, plot
from mmssl.eval.session import RANDOM, TRAINED, Session, SuiteSpec, progress
from mmssl.rng import seed_of
from mmssl.specs import Modality
from mmssl.types import Batch, UserError, ViewBatch

if TYPE_CHECKING:
    from mmssl.model import Model
    from mmssl.towers import AnyTower

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CHECKS = 4  # looks at the `dev` part during a training
_HEAD_LR = 10.0  # of the new layer, times the tower's


class Options(SuiteSpec):
    """What can be set behind `mmssl eval finetune RUN`."""

    modality: Modality = "audio"
    whole: bool = True  # read whole clips instead of the first `crop_s` seconds of the run's view
    label: str = ""  # field of the clips' meta: the class, or a list of classes
    fold: str = ""  # field of the clips' meta that names the predefined fold
    shares: str = "1,10,100"  # per cent of the training labels
    steps: int = Field(300, gt=0)  # optimiser steps of a training
    batch: int = Field(32, gt=1)  # clips of a step
    lr: float = Field(1e-4, gt=0)  # peak learning rate of the tower

    @field_validator("shares")
    @classmethod
    def _in_per_cent(cls, text: str) -> str:
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if not numbers or not all(0 < number <= 100 for number in numbers):
            raise ValueError("numbers above 0, at most 100, with commas between them are expected")
        return text


def evaluate(session: Session) -> Results:
    """Results of the suite; test clips that cannot be read count as missing.

    Raises:
        UserError: no such field, one class only, folds that cannot be used or read, no such
            modality.
    """
    options = cast("Options", session.options)
    rows, missing = labelled(session, options)
    labels, kept = folding.read_labels(rows.meta, options.label)
    folds = folding.read_folds([rows.meta[i] for i in kept], options.fold)
    keys, sources = [rows.keys[i] for i in kept], np.asarray(rows.sources)[kept]
    clips = Clips(session, options, labels, keys)
    tested = np.concatenate([fold.test for fold in folds])
    made: dict[str, dict[str, Metrics]] = {name: {} for name in session.models}
    for share in options.shares.split(","):
        for name in session.models:
            scores_NK, used = fine_tuned(clips, folds, name, float(share) / 100)
            read = [replace(f, test=scored(scores_NK, f.test, f"fold {f.name}")) for f in folds]
            record = None
            if name == TRAINED:
                there = np.sort(np.concatenate([fold.test for fold in read]))
                record = session.items.recorder(f"finetune.{share}", rows, kept[there])
            found = folding.summary(scores_NK, labels, read, sources, session.protocol, record)
            made[name][share] = found | {"labels": used}
    guess = folding.majority(labels, folds)
    majority = folding.summary(guess, labels, read, sources, session.protocol)
    unread = len(tested) - majority["n"]
    result = session.facts("finetune", rows.meta)
    result["finetune"] = made[TRAINED] | {"n": len(kept) - unread, "n_missing": missing + unread}
    result["finetune"]["shared_sources"] = folding.shared_sources(folds, sources)
    result["trivial"] = {"finetune": {"majority": majority}}
    if RANDOM in made:
        result["random_encoder"] = {"finetune": made[RANDOM]}
    shares = list(made[TRAINED])
    lines = {name: [part[share]["mean"] for share in shares] for name, part in made.items()}
    bounds = {n: [interval_of(part[s], "mean") for s in shares] for n, part in made.items()}
    lines["majority"] = [majority["mean"]] * len(shares)
    title = f"Fine-tuning: {folding.headline(labels)}, mean over folds"
    result["plots"] = [plot(title, "labels, %", [float(s) for s in shares], lines, bounds)]
    return result


def labelled(session: Session, options: Options) -> tuple[Rows, int]:
    """What is known of the clips that have the modality, and how many lack it; decodes nothing."""
    session.view_of(options.modality)
    rows, missing = Rows(), 0
    for batch in session.batches({}, "labels"):
        kept = [i for i, meta in enumerate(batch.meta) if options.modality in meta["has"]]
        rows.add_some(batch, kept)
        missing += batch.size - len(kept)
    if not rows.keys:
        raise UserError(
            f"{session.folder}: no clip holds {options.modality}; choose modality= among what the "
            "clips hold, or other data="
        )
    return rows, missing


def subset(labels: Labels, rows: Ints, share: float, seed: int) -> Ints:
    """A share of the rows, of every class at least one; a larger share holds the smaller ones.

    Rows without any label are drawn as a class of their own.
    """
    order = np.random.default_rng(seed).permutation(rows)
    kept: set[int] = set()
    table_NK = labels.table_NK[order]
    for own in [*table_NK.T, ~table_NK.any(axis=1)]:
        members = order[own]
        kept |= set(members[: math.ceil(share * len(members) - 1e-9)].tolist())
    return np.asarray(sorted(kept), dtype=np.int64)


@dataclass
class Clips:
    """Reads the labelled clips by number, in any order and as often as asked."""

    session: Session
    options: Options
    labels: Labels
    keys: Sequence[str]

    def __post_init__(self) -> None:
        """Look up where the clips lie."""
        from mmssl.data.ordered import places

        self.name, view = self.session.view_of(self.options.modality)
        self.view = whole_view(view, self.options.whole)
        place = places(self.session.folder, self.session.spec.data)
        self.places_N = np.asarray([place[key] for key in self.keys])
        self.number = {key: i for i, key in enumerate(self.keys)}

    def read(self, rows: Ints, size: int) -> Iterator[tuple[Batch, Ints]]:
        """Batches of these rows, with the rows that could be read."""
        from mmssl.data.ordered import eval_batches

        found = eval_batches(
            self.session.folder,
            self.session.spec.data,
            {self.name: self.view},
            size,
            self.session.tokenizer,
            rows=self.places_N[rows].tolist(),
        )
        for batch in found:
            yield batch, np.asarray([self.number[key] for key in batch.keys])


class Tuned(nn.Module):
    """A tower of a model with a new linear layer on the mean of its tokens."""

    def __init__(self, model: Model, view: str, classes: int) -> None:
        super().__init__()
        self.view = view
        self.tower: AnyTower = cast("Any", model.towers[model.tower_of[view]])
        trunk = getattr(self.tower, "trunk", None)
        self.trunk = trunk if isinstance(trunk, nn.Module) else None  # shared ones are not inside
        self.norm = nn.LayerNorm(self.tower.width, elementwise_affine=False)
        self.head = nn.Linear(self.tower.width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, view: ViewBatch) -> Tensor:
        """(P, K) logits of the items of a view."""
        tokens = self.tower.encode(view, 1.0)
        logits: Tensor = self.head(self.norm(pooled(tokens.x_PND, tokens.pad_PN)))
        return logits

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters of tower and head with their learning rates."""
        head = list(self.head.parameters())
        own = {id(p) for p in head}
        encoder = [p.requires_grad_() for p in self.parameters() if id(p) not in own]
        return [{"params": encoder, "lr": lr}, {"params": head, "lr": _HEAD_LR * lr}]


def fine_tuned(
    clips: Clips, folds: Sequence[Fold], name: str, share: float
) -> tuple[Floats, dict[str, int]]:
    """(N, K) scores of every test clip by a tower trained for its fold; labels used by fold.

    Scores are NaN where a clip could not be read.
    """
    scores_NK = np.full(clips.labels.table_NK.shape, np.nan)
    used = {}
    for fold in progress(folds, f"fine-tuning, {name}, {share:.0%}", len(folds)):
        seed = seed_of(clips.options.seed, "finetune", fold.name)
        rows = subset(clips.labels, fold.train, share, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tuned = train(clips, clips.session.models[name], rows, fold.dev, seed)
        predict(clips, tuned, fold.test, scores_NK)
        used[fold.name] = len(rows)
    return scores_NK, used


def train(clips: Clips, model: Model, rows: Ints, dev: Ints, seed: int) -> Tuned:
    """A copy of the model's tower trained on the rows; the best of some looks at `dev` is kept.

    AdamW, a tenth of the steps warm-up, then a cosine to zero.
    """
    options = clips.options
    device = next(iter(model.parameters())).device
    tuned = Tuned(copy.deepcopy(model), clips.name, len(clips.labels.names)).to(device)
    optimiser = torch.optim.AdamW(tuned.groups(options.lr), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: _factor(s, options.steps))
    size = min(options.batch, len(rows))
    rng, epochs = np.random.default_rng(seed), math.ceil(options.steps * size / len(rows))
    order = np.asarray(list(chain.from_iterable(rng.permutation(rows) for _ in range(epochs))))
    every, best, kept = math.ceil(options.steps / _CHECKS), -math.inf, {}
    batches = clips.read(order[: options.steps * size], size)
    for step, (batch, numbers) in enumerate(batches, start=1):
        tuned.train()
        view = batch.to(device).views[clips.name]
        truth_PK = torch.from_numpy(clips.labels.table_NK[numbers][view.rows_P.cpu()])
        loss = _loss(tuned(view), truth_PK.to(device), clips.labels.multi)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % every == 0 or step == options.steps:
            value = _value(clips, tuned, dev)
            if value > best:
                best, kept = value, copy.deepcopy(tuned.state_dict())
    if kept:
        tuned.load_state_dict(kept)
    return tuned


def _factor(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _loss(logits_PK: Tensor, truth_PK: Tensor, multi: bool) -> Tensor:
    if multi:
        return nn.functional.binary_cross_entropy_with_logits(logits_PK, truth_PK.float())
    return nn.functional.cross_entropy(logits_PK, truth_PK.int().argmax(1))


def _value(clips: Clips, tuned: Tuned, rows: Ints) -> float:
    scores_NK = np.full(clips.labels.table_NK.shape, np.nan)
    predict(clips, tuned, rows, scores_NK)
    found = folding.score(scores_NK, clips.labels, scored(scores_NK, rows, "the `dev` part"))
    value: float = found[folding.headline(clips.labels)]
    return value


def scored(scores_NK: Floats, rows: Ints, part: str) -> Ints:
    """Those of the rows that have scores.

    Raises:
        UserError: none has; names the part of the clips.
    """
    kept: Ints = rows[~np.isnan(scores_NK[rows, 0])]
    if len(kept) == 0:
        raise UserError(
            f"finetune: none of the {len(rows)} clips of {part} could be read; repair their media"
        )
    return kept


def predict(clips: Clips, tuned: Tuned, rows: Ints, scores_NK: Floats) -> None:
    """Fill in the logits of those of the rows that can be read.

    Raises:
        UserError: the training has diverged.
    """
    device = tuned.head.weight.device
    with frozen([cast("Any", tuned)]):
        for batch, numbers in clips.read(rows, clips.options.micro_batch):
            view = batch.to(device).views[clips.name]
            logits = tuned(view).double().cpu().numpy()
            if not np.isfinite(logits).all():
                raise UserError(
                    f"finetune: the tuned tower makes scores that are not finite; lower "
                    f"lr={clips.options.lr}"
                )
            scores_NK[numbers[view.rows_P.cpu().numpy()]] = logits
