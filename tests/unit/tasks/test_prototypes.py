"""`prototypes`: the term written out, what gets a gradient, frozen prototypes, and the queue."""

from dataclasses import replace

import pytest
import torch
from small_methods import full_batch, small, small_model
from tiny_run import tiny_batch, tiny_model, tiny_spec, unlabelled
from torch.nn import functional as F

from mmssl import config
from mmssl.objectives.assignment import sinkhorn, soft_cross_entropy
from mmssl.specs import PrototypesSpec
from mmssl.types import UserError


def swav(**changes):
    """The tiny run with prototypes alone, over video and audio."""
    wired = unlabelled()
    return tiny_spec(**{**wired, "tasks": {"swav": {**wired["tasks"]["swav"], **changes}}})


def vectors(model, batch):
    task, passes = model.tasks["swav"], model.passes(batch, 0.0)
    return {v: F.normalize(task._online[0](passes, v), dim=-1) for v in task.spec.views}


def step(model, batch, number=0, total=10, lr=0.5):
    loss, _ = model(batch, number, total)
    parameters = list(model.parameters())
    optimiser = torch.optim.SGD(parameters, lr)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    model.after_step(number, total)
    return loss.detach()


def test_the_term_is_the_mean_over_pairs_of_a_crop_and_another_crops_assignment():
    spec = small("swav_frames_tiny")
    model, batch = small_model(spec, dtype=torch.float64).train(), full_batch(spec)
    z, task = vectors(model, batch), model.tasks["swav"]
    scores = {v: x @ task.prototypes.T for v, x in z.items()}
    want = 0.0
    for large in ("large1", "large2"):
        code = sinkhorn(scores[large], 0.05, 3)
        others = [v for v in scores if v != large]
        assert len(others) == 5
        want += sum(soft_cross_entropy(scores[v], code, 0.1).mean() for v in others) / 5 / 2
    loss, terms = model(batch, 5, 10)  # prototypes are no longer frozen
    torch.testing.assert_close(loss.detach().double(), want.detach(), rtol=1e-6, atol=0)
    assert int(terms["swav"].count) == 6 * 10


def test_rows_without_a_view_take_part_with_what_they_have():
    model, batch = tiny_model(swav()), tiny_batch(spec=swav())  # row 1 lacks audio, row 2 video
    _, terms = model.train()(batch, 0, 10)
    assert int(terms["swav"].count) == 2 * 4
    z = vectors(model, batch)
    table = model.tasks["swav"].prototypes
    want, both = 0.0, [0, 3, 4, 5]
    for view, other, absent in (("video", "audio", 2), ("audio", "video", 1)):
        rows = [i for i in range(6) if i != absent]
        code = torch.zeros(6, 4)
        code[rows] = sinkhorn(z[view][rows] @ table.T, 0.5, 3)
        want += soft_cross_entropy(z[other] @ table.T, code, 0.5)[both].sum()
    torch.testing.assert_close(terms["swav"].sum.float()[0], want.detach(), rtol=1e-5, atol=0)


def test_no_gradient_goes_through_the_assignments():
    """One assigned view and one other: the assigned one is a constant."""
    changes = ("tasks.swav.assigned=[large1]", "tasks.swav.others=[small1]")
    spec = small("swav_frames_tiny", *changes)
    model, batch = small_model(spec).train(), full_batch(spec)
    signals = {
        v: model.towers["x"].inputs(batch.views[v]).requires_grad_() for v in ("large1", "small1")
    }
    views = {v: replace(batch.views[v], signal=x) for v, x in signals.items()}
    model(replace(batch, views={**batch.views, **views}), 5, 10)[0].backward()
    assert signals["large1"].grad is None
    assert float(signals["small1"].grad.abs().max()) > 0


def test_prototypes_are_frozen_to_the_bit_then_move_and_stay_unit_vectors():
    model = tiny_model(swav(frozen=0.2)).train()
    batch, table = tiny_batch(spec=model.spec), model.tasks["swav"].prototypes
    start = table.detach().clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(4))
    for number in range(2):
        step(model, batch, number)
        assert torch.equal(table, start)
    step(model, batch, 2)
    assert float((table - start).detach().abs().max()) > 1e-3
    torch.testing.assert_close(table.detach().norm(dim=1), torch.ones(4))
    assert not model.parameter_policy()["tasks.swav.prototypes"].decay


def test_a_full_queue_joins_the_assignment_and_nothing_else():
    model = tiny_model(swav(queue=8, queue_from=0.1)).train()
    batches = [tiny_batch(4, seed, False, model.spec) for seed in range(4)]
    queue = model.tasks["swav"].queues["of_video"]
    step(model, batches[0], 0, lr=0.0)
    assert int(queue.filled) == 0
    step(model, batches[1], 1, lr=0.0)
    step(model, batches[2], 2, lr=0.0)
    assert int(queue.filled) == 8
    kept = {v: torch.cat([vectors(model, b)[v] for b in batches[1:3]]) for v in ("video", "audio")}
    torch.testing.assert_close(queue.rows_K, kept["video"].detach(), rtol=1e-4, atol=1e-5)
    z, table = vectors(model, batches[3]), model.tasks["swav"].prototypes
    want = 0.0
    for view, other in (("video", "audio"), ("audio", "video")):
        code = sinkhorn(torch.cat([z[view], kept[view]]) @ table.T, 0.5, 3)[:4]
        want += soft_cross_entropy(z[other] @ table.T, code, 0.5).mean() / 2
    loss = step(model, batches[3], 3)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=0)


def test_swav_runs_on_the_shared_transformer_by_one_line():
    shared = "shared={width: 16, layers: 1, head_size: 8, hidden: 32}"
    tower = "towers.x={globals: [agg], cut: {kind: patches, patch: [10, 10]}}"
    names = ["towers.x.backbone=shared", tower, shared, "tasks.swav.pool=agg"]
    spec = config.load("swav_tiny", names)
    model = small_model(spec).train()
    loss, _ = model(full_batch(spec), 5, 10)
    loss.backward()
    assert float(model.trunk.blocks[0].attention.qkv.weight.grad.abs().max()) > 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="at least two views"):
        PrototypesSpec(kind="prototypes", assigned=["a"], projector={"widths": [2]})
    with pytest.raises(ValueError, match="each of them once"):
        PrototypesSpec(kind="prototypes", assigned=["a", "a"], projector={"widths": [2]})
    with pytest.raises(UserError, match=r"others: no gradient would reach the tower video"):
        tiny_model(swav(assigned=["video"], others=["audio"]))
    with pytest.raises(UserError, match=r"tasks\.swav\.assigned: no view 'sound'"):
        tiny_model(swav(assigned=["video", "sound"]))
