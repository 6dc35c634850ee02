"""Random generators and per-row random numbers derived from names, never from global state.

Letters in shapes: P rows, N numbers per row.

`generator` and `numpy_generator` serve host code that handles one sample at a time. `row_bits` and
`row_uniform` serve batched code on any device: each number is a pure function of (row seed, stream
name, position), so a row draws the same numbers whatever batch, rank or device it is in.
"""

from __future__ import annotations

import hashlib
from numbers import Integral
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Part: TypeAlias = int | str | bytes

# SplitMix64 (Steele, Lea and Flood 2014): the odd increment and Stafford's "Mix13" multipliers, as
# int64.
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLY_2 = 0x94D049BB133111EB - (1 << 64)


def seed_of(*parts: Part) -> int:
    """A stable 63-bit seed from a list of names and numbers (BLAKE2b).

    The same on every machine and Python version. Parts keep their borders and types: ("ab", "c"),
    ("a", "bc") and (1,), ("1",), (b"1",) all differ.

    Raises:
        TypeError: a part is neither an integer, a string nor bytes.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        tag, data = _encode(part)
        digest.update(tag + len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(*parts: Part, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded from the parts.

    torch's CPU engine keeps 32 of the seed's bits, so among 10^5 samples a few share their stream.
    """
    return torch.Generator(device=device).manual_seed(seed_of(*parts))


def numpy_generator(*parts: Part) -> np.random.Generator:
    """A numpy generator (PCG64) seeded from the parts."""
    return np.random.Generator(np.random.PCG64(seed_of(*parts)))


def row_bits(seeds_P: Tensor, n: int, stream: str) -> Tensor:
    """(P, n) int64 in [0, 2^63): random bits of each row, for exact ranking without ties.

    Args:
        seeds_P: int64 seeds; rows with equal seeds draw equal numbers.
        n: numbers per row; the first k numbers do not depend on n.
        stream: what the numbers are for; streams of one seed are independent.

    Raises:
        ValueError: the seeds are not a vector of int64.
    """
    return _shift(_row_words(seeds_P, n, stream), 1)


def row_uniform(seeds_P: Tensor, n: int, stream: str) -> Tensor:
    """(P, n) float32 in [0, 1), multiples of 2^-24; arguments and errors as `row_bits`."""
    return _shift(_row_words(seeds_P, n, stream), 40).to(torch.float32) * 2.0**-24


def derive_seeds(seeds_P: Tensor, stream: str) -> Tensor:
    """(P,) int64 in [0, 2^63): a new seed per row, for code that itself names streams."""
    return row_bits(seeds_P, 1, stream)[:, 0]


def _row_words(seeds_P: Tensor, n: int, stream: str) -> Tensor:
    if seeds_P.dtype != torch.int64 or seeds_P.dim() != 1:
        raise ValueError(
            f"row seeds must be a vector of int64, got {tuple(seeds_P.shape)} {seeds_P.dtype}"
        )
    # Seeds are mixed before the stream is added and again after it: neighbouring seeds (0, 1, 2
    # ...) would otherwise walk the same counter sequence one step apart.
    key_P1 = _mix(_mix(seeds_P + _INCREMENT) ^ seed_of(stream))[:, None]
    counter_N = torch.arange(1, n + 1, device=seeds_P.device) * _INCREMENT
    return _mix(key_P1 + counter_N)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit words (int64 products wrap around)."""
    x = (x ^ _shift(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift(x, 27)) * _MULTIPLY_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's `>>` copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _encode(part: Part) -> tuple[bytes, bytes]:
    if isinstance(part, bytes):
        return b"b", part
    if isinstance(part, str):
        return b"s", part.encode()
    if isinstance(part, Integral):
        return b"i", str(int(part)).encode()
    raise TypeError(f"seed_of: parts are int, str or bytes, got {type(part).__name__}")
