"""Name maps: what a rule stands for, both directions, strictness."""

import pytest
import torch

from mmssl.interop.names import Fixed, bind, pair, reshaped, stacked, tensor
from mmssl.types import UserError

ROWS = (
    *stacked("tower.blocks.{n}.qkv", *(f"layers.{{n}}.{part}" for part in "qkv")),
    *pair("tower.blocks.{n}.out", "layers.{n}.out"),
    *reshaped("tower.gain", "gain", before=1, behind=2),
    *tensor("task.mask", "mask"),
    Fixed("table", lambda sizes: torch.arange(float(sizes["places"]))),
    Fixed("unused", lambda sizes: torch.zeros(3), dead=True),
)
SIZES = {"places": 4}


def ours(layers=2, bias=True):
    state = {"tower.gain": torch.randn(5)}
    for n in range(layers):
        for name, rows in (("qkv", 6), ("out", 2)):
            state[f"tower.blocks.{n}.{name}.weight"] = torch.randn(rows, 3)
            if bias:
                state[f"tower.blocks.{n}.{name}.bias"] = torch.randn(rows)
    return state


def table_of(state):
    return bind(ROWS, {name: tuple(x.shape) for name, x in state.items()}, SIZES)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 12])
def test_a_table_is_its_own_inverse(layers, bias):
    state = ours(layers, bias)
    table, left = table_of(state)
    assert not left
    written = table.write(state)
    assert {name: tuple(x.shape) for name, x in written.items()} == table.theirs()
    assert set(written) == {
        "gain", "table", "unused",
        *(f"layers.{n}.{part}.{kind}" for n in range(layers) for part in ("q", "k", "v", "out")
          for kind in ("weight", "bias") if bias or kind == "weight"),
    }  # fmt: skip
    again = table.read(written, "x")
    assert again.keys() == state.keys()
    assert all(torch.equal(x, again[name]) for name, x in state.items())


def test_the_parts_of_a_stack_keep_their_order():
    state = ours(1)
    table, _ = table_of(state)
    written = table.write(state)
    whole = torch.cat([written[f"layers.0.{part}.weight"] for part in "qkv"])
    assert torch.equal(whole, state["tower.blocks.0.qkv.weight"])
    assert written["gain"].shape == (1, 5, 1, 1)


def test_names_of_ours_that_no_row_knows_are_told():
    state = {**ours(), "tower.wheel": torch.ones(1), "tower.blocks.x.out.bias": torch.ones(1)}
    assert table_of(state)[1] == ["tower.blocks.x.out.bias", "tower.wheel"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gain": None, "layers.1.q.bias": None}, "x: lacks: gain, layers.1.q.bias$"),
        ({"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}, "x: has unknown tensors: a, b, c, d and 1 more"),
        ({"gain": torch.ones(1, 4, 1, 1)}, r"`gain` has shape \(1, 4, 1, 1\).* \(1, 5, 1, 1\)"),
        ({"table": torch.tensor([0.0, 1.0, 2.0, 3.1])}, "`table` is not the fixed table"),
    ],
)
def test_reading_is_strict(change, message):
    state = ours()
    table, _ = table_of(state)
    tensors = {**table.write(state), **change}
    with pytest.raises(UserError, match=message):
        table.read({name: x for name, x in tensors.items() if x is not None}, "x")


@pytest.mark.parametrize("dead", [None, torch.ones(7)])
def test_what_their_model_does_not_use_may_be_anything(dead):
    state = ours()
    table, _ = table_of(state)
    tensors = table.write(state) | {"unused": dead}
    again = table.read({name: x for name, x in tensors.items() if x is not None}, "x")
    assert all(torch.equal(x, again[name]) for name, x in state.items())


def test_half_precision_becomes_fp32_and_counters_stay_whole():
    state = {**ours(1), "task.mask": torch.zeros(1, dtype=torch.int64)}
    table, _ = table_of(state)
    tensors = {
        name: x.half() if x.is_floating_point() else x for name, x in table.write(state).items()
    }
    kinds = {name: x.dtype for name, x in table.read(tensors, "x").items()}
    assert kinds.pop("task.mask") == torch.int64
    assert set(kinds.values()) == {torch.float32}
