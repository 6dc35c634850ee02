"""Folding neighbouring frames into the first layer of the video stem."""

import pytest
import torch

from mmssl.frontends.stems import CellMerge, VideoConvStem
from mmssl.types import UserError

ARGS = {"width": 6, "channels": [4, 8], "strides": [2, 2]}


def test_a_folded_stem_is_a_strided_convolution_along_time():
    torch.manual_seed(0)
    stem = VideoConvStem(**ARGS, fold=2)
    x = torch.randn(2, 3, 6, 8, 8)
    out, grid = stem(x)
    assert grid == stem.grid((6, 8, 8)) == (3, 2, 2)
    pairs = x.transpose(1, 2).reshape(2, 3, 6, 8, 8).transpose(1, 2)
    plain = VideoConvStem(**ARGS, in_channels=6)
    plain.load_state_dict(stem.state_dict())
    torch.testing.assert_close(out, plain(pairs)[0])


def test_folded_tokens_are_centred_between_their_frames():
    time = VideoConvStem(**ARGS, fold=2, temporal_kernel=2, temporal_stride=2).fields()[0]
    assert (time.stride, time.size, time.first) == (4, 4, 1.5)


def test_frames_behind_the_end_change_nothing():
    torch.manual_seed(1)
    stem = VideoConvStem(**ARGS, fold=2)
    x = torch.randn(1, 3, 8, 8, 8)
    x[:, :, 4:] = 0
    padded, _ = stem(x, torch.tensor([4]))
    alone, _ = stem(x[:, :, :4])
    torch.testing.assert_close(padded[:, :8], alone)
    assert int(stem.out_lengths(torch.tensor([4]))) == 2


def test_too_few_frames_are_refused():
    with pytest.raises(UserError, match="fold"):
        VideoConvStem(**ARGS, fold=4).grid((3, 8, 8))


@pytest.mark.parametrize(("time", "space"), [(1, 2), (2, 2), (2, 1)])
def test_merged_tokens_read_their_own_cells_only(time, space):
    torch.manual_seed(2)
    merge, shape = CellMerge(3, time, space), (4, 4, 6)
    cells = torch.randn(1, 4 * 4 * 6, 3, requires_grad=True)
    tokens, grid = merge(cells, shape)
    assert grid == merge.grid(shape) == (4 // time, 4 // space, 6 // space)
    t, y, x = (n - 1 for n in grid)
    tokens.reshape(*grid, 3)[t, y, x].sum().backward()
    touched = cells.grad.abs().sum(-1).reshape(shape) > 0
    expected = torch.zeros(shape, dtype=torch.bool)
    expected[t * time :, y * space :, x * space :] = True
    assert torch.equal(touched, expected)


def test_a_partly_filled_token_does_not_depend_on_the_padding_behind_it():
    torch.manual_seed(3)
    merge = CellMerge(3, 2, 1)
    assert merge.out_lengths(torch.tensor([1, 2, 3, 4])).tolist() == [1, 1, 2, 2]
    cells = torch.randn(1, 5 * 4, 3)
    alone, grid = merge(cells[:, : 3 * 4], (3, 2, 2))
    assert grid == merge.grid((3, 2, 2)) == (2, 2, 2)
    behind = torch.arange(5 * 4)[None] >= 3 * 4
    padded, _ = merge(cells, (5, 2, 2), behind)
    torch.testing.assert_close(padded[:, :8], alone)


def test_frames_that_leave_cells_over_are_refused():
    with pytest.raises(UserError, match="no whole tokens of 2 x 2"):
        CellMerge(3, 1, 2).grid((4, 5, 6))
