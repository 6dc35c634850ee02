"""States as plain data, and readers that survive damage."""

import io
import random

import numpy as np
import pytest
import torch
from megatron.energon.rng import SystemRngState
from megatron.energon.state import FlexState

from mmssl.data import energon


def nested():
    return FlexState(
        numbers=[1, 2.5, True, None, "x"],
        raw=bytes(range(256)),
        rng=SystemRngState(
            torch=torch.get_rng_state(), numpy=np.random.get_state(), random=random.getstate()
        ),
    )


def test_round_trip_through_a_safe_file():
    state = nested()
    sink = io.BytesIO()
    torch.save(energon.to_plain(state), sink)
    sink.seek(0)
    back = energon.from_plain(torch.load(sink, weights_only=True))
    assert isinstance(back, FlexState)
    assert back["numbers"] == state["numbers"]
    assert back["raw"] == state["raw"]
    assert back["rng"].random == state["rng"].random
    assert torch.equal(back["rng"].torch, state["rng"].torch)
    assert back["rng"].numpy[0] == "MT19937"
    assert np.array_equal(back["rng"].numpy[1], state["rng"].numpy[1])


def test_unknown_types_are_refused():
    with pytest.raises(TypeError, match="unexpected Random"):
        energon.to_plain([random.Random()])
    with pytest.raises(KeyError):
        energon.from_plain({"__state__": "Popen", "args": "true"})


def test_quiet_swallows_prints_and_restores_them(capsys):
    with energon.quiet():
        print("noise")
    print("signal")
    assert capsys.readouterr().out == "signal\n"
