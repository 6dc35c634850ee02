"""Parts that are encoded one by one give the gradient of the whole batch, in less memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TREE, tiny_batch

sys.path.append(str(Path(__file__).parents[1] / "dist"))

from test_resume_exact import losses
from toy_run import run as train

from mmssl import config
from mmssl.build import build_model
from mmssl.check import SPECIAL, VOCABULARY, fake_batch
from mmssl.specs import RunSpec
from mmssl.train.engine import session
from mmssl.types import UserError

ROWS = 6


def tiny(chunk: int) -> Any:
    torch.manual_seed(0)
    tree = {**TREE, "train": {**TREE.get("train", {}), "chunk": chunk}}
    return build_model(RunSpec.model_validate(tree), VOCABULARY, SPECIAL)


def step(model: Any, batch: Any) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients, and bytes that the forward pass keeps for the backward."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = model(batch, 1, 10)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), grads, sum(kept.values())


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_the_gradient_is_that_of_the_whole_batch(chunk: int) -> None:
    # all tasks: contrast over all rows, correspondence, masked prediction
    loss, grads, _ = step(tiny(0), tiny_batch(ROWS))
    ours, found, _ = step(tiny(chunk), tiny_batch(ROWS))
    assert ours == pytest.approx(loss, rel=1e-6)
    assert found.keys() == grads.keys()
    for name, value in grads.items():
        scale = float(value.abs().max())
        assert float((found[name] - value).abs().max()) <= 1e-5 * scale + 1e-9, name


def test_activations_of_the_towers_are_not_kept() -> None:
    spec = config.load("vatt_ma_tiny")
    kept = []
    for chunk in (0, 2):
        torch.manual_seed(0)
        changed = spec.model_copy(update={"train": spec.train.model_copy(update={"chunk": chunk})})
        model = build_model(changed, VOCABULARY, SPECIAL)
        kept.append(step(model.train(), fake_batch(changed, 8))[2])
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [("ave_net_tiny", "normalises over the whole batch"), ("vq_wav2vec_bert_tiny", "")],
)
def test_towers_whose_items_see_each_other_are_refused(name: str, message: str) -> None:
    spec = config.load(name, ["train.chunk=2"])
    if message:
        with pytest.raises(UserError, match=rf"train\.chunk: the tower .*{message}"):
            build_model(spec, VOCABULARY, SPECIAL)
    else:
        build_model(spec, VOCABULARY, SPECIAL)


def test_partitioned_weights_are_gathered_for_every_part(tmp_path: Path) -> None:
    found = {}
    with session() as device:
        for stage, chunk in ((0, 0), (3, 2)):
            settings = {"zero": stage, "chunk": chunk, "steps": 4}
            folder = tmp_path / f"zero{stage}"
            train(device, str(folder), whole_model=True, dropout=0.0, train=settings)
            found[stage] = losses(folder)
    assert found[3] == pytest.approx(found[0], rel=1e-5)
