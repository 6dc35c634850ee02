"""Data preparation: speed, memory, kills and damaged corpora.

    python tests/benchmarks/prepare.py encode|read|kills|damaged|memory... --data DIR [--rounds 5]

DIR holds `clips`, a folder of real videos. Each part rewrites its section of results/prepare.json.
encode: `make_shards` against one `ffmpeg` command per clip doing the same cut, scale and encode,
two processes of one thread each; ratio of the throughputs, in turns. `make_shards` also decodes
what it made, seals it and builds the index; only the imports are left out.
read: the training loader in one process (shards, checks, decoding in its child, crop, flip, noise)
against bare PyAV decoding of the same frames and sounds; ratio of the throughputs, in turns.
kills: so many SIGKILLs of a build at random moments, then the bytes against an undisturbed build.
damaged: mutated files, crafted ones and the real clips, as they are and re-encoded: each must be in
a shard or in the quarantine, exactly once. memory: the most a worker took, by kind of clip.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import av
import psutil

sys.path.append(str(Path(__file__).parents[1]))

from faults.media import write_damaged
from media_files import write_corpus
from shard_builds import bytes_of, command, killed, settled

from data_tools.check_shards import check_folder
from data_tools.make_shards import make_shards
from data_tools.transcode import Encoding
from mmssl.data.loader import train_loader
from mmssl.eval import results
from mmssl.specs import DataSpec, ViewSpec

WORKERS, TARGET, LONG = 2, 0.8, "nasa_13013.mp4"
ENCODING = Encoding(short_side=128, gop=20)
CHANGES: dict[str, Any] = {  # those of the flagship's family
    "video": [{"kind": "random_resized_crop"}, {"kind": "horizontal_flip"}],
    "audio": [{"kind": "noise", "options": {"scale": [0.01, 0.01]}}],
}


def encode(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Throughput of `make_shards` over that of the command line, `args.clips` cuts of 4 s."""
    source = args.data / "clips" / LONG
    starts = [round(8 * k / args.clips, 3) for k in range(args.clips)]
    rows = [{"media": str(source), "start": s, "end": s + 4} for s in starts]
    manifest = folder / "cuts.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def ours() -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        (report,) = make_shards(manifest, folder / "out", workers=WORKERS, reencode=ENCODING)
        assert report.samples == args.clips

    def theirs() -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda s: _ffmpeg(source, s, folder / f"{s}.mp4"), starts))

    return {"clips": args.clips, "seconds": 4, **alternate(theirs, ours, args.rounds)}


def _ffmpeg(source: Path, start: float, out: Path) -> None:
    words = f"-v error -nostdin -y -threads 1 -ss {start} -t 4 -i {source} -map 0:v:0 -map 0:a:0"
    words += " -filter_threads 1 -vf scale=228:128:flags=area -pix_fmt yuv420p -c:v libx264"
    words += f" -preset medium -crf {ENCODING.quality} -g {ENCODING.gop} -bf 0 -threads 1"
    words += f" -x264-params cpu-independent=1 -c:a aac -b:a 160k {out}"
    subprocess.run(["ffmpeg", *words.split()], check=True)


def alternate(bare: Callable[[], None], whole: Callable[[], None], rounds: int) -> dict[str, Any]:
    """Wall and processor seconds of both, once to warm up and then in turns; ratios bare / whole.

    The processor's tell what the code costs even on a machine that has other things to do.
    """
    found: list[dict[str, float]] = []
    for k in range(rounds + 1):
        row = {}
        for name, work in (("bare", bare), ("whole", whole))[:: 1 if k % 2 else -1]:
            began, worked = time.perf_counter(), _core_s()
            work()
            row[f"{name}_s"] = time.perf_counter() - began
            row[f"{name}_core_s"] = _core_s() - worked
        row["ratio"] = row["bare_s"] / row["whole_s"]
        row["work"] = row["bare_core_s"] / row["whole_core_s"]
        found.append(row)
    medians = {key: statistics.median(row[key] for row in found[1:]) for key in found[0]}
    return medians | {"ratios": [row["ratio"] for row in found[1:]]}


def _core_s() -> float:
    """Processor seconds of this process and of all that it started."""
    here = psutil.Process()
    return sum(sum(p.cpu_times()[:4]) for p in (here, *here.children(recursive=True)))


def read(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Throughput of the loader over that of bare decoding."""
    starts = [round(8 * k / args.clips, 3) for k in range(args.clips)]
    media = str(args.data / "clips" / LONG)
    rows = [{"media": media, "start": s, "end": s + 4} for s in starts]
    (folder / "cuts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoding = replace(ENCODING, fps=10.0)
    make_shards(folder / "cuts.jsonl", folder / "out", workers=WORKERS, reencode=encoding)
    views = {
        "video": ViewSpec(modality="video", crop_s=3.9, fps=10, size=112, augment=CHANGES["video"]),
        "audio": ViewSpec(modality="audio", crop_s=3.9, hz=44100, augment=CHANGES["audio"]),
    }
    spec = DataSpec(train=str(folder / "out"), workers=0)
    loader = train_loader(spec, views, 4, 0, 0, 1, None)

    def ours() -> None:
        for _ in range(args.clips // 4):
            next(loader)

    files = [data for name, data in members(folder / "out") if name.endswith("mp4")]

    def theirs() -> None:
        for data in files:
            with av.open(io.BytesIO(data)) as container:
                for stream in container.streams:
                    stream.thread_count = 1
                for frame in container.decode():
                    frame.to_ndarray(**({"format": "rgb24"} if hasattr(frame, "width") else {}))

    try:
        return {"clips": args.clips, "seconds": 4, **alternate(theirs, ours, args.rounds)}
    finally:
        loader.close()


def members(folder: Path) -> list[tuple[str, bytes]]:
    """Names and bytes of all members of the tars."""
    import tarfile

    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                found.append((info.name, file.read() if file else b""))
    return found


def kills(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """SIGKILLs of a build at random moments, the last ones while its index is made."""
    random_ = random.Random(args.seed)
    corpus, out = folder / "media", folder / "out"
    write_corpus(corpus, args.rows)
    options = ("--workers", str(WORKERS), "--shard-samples", "60", "--reencode", "short_side=16")
    subprocess.run(command(corpus, folder / "whole", *options), check=True)
    moments = sorted(random_.uniform(0, 1.05 * args.rows) for _ in range(args.kills))
    hit, at = 0, []
    for moment in moments:
        rest_s = random_.uniform(0, 0.1) + max(0.0, moment - args.rows) / args.rows * 60

        hit += killed(
            command(corpus, out, *options), partial(_due, out, min(moment, args.rows), rest_s, [])
        )
        at.append(settled(out))
        assert not out.exists() or moment > args.rows
    subprocess.run(command(corpus, out, *options), check=True)
    same = bytes_of(out) == bytes_of(folder / "whole")
    left = [p.name for p in folder.iterdir() if p.name.startswith(".")]
    return {"rows": args.rows, "kills": hit, "settled_at": at, "identical": same, "left": left}


def _due(out: Path, rows: float, rest_s: float, due: list[float], _: float) -> bool:
    """Whether it is so long since so many rows were settled."""
    if not due and settled(out) >= int(rows):
        due.append(time.monotonic() + rest_s)
    return bool(due) and time.monotonic() >= due[0]


def damaged(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What became of each damaged file."""
    shutil.copytree(args.data / "clips", folder / "media")
    (folder / "media").chmod(0o755)
    files = write_damaged(folder / "media", args.files, args.seed)
    found: dict[str, Any] = {"files": files}
    for name, encoding in {"as_they_are": None, "reencoded": Encoding(short_side=16)}.items():
        began = time.perf_counter()
        (report,) = make_shards(
            folder / "media", folder / name, workers=WORKERS, max_bad_share=1.0, reencode=encoding
        )
        lines = (folder / name / "quarantine.jsonl").read_text().splitlines()
        bad = [json.loads(line) for line in lines]
        records = [json.loads(d) for n, d in members(folder / name) if n.endswith(".json")]
        settled = Counter([x["index"] for x in bad] + [x["index"] for x in records])
        found[name] = {
            "samples": report.samples,
            "reasons": dict(sorted(Counter(x["reason"] for x in bad).items())),
            "each_once": settled == Counter(range(files)),
            "check_shards": len(check_folder(folder / name).damages),
            "worker_mb": report.worker_mb,
            "seconds": round(time.perf_counter() - began),
        }
    return found


def memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak resident megabytes of a worker, by what it re-encodes."""
    kinds = {"640x360": "640x360", "1920x1080": "1920x1080", "3840x2160": "3840x2160"}
    found = {"real clips": _peak(args.data / "clips", folder / "real")}
    for name, size in kinds.items():
        source = folder / name
        source.mkdir()
        words = f"-v error -f lavfi -i testsrc2=s={size}:r=25:d=2 -f lavfi -i sine=d=2"
        words += f" -c:v libx264 -preset ultrafast -threads 1 -c:a aac {source / 'clip.mp4'}"
        subprocess.run(["ffmpeg", *words.split()], check=True)
        found[f"2 s of {name}, kept size"] = _peak(source, folder / f"{name}-kept", "gop=20")
        found[f"2 s of {name}, to 128"] = _peak(source, folder / f"{name}-small")
    return {"megabytes": found, "limit_mb": 2048}


def _peak(source: Path, out: Path, encoding: str = "short_side=128,gop=20") -> int:
    words = command(source, out, "--workers", "1", "--reencode", encoding)
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return int(re.search(r"up to (\d+) MB", done.stdout).group(1))  # type: ignore[union-attr]


PARTS = {"encode": encode, "read": read, "kills": kills, "damaged": damaged, "memory": memory}


def markdown(found: dict[str, Any]) -> str:
    """The tables."""
    lines = ["# Data preparation", ""]
    for name, part in found.items():
        machine = part["machine"]
        lines += [
            f"## {name}",
            "",
            f"{machine['processor']}, {machine['cores']} cores; {part['date']}; seed "
            f"{part['seed']}; load of the machine at the start {part['load']}.",
            "",
        ]
        if "ratio" in part:
            target = f"target {TARGET}"
            bare = "ffmpeg" if name == "encode" else "bare decoding"
            ratios = ", ".join(f"{r:.2f}" for r in part["ratios"])
            lines += [
                f"{part['clips']} clips of {part['seconds']} s: {bare} {part['bare_s']:.2f} s, "
                f"ours {part['whole_s']:.2f} s; ratio **{part['ratio']:.2f}** ({target}; of the "
                f"rounds {ratios}). Processor: {bare} {part['bare_core_s']:.2f} s, ours "
                f"{part['whole_core_s']:.2f} s; ratio **{part['work']:.2f}**.",
            ]
        else:
            facts = {k: v for k, v in part.items() if k not in ("machine", "date", "seed", "load")}
            lines += [f"- {key}: {value}" for key, value in facts.items()]
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="+", choices=list(PARTS))
    add("--data", type=Path, required=True)
    add("--rounds", type=int, default=5)
    add("--clips", type=int, default=32, help="of encode and read")
    add("--rows", type=int, default=500, help="of kills")
    add("--kills", type=int, default=20)
    add("--files", type=int, default=1000, help="mutated ones, of damaged")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    path = args.out / "prepare.json"
    for name in args.parts:
        load = Path("/proc/loadavg").read_text().split()[0] if sys.platform == "linux" else "nan"
        with tempfile.TemporaryDirectory() as folder:
            part = PARTS[name](args, Path(folder))
        found = json.loads(path.read_text()) if path.exists() else {}
        found[name] = part | {
            "date": datetime.now(UTC).date().isoformat(),
            "seed": args.seed,
            "load": float(load),
            "machine": results.machine(),
        }
        results.write(found, path)
        (args.out / "prepare.md").write_text(markdown(found), encoding="utf-8")
        print(json.dumps(part, indent=1))


if __name__ == "__main__":
    main()
