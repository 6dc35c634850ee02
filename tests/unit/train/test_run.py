from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "dist"))

from toy_run import run as train_toy
from toy_run import toy_spec

from mmssl import config
from mmssl.specs import RunSpec
from mmssl.train import run
from mmssl.train.checkpoint import find
from mmssl.train.commit import read_manifest
from mmssl.train.engine import session
from mmssl.types import UserError

VIEW = {"a": {"modality": "audio"}, "t": {"modality": "text"}}


def shards_spec(tmp_path: Path, **data: object) -> RunSpec:
    (tmp_path / "shards").mkdir(exist_ok=True)
    (tmp_path / "pieces.model").write_bytes(b"pieces")
    paths = {"train": str(tmp_path / "shards"), "tokenizer": str(tmp_path / "pieces.model")}
    return toy_spec(data={**paths, **data}, views=VIEW)


def test_a_new_folder_gets_the_configuration_and_the_tokenizer(tmp_path: Path) -> None:
    spec, folder = shards_spec(tmp_path), tmp_path / "run"
    run.open_folder(spec, folder)
    assert config.load(folder / "config.yaml") == spec
    assert (folder / "tokenizer.model").read_bytes() == b"pieces"
    run.open_folder(spec, folder)  # the same run again is welcome


def test_a_run_without_tasks_is_not_begun(tmp_path: Path) -> None:
    spec = shards_spec(tmp_path).model_copy(update={"tasks": {}})
    with pytest.raises(UserError, match=r"has no tasks and cannot be trained; .*init"):
        run.open_folder(spec, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_copy_of_the_tokenizer_suffices_later(tmp_path: Path) -> None:
    spec, folder = shards_spec(tmp_path), tmp_path / "run"
    run.open_folder(spec, folder)
    (tmp_path / "pieces.model").unlink()
    run.open_folder(spec, folder)


def test_the_folder_of_another_run_is_refused_and_kept(tmp_path: Path) -> None:
    spec, folder = shards_spec(tmp_path), tmp_path / "run"
    run.open_folder(spec, folder)
    other = spec.model_copy(update={"train": spec.train.model_copy(update={"seed": 1})})
    with pytest.raises(UserError, match=r"another configuration.*mmssl resume .*out="):
        run.open_folder(other, folder)
    assert config.load(folder / "config.yaml") == spec


def test_files_of_unknown_origin_are_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("harmless")
    run.open_folder(shards_spec(tmp_path), folder)
    for name in ("tokenizer.model", "log.jsonl"):
        (folder / "config.yaml").unlink()
        run.open_folder(shards_spec(tmp_path), folder)  # an equal tokenizer may lie there
        (folder / "config.yaml").unlink()
        (folder / name).write_text("other")
        with pytest.raises(UserError, match=rf"has {name} of another origin"):
            run.open_folder(shards_spec(tmp_path), folder)
        assert (folder / name).read_text() == "other"
        (folder / name).unlink()
        run.open_folder(shards_spec(tmp_path), folder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": ""}, r"data\.train is empty"),
        ({"train": "missing"}, r"data\.train=missing: no such folder; make shards"),
        ({"train": {"missing": 1.0}}, r"data\.train=missing: no such folder"),
        (
            {"tokenizer": "missing.model"},
            r"data\.tokenizer=missing\.model: no such file; train one",
        ),
        ({"tokenizer": ""}, r"data\.tokenizer=: no such file"),
    ],
)
def test_missing_data_is_named_by_its_key(
    tmp_path: Path, data: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run.open_folder(shards_spec(tmp_path, **data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_needs_its_data(tmp_path: Path) -> None:
    spec = shards_spec(tmp_path, val="missing")
    run.open_folder(spec, tmp_path / "without")
    spec = toy_spec(data=spec.data.model_dump(), views=VIEW, validate={"every": 5})
    with pytest.raises(UserError, match=r"data\.val=missing: no such folder"):
        run.open_folder(spec, tmp_path / "with")


def test_runs_without_text_need_no_tokenizer(tmp_path: Path) -> None:
    spec = toy_spec(data={"train": str(tmp_path)})
    run.open_folder(spec, tmp_path / "run")
    assert not (tmp_path / "run" / "tokenizer.model").exists()


def test_the_run_folder_follows_the_name_unless_given() -> None:
    assert run.run_folder(toy_spec()) == Path("runs/toy")
    assert run.run_folder(toy_spec().model_copy(update={"out": "x/y"})) == Path("x/y")


def test_resuming_needs_a_run_and_a_complete_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml here"):
        run.resume(str(tmp_path))
    with session() as device, pytest.raises(UserError, match="no complete checkpoint"):
        train_toy(device, str(tmp_path), again=True)


def test_a_summary_tells_duration_and_rates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with session() as device:
        train_toy(device, str(tmp_path))
        summary = json.loads((tmp_path / "summary.json").read_text())
        train_toy(device, str(tmp_path))  # nothing is left to do
    assert summary.keys() >= {"minutes", "samples_per_s", "tokens_per_s", "data_wait"}
    assert summary["steps"] == 6
    assert 0 < summary["minutes"] < 1
    assert summary["tokens_per_s"] == pytest.approx(8 * summary["samples_per_s"])
    assert 0 < summary["flop_utilisation"] < 1
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert capsys.readouterr().out.count("done, ") == 2


def test_more_steps_continue_a_finished_run(tmp_path: Path) -> None:
    with session() as device:
        train_toy(device, str(tmp_path))
        train_toy(device, str(tmp_path), train={"steps": 9})
    assert read_manifest(find(tmp_path, "last"))["step"] == 9
    assert config.load(tmp_path / "config.yaml").train.steps == 9
