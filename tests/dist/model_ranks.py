"""Loss, gradients and memories of the tiny run on every rank's rows, for test_model_ranks.py.

    python -m torch.distributed.run ... model_ranks.py JSON

JSON: a list of {"file", "zero", "rows", "recipe"}; rows is one list of row numbers per rank, recipe
says how the run is wired (`tiny_run.RECIPES`). Ranks with fewer rows than others get absent ones.
Where "zero" is null: in fp64 and without DeepSpeed, loss and gradients alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1]))

from tiny_run import RECIPES, absent_rows, take_rows, tiny_batch, tiny_model, tiny_spec  # noqa: E402

from mmssl import dist  # noqa: E402
from mmssl.model import Model  # noqa: E402
from mmssl.partition import assemble, assign, piece  # noqa: E402
from mmssl.specs import RunSpec  # noqa: E402
from mmssl.tasks.clustered import Clustered  # noqa: E402
from mmssl.train.engine import Engine, session  # noqa: E402
from mmssl.types import Batch  # noqa: E402

KEPT = (
    *("queues.", ".bank.", ".features_ND", ".known_N", ".labels_N"),
    *(".codebook", ".chosen_CV", ".sums_CVW"),
)


def wired(call: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[RunSpec, Model, Batch]:
    """The run of a recipe, its model, and this rank's rows."""
    rows: list[list[int]] = call["rows"]
    train = {"zero": call["zero"] or 0, "batch": len(rows) * max(map(len, rows))}
    spec = tiny_spec(train=train, **RECIPES[call["recipe"]]())
    model = tiny_model(spec, dtype=dtype).train()
    for task in model.tasks.values():
        if isinstance(task, Clustered):  # as behind an epoch
            task.labels_N.copy_(torch.arange(len(task.labels_N)) % 2)
    mine = rows[dist.rank()]
    absent = max(map(len, rows)) - len(mine)
    return spec, model, absent_rows(take_rows(tiny_batch(8, spec=spec), mine), absent)


def in_double(call: dict[str, Any]) -> None:
    """Loss and gradients of one layout in fp64, as DeepSpeed averages them; rank 0 saves them."""
    _, model, batch = wired(call, torch.float64)
    loss, _ = model(batch, 0, 10)
    loss.backward()
    found = {"loss": loss.detach().reshape(1)}
    found |= {name: p.grad for name, p in model.named_parameters()}
    found = {n: dist.sum_over_ranks(x) / dist.world_size() for n, x in found.items()}
    if dist.rank() == 0:
        save_file({n: x.contiguous() for n, x in found.items()}, call["file"])


def measure(call: dict[str, Any], device: torch.device) -> None:
    """One step of one layout; rank 0 saves loss, gradients and memories."""
    spec, model, batch = wired(call)
    names = [name for name, _ in model.named_parameters()]
    engine = Engine(model, spec.optim, spec.train, device)
    loss, _ = engine.forward(batch, 0, 10)
    engine.backward(loss)
    pairs = zip(names, model.parameters(), strict=True)
    grads = {name: safe_get_full_grad(p).clone() for name, p in pairs}
    for task in model.tasks.values():
        if isinstance(task, Clustered):  # an epoch ends
            task.seen.fill_(task.spec.clips)
    model.after_step(0, 10)
    memory = {n: b.float() for n, b in model.named_buffers() if any(k in n for k in KEPT)}
    # a parameter that is given other values keeps them through a step of size 0
    first = next(model.parameters())
    given = 2 * assemble(first, piece(first))
    assign(first, given)
    engine.step(0.0)
    memory["lost"] = assemble(first, piece(first)) - given
    for name, task in model.tasks.items():
        if isinstance(task, Clustered):  # the new top layer is everywhere the same
            memory[f"top.{name}"] = assemble(task.out.weight, piece(task.out.weight))
    # the mean over ranks is the loss of the global batch
    total = dist.sum_over_ranks(loss.detach().reshape(1)) / dist.world_size()
    if dist.rank() == 0:
        found = {n: g.float().contiguous() for n, g in grads.items()}
        save_file({"loss": total, **found, **memory}, call["file"])
    engine.close()


if __name__ == "__main__":
    with session(1) as where:
        for one in json.loads(sys.argv[1]):
            in_double(one) if one["zero"] is None else measure(one, where)
