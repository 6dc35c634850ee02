"""What `mmssl plan` says against what training takes, on this CPU.

    python tests/benchmarks/plan.py [--runs NAME ...]

Every run is trained for two steps of the made-up batch by the training engine (one process, ZeRO
0, AdamW, fp32), in a fresh process for each batch size. Measured is the growth of its peak resident
memory (`ru_maxrss`) since before the model was made, that is what the operating system has handed
out; predicted is `mmssl.plan.memory` from a trace of as many rows, in a process of its own, too.
Small layers go first, so that libraries have loaded what they need. The C library returns each
freed block above 64 KB at once (MALLOC_MMAP_THRESHOLD_), as it otherwise keeps some for later.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmssl import config
from mmssl.check import fake_batch
from mmssl.eval import results
from mmssl.plan import memory
from mmssl.specs import RunSpec
from mmssl.trace import fake_model, sizes, traced
from mmssl.train.engine import Engine, session
from mmssl.train.weights import Average

LIMIT = 0.10
STEPS = 2
# name: file, overrides, batch sizes
RUNS: dict[str, tuple[str, list[str], tuple[int, ...]]] = {
    "flagship": ("avt/flagship", [], (4, 8)),
    "flagship, recomputed": ("avt/flagship", ["train.checkpoint_activations=true"], (8, 16)),
    "mae": ("general/mae", ["optim.ema=0.999"], (4, 16)),
    "bert": ("general/bert", [], (4, 16)),
}


def spec_of(name: str, rows: int) -> RunSpec:
    """The run at one batch size, in fp32."""
    file, overrides, _ = RUNS[name]
    fixed = ["train.precision=fp32", "train.zero=0", "train.accumulate=1", f"train.batch={rows}"]
    return config.load(file, [*overrides, *fixed])


def measure(name: str, rows: int) -> dict[str, float]:
    """Peak growth in bytes of three steps, and seconds of the last one."""
    spec = spec_of(name, rows)
    with session(threads=1) as device:
        _warm_up()
        before = psutil.Process().memory_info().rss
        assert before >= 0.9 * _peak(), "something large was freed before the measurement"
        torch.manual_seed(0)
        model = fake_model(spec, None)
        engine = Engine(model, spec.optim, spec.train, device)
        average = Average(model) if spec.optim.ema != 0 else None
        for step in range(STEPS):
            began = time.perf_counter()
            batch = fake_batch(spec, rows, missing=False)
            loss, _ = engine.forward(batch, step, spec.train.steps)
            engine.backward(loss)
            engine.step(1e-4)
            if average is not None:
                average.update(engine.model, 0.999)
        seconds = time.perf_counter() - began
        found = {"bytes": float(_peak() - before), "parameters": sizes(model).parameters}
        engine.close()
    return found | {"seconds": seconds}


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _warm_up() -> None:
    """Load the libraries' kernels: convolution, products, attention, an optimiser."""
    layers = torch.nn.Sequential(
        torch.nn.Conv1d(8, 8, 3),
        torch.nn.GELU(),
        torch.nn.TransformerEncoderLayer(62, 2, 64, batch_first=True),
    )
    optimizer = torch.optim.AdamW(layers.parameters())
    for _ in range(2):
        layers(torch.randn(2, 8, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def predict(name: str, rows: int) -> dict[str, float]:
    """The same by the formulas, and what the counting took."""
    spec, began = spec_of(name, rows), time.perf_counter()
    size = sizes(fake_model(spec, FakeTensorMode(allow_non_fake_inputs=True)))
    work = traced(spec, rows, fused=False)
    found = memory(spec, 0, 1, size, work)
    return {
        "bytes": found.peak,
        "parameters": size.parameters,
        "backward": found.backward,
        "step": found.step,
        "flops": work.flops,
        "seconds": time.perf_counter() - began,
    }


def fresh(what: str, name: str, rows: int) -> dict[str, float]:
    """One of the above in a process of its own."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    words = [sys.executable, __file__, "--one", what, name, str(rows)]
    done = subprocess.run(words, env=env, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(name: str, rows: int) -> dict[str, Any]:
    """A line of the table."""
    wanted, found = fresh("predict", name, rows), fresh("measure", name, rows)
    line = {
        "run": name,
        "file": RUNS[name][0],
        "overrides": RUNS[name][1],
        "rows": rows,
        "parameters_equal": wanted["parameters"] == found["parameters"],
        "parameters": found["parameters"],
        "predicted_bytes": wanted["bytes"],
        "predicted_backward": wanted["backward"],
        "predicted_step": wanted["step"],
        "measured_bytes": found["bytes"],
        "ratio": wanted["bytes"] / found["bytes"],
        "flops_per_row": wanted["flops"] / rows,
        "step_seconds": found["seconds"],
        "predict_seconds": wanted["seconds"],
    }
    print(f"{name}, {rows} rows: {line['ratio']:.3f}", file=sys.stderr, flush=True)
    return line


def markdown(found: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        "# `mmssl plan` against the operating system",
        "",
        f"{found['machine']['processor']}, torch {found['versions']['torch']}, deepspeed "
        f"{found['versions']['deepspeed']}, one process, one thread, ZeRO 0, AdamW, fp32; "
        f"{found['date']}. Growth of the peak resident memory in two steps; limit: within "
        f"{LIMIT:.0%}. The larger of the two phases counts, in italics where it is the step.",
        "",
        "| run | rows | parameters, both | predicted MB | measured MB | ratio | within "
        "| GFLOP/row | s/step | s to predict |",
        "|---" * 10 + "|",
    ]
    for r in found["lines"]:
        predicted = f"{r['predicted_bytes'] / 1e6:.0f}"
        if r["predicted_step"] > r["predicted_backward"]:
            predicted = f"*{predicted}*"
        equal = f"{r['parameters']:,}" if r["parameters_equal"] else "differ"
        within = "yes" if abs(r["ratio"] - 1) <= LIMIT else "no"
        lines.append(
            f"| {r['run']} | {r['rows']} | {equal} | {predicted} | {r['measured_bytes'] / 1e6:.0f} "
            f"| {r['ratio']:.3f} | {within} | {r['flops_per_row'] / 1e9:.1f} "
            f"| {r['step_seconds']:.1f} | {r['predict_seconds']:.1f} |"
        )
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write `plan.json` and `plan.md`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    if args.one:
        what, name, rows = args.one
        print(json.dumps({"predict": predict, "measure": measure}[what](name, int(rows))))
        return
    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": results.machine(),
        "versions": results.versions(),
        "lines": [compare(name, rows) for name in args.runs for rows in RUNS[name][2]],
    }
    results.write(found, args.out / "plan.json")
    (args.out / "plan.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
