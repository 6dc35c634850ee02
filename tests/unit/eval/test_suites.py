import json

import numpy as np
import pytest
import torch

import mmssl.data.ordered
import mmssl.eval.load
from mmssl.eval import report, results, suites
from mmssl.eval.session import Session
from mmssl.heads.score import ScoreMap
from mmssl.specs import DataSpec, RunSpec
from mmssl.types import UserError


def run_spec(tmp_path) -> RunSpec:
    signal = {"kind": "frames"}
    tower = {"modality": "video", "frontend": signal, "cut": {"kind": "whole"}}
    return RunSpec.model_validate(
        {
            "name": "toy",
            "towers": {"video": {**tower, "backbone": {"kind": "conv_av8"}}},
            "views": {
                "frames": {"modality": "video", "size": 32},
                "sound": {"modality": "audio"},
                "words": {"modality": "text"},
            },
            "tasks": {
                "hide_sound": _masked("sound", "patches"),
                "hide_words": _masked("words", "ids"),
            },
            "data": DataSpec(test=str(tmp_path), val=str(tmp_path)).model_dump(),
        }
    )


def _masked(view, target):
    return {"kind": "masked", "view": view, "mask": {"rule": "random"}, "target": {"kind": target}}


@pytest.fixture
def toy_run(tmp_path, monkeypatch, batches, knowing_model):
    """A run folder whose model knows the truth, and noise as its random twin."""
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "summary.json").write_text(
        json.dumps({"minutes": 3.0, "samples_per_s": 40.0, "data_wait": 0.02, "steps": 300})
    )
    log = [
        {"step": s, "loss": 3 / s, "term/av": 2 / s, "samples_per_s": 40.0} for s in range(1, 30)
    ]
    log.append({"step": 29, "validation": {"localization.pointing_sounding": 0.5}})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log) + '{"step": 3')
    spec = run_spec(tmp_path)
    asked = []

    def load_model(run, which="ema", random=False):
        return knowing_model("noise" if random else "perfect"), spec, None

    def eval_batches(path, data, views, micro_batch, tokenizer, limit=None, workers=None):
        asked.append((path, micro_batch, limit))
        return iter(batches)

    monkeypatch.setattr(mmssl.eval.load, "load_model", load_model)
    monkeypatch.setattr(mmssl.data.ordered, "eval_batches", eval_batches)
    return tmp_path, spec, asked


def test_bouncing_writes_complete_results_and_a_report(toy_run, capsys):
    folder, _, _ = toy_run
    suites.main("bouncing", str(folder), ["resamples=50"])
    found = results.read(folder / "results.json")
    assert results.check(found) == []
    assert report.main(["--check", str(folder / "results.json")]) == 0
    assert found["retrieval"]["audio->video"]["r_at_1"] == 1.0
    assert found["random_encoder"]["retrieval"]["audio->video"]["r_at_1"] < 0.5
    assert found["masked"]["audio"]["task"] == "hide_sound"
    assert found["masked"]["text"]["ratio"] == pytest.approx(1.2)
    assert found["data"]["kinds"] == {"one": 24, "two": 24}
    assert found["train"]["minutes"] == 3.0
    assert len(found["checkpoint"]["sha256"]) == len(found["data"]["manifest_sha256"]) == 64
    items = results.read(folder / "items.json")
    for name, values in items["values"].items():
        column = list(values.values())
        if not name.endswith(".rank"):
            assert np.mean(column) == pytest.approx(results.lookup(found, name)), name
        else:
            parent = results.lookup(found, name.removesuffix(".rank"))
            assert np.median(column) == parent["median_rank"]
    assert len(items["values"]) == 8 * 4 + 5
    assert items["sources"]["clip-3"] == "3"
    printed = capsys.readouterr().out
    assert "audio->video" in printed
    assert "highest cell in the sounding object" in printed
    assert "reached" in printed


def test_every_metric_by_parts_of_the_test_set(toy_run):
    folder, _, _ = toy_run
    suites.main("bouncing", str(folder), ["resamples=20", "split_by=size", "report=false"])
    found, items = (results.read(folder / f"{name}.json") for name in ("results", "items"))
    assert results.check(found) == []
    assert found["split_by"] == "size"
    assert sum(part["clips"] for part in found["parts"].values()) == found["data"]["n"]
    path = "localization.pointing_sounding"  # depends on no other clip
    pooled = [items["parts"][value][path] for value in found["parts"]]
    assert {k: v for part in pooled for k, v in part.items()} == items["values"][path]
    for part in found["parts"].values():
        assert part["retrieval"]["audio->video"]["n"] < found["retrieval"]["audio->video"]["n"]
        assert "masked" not in part


def test_the_report_stands_alone(toy_run):
    folder, _, _ = toy_run
    suites.main("bouncing", str(folder), ["resamples=20"])
    page = (folder / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") > 20
    for outside in ("http://", "https://", "<script", "<link", 'src="/'):
        assert outside not in page
    assert "a circle &lt;sounds&gt;" in page  # captions are escaped
    assert "<sounds>" not in page
    for title in ("Targets", "Where does the sound come from", "belongs together", "Training"):
        assert title in page
    assert page.count('<svg class="curve"') == 4  # loss, one term, speed, one validation number


def test_evaluation_is_repeatable(toy_run):
    folder, _, _ = toy_run
    found = [
        suites.evaluate(
            "bouncing", Session.open(folder, suites.EvalSpec(resamples=20, random=False))
        )[0]
        for _ in range(2)
    ]
    for name in ("retrieval", "correspondence", "masked"):
        assert found[0][name] == found[1][name]


@pytest.mark.parametrize(
    ("suite", "present", "absent"),
    [("retrieval", "retrieval", "localization"), ("localize", "localization", "retrieval")],
)
def test_single_suites(toy_run, suite, present, absent):
    folder, _, asked = toy_run
    suites.main(suite, str(folder), ["resamples=0", "limit=40", "micro_batch=8", "report=false"])
    found = results.read(folder / f"results_{suite}.json")
    assert present in found
    assert present in found["random_encoder"]
    assert absent not in found
    assert "masked" not in found
    assert not (folder / f"report_{suite}.html").exists()
    assert asked[-1] == (str(folder), 8, 40)


@pytest.fixture
def map_run(toy_run, monkeypatch, knowing_model):
    """A run whose only score is a map, on 1200 listed clips."""

    class MapOnly(knowing_model):
        def embed(self, batch):
            return {}

        def map_pairs(self):
            return [("video", "audio")]

        def map_sides(self, batch):
            own = torch.nn.functional.one_hot(batch.index_B, 48).float()
            seen = own if self.mode == "perfect" else own.roll(1, 0)
            there = torch.ones(batch.size, 1, dtype=torch.bool)
            sides = (seen[:, None, None], there[:, None]), (own[:, None], there)
            return {("video", "audio"): (*sides, there[:, 0])}

        def map_table(self, pair, video, other):
            return ScoreMap("max", "mean")(video[0], other[0], video[1], other[1])

    folder, spec, _ = toy_run
    (folder / "manifest.json").write_text('{"shards": [{"samples": 1200}]}')
    modes = {False: "perfect", True: "noise"}
    monkeypatch.setattr(
        mmssl.eval.load,
        "load_model",
        lambda run, random=False, **_: (MapOnly(modes[random]), spec, None),
    )
    return folder


def test_clips_are_ranked_by_a_map_where_no_space_relates_them(map_run, capsys):
    suites.main("retrieval", str(map_run), ["resamples=20", "map_clips=1200", "split_by=size"])
    found = results.read(map_run / "results_retrieval.json")
    assert list(found["retrieval"]) == ["audio->video", "video->audio"]
    for name, row in found["retrieval"].items():
        assert row["space"] == "map"
        assert row["n"] == 24
        assert row["r_at_1"] == row["class_at_1"] == 1.0
        assert row["ci"]["r_at_1"] == [1.0, 1.0]
        assert found["random_encoder"]["retrieval"][name]["r_at_1"] == 0.0
        assert sum(part["retrieval"][name]["n"] for part in found["parts"].values()) == 24
    assert "belongs together" in (map_run / "report_retrieval.html").read_text()
    assert "audio->video" in capsys.readouterr().out


def test_maps_of_too_many_clips_are_refused(map_run):
    with pytest.raises(UserError, match=r"1200 clips make 1200 x 1200 maps.*map_clips=1000.*limit"):
        suites.main("retrieval", str(map_run), ["resamples=0"])
    suites.main("retrieval", str(map_run), ["resamples=0", "limit=48", "report=false"])
    suites.main("localize", str(map_run), ["resamples=0", "report=false"])  # makes no table


def test_other_data_and_other_output_folder(toy_run, tmp_path):
    folder, _, asked = toy_run
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"shards": []}')
    words = [f"data={other}", f"out={tmp_path / 'out'}", "resamples=0"]
    suites.main("retrieval", str(folder), words)
    assert asked[-1] == (str(other), 32, None)
    assert (tmp_path / "out" / "report_retrieval.html").exists()


def test_quick_returns_flat_numbers(toy_run, knowing_model):
    _, spec, asked = toy_run
    model = knowing_model().train()
    found = suites.quick(model, spec, None, 48)
    assert asked[-1][2] == 48
    assert model.training
    assert found["retrieval.audio->video.r_at_10"] == 1.0
    assert found["localization.pointing_sounding"] == 1.0
    assert found["correspondence.accuracy"] == 1.0
    assert found["masked.audio.ratio"] == pytest.approx(0.5 / 2.5)
    assert all(isinstance(value, float) for value in found.values())


def test_quick_without_validation_data(toy_run, knowing_model):
    _, spec, _ = toy_run
    empty = spec.model_copy(update={"data": DataSpec()})
    with pytest.raises(UserError, match=r"data\.val"):
        suites.quick(knowing_model(), empty, None, 10)


def test_user_errors(toy_run, monkeypatch):
    folder, spec, _ = toy_run
    with pytest.raises(UserError, match="unknown suite `bouncin`"):
        suites.main("bouncin", str(folder))
    with pytest.raises(UserError, match="did you mean `limit"):
        suites.main("bouncing", str(folder), ["limits=3"])
    empty = spec.model_copy(update={"data": DataSpec()})
    monkeypatch.setattr(mmssl.eval.load, "load_model", lambda *a, **k: (None, empty, None))
    with pytest.raises(UserError, match=r"names no `data\.test`"):
        suites.main("bouncing", str(folder), ["random=false"])


def test_flat_leaves_out_what_is_no_number():
    tree = {"a": {"b": 1, "c": None, "d": [1, 2], "e": "x", "f": True}, "g": 0.5}
    assert suites.flat(tree) == {"a.b": 1.0, "g": 0.5}


def test_check_command(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text("{}")
    assert report.main(["--check", str(path)]) == 1
    assert "retrieval.audio->video.class_at_1: missing" in capsys.readouterr().err
    assert report.main(["--check", str(tmp_path / "none.json")]) == 1
    assert report.main([]) == 2
