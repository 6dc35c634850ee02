"""Speed of the flagship's training step and of video decoding.

    python tests/benchmarks/throughput.py [--clips DIR] [--sizes tiny base] [--steps 5]

Training: forward, backward and AdamW step of the flagship in fp32 on made-up batches, at `tiny`
(the run of the quickstart) and `base` (width 768, 12 layers, 16 frames of 224 pixels). FLOPs are
counted by torch; the utilisation is the share of the best matrix product on the same machine.
Decoding: all frames of the same clips by PyAV, decord and the `ffmpeg` command line, one thread
each. --clips is a folder of mp4 files; without it 40 clips of the built-in corpus are made.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmssl import config
from mmssl.build import build_model
from mmssl.data import media
from mmssl.data.backends import BACKENDS, Picked
from mmssl.eval import results
from mmssl.specs import RunSpec, ViewSpec
from mmssl.train.flops import peak_flops
from mmssl.types import Batch, ViewBatch

RUNS = {"tiny": "configs/runs/quickstart.yaml", "base": "configs/runs/flagship_base.yaml"}
ROWS = {"tiny": 32, "base": 2}
VOCABULARY, SPECIAL = 400, {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 4}


# --- training


def flagship(size: str) -> RunSpec:
    """The run of a size, without activation checkpointing (it would count work twice)."""
    return config.load(RUNS[size], ["train.checkpoint_activations=false"])


def fake_batch(spec: RunSpec, rows: int) -> Batch:
    """Random views of full length; every row has everything."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(rows)
    views = {name: _fake_view(view, rows, generator) for name, view in spec.views.items()}
    return Batch(views, [str(i) for i in range(rows)], index, index + 1, index)


def _fake_view(view: ViewSpec, rows: int, generator: torch.Generator) -> ViewBatch:
    if view.modality == "text":
        data = torch.randint(5, VOCABULARY, (rows, view.length), generator=generator)
    elif view.modality == "audio":
        data = 0.1 * torch.randn(rows, round(view.crop_s * view.hz), generator=generator)
    else:
        shape = (rows, round(view.crop_s * view.fps), view.size, view.size, 3)
        data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    rate = {"text": 0.0, "audio": float(view.hz), "video": view.fps}[view.modality]
    return ViewBatch(
        modality=view.modality,
        data=data,
        lengths_P=torch.full((rows,), data.shape[1]),
        rows_P=torch.arange(rows),
        slots_P=torch.zeros(rows, dtype=torch.int64),
        seeds_P=torch.arange(rows),
        start_s_P=torch.zeros(rows, dtype=torch.float64),
        present_BL=torch.ones(rows, 1, dtype=torch.bool),
        rate=rate,
    )


def train_speed(size: str, steps: int) -> dict[str, Any]:
    """Rates of the training step, the first one (which warms caches up) left out."""
    torch.manual_seed(0)
    spec = flagship(size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(spec, VOCABULARY, SPECIAL).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = fake_batch(spec, ROWS[size]).to(device)

    def step() -> None:
        optimizer.zero_grad()
        model(batch, 0, 100)[0].backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step()
    seconds = timed(step, steps)
    flops, peak = counter.get_total_flops(), peak_flops(device, torch.float32)
    return {
        "size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": ROWS[size],
        "tokens_per_row": model.last_tokens / ROWS[size],
        "steps": steps,
        "seconds_per_step": seconds,
        "samples_per_s": ROWS[size] / seconds,
        "tokens_per_s": model.last_tokens / seconds,
        "gflop_per_row": flops / ROWS[size] / 1e9,
        "gflops": flops / seconds / 1e9,
        "peak_gflops": peak / 1e9,
        "flop_utilisation": flops / seconds / peak,
        "resident_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def timed(work: Callable[[], object], times: int) -> float:
    """Mean seconds of a call."""
    begin = time.perf_counter()
    for _ in range(times):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / times


# --- decoding


def decode_speed(files: Sequence[Path], repeats: int = 3) -> list[dict[str, Any]]:
    """Rates of every decoder over all files."""
    contents = [path.read_bytes() for path in files]
    frames = sum(_library("pyav", data) for data in contents)
    work: dict[str, Callable[[], object]] = {
        "PyAV": lambda: [_library("pyav", data) for data in contents],
        "decord": lambda: [_library("decord", data) for data in contents],
    }
    if shutil.which("ffmpeg"):
        work["ffmpeg, one process per clip"] = lambda: [_ffmpeg(["-i", str(f)]) for f in files]
        work["ffmpeg, one process for all"] = lambda: _ffmpeg_list(files)
    else:
        print("no ffmpeg on this machine: its rows are left out", file=sys.stderr)
    return [_rate(name, call, len(files), frames, repeats) for name, call in work.items()]


def _rate(
    name: str, work: Callable[[], object], clips: int, frames: int, repeats: int
) -> dict[str, Any]:
    """Clips per second of wall clock and of processor time, the best of several passes."""
    walls, works = [], []
    work()
    for _ in range(repeats):
        wall, busy = time.perf_counter(), _busy()
        work()
        walls.append(time.perf_counter() - wall)
        works.append(_busy() - busy)
    return {
        "decoder": name,
        "clips_per_s": clips / min(walls),
        "frames_per_s": frames / min(walls),
        "clips_per_cpu_s": clips / min(works),
    }


def _busy() -> float:
    """Processor seconds of this process and of those it has waited for."""
    parts = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)


def _library(name: str, data: bytes) -> int:
    """Frames of a clip as RGB arrays at the stored size."""
    with media.opened(data) as container:
        header = media.read_header(container)
        track = media.read_tracks(container, True, False, media.Limits())["video"]
        job = Picked(data, header, track, range(len(track.shown)), 0)
        return len(BACKENDS[name](job)[0])


def _ffmpeg(source: Sequence[str]) -> None:
    """Decode to RGB and drop the frames."""
    sink = ["-map", "0:v:0", "-vf", "format=rgb24", "-f", "null", "-"]
    command = ["ffmpeg", "-v", "error", "-threads", "1", *source, "-filter_threads", "1", *sink]
    subprocess.run(command, check=True, capture_output=True)


def _ffmpeg_list(files: Sequence[Path]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listing:
        listing.writelines(f"file '{path.resolve()}'\n" for path in files)
        listing.flush()
        _ffmpeg(["-f", "concat", "-safe", "0", "-i", listing.name])


def built_in_clips(folder: Path, count: int = 40) -> list[Path]:
    """Clips of the built-in corpus."""
    from data_tools.synth import generate_bouncing

    generate_bouncing(folder, {"test": count}, 0, 1)
    return sorted((folder / "media" / "test").glob("*.mp4"))


# --- tables


def markdown(found: dict[str, Any]) -> str:
    """The tables for people."""
    machine, versions = found["machine"], found["versions"]
    lines = [
        "# Throughput",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['device']}; torch "
        f"{versions['torch']}, {found['threads']} threads, av {versions['av']}, decord "
        f"{versions['decord']}; load of the machine at the start {found['load']:.1f}.",
        "",
        "## Training step of the flagship, fp32 (made-up batches, no loader)",
        "",
        "| size | parameters | rows | tokens/row | s/step | samples/s | tokens/s | GFLOP/row "
        "| GFLOP/s | peak | utilisation | resident GB |",
        "|---" * 12 + "|",
    ]
    lines += [
        f"| {r['size']} | {r['parameters'] / 1e6:.2f} M | {r['rows']} | {r['tokens_per_row']:.0f} "
        f"| {r['seconds_per_step']:.2f} | {r['samples_per_s']:.2f} | {r['tokens_per_s']:.0f} "
        f"| {r['gflop_per_row']:.1f} | {r['gflops']:.0f} | {r['peak_gflops']:.0f} "
        f"| {r['flop_utilisation']:.2f} | {r['resident_gb']:.1f} |"
        for r in found["training"]
    ]
    lines += [
        "",
        "Peak: the best square fp32 matrix product on the same machine, just after the steps.",
        "",
        f"## Decoding all frames of {found['clips']['count']} clips to RGB, one thread",
        "",
        f"{found['clips']['what']}.",
        "",
        "| decoder | clips/s | frames/s | clips per processor second |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['decoder']} | {r['clips_per_s']:.1f} | {r['frames_per_s']:.0f} "
        f"| {r['clips_per_cpu_s']:.1f} |"
        for r in found["decoding"]
    ]
    return "\n".join(lines) + "\n"


def describe(path: Path, own: bool) -> str:
    """What the clips are."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        kind = (
            f"{stream.codec_context.name} {stream.width} x {stream.height}, {stream.frames} frames"
        )
    return f"{'Built-in corpus' if own else 'Clips of --clips'}, {kind} (the first one)"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write `throughput.json` and `throughput.md`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clips", type=Path, help="folder of mp4 files")
    parser.add_argument("--sizes", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--steps", type=int, default=5, help="timed steps at tiny; base takes one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    load = Path("/proc/loadavg").read_text().split()[0] if sys.platform == "linux" else "nan"
    with tempfile.TemporaryDirectory() as folder:
        own = args.clips is None
        files = built_in_clips(Path(folder)) if own else sorted(args.clips.rglob("*.mp4"))[:40]
        if not files:
            parser.error(f"{args.clips}: no mp4 files")
        found: dict[str, Any] = {
            "load": float(load),
            "clips": {"count": len(files), "what": describe(files[0], own)},
            "decoding": decode_speed(files),
        }
    found["training"] = [train_speed(s, args.steps if s == "tiny" else 1) for s in args.sizes]
    found |= {"threads": torch.get_num_threads(), "machine": results.machine()}
    found["versions"] = results.versions()
    results.write(found, args.out / "throughput.json")
    (args.out / "throughput.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
