"""Laws of the derived random numbers."""

import numpy as np
import pytest
import torch

from mmssl import rng

SPLITMIX_OF_ZERO = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_seed_is_stable_and_keeps_borders_and_types() -> None:
    # A change of this constant changes every run's random numbers.
    assert rng.seed_of("run", 7, b"key") == 53322971340841087
    parts = [("ab", "c"), ("a", "bc"), ("abc",), (1,), ("1",), (b"1",), (-1,), (1 << 70,), ()]
    seeds = {rng.seed_of(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= s < 2**63 for s in seeds)
    assert rng.seed_of(np.int64(5)) == rng.seed_of(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [1.0, None, ["a"]])
def test_seed_refuses_other_types(part: object) -> None:
    with pytest.raises(TypeError, match="parts are int, str or bytes"):
        rng.seed_of(part)  # type: ignore[arg-type]


def test_generators_repeat_and_differ_by_part() -> None:
    def draw(*parts: int | str) -> tuple[float, float]:
        torch_value = torch.rand(1, generator=rng.generator(*parts)).item()
        return torch_value, float(rng.numpy_generator(*parts).random())

    assert draw("a", 1) == draw("a", 1)
    assert len({draw("a", 1), draw("a", 2), draw("b", 1)}) == 3


def test_mix_is_the_published_splitmix64() -> None:
    increment = 0x9E3779B97F4A7C15
    state = torch.tensor([((i * increment) % 2**64 + 2**63) % 2**64 - 2**63 for i in (1, 2, 3)])
    got = [v % 2**64 for v in rng._mix(state).tolist()]
    assert got == SPLITMIX_OF_ZERO


def test_rows_do_not_depend_on_the_batch() -> None:
    seeds = torch.tensor([3, -9, 2**62, 0, 3])
    whole = rng.row_uniform(seeds, 50, "mask")
    assert torch.equal(whole[0], whole[4])
    for i in range(5):
        assert torch.equal(rng.row_uniform(seeds[i : i + 1], 50, "mask")[0], whole[i])
    assert torch.equal(rng.row_uniform(seeds.flip(0), 50, "mask"), whole.flip(0))
    assert torch.equal(rng.row_uniform(seeds, 20, "mask"), whole[:, :20])
    assert whole[3, :2].tolist() == [0.5479474067687988, 0.9308501482009888]


def test_uniform_is_uniform_along_rows_columns_and_bits() -> None:
    u = rng.row_uniform(torch.arange(2000), 500, "x")
    assert u.dtype == torch.float32
    assert 0 <= u.min() < 1e-5
    assert 1 - 1e-5 < u.max() < 1
    n = u.numel()
    assert abs(u.double().mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(u.double().var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    for axis in (0, 1):  # every row and every column by itself: 5.5 standard errors
        mean, count = u.double().mean(axis), u.shape[axis]
        assert (mean - 0.5).abs().max() < 5.5 * (1 / 12 / count) ** 0.5
    bins = torch.histc(u, 100, 0, 1)
    chi2 = ((bins - n / 100) ** 2 / (n / 100)).sum()
    assert 50 < chi2 < 170  # 99 degrees of freedom
    bits = (rng.row_bits(torch.arange(1000), 100, "x")[..., None] >> torch.arange(63)) & 1
    assert (bits.double().mean((0, 1)) - 0.5).abs().max() < 5 * 0.5 / 1e5**0.5


def test_streams_rows_and_neighbours_are_independent() -> None:
    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].abs())

    u = rng.row_uniform(torch.arange(1000), 200, "x")
    v = rng.row_uniform(torch.arange(1000), 200, "y")
    limit = 4.5 / (999 * 199) ** 0.5
    assert correlation(u, v) < limit
    assert correlation(u[1:], u[:-1]) < limit
    assert correlation(u[:, 1:], u[:, :-1]) < limit
    assert correlation(u[1:, :-1], u[:-1, 1:]) < limit  # rows are no shifted copies of each other
    assert rng.row_bits(torch.arange(1000), 200, "x").unique().numel() == 200_000


def test_derived_seeds_and_bad_seeds() -> None:
    seeds = torch.tensor([1, 2])
    assert rng.derive_seeds(seeds, "a").shape == (2,)
    assert not torch.equal(rng.derive_seeds(seeds, "a"), rng.derive_seeds(seeds, "b"))
    for bad in (torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([1], dtype=torch.int32)):
        with pytest.raises(ValueError, match="vector of int64"):
            rng.row_uniform(bad, 3, "a")
