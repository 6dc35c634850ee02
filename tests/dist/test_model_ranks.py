"""The whole model: two processes with half of the batch each compute what one computes with all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import TEST_LIMIT_S, checked
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("model_ranks.py")

# Of 8 rows, row 0 lacks text, row 1 audio, row 2 video.
LAYOUTS = {
    "even": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "rank 0 has no audio, video and text are uneven": [[1, 1], [0, 2]],
}


def launch(calls: list[dict[str, object]], processes: int) -> None:
    checked([SCRIPT, json.dumps(calls)], processes)


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.parametrize("recipe", ["every_part", "flagship", "localizers"])
def test_two_ranks_equal_one(tmp_path: Path, recipe: str) -> None:
    names = {name: f"layout{i}" for i, name in enumerate(LAYOUTS)}
    split = [
        {"file": str(tmp_path / f"{names[name]}-zero{stage}"), "zero": stage, "rows": rows}
        for name, rows in LAYOUTS.items()
        for stage in range(4)
    ]
    whole = [
        {"file": str(tmp_path / names[name]), "zero": 0, "rows": [sum(rows, [])]}
        for name, rows in LAYOUTS.items()
    ]
    for calls, processes in ((whole, 1), (split, 2)):
        launch([call | {"recipe": recipe} for call in calls], processes)
    for name in LAYOUTS:
        expected = load_file(tmp_path / names[name])
        # biases of attention keys have no gradient but rounding: compare against the model's scale
        floor = 1e-3 * max(float(g.abs().max()) for n, g in expected.items() if n != "loss")
        for stage in range(4):
            got = load_file(tmp_path / f"{names[name]}-zero{stage}")
            assert got.keys() == expected.keys()
            for key, value in expected.items():
                scale = max(float(value.abs().max()), floor)
                error = float((got[key] - value).abs().max()) / scale
                assert error <= 1e-5, (name, stage, key, error)
