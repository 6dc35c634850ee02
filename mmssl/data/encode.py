"""From shard sample to row: verify, open, plan, decode, cut.

One object of this kind lives in every worker; it has no state but the counters of what it skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmssl.data import samples
from mmssl.data.collate import Item
from mmssl.data.decode import ClipReader
from mmssl.data.integrity import ErrorBudget, Ledger, Quarantine
from mmssl.data.labels import NO_LABEL, LabelBook
from mmssl.data.media import Limits
from mmssl.data.text import Tokenizer
from mmssl.specs import CodesSpec, DataSpec, ViewSpec
from mmssl.types import Clip, Sample, UserError, View
from mmssl.views import clip as cutting
from mmssl.views.plan import Cut, Plan, Seeds, plan
from mmssl.views.text import spoken

_DEADLY = ("timeout", "memory", "crash")  # see `isolate`


@dataclass
class SampleEncoder:
    """Turns samples into rows of named views; `frame_labels` are cut as the views are."""

    views: Mapping[str, ViewSpec]
    data: DataSpec
    seed: int
    tokenizer: Tokenizer | None
    training: bool
    frame_labels: LabelBook = field(default_factory=LabelBook)
    limits: Limits = field(init=False)

    def __post_init__(self) -> None:
        """Check the views.

        Raises:
            UserError: an unknown augmentation, text views without a tokenizer, or views of codes
                without the side-car they describe.
        """
        cutting.check_views(dict(self.views))
        for name, spec in self.views.items():
            if spec.codes is not None:
                self.frame_labels.check_codes(f"views.{name}", spec.codes, spec.hz)
        texts = [name for name, spec in self.views.items() if spec.modality == "text"]
        if texts and self.tokenizer is None:
            raise UserError(f"views.{texts[0]}: a text view needs `data.tokenizer`")
        self.limits = Limits(self.data.max_pixels, self.data.max_seconds)

    def __call__(self, sample: Sample) -> Item:
        """Verify, decode and cut one sample.

        Raises:
            DamagedSampleError: the sample must be skipped; `labels` where a side-car lacks it.
        """
        record = samples.read(sample)
        draw = _flat(sample.restore_key) if self.training else ()
        seeds = Seeds(self.seed, sample.key, draw)
        with ClipReader(record, self.limits, self.data.decoder) as reader:
            cuts = plan(
                self.views,
                reader.duration_s,
                reader.has,
                seeds,
                self.training,
                reader.frame_times_s,
            )
            clips = [reader.clip(need) for need in cuts.needs] or [reader.clip()]
            meta = self._labels(reader) if self.training else _evaluation_meta(reader)
        return Item(
            key=sample.key,
            source=record.source,
            index=record.index,
            captions=record.texts,
            views=self._cut(cuts, clips),
            meta=meta,
        )

    def _labels(self, reader: ClipReader) -> dict[str, Any]:
        """The metadata that a training run asks for; the rest stays behind, it may be long."""
        known = reader.record.meta
        return {name: known[name] for name in self.data.labels if name in known}

    def _cut(self, cuts: Plan, clips: list[Clip]) -> dict[str, list[View]]:
        views: dict[str, list[View]] = {}
        for name, cut in cuts.cuts.items():
            clip = clips[cuts.pass_of.get(name, 0)]
            if cut.spec.codes is not None:
                views[name] = self._coded(clip.key, cut, cut.spec.codes.labels)
                continue
            if cut.spec.modality == "text":
                assert self.tokenizer is not None
                said = cut.spec.texts == "transcript"
                texts = spoken(clip, cut) if said else clip.captions
                views[name] = cutting.cut_text(texts, cut, self.tokenizer)
                continue
            cutter = cutting.cut_audio if cut.spec.modality == "audio" else cutting.cut_video
            view = cutter(clip, cut, self.training)
            if view is not None:
                view.labels = self.frame_labels.cut(
                    clip.key, view.start_s, len(view.data), view.rate
                )
            views[name] = [] if view is None else [view]
        return views

    def _coded(self, key: str, cut: Cut, name: str) -> list[View]:
        """The labels of the cut as ids; no view where it has none."""
        hz = cut.spec.hz
        length = round((cut.end_s - cut.start_s) * hz)
        classes_N = self.frame_labels.cut(key, cut.start_s, length, hz)[name].ids[:, 0]
        ids_N = classes_N[classes_N != NO_LABEL] + len(CodesSpec.special)
        return [View(ids_N, float(hz), cut.start_s, cut.seed)] if len(ids_N) else []


def _flat(key: tuple[Any, ...]) -> tuple[str | int, ...]:
    out: list[str | int] = []
    for part in key:
        out.extend(_flat(part) if isinstance(part, tuple) else (part,))
    return tuple(out)


def _evaluation_meta(reader: ClipReader) -> dict[str, Any]:
    """The manifest's meta, with what reports and localisation need to know of the stored clip."""
    record = reader.record
    return {
        **record.meta,
        "captions": list(record.captions),
        "source": record.source,
        "has": sorted(reader.has),
        "duration_s": reader.duration_s,
        "stored_size": list(reader.stored_size),
    }


class BadSampleGuard:
    """Counts bad samples, lists deadly ones, and says when there are too many to go on."""

    def __init__(self, max_share: float, ledger: Ledger, quarantine: Quarantine) -> None:
        self.ledger, self.quarantine = ledger, quarantine
        self._max_share = max_share
        self._budget = ErrorBudget(max_share)
        self.stop = ""

    def good(self) -> None:
        """Note a sample that was delivered."""
        self._budget.note(False)

    def bad(self, key: str, reason: str, message: str, **where: Any) -> None:
        """Note a sample that was skipped; sets `stop` when the window holds too many."""
        spent = self._budget.note(True)
        self.ledger.add(reason, key=key, message=message, **where)
        if reason in _DEADLY:
            self.quarantine.add(key, reason, message)
        if spent:
            totals = ", ".join(
                f"{name} {count}" for name, count in sorted(self.ledger.counts.items())
            )
            self.stop = (
                f"{self._budget} samples of one reader were bad, more than data.max_bad_share = "
                f"{self._max_share:g} of {ErrorBudget.window} allows ({totals}); the "
                f"last: {message}. Run python -m data_tools.check_shards on the folder"
            )
