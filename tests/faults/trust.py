"""R11: nothing in a run folder or an imported checkpoint runs code; broken headers are refused.

Every payload would leave a mark if it were executed. It is put into each file that a resume, an
evaluation or an import reads, with a manifest that vouches for it, as an attacker would.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "dist"))

import numpy as np
import torch
import toy_run
from faults.report import Outcome, collect

from mmssl.data.loader import load_state
from mmssl.data.sidecars import SideCar
from mmssl.interop.huggingface import import_main
from mmssl.train import checkpoint, commit
from mmssl.train.engine import Engine, session
from mmssl.types import UserError


class Call:
    """Unpickles to a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.what = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.what


def payloads(mark: Path) -> dict[str, Any]:
    """Objects that touch `mark` when a trusting reader builds them."""
    import builtins
    import functools
    import importlib
    import operator
    import runpy
    import subprocess

    script = mark.with_name("script.py")
    source = f"open({str(mark)!r}, 'w').close()"
    script.write_text(source)
    shell = f"touch {mark}"
    inner = pickle.dumps(Call(os.system, shell))
    return {
        "os.system": Call(os.system, shell),
        "os.popen": Call(os.popen, shell),
        "subprocess.call": Call(subprocess.call, ["touch", str(mark)]),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(mark)]),
        "exec": Call(builtins.exec, source),
        "eval": Call(builtins.eval, source),
        "open for writing": Call(builtins.open, str(mark), "w"),
        "__import__": Call(builtins.__import__, "antigravity"),
        "importlib": Call(importlib.import_module, "this"),
        "runpy": Call(runpy.run_path, str(script)),
        "pickle.loads": Call(pickle.loads, inner),
        "partial": Call(functools.partial, os.system, shell),
        "methodcaller": Call(operator.methodcaller, "touch"),
        "torch.load": Call(torch.load, str(script), None),
        "shutil.copy": Call(shutil.copy, str(script), str(mark)),
    }


def put(file: Path, value: Any, archive: bool) -> None:
    """Write a hostile file, and have the manifest beside or above it vouch for it."""
    if archive:
        torch.save({"module": value, "loader": value}, file)
    else:
        file.write_bytes(pickle.dumps(value))
    folder = next((p for p in file.parents if (p / commit.MANIFEST).is_file()), None)
    if folder is not None:
        path = folder / commit.MANIFEST
        manifest = json.loads(path.read_text())
        entry = {"size": file.stat().st_size, "crc32c": commit.crc32c(file)}
        manifest["files"][file.relative_to(folder).as_posix()] = entry
        path.write_text(json.dumps(commit.sealed(manifest)))


def refused(work: Callable[[], object], mark: Path) -> bool:
    """`work` ends with a clear refusal, and nothing was executed."""
    try:
        work()
    except UserError:
        return not mark.exists()
    except Exception as error:
        print(f"not refused but failed: {error!r}")
    return False


def entries(run: Path, folder: Path, device: Any) -> Iterator[tuple[str, Path, Callable[[], Any]]]:
    """What is read, its file, and how it is read."""
    newest = checkpoint.newest(run)
    assert newest is not None
    shards = sorted((newest / "deepspeed").glob("*.pt"))

    def resume() -> None:
        toy_run.run(device, str(run), train={"zero": 1, "steps": 4})

    def resume_elsewhere() -> None:
        spec = toy_run.toy_spec(train={"zero": 1})
        engine = Engine(toy_run.ToyModel(), spec.optim, spec.train, device)
        with contextlib.closing(engine):
            engine.load(newest / "deepspeed", ranks=2)

    for shard in shards:
        kind = "optimiser" if "optim" in shard.name else "model"
        yield f"DeepSpeed's {kind} states", shard, resume
        yield f"DeepSpeed's {kind} states, other ranks", shard, resume_elsewhere
    yield "a rank's state", newest / "ranks" / "00000.pt", resume
    yield "weights", newest / checkpoint.WEIGHTS, lambda: checkpoint.load_weights(run)
    loader = folder / "loader.pt"
    yield "a loader's state", loader, lambda: load_state(loader)
    labels = folder / "labels.safetensors"
    yield "a side-car of labels", labels, lambda: SideCar(labels)
    theirs = folder / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps({"model_type": "bert"}))
    weights, out = theirs / "pytorch_model.bin", str(folder / "imported")
    yield "transformers' .bin", weights, lambda: import_main(str(theirs), out, [])


def pickles(seed: int, device: Any) -> Iterator[tuple[str, bool]]:
    with tempfile.TemporaryDirectory() as name:
        folder, mark = Path(name), Path(name, "executed")
        run, clean = folder / "run", folder / "clean"
        toy_run.run(device, str(clean), train={"zero": 1, "steps": 2, "save_every": 2})
        shutil.copytree(clean, run)
        for what, file, read in entries(run, folder, device):
            for value in payloads(mark).values():
                for archive in (True, False):
                    put(file, value, archive)
                    yield f"pickles in {what}", refused(read, mark)
            shutil.rmtree(run)
            shutil.copytree(clean, run)
        array = folder / "labels.safetensors"
        with array.open("wb") as out:
            np.save(out, np.array([Call(os.system, f"touch {mark}")], object), allow_pickle=True)
        yield "npy with objects", refused(lambda: SideCar(array), mark)


def headers(count: int, seed: int) -> Iterator[tuple[str, bool]]:
    """Safetensors whose header lies."""
    rng = random.Random(seed)
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    lies: list[dict[str, Any] | list[int] | str] = [
        {"x": {**entry, "data_offsets": [0, 1 << 40]}},
        {"x": {**entry, "data_offsets": [16, 0]}},
        {"x": {**entry, "data_offsets": [-16, 0]}},
        {"x": {**entry, "shape": [1 << 40]}},
        {"x": {**entry, "shape": [-4]}},
        {"x": {**entry, "dtype": "object"}},
        {"x": {**entry, "shape": "4"}},
        {"x": entry, "y": entry},
        {"x": {"dtype": "F32"}},
        [1, 2],
        "{",
        "",
    ]
    with tempfile.TemporaryDirectory() as name:
        file, mark = Path(name, "x.safetensors"), Path(name, "executed")
        for i in range(count):
            lie = lies[i % len(lies)]
            text = (lie if isinstance(lie, str) else json.dumps(lie)).encode()
            length = len(text) if i < len(lies) else rng.randrange(1 << 63)
            file.write_bytes(struct.pack("<Q", length) + text + bytes(16))
            weights = refused(lambda: checkpoint.load_weights(file), mark)
            yield "malformed safetensors headers", weights and refused(lambda: SideCar(file), mark)


def run(count: int, seed: int) -> list[Outcome]:
    """All payloads in all files, and `count` malformed headers."""

    def cases() -> Iterator[tuple[str, bool]]:
        with session(threads=1) as device:
            yield from pickles(seed, device)
        yield from headers(count, seed)

    return collect("R11", cases())
