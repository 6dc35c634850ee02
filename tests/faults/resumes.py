"""R3: a run that goes on computes bit for bit what the undisturbed one does.

The toy with a codebook, dropout and a queue, fed by the real loader. It dies at a random
micro-batch, all random generators are disturbed, and it goes on from its newest checkpoint for 20
steps, in the same process: `tests/dist` has new ones.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "dist"))

import toy_run
from faults.report import Outcome, collect
from test_resume_exact import losses, same, same_checkpoint
from tone_shards import SCORES, write_tones
from torch import Tensor

from mmssl.data.loader import train_loader
from mmssl.partition import piece
from mmssl.quantizers import VectorQuantizer
from mmssl.specs import AugmentSpec, DataSpec, ViewSpec
from mmssl.train import loop
from mmssl.train.checkpoint import Job
from mmssl.train.engine import session
from mmssl.train.randomness import random_state, seed_all
from mmssl.types import Batch, Term

STEPS, FOLLOWED, EVERY = 80, 20, 7  # of the run; those compared; at most between two checkpoints
VIEWS = {
    "audio": ViewSpec(modality="audio", crop_s=0.01, augment=[AugmentSpec(kind="gain")]),
}


class CodedToy(toy_run.ToyModel):
    """With a codebook that follows the embeddings."""

    def __init__(self, dropout: float = 0.1, poison: dict[str, Any] | None = None) -> None:
        super().__init__(dropout, poison)
        self.quantizer = VectorQuantizer(6, groups=2, entries=5, project=False)

    def forward(self, batch: Any, step: int, total: int) -> tuple[Tensor, dict[str, Term]]:
        loss, terms = super().forward(batch, step, total)
        codes = self.quantizer(self.last_embeddings["a"][None])
        return loss + codes.commitment / codes.count, terms


class HeardLoader:
    """Real clips as rows of the toy; dies at micro-batch `fail_at` of the run."""

    shards: Path

    def __init__(self, size: int, fail_at: int = -1, pause_s: float = 0.0) -> None:
        data = DataSpec(train=str(self.shards), workers=0, shuffle_buffer=4, isolate=False)
        self.inner = train_loader(data, VIEWS, size, 0, 0, 1, None)
        self.position, self.fail_at = 0, fail_at
        self.skipped, self.close = self.inner.skipped, self.inner.close
        self.ids: list[Any] = []

    def __next__(self) -> toy_run.ToyBatch:
        if self.position == self.fail_at:
            raise InterruptedError("the machine went away")
        batch: Batch = next(self.inner)
        self.position += 1
        view = batch.views["audio"]
        self.ids = [*batch.keys, *view.seeds_P.tolist(), *view.start_s_P.tolist()]
        return toy_run.ToyBatch(8 * view.data.flatten(1)[:, :8])

    def state(self) -> dict[str, Any]:
        return {"position": self.position, "inner": self.inner.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        self.inner.restore(state["inner"])


@contextmanager
def diary() -> Iterator[dict[int, Any]]:
    """What each step inside leaves behind, by its number."""
    pages: dict[int, Any] = {}
    step = loop._step

    def noted(spec: Any, job: Job, meters: Any) -> str:
        trouble = step(spec, job, meters)
        model = job.engine.model
        assert job.average is not None
        pages[job.progress.step + 1] = {
            "samples": job.loader.ids,  # type: ignore[attr-defined]
            "random": random_state(),
            "rates": [group["lr"] for group in job.engine._engine.optimizer.param_groups],
            "average": {name: part.clone() for name, part in job.average.pieces.items()},
            "weights": {name: piece(p).clone() for name, p in model.named_parameters()},
            "queue": {name: buffer.clone() for name, buffer in model.named_buffers()},
        }
        return trouble

    loop._step = noted
    try:
        yield pages
    finally:
        loop._step = step


def resumes(folder: Path, stage: int, count: int, rng: random.Random) -> Iterator[bool]:
    """Whether the steps after a resume are those of the undisturbed run, `count` times."""
    accumulate = 1 + stage % 2
    train = {"zero": stage, "steps": STEPS, "batch": 4, "accumulate": accumulate, "log_every": 1}
    with session(threads=1) as device:

        def run(where: Path, every: int, keep: int, fail_at: int = -1) -> dict[int, Any]:
            with diary() as pages:
                settings = {**train, "save_every": every, "keep_last": keep}
                toy_run.run(device, str(where), fail_at, train=settings)
            return pages

        whole = run(folder / "whole", 1, 0)
        plain = losses(folder / "whole")
        moments = range(EVERY * accumulate, (STEPS - FOLLOWED) * accumulate)
        for i, moment in enumerate(rng.sample(moments, count)):
            part, every = folder / f"part{i}", rng.randint(1, EVERY)
            saved = moment // accumulate // every * every
            if before := saved - every:  # not all the way from the first step
                name = f"checkpoints/step-{before:08d}"
                shutil.copytree(folder / "whole" / name, part / name)
            run(part, every, 2, moment)
            until = saved + FOLLOWED
            seed_all(rng.randrange(1 << 30))
            pages = run(part, every, 0, until * accumulate)
            try:
                assert [*pages] == [*range(saved + 1, until + 1)]
                same({step: whole[step] for step in pages}, pages, "step")
                again = losses(part)
                assert again == {step: plain[step] for step in again}
                assert max(again) == until
                same_checkpoint(folder / "whole", part, until // every * every)
                yield True
            except AssertionError as error:
                print(f"ZeRO {stage}, micro-batch {moment}, saved each {every} steps: {error}")
                yield False
            shutil.rmtree(part)


def run(count: int, seed: int) -> list[Outcome]:
    """`count` deaths, shared by the ZeRO stages."""
    rng, real = random.Random(seed), (toy_run.ToyLoader, toy_run.ToyModel)

    def cases() -> Iterator[tuple[str, bool]]:
        for stage in range(4):
            with tempfile.TemporaryDirectory() as name:
                HeardLoader.shards = write_tones(Path(name, "corpus"), SCORES * 4)
                for held in resumes(Path(name), stage, -(-count // 4), rng):
                    what = f"went on after a death at any micro-batch, ZeRO {stage}"
                    yield f"{what}: {FOLLOWED} steps equal bit for bit", held

    toy_run.ToyLoader, toy_run.ToyModel = HeardLoader, CodedToy  # type: ignore[misc, assignment]
    try:
        return collect("R3", cases())
    finally:
        toy_run.ToyLoader, toy_run.ToyModel = real  # type: ignore[misc]
