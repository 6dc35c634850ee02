"""What a run reports, from sums over a window of steps.

Every rank keeps its own sums; at every `log_every`-th step they meet, and rank 0 writes them. The
first step of a process is left out of all rates: it counts FLOPs and warms caches up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from mmssl import dist
from mmssl.data.integrity import REASONS
from mmssl.specs import TrainSpec
from mmssl.train.flops import FlopCounter, peak_flops
from mmssl.train.health import Monitor
from mmssl.train.reference import Reference
from mmssl.train.sinks import Sinks
from mmssl.types import Batch, Floor, Term


@dataclass
class Rates:
    """Work and seconds of this rank."""

    seconds: float = 0.0
    waited: float = 0.0
    samples: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Rates) -> Rates:
        return Rates(*map(add, astuple(self), astuple(other)))


@dataclass
class Losses:
    """Sums of the loss and its terms over micro-batches."""

    count: int = 0
    loss: Tensor | None = None
    terms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, loss: Tensor, terms: Mapping[str, Term]) -> None:
        """Count one micro-batch."""
        loss = loss.detach()
        self.count += 1
        self.loss = loss if self.loss is None else self.loss + loss
        for name, (total, count) in terms.items():
            old = self.terms.get(name)
            new = (total.detach(), count.detach())
            self.terms[name] = new if old is None else (old[0] + new[0], old[1] + new[1])

    def values(self) -> dict[str, float]:
        """`loss` (mean over ranks: a collective) and, per term, its value, sum and count."""
        values: dict[str, float] = {}
        if self.loss is not None:
            mean = dist.sum_over_ranks(self.loss.double().sum()) / dist.world_size() / self.count
            values["loss"] = float(mean)
        for name, (total, count) in self.terms.items():
            total_f, count_f = float(total.sum()), float(count.sum())
            if count_f:
                values[f"term/{name}"] = total_f / count_f
            values |= {f"sum/{name}": total_f, f"count/{name}": count_f}
        return values


class Meters:
    """Collects during a run; `step` writes a line when one is due."""

    def __init__(
        self,
        folder: Path,
        train: TrainSpec,
        device: torch.device,
        step: int,
        earlier_s: float,
        floors: Mapping[str, Floor],
    ) -> None:
        """Measure the machine's peak, open the logs, start the clock.

        `step` steps of the run are done already, which took `earlier_s` seconds. `floors`: of the
        terms that tell a collapse. A collective.

        Raises:
            OSError, UserError: a log or the reference curve cannot be opened; on all ranks.
        """
        self.total, self.log_every, self.device = train.steps, train.log_every, device
        self.monitor = Monitor(floors)
        narrow = train.precision == "bf16"
        self.peak = peak_flops(device, torch.bfloat16 if narrow else torch.float32)
        self.flops: float | None = None  # of one micro-batch on this rank
        self.losses, self.window, self.run = Losses(), Rates(), Rates()
        self.reference: Reference | None = None
        self.sinks: Sinks | None = None
        dist.on_rank0(lambda: self._open(folder, train, step))
        self.earlier_s, self.first = earlier_s, True
        self.clock: Callable[[], float] = time.perf_counter
        self.started = self.began = self.clock()

    def _open(self, folder: Path, train: TrainSpec, step: int) -> None:
        """What rank 0 alone reads and writes."""
        self.reference = Reference.load(train.reference) if train.reference else None
        self.sinks = Sinks(folder, train.steps, step)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside is time without data."""
        began = self.clock()
        yield
        self.window.waited += self.clock() - began

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent inside (evaluation, saving) belongs to no rate."""
        began = self.clock()
        yield
        self.began += self.clock() - began

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around forward and backward: the process's first micro-batch has its FLOPs counted.

        Activations that are computed again in the backward count as work.
        """
        if self.flops is not None:
            yield
            return
        with FlopCounter() as counter:
            yield
        self.flops = counter.total

    def micro_batch(
        self, batch: Batch, tokens: int, loss: Tensor | None, terms: Mapping[str, Term]
    ) -> None:
        """Take in the result of one micro-batch; without a loss its terms were not finite."""
        if loss is not None:
            self.losses.add(loss, terms)
        self.window += Rates(samples=batch.size, tokens=tokens, flops=self.flops or 0.0)

    def step(
        self,
        step: int,
        lr: float,
        grad_norm: float,
        embeddings: Mapping[str, Tensor],
        skipped: Mapping[str, int],
    ) -> None:
        """Close optimiser step `step` (1-based); a collective when a line is due.

        skipped: samples this rank has left out so far, by reason; their sums over ranks are logged.
        """
        due = step % self.log_every == 0 or step == self.total
        if due:
            values = self.losses.values() | {"lr": lr, "grad_norm": grad_norm} | self._rates()
            values |= self._skipped(skipped)
            self._write(step, values, embeddings)
            self.losses = Losses()
        elif self.first:
            self.window, self.began = Rates(), self.clock()
        self.first = False
        if self.sinks:
            self.sinks.advance()

    def skipped(self, step: int, what: str, count: int) -> None:
        """Step `step` was left out, the `count`-th of the run."""
        if self.sinks:
            self.sinks.event(step, "skipped", what=what, skipped=count)
            self.sinks.message(f"warning: step {step}: skipped, {what} is not finite ({count})")
            self.sinks.advance()

    def not_saved(self, step: int, why: str) -> None:
        """The checkpoint of a step could not be written."""
        if self.sinks:
            self.sinks.event(step, "not saved", why=why)
            self.sinks.message(f"warning: step {step}: {why}; the run goes on")

    def rolled_back(self, step: int, from_step: int) -> None:
        """The run goes on from an earlier step."""
        if self.sinks:
            self.sinks.event(step, "rolled back", from_step=from_step)
            self.sinks.message(f"warning: step {from_step}: back to the checkpoint of step {step}")
            self.sinks.set_step(step)

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Write the result of an evaluation."""
        if self.sinks:
            self.sinks.validation(step, values)

    def message(self, text: str) -> None:
        """A line on the console (rank 0)."""
        if self.sinks:
            self.sinks.message(text)

    def elapsed_s(self) -> float:
        """Seconds of training, evaluation and saving, over all processes of the run."""
        return self.earlier_s + self.clock() - self.started

    def summary(self) -> dict[str, float]:
        """Rates over all steps of this process but the first; a collective."""
        return self._over_ranks(self.run)

    def close(self) -> None:
        """Flush and close the logs."""
        if self.sinks:
            self.sinks.close()

    def _rates(self) -> dict[str, float]:
        now = self.clock()
        self.window.seconds = now - self.began
        rates = self._over_ranks(self.window)
        self.run += self.window
        self.window, self.began = Rates(), now
        return rates

    def _over_ranks(self, rates: Rates) -> dict[str, float]:
        mine = torch.tensor([*astuple(rates), self.peak], dtype=torch.float64, device=self.device)
        seconds, waited, samples, tokens, flops, peak = dist.sum_over_ranks(mine).tolist()
        # Sums over ranks of seconds, so mean seconds = seconds / ranks.
        ranks = dist.world_size()
        return {
            "samples_per_s": samples * ranks / seconds if seconds else 0.0,
            "tokens_per_s": tokens * ranks / seconds if seconds else 0.0,
            "data_wait": waited / seconds if seconds else 0.0,
            "flop_utilisation": flops * ranks / (seconds * peak) if seconds else 0.0,
        }

    def _skipped(self, counts: Mapping[str, int]) -> dict[str, float]:
        mine = torch.tensor([counts.get(r, 0) for r in REASONS], dtype=torch.float64)
        totals = dist.sum_over_ranks(mine.to(self.device)).tolist()
        found = {f"skipped/{r}": n for r, n in zip(REASONS, totals, strict=True) if n}
        return {"skipped": sum(totals), **found}

    def _write(
        self, step: int, values: Mapping[str, float], embeddings: Mapping[str, Tensor]
    ) -> None:
        if self.sinks is None:
            return
        health, warnings = self.monitor.measure(values, embeddings)
        if self.reference is not None and "loss" in values:
            said = self.reference.judge(step, values["loss"])
            health["reference"] = float(self.reference.inside)
            warnings += [said] if said else []
        self.sinks.numbers(step, {**values, **health})
        for text in warnings:
            self.sinks.message(f"warning: step {step}: {text}")
