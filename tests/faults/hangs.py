"""R8: whatever hangs or dies, all processes of a run end within the limit, and say where they were.

python hangs.py RUN CASE STAGE      one rank of two
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "dist"))

from faults.report import Outcome, collect
from launching import checked, settings_of

LIMIT_S = 20.0  # train.hang_s; building takes some of it on a busy machine
START_S = 120.0  # to import, build and come to the fault, on a busy machine
ENDS_S = LIMIT_S + 24.0  # from the fault to the end of both ranks
CASES = ("rank asleep", "rank killed", "storage stalled", "reader asleep", "reader killed")
STARTS = ("building asleep", "conversion asleep", "restoring asleep")
CASES += STARTS
# of cases in a function: module, name, rank, what it says
PLACES = {
    "storage stalled": ("mmssl.train.commit", "_sync", 1, "the storage"),
    STARTS[0]: ("toy_run", "ToyModel", 1, "a constructor"),
    STARTS[1]: ("mmssl.train.engine", "_put_together", 0, "a conversion"),
    STARTS[2]: ("mmssl.train.checkpoint", "load_plain", 1, "a restoration"),
}
READERS = {"rows": 4, "workers": 2}  # of the process whose run two go on with
MARK = "fault at"


def fault(case: str, where: str) -> None:
    """Rank 1 comes to harm."""
    print(MARK, time.time(), flush=True)
    if case.endswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    print(f"hanging in {where}", flush=True)
    time.sleep(1000)


def stall(case: str) -> None:
    """Have a function of the training come to harm where `PLACES` says."""
    module, name, who, where = PLACES[case]
    place = importlib.import_module(module)
    work = getattr(place, name)

    def harmed(*words: Any, **more: Any) -> Any:
        from mmssl import dist

        if dist.rank() == who:
            fault(case, where)
        return work(*words, **more)

    setattr(place, name, harmed)


def rank(folder: str, case: str, stage: int) -> None:
    """Train the toy; at the start, or at the third step of rank 1, the fault happens."""
    import toy_run
    from torch.utils.data import DataLoader, IterableDataset

    from mmssl import dist
    from mmssl.train import engine

    class Samples(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[int]:
            for i in range(10**6):
                if i == 3 and case.startswith("reader") and dist.rank() == 1:
                    fault(case, "a reader")
                yield i

    class Loader(toy_run.ToyLoader):
        """Numbers of its batches come from a process of its own."""

        numbers: Any = None

        def __next__(self) -> Any:
            if self.numbers is None:
                self.numbers = iter(DataLoader(Samples(), None, num_workers=1, prefetch_factor=1))
            self.position = next(self.numbers)
            if self.position == 3 and case.startswith("rank") and dist.rank() == 1:
                fault(case, "a rank")
            return super().__next__()

    toy_run.ToyLoader = Loader  # type: ignore[misc]
    if case in PLACES:
        stall(case)
    train = {"zero": stage, "steps": 1000, "save_every": 4, "hang_s": LIMIT_S}
    with engine.session(threads=1) as device:
        toy_run.run(device, folder, train=train, data=READERS)


def attempt(folder: str, case: str, stage: int) -> tuple[bool, float]:
    """Whether both ranks ended in time with stacks on their way out, and how long it took."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    if case in STARTS[1:]:
        train = {"zero": stage, "steps": 4, "save_every": 4}
        call = {"folder": f"{folder}/run", "train": train, "data": READERS}
        checked([Path(__file__).parents[1] / "dist" / "toy_run.py", json.dumps([call])])
    logs = [Path(folder, f"rank{i}.txt") for i in range(2)]
    ranks = []
    for i, log in enumerate(logs):
        layout = {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "2"}
        command = [sys.executable, __file__, f"{folder}/run", case, str(stage)]
        with log.open("w") as out:
            env = settings_of({**address, **layout})
            ranks.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
    try:
        codes = [process.wait(START_S + ENDS_S) for process in ranks]
    except subprocess.TimeoutExpired:
        for process in ranks:
            process.kill()
        return False, float("inf")
    ended = time.time()
    said = [log.read_text() for log in logs]
    marks = [line for text in said for line in text.splitlines() if line.startswith(MARK)]
    if len(marks) != 1 or 0 in codes:
        return False, float("inf")
    seconds = ended - float(marks[0].removeprefix(MARK))
    traces = ("most recent call first", "Traceback (most recent call last)")
    tells = any(trace in text for text in said for trace in traces)
    return tells and seconds < ENDS_S, seconds


def run(count: int, seed: int) -> list[Outcome]:
    """`count` faults of all kinds in turn."""
    rng = random.Random(seed)

    def cases() -> Iterator[tuple[str, bool]]:
        for i in range(count):
            case = CASES[i % len(CASES)]
            stage = rng.randrange(case == STARTS[1], 4)  # there is nothing to convert at stage 0
            with tempfile.TemporaryDirectory() as folder:
                held, _ = attempt(folder, case, stage)
            yield f"{case}, 2 ranks: all end within {ENDS_S:.0f} s and say where", held

    return collect("R8", cases())


if __name__ == "__main__":
    rank(sys.argv[1], sys.argv[2], int(sys.argv[3]))
