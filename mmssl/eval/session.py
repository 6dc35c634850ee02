"""What every suite begins and ends with: models, clips with progress, facts, files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from tqdm import tqdm

from mmssl.data.folders import MANIFEST, find_folder
from mmssl.eval import results
from mmssl.eval.items import ItemTable, Protocol
from mmssl.eval.parts import no_field
from mmssl.specs import RunSpec, Spec, ViewSpec
from mmssl.types import Batch, UserError

if TYPE_CHECKING:
    from mmssl.model import Model

TRAINED, RANDOM = "trained", "random"


class SuiteSpec(Spec):
    """What can be set behind `mmssl eval SUITE RUN`, whatever the suite."""

    which: Literal["ema", "best", "last"] = "ema"  # weights of the run, see `load_model`
    data: str = ""  # folder of shards; empty = the run's data.test
    limit: int = Field(0, ge=0)  # clips; 0 = all
    micro_batch: int = Field(32, gt=1)  # clips per batch
    seed: int = 0  # of everything random: partners, shifts, subsets, bootstrap
    resamples: int = Field(1000, ge=0)  # of the bootstrap
    random: bool = True  # the same with random weights
    out: str = ""  # folder of the results and the report; empty = the run folder
    report: bool = True  # write the HTML report


@dataclass
class Session:
    """A run under evaluation.

    models: `trained`, and `random` where asked for, in evaluation mode, on the GPU if there is one.
    folder: of the shards, or its address. items: values of single clips, by metric.
    """

    run: Path
    options: SuiteSpec
    spec: RunSpec
    tokenizer: Any
    models: dict[str, Model]
    folder: str
    items: ItemTable = field(default_factory=ItemTable)
    begin: float = field(default_factory=time.perf_counter)

    @classmethod
    def open(cls, run: Path, options: SuiteSpec) -> Session:
        """Load the run.

        Raises:
            UserError: no complete checkpoint, or no data to evaluate on.
        """
        import torch

        from mmssl.eval.load import load_model

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, spec, tokenizer = load_model(run, which=options.which)
        folder = options.data or spec.data.test
        if not folder:
            raise UserError(f"{run}: the run names no `data.test`; give data=FOLDER")
        models = {TRAINED: model.to(device)}
        if options.random:
            models[RANDOM] = load_model(run, random=True)[0].to(device)
        return cls(run, options, spec, tokenizer, models, folder)

    @cached_property
    def clips(self) -> int:
        """Clips that the manifest lists, at most `limit`."""
        text = (find_folder(self.folder).path / MANIFEST).read_text(encoding="utf-8")
        total = sum(int(shard["samples"]) for shard in json.loads(text).get("shards", []))
        return min(total, self.options.limit or total)

    def batches(
        self, views: Mapping[str, ViewSpec] | None = None, title: str = "reading"
    ) -> Iterator[Batch]:
        """The clips once, with a progress bar on a terminal."""
        from mmssl.data.ordered import eval_batches

        results.manifest_sha256(self.folder)  # says what is wrong with a folder without manifest
        found = eval_batches(
            self.folder,
            self.spec.data,
            self.spec.views if views is None else views,
            self.options.micro_batch,
            self.tokenizer,
            self.options.limit or None,
            workers=0 if views == {} else None,  # nothing to decode
        )
        with tqdm(total=self.clips, desc=title, unit="clip", disable=None) as bar:
            for batch in found:
                yield batch
                bar.update(batch.size)

    def check_fields(self, **fields: str) -> None:
        """See that some clip has each field, given by option, before hours are spent on decoding.

        Raises:
            UserError: no clip has one of them; names those there are.
        """
        metas: list[Mapping[str, Any]] = []
        for batch in self.batches({}, "labels"):
            metas += batch.meta
            have = {name for meta in batch.meta for name in meta if meta[name] is not None}
            fields = {option: field for option, field in fields.items() if field not in have}
            if not fields:
                return
        raise no_field(*next(iter(fields.items())), metas)

    def view_of(self, modality: str) -> tuple[str, ViewSpec]:
        """Name and record of the run's first view of a modality.

        Raises:
            UserError: the run has none.
        """
        for name, view in self.spec.views.items():
            if view.modality == modality:
                return name, view
        have = sorted({view.modality for view in self.spec.views.values()})
        raise UserError(
            f"{self.run}: the run has no view of {modality}, only of {', '.join(have)}; choose "
            "another modality or another run"
        )

    @property
    def protocol(self) -> Protocol:
        """Seed and resamples, with the table of single clips."""
        return Protocol(self.options.seed, self.options.resamples, self.items)

    def facts(self, suite: str, metas: Sequence[Mapping[str, Any]]) -> results.Results:
        """What a reader needs to repeat the evaluation. `metas`: of the clips that were read."""
        from mmssl import config

        kinds = [str(meta.get("kind", "any")) for meta in metas]
        return {
            "suite": suite,
            "protocol": results.PROTOCOL,
            "options": self.options.model_dump(),
            "seed": self.options.seed,
            "resamples": self.options.resamples,
            "versions": results.versions(),
            "machine": results.machine(),
            "run": {
                "name": self.spec.name,
                "folder": str(self.run),
                "config": config.digest(self.spec),
            },
            "data": {
                "folder": self.folder,
                "manifest_sha256": results.manifest_sha256(self.folder),
                "n": len(metas),
                "kinds": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
            },
            "checkpoint": {
                "which": self.options.which,
                "sha256": results.weights_sha256(self.models[TRAINED].state_dict()),
            },
            "train": results.train_facts(self.run),
        }

    def write(self, suite: str, found: results.Results, pages: Any) -> list[Path]:
        """Write `results`, `items` and, by `pages(path)`, `report`; returns their paths."""
        out, tail = (
            Path(self.options.out or self.run),
            "" if suite == "bouncing" else f"_{suite}",
        )
        found["seconds"] = round(time.perf_counter() - self.begin, 1)
        files = [out / f"results{tail}.json", out / f"items{tail}.json"]
        results.write(found, files[0])
        results.write(self.items.tree(), files[1])
        if self.options.report:
            files.append(out / f"report{tail}.html")
            pages(files[-1])
        return files


def progress(things: Iterable[Any], title: str, total: int | None = None) -> Iterator[Any]:
    """The same things, with a bar on a terminal."""
    yield from tqdm(things, desc=title, total=total, disable=None)
