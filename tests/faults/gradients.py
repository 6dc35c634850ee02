"""R14: two and four processes compute the loss and gradients of one, the last batch uneven, too.

Every loss that looks at other rows is computed on batches of which a random number of rows is
there, with modalities missing at random, and split over the ranks with absent rows as padding: the
gradient must be that of one process with nothing but the rows that are there, to 1e-6 in fp64.
Then whole models at every ZeRO stage, to 1e-5 in fp32.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "dist"))

import gather_ranks
from faults.report import Outcome, collect
from test_gather_gradients import CASES, distance, launch
from test_model_ranks import measured
from tiny_run import RECIPES

WORLDS = (2, 4)
# of the tiny run's batch of 8 rows, by number of processes
UNEVEN = {2: [[0, 1, 2, 3], [4, 5, 6]], 4: [[0, 1], [2, 3], [4, 5], [6]]}


def run(count: int, seed: int) -> list[Outcome]:
    """`count` batches for every number of processes and loss; the models once."""
    return collect("R14", _cases(count, random.Random(seed)))


def _cases(count: int, rng: random.Random) -> Iterator[tuple[str, bool]]:
    with tempfile.TemporaryDirectory() as folder:
        for world in WORLDS:
            yield from losses(Path(folder), world, count, rng)
        for world in WORLDS if count > 1 else ():
            for recipe in RECIPES:
                found = measured(Path(folder), recipe, {"uneven": UNEVEN[world]})
                for _, stage, error in found:
                    yield f"whole model, {world} ranks, ZeRO {stage}", error <= 1e-5


def losses(folder: Path, world: int, count: int, rng: random.Random) -> Iterator[tuple[str, bool]]:
    """Batches of 5 to 12 rows."""
    asked = [(rng.randrange(1 << 31), rng.randint(5, gather_ranks.G)) for _ in range(count)]
    found = launch(world, folder / f"{world}.pt", json.dumps(asked))["problems"]
    for (seed, rows), results in zip(asked, found, strict=True):
        there = {name: x[:rows] for name, x in gather_ranks.drawn(seed, rows).items()}
        for case in CASES:
            want, got = gather_ranks.run(case, there), results[case]
            errors = [distance(got["gradients"][k], g) for k, g in want["gradients"].items()]
            held = max(errors) <= 1e-6 and abs(float(got["loss"] / want["loss"]) - 1) < 1e-12
            yield f"gradient of one loss, {world} ranks, uneven last batch", held
