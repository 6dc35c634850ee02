"""R1: killed at any moment of saving, a run loses nothing and takes nothing half-written.

Two ranks train the toy and save all the time, on storage that is made slow and that shows half a
file before the whole one. They are killed, the run goes on from what is left, and its losses must
be those of a run that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "dist"))

from faults.report import Outcome, collect, heard, tell
from launching import checked
from toy_run import run as train_toy

from mmssl.train import checkpoint, commit
from mmssl.train.engine import session

RANKS, EVERY, STEPS = 2, 2, 120
STAGES = (1, 2, 3)
SLOW_S = 0.01


def slow_storage() -> None:
    """Every file is there by halves for a while before it is whole, and whole before it counts."""
    write, seal = commit.Writer.file, commit._seal

    def slowly(writer: commit.Writer, name: str, make: Callable[[Path], object]) -> None:
        def halves(path: Path) -> None:
            make(path)
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2])
            time.sleep(SLOW_S)
            path.write_bytes(data)
            time.sleep(SLOW_S / 2)

        write(writer, name, halves)

    def slow_seal(*arguments: Any) -> None:
        time.sleep(SLOW_S)
        seal(*arguments)

    commit.Writer.file, commit._seal = slowly, slow_seal  # type: ignore[method-assign]


def settings(stage: int) -> dict[str, Any]:
    train = {"steps": STEPS, "zero": stage, "save_every": EVERY, "keep_last": 2, "log_every": 1}
    return {"train": train}


def rank_process(rank: int, port: int, folder: Path, stage: int, slow: bool) -> int:
    """Fork one rank; returns its process id. What it prints is of no interest."""
    child = os.fork()
    if child:
        return child
    code = 1
    with contextlib.suppress(BaseException):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1), os.dup2(nowhere, 2)
        layout = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in {**layout, **address}.items()})
        if slow:
            slow_storage()
        with session(threads=1) as device:
            train_toy(device, str(folder), **settings(stage))
        code = 0
    os._exit(code)


def start(folder: Path, stage: int, slow: bool) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [rank_process(rank, port, folder, stage, slow) for rank in range(RANKS)]


def end(children: list[int], kill: bool) -> list[int]:
    """Exit codes."""
    for child in children if kill else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def losses(folder: Path) -> dict[int, set[float]]:
    """All losses that were ever logged for a step."""
    found: dict[int, set[float]] = {}
    path = folder / "log.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the line at which the process died
            values = json.loads(line)
            if "loss" in values:
                found.setdefault(values["step"], set()).add(values["loss"])
    return found


def newest_step(folder: Path) -> int:
    """Step of the checkpoint that a resume takes."""
    found = checkpoint.newest(folder)
    return int(found.name.removeprefix("step-")) if found else 0


def saved(folder: Path) -> int:
    """Step of the last checkpoint by its name alone."""
    names = [path.name for path in (folder / "checkpoints").glob("step-????????")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def kills(folder: Path, stage: int, count: int, rng: random.Random) -> Iterator[tuple[str, bool]]:
    """Kill the run `count` times; whether each time nothing was lost and nothing half was taken."""
    assert end(start(folder / "whole", stage, slow=False), kill=False) == [0, 0]
    plain, part = losses(folder / "whole"), folder / "part"
    for _ in range(count):
        before = newest_step(part)
        if before + 3 * EVERY >= STEPS:
            shutil.rmtree(part)
            before = 0
        children = start(part, stage, slow=True)
        while saved(part) < before + EVERY:  # let it come so far as to save
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        if rng.random() < 0.5:
            os.kill(rng.choice(children), signal.SIGKILL)  # one dies first
            time.sleep(rng.uniform(0, 0.05))
        logged = max(losses(part), default=0)
        end(children, kill=True)
        exact = all(values <= plain[step] for step, values in losses(part).items())
        # with a save in progress, the newest complete checkpoint is the one before
        held = exact and newest_step(part) >= max(before, logged - 2 * EVERY)
        yield f"SIGKILL while saving, 2 ranks, ZeRO {stage}", held
    assert end(start(part, stage, slow=False), kill=False) == [0, 0]
    finished = losses(part)
    yield f"going on afterwards, 2 ranks, ZeRO {stage}", finished[STEPS] == plain[STEPS]


def inside(count: int, seed: int) -> None:
    """In a process that may fork, as it has started no thread: print the cases."""
    import deepspeed  # noqa: F401  once, not in every child

    rng = random.Random(seed)

    def cases() -> Iterator[tuple[str, bool]]:
        for stage in STAGES:
            with tempfile.TemporaryDirectory() as folder:
                yield from kills(Path(folder), stage, -(-count // len(STAGES)), rng)

    tell(collect("R1", cases()))


def run(count: int, seed: int) -> list[Outcome]:
    """`count` kills, shared by ZeRO 1, 2 and 3."""
    return heard(checked([__file__, str(count), str(seed)], limit_s=300 + 60 * count))


if __name__ == "__main__":
    inside(int(sys.argv[1]), int(sys.argv[2]))
