"""Speed of the flagship's training step, of its loader and of video decoding.

    python tests/benchmarks/throughput.py [--clips DIR] [--shards DIR] [--sizes tiny base]

Training: forward, backward and AdamW step of the flagship in fp32 on made-up batches, at `tiny`
(the run of the quickstart) and `base` (width 768, 12 layers, 16 frames of 224 pixels). FLOPs are
counted by torch; the utilisation is the share of the best matrix product on the same machine.
Loader: the training step of `tiny` through the engine, in turns on batches kept in memory and on
batches from the loader with 2 workers; the ratio is the median over the rounds. --shards is a
folder with `train` and `tokenizer.model` as the quickstart leaves it; without it a small one is
made.
Decoding: all frames of the same clips by PyAV, decord and the `ffmpeg` command line, one thread
each. --clips is a folder of mp4 files; without it 40 clips of the built-in corpus are made.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import av
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmssl import config
from mmssl.build import build_model
from mmssl.data import media
from mmssl.data.backends import BACKENDS, Picked
from mmssl.data.loader import train_loader
from mmssl.data.text import Tokenizer
from mmssl.eval import results
from mmssl.specs import RunSpec, ViewSpec
from mmssl.train.engine import Engine, session
from mmssl.train.flops import peak_flops
from mmssl.types import Batch, ViewBatch

RUNS = {"tiny": "configs/runs/quickstart.yaml", "base": "configs/runs/flagship_base.yaml"}
ROWS = {"tiny": 32, "base": 2}
PARTS = ("decoding", "loader", "training")
WORKERS = 2
KEPT = 8  # batches in memory
# Steps that are not timed: 2 workers hold 2 batches each in advance, which would make the first
# steps with the loader cheap, and filling them up again the first steps without it dear.
LEAD_IN = 2 * WORKERS + 2
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


# --- loader


def loader_speed(shards: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Steps on batches in memory and from the loader, in turns within one process.

    Args:
        shards: folder that holds `train` and `tokenizer.model`.
        rounds: how often both are measured.
        steps: timed steps of each in a round.
    """
    tokenizer = Tokenizer.load(shards / "tokenizer.model")
    spec = config.load(RUNS["tiny"], [f"data.train={shards / 'train'}", f"data.workers={WORKERS}"])
    with session(spec.train.threads) as device:
        torch.manual_seed(0)
        model = build_model(spec, tokenizer.vocab_size, tokenizer.special)
        engine = Engine(model.train(), spec.optim, spec.train, device)
        loader = train_loader(spec.data, spec.views, spec.train.batch, 0, 0, 1, tokenizer)
        try:
            found = _alternate(engine, loader, rounds, steps)
        finally:
            loader.close()
            engine.close()
    ratios = [with_loader / alone for alone, with_loader in found["rounds"]]
    return {
        "workers": WORKERS,
        "batch": spec.train.batch,
        "steps": steps,
        "preloaded_s": statistics.median(alone for alone, _ in found["rounds"]),
        "loader_s": statistics.median(seconds for _, seconds in found["rounds"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "data_wait": statistics.median(found["waits"]),
        "data_waits": found["waits"],
        "batch_in_one_process_s": _alone(spec, tokenizer),
    }


def _alternate(
    engine: Engine, loader: Iterator[Batch], rounds: int, steps: int
) -> dict[str, list[Any]]:
    """Seconds per step (preloaded, with the loader) and share of waiting, by round."""
    kept = [next(loader) for _ in range(KEPT)]
    waited: list[float] = []

    def step(batch: Batch) -> None:
        loss, _ = engine.forward(batch.to(engine.device), 0, 100)
        engine.backward(loss)
        engine.step(1e-4)

    def preloaded(k: int) -> None:
        step(kept[k % KEPT])

    def loaded(_: int) -> None:
        begin = time.perf_counter()
        batch = next(loader)
        waited.append(time.perf_counter() - begin)
        step(batch)

    pairs, shares = [], []
    for _ in range(rounds):
        pair = (_seconds_per_step(preloaded, steps), _seconds_per_step(loaded, steps))
        pairs.append(pair)
        shares.append(sum(waited[-steps:]) / (pair[1] * steps))
    return {"rounds": pairs, "waits": shares}


def _seconds_per_step(work: Callable[[int], object], steps: int) -> float:
    for k in range(LEAD_IN):
        work(k)
    numbers = itertools.count()
    return timed(lambda: work(next(numbers)), steps)


def _alone(spec: RunSpec, tokenizer: Tokenizer, batches: int = 3) -> float:
    """Seconds in which one process makes a batch with nothing else to do."""
    data = spec.data.model_copy(update={"workers": 0})
    loader = train_loader(data, spec.views, spec.train.batch, 0, 0, 1, tokenizer)
    try:
        next(loader)
        return timed(lambda: next(loader), batches)
    finally:
        loader.close()


@contextmanager
def shards_of(given: Path | None, clips: int = 320) -> Iterator[Path]:
    """The shards of the quickstart, or a small part of them made for the occasion."""
    if given is not None:
        yield given
        return
    from data_tools.make_shards import make_shards
    from data_tools.synth import generate_bouncing
    from data_tools.train_tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        corpus, shards = Path(folder) / "corpus", Path(folder) / "shards"
        generate_bouncing(corpus, {"train": clips}, 0, WORKERS)
        make_shards(corpus, shards, workers=WORKERS)
        train_tokenizer(shards / "train", shards / "tokenizer.model")
        yield shards


# --- decoding


def decode_speed(files: Sequence[Path], repeats: int = 3) -> list[dict[str, Any]]:
    """Rates of every decoder over all files."""
    contents = [path.read_bytes() for path in files]
    frames = sum(_library("pyav", data) for data in contents)
    work: dict[str, tuple[bool, Callable[[], object]]] = {
        "PyAV": (True, lambda: [_library("pyav", data) for data in contents]),
        "decord": (_there("decord"), lambda: [_library("decord", data) for data in contents]),
        "ffmpeg, one process per clip": (
            shutil.which("ffmpeg") is not None,
            lambda: [_ffmpeg(["-i", str(f)]) for f in files],
        ),
        "ffmpeg, one process for all": (
            shutil.which("ffmpeg") is not None,
            lambda: _ffmpeg_list(files),
        ),
    }
    return [
        {"decoder": name, "missing": not there}
        | (_rate(call, len(files), frames, repeats) if there else {})
        for name, (there, call) in work.items()
    ]


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _rate(work: Callable[[], object], clips: int, frames: int, repeats: int) -> dict[str, Any]:
    """Clips per second of wall clock and of processor time, the best of several passes."""
    walls, works = [], []
    work()
    for _ in range(repeats):
        wall, busy = time.perf_counter(), _busy()
        work()
        walls.append(time.perf_counter() - wall)
        works.append(_busy() - busy)
    return {
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
    """The tables for people; parts that were not measured are left out."""
    machine, versions = found["machine"], found["versions"]
    ffmpeg = found["ffmpeg"] or "no ffmpeg"
    lines = [
        "# Throughput",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['device']}; torch "
        f"{versions['torch']}, {found['threads']} threads, av {versions['av']}, decord "
        f"{versions['decord']}, {ffmpeg}; {found['date']}; load of the machine at the start "
        f"{found['load']:.1f}.",
        "",
    ]
    sections = {"training": _training, "loader": _loader, "decoding": _decoding}
    blocks = [section(found) for name, section in sections.items() if name in found]
    return "\n".join([*lines, *(line for block in blocks for line in [*block, ""])])


def _training(found: dict[str, Any]) -> list[str]:
    return [
        "## Training step of the flagship, fp32 (made-up batches, no loader)",
        "",
        "| size | parameters | rows | tokens/row | s/step | samples/s | tokens/s | GFLOP/row "
        "| GFLOP/s | peak | utilisation | resident GB |",
        "|---" * 12 + "|",
        *(
            f"| {r['size']} | {r['parameters'] / 1e6:.2f} M | {r['rows']} "
            f"| {r['tokens_per_row']:.0f} | {r['seconds_per_step']:.2f} "
            f"| {r['samples_per_s']:.2f} | {r['tokens_per_s']:.0f} | {r['gflop_per_row']:.1f} "
            f"| {r['gflops']:.0f} | {r['peak_gflops']:.0f} | {r['flop_utilisation']:.2f} "
            f"| {r['resident_gb']:.1f} |"
            for r in found["training"]
        ),
        "",
        "Peak: the best square fp32 matrix product on the same machine, just after the steps.",
    ]


def _loader(found: dict[str, Any]) -> list[str]:
    r = found["loader"]
    ratios = ", ".join(f"{value:.2f}" for value in r["ratios"])
    return [
        f"## Step of `tiny` with the loader ({r['workers']} workers, batch {r['batch']})",
        "",
        "| batches in memory, s/step | with the loader, s/step | ratio (target <= 1.25) "
        "| share of waiting for data (target <= 0.05) |",
        "|---" * 4 + "|",
        f"| {r['preloaded_s']:.3f} | {r['loader_s']:.3f} | {r['ratio']:.2f} "
        f"| {r['data_wait']:.3f} |",
        "",
        f"Medians over {len(r['ratios'])} rounds of {r['steps']} steps of either kind in turn, in "
        f"one process; ratios of the rounds: {ratios}. One process with nothing else to do makes "
        f"a batch in {r['batch_in_one_process_s']:.2f} s.",
    ]


def _decoding(found: dict[str, Any]) -> list[str]:
    return [
        f"## Decoding all frames of {found['clips']['count']} clips to RGB, one thread",
        "",
        f"{found['clips']['what']}.",
        "",
        "| decoder | clips/s | frames/s | clips per processor second |",
        "|---|---|---|---|",
        *(
            f"| {r['decoder']} | not on this machine | - | - |"
            if r["missing"]
            else f"| {r['decoder']} | {r['clips_per_s']:.1f} | {r['frames_per_s']:.0f} "
            f"| {r['clips_per_cpu_s']:.1f} |"
            for r in found["decoding"]
        ),
    ]


def describe(path: Path, own: bool) -> str:
    """What the clips are."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        kind = (
            f"{stream.codec_context.name} {stream.width} x {stream.height}, {stream.frames} frames"
        )
    return f"{'Built-in corpus' if own else 'Clips of --clips'}, {kind} (the first one)"


def ffmpeg_version() -> str | None:
    """The first words of `ffmpeg -version`, None without the command."""
    if not shutil.which("ffmpeg"):
        return None
    done = subprocess.run(["ffmpeg", "-version"], check=True, capture_output=True, text=True)
    return " ".join(done.stdout.split()[:3])


def decoding(clips: Path | None) -> dict[str, Any]:
    """Rates of the decoders on the clips of a folder or on some of the built-in corpus."""
    with tempfile.TemporaryDirectory() as folder:
        files = built_in_clips(Path(folder)) if clips is None else sorted(clips.rglob("*.mp4"))[:40]
        if not files:
            sys.exit(f"{clips}: no mp4 files")
        what = {"count": len(files), "what": describe(files[0], clips is None)}
        return {"clips": what, "decoding": decode_speed(files)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write `throughput.json` and `throughput.md`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--clips", type=Path, help="folder of mp4 files")
    add("--shards", type=Path, help="folder with train and tokenizer.model")
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--sizes", nargs="+", choices=list(ROWS), default=list(ROWS))
    add("--steps", type=int, default=5, help="timed steps at tiny; base takes one")
    add("--rounds", type=int, default=5, help="rounds with and without the loader")
    add("--loader-steps", type=int, default=12, help="timed steps of either kind in a round")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    load = Path("/proc/loadavg").read_text().split()[0] if sys.platform == "linux" else "nan"
    found: dict[str, Any] = {
        "load": float(load),
        "date": datetime.now(UTC).date().isoformat(),
        "threads": torch.get_num_threads(),
        "ffmpeg": ffmpeg_version(),
        "machine": results.machine(),
        "versions": results.versions(),
    }
    if "decoding" in args.parts:
        found |= decoding(args.clips)
    if "training" in args.parts:
        found["training"] = [train_speed(s, args.steps if s == "tiny" else 1) for s in args.sizes]
    if "loader" in args.parts:
        with shards_of(args.shards) as shards:
            found["loader"] = loader_speed(shards, args.rounds, args.loader_steps)
    results.write(found, args.out / "throughput.json")
    (args.out / "throughput.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
