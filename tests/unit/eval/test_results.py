import json

import pytest
import torch

from mmssl.eval import results
from mmssl.types import UserError


def complete():
    """Results that hold everything the quickstart promises."""
    tree = {}
    for path in results.REQUIRED:
        node = tree
        *parents, last = path.split(".")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = 0.5
    return tree


def test_the_contract_of_the_file():
    wanted = set(results.REQUIRED)
    for direction in [
        "audio->video",
        "video->audio",
        "text->video",
        "video->text",
        "audio->text",
        "text->audio",
    ]:
        for key in ["class_at_1", "r_at_1", "r_at_10", "median_rank", "n"]:
            assert f"retrieval.{direction}.{key}" in wanted
            assert f"random_encoder.retrieval.{direction}.{key}" in wanted
    for key in ["sounding", "silent", "swapped_audio", "center", "audio_blind"]:
        assert f"localization.pointing_{key}" in wanted
    assert {"train.minutes", "train.samples_per_s", "train.data_wait"} <= wanted
    assert results.check(complete()) == []


def test_check_names_what_is_wrong():
    tree = complete()
    del tree["retrieval"]["audio->text"]["r_at_10"]
    tree["train"]["minutes"] = None
    tree["localization"]["pointing_silent"] = 1.5
    tree["localization"]["pointing_swapped_audio"] = None  # allowed: no second clip of the class
    tree["retrieval"]["text->video"]["median_rank"] = float("nan")
    assert results.check(tree) == [
        "retrieval.audio->text.r_at_10: missing",
        "train.minutes: null",
        "retrieval.text->video.median_rank: nan",
        "localization.pointing_silent: 1.5",
    ]
    assert len(results.check({})) == len(results.REQUIRED)


def test_paths_into_the_tree():
    tree = {"a": {"b": None, "c": 0}}
    assert results.lookup(tree, "a.c") == 0
    assert results.lookup(tree, "a.x.y") is None
    assert results.holds(tree, "a.b")
    assert not results.holds(tree, "a.d")
    assert not results.holds(tree, "a.b.c")


def test_targets_know_their_side():
    least = results.Target("a", "", True, 0.9)
    most = results.Target("a", "", False, 0.05)
    assert (least.met({"a": 0.9}), least.met({"a": 0.89}), least.met({})) == (True, False, None)
    assert (most.met({"a": 0.05}), most.met({"a": 0.06})) == (True, False)


def test_write_and_read(tmp_path):
    path = tmp_path / "new" / "results.json"
    results.write({"a": 1.5}, path)
    assert results.read(path) == {"a": 1.5}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.write({"a": float("nan")}, path)
    assert results.read(path) == {"a": 1.5}  # the old file is still there


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        results.read(tmp_path / "x.json")
    (tmp_path / "y.json").write_text("{")
    with pytest.raises(UserError, match=r"y\.json: not a JSON file"):
        results.read(tmp_path / "y.json")
    (tmp_path / "z.json").write_text("[]")
    with pytest.raises(UserError, match=r"z\.json: not a results file"):
        results.read(tmp_path / "z.json")


def test_weights_hash_depends_on_names_and_bits_only():
    state = {"b": torch.ones(2, 3), "a": torch.zeros(1, dtype=torch.bfloat16)}
    same = {"a": torch.zeros(1, dtype=torch.bfloat16), "b": torch.ones(3, 2).T}
    assert results.weights_sha256(state) == results.weights_sha256(same)
    renamed = {"c": state["b"], "a": state["a"]}
    moved = {**state, "b": state["b"] + 1e-7}
    assert len({results.weights_sha256(s) for s in (state, renamed, moved)}) == 3


def test_manifest_hash(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: no manifest"):
        results.manifest_sha256(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"abc")
    assert results.manifest_sha256(tmp_path).startswith("ba7816bf8f01cfea")


def test_train_facts(tmp_path):
    assert set(results.train_facts(tmp_path).values()) == {None}
    (tmp_path / "summary.json").write_text(json.dumps({"minutes": 9.5, "other": 1}))
    assert results.train_facts(tmp_path)["minutes"] == 9.5
    assert "other" not in results.train_facts(tmp_path)


def test_versions_name_what_is_missing():
    found = results.versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert set(found) == {"mmssl", "python", *results.PACKAGES}


def test_numbers_for_people():
    assert results.number(None) == "-"
    assert results.number(0.12345) == "0.123"
    assert results.number(125.0) == "125"
    assert results.number(7) == "7"
    assert results.bounded({"a": 0.5, "ci": {"a": [0.4, 0.612]}}, "a") == "0.500 [0.40, 0.61]"
    assert results.bounded({"a": 0.5}, "a") == "0.500"


def test_intervals_and_counts_stand_in_the_table():
    own = {"mean": 0.5, "n": 3, "n_missing": 1, "metric": "accuracy", "ci": {"mean": [0.2, 0.8]}}
    bounds = {"trained": [results.interval_of(own, "mean"), results.interval_of(own, "std")]}
    drawn = results.plot("title", "fold", ["mean", "7"], {"trained": [0.5, None]}, bounds)
    assert drawn["bounds"] == {"trained": [[0.2, 0.8], None]}
    assert "bounds" not in results.plot("title", "fold", ["7"], {"a": [1.0]}, {"a": [None]})
    lines = results.table({"suite": "probe", "probe": own, "plots": [drawn]}).splitlines()
    assert lines == [
        "title",
        "fold                  mean       7",
        "trained 0.500 [0.20, 0.80]       -",
        "",
        "n 3, n_missing 1",
    ]
