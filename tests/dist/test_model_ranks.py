"""The whole model: processes with a part of the batch each compute what one computes with all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from launching import TEST_LIMIT_S, checked
from safetensors.torch import load_file
from tiny_run import RECIPES
from torch import Tensor

SCRIPT = Path(__file__).with_name("model_ranks.py")

# Of 8 rows, row 0 lacks text, row 1 audio, row 2 video.
LAYOUTS = {
    "even": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "rank 0 has no audio, video and text are uneven": [[1, 1], [0, 2]],
    "uneven last batch": [[0, 1, 2, 3], [4, 5, 6]],
}
# Batch norms over heads: two equal rows or a single one would magnify rounding 300 times.
NORMED = LAYOUTS | {"rank 0 has no audio, video and text are uneven": [[1], [0, 2, 3, 4, 5]]}
FOUR = {"rank 0 has no audio, rank 2 no video": [[1], [0, 3, 6], [2], [4, 5, 7]]}
# Codes that nobody chooses start again from latents by their place in the global batch.
IN_ORDER = {"rank 1 has no audio, rank 2 no video": [[0], [1], [2], [3, 4, 5, 6, 7]]}


def measured(
    folder: Path,
    recipe: str,
    layouts: Mapping[str, list[list[int]]],
    stages: Sequence[int] = range(4),
) -> Iterator[tuple[str, int, float]]:
    """(layout, ZeRO stage, largest difference of loss and gradients from one process)."""
    files = {name: str(folder / f"layout{i}") for i, name in enumerate(layouts)}
    whole = [
        {"file": files[name], "zero": 0, "rows": [sum(rows, [])]} for name, rows in layouts.items()
    ]
    split = [
        {"file": f"{files[name]}-zero{stage}", "zero": stage, "rows": rows}
        for name, rows in layouts.items()
        for stage in stages
    ]
    for calls in (whole, split):
        words = json.dumps([call | {"recipe": recipe} for call in calls])
        checked([SCRIPT, words], len(calls[0]["rows"]))
    for name in layouts:
        expected = load_file(files[name])
        for stage in stages:
            yield name, stage, difference(load_file(f"{files[name]}-zero{stage}"), expected)


def difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference in relation to the largest value of each tensor.

    Gradients that nearly cancel hold the rounding of what they are a sum of (those of attention
    keys' biases nothing else): values below a hundredth of the model's largest count as that.
    """
    assert got.keys() == expected.keys()
    assert not got["lost"].any()
    floor = 1e-2 * max(float(g.abs().max()) for n, g in expected.items() if n != "loss")
    return max(
        float((got[name] - value).abs().max()) / max(float(value.abs().max()), floor)
        for name, value in expected.items()
    )


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.parametrize(
    "recipe",
    [
        *("compared", "every_part", "flagship", "future", "localizers"),
        *("rebuilt", "separation", "siamese", "unlabelled", "workers"),
    ],
)
def test_two_ranks_equal_one(tmp_path: Path, recipe: str) -> None:
    layouts = NORMED if recipe in ("compared", "siamese") else LAYOUTS
    for layout, stage, error in measured(tmp_path, recipe, layouts):
        assert error <= 1e-5, (layout, stage, error)


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.parametrize(
    "recipe",
    ["compared", "future", "rebuilt", "separation", "siamese", "unlabelled", "workers"],
)
def test_four_ranks_equal_one(tmp_path: Path, recipe: str) -> None:
    layouts = IN_ORDER if recipe == "rebuilt" else FOUR
    for layout, stage, error in measured(tmp_path, recipe, layouts, (0, 3)):
        assert error <= 1e-5, (layout, stage, error)


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.parametrize("layout", [LAYOUTS["uneven last batch"], *FOUR.values()])
def test_in_double_ranks_equal_one_but_for_rounding(tmp_path: Path, layout: list[list[int]]) -> None:
    """Loss and gradients of every wiring, each tensor by its own largest value."""
    for rows, name in (([sum(layout, [])], "whole"), (layout, "split")):
        calls = [
            {"file": str(tmp_path / f"{recipe}-{name}"), "zero": None, "rows": rows}
            | {"recipe": recipe}
            for recipe in RECIPES
        ]
        checked([SCRIPT, json.dumps(calls)], len(rows))
    for recipe in RECIPES:
        got, expected = (load_file(tmp_path / f"{recipe}-{name}") for name in ("split", "whole"))
        assert got.keys() == expected.keys()
        assert float((got.pop("loss") / expected.pop("loss") - 1).abs()) <= 1e-6, recipe  # in fp32
        for parameter, g in expected.items():
            error = float((got[parameter] - g).abs().max()) / max(float(g.abs().max()), 1e-6)
            assert error <= 1e-7, (recipe, parameter, error)  # 1.4e-9 was found
