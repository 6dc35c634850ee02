"""Laws of convolutional encoders, whatever their layers are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmssl.backbones.convnets import ConvNet, MapBatchNorm


def padded(items: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Items (1, C, T, ...) of several lengths in one batch, noise behind their ends."""
    lengths = torch.tensor([x.shape[2] for x in items])
    whole = 50 * torch.randn(len(items), items[0].shape[1], int(lengths.max()), *items[0].shape[3:])
    whole = whole.to(items[0].dtype)
    for row, item in zip(whole, items, strict=True):
        row[:, : item.shape[2]] = item[0]
    return whole, lengths


def padding_changes_nothing(net: ConvNet, items: list[Tensor], training: bool) -> None:
    """Evaluation: an item's valid tokens are those of the item alone.

    Training: they are the same behind twice the padding, and so are all gradients and statistics.
    """
    whole, lengths = padded(items)
    steps = net.out_lengths(lengths, whole.ndim - 2).tolist()
    longer = torch.cat([whole, torch.randn_like(whole)], 2)
    if not training:
        tokens, grid = net(whole, lengths)
        for row, item, n in zip(tokens, items, steps, strict=True):
            alone, own = net(item)
            assert own[0] == n
            torch.testing.assert_close(row[: alone.shape[1]], alone[0], atol=1e-9, rtol=1e-7)
        return
    results = []
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for x in (whole, longer):
        net.load_state_dict(state)
        net.zero_grad()
        tokens, grid = net(x, lengths)
        valid = torch.arange(grid[0]) < torch.tensor(steps)[:, None]
        kept = tokens.unflatten(1, grid)[valid]
        kept.square().mean().backward()
        grads = [p.grad.clone() for p in net.parameters()]
        results.append((kept.detach(), grads, [b.clone() for b in net.buffers()]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)


def dummies_change_nothing(make: Callable[[], ConvNet], x: Tensor) -> None:
    """An item that does not exist enters neither outputs, gradients nor statistics."""
    net, twin = (make().double().train() for _ in range(2))
    twin.load_state_dict(net.state_dict())
    x = x.double()
    valid = torch.ones(len(x) + 1, dtype=torch.bool)
    valid[-1] = False
    a, _ = net(x)  # the fused kernel
    b, _ = twin(torch.cat([x, 50 * torch.randn_like(x[:1])]), valid_P=valid)
    torch.testing.assert_close(b[:-1], a, atol=1e-9, rtol=1e-7)
    a.square().mean().backward()
    b[:-1].square().mean().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-9, rtol=1e-6)
    for p, q in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-9, rtol=1e-6)
    assert all(m.valid is None for m in net.modules() if isinstance(m, MapBatchNorm))
