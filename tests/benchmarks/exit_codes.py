"""Fifty two-process trainings in a row: do all end with exit code 0?

python tests/benchmarks/exit_codes.py [RUNS]      default 50; results/exit_codes.{md,json}
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import deepspeed
import torch

HERE = Path(__file__).parent
SCRIPT = HERE.parent / "dist" / "toy_run.py"


def one_run(folder: str, zero: int) -> int:
    """Exit code of a two-step, two-process training."""
    calls = json.dumps([{"folder": folder, "train": {"steps": 2, "zero": zero}}])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(SCRIPT), calls]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    return subprocess.run(command, env=env, capture_output=True, timeout=600).returncode


def main(runs: int = 50) -> None:
    """Run, print and write the table."""
    codes: Counter[int] = Counter()
    began = time.perf_counter()
    for i in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            codes[one_run(folder, zero=i % 4)] += 1
        print(f"{i + 1}/{runs}: {dict(codes)}", flush=True)
    seconds = (time.perf_counter() - began) / runs
    facts = {
        "runs": runs,
        "exit_codes": {str(code): count for code, count in sorted(codes.items())},
        "seconds_per_run": round(seconds, 1),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": platform.python_version(),
    }
    text = (
        "# Exit codes of two-process trainings\n\n"
        f"{runs} runs in a row, ZeRO 0, 1, 2, 3 in turn, gloo on CPU, two steps each "
        f"({seconds:.1f} s per run; torch {torch.__version__}, "
        f"DeepSpeed {deepspeed.__version__}).\n\n"
        "| exit code | runs |\n| --- | --- |\n"
        + "".join(f"| {code} | {count} |\n" for code, count in sorted(codes.items()))
    )
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "exit_codes.json").write_text(json.dumps(facts, indent=1) + "\n")
    (results / "exit_codes.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
