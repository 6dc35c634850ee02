"""R10: a full disk costs no checkpoint that was written before.

    unshare -Urm python disks.py COUNT SEED

On a small file system of its own the toy has a checkpoint of step 2. Then the disk is filled up to
a random rest, less than a checkpoint takes, and the run goes on: it stops with a clear message, or
(`train.on_save_error: continue`) trains on and saves again as soon as there is room.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "dist"))

import toy_run
from faults.report import Outcome, collect, heard, tell
from launching import settings_of

from mmssl.train import checkpoint, commit
from mmssl.train.engine import session

SIZE = 64 << 20
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def possible() -> bool:
    """Whether this machine lets us mount a file system of our own."""
    if shutil.which("unshare") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", folder]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Ballast:
    """A file that leaves so much room."""

    def __init__(self, disk: Path, room: int) -> None:
        self.file = disk / "ballast"
        with self.file.open("wb") as file:
            block = bytes(1 << 12)
            for _ in range(max(0, shutil.disk_usage(disk).free - room) // len(block)):
                file.write(block)


class Tidying(toy_run.ToyLoader):
    """Makes room at the fifth step."""

    ballast: Ballast

    def __next__(self) -> Any:
        if self.position == 4:
            self.ballast.file.unlink(missing_ok=True)
        return super().__next__()


def attempt(disk: Path, rng: random.Random, policy: str, device: Any) -> bool:
    """Whether nothing was lost, and the run ended as the policy says."""
    folder = disk / "run"
    common = {"keep_last": 0, "log_every": 1, "save_every": 2, "on_save_error": policy}
    toy_run.run(device, str(folder), train={**common, "steps": 2})
    first = checkpoint.newest(folder)
    assert first is not None
    before = (first / commit.MANIFEST).read_bytes()
    needed = sum(file.stat().st_size for file in first.rglob("*") if file.is_file())
    ballast = Ballast(disk, rng.randrange(int(0.9 * needed)))
    said = ""
    if policy == "continue":
        Tidying.ballast, loader = ballast, toy_run.ToyLoader
        toy_run.ToyLoader = Tidying  # type: ignore[misc]
    try:
        toy_run.run(device, str(folder), train={**common, "steps": 8})
    except commit.NotSavedError as error:
        said = str(error)
    finally:
        if policy == "continue":
            toy_run.ToyLoader = loader  # type: ignore[misc]
    ballast.file.unlink(missing_ok=True)
    intact = not commit.problem(first) and (first / commit.MANIFEST).read_bytes() == before
    steps = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    after = ["step-00000002", "step-00000006", "step-00000008"]
    if policy == "stop":
        ended = (
            steps == after[:1]
            and "step-00000004: not saved" in said
            and " MB are free there" in said
        )
    else:
        ended = steps == after and not said
    toy_run.run(device, str(folder), train={**common, "steps": 8})
    finished = checkpoint.newest(folder)
    return intact and ended and finished is not None and finished.name == after[-1]


def inside(count: int, seed: int) -> None:
    """In a namespace of its own: print the cases."""
    rng = random.Random(seed)

    def cases() -> Iterator[tuple[str, bool]]:
        for i in range(count):
            policy = ("stop", "continue")[i % 2]
            held = attempt(disk, rng, policy, device)
            yield f"full disk of 64 MB while saving, on_save_error: {policy}", held
            shutil.rmtree(disk / "run")

    with tempfile.TemporaryDirectory() as name, session(threads=1) as device:
        disk = Path(name)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", name]
        subprocess.run(mount, check=True)
        found = collect("R10", cases())
        subprocess.run(["umount", name], check=True)
    tell(found)


def run(count: int, seed: int) -> list[Outcome]:
    """`count` times a full disk."""
    command = [*NAMESPACE, sys.executable, __file__, str(count), str(seed)]
    done = subprocess.run(command, text=True, capture_output=True, check=False, env=settings_of())
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return heard(done.stdout)


if __name__ == "__main__":
    inside(int(sys.argv[1]), int(sys.argv[2]))
