"""Training step of wav2vec 2.0 BASE, against transformers' Wav2Vec2ForPreTraining.

    python tests/benchmarks/wav2vec2_speed.py [--rows 4] [--seconds 5] [--rounds 5]

Both have the same weights (imported by `mmssl import`), waveforms, hidden frames, negatives,
dropout rates and AdamW; LayerDrop is off in both, since a layer dropped costs nothing there and a
whole layer here. First, without dropout and with the same Gumbel noise, the loss and every gradient
are compared in fp32. Then the steps are timed in turns within one process, and the peak memory of
each is read in a process of its own. The peer draws no masks: it is given ours, ready made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining
from transformers import __version__ as transformers_version

from mmssl import config
from mmssl.build import build_model
from mmssl.eval import results
from mmssl.interop.huggingface import import_folder
from mmssl.model import Model
from mmssl.objectives.frames import Marked, Negatives, draw_negatives, marked
from mmssl.tasks.masked import Masked
from mmssl.towers import Tower
from mmssl.train import checkpoint
from mmssl.types import Batch, ViewBatch

RATE = 16000
LIMIT = 0.85  # of the peer's time
TOLERANCE = 1e-4  # of a gradient's largest number
STEPS = 400_000
DROPOUTS = ("hidden", "attention", "feat_proj", "feat_quantizer")


def peer_config(rate: float) -> Wav2Vec2Config:
    """wav2vec 2.0 BASE; rate: of the dropout in and around the layers."""
    rates = {f"{name}_dropout": rate for name in DROPOUTS}
    none = {"activation_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0}
    return Wav2Vec2Config(**rates, **none, mask_time_prob=0.65, mask_feature_prob=0.0)


@dataclass(frozen=True)
class Drawn:
    """A batch, and what the mask and the negatives of our task are on it."""

    batch: Batch
    where: Marked
    negatives: Negatives
    frames: int

    def of_peer(self) -> dict[str, Tensor]:
        """The peer's arguments."""
        rows, width = self.where.index_PM.shape
        hidden = torch.zeros(rows, self.frames, dtype=torch.bool)
        hidden.scatter_(1, self.where.index_PM, self.where.filled_PM)
        first_P11 = torch.arange(rows)[:, None, None] * self.frames
        count = self.negatives.index_PMK.shape[2]
        index_PM1 = self.where.index_PM[..., None].expand(-1, -1, count)
        frames_PMK = index_PM1.gather(1, self.negatives.index_PMK) + first_P11
        sampled = torch.zeros(rows, self.frames, count, dtype=torch.int64)
        sampled.scatter_(1, index_PM1[:, :width], frames_PMK)
        return {
            "input_values": self.batch.views["x"].data,
            "mask_time_indices": hidden,
            "sampled_negative_indices": sampled,
        }


def draw(model: Model, rows: int, seconds: float, seed: int) -> Drawn:
    """Noise as sound, and what the task of `model` hides in it."""
    generator = torch.Generator().manual_seed(seed)
    samples = round(seconds * RATE)
    index = torch.arange(rows)
    view = ViewBatch(
        modality="audio",
        data=0.1 * torch.randn(rows, samples, generator=generator),
        lengths_P=torch.full((rows,), samples),
        rows_P=index,
        slots_P=torch.zeros_like(index),
        seeds_P=index + rows * seed,
        start_s_P=torch.zeros(rows),
        present_BL=torch.ones(rows, 1, dtype=torch.bool),
        rate=float(RATE),
    )
    zero = torch.zeros(rows, dtype=torch.int64)
    batch = Batch({"x": view}, [str(i) for i in range(rows)], index, zero, index)
    task, tower = _parts(model)
    hidden = task._hidden(tower, view, 0.0)
    where = marked(hidden)
    negatives = draw_negatives(
        view.seeds_P, where, task.target.negatives, stream=f"{task.name}/negatives"
    )
    return Drawn(batch, where, negatives, hidden.shape[1])


def _parts(model: Model) -> tuple[Masked, Tower]:
    (task,), (tower,) = model.tasks.values(), model.towers.values()
    assert isinstance(task, Masked)
    assert isinstance(tower, Tower)
    return task, tower


# --- the two models


def make_folders(work: Path, rate: float) -> tuple[Path, Path]:
    """The same fresh weights as a folder of transformers and as a run."""
    torch.manual_seed(0)
    theirs, ours = work / f"peer-{rate}", work / f"run-{rate}"
    Wav2Vec2ForPreTraining(peer_config(rate)).save_pretrained(theirs)
    import_folder(theirs, ours)
    return theirs, ours


def load_ours(run: Path) -> Model:
    """Ours, ready to train."""
    folder = checkpoint.find(run, "best")
    model = build_model(config.load(folder / "config.yaml"))
    model.load_state_dict(checkpoint.load_weights(folder, ema=False))
    return model.train()


def load_peer(folder: Path) -> nn.Module:
    """The peer, ready to train."""
    peer: nn.Module = Wav2Vec2ForPreTraining.from_pretrained(folder).train()
    return peer


def loss_of(model: nn.Module, drawn: Drawn) -> Tensor:
    """Loss of a hidden frame; the peer gives the sum over frames."""
    if isinstance(model, Model):
        loss: Tensor = model(drawn.batch, 0, STEPS)[0]
        return loss
    total: Tensor = model(**drawn.of_peer()).loss
    return total / drawn.where.filled_PM.sum()


# --- equal loss and gradients


def compare(work: Path, rows: int, seconds: float) -> dict[str, Any]:
    """Loss and gradients of both without dropout, by our names of the parameters."""
    theirs, ours = make_folders(work, 0.0)
    model, peer = load_ours(ours), load_peer(theirs)
    drawn = draw(model, rows, seconds, 0)
    with _same_noise(model, drawn):
        losses = [loss_of(m, drawn) for m in (model, peer)]
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in model.named_parameters()}
    missing = [name for name, grad in found.items() if grad is None]
    wanted = _in_our_names(peer, theirs, work)
    worst = {
        name: float((grad - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-12))
        for name, grad in found.items()
        if grad is not None
    }
    return {
        "loss": [loss.item() for loss in losses],
        "parameters": [sum(p.numel() for p in m.parameters()) for m in (model, peer)],
        "gradients": len(worst),
        "without_gradient": missing,
        "worst": max(worst.values()),
        "worst_name": max(worst, key=lambda name: worst[name]),
    }


@contextmanager
def _same_noise(model: Model, drawn: Drawn) -> Iterator[None]:
    """The peer's exponential draws of the Gumbel noise are ours."""
    task, _ = _parts(model)
    seeds, width = drawn.batch.views["x"].seeds_P, drawn.where.index_PM.shape[1]
    uniform = task.target.quantizer.noise(seeds, width, f"{task.name}/gumbel")
    every = torch.full((len(seeds), drawn.frames, *uniform.shape[2:]), 0.5)
    index = drawn.where.index_PM[..., None, None].expand_as(uniform)
    exponential = -every.scatter(1, index, uniform).log()

    def draw_ours(logits: Tensor) -> Tensor:
        return logits.copy_(exponential.reshape(logits.shape))

    with mock.patch.object(torch.Tensor, "exponential_", draw_ours):
        yield


def _in_our_names(peer: nn.Module, folder: Path, work: Path) -> dict[str, Tensor]:
    """The peer's gradients, read by the same table as its weights."""
    target = work / "gradients"
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    gradients = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    file = "model.safetensors"
    every = {n: gradients.get(n, x).contiguous() for n, x in load_file(folder / file).items()}
    save_file(every, target / file, metadata={"format": "pt"})
    import_folder(target, work / "gradients-run")
    return checkpoint.load_weights(checkpoint.find(work / "gradients-run", "best"), ema=False)


# --- time and memory


def _autocast(precision: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def stepper(model: nn.Module, precision: str) -> Callable[[Drawn], tuple[float, float]]:
    """A training step; returns the seconds of forward and backward, and those of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=True)

    def step(drawn: Drawn) -> tuple[float, float]:
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with _autocast(precision):
            loss = loss_of(model, drawn)
        loss.backward()  # type: ignore[no-untyped-call]
        middle = time.perf_counter()
        optimizer.step()
        return middle - begin, time.perf_counter() - middle

    return step


def clock(folders: tuple[Path, Path], args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Seconds of every round, in turns; the first round warms up and is not counted."""
    ours = load_ours(folders[1])
    steps = {"peer": stepper(load_peer(folders[0]), precision), "ours": stepper(ours, precision)}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for i in tqdm(range(args.rounds + 1), desc=precision, disable=None):
        drawn = draw(ours, args.rows, args.seconds, i)
        for name in sorted(steps, reverse=bool(i % 2)):
            taken = steps[name](drawn)
            if i:
                seconds[name].append(taken)
    whole = {name: [sum(pair) for pair in pairs] for name, pairs in seconds.items()}
    passes = {name: [pair[0] for pair in pairs] for name, pairs in seconds.items()}
    middle = {name: statistics.median(values) for name, values in whole.items()}
    both = {name: statistics.median(values) for name, values in passes.items()}
    return {
        "step_s": middle,
        "passes_s": both,
        "ratio": middle["ours"] / middle["peer"],
        "ratio_of_passes": both["ours"] / both["peer"],
        "ratio_by_round": [a / b for a, b in zip(whole["ours"], whole["peer"], strict=True)],
    }


def measure_memory(name: str, folders: tuple[Path, Path], args: argparse.Namespace) -> None:
    """Run three steps of one model and print the peak memory of this process in MiB."""
    model: nn.Module = load_ours(folders[1]) if name == "ours" else load_peer(folders[0])
    step = stepper(model, args.precisions[0])
    with torch.device("meta"):  # enough to draw masks
        masks = build_model(config.load(checkpoint.find(folders[1], "best") / "config.yaml"))
    for i in range(3):
        step(draw(masks, args.rows, args.seconds, i))
    # not getrusage: its maximum begins with that of the process that started this one
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def memory(folders: tuple[Path, Path], args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Peak memory of a process that trains one of them, MiB."""
    found = {}
    for name in ("peer", "ours"):
        line = [sys.executable, __file__, "--memory-of", name, *folders, "--precisions", precision]
        line += ["--rows", args.rows, "--seconds", args.seconds]
        done = subprocess.run(
            [str(word) for word in line], check=True, capture_output=True, text=True
        )
        found[name] = float(done.stdout.split()[-1])
    return {**found, "ratio": found["ours"] / found["peer"]}


# --- the table


def save(found: dict[str, Any], out: Path) -> None:
    """Write `wav2vec2_speed.json` and `wav2vec2_speed.md`."""
    results.write(found, out / "wav2vec2_speed.json")
    equal = found["equal"]
    lines = [
        "# wav2vec 2.0 BASE: training step against transformers",
        "",
        f"{found['rows']} rows of {found['seconds']} s, AdamW, same weights, masks, negatives and",
        f"dropout rates; medians of {found['rounds']} rounds in turns. Limit: {LIMIT} of the time,",
        "no more memory.",
        "",
        "| precision | transformers | mmssl | ratio | without AdamW | range by round | memory "
        "transformers | memory mmssl |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(name, part) for name, part in found["precisions"].items()),
        "",
        f"Parameters: {equal['parameters'][0]:,} here, {equal['parameters'][1]:,} there. Loss of a",
        f"hidden frame without dropout: {equal['loss'][0]:.6f} here, {equal['loss'][1]:.6f} there.",
        f"All {equal['gradients']} gradients are there; `{equal['worst_name']}` differs most,",
        f"by {equal['worst']:.1e} of its largest number (limit {TOLERANCE:.0e}).",
        "",
        f"{found['machine']['processor']}, {found['machine']['cores']} cores; torch "
        f"{found['versions']['torch']}, transformers {found['transformers']}; {found['date']}.",
        "",
    ]
    (out / "wav2vec2_speed.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def _row(name: str, part: dict[str, Any]) -> str:
    by_round, used = part["ratio_by_round"], part["memory"]
    return (
        f"| {name} | {part['step_s']['peer']:.2f} s | {part['step_s']['ours']:.2f} s | "
        f"**{part['ratio']:.2f}** | {part['ratio_of_passes']:.2f} | {min(by_round):.2f} to "
        f"{max(by_round):.2f} | {used['peer']:,.0f} MiB | {used['ours']:,.0f} MiB |"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, default=4)
    add("--seconds", type=float, default=5.0)
    add("--rounds", type=int, default=5)
    add("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--memory-of", nargs=3, help=argparse.SUPPRESS)  # a name and both folders
    args = parser.parse_args(argv)
    if args.memory_of is not None:
        name, theirs, ours = args.memory_of
        measure_memory(name, (Path(theirs), Path(ours)), args)
        return
    found: dict[str, Any] = {
        "rows": args.rows,
        "seconds": args.seconds,
        "rounds": args.rounds,
        "precisions": {},
        "transformers": transformers_version,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": results.versions(),
        "machine": results.machine(),
    }
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        found["equal"] = compare(work, args.rows, args.seconds)
        print(json.dumps(found["equal"]), flush=True)
        folders = make_folders(work, 0.1)
        for precision in args.precisions:
            times = clock(folders, args, precision)
            used = memory(folders, args, precision)
            found["precisions"][precision] = {**times, "memory": used}
    save(found, args.out)


if __name__ == "__main__":
    main()
