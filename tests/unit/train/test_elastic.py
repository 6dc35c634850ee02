from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "dist"))

from toy_run import toy_spec

from mmssl.train.elastic import Layout, layout
from mmssl.types import UserError


def saved(world: int, workers: int | None, rows: int | None) -> dict[str, Any]:
    return {"world_size": world, "workers": workers, "rows": rows}


def test_a_new_run_reads_what_a_process_takes_at_once() -> None:
    spec = toy_spec(train={"batch": 16, "accumulate": 2}, data={"workers": 3})
    assert layout(spec, 2, None) == Layout(workers=3, rows=4)
    finer = toy_spec(train={"batch": 16}, data={"workers": 3, "rows": 2})
    assert layout(finer, 2, None) == Layout(workers=3, rows=2, joined=4)
    with pytest.raises(UserError, match=r"data\.rows=3: a process takes 8 rows at once"):
        layout(toy_spec(train={"batch": 16}, data={"rows": 3}), 2, None)


@pytest.mark.parametrize(
    ("world", "expected"),
    [(1, Layout(8, 2, 8)), (2, Layout(4, 2, 4)), (4, Layout(2, 2, 2)), (8, Layout(1, 2, 1))],
)
def test_readers_and_rows_stay(world: int, expected: Layout) -> None:
    spec = toy_spec(train={"batch": 16})
    assert layout(spec, world, saved(2, 4, 2)) == expected


@pytest.mark.parametrize(
    ("world", "manifest", "message"),
    [
        (16, saved(2, 4, 2), r"cannot go on with 16: its 8 readers .* use 1 or 2 or 4 or 8$"),
        (16, saved(2, 4, 8), r"cannot go on with 16: .* use 1 or 2$"),
        (1, saved(2, 0, 8), r"with data\.workers=0, .* use 2$"),
        (1, saved(2, None, None), r"before format 2, .* use 2$"),
        (2, saved(2, 4, 3), r"train\.batch=16, .* put 3 rows together, of which 8 rows"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(
    world: int, manifest: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        layout(toy_spec(train={"batch": 16}), world, manifest)


def test_a_run_of_format_1_goes_on_with_its_own_workers() -> None:
    spec = toy_spec(train={"batch": 16}, data={"workers": 5})
    assert layout(spec, 2, saved(2, None, None)) == Layout(5, 8)
