"""Group norm over time: torch's numbers, and none of the padding."""

import pytest
import torch
from torch import nn

from mmssl.frontends.norms import TimeGroupNorm


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_valid_steps_are_normed_as_if_alone(groups):
    torch.manual_seed(0)
    norm = TimeGroupNorm(groups, 6)
    for p in norm.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, 6, 10, dtype=torch.float32)
    pad = torch.arange(10)[None] >= torch.tensor([[10], [7], [0]])
    plain = nn.functional.group_norm(x, groups, norm.weight, norm.bias)
    assert torch.equal(norm(x), plain)
    x[pad[:, None].expand_as(x)] = float("nan")
    out = norm(x, pad)
    torch.testing.assert_close(out[0], plain[0], atol=1e-5, rtol=1e-5)
    alone = nn.functional.group_norm(x[1:2, :, :7], groups, norm.weight, norm.bias)
    torch.testing.assert_close(out[1:2, :, :7], alone, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(out).all()
    assert norm(x.bfloat16(), pad).dtype == torch.bfloat16
