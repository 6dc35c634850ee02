"""Losses as pure functions of tensors, by the name a method file uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmssl.objectives.classification import (
    binary_cross_entropy,
    softmax_cross_entropy,
    token_cross_entropy,
)
from mmssl.objectives.contrastive import info_nce, mil_nce, sigmoid_pairs
from mmssl.objectives.regression import mean_square, smooth_l1

OBJECTIVES: dict[str, Callable[..., Any]] = {
    "info_nce": info_nce,
    "mil_nce": mil_nce,
    "sigmoid": sigmoid_pairs,
    "binary": binary_cross_entropy,
    "softmax": softmax_cross_entropy,
    "tokens": token_cross_entropy,
    "mse": mean_square,
    "smooth_l1": smooth_l1,
}
