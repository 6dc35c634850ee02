"""A small model and loader for tests of the training, and a script that trains them.

    python toy_run.py JSON      JSON: a list of calls of `run` or `gradients` (those with a `file`)

B rows, D = 8 inputs, N = 4 tokens.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))

from tiny_run import TREE as TINY
from tiny_run import tiny_batch

from mmssl import config, dist
from mmssl.build import build_model
from mmssl.check import SPECIAL, VOCABULARY
from mmssl.specs import RunSpec
from mmssl.train import preempt
from mmssl.train.checkpoint import Progress
from mmssl.train.engine import Engine, micro_batch, session
from mmssl.train.run import Parts, fit
from mmssl.types import PREEMPTED, Floor, Term

TREE: dict[str, Any] = {
    "name": "toy",
    "towers": {
        "audio": {
            "modality": "audio",
            "frontend": {"kind": "waveform"},
            "cut": {"kind": "patches", "patch": [128]},
        }
    },
    "views": {"a": {"modality": "audio"}},
    "tasks": {"t": {"kind": "pairs", "pairs": {"p": {"between": ["a", "a"]}}}},
    "optim": {"lr": 0.01, "warmup": 2, "ema": {"kind": "linear", "start": 0.5, "end": 0.9}},
    "train": {"steps": 6, "batch": 8, "log_every": 1},
}


def toy_spec(**changes: dict[str, Any]) -> RunSpec:
    """The toy's run; `changes` are merged into its sections."""
    tree = {**TREE, **{k: {**TREE.get(k, {}), **v} for k, v in changes.items()}}
    return RunSpec.model_validate(tree)


class Policy(NamedTuple):
    lr_scale: float
    decay: bool
    frozen: bool
    constant_lr: bool = False


@dataclass
class ToyBatch:
    x_BD: Tensor

    @property
    def size(self) -> int:
        return len(self.x_BD)

    def to(self, device: Any) -> ToyBatch:
        return replace(self, x_BD=self.x_BD.to(device))


@dataclass
class Record:
    """An output in which DeepSpeed cannot see the tensor."""

    x: Tensor


class ToyTower(nn.Module):
    """Owns parameters directly and is used through a method of its own."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4 * 16)
        self.place = nn.Parameter(torch.randn(1, 4, 16) * 0.1)
        self.mix = nn.Parameter(torch.randn(16, 16) * 0.1)
        self.qkv = nn.Linear(16, 48)
        self.norm = nn.LayerNorm(16)
        self.dropout = nn.Dropout(dropout)

    def encode(self, x_BD: Tensor) -> Record:
        x = self.inner(x_BD).view(-1, 4, 16) + self.place
        q, k, v = self.qkv(self.norm(x)).view(-1, 4, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 4, 16)
        return Record(self.dropout(torch.tanh(x @ self.mix)).mean(1))

    def forward(self, x_BD: Tensor) -> Record:
        return self.encode(x_BD)


class ToyModel(nn.Module):
    """Contrast of two noisy views over the global batch, plus a pull to a buffer.

    `poison`: `steps` at which `what` (input, loss or gradient) of `rank` (default all) becomes
    `value`; a repeated step is poisoned again if it is `stubborn`.
    """

    def __init__(self, dropout: float = 0.1, poison: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.tower = ToyTower(dropout)
        self.head = nn.Linear(16, 6)
        self.scale = nn.Parameter(torch.full((1,), 2.0))
        self.still = nn.Parameter(torch.ones(3, 3))
        self.register_buffer("queue", torch.zeros(1, 6))
        self.last_embeddings: dict[str, Tensor] = {}
        self.floors: dict[str, Floor] = {}
        self.last_tokens, self.poison, self.seen = 0, poison or {"steps": []}, set[int]()

    def _bad(self, step: int) -> float:
        """What to multiply with."""
        here = self.poison.get("rank", dist.rank()) == dist.rank()
        again = step in self.seen and not self.poison.get("stubborn", True)
        self.seen.add(step)
        hit = here and step in self.poison["steps"] and not again
        return float(self.poison["value"]) if hit else 1.0

    def forward(self, batch: ToyBatch, step: int, total: int) -> tuple[Tensor, dict[str, Term]]:
        bad = dict.fromkeys(("input", "loss", "gradient"), 1.0)
        bad[self.poison.get("what", "loss")] = self._bad(step)
        a_BD = self.head(self.tower(batch.x_BD * bad["input"]).x)
        if bad["gradient"] != 1.0:
            a_BD.register_hook(lambda gradient: gradient * bad["gradient"])
        b_BD = self.head(self.tower.encode(batch.x_BD.flip(1)).x)
        logits = F.normalize(a_BD, dim=1) @ dist.gather(F.normalize(b_BD, dim=1)).T
        logits = logits * self.scale * self.still.mean()
        where = torch.arange(batch.size, device=logits.device) + dist.rank() * batch.size
        contrast = F.cross_entropy(logits.float(), where, reduction="sum") * bad["loss"]
        pull = (a_BD.float() - self.queue).square().sum()
        self.last_embeddings = {"a": a_BD.detach()}
        self.last_tokens = 8 * batch.size
        count = dist.sum_over_ranks(torch.full((1,), float(batch.size), device=logits.device))
        loss = dist.world_size() * (contrast + 0.1 * pull) / count.sum()
        sums = {"contrast": contrast, "pull": pull}
        terms = {k: Term(dist.sum_over_ranks(v.detach().view(1)), count) for k, v in sums.items()}
        return loss, terms

    def after_step(self, step: int, total: int) -> None:
        mean = dist.gather_no_grad(self.last_embeddings["a"]).float().mean(0, keepdim=True)
        self.queue.lerp_(mean, 0.1)

    def parameter_policy(self) -> dict[str, Policy]:
        return {
            name: Policy(
                0.5 if name.startswith("tower") else 1.0, "place" not in name, "still" in name
            )
            for name, _ in self.named_parameters()
        }


class ToyLoader:
    """Row r of the endless data set is a function of r; ranks take turns.

    It dies at micro-batch `fail_at`, and takes `pause_s` seconds for each.
    """

    def __init__(self, size: int, fail_at: int = -1, pause_s: float = 0.0) -> None:
        self.size, self.position, self.fail_at, self.pause_s = size, 0, fail_at, pause_s
        self.started = False
        self.skipped: dict[str, int] = {}

    def __next__(self) -> ToyBatch:
        if self.position == self.fail_at:
            raise InterruptedError("the machine went away")
        time.sleep(self.pause_s)
        first = (self.position * dist.world_size() + dist.rank()) * self.size
        if not self.started:
            torch.rand(3)  # as torch's DataLoader does when it starts its workers
        self.started = True
        rows = [torch.randn(8, generator=_generator(first + i)) for i in range(self.size)]
        self.position += 1
        return ToyBatch(torch.stack(rows))

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        assert not self.started  # as with the real one
        self.position = state["position"]

    def redistribute(self, states: list[dict[str, int]]) -> None:
        self.restore(states[0])

    def close(self) -> None:
        pass


class TinyLoader(ToyLoader):
    """Batches of the whole model's test run, each rank its own, with missing modalities."""

    def __next__(self) -> Any:
        super().__next__()
        seed = self.position * dist.world_size() + dist.rank()
        return tiny_batch(self.size, seed)


def threads_of_gloo() -> list[str]:
    """A group that outlives its session aborts some processes at exit."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(
    device: torch.device,
    folder: str,
    fail_at: int = -1,
    dropout: float = 0.1,
    poison: dict[str, Any] | None = None,
    whole_model: bool = False,
    again: bool = False,
    pause_s: float = 0.0,
    evaluate_s: float = 0.0,
    **changes: Any,
) -> Progress | None:
    """Train the toy in a folder, or go on with it; None if its loader died.

    `fail_at`, `pause_s`: see `ToyLoader`. `evaluate_s`: what an evaluation takes. `whole_model`:
    the real model with all tasks, dropout and dropped tokens instead of the toy.
    """
    spec, path = toy_spec(**changes), Path(folder)
    if whole_model:
        trunk = {"shared": {**TINY["shared"], "dropout": dropout}}
        video = {**TINY["towers"]["video"], "drop_tokens": 0.25}
        towers = {"towers": {**TINY["towers"], "video": video}}
        spec = RunSpec.model_validate({**spec.model_dump(by_alias=True), **TINY, **trunk, **towers})
    if dist.rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(config.dump(spec))
    dist.barrier()

    def evaluate(model: nn.Module, clips: int) -> dict[str, float]:
        torch.rand(3)  # draws numbers, as evaluations do
        (path / f"evaluating{dist.rank()}").touch()
        time.sleep(evaluate_s)
        weight = model.head.weight.detach()
        return {"weight": float(weight.abs().sum()), "clips": float(clips)}

    size = micro_batch(spec.train, dist.world_size())
    loader = (TinyLoader if whole_model else ToyLoader)(size, fail_at, pause_s)

    def make_model() -> nn.Module:
        if whole_model:
            return build_model(spec, VOCABULARY, SPECIAL)
        model = ToyModel(dropout, poison)
        model.still.data.fill_(7.0)  # what is frozen comes from where the run starts, too
        return model

    def load_start(model: nn.Module) -> None:
        if isinstance(model, ToyModel):
            model.still.data.fill_(1.0)

    parts = Parts(make_model, lambda layout: loader, evaluate, load_start)
    try:
        return fit(spec, parts, path, device, again)
    except InterruptedError:
        return None


def gradients(device: torch.device, file: str, **changes: Any) -> None:
    """Write loss and full gradients of the first step, as DeepSpeed holds them after backward."""
    from deepspeed.utils import safe_get_full_grad  # it prints when imported before `session`

    spec = toy_spec(**changes)
    torch.manual_seed(0)
    engine = Engine(ToyModel(dropout=0.0), spec.optim, spec.train, device)
    loader = ToyLoader(micro_batch(spec.train, dist.world_size()))
    losses = []
    for _ in range(spec.train.accumulate):
        loss, _ = engine.forward(next(loader).to(device), 0, 6)
        losses.append(dist.sum_over_ranks(loss) / dist.world_size())
        engine._engine.backward(loss)
        if len(losses) < spec.train.accumulate:
            engine._engine.step()
    found = {
        name: (p.grad if spec.train.zero == 0 else safe_get_full_grad(p)).clone()
        for name, p in engine.model.named_parameters()
        if p.requires_grad
    }
    if dist.rank() == 0:
        save_file({**found, "loss": torch.stack(losses).mean().view(1)}, file)
    dist.barrier()
    engine.close()


if __name__ == "__main__":
    with session(threads=1) as device_:
        for arguments in json.loads(sys.argv[1]):
            ended = (gradients if "file" in arguments else run)(device_, **arguments)
    assert threads_of_gloo() == []
    if ended and ended.stopped == preempt.REASON:
        sys.exit(PREEMPTED)
