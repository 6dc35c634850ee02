from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[2] / "dist"))

from toy_run import ToyLoader, ToyModel, run, toy_spec

from mmssl.train import checkpoint
from mmssl.train.checkpoint import Job, Progress, find, load_weights, newest, restore
from mmssl.train.commit import read_manifest, sealed
from mmssl.train.elastic import Layout
from mmssl.train.engine import Engine, session
from mmssl.train.preempt import StopRequest
from mmssl.train.randomness import random_state, set_random_state, untouched_random_state
from mmssl.train.watchdog import Watchdog
from mmssl.train.weights import Average
from mmssl.types import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at 2, 4 and 6 and a best one."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"pieces")
    with session() as device:
        validation = {"every": 2, "metric": "-weight"}
        run(device, str(folder), train={"save_every": 2}, validate=validation)
    return folder


def job(folder: Path, engine: Engine, ema: bool = True) -> Job:
    average = Average(engine.model) if ema else None
    watched = StopRequest(), Watchdog(0)
    return Job(
        folder, "text", "digest", engine, ToyLoader(8), Layout(0, 8), average, Progress(), *watched
    )


def copy_of(folder: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_checkpoint_holds_what_evaluation_and_resuming_need(finished: Path) -> None:
    folder = finished / "checkpoints" / "step-00000004"
    manifest = read_manifest(folder)
    assert manifest["step"] == manifest["progress"]["step"] == 4
    assert manifest["world_size"] == 1
    assert manifest["zero"] == 0
    assert len(manifest["digest"]) == 16
    names = {"weights.safetensors", "ema.safetensors", "config.yaml", "tokenizer.model"}
    assert set(manifest["files"]) == names | {
        "ranks/00000.pt",
        "deepspeed/mp_rank_00_model_states.pt",
    }
    assert (folder / "config.yaml").read_text() == (finished / "config.yaml").read_text()
    assert (finished / "checkpoints" / "latest").read_text() == "step-00000006"
    weights = load_file(folder / "weights.safetensors")
    assert weights.keys() == ToyModel().state_dict().keys()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    ToyModel().load_state_dict(weights)


def test_best_and_last_and_single_checkpoints_are_found(finished: Path) -> None:
    assert find(finished, "last").name == "step-00000006"
    best = find(finished)
    assert best.parent.name == "best"
    assert [p.name for p in best.parent.iterdir()] == [best.name]  # one best at a time
    assert not (best / "deepspeed").exists()
    single = finished / "checkpoints" / "step-00000002"
    assert find(single) == single
    with pytest.raises(UserError, match="expected best or last"):
        find(finished, "worst")


def test_weights_load_from_runs_folders_and_files(finished: Path) -> None:
    folder = finished / "checkpoints" / "step-00000006"
    raw, averaged = (load_weights(finished, ema, "last") for ema in (False, True))
    assert torch.equal(raw["scale"], load_file(folder / "weights.safetensors")["scale"])
    assert not torch.equal(raw["scale"], averaged["scale"])
    assert torch.equal(raw["still"], averaged["still"])
    from_file = load_weights(folder / "ema.safetensors")
    assert torch.equal(from_file["scale"], averaged["scale"])


def test_the_pointer_is_only_advice_and_damage_falls_back(finished: Path, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path)
    (folder / "checkpoints" / "latest").write_text("step-99999999")
    assert newest(folder) == folder / "checkpoints" / "step-00000006"
    file = folder / "checkpoints" / "step-00000006" / "ranks" / "00000.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert newest(folder) == folder / "checkpoints" / "step-00000004"
    with pytest.raises(UserError, match=r"00000\.pt: content differs"):
        find(folder / "checkpoints" / "step-00000006")
    for manifest in folder.glob("*/step-*/manifest.json"):
        manifest.unlink()
    assert newest(folder) is None
    with pytest.raises(UserError, match="no complete checkpoint here"):
        load_weights(folder)


def test_old_checkpoints_go_by_the_policy_alone(tmp_path: Path) -> None:
    def steps() -> list[int]:
        return sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").glob("step-*"))

    with session() as device:
        train = {"steps": 7, "save_every": 1, "keep_last": 2, "keep_every": 3}
        run(device, str(tmp_path), train=train)
        assert steps() == [3, 6, 7]
        left = tmp_path / "checkpoints" / "step-00000005.tmp"
        left.mkdir()
        run(device, str(tmp_path), train={**train, "steps": 8, "keep_last": 0})
    assert not left.exists()
    assert steps() == [3, 6, 7, 8]


def test_later_checkpoints_that_a_run_went_back_behind_do_not_count(tmp_path: Path) -> None:
    with session() as device:
        train = {"steps": 6, "save_every": 2, "keep_last": 1}
        run(device, str(tmp_path), train={**train, "keep_last": 0})
        folder = tmp_path / "checkpoints"
        (folder / "step-00000006" / "weights.safetensors").unlink()
        run(device, str(tmp_path), train={**train, "steps": 5})
    assert newest(tmp_path) == folder / "step-00000005"
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000005", "step-00000006"]


def test_a_manifest_vouches_for_itself(finished: Path, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path) / "checkpoints" / "step-00000006"
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"step": 6', '"step": 5', 1))
    assert newest(folder.parents[1]) == folder.with_name("step-00000004")


def test_missing_averages_and_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"x\.safetensors: no such file"):
        load_weights(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="not a safetensors file"):
        load_weights(path)


def test_a_run_without_averages_says_so(finished: Path, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path) / "checkpoints" / "step-00000006"
    (folder / "ema.safetensors").unlink()
    manifest = read_manifest(folder)
    del manifest["files"]["ema.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(UserError, match="does not average weights"):
        load_weights(folder, ema=True)
    with session() as device:
        spec = toy_spec()
        engine = Engine(ToyModel(), spec.optim, spec.train, device)
        with pytest.raises(UserError, match=r"resume with optim\.ema=0"):
            restore(job(folder.parents[1], engine), folder)
        engine.close()


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_loaded(
    finished: Path, tmp_path: Path
) -> None:
    folder = copy_of(finished, tmp_path) / "checkpoints" / "step-00000006"
    spec = toy_spec()
    with session() as device:
        engine = Engine(ToyModel(), spec.optim, spec.train, device)
        mine = job(folder.parents[1], engine)
        manifest = read_manifest(folder)
        (folder / "manifest.json").write_text(json.dumps(sealed({**manifest, "zero": 2})))
        with pytest.raises(UserError, match=r"resume with train\.zero=2"):
            restore(mine, folder)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder.parents[1] / "tokenizer.model").write_bytes(b"others")
        with pytest.raises(UserError, match="not the one of the checkpoint"):
            restore(mine, folder)
        (folder.parents[1] / "tokenizer.model").write_bytes(b"pieces")
        weights = load_file(folder / "weights.safetensors")
        weights["scale"] = torch.zeros(2)
        save_file(weights, folder / "weights.safetensors")
        before = engine.model.scale.detach().clone()
        with pytest.raises(UserError, match=r"1 tensors, first `scale` \(saved \(2,\), now \(1,\)"):
            restore(mine, folder)
        assert torch.equal(engine.model.scale, before)
        engine.close()


def test_restore_brings_back_progress_loader_average_and_generators(finished: Path) -> None:
    spec = toy_spec()
    folder = finished / "checkpoints" / "step-00000004"
    with session() as device:
        engine = Engine(ToyModel(), spec.optim, spec.train, device)
        mine = job(finished, engine)
        restore(mine, folder)
        engine.close()
    assert mine.progress.step == 4
    assert mine.loader.position == 4
    assert torch.equal(engine.model.scale, load_file(folder / "weights.safetensors")["scale"])
    assert torch.equal(mine.average.pieces["scale"], load_file(folder / "ema.safetensors")["scale"])
    saved = torch.load(folder / "ranks" / "00000.pt", weights_only=True)["random"]
    assert torch.equal(torch.get_rng_state(), saved["torch"])


def test_random_state_survives_a_weights_only_file(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "state.pt")
    first = (random.random(), np.random.rand(), np.random.randn(), float(torch.rand(1)))
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (random.random(), np.random.rand(), np.random.randn(), float(torch.rand(1))) == first


def test_an_evaluation_draws_from_nobody(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = float(torch.rand(1))
    torch.manual_seed(3)
    with untouched_random_state():
        torch.rand(5)
    assert float(torch.rand(1)) == expected


def test_a_best_checkpoint_of_the_same_step_is_written_anew(tmp_path: Path) -> None:
    spec = toy_spec()
    with session() as device:
        engine = Engine(ToyModel(), spec.optim, spec.train, device)
        mine = job(tmp_path, engine)
        checkpoint.save_best(mine)
        with torch.no_grad():
            engine.model.scale.fill_(9.0)
        checkpoint.save_best(mine)
        engine.close()
    assert float(load_weights(tmp_path)["scale"]) == 9.0
