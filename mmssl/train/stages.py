"""`mmssl train` of a file with `stages`.

OUT/STAGE/stage.json           what the stage was made from, and whether it is finished
OUT/STAGE/labels.safetensors   of a stage that labels; its clusterings lie beside it
OUT/STAGE/...                  of a stage that trains: a run folder

The same command again leaves finished stages alone and goes on with an interrupted one.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from mmssl import dist
from mmssl.signals import SIGNALS, leave
from mmssl.stages import LABELS, Stage, about, is_staged, plan
from mmssl.train import run
from mmssl.train.commit import write_text
from mmssl.train.engine import session
from mmssl.types import UserError

MARK = "stage.json"
_POLL_S = 1.0


def main(file: str, overrides: Sequence[str] = ()) -> int:
    """Train a run or a method, or do all stages of a file that are not finished.

    Returns the exit code, see `run.main`.

    Raises:
        UserError: see `run.main` and `stages.plan`; also a folder that holds another stage, or a
            labelling that failed.
    """
    if not is_staged(file):
        return run.main(file, overrides)
    stages = plan(file, overrides)
    with session() as device:
        threads = torch.get_num_threads()
        dist.on_rank0(lambda: _check_marks(stages))
        for stage in stages:
            if dist.on_rank0(partial(_begin, stage)):
                continue
            with about(stage.place):
                if stage.run is None:
                    _label(stage)
                else:
                    torch.set_num_threads(stage.run.train.threads or threads)
                    if code := run.start(stage.run, device):
                        return code
            dist.on_rank0(partial(_mark, stage, finished=True))
    return 0


def _label(stage: Stage) -> None:
    """Label on rank 0, in a process of its own; no collective waits, as that may take hours."""
    if dist.rank() == 0:
        assert stage.label is not None
        gc.collect()
        torch.cuda.empty_cache()  # the labelling shares this rank's device
        words = [stage.label.shards, stage.folder / LABELS]
        for key, value in stage.label.model_dump(exclude={"shards"}).items():
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{key.replace('_', '-')}={text}"] if text else []
        done = subprocess.run([sys.executable, "-m", "data_tools.label_shards", *map(str, words)])
        if -done.returncode in SIGNALS:  # sent to all processes, and did not reach this one yet
            leave()
        if done.returncode:
            raise UserError(f"labelling ended with exit status {done.returncode}, see above")
        _mark(stage, finished=True)
    while not _read(stage)["finished"]:
        time.sleep(_POLL_S)


# ---------------------------------------------------------------- marks


def _check_marks(stages: Sequence[Stage]) -> None:
    """Refuses folders of stages that were made from something else."""
    for i, stage in enumerate(stages):
        mark = _read(stage)
        if mark and mark["digest"] != stage.digest:
            odd = _difference(mark["arguments"], stage.arguments) or "an earlier stage was another"
            later = " ".join(str(s.folder) for s in stages[i:] if s.folder.exists())
            raise UserError(
                f"{stage.place}: {stage.folder} was made otherwise ({odd}); choose another folder "
                f"with out=..., or remove {later} to do these stages again"
            )


def _begin(stage: Stage) -> bool:
    """True for a finished stage; others are announced and get their folder and mark."""
    finished = bool(_read(stage).get("finished"))
    does = "is finished" if finished else "labels" if stage.label else "trains"
    print(f"stage {stage.name} {does} -> {stage.folder}", flush=True)
    if not finished:
        stage.folder.mkdir(parents=True, exist_ok=True)
        _mark(stage, finished=False)
    return finished


def _mark(stage: Stage, finished: bool) -> None:
    facts = {"finished": finished, "digest": stage.digest, "arguments": stage.arguments}
    write_text(stage.folder / MARK, json.dumps(facts, indent=1))


def _read(stage: Stage) -> dict[str, Any]:
    path = stage.folder / MARK
    try:
        found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: is damaged: {error}; remove {stage.folder}") from error
    return found


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The keys that differ, with both values."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    texts = [f"{key} was {before.get(key)}, is {after.get(key)}" for key in keys]
    return "; ".join(texts[:4]) + ("; ..." if len(texts) > 4 else "")


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
