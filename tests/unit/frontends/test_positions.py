"""Factorised positions: table sizes, sums, interpolation law."""

import numpy as np
import pytest
import torch

from mmssl.frontends.positions import FactorisedPositions, _natural_spline, spline_weights
from mmssl.types import UserError


def vectors(grid):
    return sum(
        p.shape[0] for n, p in FactorisedPositions(grid, 4).named_parameters() if "axis" in n
    )


def test_published_table_sizes():
    assert vectors((8, 14, 14)) == 36
    assert vectors((1200,)) == 1200
    assert vectors((16,)) == 16


def test_sum_of_the_tables_in_row_major_order():
    positions = FactorisedPositions((2, 3, 4), 5)
    grid = positions.vectors().view(2, 3, 4, 5)
    for t, h, w in ((0, 0, 0), (1, 2, 3), (1, 0, 2)):
        expected = positions.axis0[t] + positions.axis1[h] + positions.axis2[w]
        torch.testing.assert_close(grid[t, h, w], expected)


def test_forward_adds_and_drops_out():
    positions = FactorisedPositions((2, 3), 64, norm=True, dropout=0.5)
    x = torch.randn(4, 6, 64)
    table = positions.vectors((2, 3))
    torch.testing.assert_close(table.mean(-1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(table.std(-1, unbiased=False), torch.ones(6), atol=2e-3, rtol=0)
    torch.testing.assert_close(positions.eval()(x, (2, 3)), x + table)
    out = positions.train()(x, (2, 3))
    kept = out != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(out[kept], 2 * (x + table)[kept])


@pytest.mark.parametrize("size", [2, 3, 8, 14, 1200])
def test_interpolation_at_the_native_size_is_the_table(size):
    table = torch.randn(size, 6)
    assert (spline_weights(size, size) @ table - table).abs().max() < 1e-4


@pytest.mark.parametrize(("size", "target"), [(14, 20), (8, 5), (3, 10), (2, 7), (14, 1)])
def test_interpolation_equals_scipys_natural_spline(size, target):
    interpolate = pytest.importorskip("scipy.interpolate")
    table = torch.randn(size, 6, dtype=torch.float64).numpy()
    spline = interpolate.CubicSpline(np.linspace(0, 1, size), table, bc_type="natural")
    places = np.linspace(0, 1, target) if target > 1 else np.array([0.5])
    np.testing.assert_allclose(
        _natural_spline(size, target).double().numpy() @ table, spline(places), atol=1e-5
    )


def test_interpolation_keeps_ends_lines_and_single_rows():
    line = torch.linspace(0, 1, 14)[:, None]
    torch.testing.assert_close(spline_weights(14, 20) @ line, torch.linspace(0, 1, 20)[:, None])
    assert torch.equal(spline_weights(1, 5), torch.ones(5, 1))


def test_other_grids_interpolate_each_axis():
    positions = FactorisedPositions((8, 14, 14), 6)
    wide = positions.vectors((8, 20, 20)).view(8, 20, 20, 6)
    corner = positions.axis0[7] + positions.axis1[13] + positions.axis2[0]
    torch.testing.assert_close(wide[7, 19, 0], corner, atol=1e-5, rtol=1e-5)
    assert wide.shape == (8, 20, 20, 6)


def test_crop_takes_the_first_rows():
    positions = FactorisedPositions((10,), 3, fit="crop")
    assert torch.equal(positions.vectors((4,)), positions.axis0[:4])
    with pytest.raises(UserError, match="only 10 were learned"):
        positions.vectors((11,))


def test_first_use_in_inference_mode_serves_training():
    positions = FactorisedPositions((6,), 3)
    with torch.inference_mode():
        positions.vectors((9,))
    positions.vectors((9,)).sum().backward()
    assert positions.axis0.grad.abs().sum() > 0


def test_wrong_requests_are_refused():
    with pytest.raises(UserError, match="fit"):
        FactorisedPositions((10,), 3, fit="nearest")
    with pytest.raises(UserError, match="number of axes"):
        FactorisedPositions((10,), 3).vectors((2, 5))
