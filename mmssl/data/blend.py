"""How often each of several shard folders is drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mmssl.data.folders import read_manifest
from mmssl.specs import DataSpec
from mmssl.types import UserError


def temperature_weights(sizes: Mapping[str, float], alpha: float) -> dict[str, float]:
    """Shares p_l proportional to (n_l / N)^alpha of sizes n_l whose sum is N (Conneau et al. 2021).

    alpha 1 draws every hour or clip equally often, 0 every language.
    """
    raised = {name: size**alpha for name, size in sizes.items()}
    total = sum(raised.values())
    return {name: value / total for name, value in raised.items()}


def train_weights(data: DataSpec) -> dict[str, float]:
    """Folders of `data.train` and the share of rows that comes from each.

    Sizes are the numbers given, or else what the folders' manifests count as samples.

    Raises:
        UserError: no folder, one named twice, a folder without manifest, or a size of 0 or less.
    """
    train = [data.train] if isinstance(data.train, str) else data.train
    if not train or not all(train):
        raise UserError("data.train is empty: name a shard folder made by data_tools.make_shards")
    if len(set(train)) < len(train):
        raise UserError(f"data.train: a folder is named twice in {', '.join(train)}")
    sizes: dict[str, float] = {}
    for folder in train:
        counted = sum(shard.samples for shard in read_manifest(folder))
        sizes[folder] = train[folder] if isinstance(train, dict) else counted
        if not 0 < sizes[folder] < math.inf:
            raise UserError(
                f"data.train: the weight of {folder} is {sizes[folder]}; it must be a number above "
                "0: leave a folder out that is not to be read"
            )
    return temperature_weights(sizes, data.alpha)
