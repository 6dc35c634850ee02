"""Collectives without a process group, and masked batch normalisation on one process.

What several processes must agree on is in tests/dist/test_gather_gradients.py.
"""

import pytest
import torch
from torch import nn

from mmssl import dist
from mmssl.dist import MaskedSyncBatchNorm
from mmssl.types import UserError


def test_one_process_without_a_group() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert (dist.rank(), dist.world_size(), dist.is_initialized()) == (0, 1, False)
    assert dist.gather(x) is x
    assert not dist.gather_no_grad(x).requires_grad
    assert not dist.sum_over_ranks(x).requires_grad
    assert dist.sum_with_gradient(x) is x
    assert dist.broadcast_object({"a": 1}) == {"a": 1}
    assert dist.gather_objects("b") == ["b"]
    dist.barrier()
    dist.shutdown()


def test_group_of_one_opens_and_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    dist.init("gloo", timeout_s=20)
    try:
        assert dist.is_initialized()
        assert dist.sum_over_ranks(torch.ones(2, dtype=torch.int64)).tolist() == [1, 1]
        with pytest.raises(RuntimeError, match="exists already"):
            dist.init("gloo")
    finally:
        dist.shutdown()
    assert not dist.is_initialized()


def test_gather_refuses_what_has_no_gradient_or_no_rows() -> None:
    with pytest.raises(TypeError, match="gather_no_grad"):
        dist.gather(torch.arange(3))
    with pytest.raises(ValueError, match="0-dim"):
        dist.gather(torch.tensor(1.0))
    with pytest.raises(ValueError, match="0-dim"):
        dist.gather_no_grad(torch.tensor(1))


def _twins(dim: int = 5) -> tuple[MaskedSyncBatchNorm, nn.BatchNorm1d]:
    ours, theirs = MaskedSyncBatchNorm(dim).double(), nn.BatchNorm1d(dim).double()
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight.copy_(torch.linspace(0.5, 2, dim))
            module.bias.copy_(torch.linspace(-1, 1, dim))
    return ours, theirs


def test_batch_norm_equals_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = _twins()
    for _ in range(3):
        x = (100 + torch.randn(7, 5, dtype=torch.float64)).requires_grad_()
        y = x.detach().clone().requires_grad_()
        weight = torch.randn(7, 5, dtype=torch.float64)
        (ours(x) * weight).sum().backward()
        (theirs(y) * weight).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-9, atol=0)
    assert ours.num_batches_tracked.tolist() == [3]
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-9, atol=1e-12)
    sequence = torch.randn(2, 6, 5, dtype=torch.float64)
    expected = theirs.train()(sequence.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(ours.train()(sequence), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_absent_rows_change_nothing(training: bool) -> None:
    torch.manual_seed(1)
    plain, padded = _twins()[0].train(training), _twins()[0].train(training)
    present = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    z = torch.full((6, 5), float("nan"), dtype=torch.float64)
    z[present] = x.detach()
    z.requires_grad_()
    y, y_padded = plain(x), padded(z, present)
    assert torch.equal(y_padded[~present], torch.zeros(2, 5, dtype=torch.float64))
    torch.testing.assert_close(y_padded[present], y, rtol=1e-12, atol=1e-12)
    y.square().sum().add(y[:, 0].sum()).backward()
    y_padded.square().sum().add(y_padded[:, 0].sum()).backward()
    assert x.grad is not None
    assert z.grad is not None
    torch.testing.assert_close(z.grad[present], x.grad, rtol=1e-9, atol=1e-12)
    assert torch.equal(z.grad[~present], torch.zeros(2, 5, dtype=torch.float64))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(padded.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain.weight.grad, padded.weight.grad, rtol=1e-9, atol=1e-12)


def test_one_or_no_valid_row() -> None:
    norm = _twins()[0]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    none = norm(x, torch.zeros(3, dtype=torch.bool))
    assert torch.equal(none, torch.zeros_like(none))
    one = norm(x, torch.tensor([False, True, False]))
    torch.testing.assert_close(one[1], norm.bias)
    (none.sum() + one.sum()).backward()
    assert torch.isfinite(x.grad).all()  # type: ignore[arg-type]
    assert norm.num_batches_tracked.tolist() == [0]
    assert norm.running_var.tolist() == [1.0] * 5


def test_sixteen_bit_modules_keep_wide_statistics() -> None:
    norm = MaskedSyncBatchNorm(4).bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    y = norm(torch.randn(8, 4, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert norm.double().running_mean.dtype == torch.float64
    assert all(t.dim() > 0 for t in norm.state_dict().values())


def test_bad_shapes_are_named() -> None:
    norm = MaskedSyncBatchNorm(4)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 4\)"):
        norm(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="does not match the rows"):
        norm(torch.zeros(3, 4), torch.ones(2, dtype=torch.bool))


def test_rows_that_are_not_finite_leave_running_statistics_alone():
    torch.manual_seed(0)
    norm = dist.MaskedSyncBatchNorm(3)
    norm(torch.randn(8, 3))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    for bad in (float("nan"), float("inf")):
        x = torch.randn(8, 3)
        x[2, 1] = bad
        norm(x)
        assert all(torch.equal(norm.state_dict()[name], before[name]) for name in before)
    norm(torch.randn(8, 3))
    assert int(norm.num_batches_tracked) == 2


def test_errors_of_rank_0_reach_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []

    def broadcast(value: object) -> object:
        sent.append(value)
        return value

    monkeypatch.setattr(dist, "broadcast_object", broadcast)

    def refuse() -> None:
        raise UserError("no such folder")

    with pytest.raises(UserError, match="no such folder"):
        dist.on_rank0(refuse)
    assert len(sent) == 1  # told to the others before it was raised here
    assert dist.on_rank0(lambda: 7) == 7


def test_another_rank_hears_the_error_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "rank", lambda: 1)
    monkeypatch.setattr(dist, "broadcast_object", lambda value: (None, UserError("from rank 0")))
    with pytest.raises(UserError, match="from rank 0"):
        dist.on_rank0(lambda: pytest.fail("runs on rank 0 only"))
