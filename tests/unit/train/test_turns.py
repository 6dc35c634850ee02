"""Two engines on one model: whose step it is, who moves, and that a resumed run goes on right."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_methods import small, small_model
from torch import Tensor

from mmssl.build import build_model
from mmssl.data.draws import Draws
from mmssl.rng import seed_of
from mmssl.specs import RunSpec
from mmssl.train.checkpoint import newest
from mmssl.train.engine import session
from mmssl.train.randomness import seed_all
from mmssl.train.run import Parts, fit
from mmssl.train.schedule import learning_rate
from mmssl.train.turns import Turns, make_engine
from mmssl.types import UserError

NAME = "speech/speech_text_alignment"
STEPS, ROWS = 7, 8
OPTIM = {"sgd": ["optim.lr=0.5"], "adam": ["optim.kind=adam", "optim.lr=0.01", "optim.clip=0.05"]}


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    with session(threads=1) as found:
        yield found


def run_of(*overrides: str) -> RunSpec:
    """Two steps of the critic, one of the mapping, and so on; no dropout."""
    sizes = [f"train.steps={STEPS}", f"train.batch={ROWS}", "train.log_every=1"]
    task = ["tasks.alignment.dropout=0", "tasks.alignment.beta=0.1", "optim.final_lr=0.5"]
    return small(NAME, *sizes, *task, "validate.every=0", *overrides)


def trained(spec: RunSpec, folder: Path, device: torch.device) -> Path:
    folder.mkdir(exist_ok=True)
    parts = Parts(lambda: build_model(spec), lambda layout: Draws(ROWS, 0, 1), lambda *_: {})
    fit(spec, parts, folder, device)
    found = newest(folder)
    assert found is not None
    return found


def written_out(spec: RunSpec) -> dict[str, Tensor]:
    """The same run with torch alone: an optimiser each, gradients of the own loss alone."""
    seed_all(seed_of(spec.train.seed, "weights"))
    model = build_model(spec).train()
    task, loader = model.tasks["alignment"], Draws(ROWS, 0, 1)
    lists = {p: list(getattr(task, p).parameters()) for p in ("critic", "mapping")}
    kind, optim = spec.optim.kind, spec.optim
    makers = {
        "sgd": lambda p: torch.optim.SGD(p, lr=1.0),
        "adam": lambda p: torch.optim.Adam(p, betas=optim.betas, eps=optim.eps),
    }
    optimizers = {name: makers[kind](p) for name, p in lists.items()}
    for step in range(STEPS):
        player = "mapping" if step % 3 == 2 else "critic"
        batch = next(loader)
        term = task(model.passes(batch), batch)[player]
        for p, g in zip(
            lists[player], torch.autograd.grad(term.sum / term.count, lists[player]), strict=True
        ):
            p.grad = g
        if optim.clip:
            torch.nn.utils.clip_grad_norm_(lists[player], optim.clip)
        rate = learning_rate(optim, step, STEPS) if player == "mapping" else optim.lr
        for group in optimizers[player].param_groups:
            group["lr"] = rate
        optimizers[player].step()
        if player == "mapping":
            w = task.mapping.weight.detach()
            task.mapping.weight.data = 1.1 * w - 0.1 * w @ w.T @ w
    return dict(task.named_parameters())


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_turns_are_those_of_two_optimisers(
    kind: str, zero: int, device: torch.device, tmp_path: Path
) -> None:
    """Moments of the one that waits stay as they are, and so does all that it would have moved."""
    spec = run_of(*OPTIM[kind], f"train.zero={zero}")
    found = trained(spec, tmp_path / "run", device)
    got = load_file(found / "weights.safetensors")
    for name, want in written_out(spec).items():
        torch.testing.assert_close(got[f"tasks.alignment.{name}"], want, rtol=1e-5, atol=1e-6)
        if name == "mapping.weight":  # which starts as the identity
            assert float((want.detach() - torch.eye(len(want))).abs().max()) > 1e-3


@pytest.mark.parametrize("zero", [0, 1])
def test_a_resume_within_a_round_is_bit_equal(
    zero: int, device: torch.device, tmp_path: Path
) -> None:
    options = ("tasks.alignment.dropout=0.1", "train.save_every=1", "train.keep_last=0")
    spec = run_of(*OPTIM["adam"], f"train.zero={zero}", *options)
    whole = trained(spec, tmp_path / "whole", device)
    for step in (1, 4, 5):  # behind the first and the second step of the critic, and in between
        part = tmp_path / f"from{step}"
        name = f"checkpoints/step-{step:08d}"
        shutil.copytree(whole.parents[1] / name, part / name)
        again = trained(spec, part, device)
        same_files(whole, again)


def same_files(a: Path, b: Path) -> None:
    names = sorted(p.relative_to(a).as_posix() for p in a.rglob("*") if p.suffix == ".pt")
    assert {n.split("/")[1] for n in names if n.startswith("deepspeed/")} == {"critic", "mapping"}
    assert (a / "weights.safetensors").read_bytes() == (b / "weights.safetensors").read_bytes()
    for name in names:
        equal(*(torch.load(f / name, weights_only=False) for f in (a, b)))


def equal(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"ds_config"}:
            equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            equal(x, y)
    elif hasattr(a, "__dict__"):
        equal(vars(a), vars(b))
    else:
        assert a == b


def test_a_step_of_one_leaves_the_other_without_a_gradient(device: torch.device) -> None:
    spec = run_of()
    model = small_model(spec).train()
    engine = make_engine(model, spec.optim, spec.train, device)
    assert isinstance(engine, Turns)
    loader = Draws(ROWS, 0, 1)
    try:
        for step in range(6):
            player = "mapping" if step % 3 == 2 else "critic"
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            loss, terms = engine.forward(next(loader), step, STEPS)
            assert model.tasks["alignment"].turn == player
            assert float(loss.detach()) == pytest.approx(
                float(terms[f"alignment.{player}"].sum / terms[f"alignment.{player}"].count)
            )
            engine.backward(loss)
            for name, p in model.named_parameters():
                own = f".{player}." in name
                idle = p.grad is None or not bool(p.grad.any())
                assert idle != own, name
            assert engine.step(0.1) > 0
            for name, p in model.named_parameters():
                assert torch.equal(p, before[name]) != (f".{player}." in name), name
    finally:
        engine.close()


def test_frozen_parts_stay_frozen_and_all_that_is_left_belongs_to_the_last() -> None:
    model = small_model(run_of())
    owner = model.players()
    assert set(owner.values()) == {"critic", "mapping"}
    assert owner["tasks.alignment.mapping.weight"] == "mapping"
    assert small_model(small("audio/lim")).players() == {}
    model.towers["extra"] = torch.nn.Linear(2, 2)
    assert model.players()["towers.extra.weight"] == "mapping"


def test_what_two_engines_cannot_do_is_refused(device: torch.device, tmp_path: Path) -> None:
    for zero in (2, 3):
        spec = run_of(f"train.zero={zero}")
        with pytest.raises(UserError, match=f"train.zero: {zero}, but with players"):
            Turns(small_model(spec), spec.optim, spec.train, device)
    spec = run_of("train.zero=1")
    engine = Turns(small_model(spec), spec.optim, spec.train, device)
    try:
        with pytest.raises(UserError, match="written by 2 processes, here are 1"):
            engine.load(tmp_path, 2)
    finally:
        engine.close()


def test_rows_are_numbered_alike_on_any_number_of_ranks() -> None:
    one, two = Draws(4, 0, 1), [Draws(2, rank, 2) for rank in range(2)]
    for _ in range(3):
        halves = [next(loader).index_B for loader in two]
        assert torch.equal(next(one).index_B, torch.cat(halves))
    again = Draws(4, 0, 1)
    again.restore(one.state())
    assert torch.equal(next(again).index_B, torch.arange(12, 16))
    again.redistribute([loader.state() for loader in two])
    assert next(again).keys == ["12", "13", "14", "15"]
