"""R2: a checkpoint that is damaged in any way is refused by all ranks alike, before it is loaded.

    python mutilations.py RUN COPY SEED COUNT      one rank of those that torchrun starts

Of a run with checkpoints of steps 2 and 4 the newer one is damaged: all ranks must choose step 2.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "dist"))

from faults.report import Outcome, collect, heard, tell
from launching import checked

from mmssl import dist
from mmssl.train import checkpoint
from mmssl.train.engine import session

HERE = Path(__file__).parent

LIMIT_S = 30.0
RANKS = 2
WHAT = "a checkpoint's file or pointer, 2 ranks"
Damage = Callable[[Path, random.Random], None]


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def lengthen(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 99)))


def zeros(path: Path, rng: random.Random) -> None:
    size = path.stat().st_size
    path.write_bytes(bytes(size))


def swap(path: Path, rng: random.Random) -> None:
    """With another file of the checkpoint, e.g. that of another rank."""
    others = [p for p in path.parent.iterdir() if p.is_file() and p != path]
    if not others:
        cut(path, rng)
        return
    other = rng.choice(others)
    mine, theirs = path.read_bytes(), other.read_bytes()
    if mine == theirs:
        flip(path, rng)
    else:
        path.write_bytes(theirs), other.write_bytes(mine)


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def older(path: Path, rng: random.Random) -> None:
    """The same file of the checkpoint before."""
    folder = next(p for p in path.parents if p.name == "step-00000004")
    before = (folder.with_name("step-00000002") / path.relative_to(folder)).read_bytes()
    if before == path.read_bytes():
        flip(path, rng)
    else:
        path.write_bytes(before)


DAMAGES: tuple[Damage, ...] = (flip, cut, lengthen, zeros, swap, remove, older)


def cases(run: Path, copy: Path, seed: int, count: int) -> Iterator[tuple[str, bool]]:
    """On every rank: damage, choose, compare."""
    rng = random.Random(seed)

    def again(harm: Callable[[Path], object]) -> list[tuple[str, float]]:
        """What the ranks choose in a fresh copy with some harm, and in how many seconds."""
        if dist.rank() == 0:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(run, copy)
            harm(copy / "checkpoints")
        dist.barrier()
        began = time.monotonic()
        chosen = checkpoint.newest_for_all(copy)
        return dist.gather_objects((chosen.name if chosen else "", time.monotonic() - began))

    for i in range(count):
        damage = DAMAGES[i % len(DAMAGES)]

        def harm(folder: Path, damage: Damage = damage) -> None:
            newest = folder / "step-00000004"
            damage(rng.choice(sorted(p for p in newest.rglob("*") if p.is_file())), rng)

        answers = again(harm)
        good = all(name == "step-00000002" and s < LIMIT_S for name, s in answers)
        yield f"{WHAT}: {damage.__name__}", good
    for pointer in ("", "step-00000002", "step-99999999", "../../etc"):
        answers = again(lambda folder, text=pointer: (folder / "latest").write_text(text))
        yield f"{WHAT}: pointer", all(name == "step-00000004" for name, _ in answers)


def ranks(run: Path, copy: Path, seed: int, count: int) -> None:
    """One rank; the first prints what came out."""
    with session(threads=1):
        found = collect("R2", cases(run, copy, seed, count))
        if dist.rank() == 0:
            tell(found)


def run(count: int, seed: int) -> list[Outcome]:
    """`count` damages of a checkpoint of two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        train = {"zero": 1 + seed % 3, "steps": 4, "save_every": 2}
        call = {"folder": f"{folder}/run", "train": train}
        checked([HERE.parent / "dist" / "toy_run.py", json.dumps([call])], RANKS)
        words = [Path(__file__), f"{folder}/run", f"{folder}/copy", str(seed), str(count)]
        return heard(checked(words, RANKS))


if __name__ == "__main__":
    ranks(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
