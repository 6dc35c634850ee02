"""R4: another number of processes reads on where the others stopped, and learns the same.

Three parts: chains of numbers of ranks read real shards; products of ranks and workers that cannot
be are refused with those that can; real ranks train the toy along 2 -> 1 -> 4 -> 2.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "dist"))
sys.path.append(str(Path(__file__).parents[1] / "unit" / "data"))

import pytest
from clip_shards import train_tokens, write_clips
from faults.report import Outcome, collect
from launching import checked
from test_loader import phase
from test_resume_exact import SCRIPT, losses
from toy_run import toy_spec

from mmssl.train.elastic import layout
from mmssl.types import UserError

CHAIN = (2, 1, 4, 2)
READERS = 4
STEPS = 3  # with each number of ranks
# (ZeRO stage, precision, largest relative difference of a loss)
TRAINED = [(0, "fp32", 1e-5), (1, "fp32", 1e-5), (2, "fp32", 1e-5), (3, "fp32", 1e-5)]
TRAINED += [(1, "bf16", 1e-3)]


def chains(count: int, rng: random.Random) -> Iterator[tuple[str, bool]]:
    """Readers in another division of ranks and workers deliver what they would have anyway."""
    with tempfile.TemporaryDirectory() as name:
        shards = write_clips(Path(name))
        tokenizer = train_tokens(shards)
        for i in range(count):
            sizes, seed, rounds = list(CHAIN), rng.randrange(1000), rng.randint(1, 3)
            if i:
                sizes = [rng.choice((1, 2, 4))]
                while len(sizes) < len(CHAIN):
                    sizes.append(rng.choice([n for n in (1, 2, 4) if n != sizes[-1]]))
            whole, _ = phase(
                shards, tokenizer, sizes[0], READERS // sizes[0], rounds * len(sizes), None, seed
            )
            seen: list[str] = []
            states = None
            for world in sizes:
                place = (world, READERS // world, rounds)
                part, states = phase(shards, tokenizer, *place, states, seed)
                seen += part
            held = Counter(seen) == Counter(whole)
            what = " -> ".join(map(str, CHAIN)) if not i else "other numbers of"
            yield f"{what} ranks read the same augmented micro-batches", held


def products(count: int, rng: random.Random) -> Iterator[tuple[str, bool]]:
    """The numbers a refusal lists are those that share readers and batch evenly."""
    for _ in range(count):
        world, workers, rows = rng.choice((1, 2, 3, 4)), rng.randint(1, 4), rng.choice((1, 2, 4))
        accumulate = rng.choice((1, 2))
        batch, readers = world * accumulate * rows * rng.choice((1, 2, 3)), world * workers
        spec = toy_spec(train={"batch": batch, "accumulate": accumulate})
        manifest = {"world_size": world, "workers": workers, "rows": rows}
        splits = [n for n in range(1, batch + 1) if batch % (n * accumulate) == 0]
        shares = [n for n in splits if readers % n == 0 and batch // (n * accumulate) % rows == 0]
        possible = sorted({world, *shares})
        held = True
        for asked in splits:
            try:
                found = layout(spec, asked, manifest)
                held &= asked in possible and found.workers * asked == readers
                held &= found.rows * found.joined * asked * accumulate == batch
            except UserError as error:
                listed = [int(n) for n in re.findall(r"\d+", str(error).rpartition("; use ")[2])]
                held &= asked not in possible and listed == possible
        yield "products of ranks and workers: refused with the valid ones, or as they were", held


def trained() -> Iterator[tuple[str, bool]]:
    """Real ranks: each part of the chain has the losses of a run of two ranks throughout."""
    with tempfile.TemporaryDirectory() as name:

        def call(i: int, whole: bool, done: int) -> dict[str, Any]:
            stage, precision, _ = TRAINED[i]
            train = {"zero": stage, "precision": precision, "save_every": STEPS}
            train["steps"] = STEPS * len(CHAIN)
            settings = {"train": train, "data": {"rows": 2, "workers": 2}, "dropout": 0.0}
            end = {} if whole else {"fail_at": STEPS * (done + 1)}
            return {**settings, **end, "folder": f"{name}/{'whole' if whole else 'part'}{i}"}

        cases = range(len(TRAINED))
        checked([SCRIPT, json.dumps([call(i, True, 0) for i in cases])], CHAIN[0])
        for done, world in enumerate(CHAIN):
            checked([SCRIPT, json.dumps([call(i, False, done) for i in cases])], world)
        for i, (stage, precision, limit) in enumerate(TRAINED):
            plain, found = (losses(Path(name, f"{kind}{i}")) for kind in ("whole", "part"))
            for done in range(1, 2 if precision == "bf16" else len(CHAIN)):
                steps = range(STEPS * done + 1, STEPS * (done + 1) + 1)
                if precision == "bf16":  # other shapes round otherwise: the weights drift apart
                    steps = range(STEPS + 1, STEPS + 2)
                held = all(found[n] == pytest.approx(plain[n], rel=limit) for n in steps)
                what = f"{' -> '.join(map(str, CHAIN))} ranks train alike"
                yield f"{what}, ZeRO {stage}, {precision}: losses to {limit:g}", held


def run(count: int, seed: int) -> list[Outcome]:
    """`count` chains, ten times as many products, and the training."""
    rng = random.Random(seed)

    def cases() -> Iterator[tuple[str, bool]]:
        yield from chains(count, rng)
        yield from products(10 * count, rng)
        yield from trained()

    return collect("R4", cases())
