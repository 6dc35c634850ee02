from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmssl import dist
from mmssl.dist import MaskedSyncBatchNorm
from mmssl.partition import assemble, cut, piece
from mmssl.train.weights import Average, averaging_decay, shapes, whole_state


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 3))
    net[2].bias.requires_grad_(False)
    return net


def partition(parameter: nn.Parameter, rank: int, world: int) -> nn.Parameter:
    """What ZeRO-3 leaves of a parameter on one rank."""
    length = -(-parameter.numel() // world)
    flat = torch.cat([parameter.detach().flatten(), torch.full((world * length,), 7.0)])
    rest = nn.Parameter(torch.empty(0))
    rest.ds_tensor = flat[rank * length : (rank + 1) * length].clone()
    rest.ds_shape, rest.ds_numel = parameter.shape, parameter.numel()
    return rest


@pytest.mark.parametrize("shape", [(5, 3), (1,), (4,)])
def test_pieces_of_all_ranks_assemble_to_the_whole(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    whole = nn.Parameter(torch.randn(shape))
    ranks = [partition(whole, rank, 2) for rank in range(2)]
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "gather_no_grad", lambda part: torch.cat([piece(p) for p in ranks]))
    assert torch.equal(assemble(ranks[0], piece(ranks[0])), whole)
    for rank, rest in enumerate(ranks):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        real = max(0, min(piece(rest).numel(), whole.numel() - rank * piece(rest).numel()))
        back = cut(rest, whole.detach())
        assert back.shape == piece(rest).shape
        assert torch.equal(back[:real], piece(rest)[:real])
        assert not back[real:].any()


def test_cut_refuses_another_size() -> None:
    with pytest.raises(ValueError, match="expected 6 elements"):
        cut(nn.Parameter(torch.zeros(2, 3)), torch.zeros(7))


def test_whole_state_equals_the_state_dict_and_shares_no_memory() -> None:
    net = model()
    state = whole_state(net)
    assert state.keys() == net.state_dict().keys()
    with torch.no_grad():
        before = {k: v.clone() for k, v in net.state_dict().items()}
        for parameter in net.parameters():
            parameter.add_(1)
    assert all(torch.equal(state[k], before[k]) for k in state)
    assert whole_state(net, keep=False) == {}
    assert shapes(net) == {k: tuple(v.shape) for k, v in before.items()}


def test_tied_parameters_keep_both_names_and_one_average() -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    net["b"].weight = net["a"].weight
    average = Average(net)
    average.pieces["a.weight"].fill_(5.0)
    state = whole_state(net, average.pieces)
    assert torch.equal(state["a.weight"], torch.full((2, 2), 5.0))
    assert torch.equal(state["b.weight"], torch.full((2, 2), 5.0))


def test_average_follows_its_recursion_and_leaves_frozen_weights_alone() -> None:
    net = model()
    average = Average(net)
    expected = net[0].weight.detach().clone()
    for step, decay in enumerate((0.9, 0.5, 0.0, 0.99)):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(step + 1.0)
        net[1].running_mean += 1
        average.update(net, decay)
        expected = decay * expected + (1 - decay) * net[0].weight.detach()
    state = whole_state(net, average.pieces)
    torch.testing.assert_close(state["0.weight"], expected)
    assert torch.equal(state["2.bias"], net[2].bias)


def test_initial_weights_leave_the_average_of_a_short_run() -> None:
    """After T steps they weigh prod (1 + t) / (10 + t) = 9! T! / (T + 9)! of it; 0.99^T without."""
    left = math.prod(averaging_decay(0.99, step) for step in range(20))
    assert left == pytest.approx(math.factorial(9) * math.factorial(20) / math.factorial(29))
    assert left < 1e-6 < 0.99**200
    assert averaging_decay(0.99, 890) == 0.99 > averaging_decay(0.99, 880)
    assert averaging_decay(0.0, 500) == 0.0


def test_average_loads_what_whole_state_saved() -> None:
    net = model()
    average = Average(net)
    average.pieces["0.weight"].fill_(0.25)
    other = Average(net)
    other.load(net, whole_state(net, average.pieces))
    assert all(torch.equal(other.pieces[k], average.pieces[k]) for k in average.pieces)
    with pytest.raises(KeyError):
        other.load(net, {})


def test_running_statistics_are_averaged_with_the_weights():
    net = nn.Sequential(nn.Linear(3, 3), MaskedSyncBatchNorm(3))
    average = Average(net)
    net[1](torch.full((4, 3), 8.0) + torch.arange(4.0)[:, None])
    before = average.pieces["1.running_mean"].clone()
    average.update(net, 0.75)
    want = 0.75 * before + 0.25 * net[1].running_mean
    torch.testing.assert_close(average.pieces["1.running_mean"], want)
    state = whole_state(net, average.pieces)
    torch.testing.assert_close(state["1.running_mean"], want)
    assert int(state["1.num_batches_tracked"]) == 1
    other = Average(net)
    other.load(net, state)
    torch.testing.assert_close(other.pieces["1.running_mean"], want)
