"""Speed of `mmssl.load(RUN).encode` on files, against what its parts cost.

    python tests/benchmarks/encode_speed.py [--clips 48] [--seconds 8] [--rounds 5]

The script makes its own files: H.264 at 25 frames/s with AAC, at 320 x 240 pixels. The parts: the
forward passes of all batches, ready in memory, on all cores (wall seconds; in one thread where that
is sooner, as on a busy machine); and reading, decoding and cutting of the same files in one thread
(processor seconds). Their bound is forward + decode / cores; `ratio` is the bound over the time
that `encode` takes. In every round the parts and the whole are measured one after the other, the
order turning; the medians count. On a GPU the bound is the forward alone. `work` is the processor
time of both parts, each in one thread, over that of `encode`: it tells what running them together
adds even on a machine that has other things to do, whose wall clock tells little. Weights are
random.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from data_tools.synth_media import RATE, write_clip
from mmssl import config
from mmssl.build import build_model
from mmssl.embed import sources
from mmssl.embed.ahead import cores
from mmssl.embed.model import EmbeddingModel
from mmssl.embed.sources import Row
from mmssl.embed.windows import Cutter, Piece, batched, collated
from mmssl.eval import results
from mmssl.eval.embed import frozen
from mmssl.types import Batch

T = TypeVar("T")
RUNS = {
    "quickstart": ("audio", "video"),
    "mmv_fac_tiny": ("audio", "video"),
    "audio/cola": ("audio",),
}
VOCABULARY, SPECIAL = 400, {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 4}
BATCH, FPS, SIZE, TARGET = 16, 25, (240, 320), 0.9


def make_clips(folder: Path, count: int, seconds: float) -> list[Path]:
    """Moving waves with noise of their own, each with a chord."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    paths = []
    for k in range(count):
        rng = np.random.default_rng(k)
        phase = np.arange(round(seconds * FPS))[:, None, None] / 5 + rng.uniform(0, 6)
        wave = 110 + 80 * np.sin(x / rng.uniform(6, 20) + phase) * np.cos(y / 9 - phase)
        frames = np.repeat(wave[..., None], 3, axis=-1)
        frames += rng.normal(0, 8, (1, *SIZE, 3))
        t = np.arange(round(seconds * RATE)) / RATE
        sound = sum(0.1 * np.sin(2 * np.pi * hz * t) for hz in rng.uniform(100, 4000, 5))
        paths.append(folder / f"clip-{k:03d}.mp4")
        write_clip(paths[-1], frames.clip(0, 255).astype(np.uint8), sound.astype("f4"), FPS)
    return paths


def prepared(model: EmbeddingModel, pieces: Sequence[Piece]) -> list[tuple[str, Batch]]:
    """The batches that `encode` makes of pieces."""
    device = next(model.model.parameters()).device
    views = {name: [p for p in pieces if p.view == name] for name in {p.view for p in pieces}}
    return [
        (name, collated(some, model.spec.views[name]).to(device))
        for name, held in sorted(views.items())
        for some in batched(held, BATCH)
    ]


def decoded(cutter: Cutter, rows: Sequence[Row]) -> list[Piece]:
    """Every window of every row, in this thread."""
    return [piece for k, row in enumerate(rows) for piece in cutter.pieces(k, row)]


def in_one_thread(work: Callable[[], T]) -> T:
    """A call without threads of torch's own: they wait for each other at the processor's cost."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(usual)


def timed(name: str, work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one call, and processor seconds of all its threads."""
    wall, core = time.perf_counter(), time.process_time()
    work()
    spent = {"s": time.perf_counter() - wall, "core_s": time.process_time() - core}
    return {f"{name}_{unit}": value for unit, value in spent.items()}


def measure(name: str, files: Sequence[Path], rounds: int, device: str) -> dict[str, Any]:
    """Medians of one model."""
    torch.manual_seed(0)
    model = EmbeddingModel(build_model(config.load(name), VOCABULARY, SPECIAL), None, device)
    modalities = RUNS[name]
    inputs = [dict.fromkeys(modalities, file) for file in files]
    space = model.default_space
    keys = model._spaces.keys([space])
    cutter = Cutter(
        {v: model._spaces.views[v] for v in set(keys.values())}, None, model._spaces.loose
    )
    rows = list(sources.rows(inputs))
    decode = partial(in_one_thread, partial(decoded, cutter, rows))
    batches = prepared(model, decode())

    def forward() -> None:
        with frozen([model.model]):
            for view, batch in batches:
                model._spaces.vectors(keys, True, view, batch)

    def whole() -> None:
        model.encode(inputs, batch_size=BATCH, space=space)

    works: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "single": partial(in_one_thread, forward),
        "decode": decode,
        "encode": whole,
    }
    found = []
    forward()
    for k in range(rounds):
        row: dict[str, float] = {}
        for part in (*works, *works)[k % len(works) :][: len(works)]:
            row |= timed(part, works[part])
        bound = min(row["forward_s"], row["single_s"])
        if device == "cpu":
            bound += row["decode_core_s"] / cores()
        work = (row["single_core_s"] + row["decode_core_s"]) / row["encode_core_s"]
        found.append({**row, "ratio": bound / row["encode_s"], "work": work})
    medians = {key: statistics.median(row[key] for row in found) for key in found[0]}
    return {
        "run": name,
        "modalities": list(modalities),
        "windows": sum(batch.size for _, batch in batches),
        "clips_per_s": len(files) / medians["encode_s"],
        "ratios": [row["ratio"] for row in found],
        **medians,
    }


def markdown(found: dict[str, Any]) -> str:
    """The table."""
    machine = found["machine"]
    lines = [
        "# Speed of encoding files",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['device']}; torch "
        f"{found['versions']['torch']}, {found['threads']} threads; {found['date']}; load of the "
        f"machine at the start {found['load']}.",
        f"{found['clips']} clips of {found['seconds']:g} s, H.264 {SIZE[1]} x {SIZE[0]} at {FPS} "
        f"frames/s with AAC; batches of {BATCH} windows; medians over {found['rounds']} rounds.",
        "",
        "| run | reads | windows | forward, s | in one thread, s | core s | decoding, core s "
        "| encode, s | core s | clips/s "
        f"| bound / encode (target {TARGET}) | of the rounds | work |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["runs"]:
        named = ("forward_s", "single_s", "single_core_s", "decode_core_s")
        named += ("encode_s", "encode_core_s")
        times = (row[key] for key in named)
        cells = [row["run"], " ".join(row["modalities"]), str(row["windows"])]
        cells += [*(f"{t:.2f}" for t in times), f"{row['clips_per_s']:.1f}"]
        cells += [f"**{row['ratio']:.2f}**", ", ".join(f"{r:.2f}" for r in row["ratios"])]
        lines.append(f"| {' | '.join(cells)} | {row['work']:.2f} |")
    bound = "forward + decoding / cores" if machine["device"] == "cpu" else "the forward alone"
    return "\n".join([*lines, "", f"Bound: {bound}. Weights are random.", ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write `encode_speed.json` and `encode_speed.md`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--clips", type=int, default=48)
    add("--seconds", type=float, default=8.0, help="length of a clip")
    add("--rounds", type=int, default=5)
    add("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    add("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    load = Path("/proc/loadavg").read_text().split()[0] if sys.platform == "linux" else "nan"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        files = make_clips(Path(folder), args.clips, args.seconds)
        runs = [measure(name, files, args.rounds, device) for name in args.runs]
    found = {
        "load": float(load),
        "date": datetime.now(UTC).date().isoformat(),
        "threads": torch.get_num_threads(),
        "clips": args.clips,
        "seconds": args.seconds,
        "rounds": args.rounds,
        "machine": results.machine(),
        "versions": results.versions(),
        "runs": runs,
    }
    results.write(found, args.out / "encode_speed.json")
    (args.out / "encode_speed.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
