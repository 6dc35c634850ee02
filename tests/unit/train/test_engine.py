from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "dist"))

from toy_run import ToyLoader, ToyModel, toy_spec

from mmssl import dist
from mmssl.specs import OptimSpec, TrainSpec
from mmssl.train import engine as module
from mmssl.train.commit import Writer
from mmssl.train.engine import Engine, deepspeed_config, micro_batch, session
from mmssl.types import UserError


def test_micro_batch_divides_the_global_batch() -> None:
    assert micro_batch(TrainSpec(batch=24, accumulate=3), world=2) == 4


def test_an_uneven_batch_names_the_nearest_valid_ones() -> None:
    with pytest.raises(UserError, match=r"batch=10 .* 2 processes .*=2; .* 8 or 12$"):
        micro_batch(TrainSpec(batch=10, accumulate=2), world=2)
    with pytest.raises(UserError, match=r"valid batch: 8$"):
        micro_batch(TrainSpec(batch=3), world=8)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_settings_are_the_preset_and_the_run(stage: int) -> None:
    train = TrainSpec(zero=stage, batch=8, accumulate=2, precision="bf16")
    settings = deepspeed_config(OptimSpec(clip=0.7), train, world=2)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["train_batch_size"] == 8
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == (0.7 if stage else 0.0)
    assert settings["torch_autocast"]["dtype"] == "bfloat16"
    assert "torch_autocast" not in deepspeed_config(OptimSpec(), TrainSpec(zero=stage), 1)


def test_a_users_own_preset_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs" / "deepspeed"
    folder.mkdir(parents=True)
    preset = folder / "zero1.json"
    preset.write_text(json.dumps({"zero_optimization": {"stage": 1}, "mine": True}))
    monkeypatch.chdir(tmp_path)
    assert deepspeed_config(OptimSpec(), TrainSpec(zero=1), 1)["mine"] is True
    preset.write_text('{\n "a": 1,,\n}')
    with pytest.raises(UserError, match=r"zero1\.json:2: not valid JSON"):
        deepspeed_config(OptimSpec(), TrainSpec(zero=1), 1)


def test_a_missing_preset_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.config, "roots", lambda: [tmp_path])
    with pytest.raises(UserError, match=r"train\.zero: no file .*zero2\.json"):
        deepspeed_config(OptimSpec(), TrainSpec(zero=2), 1)


def test_session_leaves_no_group_behind_even_after_an_error() -> None:
    with session(threads=1) as device:
        assert device.type == "cpu"
        assert dist.is_initialized()
        assert torch.get_num_threads() == 1
    assert not dist.is_initialized()
    with pytest.raises(KeyError), session():
        raise KeyError("x")
    assert not dist.is_initialized()


STEP = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
MEET = {"MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("devices", "local"), [(4, "1"), (1, "0"), (0, "0")])
def test_tasks_of_srun_know_their_rank(devices: int, local: str) -> None:
    env = STEP | MEET
    module._read_slurm(env, devices)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("5", "8", local)


def test_a_launcher_inside_srun_comes_first() -> None:
    env = STEP | MEET | {"RANK": "2", "WORLD_SIZE": "16", "LOCAL_RANK": "3"}
    before = dict(env)
    module._read_slurm(env, 4)
    assert env == before


def test_a_batch_script_and_a_single_task_are_alone() -> None:
    for env in ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}):
        module._read_slurm(env, 0)
        assert "RANK" not in env


def test_tasks_of_srun_that_cannot_meet_are_told_how() -> None:
    with pytest.raises(UserError, match=r"8 tasks of srun, but MASTER_ADDR and MASTER_PORT not"):
        module._read_slurm(dict(STEP), 1)
    with pytest.raises(UserError, match=r"but MASTER_PORT not set: export .*slurm\.sbatch"):
        module._read_slurm(STEP | {"MASTER_ADDR": "node-0"}, 1)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_one_step_reports_the_norm_before_clipping_and_trains_with_the_given_rate(
    stage: int,
) -> None:
    spec = toy_spec(train={"zero": stage}, optim={"clip": 0.01, "weight_decay": 0.0})
    with session() as device:
        torch.manual_seed(0)
        engine = Engine(ToyModel(dropout=0.0), spec.optim, spec.train, device)
        from mmssl.train.weights import whole_state

        before = whole_state(engine.model)
        loss, terms = engine.forward(next(ToyLoader(8)), 0, 6)
        engine.backward(loss)
        norm = engine.step(lr=0.003)
        after = whole_state(engine.model)
        engine.close()
    assert norm == pytest.approx(3.19, abs=1.5)
    assert norm > 1
    assert terms.keys() == {"contrast", "pull"}
    moved = {k: float((after[k] - before[k]).abs().max()) for k in after}
    assert moved["head.weight"] == pytest.approx(0.003, rel=0.02)  # Adam's first step: lr * sign
    assert moved["tower.mix"] == pytest.approx(0.0015, rel=0.02)  # half the rate for the tower
    assert moved["still"] == 0


@pytest.mark.parametrize("stage", [0, 3])
def test_what_follows_an_engine_computes_with_torchs_own_layers(stage: int) -> None:
    linear = torch.nn.functional.linear
    with session() as device:
        spec = toy_spec(train={"zero": stage})
        engine = Engine(ToyModel(), spec.optim, spec.train, device)
        assert (torch.nn.functional.linear is linear) == (stage == 0)
        engine.close()
    assert torch.nn.functional.linear is linear


POISON = {"steps": [0], "what": "loss", "value": "nan"}


@pytest.mark.parametrize("stage", [0, 2])
def test_a_norm_that_is_not_finite_is_reported_as_such(stage: int) -> None:
    with session() as device:
        spec = toy_spec(train={"zero": stage})
        engine = Engine(ToyModel(poison=POISON), spec.optim, spec.train, device)
        loss, _ = engine.forward(next(ToyLoader(8)), 0, 6)
        engine.backward(loss)
        norm = engine.step(lr=0.003)
        engine.close()
    assert not math.isfinite(norm)


def test_bf16_narrows_products_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    with session() as device:
        spec = toy_spec(train={"precision": "bf16"})
        torch.manual_seed(0)
        model = ToyModel(dropout=0.0)
        model.head.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
        engine = Engine(model, spec.optim, spec.train, device)
        loss, _ = engine.forward(next(ToyLoader(8)), 0, 6)
        engine.backward(loss)
        grads = {p.grad.dtype for p in model.parameters() if p.grad is not None}
        engine.close()
    torch.manual_seed(0)
    wide, _ = ToyModel(dropout=0.0)(next(ToyLoader(8)), 0, 6)
    assert set(seen) == {torch.bfloat16}
    assert grads == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert float(loss.detach()) == pytest.approx(float(wide.detach()), rel=0.02)
    assert float(loss.detach()) != float(wide.detach())


class Payload:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (open, ("executed", "w"))


def test_shards_that_carry_code_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = toy_spec()
    with session() as device:
        engine = Engine(ToyModel(), spec.optim, spec.train, device)
        engine.save(Writer(tmp_path / "run"), "deepspeed")
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["deepspeed"]  # no scripts
        (shard,) = (tmp_path / "run" / "deepspeed").iterdir()
        state = torch.load(shard, weights_only=False)
        torch.save({**state, "module": Payload()}, shard)
        with pytest.raises(UserError, match=r"states\.pt: refused, .* could run code"):
            engine.load(tmp_path / "run" / "deepspeed", ranks=1)
        engine.close()
    assert not (tmp_path / "executed").exists()
